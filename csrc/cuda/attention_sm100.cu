// Attention forward on Blackwell: which calls it serves, and their launch; attention_sm100.cuh has the kernel.
#include "attention_sm100.cuh"

namespace fastlm::cuda {

namespace {

template <class T, int D>
void launch_sm100(const AttentionParams& params, const AttentionArgs& args) {
  using C = BlackwellTile<T, D>;
  const int64_t blocks = divided_up<int64_t>(args.T, C::M) * args.H * args.B;
  if (blocks == 0) return;
  const HopperMaps maps{map_of<T>(args.q, args.B, args.H, args.T, D, C::kRows),
                        map_of<T>(args.k, args.B, args.Hkv, args.S, D, C::N),
                        map_of<T>(args.v, args.B, args.Hkv, args.S, D, C::N)};
  launch({"attention_fwd_sm100", {(unsigned)blocks}, C::kThreads, sizeof(C), args.stream},
         attention_fwd_sm100_kernel<T, D>, params, maps);
}

}  // namespace

bool attention_fwd_serves_sm100([[maybe_unused]] const AttentionParams& p, [[maybe_unused]] const AttentionArgs& args) {
#ifdef FASTLM_WITHOUT_SM100A
  return false;
#else
  return plain_on_panels(p, args) && architecture() == 100 && has_tensor_maps();
#endif
}

void attention_fwd_sm100(const AttentionParams& params, const AttentionArgs& args) {
  const auto sized = [&](auto type) {
    using T = decltype(type);
    return args.D == 64 ? launch_sm100<T, 64>(params, args) : launch_sm100<T, 128>(params, args);
  };
  args.type == (int)DType::bf16 ? sized(bf16{}) : sized(fp16{});
}

}  // namespace fastlm::cuda
