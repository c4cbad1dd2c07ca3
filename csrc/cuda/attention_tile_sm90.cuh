// What attention's two kernels for Hopper share: products of tiles that lie in shared memory as panels of 64 columns,
// and the tensor maps by which TMA finds tiles.
#pragma once

#include <hopper.cuh>

#include "attention.cuh"

namespace fastlm::cuda {

// c (64, N) = a (64, D) b (N, D)^T; issued, not waited for.
template <class T, int PANELS, int N>
FASTLM_DEVICE void issue_scores(float (&c)[1][N / 8][4], const T (&a)[PANELS][64][kPanelColumns],
                                const T (&b)[PANELS][N][kPanelColumns]) {
#pragma unroll
  for (int panel = 0; panel < PANELS; ++panel)
#pragma unroll
    for (int column = 0; column < kPanelColumns; column += 16) {
      const uint64_t left = wgmma_descriptor(&a[panel][0][column], 16, 8 * kPanelRowBytes);
      const uint64_t right = wgmma_descriptor(&b[panel][0][column], 16, 8 * kPanelRowBytes);
      if (panel == 0 && column == 0)
        wgmma_rows<T, false>(c, left, right);
      else
        wgmma_rows<T, true>(c, left, right);
    }
  wgmma_commit();
}

// c (64, D) += weights (64, N) b (N, D), likewise.
template <class T, int PANELS, int N, int COLUMNS>
FASTLM_DEVICE void issue_weighted(float (&c)[1][COLUMNS][4], const Left<T> (&weights)[N / 16],
                                  const T (&b)[PANELS][N][kPanelColumns]) {
#pragma unroll
  for (int row = 0; row < N; row += 16)
    wgmma_weighted<T>(c, weights[row / 16].word, wgmma_descriptor(&b[0][row], (int)sizeof(b[0]), 8 * kPanelRowBytes));
  wgmma_commit();
}

// Tells the producer that this warp needs a stage no more.
FASTLM_DEVICE void release(Barrier* empty) {
  if (lane_index() == 0) barrier_arrive(empty);
}

// TMA takes strides below 2^40 bytes; views that repeat a row, head or batch are left to the other kernels.
inline bool has_map(const Heads& x, int64_t batch, int64_t heads, int64_t rows) {
  const auto fits = [](int64_t stride, int64_t size) {
    return size == 1 || (stride > 0 && stride < (int64_t)1 << 38);
  };
  return fits(x.b, batch) && fits(x.h, heads) && fits(x.t, rows);
}

// The map of such a view, whose strides count where there is more than one row, head or batch.
template <class T>
TensorMap map_of(const Heads& x, int64_t batch, int64_t heads, int64_t rows, int64_t columns, int tile_rows) {
  const auto bytes = [](int64_t stride, int64_t size) { return size > 1 ? stride * (int64_t)sizeof(T) : 16; };
  return tensor_map<T>(x.data, {columns, rows, heads, batch}, {bytes(x.t, rows), bytes(x.h, heads), bytes(x.b, batch)},
                       tile_rows);
}

// What kernels on such tiles ask of a call: sizes, dtype, none of the features that they leave out.
inline bool plain_on_panels(const AttentionParams& p, const AttentionArgs& args) {
  if (args.type == (int)DType::f32 || p.D != p.Dv || (p.D != 64 && p.D != 128)) return false;
  if (p.general() || p.drops || p.cu_q || args.left >= 0 || !p.vectors || p.S == 0) return false;
  return has_map(p.q, p.B, p.H, p.T) && has_map(p.k, p.B, p.Hkv, p.S) && has_map(p.v, p.B, p.Hkv, p.S);
}

// What both of Hopper's ask of a call and of the GPU.
inline bool sm90_serves([[maybe_unused]] const AttentionParams& p, [[maybe_unused]] const AttentionArgs& args) {
#ifdef FASTLM_WITHOUT_SM90A
  return false;
#else
  return plain_on_panels(p, args) && architecture() == 90 && has_tensor_maps();
#endif
}

}  // namespace fastlm::cuda
