// Attention forward for head sizes up to 128; attention_fwd.cuh and attention_decode.cuh have the kernels.
#include "attention_decode.cuh"
#include "attention_fwd.cuh"

namespace fastlm::cuda {

template void attention_fwd<bf16, 128>(const AttentionParams&, const AttentionArgs&);
template void attention_decode<bf16, 128>(const AttentionParams&, const AttentionArgs&);
template int64_t attention_splits<bf16, 128>(const AttentionArgs&);
template void attention_fwd<fp16, 128>(const AttentionParams&, const AttentionArgs&);
template void attention_decode<fp16, 128>(const AttentionParams&, const AttentionArgs&);
template int64_t attention_splits<fp16, 128>(const AttentionArgs&);
template void attention_fwd<float, 128>(const AttentionParams&, const AttentionArgs&);
template void attention_decode<float, 128>(const AttentionParams&, const AttentionArgs&);
template int64_t attention_splits<float, 128>(const AttentionArgs&);

}  // namespace fastlm::cuda
