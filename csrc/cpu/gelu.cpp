// GELU (Hendrycks & Gimpel 2016), exact and tanh form, with the bias addition before it and dropout after it.
//
//   none: x Phi(x),  Phi from erfc of |x| / sqrt 2, so the left tail keeps its relative accuracy;
//         derivative Phi(x) + x phi(x), whose e^(-x^2 / 2) the erfc has already computed.
//   tanh: x s with s = sigmoid(2 u) = 1 / (1 + e), e = e^(-2u), u = sqrt(2/pi) (x + 0.044715 x^3); derivative s + 2 x s (1 - s) u'.
// With AVX-512 both come from tables instead (gelu_table.h), in a third of the instructions. At 4096x3072 against
// PyTorch on two threads, freed memory kept: tanh forward 4.8x in fp32 and 8.7x in bf16, backward 4.0x and 6.5x; exact
// forward 1.8x and 1.9x, backward 2.2x and 2.8x. Arithmetic and memory take about as long as each other (fp32 forward
// 1.3 and 1.9 ms of 2.2), so what counts is that they overlap: prefetches 512 bytes ahead gained 1.3x forward and
// 1.15x backward over the hardware's alone, and more than those 256, 1024 or 4096 bytes ahead. Two vectors at a time
// make whole lines of bf16 for stores that go past the caches.
// Forward reads x and writes y; backward reads dy and x and writes dx. The bias gradient is summed in the same pass,
// four rows at a time, into partial sums of fixed chunks of rows that are added in order.

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

constexpr double kInvSqrt2 = 0.70710678118654752440, kInvSqrt2Pi = 0.39894228040143267794;
constexpr double kSqrt2OverPi = 0.79788456080286535588, kCubic = 0.044715;

// SHORT: the result is stored in 16 bits, so shorter polynomials serve.
template <bool SHORT, class V>
inline V cdf(V x, V* pdf) {
  using S = lane_t<V>;
  V gauss, tail;
  if constexpr (SHORT)
    tail = erfc_16(min(set1<V>(6), abs(x) * S(kInvSqrt2)), &gauss);
  else
    tail = erfc_positive(min(set1<V>(40), abs(x) * S(kInvSqrt2)), &gauss);
  *pdf = gauss * S(kInvSqrt2Pi);
  return x > 0 ? fma(tail, set1<V>(-0.5), set1<V>(1)) : tail * S(0.5);
}
template <bool SHORT, class V>
inline V exp_of_minus_2u(V x, V square) {
  using S = lane_t<V>;
  const V minus_2u = x * fma(square, set1<V>(S(-2 * kSqrt2OverPi * kCubic)), set1<V>(S(-2 * kSqrt2OverPi)));
  if constexpr (SHORT)
    return exp_16(minus_2u);
  else
    return exp(minus_2u);
}

// Beyond 10 the sigmoid is 1 or below 1e-37, and e would overflow; beyond 40 the exact form is x or 0.
template <class V>
inline V clamped(V x, double limit) {
  return max(set1<V>(-limit), min(set1<V>(limit), x));
}

template <bool TANH, bool SHORT, class V>
struct Formula {
  explicit Formula(bool) {}

  V value(V x) const {
    if constexpr (TANH) {
      const V c = clamped(x, 10);
      return max(set1<V>(-10), x) * reciprocal(V(lane_t<V>(1) + exp_of_minus_2u<SHORT>(c, V(c * c))));
    } else {
      V pdf;
      return max(set1<V>(-40), x) * cdf<SHORT>(x, &pdf);
    }
  }
  V derivative(V x) const {
    using S = lane_t<V>;
    if constexpr (TANH) {
      const V c = clamped(x, 10);
      const V square = c * c;
      const V e = exp_of_minus_2u<SHORT>(c, square);
      const V s = reciprocal(V(S(1) + e));
      const V slope = fma(square, set1<V>(S(6 * kSqrt2OverPi * kCubic)), set1<V>(S(2 * kSqrt2OverPi)));
      return fma(c * slope, s * (e * s), s);  // 1 - s = e s: a difference would lose it near 1
    } else {
      V pdf;
      const V phi = cdf<SHORT>(x, &pdf);
      return fma(clamped(x, 40), pdf, phi);
    }
  }
};

#if FASTLM_ISA_LEVEL >= 2
template <bool TANH, bool SHORT>
struct Lookup {
  static constexpr int kTerms = SHORT ? 4 : 6;
  VF low[kTerms], high[kTerms];  // coefficients of intervals 0 to 15, and 16 to 31

  explicit Lookup(bool of_derivative) {
    const auto& table = gelu_table<kTerms>(TANH, of_derivative);
    for (int k = 0; k < kTerms; ++k) {
      low[k] = load<VF>(table.coefficient[k]);
      high[k] = load<VF>(table.coefficient[k] + 16);
    }
  }
  VF coefficient(int k, __m512i interval) const {
    return (VF)_mm512_permutex2var_ps((__m512)low[k], interval, (__m512)high[k]);
  }
  // The curve at -|x|, for |x| = place intervals; 0 beyond the last one.
  inline __attribute__((always_inline)) VF left(VF place) const {
    const __m512i interval = _mm512_cvttps_epi32((__m512)place);
    const __m512 t = _mm512_reduce_ps((__m512)place, _MM_FROUND_TO_ZERO);  // the fraction
    VF y = coefficient(kTerms - 1, interval);
    for (int k = kTerms - 2; k > 0; --k) y = fma(y, (VF)t, coefficient(k, interval));
    const __mmask16 inside = _mm512_cmp_ps_mask((__m512)place, _mm512_set1_ps(kGeluIntervals), _CMP_NEQ_UQ);
    return (VF)_mm512_maskz_fmadd_ps(inside, (__m512)y, t, (__m512)coefficient(0, interval));
  }
  // |x| in intervals, at most all of them; NaN for NaN.
  static VF place_of(VF x) {
    return min(set1<VF>(kGeluIntervals), abs(x) * float(1 / kGeluWidth));
  }
  inline __attribute__((always_inline)) VF value(VF x) const {
    const VF place = place_of(x);
    return fma(-place, left(place), max(VF{}, x));
  }
  inline __attribute__((always_inline)) VF derivative(VF x) const {
    const VF y = left(place_of(x));
    return x > 0 ? 1.0f - y : y;
  }
};
#endif

template <bool TANH, bool SHORT, class V>
struct form {
  using type = Formula<TANH, SHORT, V>;
};
#if FASTLM_ISA_LEVEL >= 2
template <bool TANH, bool SHORT>
struct form<TANH, SHORT, VF> {
  using type = Lookup<TANH, SHORT>;
};
#endif

template <class T>
constexpr bool is_short = sizeof(T) == 2;

template <bool STREAM, class T, class V, class N>
inline void put(T* p, V v, N n) {
  store_or_stream<STREAM>(p, v, n);
}
template <bool STREAM, class T, class V>
inline void put_two(T* p, V a, V b) {
  constexpr std::integral_constant<int64_t, lanes<V>> whole;
  store_or_stream<STREAM>(p, a, whole);
  store_or_stream<STREAM>(p + lanes<V>, b, whole);
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
template <bool STREAM>
inline void put_two(bf16_t* p, VF a, VF b) {
  const __m512i bits = (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
  if constexpr (STREAM)
    _mm512_stream_si512((__m512i*)p, bits);
  else
    _mm512_storeu_si512(p, bits);
}
#endif

// The lines of two vectors, some way ahead: beside this much arithmetic the hardware alone fetches too late.
template <class T>
inline void fetch_two(const T* p) {
  constexpr int64_t kAhead = 512, kLine = 64;
  for (int64_t at = 0; at < 2 * lanes<vec_of<T>> * (int64_t)sizeof(T); at += kLine)
    __builtin_prefetch((const char*)p + kAhead + at);
}

constexpr int64_t kBlock = 64;  // columns for which dropout factors are made at a time

template <class T, bool TANH, bool STREAM>
void fwd(const T* x, const scalar_of<T>* bias, T* y, int64_t M, int64_t N, double p, int64_t seed) {
  using V = vec_of<T>;
  const Dropout dropout(seed, p);
  const typename form<TANH, is_short<T>, V>::type shared(false);
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
        fetch_two(in + j);
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
      fetch_two(dy + at);
      fetch_two(x + at);
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
void bwd(const T* dy, const T* x, const scalar_of<T>* bias, T* dx, scalar_of<T>* partial, scalar_of<T>* db, int64_t M,
         int64_t N, double p, int64_t seed) {
  using V = vec_of<T>;
  using S = scalar_of<T>;
  const Dropout generator(seed, p);
  const Dropout* dropout = p > 0 ? &generator : nullptr;
  const typename form<TANH, is_short<T>, V>::type shared(true);
  const int64_t size = chunk_rows(M), chunks = ceil_div(M, size);
#pragma omp parallel for schedule(static) if (M * N > kParallelGrain)
  for (int64_t c = 0; c < chunks; ++c) {
    const auto gelu = shared;
    S* sum = db ? partial + c * N : nullptr;
    if (sum) std::fill(sum, sum + N, S(0));
    const int64_t end = std::min(M, (c + 1) * size);
    for (int64_t i = c * size; i < end;) {
      const bool four = i + 4 <= end;
      const int64_t block = dropout ? kBlock : N;
      for (int64_t first = 0; first < N; first += block) {
        const int64_t n_block = std::min(block, N - first);
        if (four)
          bwd_tile<4, STREAM>(gelu, dy, x, bias, dx, sum, i, first, n_block, N, dropout);
        else
          bwd_tile<1, STREAM>(gelu, dy, x, bias, dx, sum, i, first, n_block, N, dropout);
      }
      i += four ? 4 : 1;
    }
  }
  if (!db) return;
  for_lanes<V>(N, [&](int64_t j, auto n) {
    V v{};
    for (int64_t c = 0; c < chunks; ++c) v += load<V>(partial + c * N + j, n);
    store(db + j, v, n);
  });
}

template <class T>
void fwd_form(const void* x, const void* bias, void* y, int64_t M, int64_t N, bool tanh, double p, int64_t seed) {
  const bool stream = streams((const T*)y, M, N);
  auto run = tanh ? (stream ? fwd<T, true, true> : fwd<T, true, false>)
                  : (stream ? fwd<T, false, true> : fwd<T, false, false>);
  run((const T*)x, (const scalar_of<T>*)bias, (T*)y, M, N, p, seed);
}
template <class T>
void bwd_form(const void* dy, const void* x, const void* bias, void* dx, void* partial, void* db, int64_t M, int64_t N,
              bool tanh, double p, int64_t seed) {
  using S = scalar_of<T>;
  const bool stream = streams((const T*)dx, M, N);
  auto run = tanh ? (stream ? bwd<T, true, true> : bwd<T, true, false>)
                  : (stream ? bwd<T, false, true> : bwd<T, false, false>);
  run((const T*)dy, (const T*)x, (const S*)bias, (T*)dx, (S*)partial, (S*)db, M, N, p, seed);
}

#define FASTLM_TYPES(fn, ...)                            \
  switch ((DType)type) {                                 \
    case DType::f32: return fn<float>(__VA_ARGS__);      \
    case DType::f64: return fn<double>(__VA_ARGS__);     \
    case DType::bf16: return fn<bf16_t>(__VA_ARGS__);    \
    case DType::f16: return fn<f16_t>(__VA_ARGS__);      \
  }

void fwd_dispatch(const void* x, const void* bias, void* y, int64_t M, int64_t N, bool tanh, double p, int64_t seed,
                  int type) {
  FASTLM_TYPES(fwd_form, x, bias, y, M, N, tanh, p, seed)
}
void bwd_dispatch(const void* dy, const void* x, const void* bias, void* dx, void* partial, void* db, int64_t M,
                  int64_t N, bool tanh, double p, int64_t seed, int type) {
  FASTLM_TYPES(bwd_form, dy, x, bias, dx, partial, db, M, N, tanh, p, seed)
}
#undef FASTLM_TYPES

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

template <int TERMS>
const GeluTable<TERMS>& gelu_table(bool tanh, bool derivative) {
  static const GeluTable<TERMS> tables[] = {{normal_tail, kGeluWidth}, {normal_slope, 1.0}, {tanh_tail, kGeluWidth},
                                            {tanh_slope, 1.0}};
  return tables[2 * tanh + derivative];
}
template const GeluTable<4>& gelu_table<4>(bool, bool);
template const GeluTable<6>& gelu_table<6>(bool, bool);

void gelu_fwd(const void* x, const void* bias, void* y, int64_t M, int64_t N, bool tanh, double p, int64_t seed,
              int type, int b_type) {
  const AsCompute bc(bias, N, b_type, type);
  FASTLM_DISPATCH_BF16(gelu::fwd_dispatch, x, bc.data, y, M, N, tanh, p, seed, type);
}

void gelu_bwd(const void* dy, const void* x, const void* bias, void* dx, void* partial, void* db, int64_t M, int64_t N,
              bool tanh, double p, int64_t seed, int type, int b_type) {
  const AsCompute bc(bias, N, b_type, type);
  FASTLM_DISPATCH_BF16(gelu::bwd_dispatch, dy, x, bc.data, dx, partial, db, M, N, tanh, p, seed, type);
}

}  // namespace fastlm
#endif
