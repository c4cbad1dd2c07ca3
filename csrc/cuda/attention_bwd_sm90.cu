// Attention backward on Hopper: which calls it serves, its workspace and its launches; attention_bwd_sm90.cuh has the
// kernels.
#include "attention_bwd_sm90.cuh"

namespace fastlm::cuda {

namespace {

constexpr int64_t kAlignment = 32;                 // of the workspace's parts, in floats
constexpr int64_t kTileNumbers = 64 * kWarpgroup;  // of a tile of dQ

struct Plan {
  int64_t stats, tiles, dq, counters;  // floats, tiles of queries, floats, ints

  Plan(int64_t B, int64_t H, int64_t T, int64_t D)
      : stats(divided_up(2 * B * H * T, kAlignment) * kAlignment), tiles(B * H * divided_up(T, kTileNumbers / D)),
        dq(tiles * kTileNumbers), counters(1 + tiles) {}
};

template <class T, int D>
void launch_sm90(const AttentionParams& params, const AttentionArgs& args) {
  using C = HopperBackwardTile<T, D>;
  static_assert(C::M * D == kTileNumbers);
  const Plan plan(args.B, args.H, args.T, D);
  float* const dq = args.stats + plan.stats;
  const HopperBackwardSpace space{dq, reinterpret_cast<int*>(dq + plan.dq)};
  const HopperBackwardMaps maps{map_of<T>(args.q, args.B, args.H, args.T, D, C::M),
                                map_of<T>(args.k, args.B, args.Hkv, args.S, D, C::kRows),
                                map_of<T>(args.v, args.B, args.Hkv, args.S, D, C::kRows),
                                map_of<T>(args.dout, args.B, args.H, args.T, D, C::M)};
  queue_zeros(space.counters, (size_t)plan.counters * sizeof(int), args.stream);
  launch({"attention_delta", {(unsigned)divided_up<int64_t>(params.stat_rows, 8)}, 256, 0, args.stream},
         attention_delta_kernel<T>, params);
  const int64_t blocks = divided_up<int64_t>(args.S, C::N) * args.Hkv * args.B;
  launch({"attention_bwd_sm90", {(unsigned)blocks}, C::kThreads, sizeof(C), args.stream},
         attention_bwd_sm90_kernel<T, D>, params, maps, space);
  launch({"attention_dq_sm90", {(unsigned)plan.tiles}, 2 * kWarpgroup, sizeof(T) * C::M * D, args.stream},
         attention_dq_sm90_kernel<T, D>, params, space);
}

}  // namespace

bool attention_bwd_serves_sm90(const AttentionParams& p, const AttentionArgs& args) {
  return args.B * args.H * args.T > 0 && args.dq.data && args.dk.data && args.dv.data &&
         has_map(args.dout, args.B, args.H, args.T) && sm90_serves(p, args);
}

int64_t attention_bwd_workspace(int device, int64_t B, int64_t H, int64_t T, int64_t D, int64_t Dv, int type,
                                bool plain) {
  set_device(device);
  const bool sized = type != (int)DType::f32 && D == Dv && (D == 64 || D == 128);
  if (!plain || !sized || architecture() != 90) return 3 * B * H * T;
  const Plan plan(B, H, T, D);
  return plan.stats + plan.dq + plan.counters;
}

void attention_bwd_sm90(const AttentionParams& params, const AttentionArgs& args) {
  const auto sized = [&](auto type) {
    using T = decltype(type);
    return args.D == 64 ? launch_sm90<T, 64>(params, args) : launch_sm90<T, 128>(params, args);
  };
  args.type == (int)DType::bf16 ? sized(bf16{}) : sized(fp16{});
}

}  // namespace fastlm::cuda
