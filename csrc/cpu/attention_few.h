// Products for a few query rows (decoding), for inclusion inside a pass of foreach_isa.h: no include guard.
//
// With few rows a tile of keys is used once, so packing it would cost more than the products: keys and values are read
// where they are, one pass over each, which leaves memory as the limit.

namespace fastlm::FASTLM_ISA::attention {

// Keys that are prefetched in advance.
constexpr int64_t kAheadKeys = 16;

template <class T>
inline void prefetch(const T* p, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / (int64_t)sizeof(T)) __builtin_prefetch(p + i);
}

// Two vectors of 2 * lanes elements, those beyond n as zeros. Of bf16 the first gets the elements at even places and the
// second the others, since a shift and a mask cost half of what widening in order does; queries and outputs are kept in
// that order too.
template <class V>
struct Two {
  V first, second;
};
template <class V, class T>
inline Two<V> load_two(const T* p) {
  if constexpr (std::is_same_v<T, bf16_t>) {
    VU u;
    std::memcpy(&u, p, sizeof u);
    return {(VF)(u << 16), (VF)(u & 0xffff0000u)};
  } else {
    return {load<V>(p), load<V>(p + lanes<V>)};
  }
}
template <class V, class T>
inline Two<V> load_two(const T* p, int64_t n) {
  if (n >= 2 * lanes<V>) return load_two<V>(p);
  T part[2 * lanes<V>] = {};
  std::memcpy((void*)part, p, (size_t)n * sizeof(T));
  return load_two<V>(part);
}

// dst (D padded to pairs of vectors) = factor * src (D), in the order of load_two.
template <class V, class T>
inline void pack_twos(const T* src, int64_t D, lane_t<V> factor, lane_t<V>* dst) {
  for (int64_t d = 0; d < D; d += 2 * lanes<V>) {
    const Two<V> x = load_two<V>(src + d, D - d);
    store(dst + d, V(x.first * factor));
    store(dst + d + lanes<V>, V(x.second * factor));
  }
}

// Back from the order of load_two, in place.
template <class V, class T>
inline void unpack_twos(lane_t<V>* x, int64_t D) {
  if constexpr (std::is_same_v<T, bf16_t>) {
    constexpr int64_t L = lanes<V>;
    for (int64_t d = 0; d < D; d += 2 * L) {
      float part[2 * L];
      for (int64_t i = 0; i < L; ++i) part[2 * i] = x[d + i], part[2 * i + 1] = x[d + L + i];
      std::memcpy(x + d, part, sizeof part);
    }
  }
}

// p (R, kKeys) = q (R, Dp) times n keys.
template <int R, class V, class T>
void scores_of(const lane_t<V>* q, int64_t Dp, const T* keys, int64_t stride, int64_t n, int64_t D, lane_t<V>* p) {
  constexpr int64_t L = lanes<V>;
  for (int64_t j = 0; j < n; j += L) {
    V sum[R][L];
    for (int64_t i = 0; i < L; ++i) {
      const T* key = keys + std::min(j + i, n - 1) * stride;
      prefetch(key + kAheadKeys * stride, D);
      V s[R]{}, t[R]{};
      for (int64_t d = 0; d < D; d += 2 * L) {
        const Two<V> x = load_two<V>(key + d, D - d);
        for (int r = 0; r < R; ++r) s[r] = fma(load<V>(q + r * Dp + d), x.first, s[r]);
        for (int r = 0; r < R; ++r) t[r] = fma(load<V>(q + r * Dp + d + L), x.second, t[r]);
      }
      for (int r = 0; r < R; ++r) sum[r][i] = s[r] + t[r];
    }
    for (int r = 0; r < R; ++r) {
      add_rows<L / 2>(sum[r]);
      store(p + r * kKeys + j, sum[r][0]);
    }
  }
}

// out (R, Dvp) = factor * out + p (R, kKeys) times n values; a weight of 0 adds nothing, not even times NaN. Every other
// value goes to a second sum, or one row alone would wait for each addition to finish.
template <int R, class V, class T>
void add_values(const lane_t<V>* p, const T* values, int64_t stride, int64_t n, int64_t Dv, lane_t<V>* out, int64_t Dvp,
                const lane_t<V>* factor) {
  constexpr int64_t L = lanes<V>, kPart = 2, kSums = R == 1 ? 2 : 1;  // pairs of vectors of a value at a time
  for (int64_t first = 0; first < Dv; first += 2 * kPart * L) {
    const int64_t parts = std::min(kPart, ceil_div(Dv - first, 2 * L));
    V sum[kSums][R][2 * kPart] = {};
    for (int r = 0; r < R; ++r)  // bounds known to the compiler, or the sums would not stay in registers
      for (int64_t c = 0; c < 2 * kPart; ++c)
        if (c < 2 * parts) sum[0][r][c] = load<V>(out + r * Dvp + first + c * L) * factor[r];
    for (int64_t j = 0; j < n; j += kSums)
      for (int64_t k = 0; k < kSums; ++k) {
        const T* value = values + std::min(j + k, n - 1) * stride + first;
        prefetch(value + kAheadKeys * stride, std::min(Dv - first, 2 * kPart * L));
        Two<V> x[kPart] = {};
        for (int64_t c = 0; c < kPart; ++c)
          if (c < parts) x[c] = load_two<V>(value + 2 * c * L, Dv - first - 2 * c * L);
        for (int r = 0; r < R; ++r) {
          if (j + k >= n || p[r * kKeys + j + k] == 0) continue;
          const V weight = set1<V>(p[r * kKeys + j + k]);
          for (int64_t c = 0; c < kPart; ++c) {
            sum[k][r][2 * c] = fma(weight, x[c].first, sum[k][r][2 * c]);
            sum[k][r][2 * c + 1] = fma(weight, x[c].second, sum[k][r][2 * c + 1]);
          }
        }
      }
    for (int r = 0; r < R; ++r)
      for (int64_t c = 0; c < 2 * kPart; ++c) {
        V total = sum[0][r][c];
        if constexpr (kSums == 2) total += sum[1][r][c];
        if (c < 2 * parts) store(out + r * Dvp + first + c * L, total);
      }
  }
}

template <class V, class T>
void scores_of_few(int64_t rows, const lane_t<V>* q, int64_t Dp, const T* keys, int64_t stride, int64_t n, int64_t D,
                   lane_t<V>* p) {
  switch (rows) {
    case 1: return scores_of<1, V>(q, Dp, keys, stride, n, D, p);
    case 2: return scores_of<2, V>(q, Dp, keys, stride, n, D, p);
    case 3: return scores_of<3, V>(q, Dp, keys, stride, n, D, p);
    default: return scores_of<4, V>(q, Dp, keys, stride, n, D, p);
  }
}

template <class V, class T>
void add_values_of_few(int64_t rows, const lane_t<V>* p, const T* values, int64_t stride, int64_t n, int64_t Dv,
                       lane_t<V>* out, int64_t Dvp, const lane_t<V>* factor) {
  switch (rows) {
    case 1: return add_values<1, V>(p, values, stride, n, Dv, out, Dvp, factor);
    case 2: return add_values<2, V>(p, values, stride, n, Dv, out, Dvp, factor);
    case 3: return add_values<3, V>(p, values, stride, n, Dv, out, Dvp, factor);
    default: return add_values<4, V>(p, values, stride, n, Dv, out, Dvp, factor);
  }
}

}  // namespace fastlm::FASTLM_ISA::attention
