// Vectors of the width of one instruction set, for inclusion inside a pass of foreach_isa.h: no include guard.
//
// VF and VD are GCC vector types, so + - * / and comparisons are the language's own and `mask ? a : b` selects.
// Kernels are templates over the compute vector V (VF for f32, bf16 and f16 storage, VD for f64) and never name
// a lane count. max and min return their second operand when either is NaN, as the hardware does: write
// max(limit, x) to let a NaN in x through.
//
// Errors measured over every float in the stated range, by the tests, against fp64 (units in the last place):
//   exp   any float; 0 below -103.97, denormals right, inf above 88.72      <= 1 ULP
//   tanh  any float                                                         <= 2 ULP
//   erf   any float                                                         <= 3 ULP
//   erfc  x >= 0; underflows to 0 above 10.06                               <= 8 ULP where the result is normal
//   reciprocal  1e-37 < |x| < 1e37                                          <= 2 ULP

namespace fastlm::FASTLM_ISA {

typedef float VF __attribute__((vector_size(FASTLM_VEC_BYTES)));
typedef double VD __attribute__((vector_size(FASTLM_VEC_BYTES)));
typedef int32_t VI __attribute__((vector_size(FASTLM_VEC_BYTES)));
typedef uint32_t VU __attribute__((vector_size(FASTLM_VEC_BYTES)));
typedef uint16_t VH __attribute__((vector_size(FASTLM_VEC_BYTES / 2)));

template <class T>
struct compute {
  using vec = VF;
  using scalar = float;
};
template <>
struct compute<double> {
  using vec = VD;
  using scalar = double;
};
template <class T>
using vec_of = typename compute<T>::vec;
template <class T>
using scalar_of = typename compute<T>::scalar;

template <class V>
struct lane;
template <>
struct lane<VF> {
  using type = float;
};
template <>
struct lane<VD> {
  using type = double;
};
template <class V>
using lane_t = typename lane<V>::type;
template <class V>
constexpr int64_t lanes = sizeof(V) / sizeof(lane_t<V>);

template <class V>
inline V set1(lane_t<V> s) {
  return s - V{};
}

// ---- arithmetic -------------------------------------------------------------------------------------------

inline VF fma(VF a, VF b, VF c) {
#if FASTLM_ISA_LEVEL >= 2
  return (VF)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif FASTLM_ISA_LEVEL == 1
  return (VF)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}
inline VD fma(VD a, VD b, VD c) {
#if FASTLM_ISA_LEVEL >= 2
  return (VD)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif FASTLM_ISA_LEVEL == 1
  return (VD)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return a * b + c;
#endif
}

inline VF max(VF a, VF b) {
#if FASTLM_ISA_LEVEL >= 2
  return (VF)_mm512_max_ps((__m512)a, (__m512)b);
#elif FASTLM_ISA_LEVEL == 1
  return (VF)_mm256_max_ps((__m256)a, (__m256)b);
#elif FASTLM_X86
  return (VF)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}
inline VF min(VF a, VF b) {
#if FASTLM_ISA_LEVEL >= 2
  return (VF)_mm512_min_ps((__m512)a, (__m512)b);
#elif FASTLM_ISA_LEVEL == 1
  return (VF)_mm256_min_ps((__m256)a, (__m256)b);
#elif FASTLM_X86
  return (VF)_mm_min_ps((__m128)a, (__m128)b);
#else
  return a < b ? a : b;
#endif
}
// Correctly rounded.
inline VF sqrt(VF x) {
#if FASTLM_ISA_LEVEL >= 2
  return (VF)_mm512_sqrt_ps((__m512)x);
#elif FASTLM_ISA_LEVEL == 1
  return (VF)_mm256_sqrt_ps((__m256)x);
#elif FASTLM_X86
  return (VF)_mm_sqrt_ps((__m128)x);
#else
  for (int64_t i = 0; i < lanes<VF>; ++i) x[i] = std::sqrt(x[i]);
  return x;
#endif
}
inline VD max(VD a, VD b) { return a > b ? a : b; }
inline VD min(VD a, VD b) { return a < b ? a : b; }

inline VF abs(VF x) { return (VF)((VU)x & 0x7fffffffu); }
inline VF copysign(VF magnitude, VF sign) {
  return (VF)(((VU)magnitude & 0x7fffffffu) | ((VU)sign & 0x80000000u));
}

inline VF round(VF x) {
#if FASTLM_ISA_LEVEL >= 2
  return (VF)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif FASTLM_ISA_LEVEL == 1
  return (VF)_mm256_round_ps((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it leaves the integer part, for |x| < 2^22
  return (x + magic) - magic;
#endif
}

// Lanes added pairwise, so the order is fixed and the error small.
template <class V>
inline lane_t<V> reduce_add(V v) {
#if FASTLM_ISA_LEVEL >= 2
  if constexpr (std::is_same_v<V, VF>) return _mm512_reduce_add_ps((__m512)v);  // in this very order
#endif
  lane_t<V> a[lanes<V>];
  std::memcpy(a, &v, sizeof v);
  for (int64_t half = lanes<V> / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) a[i] += a[i + half];
  return a[0];
}
// NaN in any lane gives NaN.
template <class V>
inline lane_t<V> reduce_max(V v) {
  lane_t<V> a[lanes<V>];
  std::memcpy(a, &v, sizeof v);
  lane_t<V> m = a[0];
  for (int64_t i = 1; i < lanes<V>; ++i) m = (a[i] > m || a[i] != a[i]) ? a[i] : m;
  return m;
}

// ---- memory: any storage type to and from the compute vector, whole or the first n lanes --------------------

inline float to_float(bf16_t h) {
  uint32_t u = (uint32_t)h.bits << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline float to_float(f16_t h) {
#if FASTLM_ISA_LEVEL >= 1
  return _cvtsh_ss(h.bits);
#else
  const uint32_t sign = (uint32_t)(h.bits & 0x8000u) << 16, rest = h.bits & 0x7fffu;
  uint32_t u = sign | ((rest << 13) + 0x38000000u);                // normal: rebias the exponent by 112
  float f;
  if (rest >= 0x7c00u) u = sign | 0x7f800000u | (rest << 13);      // inf, NaN
  std::memcpy(&f, &u, 4);
  if (rest < 0x0400u) {                                            // zero, denormal: exact in fp32
    f = (float)rest * 5.9604644775390625e-8f;
    if (sign) f = -f;
  }
  return f;
#endif
}
inline float to_float(float f) { return f; }
inline double to_float(double f) { return f; }

inline void from_float(float f, bf16_t* out) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  out->bits = f != f ? (uint16_t)((u >> 16) | 0x40u) : (uint16_t)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
inline void from_float(float f, f16_t* out) {
#if FASTLM_ISA_LEVEL >= 1
  out->bits = (uint16_t)_cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT);
#else
  uint32_t u;
  std::memcpy(&u, &f, 4);
  const uint16_t sign = (uint16_t)((u >> 16) & 0x8000u);
  u &= 0x7fffffffu;
  uint16_t h;
  if (u > 0x7f800000u) {
    h = 0x7e00u;
  } else if (u >= 0x477ff000u) {  // 65520 and above round to infinity
    h = 0x7c00u;
  } else if (u < 0x38800000u) {   // below 2^-14: adding 0.5 rounds to a multiple of 2^-24 in the low bits
    float a;
    std::memcpy(&a, &u, 4);
    a += 0.5f;
    uint32_t b;
    std::memcpy(&b, &a, 4);
    h = (uint16_t)(b - 0x3f000000u);
  } else {
    h = (uint16_t)((u - 0x38000000u + 0xfffu + ((u >> 13) & 1u)) >> 13);
  }
  out->bits = sign | h;
#endif
}
inline void from_float(float f, float* out) { *out = f; }
inline void from_float(double f, double* out) { *out = f; }

template <class V>
inline V load(const float* p) {
  VF v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class V>
inline V load(const double* p) {
  VD v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class V>
inline V load(const bf16_t* p) {
#if FASTLM_ISA_LEVEL >= 2  // GCC 12 widens halves and joins them, in five instructions
  return (VF)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif FASTLM_ISA_LEVEL == 0 && FASTLM_X86  // and here in seven
  return (VF)_mm_unpacklo_epi16(_mm_setzero_si128(), _mm_loadl_epi64((const __m128i*)p));
#else
  VH h;
  std::memcpy(&h, p, sizeof h);
  return (VF)(__builtin_convertvector(h, VU) << 16);
#endif
}
template <class V>
inline V load(const f16_t* p) {
#if FASTLM_ISA_LEVEL >= 2
  return (VF)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif FASTLM_ISA_LEVEL == 1
  return (VF)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  VF v{};
  for (int64_t i = 0; i < lanes<VF>; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}

inline void store(float* p, VF v) { std::memcpy(p, &v, sizeof v); }
inline void store(double* p, VD v) { std::memcpy(p, &v, sizeof v); }
#if FASTLM_ISA_LEVEL == 0 && FASTLM_X86
// bf16's bits, extended with their sign, since SSE2 packs signed words alone; a NaN has all of them set.
inline __m128i bf16_words(VF v) {
  const VU u = (VU)v;
  return (__m128i)(((VI)(u + 0x7fffu + ((u >> 16) & 1u)) >> 16) | (v != v));
}
inline void store(bf16_t* p, VF v) {  // in 9 instructions; GCC 12 would take 20
  const __m128i words = bf16_words(v);
  _mm_storel_epi64((__m128i*)p, _mm_packs_epi32(words, words));
}
#else
inline void store(bf16_t* p, VF v) {
  const VU u = (VU)v;
  const VU even = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const VU kept = v != v ? (u >> 16) | 0x40u : even;
  const VH h = __builtin_convertvector(kept, VH);
  std::memcpy(p, &h, sizeof h);
}
#endif
inline void store(f16_t* p, VF v) {
#if FASTLM_ISA_LEVEL >= 2
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif FASTLM_ISA_LEVEL == 1
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  for (int64_t i = 0; i < lanes<VF>; ++i) from_float(v[i], p + i);
#endif
}

#if FASTLM_ISA_LEVEL >= 2
// The mask of the first n of 16 lanes, for any n.
inline __mmask16 first16(int64_t n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (__mmask16)((1u << n) - 1); }
#endif

// The first n lanes (0 < n < lanes); the others read as `fill`. Reads nothing beyond them.
template <class V, class T>
inline V load_n(const T* p, int64_t n, lane_t<V> fill = 0) {
#if FASTLM_ISA_LEVEL >= 2
  if constexpr (std::is_same_v<T, float>) {
    return (VF)_mm512_mask_loadu_ps((__m512)set1<VF>(fill), (__mmask16)((1u << n) - 1), p);
  } else if constexpr (std::is_same_v<T, bf16_t>) {
    const __mmask16 m = (__mmask16)((1u << n) - 1);
    const __m512i u = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, p)), 16);
    return (VF)_mm512_mask_mov_ps((__m512)set1<VF>(fill), m, _mm512_castsi512_ps(u));
  }
#endif
  lane_t<V> a[lanes<V>];
  for (int64_t i = 0; i < lanes<V>; ++i) a[i] = i < n ? to_float(p[i]) : fill;
  V v;
  std::memcpy(&v, a, sizeof v);
  return v;
}
template <class V, class T>
inline void store_n(T* p, V v, int64_t n) {
#if FASTLM_ISA_LEVEL >= 2
  if constexpr (std::is_same_v<T, float>) {
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
    return;
  }
#endif
  T a[lanes<V>];
  store(a, v);
  for (int64_t i = 0; i < n; ++i) p[i] = a[i];
}

// Calls body(column, n) over [0, N): n == lanes for whole vectors, fewer for the tail.
template <class V, class F>
inline __attribute__((always_inline)) void for_lanes(int64_t N, F&& body) {
  int64_t j = 0;
  for (; j + lanes<V> <= N; j += lanes<V>) body(j, std::integral_constant<int64_t, lanes<V>>{});
  if (j < N) body(j, N - j);
}
template <class V, class T>
inline V load(const T* p, std::integral_constant<int64_t, lanes<V>>, lane_t<V> = 0) {
  return load<V>(p);
}
template <class V, class T>
inline V load(const T* p, int64_t n, lane_t<V> fill = 0) {
  return load_n<V>(p, n, fill);
}
template <class V, class T>
inline void store(T* p, V v, std::integral_constant<int64_t, lanes<V>>) {
  store(p, v);
}
template <class V, class T>
inline void store(T* p, V v, int64_t n) {
  store_n(p, v, n);
}

// Past the caches: a large output that no one reads soon need not be fetched before it is overwritten. `p` is aligned
// to the whole vector's bytes in memory, as `streams` has found out.
inline void stream(float* p, VF v) {
#if FASTLM_ISA_LEVEL >= 2
  _mm512_stream_ps(p, (__m512)v);
#elif FASTLM_ISA_LEVEL == 1
  _mm256_stream_ps(p, (__m256)v);
#elif FASTLM_X86
  _mm_stream_ps(p, (__m128)v);
#else
  store(p, v);
#endif
}
inline void stream(double* p, VD v) { store(p, v); }
template <class T>
inline void stream(T* p, VF v) {
#if FASTLM_ISA_LEVEL >= 2
  T a[lanes<VF>];
  store(a, v);
  __m256i bits;
  std::memcpy(&bits, a, sizeof bits);
  _mm256_stream_si256((__m256i*)p, bits);
#else
  store(p, v);
#endif
}
template <bool STREAM, class V, class T>
inline void store_or_stream(T* p, V v, std::integral_constant<int64_t, lanes<V>>) {
  if constexpr (STREAM)
    stream(p, v);
  else
    store(p, v);
}
template <bool STREAM, class V, class T>
inline void store_or_stream(T* p, V v, int64_t n) {
  store_n(p, v, n);
}
// Two vectors side by side; past the caches to an address aligned to the size of both.
template <bool STREAM, class T, class V>
inline void put_two(T* p, V a, V b) {
  constexpr std::integral_constant<int64_t, lanes<V>> whole;
  store_or_stream<STREAM>(p, a, whole);
  store_or_stream<STREAM>(p + lanes<V>, b, whole);
}
#if FASTLM_ISA_LEVEL == 3
// In one instruction instead of sixteen; denormals become 0.
template <bool STREAM>
inline void put_two(bf16_t* p, VF a, VF b) {
  const __m512i bits = (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
  if constexpr (STREAM)
    _mm512_stream_si512((__m512i*)p, bits);
  else
    _mm512_storeu_si512(p, bits);
}
#elif FASTLM_ISA_LEVEL == 0 && FASTLM_X86
template <bool STREAM>
inline void put_two(bf16_t* p, VF a, VF b) {
  const __m128i bits = _mm_packs_epi32(bf16_words(a), bf16_words(b));
  if constexpr (STREAM)
    _mm_stream_si128((__m128i*)p, bits);
  else
    _mm_storeu_si128((__m128i*)p, bits);
}
#endif
// After stores past the caches, before others may read them.
inline void fence() {
#if FASTLM_X86
  _mm_sfence();
#endif
}
// Whether an output of M rows of N, aligned, belongs to a call that reads and writes more than the caches hold: with
// itself `arrays` as large. What such a call writes first would leave them before anyone read it.
template <class T>
inline bool streams(const T* p, int64_t M, int64_t N, int64_t arrays) {
  const int64_t row = N * (int64_t)sizeof(T);
  return arrays * M * row >= last_cache() && (uintptr_t)p % 64 == 0 && row % 64 == 0;
}

// ---- transcendental functions ------------------------------------------------------------------------------
// Polynomials fitted for this file: Lawson-weighted least squares toward the minimax relative error, whose value
// is given beside each.

// 2^n for integral n in [-252, 254], in two factors so that denormals come out right.
inline VF scale_by_power_of_two(VF x, VF n) {
#if FASTLM_ISA_LEVEL >= 2
  return (VF)_mm512_scalef_ps((__m512)x, (__m512)n);
#else
  const VI k = __builtin_convertvector(n, VI);
  const VI a = k >> 1, b = k - a;
  return x * (VF)((a + 127) << 23) * (VF)((b + 127) << 23);
#endif
}

// A division of 16 floats takes 16 cycles or more, this 4: an estimate of 14 bits and one step of Newton's method.
// Narrower vectors divide fast enough.
inline VF reciprocal(VF x) {
#if FASTLM_ISA_LEVEL >= 2
  const VF y = (VF)_mm512_rcp14_ps((__m512)x);
  return fma(y, fma(-x, y, set1<VF>(1.0f)), y);
#else
  return 1.0f / x;
#endif
}
inline VD reciprocal(VD x) { return 1.0 / x; }

// e^x = 2^n e^r with n = round(x log2 e) and |r| <= ln 2 / 2; e^r = 1 + r + r^2 P(r), P to 3.3e-9.
inline VF exp(VF x) {
  x = min(set1<VF>(89.0f), max(set1<VF>(-105.0f), x));
  const VF n = round(x * 1.44269504f);
  VF r = fma(n, set1<VF>(-0.693359375f), x);  // ln 2 in two parts; the first product is exact
  r = fma(n, set1<VF>(2.12194440e-4f), r);
  VF p = fma(r, set1<VF>(1.381314273e-3f), set1<VF>(8.369418972e-3f));
  p = fma(p, r, set1<VF>(4.166845682e-2f));
  p = fma(p, r, set1<VF>(1.666651479e-1f));
  p = fma(p, r, set1<VF>(4.999999305e-1f));
  p = fma(p, r * r, r) + 1.0f;
  return scale_by_power_of_two(p, n);
}

// tanh x = x + x^3 Q(x^2) below 0.625 (Q to 4.4e-9), and 1 - 2 / (e^2|x| + 1) with x's sign above.
inline VF tanh(VF x) {
  const VF u = x * x;
  VF q = fma(u, set1<VF>(-5.704978374e-3f), set1<VF>(2.063907874e-2f));
  q = fma(q, u, set1<VF>(-5.373971216e-2f));
  q = fma(q, u, set1<VF>(1.333144216e-1f));
  q = fma(q, u, set1<VF>(-3.333328194e-1f));
  const VF small = fma(q * u, x, x);
  const VF a = abs(x);
  const VF large = copysign(1.0f - 2.0f / (exp(a + a) + 1.0f), x);
  return a < 0.625f ? small : (x != x ? x : large);
}

// x * x - square, exactly: by the fused product, or by Dekker's split of x into halves where there is none.
inline VF square_error(VF x, VF square) {
#if FASTLM_ISA_LEVEL >= 1
  return fma(x, x, -square);
#else
  const VF high = (VF)((VU)x & 0xfffff000u), low = x - high;
  return ((high * high - square) + 2.0f * high * low) + low * low;
#endif
}

// erfc x = e^(-x^2) t S(t) for x >= 0, with t = 1 / (1 + 0.35 x) and S to 7.2e-9. `gauss` receives e^(-x^2).
// The rounding error of x^2 is carried along, or it alone would cost x^2 ULP.
inline VF erfc_positive(VF x, VF* gauss) {
  const VF square = x * x;
  const VF rest = square_error(x, square);
  const VF e = exp(-square);
  *gauss = fma(-rest, e, e);
  const VF t = reciprocal(fma(x, set1<VF>(0.35f), set1<VF>(1.0f)));
  VF s = fma(t, set1<VF>(3.854594753e-2f), set1<VF>(-1.597394754e-1f));
  s = fma(s, t, set1<VF>(1.834336031e-1f));
  s = fma(s, t, set1<VF>(-3.043471073e-2f));
  s = fma(s, t, set1<VF>(8.938261805e-2f));
  s = fma(s, t, set1<VF>(1.447152936e-1f));
  s = fma(s, t, set1<VF>(1.516680224e-1f));
  s = fma(s, t, set1<VF>(1.877934294e-1f));
  s = fma(s, t, set1<VF>(1.971522634e-1f));
  s = fma(s, t, set1<VF>(1.974830158e-1f));
  return *gauss * t * s;
}

// erf x = x E(x^2) below 0.75 (E to 1.4e-9), 1 - erfc |x| with x's sign above.
inline VF erf(VF x) {
  const VF u = x * x;
  VF p = fma(u, set1<VF>(-6.749512541e-4f), set1<VF>(5.114345450e-3f));
  p = fma(p, u, set1<VF>(-2.683462452e-2f));
  p = fma(p, u, set1<VF>(1.128337657e-1f));
  p = fma(p, u, set1<VF>(-3.761261876e-1f));
  p = fma(p, u, set1<VF>(1.128379165e+0f));
  const VF a = abs(x);
  VF gauss;
  const VF large = copysign(1.0f - erfc_positive(min(set1<VF>(11.0f), a), &gauss), x);
  return a < 0.75f ? p * x : (x != x ? x : large);
}

// fp64 is for proofs, not for speed: the C library, lane by lane.
#define FASTLM_LANEWISE(name)                                                 \
  inline VD name(VD x) {                                                      \
    for (int64_t i = 0; i < lanes<VD>; ++i) x[i] = std::name(x[i]);           \
    return x;                                                                 \
  }
FASTLM_LANEWISE(exp)
FASTLM_LANEWISE(tanh)
FASTLM_LANEWISE(erf)
FASTLM_LANEWISE(erfc)
#undef FASTLM_LANEWISE
inline VD erfc_positive(VD x, VD* gauss) {
  *gauss = exp(-x * x);
  return erfc(x);
}
inline VD abs(VD x) { return x < 0.0 ? -x : x; }

// One butterfly step of a transpose: swaps the off-diagonal squares of side kStep between rows a and b.
template <int kStep, class V, size_t... kLane>
inline void exchange(V& a, V& b, std::index_sequence<kLane...>) {
  constexpr size_t L = sizeof...(kLane);
  const V low = __builtin_shufflevector(a, b, (kLane & kStep ? L + kLane - kStep : kLane)...);
  b = __builtin_shufflevector(a, b, (kLane & kStep ? L + kLane : kLane + kStep)...);
  a = low;
}
// In place, of as many vectors as lanes; kStep is half of them.
template <int kStep, class V>
inline void transpose(V* rows) {
  constexpr int64_t L = lanes<V>;
  for (int i = 0; i < L; ++i)
    if (!(i & kStep)) exchange<kStep>(rows[i], rows[i + kStep], std::make_index_sequence<(size_t)L>{});
  if constexpr (kStep > 1) transpose<kStep / 2>(rows);
}

}  // namespace fastlm::FASTLM_ISA
