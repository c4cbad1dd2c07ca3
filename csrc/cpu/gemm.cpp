// Matmuls of large matrices, C = A B (+ bias) (+ C), for CPUs with AVX-512 on which the libraries fall short of it.
//
// The register block is 8 rows by 48 columns: 24 sums, three vectors of B, and an element of A broadcast by the
// multiplication itself. B is packed by panels of 48 columns, which stay in the second-level cache while all rows pass;
// A is read where it lies, or, where its columns run along memory, packed too, some hundred rows at a time. bf16 is
// multiplied in pairs of neighbouring k (AVX512_BF16), so everything packed is in words of 32 bits: an fp32 number, or
// such a pair. A sum takes k in the same order whatever the other sizes and the number of threads.
//
// A's next rows are prefetched during these, and B's while it is packed, since its rows may lie pages apart. Packing
// columns of A fills few panels at a time, or their lines, a power of two apart, evict each other from the first-level
// cache. Sums of 256 words at a time, added up, have a third of the rounding error. 1024 rows on two threads of a Zen 4:
// 1.15 to 1.6 times PyTorch's (MKL's) speed in fp32, about oneDNN's in bf16; docs/design/gemm.md has what was tried.

#include "cpu/isa.h"
#include "cpu/ops.h"
#include "cpu/scratch.h"

#ifndef FASTLM_ISA
#define FASTLM_FILE "cpu/gemm.cpp"
#define FASTLM_WANT_BF16
#include "cpu/foreach_isa.h"
#endif

#ifdef FASTLM_ISA
#if FASTLM_ISA_LEVEL == 2 || FASTLM_ISA_LEVEL == 3
namespace fastlm::FASTLM_ISA {

namespace gemm {

constexpr int kRows = 8, kVecs = 3;
constexpr int64_t L = lanes<VF>, kPanel = kVecs * L;

#if FASTLM_ISA_LEVEL == 2
using Element = float;
inline VF multiply_add(VF a, VF b, VF c) { return fma(a, b, c); }
#else
using Element = bf16_t;
inline VF multiply_add(VF a, VF b, VF c) { return (VF)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b); }
#endif
constexpr int64_t kPair = 4 / sizeof(Element);  // values of k in a word

// ---- packing -----------------------------------------------------------------------------------------------------

// A word of each of up to 16 neighbouring columns of a matrix whose rows run along them; `depth` rows are left.
inline VF words_below(const Element* x, int64_t row, __mmask16 columns, int64_t depth) {
#if FASTLM_ISA_LEVEL == 2
  return (VF)_mm512_maskz_loadu_ps(columns, x);
#else
  const __m512i first = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(columns, x));
  const __m512i second = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(depth > 1 ? columns : 0, x + row));
  return (VF)_mm512_or_si512(first, _mm512_slli_epi32(second, 16));
#endif
}

// Calls put(line, word, v): v holds that word of 16 lines, for all words of `depth` values of k and all lines, which
// are the rows of x, or its columns if `below`. Zeros are added to whole words, and to whole vectors of lines.
template <class Put>
void pack(const Element* x, int64_t row, bool below, int64_t lines, int64_t depth, Put&& put) {
  constexpr int64_t kAhead = 16;  // rows, which the hardware's prefetcher does not follow from page to page
  const int64_t words = ceil_div(depth, kPair);
  if (below) {
    for (int64_t first = 0; first < words; first += kAhead)
      for (int64_t j = 0; j < lines; j += L)
        for (int64_t k = first; k < std::min(words, first + kAhead); ++k) {
          const Element* at = x + k * kPair * row + j;
          for (int64_t i = 0; i < kPair; ++i) __builtin_prefetch(at + (kAhead * kPair + i) * row);
          put(j, k, words_below(at, row, first16(lines - j), depth - k * kPair));
        }
    return;
  }
  for (int64_t j = 0; j < lines; j += L)
    for (int64_t k = 0; k < words; k += L) {
      const int64_t left = std::min<int64_t>(64, (depth - k * kPair) * (int64_t)sizeof(Element));
      const __mmask64 bytes = left == 64 ? ~__mmask64(0) : (__mmask64(1) << left) - 1;
      VF square[L];
      for (int64_t i = 0; i < L; ++i) {
        const Element* line = x + (j + i) * row + k * kPair;
        __builtin_prefetch(line + kAhead * row);
        square[i] = j + i < lines ? (VF)_mm512_maskz_loadu_epi8(bytes, line) : VF{};
      }
      transpose<L / 2>(square);
      for (int64_t i = 0; i < std::min(L, words - k); ++i) put(j, k + i, square[i]);
    }
}

// ---- the register block ------------------------------------------------------------------------------------------

// Where A's words lie, in bytes.
template <bool kPacked>
struct Left {
  const char* at;
  int64_t row;

  inline VF word(int64_t r, int64_t k) const {
    float w;
    std::memcpy(&w, kPacked ? at + (k * kRows + r) * 4 : at + r * row + k * 4, 4);
    return set1<VF>(w);
  }
  // Prefetches a part of the rows after the next R.
  inline __attribute__((always_inline)) void prefetch(int64_t R, int64_t k) const {
    if constexpr (!kPacked) __builtin_prefetch(at + (R + (k & 7)) * row + (k >> 3 << 5), 0, 2);
  }
  Left from(int64_t r) const { return {kPacked ? at + r * 4 : at + r * row, row}; }
};

struct Output {
  void* at;
  const float* bias;
  int64_t row, columns;
  bool wide, add;

  inline void put(int64_t r, int64_t n, VF v) const {
    const __mmask16 some = first16(columns - n);
    if (bias) v += (VF)_mm512_maskz_loadu_ps(some, bias + n);
    if (wide) {
      float* c = (float*)at + r * row + n;
      if (add) v += (VF)_mm512_maskz_loadu_ps(some, c);
      _mm512_mask_storeu_ps(c, some, (__m512)v);
    } else {
#if FASTLM_ISA_LEVEL == 3
      _mm256_mask_storeu_epi16((bf16_t*)at + r * row + n, some, (__m256i)_mm512_cvtneps_pbh((__m512)v));
#endif
    }
  }
};

// Words from `from` to `to` of the sums of R rows and N vectors.
template <int R, int N, bool kPacked>
inline __attribute__((always_inline)) void sums(Left<kPacked> a, const float* b, int64_t from, int64_t to,
                                                VF (&sum)[R][N]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) sum[r][n] = VF{};
  for (int64_t k = from; k < to; ++k) {
    a.prefetch(R, k);
    VF v[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) v[n] = load<VF>(b + k * kPanel + n * L);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const VF w = a.word(r, k);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sum[r][n] = multiply_add(w, v[n], sum[r][n]);
    }
  }
}

template <int R, int N, bool kPacked>
inline void block(Left<kPacked> a, const float* b, int64_t words, int64_t first, const Output& out) {
  constexpr int64_t kRun = 256;
  alignas(64) float total[R][N][L];
  for (int64_t from = 0; from < words; from += kRun) {
    VF sum[R][N];
    sums<R, N>(a, b, from, std::min(words, from + kRun), sum);
    const bool last = from + kRun >= words;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        const VF v = from > 0 ? sum[r][n] + load<VF>(total[r][n]) : sum[r][n];
        if (last)
          out.put(first + r, n * L, v);
        else
          store(total[r][n], v);
      }
  }
}

// Rows `first` to first + count, at most kRows.
template <int N, bool kPacked, int R = kRows>
inline void rows_of(Left<kPacked> a, const float* b, int64_t words, int64_t first, int64_t count, const Output& out) {
  if (count >= R) {
    block<R, N, kPacked>(a, b, words, first, out);
    a = a.from(R), first += R, count -= R;
  }
  if constexpr (R > 1) {
    if (count > 0) rows_of<N, kPacked, R / 2>(a, b, words, first, count, out);
  }
}

template <bool kPacked>
inline void rows(Left<kPacked> a, const float* b, int64_t words, int64_t first, int64_t count, const Output& out) {
  if (out.columns > 2 * L) return rows_of<3, kPacked>(a, b, words, first, count, out);
  if (out.columns > L) return rows_of<2, kPacked>(a, b, words, first, count, out);
  rows_of<1, kPacked>(a, b, words, first, count, out);
}

// ---- the product -------------------------------------------------------------------------------------------------

struct Product {
  const GemmArgs p;
  const bool packs = p.a_transposed || p.K % kPair != 0;
  const int64_t words = ceil_div(p.K, kPair), panels = ceil_div(p.N, kPanel);

  const Element* a(int64_t m) const { return (const Element*)p.a + (p.a_transposed ? m : m * p.a_row); }

  Output output(int64_t panel) const {
    const int64_t n = panel * kPanel;
    void* at = p.wide ? (void*)((float*)p.c + n) : (void*)((bf16_t*)p.c + n);
    return {at, p.bias ? p.bias + n : nullptr, p.c_row, std::min(kPanel, p.N - n), p.wide, p.add};
  }

  void pack_panel(int64_t panel, float* out) const {
    const int64_t n = panel * kPanel;
    pack((const Element*)p.b + (p.b_transposed ? n * p.b_row : n), p.b_row, !p.b_transposed,
         std::min(kPanel, p.N - n), p.K, [&](int64_t j, int64_t k, VF v) { store(out + k * kPanel + j, v); });
  }

  // Panels of kRows rows.
  void pack_rows(int64_t from, int64_t count, float* out) const {
    pack(a(from), p.a_row, p.a_transposed, count, p.K, [&](int64_t j, int64_t k, VF v) {
      static_assert(L == 2 * kRows);
      float* low = out + j * words + k * kRows;
      _mm256_storeu_ps(low, _mm512_castps512_ps256((__m512)v));
      _mm256_storeu_ps(low + kRows * words, _mm512_extractf32x8_ps((__m512)v, 1));
    });
  }

  // The product of rows `from` to from + count of A and a range of B's panels.
  void task(int64_t from, int64_t count, int64_t first_panel, int64_t last_panel) const {
    const auto [panel, left] = in_scratch([&](Arena& arena) {
      float* packed_b = arena.take<float>(words * kPanel);
      return std::pair{packed_b, packs ? arena.take<float>(ceil_div(count, L) * L * words) : nullptr};
    });
    if (packs) pack_rows(from, count, left);
    for (int64_t j = first_panel; j < last_panel; ++j) {
      pack_panel(j, panel);
      const Output out = output(j);
      for (int64_t r = 0; r < count; r += kRows) {
        const int64_t n = std::min<int64_t>(kRows, count - r), row = p.a_row * (int64_t)sizeof(Element);
        if (packs)
          rows(Left<true>{(const char*)(left + r * words), 0}, panel, words, from + r, n, out);
        else
          rows(Left<false>{(const char*)a(from + r), row}, panel, words, from + r, n, out);
      }
    }
  }

  void run() const {
    constexpr int64_t kLeast = 64, kMost = 256, kBytes = 1 << 20;  // rows of a task, and bytes of A that one packs
    const int64_t wanted = 6 * (int64_t)omp_threads();             // tasks, for the balance
    const int64_t most = packs ? std::max(kLeast, std::min(kMost, kBytes / (4 * words))) : p.M;
    const int64_t parts = packs ? ceil_div(p.M, most) : std::min(ceil_div(wanted, panels), ceil_div(p.M, kLeast));
    const int64_t count = ceil_div(ceil_div(p.M, parts), L) * L, row_tasks = ceil_div(p.M, count);
    const int64_t panel_tasks = packs ? std::min(panels, ceil_div(wanted, row_tasks)) : panels;
#pragma omp parallel for schedule(dynamic) collapse(2)
    for (int64_t i = 0; i < row_tasks; ++i)
      for (int64_t j = 0; j < panel_tasks; ++j)
        task(i * count, std::min(count, p.M - i * count), j * panels / panel_tasks, (j + 1) * panels / panel_tasks);
  }
};

void run(const GemmArgs& p) { Product{p}.run(); }

}  // namespace gemm
}  // namespace fastlm::FASTLM_ISA
#endif

#else

namespace fastlm {

#if FASTLM_X86
bool gemm_serves(int type) {
  return type == (int)DType::f32 ? isa() >= Isa::avx512 : type == (int)DType::bf16 && isa() == Isa::avx512_bf16;
}

void gemm(const GemmArgs& all) {
  const int type = all.type;
  if (!gemm_serves(type))
    unsupported_types("gemm", "a and b", {type}, "float32 with AVX-512, or bfloat16 with AVX512_BF16 and no tiles");
  if (type == (int)DType::f32 && !all.wide)
    unsupported_type("gemm", "out beside float32", (int)DType::bf16, {(int)DType::f32});
  const int64_t size = type == (int)DType::f32 ? 4 : 2;
  // Bytes of a column of B's panels, for the second-level cache's sake; only wide sums can be interrupted.
  const int64_t kColumn = all.a_transposed ? 4096 : 8192;
  const int64_t depth = all.wide ? kColumn / size : all.K;
  GemmArgs p = all;
  for (int64_t k = 0; k < all.K; k += depth) {
    p.K = std::min(depth, all.K - k);
    p.a = (const char*)all.a + size * (all.a_transposed ? k * all.a_row : k);
    p.b = (const char*)all.b + size * (all.b_transposed ? k : k * all.b_row);
    p.add = all.add || k > 0;
    p.bias = k > 0 ? nullptr : all.bias;
    type == (int)DType::f32 ? avx512::gemm::run(p) : avx512_bf16::gemm::run(p);
  }
}
#else
bool gemm_serves(int) { return false; }
void gemm(const GemmArgs& args) { unsupported_types("gemm", "a and b", {args.type}, "an x86-64 CPU"); }
#endif

}  // namespace fastlm
#endif
