// Attention forward on Hopper: which calls it serves, and their launch; attention_sm90.cuh has the kernel.
#include "attention_sm90.cuh"

namespace fastlm::cuda {

namespace {

// The strides of a view in bytes; any will do where there is one row, head or batch.
template <class T>
TensorMap map_of(const Heads& x, int64_t batch, int64_t heads, int64_t rows, int64_t columns, int tile_rows) {
  const auto bytes = [](int64_t stride, int64_t size) { return size > 1 ? stride * (int64_t)sizeof(T) : 16; };
  return tensor_map<T>(x.data, {columns, rows, heads, batch}, {bytes(x.t, rows), bytes(x.h, heads), bytes(x.b, batch)},
                       tile_rows);
}

// TMA takes strides below 2^40 bytes; views that repeat a row, head or batch are left to the other kernel.
bool has_map(const Heads& x, int64_t batch, int64_t heads, int64_t rows) {
  const auto fits = [](int64_t stride, int64_t size) {
    return size == 1 || (stride > 0 && stride < (int64_t)1 << 38);
  };
  return fits(x.b, batch) && fits(x.h, heads) && fits(x.t, rows);
}

template <class T, int D>
void launch_sm90(const AttentionParams& params, const AttentionArgs& args) {
  using C = HopperTile<T, D>;
  const int64_t blocks = divided_up<int64_t>(args.T, C::M) * args.H * args.B;
  if (blocks == 0) return;
  const HopperMaps maps{map_of<T>(args.q, args.B, args.H, args.T, D, C::kRows),
                        map_of<T>(args.k, args.B, args.Hkv, args.S, D, C::N),
                        map_of<T>(args.v, args.B, args.Hkv, args.S, D, C::N)};
  launch({"attention_fwd_sm90", {(unsigned)blocks}, C::kThreads, sizeof(C), args.stream},
         attention_fwd_sm90_kernel<T, D>, params, maps);
}

}  // namespace

bool attention_fwd_serves_sm90(const AttentionParams& p, const AttentionArgs& args) {
#ifdef FASTLM_WITHOUT_SM90A
  return false;
#else
  if (args.type == (int)DType::f32 || p.D != p.Dv || (p.D != 64 && p.D != 128)) return false;
  if (p.general() || p.drops || p.cu_q || args.left >= 0 || !p.vectors || p.S == 0) return false;
  return has_map(p.q, p.B, p.H, p.T) && has_map(p.k, p.B, p.Hkv, p.S) && has_map(p.v, p.B, p.Hkv, p.S) &&
         architecture() == 90 && has_tensor_maps();
#endif
}

void attention_fwd_sm90(const AttentionParams& params, const AttentionArgs& args) {
  const auto sized = [&](auto type) {
    using T = decltype(type);
    return args.D == 64 ? launch_sm90<T, 64>(params, args) : launch_sm90<T, 128>(params, args);
  };
  args.type == (int)DType::bf16 ? sized(bf16{}) : sized(fp16{});
}

}  // namespace fastlm::cuda
