// Attention backward for head sizes up to 96; attention_bwd.cuh has the kernel.
#include "attention_bwd.cuh"

namespace fastlm::cuda {

template void attention_bwd<bf16, 96>(const AttentionParams&, const AttentionArgs&);
template int64_t attention_mask_partials<bf16, 96>(const AttentionArgs&);
template void attention_bwd<fp16, 96>(const AttentionParams&, const AttentionArgs&);
template int64_t attention_mask_partials<fp16, 96>(const AttentionArgs&);

}  // namespace fastlm::cuda
