// Attention forward for head sizes up to 96; attention_fwd.cuh and attention_decode.cuh have the kernels.
#include "attention_decode.cuh"
#include "attention_fwd.cuh"

namespace fastlm::cuda {

template void attention_fwd<bf16, 96>(const AttentionParams&, const AttentionArgs&);
template void attention_decode<bf16, 96>(const AttentionParams&, const AttentionArgs&);
template int64_t attention_splits<bf16, 96>(const AttentionArgs&);
template void attention_fwd<fp16, 96>(const AttentionParams&, const AttentionArgs&);
template void attention_decode<fp16, 96>(const AttentionParams&, const AttentionArgs&);
template int64_t attention_splits<fp16, 96>(const AttentionArgs&);

}  // namespace fastlm::cuda
