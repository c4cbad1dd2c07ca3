// The kernels of layer_norm.cu (CENTRED) and rms_norm.cu, which differ in the mean alone.
//
// Forward, a row:   z = residual + dropout(x);  mean, then rstd from the centred values;  y = (z - mean) rstd w + b.
// Backward, a row, with g = dy w and xhat = (z - mean) rstd:
//   dz = rstd (g - mean(g) - xhat mean(g xhat)) + dz_in;   dw = sum of dy xhat, db = sum of dy over the rows.
// Without CENTRED the means of z and of g, and db, are absent.
//
// Rows that fit, with 16-byte vectors: a row lives in the registers of a warp, of a block, or of a cluster of blocks
// (sm_90) that add up their sums in one another's shared memory. Forward reads x (and residual) and writes y (and z)
// once. Backward is persistent: a block owns neighbouring rows, copies the next one's dy and z (and dz_in) into shared
// memory while it works on this one, keeps dw and db in fp32 registers, writes them as one partial, and needs one
// barrier a row, since its sums go to two buffers in turn. A second kernel adds the partials in order.
// Other rows (odd lengths, unaligned tensors, longer than a cluster holds): forward goes over a row three times, from
// L1 or L2; backward sums each row first, then goes down the columns (Walk).
//
// A row of N elements of T bytes moves 2 N T forward (4 N T with a residual), 3 N T backward (4 N T with dz_in), for
// about 8 N and 14 N operations: memory bounds both. The sizes below are by count of registers (at most 128 a
// thread at 512 threads) and of bytes in flight.
//
// Ladder; the gains are by count of bytes, no step has been timed on a GPU:
//   three passes over a row from memory         4 N T forward (forward_any_kernel and backward_any; wide rows hit L2)
//   + the row in registers                      2 N T forward, 3 N T backward
//   + the row over a cluster of blocks          the same for rows eight times as long
//   + persistent blocks, sums in registers      no second reading of x and dy for dw and db, 2 N T less backward
//   + cp.async of the next row, one barrier     no fewer bytes, but loads in flight while the sums are made
#pragma once

#include "common.cuh"

namespace fastlm::cuda::norm {

constexpr int kMaxThreads = 512;
constexpr int kTeam = 128;                             // threads of a block whose warps have a row each
constexpr int kForwardVectors = 4, kBackwardFloats = 16;  // what a thread holds of a row, at most
constexpr int kMaxCluster = 8;

template <class Z>
constexpr int kVec = 16 / (int)sizeof(Z);

// Which vectors of a row a thread holds: `first`, then every `step`th below `end`.
struct Columns {
  int first, step, end;
  FASTLM_DEVICE int vector(int j) const { return first + j * step; }
  FASTLM_DEVICE bool holds(int j) const { return vector(j) < end; }
};

// The part of this thread in a row of `vectors` that `warps` warps in each block of the cluster share.
FASTLM_DEVICE Columns columns_of(int vectors, int warps) {
  const int share = divided_up(vectors, cluster_size()), begin = cluster_rank() * share;
  return {begin + (warps == 1 ? lane_index() : thread_index()), warps * kWarp, smaller(vectors, begin + share)};
}

// A thread's vectors of the row that starts at element `row`, 0 where it holds none. All loads are issued before the
// first is used.
template <int VEC, int PER, class T>
FASTLM_DEVICE void read_row(Global<const T> p, int64_t row, const Columns& mine, Vec<float, VEC> (&out)[PER]) {
  constexpr int kEach = smaller(VEC, 16 / (int)sizeof(T)), kParts = VEC / kEach;
  Vec<T, kEach> raw[PER][kParts] = {};
#pragma unroll
  for (int j = 0; j < PER; ++j)
    if (mine.holds(j))
#pragma unroll
      for (int part = 0; part < kParts; ++part)
        raw[j][part] = load<kEach, Cache::stream>(p + row + (int64_t)mine.vector(j) * VEC + part * kEach);
#pragma unroll
  for (int j = 0; j < PER; ++j)
#pragma unroll
    for (int i = 0; i < VEC; ++i) out[j][i] = to_float(raw[j][i / kEach][i % kEach]);
}
template <int VEC, int PER>
FASTLM_DEVICE void load_row(const Floats& f, int64_t row, const Columns& mine, Vec<float, VEC> (&out)[PER]) {
  switch ((DType)f.type) {
    case DType::bf16: return read_row(recast<const bf16>(f.data), row, mine, out);
    case DType::f16: return read_row(recast<const fp16>(f.data), row, mine, out);
    default: return read_row(recast<const float>(f.data), row, mine, out);
  }
}

// Rows in turn to the warps of a block (`warps` 1), or to blocks and clusters.
struct Rows {
  int64_t row, step;
};
FASTLM_DEVICE Rows rows_of_grid(int warps) {
  const int teams = warps == 1 ? block_threads() / kWarp : 1;
  const int64_t block = block_index().x / cluster_size();
  return {block * teams + (warps == 1 ? warp_index() : 0), (int64_t)(grid_size().x / cluster_size()) * teams};
}

// Division by the row's length and the inverse root, without the slow paths of the exact ones, whose calls cost
// registers: an approximation and one Newton step, good to the last unit or the one before it.
struct Length {
  float N, inverse;
  static Length of(int64_t N) { return {(float)N, 1.0f / (float)N}; }
  FASTLM_DEVICE float divide(float sum) const {
    const float q = sum * inverse;
    return fmaf(fmaf(-q, N, sum), inverse, q);
  }
};
FASTLM_DEVICE float inverse_root(float x) {
  const float r = rsqrt_approx(x);
  return r == 0 ? 0 : fmaf(r * 0.5f, fmaf(-x * r, r, 1.0f), r);  // 0 of infinity
}

template <class Z, int N>
FASTLM_DEVICE Vec<float, N> rounded(Vec<float, N> v) {
#pragma unroll
  for (int i = 0; i < N; ++i) v[i] = to_float(from_float<Z>(v[i]));
  return v;
}

// w xhat + b in place.
template <int VEC>
FASTLM_DEVICE void scale_and_shift(const Floats& w, const Floats& b, int64_t column, Vec<float, VEC>& v) {
  if (w.present()) {
    const Vec<float, VEC> scale = load_floats<VEC>(w, column);
#pragma unroll
    for (int i = 0; i < VEC; ++i) v[i] *= scale[i];
  }
  if (b.present()) {
    const Vec<float, VEC> shift = load_floats<VEC>(b, column);
#pragma unroll
    for (int i = 0; i < VEC; ++i) v[i] += shift[i];
  }
}

// The shape of a launch in which `warps` warps in each block of a cluster share a row.
struct Shape {
  int warps, threads, cluster, per;  // per: vectors a thread
  int teams() const { return warps == 1 ? threads / kWarp : 1; }
};

// Whether rows of `vectors` fit into the registers of a cluster, `most` vectors a thread, and how.
inline bool shape_of(int64_t vectors, int most, Shape& shape) {
  if (vectors <= kWarp * most) {
    shape = {1, kTeam, 1, vectors <= kWarp ? 1 : most};
    return true;
  }
  int cluster = 1;
  while (cluster < kMaxCluster && divided_up<int64_t>(vectors, cluster) > (int64_t)kMaxThreads * most) cluster *= 2;
  const int64_t share = divided_up<int64_t>(vectors, cluster);
  if (share > (int64_t)kMaxThreads * most || (cluster > 1 && architecture() < 90)) return false;
  const int warps = larger<int>(2, (int)divided_up<int64_t>(divided_up<int64_t>(share, most), kWarp));
  shape = {warps, warps * kWarp, cluster, most};
  return true;
}
// Any row, over and over.
inline Shape any_shape(int64_t N) {
  const int warps = N <= 1024 ? 1 : 8;
  return {warps, warps == 1 ? kTeam : warps * kWarp, 1, 0};
}

// Blocks that walk or own rows, at most: enough to fill the GPU, few enough for the partial sums.
inline int64_t persistent_blocks(int threads) { return (int64_t)multiprocessors() * larger(1, 512 / threads); }

inline unsigned grid_of(const Shape& s, int64_t M) {
  return (unsigned)(smaller<int64_t>(divided_up<int64_t>(M, s.teams()), (1 << 30) / s.cluster) * s.cluster);
}

inline int64_t splits_of(int64_t M, const Shape& s) {
  const int64_t blocks = larger<int64_t>(1, persistent_blocks(s.threads) / s.cluster);
  return larger<int64_t>(1, smaller(blocks, divided_up<int64_t>(M, s.teams())));
}

inline Walk walk_of(int64_t M, int64_t N, int vec) {
  return Walk::over(M, N, vec, persistent_blocks(Walk::kThreads) * 2, 4);
}

}  // namespace fastlm::cuda::norm
