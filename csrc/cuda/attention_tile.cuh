// Tiles in shared memory and products of tiles by a warp: what attention's forward and backward kernels are made of.
//
// A tile has rows of D elements. Its 16-byte chunks are permuted within each row (swizzled), so that the eight rows
// that one ldmatrix reads lie in different banks. 16-bit products run on the tensor cores. fp32 ones are plain
// multiply-adds: sums of three tf32 products lose two of fp32's bits.
#pragma once

#include <matrix.cuh>

namespace fastlm::cuda {

// What every GPU from sm_80 on gives a block, and what Hopper does.
constexpr size_t kSharedLimit = 99 * 1024, kHopperSharedLimit = 227 * 1024;

template <class T, int D>
struct Tile {
  static constexpr int kChunk = 16 / (int)sizeof(T);  // elements
  static constexpr int kChunks = D / kChunk;
  static_assert(D % 16 == 0 && (kChunks % 8 == 0 || (sizeof(T) == 2 && kChunks % 4 == 0)));

  T* data;

  FASTLM_ANY static constexpr int elements(int rows) { return rows * D; }

  // The chunk `first` + `next` of a row; `first` is even and known when compiling, `next` is 0 or 1. Written so that only
  // the low bits of `first`, of which there are few patterns, need an address of their own.
  FASTLM_DEVICE T* chunk(int row, int first, int next) const {
    constexpr int kMask = kChunks % 8 == 0 ? 7 : 3;
    const int swizzle = sizeof(T) == 4 ? 2 * row % 8 : kMask == 7 ? row % 8 : row / 2 % 4;
    return data + row * D + ((first & kMask) ^ (next ^ swizzle)) * kChunk + (first & ~kMask) * kChunk;
  }
  FASTLM_DEVICE T* chunk(int row, int index) const { return chunk(row, index & ~1, index & 1); }
  FASTLM_DEVICE T* at(int row, int column) const { return chunk(row, column / kChunk) + column % kChunk; }
};

// The left operand: 16 rows, 16 columns k.
template <class T>
struct Left {
  uint32_t word[4];

  template <int D>
  FASTLM_DEVICE void load(const Tile<T, D>& tile, int row, int k) {
    const int lane = lane_index();
    ldmatrix(word, tile.chunk(row + lane % 16, k / 8, lane / 16));
  }
  // From two accumulators of 8 columns each.
  FASTLM_DEVICE void take(const float (&first)[4], const float (&second)[4]) {
    word[0] = packed<T>(first[0], first[1]);
    word[1] = packed<T>(first[2], first[3]);
    word[2] = packed<T>(second[0], second[1]);
    word[3] = packed<T>(second[2], second[3]);
  }
};

// The right operand: 16 rows k, 16 columns n.
template <class T>
struct Right {
  uint32_t word[4];

  // From a tile whose rows are n.
  template <int D>
  FASTLM_DEVICE void load(const Tile<T, D>& tile, int n, int k) {
    const int lane = lane_index();
    ldmatrix(word, tile.chunk(n + lane % 8 + lane / 16 * 8, k / 8, lane / 8 % 2));
  }
  // From a tile whose rows are k.
  template <int D>
  FASTLM_DEVICE void load_transposed(const Tile<T, D>& tile, int k, int n) {
    const int lane = lane_index();
    ldmatrix_transposed(word, tile.chunk(k + lane % 16, n / 8, lane / 16));
  }
};

// c (16, 16), as two accumulators, += a (16, 16) b (16, 16).
template <class T>
FASTLM_DEVICE void multiply(float (&c0)[4], float (&c1)[4], const Left<T>& a, const Right<T>& b) {
  mma_16x8x16<T>(c0, a.word, b.word[0], b.word[1]);
  mma_16x8x16<T>(c1, a.word, b.word[2], b.word[3]);
}

// A warp's accumulators of 16 ROWS rows and 8 N columns are float[ROWS][N][4].
template <int ROWS, int N>
FASTLM_DEVICE void clear(float (&c)[ROWS][N][4]) {
#pragma unroll
  for (int r = 0; r < ROWS; ++r)
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) c[r][n][i] = 0;
}

template <int ROWS, int N>
FASTLM_DEVICE void multiply_rows(float (&c)[ROWS][N][4], const float (&factor)[ROWS][2]) {
#pragma unroll
  for (int r = 0; r < ROWS; ++r)
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) c[r][n][e] *= factor[r][e / 2];
}

// In fp32, each lane multiplies for its own elements of the accumulators.
template <int D, int ROWS, int N>
FASTLM_DEVICE void product_of_rows_fp32(float (&c)[ROWS][N][4], const Tile<float, D>& a, int row,
                                        const Tile<float, D>& b) {
  const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll 1
  for (int k = 0; k < D / 4; ++k) {
    Vec<float, 4> left[ROWS][2];
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
      for (int half = 0; half < 2; ++half) left[r][half] = load_shared<4>(a.chunk(row + 16 * r + 8 * half + g, k));
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const Vec<float, 4> right = load_shared<4>(b.chunk(8 * n + 2 * t + e, k));
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
#pragma unroll
          for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int i = 0; i < 4; ++i)
              c[r][n][2 * half + e] = fmaf(left[r][half][i], right[i], c[r][n][2 * half + e]);
      }
  }
}

// A row's weights lie with four lanes, which hand them round.
template <int D, int ROWS, int K, int N>
FASTLM_DEVICE void add_weighted_fp32(float (&c)[ROWS][N][4], const float (&weights)[ROWS][K][4],
                                     const Tile<float, D>& b, int column) {
  const int lane = lane_index(), t = lane % 4;
#pragma unroll
  for (int k = 0; k < 8 * K; ++k) {
    float weight[ROWS][2];
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        weight[r][half] = shuffle(weights[r][k / 8][2 * half + k % 2], (lane & ~3) + k % 8 / 2);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const Vec<float, 2> right = load_shared<2>(b.chunk(k, column / 4 + 2 * n, t / 2) + t % 2 * 2);
#pragma unroll
      for (int r = 0; r < ROWS; ++r)
#pragma unroll
        for (int e = 0; e < 4; ++e) c[r][n][e] = fmaf(weight[r][e / 2], right[e % 2], c[r][n][e]);
    }
  }
}

// c = rows of `a` from `row` on times the rows of `b`, over D.
template <class T, int D, int ROWS, int N>
FASTLM_DEVICE void product_of_rows(float (&c)[ROWS][N][4], const Tile<T, D>& a, int row, const Tile<T, D>& b) {
  clear(c);
  if constexpr (std::is_same_v<T, float>) {
    product_of_rows_fp32(c, a, row, b);
  } else {
#pragma unroll 2  // more would keep too many addresses in registers
    for (int k = 0; k < D; k += 16) {
      Left<T> left[ROWS];
#pragma unroll
      for (int r = 0; r < ROWS; ++r) left[r].load(a, row + 16 * r, k);
#pragma unroll
      for (int n = 0; n < N; n += 2) {
        Right<T> right;
        right.load(b, 8 * n, k);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) multiply(c[r][n], c[r][n + 1], left[r], right);
      }
    }
  }
}

// c += weights, 8 K columns of accumulators, times columns of `b` from `column` on, over b's rows.
template <class T, int D, int ROWS, int K, int N>
FASTLM_DEVICE void add_weighted(float (&c)[ROWS][N][4], const float (&weights)[ROWS][K][4], const Tile<T, D>& b,
                                int column) {
  if constexpr (std::is_same_v<T, float>) {
    add_weighted_fp32(c, weights, b, column);
  } else {
#pragma unroll
    for (int k = 0; k < K; k += 2) {
      Left<T> left[ROWS];
#pragma unroll
      for (int r = 0; r < ROWS; ++r) left[r].take(weights[r][k], weights[r][k + 1]);
#pragma unroll
      for (int n = 0; n < N; n += 2) {
        Right<T> right;
        right.load_transposed(b, 8 * k, column + 8 * n);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) multiply(c[r][n], c[r][n + 1], left[r], right);
      }
    }
  }
}

// The threads that work on a tile together: those of a warp, or of the block.
template <int THREADS>
FASTLM_DEVICE int team_rank() {
  return THREADS == kWarp ? lane_index() : thread_index();
}
template <int THREADS>
FASTLM_DEVICE void sync_team() {
  if constexpr (THREADS == kWarp)
    sync_warp();
  else
    sync_threads();
}

// Whether any of a thread's accumulators is infinite or NaN.
template <int ROWS, int N>
FASTLM_DEVICE bool not_finite(const float (&c)[ROWS][N][4]) {
  float zero = 0;
#pragma unroll
  for (int r = 0; r < ROWS; ++r)
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) zero = fmaf(c[r][n][e], 0.0f, zero);
  return zero != 0;
}
template <class T>
FASTLM_DEVICE bool not_finite(T x) {
  return to_float(x) * 0 != 0;
}

// Rows of a matrix in global memory, `stride` elements apart; `width` of their elements and `rows` of them exist, and
// where `vectors` holds, each 16-byte chunk of a row is aligned and exists whole or not at all.
template <class T>
struct Rows {
  Global<T> data;
  int64_t stride;
  int rows, width;
  bool vectors;
};

// Starts copying rows first to first + ROWS into the tile, zeros where there are none; they belong to the group of the
// next commit.
template <int ROWS, int THREADS, class T, int D>
FASTLM_DEVICE void load_tile(const Tile<T, D>& tile, const Rows<const T>& from, int first) {
  constexpr int kChunk = Tile<T, D>::kChunk, kChunks = Tile<T, D>::kChunks;
  // accumulators leave wide rows no registers for addresses
  [[maybe_unused]] constexpr int kUnroll = D * sizeof(T) >= 512 ? 1 : 4;
  if (from.vectors) {
#pragma unroll kUnroll
    for (int i = team_rank<THREADS>(); i < ROWS * kChunks; i += THREADS) {
      const int row = i / kChunks, column = i % kChunks * kChunk;
      const bool inside = first + row < from.rows && column < from.width;
      cp_async<16>(tile.chunk(row, i % kChunks), from.data + (inside ? (first + row) * from.stride + column : 0),
                   inside ? 16 : 0);
    }
  } else {
#pragma unroll 1
    for (int i = team_rank<THREADS>(); i < ROWS * D; i += THREADS) {
      const int row = i / D, column = i % D;
      const bool inside = first + row < from.rows && column < from.width;
      *tile.at(row, column) = inside ? from.data[(first + row) * from.stride + column] : from_float<T>(0.0f);
    }
  }
}

// Writes a warp's accumulators to rows first to first + 16 ROWS, columns from `column` on, by way of
// the tile's rows from `row` on, which no other warp uses any more.
template <class T, int D, int ROWS, int N>
FASTLM_DEVICE void store_rows(const Rows<T>& to, int first, const Tile<T, D>& tile, int row, int column,
                              const float (&c)[ROWS][N][4]) {
  constexpr int kChunk = Tile<T, D>::kChunk, kChunks = 8 * N / kChunk;
  const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
  for (int r = 0; r < ROWS; ++r)
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        T* const pair = tile.at(row + 16 * r + 8 * half + g, column + 8 * n + 2 * t);
        const float x = c[r][n][2 * half], y = c[r][n][2 * half + 1];
        if constexpr (std::is_same_v<T, float>)
          *reinterpret_cast<Vec<float, 2>*>(pair) = {{x, y}};
        else
          *reinterpret_cast<uint32_t*>(pair) = packed<T>(x, y);
      }
  sync_warp();
  if (to.vectors) {
#pragma unroll 4
    for (int i = lane_index(); i < 16 * ROWS * kChunks; i += kWarp) {
      const int line = i / kChunks, start = column + i % kChunks * kChunk;
      if (first + line < to.rows && start < to.width)
        store(to.data + ((first + line) * to.stride + start),
              *reinterpret_cast<const Vec<T, kChunk>*>(tile.at(row + line, start)));
    }
  } else {
#pragma unroll 1
    for (int i = lane_index(); i < 16 * ROWS * 8 * N; i += kWarp) {
      const int line = i / (8 * N), start = column + i % (8 * N);
      if (first + line < to.rows && start < to.width)
        to.data[(first + line) * to.stride + start] = *tile.at(row + line, start);
    }
  }
}

}  // namespace fastlm::cuda
