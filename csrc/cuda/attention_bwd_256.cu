// Attention backward for head sizes up to 256; attention_bwd.cuh has the kernel.
#include "attention_bwd.cuh"

namespace fastlm::cuda {

template void attention_bwd<bf16, 256>(const AttentionParams&, const AttentionArgs&);
template int64_t attention_mask_partials<bf16, 256>(const AttentionArgs&);
template void attention_bwd<fp16, 256>(const AttentionParams&, const AttentionArgs&);
template int64_t attention_mask_partials<fp16, 256>(const AttentionArgs&);
template void attention_bwd<float, 256>(const AttentionParams&, const AttentionArgs&);
template int64_t attention_mask_partials<float, 256>(const AttentionArgs&);

}  // namespace fastlm::cuda
