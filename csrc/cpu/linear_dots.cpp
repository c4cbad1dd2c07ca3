// Linear layer of a few rows in dot products of pairs of bf16, or of words where the weight is quantized (AVX512_BF16,
// VNNI). Up to four rows of x meet up to four rows of the weight at a time: a vector of either is loaded once for all of
// the other, and their sums leave the lanes together.
//
// A sum takes the vectors of K in turn and then its lanes in the order of reduce_add, in whatever company, so a row of x
// has the same bits whatever the others are. Products of denormal numbers count as 0, as the instruction for bf16 has it.
//
// Memory is prefetched 4 KiB beyond the next rows: without, one row at 50257x768 takes 1.6 times the time. bf16 is 2.0 to
// 5.5 times as fast as PyTorch with one row on two threads of a Zen 4 (docs/design/linear.md has the ladder).
// A dot product holds as many words as pairs of bf16, so from four rows on, in the caches, quantized weights are no
// faster than bf16.

#include "cpu/linear_dots.h"

#include "cpu/isa.h"
#include "cpu/linear_tiles.h"
#include "cpu/ops.h"
#include "cpu/scratch.h"

#ifndef FASTLM_ISA
#define FASTLM_FILE "cpu/linear_dots.cpp"
#define FASTLM_WANT_BF16
#include "cpu/foreach_isa.h"
#endif

#ifdef FASTLM_ISA
#if FASTLM_ISA_LEVEL == 3
#include "cpu/linear_split.h"

namespace fastlm::FASTLM_ISA {

namespace linear_dots {

constexpr int64_t kRows = 16;   // of the weight, whose outputs fill a vector
constexpr int64_t kBytes = 64;  // of a vector
constexpr int kMost = 4;        // rows of x whose accumulators fit in registers

// A row of the weight has `length` bytes.
struct Call {
  const char* w;
  int64_t length;
  const float* bias;
  void* y;
  int64_t M, N, K;
  int y_type;
};

// Prefetches beyond the R rows from w on, in order: a vector for each of theirs at byte k. Into L2, since several rows
// may exceed L1. Inlined by force, or GCC takes a function that only prefetches for one without effects.
template <int R>
inline __attribute__((always_inline)) void prefetch(const Call& c, const char* w, int64_t k) {
  constexpr int64_t kAhead = 4096;
  const char* next = w + R * (c.length + k) + kAhead;
  for (int r = 0; r < R; ++r) __builtin_prefetch(next + r * kBytes, 0, 2);
}

// Adds halves of a, and of b, and puts the sums side by side: lanes 8, 4, 2 or 1 apart.
template <int APART>
inline __m512 join(__m512 a, __m512 b) {
  if constexpr (APART == 8) return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  if constexpr (APART == 4) return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  if constexpr (APART == 2) return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
  return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd));
}

// Lane i of the result is the sum of v[i]'s lanes, for all i < COUNT, in the order of reduce_add whatever COUNT is.
template <int COUNT, int APART = 8>
inline __attribute__((always_inline)) __m512 lane_sums(__m512* v) {
#pragma GCC unroll 8
  for (int i = 0; i < (COUNT + 1) / 2; ++i) v[i] = join<APART>(v[2 * i], v[std::min(2 * i + 1, COUNT - 1)]);
  if constexpr (APART > 1) return lane_sums<(COUNT + 1) / 2, APART / 2>(v);
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_permutexvar_ps(order, v[0]);
}

// The sums of v[m * R + r]'s lanes to sum[m * kRows + r].
template <int M, int R>
inline void put_sums(__m512* v, float* sum) {
  float lane[lanes<VF>];
  _mm512_storeu_ps(lane, lane_sums<M * R>(v));
  for (int m = 0; m < M; ++m) std::memcpy(sum + m * kRows, lane + m * R, R * sizeof(float));
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

struct All {};
inline __m512i load_bytes(const void* p, All) { return _mm512_loadu_si512(p); }
inline __m512i load_bytes(const void* p, __mmask64 first) { return _mm512_maskz_loadu_epi8(first, p); }

// PARTS: 1, or 2 where a row of x is fp32 as `split` makes it.
template <int PARTS>
struct Bf16 {
  const char* x;  // (M, PARTS, length)

  template <int M>
  static constexpr int kTogether = 4;

  template <class C>
  inline VF value(int64_t, int64_t, C, VF sum) const {
    return sum;
  }

  // The vector at byte k of M rows of x and R of the weight, or its first bytes.
  template <int M, int R, class Bytes>
  static inline void add(const Call& c, const char* x, const char* w, int64_t k, Bytes bytes, __m512* acc) {
    __m512bh q[R];
    for (int r = 0; r < R; ++r) q[r] = (__m512bh)load_bytes(w + r * c.length + k, bytes);
    for (int i = 0; i < M * PARTS; ++i) {
      const __m512bh p = (__m512bh)load_bytes(x + i * c.length + k, bytes);
      for (int r = 0; r < R; ++r) acc[i / PARTS * R + r] = _mm512_dpbf16_ps(acc[i / PARTS * R + r], q[r], p);
    }
  }

  // Rows m to m + M of x times rows n to n + R of the weight.
  template <int M, int R>
  inline void sums(const Call& c, int64_t m, int64_t n, float* sum) const {
    const char *x = this->x + m * PARTS * c.length, *w = c.w + n * c.length;
    __m512 acc[M * R];
    for (int i = 0; i < M * R; ++i) acc[i] = _mm512_setzero_ps();
    int64_t k = 0;
    for (; k + kBytes <= c.length; k += kBytes) {
      prefetch<R>(c, w, k);
      add<M, R>(c, x, w, k, All{}, acc);
    }
    if (k < c.length) add<M, R>(c, x, w, k, (__mmask64)((1ull << (c.length - k)) - 1), acc);
    put_sums<M, R>(acc, sum);
  }
};

// Words of x times bytes of the weight, widened once for all rows of x.
struct Int8 {
  static constexpr int64_t kWords = kBytes / 2;
  const char* x;  // (M, K padded to vectors) words
  const float *scale, *x_scale;

  template <int M>
  static constexpr int kTogether = 4;

  template <class C>
  inline VF value(int64_t m, int64_t n, C count, VF sum) const {
    return sum * load<VF>(scale + n, count) * x_scale[m];
  }

  template <int M, int R>
  static inline void add(const Call& c, const char* x, const char* w, int64_t k, __m512i* acc) {
    __m512i q[R];
    for (int r = 0; r < R; ++r)
      q[r] = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)(w + r * c.length + k)));
    for (int m = 0; m < M; ++m) {
      const __m512i p = _mm512_loadu_si512(x + 2 * (m * c.length + k));
      for (int r = 0; r < R; ++r) acc[m * R + r] = _mm512_dpwssd_epi32(acc[m * R + r], q[r], p);
    }
  }

  // From k to end, where 32 bits are enough.
  template <int M, int R>
  static inline __attribute__((always_inline)) void exact(const Call& c, const char* x, const char* w, int64_t k,
                                                          int64_t end, __m512i* acc) {
    for (int i = 0; i < M * R; ++i) acc[i] = _mm512_setzero_si512();
    for (; k + kBytes <= end; k += kBytes) {
      prefetch<R>(c, w, k);
      add<M, R>(c, x, w, k, acc);
      add<M, R>(c, x, w, k + kWords, acc);
    }
    if (k < end) add<M, R>(c, x, w, k, acc);
  }

  template <int M, int R>
  inline void sums(const Call& c, int64_t m, int64_t n, float* sum) const {
    constexpr int64_t kExact = 256 * kWords;  // products of 2^7 and 2^15 that a lane can sum: 2 * 256
    const char *x = this->x + m * 2 * c.length, *w = c.w + n * c.length;
    __m512i acc[M * R];
    __m512 total[M * R];
    exact<M, R>(c, x, w, 0, std::min(c.length, kExact), acc);
    for (int i = 0; i < M * R; ++i) total[i] = _mm512_cvtepi32_ps(acc[i]);
    for (int64_t k = kExact; k < c.length; k += kExact) {
      exact<M, R>(c, x, w, k, std::min(c.length, k + kExact), acc);
      for (int i = 0; i < M * R; ++i) total[i] = _mm512_add_ps(total[i], _mm512_cvtepi32_ps(acc[i]));
    }
    put_sums<M, R>(total, sum);
  }
};

// What makes a float of scale i: its bytes above two zeros.
constexpr int upper_half(int i) { return (2 * i + 1) << 24 | (2 * i) << 16 | 0x8080; }

// SCALES scales from s on, each in as many neighbouring lanes of a vector.
template <int SCALES>
inline __m512 repeated(const char* s) {
  uint64_t bits = 0;
  std::memcpy(&bits, s, SCALES * sizeof(bf16_t));
  constexpr int a = upper_half(0), b = upper_half(SCALES / 4), c = upper_half(SCALES / 2), d = upper_half(SCALES - 1);
  const __m512i bytes = _mm512_setr_epi32(a, a, a, a, b, b, b, b, c, c, c, c, d, d, d, d);
  return _mm512_castsi512_ps(_mm512_shuffle_epi8(_mm512_set1_epi64((long long)bits), bytes));
}

// Words of four weights as quantized_linear.cpp has them, times 16-bit integers.
template <int SCALES>
struct Int4 {
  static constexpr int kParts = 4;
  const char* x;         // (M, 4 length): for each vector of the weight its four of x
  const __m512i* start;  // (M, length / kBytes), minus 8 times the sums of x that q's offset adds
  const char* scale;     // (N, SCALES length / kBytes) bf16
  const float* x_scale;

  template <int M>
  static constexpr int kTogether = M <= 2 ? 4 : 2;

  template <class C>
  inline VF value(int64_t m, int64_t, C, VF sum) const {
    return sum * x_scale[m];
  }

  template <int M, int R>
  inline void sums(const Call& c, int64_t m0, int64_t n, float* sum) const {
    const int64_t blocks = c.length / kBytes, scales = blocks * SCALES * sizeof(bf16_t);
    const char *x = this->x + m0 * kParts * c.length, *w = c.w + n * c.length, *s = scale + n * scales;
    const __m512i low = _mm512_set1_epi16(15), *start = this->start + m0 * blocks;
    __m512 total[M * R];
    for (int i = 0; i < M * R; ++i) total[i] = _mm512_setzero_ps();
    for (int64_t b = 0; b < blocks; ++b) {
      __m512i q[R][kParts];
      __m512 factor[R];
      prefetch<R>(c, w, b * kBytes);
      for (int r = 0; r < R; ++r) {
        const char* at = w + r * c.length + b * kBytes;
        __m512i words = _mm512_loadu_si512(at);
        asm("" : "+v"(words));  // or GCC loads it four times
        q[r][0] = _mm512_and_si512(words, low);
        q[r][1] = _mm512_and_si512(_mm512_srli_epi16(words, 4), low);
        q[r][2] = _mm512_and_si512(_mm512_srli_epi16(words, 8), low);
        q[r][3] = _mm512_srli_epi16(words, 12);
        factor[r] = repeated<SCALES>(s + r * scales + b * SCALES * sizeof(bf16_t));
      }
      for (int m = 0; m < M; ++m) {
        __m512i part[R];
        for (int r = 0; r < R; ++r) part[r] = start[m * blocks + b];
        for (int j = 0; j < kParts; ++j) {
          const __m512i p = _mm512_loadu_si512(x + (m * blocks + b) * kParts * kBytes + j * kBytes);
          for (int r = 0; r < R; ++r) part[r] = _mm512_dpwssd_epi32(part[r], q[r][j], p);
        }
        for (int r = 0; r < R; ++r)
          total[m * R + r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(part[r]), factor[r], total[m * R + r]);
      }
    }
    put_sums<M, R>(total, sum);
  }
};

// All rows of x times rows n to n + kRows of the weight, or as many as there are.
template <int M, class Format>
inline void sixteen(const Call& c, int64_t n, const Format& format) {
  constexpr int kFirst = std::min(M, kMost), kSecond = M - kFirst, R = Format::template kTogether<kFirst>;
  const int64_t count = std::min(kRows, c.N - n);
  float sum[M * kRows];
  int64_t r = 0;
  for (; r + R <= count; r += R) {
    format.template sums<kFirst, R>(c, 0, n + r, sum + r);
    if constexpr (kSecond > 0) format.template sums<kSecond, R>(c, kFirst, n + r, sum + kFirst * kRows + r);
  }
  for (; r < count; ++r) {
    format.template sums<kFirst, 1>(c, 0, n + r, sum + r);
    if constexpr (kSecond > 0) format.template sums<kSecond, 1>(c, kFirst, n + r, sum + kFirst * kRows + r);
  }
  for (int64_t m = 0; m < M; ++m)
    for_lanes<VF>(count, [&](int64_t, auto lanes) {
      put(c, m, n, lanes, format.value(m, n, lanes, load<VF>(sum + m * kRows, lanes)));
    });
}

template <int M, class Format>
void all_rows(const Call& c, const Format& format) {
#pragma omp parallel for schedule(static) if (c.N * c.K > kParallelGrain)
  for (int64_t n = 0; n < c.N; n += kRows) sixteen<M>(c, n, format);
}

template <class Format>
void by_rows(const Call& c, const Format& format) {
  switch (c.M) {
    case 1: return all_rows<1>(c, format);
    case 2: return all_rows<2>(c, format);
    case 3: return all_rows<3>(c, format);
    case 4: return all_rows<4>(c, format);
    case 5: return all_rows<5>(c, format);
    case 6: return all_rows<6>(c, format);
    case 7: return all_rows<7>(c, format);
    default: return all_rows<8>(c, format);
  }
}

void bf16(const LinearArgs& a) {
  const int64_t M = a.M, K = a.K, length = K * sizeof(bf16_t);
  const Call call{(const char*)a.w, length, (const float*)a.bias, a.y, M, a.N, K, a.y_type};
  if (!a.wide_x()) return by_rows(call, Bf16<1>{(const char*)a.x});
  bf16_t* parts = (bf16_t*)thread_scratch(2 * M * length);
  for (int64_t m = 0; m < M; ++m) split((const float*)a.x + m * K, K, parts + 2 * m * K, parts + (2 * m + 1) * K);
  by_rows(call, Bf16<2>{(const char*)parts});
}

// K words of x in the order of int4's, and where sums start.
void arrange(const int16_t* q, int64_t K, int16_t* x, __m512i* start) {
  constexpr int64_t kBlock = 128, kOf32 = 32, kRun = 8;
  for (int64_t b = 0; b < K / kBlock; ++b) {
    start[b] = _mm512_setzero_si512();
    for (int64_t j = 0; j < 4; ++j) {
      int16_t* out = x + b * kBlock + j * kOf32;
      for (int64_t i = 0; i < 4; ++i)
        std::memcpy(out + i * kRun, q + b * kBlock + i * kOf32 + j * kRun, kRun * sizeof *q);
      start[b] = _mm512_sub_epi32(start[b], _mm512_madd_epi16(_mm512_loadu_si512(out), _mm512_set1_epi16(8)));
    }
  }
}

// What x becomes: words, those in the order of int4's, and where their sums start.
struct Ready {
  int16_t *q, *arranged;
  __m512i* start;
};

void quantized(const QuantizedLinearArgs& a) {
  const int64_t M = a.M, K = a.K, padded_K = a.padded_K, group = a.group, blocks = group ? padded_K / 128 : 0;
  const auto [q, arranged, start] = in_scratch([&](Arena& arena) {
    int16_t* words = arena.take<int16_t>((group ? 1 : M) * padded_K);
    return Ready{words, group ? arena.take<int16_t>(M * padded_K) : words, arena.take<__m512i>(M * blocks)};
  });
  float x_scale[8];
  for (int64_t m = 0; m < M; ++m) {
    int16_t* row = group ? q : q + m * padded_K;
    x_scale[m] = quantize_row(a.x, m, K, a.x_type, row);
    std::fill(row + K, row + padded_K, int16_t(0));
    if (group) arrange(row, padded_K, arranged + m * padded_K, start + m * blocks);
  }
  const Call call{(const char*)a.w, group ? padded_K / 2 : padded_K, a.bias, a.y, M, a.N, padded_K, a.y_type};
  const char *ready = (const char*)arranged, *scales = (const char*)a.scale;
  switch (group) {
    case 0: return by_rows(call, Int8{ready, (const float*)a.scale, x_scale});
    case 32: return by_rows(call, Int4<4>{ready, start, scales, x_scale});
    case 64: return by_rows(call, Int4<2>{ready, start, scales, x_scale});
    default: return by_rows(call, Int4<1>{ready, start, scales, x_scale});
  }
}

}  // namespace linear_dots
}  // namespace fastlm::FASTLM_ISA
#endif
#else

namespace fastlm {

#if FASTLM_X86
// As in attention_bf16.cpp: Intel's cores issue dot products of pairs at half the rate and less.
bool linear_has_dots() { return isa() == Isa::avx512_bf16 && (isa_chosen() || !is_intel()); }
void linear_dots_bf16(const LinearArgs& args) { avx512_bf16::linear_dots::bf16(args); }
void linear_dots_quantized(const QuantizedLinearArgs& args) { avx512_bf16::linear_dots::quantized(args); }
#else
bool linear_has_dots() { return false; }
void linear_dots_bf16(const LinearArgs&) {}
void linear_dots_quantized(const QuantizedLinearArgs&) {}
#endif

}  // namespace fastlm
#endif
