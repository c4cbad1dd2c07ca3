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

// Exponentials of d, a difference from a maximum: fp64's.
template <class V>
struct Exponential {
  V add(V sum, V d) const { return sum + exp(d); }  // sum + e^d
  V times(V factor, V d) const { return factor * exp(d); }
};

#if FASTLM_ISA_LEVEL >= 2
// e^d = 2^n e^r with n = d log2 e in whole 32nds and |r| <= ln 2 / 64: 2^(n's fraction) from the table and
// 1 + r + (1 + 1.5e-5) r^2 / 2 .. to 5.3e-8, in 10 instructions with the sum instead of 17. Below 2 ULP, 0 below -105.
template <>
struct Exponential<VF> {
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
#else
// As exp in vec.h, but 0 below e^-87, so that adding n to the exponent's bits multiplies by 2^n; with e^r to 1.1e-7;
// and without fused products n ln 2 is off by |d| 6e-8, as d itself may be. 20 instructions instead of 37.
template <>
struct Exponential<VF> {
  inline __attribute__((always_inline)) VF of(VF d) const {
    const VF magic = set1<VF>(12582912.0f);  // 1.5 * 2^23: adding it leaves an integer, in the lowest bits
    const VF shifted = fma(d, set1<VF>(1.44269504f), magic), n = shifted - magic;
    const VF r = fma(n, set1<VF>(-0.693147181f), d);
    VF p = fma(r, set1<VF>(8.312507754e-3f), set1<VF>(4.189015028e-2f));
    p = fma(p, r, set1<VF>(1.666711474e-1f));
    p = fma(p, r, set1<VF>(4.999923154e-1f));
    p = fma(fma(p, r, set1<VF>(1.0f)), r, set1<VF>(1.0f));
    const VI power = (VI)p + ((VI)shifted << 23);
    return (VF)(power & ~(d < -87.0f));
  }
  inline __attribute__((always_inline)) VF add(VF sum, VF d) const { return sum + of(d); }
  inline __attribute__((always_inline)) VF times(VF factor, VF d) const { return factor * of(d); }
};
#endif

template <class V, class T>
inline void load_two(const T* p, V* a, V* b) {  // in any order
  *a = load<V>(p);
  *b = load<V>(p + lanes<V>);
}
inline void load_two(const bf16_t* p, VF* a, VF* b) {
  VU pairs;
  std::memcpy(&pairs, p, sizeof pairs);
  *a = (VF)(pairs << 16);
  *b = (VF)(pairs & 0xffff0000u);
}

typedef int16_t VW __attribute__((vector_size(FASTLM_VEC_BYTES)));
inline VW load_words(const bf16_t* p) {
  VW words;
  std::memcpy(&words, p, sizeof words);
  return words;
}

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
  const Exponential<V> exponential{};

  S maximum(int64_t k) const {
    if constexpr (std::is_same_v<T, bf16_t>) return maximum_of_bits(k);
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

  // The bits of bf16 are ordered as signed integers where one is positive, and backwards where all are negative: with
  // AVX-512 64 values in 4 instructions instead of 16.
  S maximum_of_bits(int64_t k) const {
    constexpr int64_t W = 2 * L;
    const VW lowest = VW{} + (int16_t)0xff80;  // -inf
    VW a = lowest, b = lowest, c = lowest, d = lowest;
    int64_t j = 0;
    for (; j + 2 * W <= k; j += 2 * W) {
      const VW first = load_words(x + j), second = load_words(x + j + W);
      a = first > a ? first : a, b = first < b ? first : b;
      c = second > c ? second : c, d = second < d ? second : d;
    }
    for (; j + W <= k; j += W) {
      const VW last = load_words(x + j);
      a = last > a ? last : a, b = last < b ? last : b;
    }
    a = c > a ? c : a, b = d < b ? d : b;
    int16_t most = a[0], least = b[0];
    for (int64_t i = 1; i < W; ++i) most = std::max(most, (int16_t)a[i]), least = std::min(least, (int16_t)b[i]);
    for (; j < k; ++j) most = std::max(most, (int16_t)x[j].bits), least = std::min(least, (int16_t)x[j].bits);
    return to_float(bf16_t{(uint16_t)(most >= 0 ? most : least)});
  }

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
