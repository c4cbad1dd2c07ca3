// A block of a row of logits: its maximum and its sum of exponentials; for inclusion inside a pass of foreach_isa.h:
// no include guard.

namespace fastlm::FASTLM_ISA::cross_entropy {

using namespace ::fastlm::cross_entropy;

// A running row: maximum, sum of exp(x - maximum) without the true class, sum of w (x - maximum), sum of w, x_y.
template <class S>
struct State {
  S m, others, smooth, weight, x_y;
};

// A finished row, all that the gradient needs: maximum, 1 / s, 1 - p_y.
template <class S>
struct Stats {
  S m, inv_s, q;
};

// Fetches as many lines as N elements take, `ahead` bytes beyond element `at` of a row or so, into the second-level
// cache. Requests of the program's own are few at a time; the hardware's prefetcher has more, but stops at the end of
// a page. So these lines lie in eight pages, through each of which it then runs. Reading 200 MB in order in pages of 4
// KiB with two threads: 27 GB/s with prefetches 1 KiB ahead, 34 with 32 KiB, 41 so.
constexpr int64_t kLine = 64, kPage = 4096, kPages = 8, kAhead = kPages * kPage;

template <int64_t N, class T>
inline __attribute__((always_inline)) void fetch(const T* row, int64_t at, int64_t ahead) {
  const int64_t byte = at * (int64_t)sizeof(T), place = byte % kAhead / kLine;
  const char* to = (const char*)row + byte / kAhead * kAhead + ahead;
  to += place / kPages * kLine + place % kPages * kPage;
  for (int64_t line = 0; line < N * (int64_t)sizeof(T) / kLine; ++line) __builtin_prefetch(to + line * kPage, 0, 2);
}

// Two vectors at p; past the caches to an address aligned to their size.
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
#endif

inline void fence() {
#if FASTLM_X86
  _mm_sfence();
#endif
}

template <class S>
inline S pivot(S m) {
  return m == -std::numeric_limits<S>::infinity() ? S(0) : m;
}

template <class S>
inline void start(State<S>* a) {
  *a = {-std::numeric_limits<S>::infinity(), 0, 0, 0, 0};
}

template <class S>
inline void fold(State<S>* a, const State<S>& b) {
  const S m = b.m > a->m ? b.m : a->m;
  const S fa = a->m == m ? S(1) : std::exp(a->m - m), fb = b.m == m ? S(1) : std::exp(b.m - m);
  a->others = a->others * fa + b.others * fb;
  a->smooth += a->weight * (pivot(a->m) - pivot(m)) + (b.smooth + b.weight * (pivot(b.m) - pivot(m)));
  a->weight += b.weight;
  a->m = m;
}

// Exponentials of d, a difference from a maximum.
template <bool SHORT, class V>
struct Exponential {
  V add(V sum, V d) const { return sum + exp(d); }  // sum + e^d
  V times(V factor, V d) const {                    // factor e^d
    if constexpr (SHORT)
      return factor * exp_16(d);
    else
      return factor * exp(d);
  }
};

#if FASTLM_ISA_LEVEL >= 2
// e^d = 2^n e^r with n = d log2 e in whole 32nds and |r| <= ln 2 / 64: 2^(n's fraction) from the table and
// 1 + r + (1 + 1.5e-5) r^2 / 2 .. to 5.3e-8, in 10 instructions with the sum instead of 17. Below 2 ULP, 0 below -105.
template <bool SHORT>
struct Exponential<SHORT, VF> {
  VF low = load<VF>(kPowers.at), high = load<VF>(kPowers.at + 16);

  // *power = 2^n, *r = the rest.
  inline __attribute__((always_inline)) void split(VF d, VF* power, VF* r) const {
    const VF magic = set1<VF>(393216.0f);  // 1.5 * 2^18: adding it leaves whole 32nds
    d = max(set1<VF>(-105.0f), d);
    const VF shifted = fma(d, set1<VF>(1.44269504f), magic), n = shifted - magic;
    *r = fma(n, set1<VF>(-0.693147181f), d);
    const __m512 root = _mm512_permutex2var_ps((__m512)low, (__m512i)shifted, (__m512)high);
    *power = (VF)_mm512_scalef_ps(root, (__m512)n);  // which takes the floor of n
  }
  inline __attribute__((always_inline)) VF add(VF sum, VF d) const {
    VF power, r;
    split(d, &power, &r);
    return fma(power, fma(fma(r, set1<VF>(kSecond), set1<VF>(kFirst)), r, set1<VF>(1.0f)), sum);
  }
  inline __attribute__((always_inline)) VF times(VF factor, VF d) const {
    VF power, r;
    split(d, &power, &r);
    const VF slope = fma(r, factor * kSecond, factor * kFirst);
    return power * fma(slope, r, factor);
  }

 private:
  static constexpr float kFirst = 1.00001466f, kSecond = 0.5f;
};
#endif

template <class V, class T>
inline void load_two(const T* p, V* a, V* b) {  // in any order
  *a = load<V>(p);
  *b = load<V>(p + lanes<V>);
}
#if FASTLM_ISA_LEVEL >= 2
inline void load_two(const bf16_t* p, VF* a, VF* b) {
  const __m512i pairs = _mm512_loadu_si512(p);
  *a = (VF)_mm512_slli_epi32(pairs, 16);
  *b = (VF)_mm512_and_si512(pairs, _mm512_set1_epi32((int)0xffff0000));
}
#endif

// One block of k columns; y in [0, k) is the true class, or -1 where it is elsewhere.
template <class T, bool kSmooth>
struct Block {
  using V = vec_of<T>;
  using S = scalar_of<T>;
  static constexpr int64_t L = lanes<V>;
  const T* x;
  const S* w;
  int64_t from;
  S m;
  V sum, smooth;
  const Exponential<false, V> exponential{};

  S maximum(int64_t k) const {
#if FASTLM_ISA_LEVEL >= 2
    if constexpr (std::is_same_v<T, bf16_t>) return maximum_of_bits(k);
#endif
    const V low = set1<V>(-1) / 0.0f;
    V a = low, b = low, c = low, d = low;
    int64_t j = 0;
    for (; j + 4 * L <= k; j += 4 * L) {
      a = max(a, load<V>(x + j));
      b = max(b, load<V>(x + j + L));
      c = max(c, load<V>(x + j + 2 * L));
      d = max(d, load<V>(x + j + 3 * L));
    }
    for (; j + L <= k; j += L) a = max(a, load<V>(x + j));
    if (j < k) b = max(b, load_n<V>(x + j, k - j, -std::numeric_limits<S>::infinity()));
    return reduce_max(max(max(a, b), max(c, d)));
  }

#if FASTLM_ISA_LEVEL >= 2
  // The bits of bf16 are ordered as signed integers where one is positive, and as unsigned ones, backwards, where all
  // are negative: 64 values in 4 instructions instead of 16.
  S maximum_of_bits(int64_t k) const {
    const __m512i lowest = _mm512_set1_epi16((int16_t)0xff80);  // -inf
    __m512i a = lowest, b = lowest, c = lowest, d = lowest;
    int64_t j = 0;
    for (; j + 64 <= k; j += 64) {
      const __m512i first = _mm512_loadu_si512(x + j), second = _mm512_loadu_si512(x + j + 32);
      a = _mm512_max_epi16(a, first), b = _mm512_min_epu16(b, first);
      c = _mm512_max_epi16(c, second), d = _mm512_min_epu16(d, second);
    }
    for (; j < k; j += 32) {
      const __mmask32 inside = k - j >= 32 ? ~0u : (1u << (k - j)) - 1;
      const __m512i last = _mm512_mask_loadu_epi16(lowest, inside, x + j);
      a = _mm512_max_epi16(a, last), b = _mm512_min_epu16(b, last);
    }
    alignas(64) int16_t signs[32];
    alignas(64) uint16_t bits[32];
    _mm512_store_si512(signs, _mm512_max_epi16(a, c));
    _mm512_store_si512(bits, _mm512_min_epu16(b, d));
    int16_t most = signs[0];
    uint16_t least = bits[0];
    for (int i = 1; i < 32; ++i) most = std::max(most, signs[i]), least = std::min(least, bits[i]);
    return to_float(bf16_t{most >= 0 ? (uint16_t)most : least});
  }
#endif

  // sum + exp(x - m), and x - m's part of the smoothing sum into *t.
  template <class Count>
  inline __attribute__((always_inline)) V add(V to, int64_t j, Count n, V* t) const {
    const V d = load<V>(x + j, n, -std::numeric_limits<S>::infinity()) - m;
    if constexpr (kSmooth && !std::is_same_v<Count, int64_t>) *t += w ? load<V>(w + j, n) * d : d;
    if constexpr (kSmooth && std::is_same_v<Count, int64_t>) {  // lanes beyond the row would be 0 times -inf
      S a[L];
      store(a, d);
      for (int64_t i = 0; i < n; ++i) (*t)[i] += w ? w[j + i] * a[i] : a[i];
    }
    return exponential.add(to, d);
  }

  inline __attribute__((always_inline)) void add_two(V* a, V* b, int64_t j, V* ta, V* tb) const {
    constexpr std::integral_constant<int64_t, L> whole;
    if constexpr (kSmooth) {
      *a = add(*a, j, whole, ta);
      *b = add(*b, j + L, whole, tb);
    } else {
      V low, high;
      load_two(x + j, &low, &high);
      *a = exponential.add(*a, low - m);
      *b = exponential.add(*b, high - m);
    }
  }

  inline __attribute__((always_inline)) void range(int64_t j, int64_t end) {
    constexpr std::integral_constant<int64_t, L> whole;
    V a{}, b{}, c{}, d{}, ta{}, tb{}, tc{}, td{};
    for (; j + 4 * L <= end; j += 4 * L) {
      fetch<4 * L>(x - from, from + j, kAhead);
      for (int64_t at = 0; at < 4 * L; at += kLine / (int64_t)sizeof(T)) __builtin_prefetch(x + j + kBlock + at);
      add_two(&a, &b, j, &ta, &tb);
      add_two(&c, &d, j + 2 * L, &tc, &td);
    }
    for (; j + L <= end; j += L) a = add(a, j, whole, &ta);
    if (j < end) b = add(b, j, end - j, &tb);
    sum += (a + b) + (c + d);
    if (kSmooth) smooth += (ta + tb) + (tc + td);
  }

  State<S> run(int64_t k, int64_t y) {
    State<S> out;
    out.m = maximum(k);
    m = pivot(out.m);
    sum = smooth = V{};
    S beside = 0;  // of the vector that holds y, without y
    if (y < 0) {
      range(0, k);
    } else {
      const int64_t at = y / L * L, n = std::min(L, k - at);
      range(0, at);
      S e[L];
      store(e, add(V{}, at, n, &smooth));
      for (int64_t i = 0; i < n; ++i) beside += at + i == y ? S(0) : e[i];
      range(at + n, k);
    }
    out.others = reduce_add(sum) + beside;
    out.smooth = kSmooth ? reduce_add(smooth) : S(0);
    out.weight = 0;
    if (kSmooth) {
      out.weight = S(k);
      if (w) {
        V a{};
        for_lanes<V>(k, [&](int64_t j, auto n) { a += load<V>(w + j, n); });
        out.weight = reduce_add(a);
      }
    }
    out.x_y = y < 0 ? S(0) : S(to_float(x[y]));
    return out;
  }
};

}  // namespace fastlm::FASTLM_ISA::cross_entropy
