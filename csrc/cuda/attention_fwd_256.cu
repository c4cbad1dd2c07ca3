// Attention forward for head sizes up to 256; attention_fwd.cuh has the kernel.
#include "attention_fwd.cuh"

namespace fastlm::cuda {

template void attention_fwd<bf16, 256>(const AttentionParams&, const AttentionArgs&);
template void attention_fwd<fp16, 256>(const AttentionParams&, const AttentionArgs&);
template void attention_fwd<float, 256>(const AttentionParams&, const AttentionArgs&);

}  // namespace fastlm::cuda
