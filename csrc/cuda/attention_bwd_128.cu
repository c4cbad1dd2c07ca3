// Attention backward for head sizes up to 128; attention_bwd.cuh has the kernel.
#include "attention_bwd.cuh"

namespace fastlm::cuda {

template void attention_bwd<bf16, 128>(const AttentionParams&, const AttentionArgs&);
template void attention_bwd<fp16, 128>(const AttentionParams&, const AttentionArgs&);
template void attention_bwd<float, 128>(const AttentionParams&, const AttentionArgs&);

}  // namespace fastlm::cuda
