// Products for a few query rows (decoding), for inclusion inside a pass of foreach_isa.h: no include guard.
//
// With few rows a tile of keys is used once, so packing it would cost more than the products: keys and values are read
// where they are, one pass over each, which leaves memory as the limit.

namespace fastlm::FASTLM_ISA::attention {

// Keys that memory is asked for in advance.
constexpr int64_t kAheadKeys = 16;

template <class T>
inline void prefetch(const T* p, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / (int64_t)sizeof(T)) __builtin_prefetch(p + i);
}

template <class V, class T>
inline V load_part(const T* p, int64_t n) {
  return n >= lanes<V> ? load<V>(p) : load_n<V>(p, n);
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
      V s[R]{};
      for (int64_t d = 0; d < D; d += L) {
        const V x = load_part<V>(key + d, D - d);
        for (int r = 0; r < R; ++r) s[r] = fma(load<V>(q + r * Dp + d), x, s[r]);
      }
      for (int r = 0; r < R; ++r) sum[r][i] = s[r];
    }
    for (int r = 0; r < R; ++r) {
      add_rows<L / 2>(sum[r]);
      store(p + r * kKeys + j, sum[r][0]);
    }
  }
}

// out (R, Dvp) = factor * out + p (R, kKeys) times n values; a weight of 0 adds nothing, not even times NaN.
template <int R, class V, class T>
void add_values(const lane_t<V>* p, const T* values, int64_t stride, int64_t n, int64_t Dv, lane_t<V>* out, int64_t Dvp,
                const lane_t<V>* factor) {
  constexpr int64_t L = lanes<V>, kPart = 4;  // vectors of a value at a time
  for (int64_t first = 0; first < Dv; first += kPart * L) {
    V sum[R][kPart];
    for (int r = 0; r < R; ++r)
      for (int64_t c = 0; c < kPart; ++c)
        sum[r][c] = first + c * L < Dv ? load<V>(out + r * Dvp + first + c * L) * factor[r] : V{};
    for (int64_t j = 0; j < n; ++j) {
      const T* value = values + j * stride + first;
      prefetch(value + kAheadKeys * stride, std::min(Dv - first, kPart * L));
      V x[kPart];
      for (int64_t c = 0; c < kPart; ++c) {
        const int64_t left = Dv - first - c * L;
        x[c] = left > 0 ? load_part<V>(value + c * L, left) : V{};
      }
      for (int r = 0; r < R; ++r) {
        if (p[r * kKeys + j] == 0) continue;
        const V weight = set1<V>(p[r * kKeys + j]);
        for (int64_t c = 0; c < kPart; ++c) sum[r][c] = fma(weight, x[c], sum[r][c]);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int64_t c = 0; c < kPart; ++c)
        if (first + c * L < Dv) store(out + r * Dvp + first + c * L, sum[r][c]);
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
