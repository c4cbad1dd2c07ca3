// What the normalization and GELU kernels share: buffers whose type is known at run time, sums over the threads of a
// row, and the split of an array into threads that go down its columns.
#pragma once

#include <primitives.cuh>

#include "dropout.cuh"

namespace fastlm::cuda {

// A buffer of fp32, bf16 or fp16, told apart at run time; the branch is the same for every thread. Kernels are
// compiled for the type of the stream alone, and the tensors beside it (weights, a 16-bit input or output of an fp32
// stream) come as these.
struct Floats {
  Global<char> data;
  int type;

  // Throws std::invalid_argument for a tensor of another type.
  static Floats of(const void* p, int type) {
    const bool served = type == (int)DType::f32 || type == (int)DType::bf16 || type == (int)DType::f16;
    if (p && !served) unsupported_type(type);
    return {static_cast<char*>(const_cast<void*>(p)), type};
  }
  FASTLM_DEVICE bool present() const { return (bool)data; }
};

template <int N, Cache CACHE, class T>
FASTLM_DEVICE void read(Global<const T> p, Vec<float, N>& out) {
  constexpr int kEach = smaller(N, 16 / (int)sizeof(T));
#pragma unroll
  for (int i = 0; i < N; i += kEach) {
    const auto part = load<kEach, CACHE>(p + i);
#pragma unroll
    for (int j = 0; j < kEach; ++j) out[i + j] = to_float(part[j]);
  }
}
template <class T, int N>
FASTLM_DEVICE void write(Global<T> p, const Vec<float, N>& v) {
  constexpr int kEach = smaller(N, 16 / (int)sizeof(T));
#pragma unroll
  for (int i = 0; i < N; i += kEach) {
    Vec<T, kEach> part;
#pragma unroll
    for (int j = 0; j < kEach; ++j) part[j] = from_float<T>(v[i + j]);
    store<Cache::stream>(p + i, part);
  }
}

// Elements i to i + N.
template <int N, Cache CACHE = Cache::keep>
FASTLM_DEVICE Vec<float, N> load_floats(const Floats& f, int64_t i) {
  Vec<float, N> out;
  switch ((DType)f.type) {
    case DType::bf16: read<N, CACHE>(recast<const bf16>(f.data) + i, out); break;
    case DType::f16: read<N, CACHE>(recast<const fp16>(f.data) + i, out); break;
    default: read<N, CACHE>(recast<const float>(f.data) + i, out);
  }
  return out;
}
template <int N>
FASTLM_DEVICE void store_floats(const Floats& f, int64_t i, const Vec<float, N>& v) {
  switch ((DType)f.type) {
    case DType::bf16: return write(recast<bf16>(f.data) + i, v);
    case DType::f16: return write(recast<fp16>(f.data) + i, v);
    default: return write(recast<float>(f.data) + i, v);
  }
}

// Multiplies elements `column` on of a row by their dropout factors; a vector starts at a multiple of 4 or is alone.
template <int N>
FASTLM_DEVICE void apply(const Dropout& dropout, int64_t row, int64_t column, Vec<float, N>& v) {
  if constexpr (N == 1) {
    const Vec<float, 4> factor = dropout.factors(row, column / 4);
    const int i = (int)(column % 4);
    v[0] *= i == 0 ? factor[0] : i == 1 ? factor[1] : i == 2 ? factor[2] : factor[3];
  } else {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      const Vec<float, 4> factor = dropout.factors(row, (column + i) / 4);
#pragma unroll
      for (int j = 0; j < 4; ++j) v[i + j] *= factor[j];
    }
  }
}

// Sums over the threads that share a row: those of a warp, or of `warps` warps in each block of the cluster. One
// barrier, after which `buffer`, K times the number of warps, is still being read: the next call takes another.
template <int K>
FASTLM_DEVICE void row_sums(float (&v)[K], int warps, float* buffer) {
#pragma unroll
  for (int k = 0; k < K; ++k) v[k] = warp_sum(v[k]);
  if (warps == 1) return;
  const int blocks = cluster_size(), total = blocks * warps;
  if (blocks == 1) {
    if (lane_index() == 0)
#pragma unroll
      for (int k = 0; k < K; ++k) buffer[k * total + warp_index()] = v[k];
    sync_threads();
  } else {  // to every block, so that each reads its own memory
    if (lane_index() < blocks) {
      float* theirs = cluster_shared(buffer, lane_index());
#pragma unroll
      for (int k = 0; k < K; ++k) theirs[k * total + cluster_rank() * warps + warp_index()] = v[k];
    }
    sync_cluster();
  }
#pragma unroll
  for (int k = 0; k < K; ++k) {
    float sum = 0;
    for (int i = lane_index(); i < total; i += kWarp) sum += buffer[k * total + i];
    v[k] = warp_sum(sum);
  }
}

// How threads share an (M, N) array that needs no sums along its rows: each keeps VEC neighbouring columns and goes
// down the rows of its share, so that sums along the columns stay in registers. A block is `across` threads wide and
// `down` deep.
struct Walk {
  int across, down, tiles;
  int64_t splits, rows_each;

  static constexpr int kThreads = 256;

  // Up to `blocks` blocks, none with fewer than `rows_least` rows a thread while there are enough of them.
  static Walk over(int64_t M, int64_t N, int vec, int64_t blocks, int64_t rows_least) {
    Walk w;
    const int64_t vectors = divided_up(N, (int64_t)vec);
    w.across = kWarp / 8;
    while (w.across < kThreads && w.across < vectors) w.across *= 2;
    w.down = kThreads / w.across;
    w.tiles = (int)divided_up(vectors, (int64_t)w.across);
    const int64_t most = larger<int64_t>(1, divided_up(M, w.down * rows_least));
    w.splits = smaller(most, larger<int64_t>(1, blocks / w.tiles));
    w.rows_each = divided_up(M, w.splits);
    w.splits = larger<int64_t>(1, divided_up(M, w.rows_each));
    return w;
  }
};

// This thread's part of a walk.
struct Walker {
  int64_t column, row, end;
  int step, share;

  FASTLM_DEVICE Walker(const Walk& w, int64_t M, int vec) {
    const int64_t block = block_index().x;
    share = (int)(block / w.tiles);
    column = (block % w.tiles * w.across + thread_index() % w.across) * vec;
    row = share * w.rows_each + thread_index() / w.across;
    end = smaller(M, (share + 1) * w.rows_each);
    step = w.down;
  }
};

// Adds the column sums of a block's threads, top to bottom, and stores them at `out` for columns below N.
// The shared memory holds kThreads * VEC numbers.
template <int VEC>
FASTLM_DEVICE void store_column_sums(const Walk& w, const Walker& at, const Vec<float, VEC>& sum, Global<float> out,
                                     int64_t N) {
  float* all = shared_memory<float>();
  sync_threads();  // the memory may still be read from an earlier call
#pragma unroll
  for (int i = 0; i < VEC; ++i) all[i * Walk::kThreads + thread_index()] = sum[i];
  sync_threads();
  if (thread_index() >= w.across || at.column >= N) return;
  for (int i = 0; i < VEC; ++i) {
    float total = 0;
    for (int r = 0; r < w.down; ++r) total += all[i * Walk::kThreads + r * w.across + thread_index()];
    out[at.column + i] = total;
  }
}

// Whether every pointer (null counts) is a multiple of 16 bytes.
template <class... P>
bool aligned(P... p) {
  return ((reinterpret_cast<uintptr_t>(p) % 16 == 0) && ...);
}

}  // namespace fastlm::cuda
