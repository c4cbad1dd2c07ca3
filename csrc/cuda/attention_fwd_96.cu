// Attention forward for head sizes up to 96; attention_fwd.cuh has the kernel.
#include "attention_fwd.cuh"

namespace fastlm::cuda {

template void attention_fwd<bf16, 96>(const AttentionParams&, const AttentionArgs&);
template void attention_fwd<fp16, 96>(const AttentionParams&, const AttentionArgs&);

}  // namespace fastlm::cuda
