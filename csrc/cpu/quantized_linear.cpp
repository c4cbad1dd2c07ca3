// Linear layer of a few rows with a weight of 8 or 4 bits: y = x w^T + bias, reading a half or a quarter of bf16.
//
// Rows of x become 16-bit integers once, each with one scale; products are summed exactly in 32-bit integers (so their
// order cannot matter) and scaled in fp32. That rounding of x adds at most 2^-16 max|x| sum|w| to an output: less than
// rounding x to bf16 does, and multiplying integers of 16 bits takes a third of the instructions of widening to fp32.
// An int8 weight goes through linear_tiles.cpp where there are tiles, either through linear_dots.cpp where there are dot
// products alone.
//
//   int8: w = scale[n] q, q in [-127, 127]. Rows of K padded to a multiple of 32.
//   int4: w = scale[n, group] (q - 8), q in [0, 15], groups of 32, 64 or 128 along K, scales in bf16. Rows of K padded
//         to a multiple of 128 (by q = 8 and a scale of 0). 32 weights are 8 words of 16 bits; word i holds weights i,
//         i + 8, i + 16 and i + 24 from its lowest bits up, so that a shift and a mask give words to multiply.

#include "cpu/isa.h"
#include "cpu/ops.h"
#include "cpu/scratch.h"

#ifndef FASTLM_ISA
#define FASTLM_FILE "cpu/quantized_linear.cpp"
#include "cpu/foreach_isa.h"
#endif

#ifdef FASTLM_ISA
namespace fastlm::FASTLM_ISA {

namespace quantized_linear {

typedef int16_t VS __attribute__((vector_size(FASTLM_VEC_BYTES)));
typedef int8_t VB __attribute__((vector_size(FASTLM_VEC_BYTES / 2)));
constexpr int64_t kWords = FASTLM_VEC_BYTES / 2;        // 16-bit lanes
constexpr int64_t kAhead = 2048;                        // bytes that memory is prefetched in advance
constexpr int kGroup = FASTLM_ISA_LEVEL >= 2 ? 8 : 4;  // rows of x whose accumulators fit in registers
constexpr int64_t kExact = 256 * kWords;                // products of 2^7 and 2^15 that a 32-bit lane can sum: 2 * 256
constexpr float kLargest = 127 * 256 + 127;             // of x's integers: both their bytes fit in signed ones
constexpr int64_t kParts = 4;                           // weights in a word of int4
constexpr int64_t kBlock = kParts * kWords;             // weights of int4 in a vector: some groups of 32

// Products of neighbouring lanes, added in pairs.
inline VI multiply_add(VS a, VS b) {
#if FASTLM_ISA_LEVEL >= 2
  return (VI)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif FASTLM_ISA_LEVEL == 1
  return (VI)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif FASTLM_X86
  return (VI)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  return (((VI)a << 16) >> 16) * (((VI)b << 16) >> 16) + ((VI)a >> 16) * ((VI)b >> 16);
#endif
}

inline VS load_words(const void* p) {
  VS v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline VS widened(const int8_t* p) {
  VB v;
  std::memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, VS);
}

struct Call {
  const int16_t* x;      // (M padded with zeros to a whole group, K padded)
  const float* x_scale;  // (M)
  const VI* start;       // int4: (M padded, K / kBlock), minus 8 times the sums of x that q's offset adds
  const void* w;
  const void* scale;
  const float* bias;
  void* y;
  int64_t M, N, K, group;
  int y_type;
};

inline void put(const Call& c, int64_t m, int64_t n, float v) {
  v *= c.x_scale[m];
  if (c.bias) v += c.bias[n];
  const int64_t at = m * c.N + n;
  switch ((DType)c.y_type) {
    case DType::bf16: return from_float(v, (bf16_t*)c.y + at);
    case DType::f16: return from_float(v, (f16_t*)c.y + at);
    default: ((float*)c.y)[at] = v;
  }
}

struct Int8 {
  // M rows of x, from row m0 on, times row n of the weight.
  template <int M, int>
  static inline void dot(const Call& c, int64_t m0, int64_t n) {
    const int8_t* w = (const int8_t*)c.w + n * c.K;
    const int16_t* x = c.x + m0 * c.K;
    VF total[M]{};
    for (int64_t first = 0; first < c.K; first += kExact) {
      const int64_t end = std::min(c.K, first + kExact);
      VI sum[M]{};
      for (int64_t k = first; k < end; k += kWords) {
        __builtin_prefetch(w + k + kAhead);
        const VS q = widened(w + k);
        for (int m = 0; m < M; ++m) sum[m] += multiply_add(q, load_words(x + m * c.K + k));
      }
      for (int m = 0; m < M; ++m) total[m] += __builtin_convertvector(sum[m], VF);
    }
    const float scale = ((const float*)c.scale)[n];
    for (int m = 0; m < M; ++m)
      if (m0 + m < c.M) put(c, m0 + m, n, reduce_add(total[m]) * scale);
  }
};

// A vector of SCALES scales from s on, each repeated in as many neighbouring lanes.
template <int SCALES>
inline VF repeated(const bf16_t* s) {
  if constexpr (SCALES == 1) return set1<VF>(to_float(s[0]));
#if FASTLM_ISA_LEVEL >= 2
  uint64_t bits = 0;
  std::memcpy(&bits, s, SCALES * sizeof *s);
  const __m128i wide = _mm_slli_epi32(_mm_cvtepu16_epi32(_mm_cvtsi64_si128((long long)bits)), 16);
  const __m512i four = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  const __m512i two = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
  return (VF)_mm512_permutexvar_ps(SCALES == 4 ? four : two, _mm512_castps128_ps512(_mm_castsi128_ps(wide)));
#elif FASTLM_ISA_LEVEL == 1
  return (VF)_mm256_set_m128(_mm_set1_ps(to_float(s[1])), _mm_set1_ps(to_float(s[0])));
#else
  return VF{};  // a vector of 16 bytes holds one group
#endif
}

struct Int4 {
  template <int M, int SCALES>
  static inline void dot(const Call& c, int64_t m0, int64_t n) {
    const int64_t blocks = c.K / kBlock;
    const char* w = (const char*)c.w + n * c.K / 2;
    const bf16_t* scale = (const bf16_t*)c.scale + n * (c.K / c.group);
    const int16_t* x = c.x + m0 * c.K;
    const VI* start = c.start + m0 * blocks;
    VF total[M]{};
    for (int64_t b = 0; b < blocks; ++b) {
      __builtin_prefetch(w + b * FASTLM_VEC_BYTES + kAhead);
      const VS words = load_words(w + b * FASTLM_VEC_BYTES);
      const VS q[kParts] = {words & 15, (words >> 4) & 15, (words >> 8) & 15, (words >> 12) & 15};
      const VF s = repeated<SCALES>(scale + b * kBlock / c.group);
      for (int m = 0; m < M; ++m) {
        VI sum = start[m * blocks + b];
        for (int64_t j = 0; j < kParts; ++j)
          sum += multiply_add(q[j], load_words(x + m * c.K + b * kBlock + j * kWords));
        total[m] = fma(__builtin_convertvector(sum, VF), s, total[m]);
      }
    }
    for (int m = 0; m < M; ++m)
      if (m0 + m < c.M) put(c, m0 + m, n, reduce_add(total[m]));
  }
};

template <class Format, int M, int SCALES>
void all_rows(const Call& c) {
#pragma omp parallel for schedule(static) if (c.N * c.K > kParallelGrain)
  for (int64_t n = 0; n < c.N; ++n)
    for (int64_t m = 0; m < c.M; m += M) Format::template dot<M, SCALES>(c, m, n);
}

template <class Format, int SCALES>
void grouped(const Call& c, int64_t group) {
  switch (group) {
    case 1: return all_rows<Format, 1, SCALES>(c);
    case 2: return all_rows<Format, 2, SCALES>(c);
    case 4: return all_rows<Format, 4, SCALES>(c);
    default: return all_rows<Format, kGroup, SCALES>(c);
  }
}

// x (K) -> q, and the scale that gives x back. A row with inf or NaN gets a scale of NaN.
template <class T>
float quantize(const T* x, int64_t K, int16_t* q) {
  VF largest{}, finite{};
  for_lanes<VF>(K, [&](int64_t k, auto n) {
    const VF v = load<VF>(x + k, n);
    largest = max(abs(v), largest);
    finite = fma(v, set1<VF>(0), finite);
  });
  const float top = reduce_max(largest);
  const bool representable = reduce_add(finite) == 0 && top > 1e-30f;
  const float factor = representable ? kLargest / top : 0.0f;
  for_lanes<VF>(K, [&](int64_t k, auto n) {
    const VI i = __builtin_convertvector(round(representable ? load<VF>(x + k, n) * factor : VF{}), VI);
    int32_t lane[lanes<VF>];
    std::memcpy(lane, &i, sizeof i);
    for (int64_t j = 0; j < n; ++j) q[k + j] = (int16_t)lane[j];
  });
  return reduce_add(finite) == 0 ? (representable ? top / kLargest : 0.0f) : NAN;
}

float quantize_any(const void* x, int64_t row, int64_t K, int type, int16_t* q) {
  float scale = 0;
  for_type_below_double("quantized_linear_fwd", "x", type,
                        [&](auto of) { scale = quantize((const decltype(of)*)x + row * K, K, q); });
  return scale;
}

// Orders x as the words of int4 come, and sums what the offset of 8 will have added.
void arrange(const int16_t* q, int64_t K, int16_t* x, VI* start) {
  constexpr int64_t kRun = 8;  // neighbouring words hold neighbouring weights
  for (int64_t b = 0; b < K / kBlock; ++b) {
    VI sum{};
    for (int64_t j = 0; j < kParts; ++j) {
      int16_t* out = x + b * kBlock + j * kWords;
      for (int64_t i = 0; i < kWords; i += kRun)
        std::memcpy(out + i, q + b * kBlock + i * kParts + j * kRun, kRun * sizeof *q);
      sum -= multiply_add(load_words(out), VS{} + 8);
    }
    start[b] = sum;
  }
}

// What x becomes: words, those in the order of int4's, and where their sums start.
struct Ready {
  int16_t *q, *arranged;
  VI* start;
};

// At most 8 rows; K of x, padded_K of the weight.
void fwd(const QuantizedLinearArgs& a) {
  const int64_t M = a.M, K = a.K, padded_K = a.padded_K, group = a.group;
  const int64_t at_once = M <= 2 ? M : M <= 4 ? 4 : kGroup, rows = ceil_div(M, at_once) * at_once;
  const bool int4 = group > 0;
  const auto [q, arranged, start] = in_scratch([&](Arena& arena) {
    int16_t* words = arena.take<int16_t>((int4 ? 1 : rows) * padded_K);
    return Ready{words, int4 ? arena.take<int16_t>(rows * padded_K) : words,
                 int4 ? arena.take<VI>(rows * (padded_K / kBlock)) : nullptr};
  });
  float x_scale[8]{};
  for (int64_t m = 0; m < rows; ++m) {
    int16_t* row = int4 ? q : q + m * padded_K;
    std::fill(row + (m < M ? K : 0), row + padded_K, int16_t(0));
    if (m < M) x_scale[m] = quantize_any(a.x, m, K, a.x_type, row);
    if (int4) arrange(row, padded_K, arranged + m * padded_K, start + m * (padded_K / kBlock));
  }
  const Call call{arranged, x_scale, start, a.w, a.scale, a.bias, a.y, M, a.N, padded_K, group, a.y_type};
  if (!int4) return grouped<Int8, 1>(call, at_once);
  if (group * 4 == kBlock) return grouped<Int4, FASTLM_ISA_LEVEL >= 2 ? 4 : 1>(call, at_once);
  if (group * 2 == kBlock) return grouped<Int4, FASTLM_ISA_LEVEL >= 1 ? 2 : 1>(call, at_once);
  grouped<Int4, 1>(call, at_once);
}

// A whole weight row by row, for the library's product of many rows.
template <class T>
void dequantize(const QuantizedLinearArgs& a) {
  constexpr int64_t kRun = 8, kOf32 = kParts * kRun;
  const int64_t N = a.N, K = a.K, padded_K = a.padded_K, group = a.group;
#pragma omp parallel for schedule(static) if (N * K > kParallelGrain)
  for (int64_t n = 0; n < N; ++n) {
    T* row = (T*)a.y + n * K;
    if (!group) {
      const int8_t* q = (const int8_t*)a.w + n * padded_K;
      const float s = ((const float*)a.scale)[n];
      for (int64_t k = 0; k < K; ++k) from_float(s * (float)q[k], row + k);
      continue;
    }
    const uint16_t* words = (const uint16_t*)a.w + n * padded_K / kParts;
    const bf16_t* scales = (const bf16_t*)a.scale + n * (padded_K / group);
    for (int64_t first = 0; first < K; first += kOf32) {
      const float s = to_float(scales[first / group]);
      float value[kOf32];
      for (int64_t j = 0; j < kParts; ++j)
        for (int64_t i = 0; i < kRun; ++i)
          value[j * kRun + i] = s * (float)((words[first / kParts + i] >> (4 * j) & 15) - 8);
      for_lanes<VF>(std::min(kOf32, K - first),
                    [&](int64_t i, auto n) { store(row + first + i, load<VF>(value + i, n), n); });
    }
  }
}

void dequantize_any(const QuantizedLinearArgs& a) {
  for_type_below_double("dequantize", "out", a.y_type, [&](auto type) { dequantize<decltype(type)>(a); });
}

}  // namespace quantized_linear
}  // namespace fastlm::FASTLM_ISA

#else

#include "cpu/linear_dots.h"
#include "cpu/linear_tiles.h"

namespace fastlm {

float quantize_row(const void* x, int64_t row, int64_t K, int type, int16_t* q) {
  return FASTLM_DISPATCH(quantized_linear::quantize_any, x, row, K, type, q);
}

void quantized_linear_fwd(const QuantizedLinearArgs& a) {
  for (const auto& [argument, type] : {std::pair{"x", a.x_type}, std::pair{"y", a.y_type}})
    if (type != (int)DType::f32 && type != (int)DType::bf16 && type != (int)DType::f16)
      unsupported_type("quantized_linear_fwd", argument, type, {(int)DType::f32, (int)DType::bf16, (int)DType::f16});
  if (!a.group && linear_has_tiles()) return linear_tiles_int8(a);
  if (linear_has_dots()) return linear_dots_quantized(a);
  FASTLM_DISPATCH(quantized_linear::fwd, a);
}

void dequantize(const QuantizedLinearArgs& args) { FASTLM_DISPATCH(quantized_linear::dequantize_any, args); }

}  // namespace fastlm
#endif
