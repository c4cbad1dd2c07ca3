// GELU (Hendrycks & Gimpel 2016), exact and tanh form, with the bias addition before it and dropout after it.
//
//   none: x Phi(x),  Phi from erfc of |x| / sqrt 2, so the left tail keeps its relative accuracy;
//         derivative Phi(x) + x phi(x), whose e^(-x^2 / 2) the erfc has already computed.
//   tanh: x s with s = sigmoid(2 u) = 1 / (1 + e), e = e^(-2u), u = sqrt(2/pi) (x + 0.044715 x^3);
//         derivative s + 2 x s (1 - s) u'.
// The formulas serve fp64; otherwise both forms come from tables (gelu_table.h), which without wide vectors hold a value
// for each of bf16's 65536 inputs. At 4096x3072 with AVX-512 tanh is 4.8 times as fast as PyTorch forward in fp32, exact
// 1.8 times; docs/design/gelu.md has the other instruction sets and what was tried. Arithmetic and memory take about as
// long as each other, so what counts is that they overlap: prefetches 512 bytes ahead forward, and 2048 backward into the
// second-level cache, which has more misses under way. Two vectors at a time make whole lines of bf16 for stores past
// the caches.
// Forward reads x and writes y; backward reads dy and x and writes dx. The bias gradient is summed in the same pass
// into partial sums of fixed chunks of rows, which are added in order: four rows at a time in fp32, one in 16 bits.

#include "cpu/gelu_table.h"
#include "cpu/isa.h"
#include "cpu/ops.h"

#ifndef FASTLM_ISA
#define FASTLM_WANT_BF16  // for its conversion to bf16
#define FASTLM_FILE "cpu/gelu.cpp"
#include "cpu/foreach_isa.h"
#endif

#ifdef FASTLM_ISA
#if FASTLM_ISA_LEVEL <= 3  // there is nothing to multiply with tiles
namespace fastlm::FASTLM_ISA {

namespace gelu {

template <class T>
constexpr bool is_short = sizeof(T) == 2;
constexpr double kInvSqrt2 = 0.70710678118654752440, kInvSqrt2Pi = 0.39894228040143267794;
constexpr double kSqrt2OverPi = 0.79788456080286535588, kCubic = 0.044715;

// The formulas, for fp64 and for tables.
inline VD cdf(VD x, VD* pdf) {
  VD gauss;
  const VD tail = erfc_positive(min(set1<VD>(40), abs(x) * kInvSqrt2), &gauss);
  *pdf = gauss * kInvSqrt2Pi;
  return x > 0 ? 1.0 - 0.5 * tail : 0.5 * tail;
}
inline VD exp_of_minus_2u(VD x, VD square) { return exp(x * (-2 * kSqrt2OverPi * (1.0 + kCubic * square))); }

// Beyond 10 the sigmoid is 1 or below 1e-37, and e would overflow; beyond 40 the exact form is x or 0.
inline VD clamped(VD x, double limit) { return max(set1<VD>(-limit), min(set1<VD>(limit), x)); }

template <bool TANH>
struct Formula {
  explicit Formula(bool) {}

  VD value(VD x) const {
    if constexpr (TANH) {
      const VD c = clamped(x, 10);
      return max(set1<VD>(-10), x) / (1.0 + exp_of_minus_2u(c, c * c));
    } else {
      VD pdf;
      return max(set1<VD>(-40), x) * cdf(x, &pdf);
    }
  }
  VD derivative(VD x) const {
    if constexpr (TANH) {
      const VD c = clamped(x, 10), square = c * c;
      const VD e = exp_of_minus_2u(c, square), s = 1.0 / (1.0 + e);
      const VD slope = 2 * kSqrt2OverPi * (1.0 + 3 * kCubic * square);
      return c * slope * s * (e * s) + s;  // 1 - s = e s: a difference would lose it near 1
    } else {
      VD pdf;
      const VD phi = cdf(x, &pdf);
      return clamped(x, 40) * pdf + phi;
    }
  }
};

#if FASTLM_ISA_LEVEL >= 2
template <bool TANH, bool SHORT>
struct Lookup {
  static constexpr int kTerms = SHORT ? 4 : 6;
  static constexpr float kIntervals = kGeluIntervals;
  VF low[kTerms], high[kTerms];  // coefficients of intervals 0 to 15, and 16 to 31

  explicit Lookup(bool of_derivative) {
    const auto& table = gelu_table<GeluTable<kTerms>>(TANH, of_derivative);
    for (int k = 0; k < kTerms; ++k) {
      low[k] = load<VF>(table.coefficient[k]);
      high[k] = load<VF>(table.coefficient[k] + 16);
    }
  }
  VF coefficient(int k, __m512i interval) const {
    return (VF)_mm512_permutex2var_ps((__m512)low[k], interval, (__m512)high[k]);
  }
  inline __attribute__((always_inline)) VF left(VF place) const {
    const __m512i interval = _mm512_cvttps_epi32((__m512)place);
    const __m512 t = _mm512_reduce_ps((__m512)place, _MM_FROUND_TO_ZERO);  // the fraction
    VF y = coefficient(kTerms - 1, interval);
    for (int k = kTerms - 2; k > 0; --k) y = fma(y, (VF)t, coefficient(k, interval));
    const __mmask16 inside = _mm512_cmp_ps_mask((__m512)place, _mm512_set1_ps(kIntervals), _CMP_NEQ_UQ);
    return (VF)_mm512_maskz_fmadd_ps(inside, (__m512)y, t, (__m512)coefficient(0, interval));
  }
};
#else
// A vector of each of the lanes' three coefficients.
struct Coefficients {
  VF constant, linear, square;
};
inline Coefficients coefficients(const float (*table)[4], VI interval) {
  const VI bytes = interval * (int32_t)sizeof *table;  // an address multiplies by 8 at most
  uint64_t pair[lanes<VF> / 2];
  std::memcpy(pair, &bytes, sizeof pair);
#define FASTLM_ROW(lane) \
  _mm_load_ps((const float*)((const char*)table + (uint32_t)((lane) % 2 ? pair[(lane) / 2] >> 32 : pair[(lane) / 2])))
#if FASTLM_ISA_LEVEL == 1
#define FASTLM_ROWS(lane) _mm256_insertf128_ps(_mm256_castps128_ps256(FASTLM_ROW(lane)), FASTLM_ROW(lane + 4), 1)
  const __m256 a = FASTLM_ROWS(0), b = FASTLM_ROWS(1), c = FASTLM_ROWS(2), d = FASTLM_ROWS(3);
#undef FASTLM_ROWS
  const __m256 ab = _mm256_unpacklo_ps(a, b), cd = _mm256_unpacklo_ps(c, d);
  const __m256 squares_ab = _mm256_unpackhi_ps(a, b), squares_cd = _mm256_unpackhi_ps(c, d);
  return {(VF)_mm256_shuffle_ps(ab, cd, 0x44), (VF)_mm256_shuffle_ps(ab, cd, 0xee),
          (VF)_mm256_shuffle_ps(squares_ab, squares_cd, 0x44)};
#elif FASTLM_X86
  const __m128 a = FASTLM_ROW(0), b = FASTLM_ROW(1), c = FASTLM_ROW(2), d = FASTLM_ROW(3);
  const __m128 ab = _mm_unpacklo_ps(a, b), cd = _mm_unpacklo_ps(c, d);
  return {(VF)_mm_movelh_ps(ab, cd), (VF)_mm_movehl_ps(cd, ab),
          (VF)_mm_movelh_ps(_mm_unpackhi_ps(a, b), _mm_unpackhi_ps(c, d))};
#else
  Coefficients c;
  for (int64_t l = 0; l < lanes<VF>; ++l)
    c.constant[l] = table[interval[l]][0], c.linear[l] = table[interval[l]][1], c.square[l] = table[interval[l]][2];
  return c;
#endif
#undef FASTLM_ROW
}

template <bool TANH, bool>
struct Lookup {
  static constexpr float kIntervals = kGeluFineIntervals;
  const float (*table)[4];

  explicit Lookup(bool of_derivative) : table(gelu_table<GeluFineTable>(TANH, of_derivative).coefficient) {}

  inline __attribute__((always_inline)) VF left(VF place) const {
    const VI interval = __builtin_convertvector(min(place, set1<VF>(kIntervals)), VI);  // a NaN's is the last
    const VF t = place - __builtin_convertvector(interval, VF);
    const Coefficients c = coefficients(table, interval);
    return fma(fma(c.square, t, c.linear), t, c.constant);
  }
};
#endif

// The curve at -|x|, for |x| = place intervals, is `left`; 0 beyond the last one.
template <bool TANH, bool SHORT>
struct Curve : Lookup<TANH, SHORT> {
  using Table = Lookup<TANH, SHORT>;
  using Table::Table;

  // |x| in intervals, at most all of them; NaN for NaN.
  static VF place_of(VF x) { return min(set1<VF>(Table::kIntervals), abs(x) * (Table::kIntervals / float(kGeluEnd))); }
  inline __attribute__((always_inline)) VF value(VF x) const {
    const VF place = place_of(x);
    return fma(-place, Table::left(place), max(VF{}, x));
  }
  inline __attribute__((always_inline)) VF derivative(VF x) const {
    const VF y = Table::left(place_of(x));
    return x > 0 ? 1.0f - y : y;
  }
};

template <bool TANH, class T>
using form = std::conditional_t<std::is_same_v<T, double>, Formula<TANH>, Curve<TANH, is_short<T>>>;

constexpr int64_t kLookedUp = 4096;  // values at a time

// Without wide vectors it is faster to look each value of a 16-bit type up: those that occur fit in a cache.
template <class T>
constexpr bool looks_values_up = is_short<T> && FASTLM_ISA_LEVEL < 2;

// GELU, as it is stored, or its derivative, of each of them.
template <class T, bool TANH, bool DERIVATIVE>
struct Values {
  static constexpr int64_t kCount = 1 << 16, L = lanes<VD>;
  std::conditional_t<DERIVATIVE, float, T> at[kCount];

  Values() {
    const Formula<TANH> gelu(DERIVATIVE);
    for (int64_t bits = 0; bits < kCount; bits += L) {
      VD x;
      for (int64_t l = 0; l < L; ++l) x[l] = to_float(T{(uint16_t)(bits + l)});
      const VD y = DERIVATIVE ? gelu.derivative(x) : gelu.value(x);
      for (int64_t l = 0; l < L; ++l) from_float((float)y[l], at + bits + l);
    }
  }
};

template <class T, bool TANH>
void look_up(const T* x, T* y, int64_t size) {
  static const Values<T, TANH, false> values;
#pragma omp parallel for schedule(static) if (size > kParallelGrain)
  for (int64_t i = 0; i < size; ++i) y[i] = values.at[x[i].bits];
}
template <class T, bool TANH>
void look_up_derivative(const T* dy, const T* x, T* dx, int64_t size) {
  static const Values<T, TANH, true> values;
#pragma omp parallel for schedule(static) if (size > kParallelGrain)
  for (int64_t first = 0; first < size; first += kLookedUp)
    for_lanes<VF>(std::min(kLookedUp, size - first), [&](int64_t j, auto n) {
      const int64_t at = first + j;
      VF slope{};
      for (int64_t l = 0; l < n; ++l) slope[l] = values.at[x[at + l].bits];
      store(dx + at, VF(load<VF>(dy + at, n) * slope), n);
    });
}

template <bool STREAM, class T, class V, class N>
inline void put(T* p, V v, N n) {
  store_or_stream<STREAM>(p, v, n);
}
#if FASTLM_ISA_LEVEL == 3
// In one instruction instead of eight; denormals become 0.
template <bool STREAM>
inline void put(bf16_t* p, VF v, std::integral_constant<int64_t, lanes<VF>>) {
  const __m256i bits = (__m256i)_mm512_cvtneps_pbh((__m512)v);
  if constexpr (STREAM)
    _mm256_stream_si256((__m256i*)p, bits);
  else
    _mm256_storeu_si256((__m256i*)p, bits);
}
#endif

// The lines of two vectors, AHEAD bytes on, for the cache of a level: beside this much arithmetic the hardware alone
// fetches too late.
template <int LEVEL, int64_t AHEAD, class T>
inline void fetch_two(const T* p) {
  constexpr int64_t kLine = 64;
  for (int64_t at = 0; at < 2 * lanes<vec_of<T>> * (int64_t)sizeof(T); at += kLine)
    __builtin_prefetch((const char*)p + AHEAD + at, 0, 4 - LEVEL);
}

constexpr int64_t kBlock = 64;  // columns for which dropout factors are made at a time

template <class T, bool TANH, bool STREAM>
void fwd(const GeluArgs& a) {
  using V = vec_of<T>;
  const T* x = (const T*)a.x;
  const scalar_of<T>* bias = (const scalar_of<T>*)a.bias;
  T* y = (T*)a.y;
  const int64_t M = a.M, N = a.N;
  const double p = a.dropout_p;
  const Dropout dropout(a.seed, p);
  const form<TANH, T> shared(false);
#pragma omp parallel for schedule(static) if (M * N > kParallelGrain)
  for (int64_t i = 0; i < M; ++i) {
    const auto gelu = shared;  // in registers: a table that others could see is read again for every vector
    const T* in = x + i * N;
    T* out = y + i * N;
    if (p == 0) {
      const auto value = [&](int64_t j, auto n) __attribute__((always_inline)) {
        V v = load<V>(in + j, n);
        if (bias) v += load<V>(bias + j, n);
        return gelu.value(v);
      };
      constexpr std::integral_constant<int64_t, lanes<V>> whole;
      int64_t j = 0;
      for (; j + 2 * whole <= N; j += 2 * whole) {
        fetch_two<1, 512>(in + j);
        put_two<STREAM>(out + j, value(j, whole), value(j + whole, whole));
      }
      for_lanes<V>(N - j, [&](int64_t k, auto n) { put<STREAM>(out + j + k, value(j + k, n), n); });
      continue;
    }
    scalar_of<T> factor[kBlock];
    for (int64_t first = 0; first < N; first += kBlock) {
      const int64_t n_block = std::min(kBlock, N - first);
      dropout.factors(i, first, n_block, factor);
      for_lanes<V>(n_block, [&](int64_t k, auto n) {
        V v = load<V>(in + first + k, n);
        if (bias) v += load<V>(bias + first + k, n);
        store(out + first + k, V(gelu.value(v) * load<V>(factor + k, n)), n);
      });
    }
  }
}

// R rows from row i on, columns [first, first + n_block).
template <int R, bool STREAM, class Form, class T>
inline void bwd_tile(const Form& gelu, const T* dy, const T* x, const scalar_of<T>* bias, T* dx, scalar_of<T>* sum,
                     int64_t i, int64_t first, int64_t n_block, int64_t N, const Dropout* dropout) {
  using V = vec_of<T>;
  constexpr std::integral_constant<int64_t, lanes<V>> whole;
  scalar_of<T> factor[R][kBlock];
  if (dropout)
    for (int r = 0; r < R; ++r) dropout->factors(i + r, first, n_block, factor[r]);
  const auto value = [&](int r, int64_t k, auto n) __attribute__((always_inline)) {
    const int64_t j = first + k, at = (i + r) * N + j;
    V g = load<V>(dy + at, n), v = load<V>(x + at, n);
    if (dropout) g *= load<V>(factor[r] + k, n);
    if (bias) v += load<V>(bias + j, n);
    return V(g * gelu.derivative(v));
  };
  int64_t k = 0;
  for (; k + 2 * whole <= n_block; k += 2 * whole) {
    scalar_of<T>* const to = sum ? sum + first + k : nullptr;
    V a = sum ? load<V>(to) : V{}, b = sum ? load<V>(to + whole) : V{};
    for (int r = 0; r < R; ++r) {
      const int64_t at = (i + r) * N + first + k;
      fetch_two<2, 2048>(dy + at);
      fetch_two<2, 2048>(x + at);
      const V c = value(r, k, whole), d = value(r, k + whole, whole);
      a += c;
      b += d;
      put_two<STREAM>(dx + at, c, d);
    }
    if (sum) store(to, a), store(to + whole, b);
  }
  for_lanes<V>(n_block - k, [&](int64_t rest, auto n) {
    scalar_of<T>* const to = sum ? sum + first + k + rest : nullptr;
    V a = sum ? load<V>(to, n) : V{};
    for (int r = 0; r < R; ++r) {
      const V c = value(r, k + rest, n);
      a += c;
      put<STREAM>(dx + (i + r) * N + first + k + rest, c, n);
    }
    if (sum) store(to, a, n);
  });
}

template <class T, bool TANH, bool STREAM>
void bwd(const GeluArgs& a) {
  using V = vec_of<T>;
  using S = scalar_of<T>;
  const T *dy = (const T*)a.dy, *x = (const T*)a.x;
  const S* bias = (const S*)a.bias;
  T* dx = (T*)a.dx;
  S *partial = (S*)a.partial, *db = (S*)a.db;
  const int64_t M = a.M, N = a.N;
  const Dropout generator(a.seed, a.dropout_p);
  const Dropout* dropout = a.dropout_p > 0 ? &generator : nullptr;
  const form<TANH, T> shared(true);
  constexpr int R = is_short<T> ? 1 : 4;
  const int64_t size = chunk_rows(M), chunks = ceil_div(M, size);
#pragma omp parallel for schedule(static) if (M * N > kParallelGrain)
  for (int64_t c = 0; c < chunks; ++c) {
    const auto gelu = shared;
    S* sum = db ? partial + c * N : nullptr;
    if (sum) std::fill(sum, sum + N, S(0));
    const int64_t end = std::min(M, (c + 1) * size);
    for (int64_t i = c * size; i < end;) {
      const bool tile = i + R <= end;
      const int64_t block = dropout ? kBlock : N;
      for (int64_t first = 0; first < N; first += block) {
        const int64_t n_block = std::min(block, N - first);
        if (tile)
          bwd_tile<R, STREAM>(gelu, dy, x, bias, dx, sum, i, first, n_block, N, dropout);
        else
          bwd_tile<1, STREAM>(gelu, dy, x, bias, dx, sum, i, first, n_block, N, dropout);
      }
      i += tile ? R : 1;
    }
  }
  if (!db) return;
  for_lanes<V>(N, [&](int64_t j, auto n) {
    V v{};
    for (int64_t c = 0; c < chunks; ++c) v += load<V>(partial + c * N + j, n);
    store(db + j, v, n);
  });
}

template <class T, bool TANH>
void fwd_form(const GeluArgs& a) {
  if constexpr (looks_values_up<T>)
    if (!a.bias && a.dropout_p == 0) return look_up<T, TANH>((const T*)a.x, (T*)a.y, a.M * a.N);
  streams((const T*)a.y, a.M, a.N, 2) ? fwd<T, TANH, true>(a) : fwd<T, TANH, false>(a);
}
template <class T, bool TANH>
void bwd_form(const GeluArgs& a) {
  if constexpr (looks_values_up<T>)
    if (!a.bias && a.dropout_p == 0)
      return look_up_derivative<T, TANH>((const T*)a.dy, (const T*)a.x, (T*)a.dx, a.M * a.N);
  streams((const T*)a.dx, a.M, a.N, 3) ? bwd<T, TANH, true>(a) : bwd<T, TANH, false>(a);
}

void fwd_any(const GeluArgs& a) {
  for_any_type("gelu_fwd", "x", a.type, [&](auto type) {
    using T = decltype(type);
    a.tanh ? fwd_form<T, true>(a) : fwd_form<T, false>(a);
  });
}
void bwd_any(const GeluArgs& a) {
  for_any_type("gelu_bwd", "x", a.type, [&](auto type) {
    using T = decltype(type);
    a.tanh ? bwd_form<T, true>(a) : bwd_form<T, false>(a);
  });
}

}  // namespace gelu
}  // namespace fastlm::FASTLM_ISA
#endif

#else

#include "cpu/convert.h"

namespace fastlm {

namespace {
double normal_tail(double a) { return 0.5 * std::erfc(a * 0.70710678118654752440); }
double normal_slope(double a) { return normal_tail(a) - a * 0.39894228040143267794 * std::exp(-0.5 * a * a); }
double tanh_tail(double a) { return 1 / (1 + std::exp(2 * 0.79788456080286535588 * (a + 0.044715 * a * a * a))); }
double tanh_slope(double a) {
  const double s = tanh_tail(a);
  return s - 2 * a * s * (1 - s) * 0.79788456080286535588 * (1 + 3 * 0.044715 * a * a);
}
}  // namespace

template <class Table>
const Table& gelu_table(bool tanh, bool derivative) {
  static const Table tables[] = {{normal_tail, true}, {normal_slope, false}, {tanh_tail, true}, {tanh_slope, false}};
  return tables[2 * tanh + derivative];
}
template const GeluTable<4>& gelu_table<GeluTable<4>>(bool, bool);
template const GeluTable<6>& gelu_table<GeluTable<6>>(bool, bool);
template const GeluFineTable& gelu_table<GeluFineTable>(bool, bool);

void gelu_fwd(const GeluArgs& args) {
  GeluArgs a = args;
  const AsCompute bias(a.bias, a.N, a.bias_type, a.type);
  a.bias = bias.data;
  FASTLM_DISPATCH_BF16(gelu::fwd_any, a);
}

void gelu_bwd(const GeluArgs& args) {
  GeluArgs a = args;
  const AsCompute bias(a.bias, a.N, a.bias_type, a.type);
  a.bias = bias.data;
  FASTLM_DISPATCH_BF16(gelu::bwd_any, a);
}

}  // namespace fastlm
#endif
