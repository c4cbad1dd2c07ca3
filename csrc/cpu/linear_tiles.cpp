// Linear layer of a few rows in tiles (AMX): sixteen rows of a bf16 or int8 weight, as they lie in memory, times a tile
// whose columns are rows of x. Nothing is converted or repacked but x.
//
// A column is summed by itself and in order of K, so a row of x has the same bits whatever the others are. Where 8 bits
// of a row are not enough it makes two columns: an fp32 row beside a bf16 weight its leading bits and what they leave out
// (together off by 2^-17 of x at most), the 16-bit integers beside an int8 weight their upper and lower bytes.
//
// Products of denormal numbers count as 0, as the instruction has it.
//
// One row of 3072x768 in bf16 is 2.6 times as fast as PyTorch on two threads; memory is not prefetched, which lost 18 to 27 %
// there, and int4 has no tiles, since its groups' sums would leave them one by one (docs/design/linear.md).

#include "cpu/linear_tiles.h"

#include "cpu/isa.h"
#include "cpu/ops.h"
#include "cpu/scratch.h"

#ifndef FASTLM_ISA
#define FASTLM_FILE "cpu/linear_tiles.cpp"
#define FASTLM_WANT_BF16
#include "cpu/foreach_isa.h"
#endif

#ifdef FASTLM_ISA
#if FASTLM_ISA_LEVEL >= 4
#include "cpu/linear_split.h"

namespace fastlm::FASTLM_ISA {

namespace linear_tiles {

constexpr int64_t kRows = 16, kBytes = 64;  // of a tile of the weight

// Tile 0 holds sums, a row for each row of the weight; 1 the weight; 2 x, a column of 4 bytes for each of its columns.
// Released after each call, or every context switch would save them.
struct Tiles {
  explicit Tiles(int64_t columns) {
    alignas(64) struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {kRows, kRows, kBytes / 4};
    } config;
    config.row_bytes[0] = config.row_bytes[2] = (uint16_t)(columns * 4);
    config.row_bytes[1] = kBytes;
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
};

// What both weights share. A row of the weight has `length` bytes; x is (length padded to tiles / 4, columns) of 4 bytes.
struct Call {
  const char *x, *w;
  int64_t columns, length;
  const float* bias;
  void* y;
  int64_t M, N;
  int y_type;
};

// Where x is made ready: `columns` rows of `length` bytes padded with zeros, and room for them in the order of tile 2.
struct Columns {
  int64_t columns, length;
  char *rows, *out;

  Columns(int64_t columns, int64_t length) : columns(columns), length(ceil_div(length, kBytes) * kBytes) {
    rows = (char*)thread_scratch(2 * columns * this->length);
    out = rows + columns * this->length;
    std::memset(rows, 0, columns * this->length);
  }
  template <class T>
  T* row(int64_t i) const {
    return (T*)(rows + i * length);
  }
  const char* interleaved() const {
    for (int64_t i = 0; i < length; i += 4)
      for (int64_t c = 0; c < columns; ++c) std::memcpy(out + i * columns + 4 * c, rows + c * length + i, 4);
    return out;
  }
};

// Sixteen rows of the weight from n on times bytes first to end of K, into tile 0. Rows and bytes that are not there
// are made 0: beyond a row's end another begins, and a NaN of it would spread.
template <class F>
inline __attribute__((always_inline)) void sum_tiles(const Call& c, int64_t n, int64_t first, int64_t end,
                                                     F&& multiply) {
  const char* w = c.w + n * c.length;
  const int64_t count = std::min(kRows, c.N - n), whole = count == kRows ? end - (end - first) % kBytes : first;
  _tile_zero(0);
  for (int64_t k = first; k < whole; k += kBytes) {
    _tile_loadd(2, c.x + k * c.columns, c.columns * 4);
    _tile_loadd(1, w + k, c.length);
    multiply();
  }
  alignas(64) char padded[kRows * kBytes];
  for (int64_t k = whole; k < end; k += kBytes) {
    std::memset(padded, 0, sizeof padded);
    for (int64_t r = 0; r < count; ++r)
      std::memcpy(padded + r * kBytes, w + r * c.length + k, std::min(kBytes, end - k));
    _tile_loadd(2, c.x + k * c.columns, c.columns * 4);
    _tile_loadd(1, padded, kBytes);
    multiply();
  }
}

// Column `at` of a tile of sums.
inline VF column(const Call& c, const float* sum, int64_t at) {
  const __m512i row = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return (VF)_mm512_i32gather_ps(_mm512_mullo_epi32(row, _mm512_set1_epi32((int)c.columns)), sum + at, 4);
}

// Outputs n to n + count of row m; `count` is the vector's or fewer.
template <class C>
inline void put(const Call& c, int64_t m, int64_t n, C count, VF v) {
  if (c.bias) v += load<VF>(c.bias + n, count);
  const int64_t at = m * c.N + n;
  switch ((DType)c.y_type) {
    case DType::bf16: return store((bf16_t*)c.y + at, v, count);
    case DType::f16: return store((f16_t*)c.y + at, v, count);
    default: return store((float*)c.y + at, v, count);
  }
}

struct Bf16 {
  inline void sums(const Call& c, int64_t n, float* sum) const {
    sum_tiles(c, n, 0, c.length, [] { _tile_dpbf16ps(0, 1, 2); });
    _tile_stored(0, sum, c.columns * 4);
  }
  template <class C>
  inline VF value(const Call& c, const float* sum, int64_t m, int64_t, C) const {
    const VF v = column(c, sum, m);
    return c.columns > c.M ? v + column(c, sum, c.M + m) : v;
  }
};

struct Int8 {
  const float *scale, *x_scale;

  inline void sums(const Call& c, int64_t n, float* sum) const {
    constexpr int64_t kExact = 1 << 16;  // products of bytes that 32 bits can sum
    alignas(64) int32_t part[kRows * kRows];
    for (int64_t first = 0; first < c.length; first += kExact) {
      sum_tiles(c, n, first, std::min(c.length, first + kExact), [] { _tile_dpbssd(0, 1, 2); });
      _tile_stored(0, part, c.columns * 4);
      for (int64_t i = 0; i < kRows * c.columns; ++i) sum[i] = (float)part[i] + (first ? sum[i] : 0.0f);
    }
  }
  template <class C>
  inline VF value(const Call& c, const float* sum, int64_t m, int64_t n, C count) const {
    return (column(c, sum, m) * 256.0f + column(c, sum, c.M + m)) * load<VF>(scale + n, count) * x_scale[m];
  }
};

template <class Format>
inline void sixteen(const Call& c, int64_t n, const Format& format) {
  alignas(64) float sum[kRows * kRows];
  format.sums(c, n, sum);
  for (int64_t m = 0; m < c.M; ++m)
    for_lanes<VF>(std::min(kRows, c.N - n),
                  [&](int64_t, auto count) { put(c, m, n, count, format.value(c, sum, m, n, count)); });
}

template <class Format>
void all_rows(const Call& c, const Format& format) {
#pragma omp parallel if (c.N * c.length > kParallelGrain)
  {
    const Tiles tiles(c.columns);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < c.N; n += kRows) sixteen(c, n, format);
  }
}

void bf16(const LinearArgs& a) {
  const int64_t M = a.M, K = a.K, length = K * (int64_t)sizeof(bf16_t);
  const Columns columns(a.wide_x() ? 2 * M : M, length);
  for (int64_t m = 0; m < M; ++m)
    if (a.wide_x())
      split((const float*)a.x + m * K, K, columns.row<bf16_t>(m), columns.row<bf16_t>(M + m));
    else
      std::memcpy(columns.row<bf16_t>(m), (const bf16_t*)a.x + m * K, (size_t)length);
  const Call call{columns.interleaved(), (const char*)a.w, columns.columns, length, (const float*)a.bias, a.y, M, a.N,
                  a.y_type};
  all_rows(call, Bf16{});
}

void int8(const QuantizedLinearArgs& a) {
  const int64_t M = a.M;
  const Columns columns(2 * M, a.padded_K);
  float x_scale[8];
  for (int64_t m = 0; m < M; ++m) {
    int16_t* q = (int16_t*)columns.out;  // free until the rows are interleaved, and at least two rows long
    x_scale[m] = quantize_row(a.x, m, a.K, a.x_type, q);
    int8_t *upper = columns.row<int8_t>(m), *lower = columns.row<int8_t>(M + m);
    for (int64_t k = 0; k < a.K; ++k) {
      lower[k] = (int8_t)q[k];
      upper[k] = (int8_t)((q[k] - lower[k]) >> 8);
    }
  }
  const Call call{columns.interleaved(), (const char*)a.w, columns.columns, a.padded_K, a.bias, a.y, M, a.N, a.y_type};
  all_rows(call, Int8{(const float*)a.scale, x_scale});
}

}  // namespace linear_tiles
}  // namespace fastlm::FASTLM_ISA
#endif
#else

namespace fastlm {

#if FASTLM_X86
bool linear_has_tiles() { return isa() == Isa::amx; }
void linear_tiles_bf16(const LinearArgs& args) { amx::linear_tiles::bf16(args); }
void linear_tiles_int8(const QuantizedLinearArgs& args) { amx::linear_tiles::int8(args); }
#else
bool linear_has_tiles() { return false; }
void linear_tiles_bf16(const LinearArgs&) {}
void linear_tiles_int8(const QuantizedLinearArgs&) {}
#endif

}  // namespace fastlm
#endif
