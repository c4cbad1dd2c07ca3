// Attention's building blocks, for inclusion inside a pass of foreach_isa.h: no include guard.
//
// Tiles live in scratch memory in the compute type, rows padded with zeros to whole vectors ("Dp" is D padded).
// A tile of keys has kKeys of them; its scores are an (n, kKeys) array with that row stride.

namespace fastlm::FASTLM_ISA::attention {

constexpr int64_t kKeys = 64;

// The register block of the matrix products: kRows x kVecs accumulators, and one vector for each of the operands.
#if FASTLM_ISA_LEVEL >= 2
constexpr int kRows = 6, kVecs = 4;
#elif FASTLM_ISA_LEVEL == 1
constexpr int kRows = 6, kVecs = 2;
#else
constexpr int kRows = 4, kVecs = 2;
#endif

template <class V>
inline int64_t padded(int64_t n) {
  return ceil_div(n, lanes<V>) * lanes<V>;
}

template <class S>
constexpr S minus_infinity = -std::numeric_limits<S>::infinity();
template <class S>
constexpr S log2e = S(1.4426950408889634);

// ---- matrix products -------------------------------------------------------------------------------------------

enum class Start { zero, add, scale };

// C (R x N*lanes) = start + A (R x K) B (K x N*lanes). Element (r, k) of A is A[r * ar + k] or, transposed, A[k * ar + r].
// The start is known to the compiler, or it would keep the sums in memory until the first product: a tenth of a block.
template <int R, int N, bool kTransposed, Start kStart, class V>
inline void block(const lane_t<V>* A, int64_t ar, const lane_t<V>* B, int64_t br, lane_t<V>* C, int64_t cr, int64_t K,
                  const lane_t<V>* factor) {
  constexpr int64_t L = lanes<V>;
  V c[R][N];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      c[r][n] = kStart == Start::zero ? V{} : load<V>(C + r * cr + n * L);
      if constexpr (kStart == Start::scale) c[r][n] *= factor[r];
    }
  for (int64_t k = 0; k < K; ++k) {
    V b[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) b[n] = load<V>(B + k * br + n * L);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const V a = set1<V>(kTransposed ? A[k * ar + r] : A[r * ar + k]);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) c[r][n] = fma(a, b[n], c[r][n]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) store(C + r * cr + n * L, c[r][n]);
}

template <int R, int N, bool kTransposed, Start kStart, class V>
inline void block_of(int64_t r, int64_t n, const lane_t<V>* A, int64_t ar, const lane_t<V>* B, int64_t br, lane_t<V>* C,
                     int64_t cr, int64_t K, const lane_t<V>* factor) {
  if (r == R && n == N) return block<R, N, kTransposed, kStart, V>(A, ar, B, br, C, cr, K, factor);
  if constexpr (R > 1) {
    if (r < R) return block_of<R - 1, N, kTransposed, kStart, V>(r, n, A, ar, B, br, C, cr, K, factor);
  }
  if constexpr (N > 1) {
    if (n < N) return block_of<R, N - 1, kTransposed, kStart, V>(r, n, A, ar, B, br, C, cr, K, factor);
  }
}

// C (M x N) = start + A (M x K) B (K x N) for N a multiple of the lanes; C's columns in blocks of even width.
template <bool kTransposed, Start kStart, class V>
void product(const lane_t<V>* A, int64_t ar, const lane_t<V>* B, int64_t br, lane_t<V>* C, int64_t cr, int64_t M,
             int64_t N, int64_t K, const lane_t<V>* factor = nullptr) {
  const int64_t vecs = N / lanes<V>, blocks = ceil_div(vecs, kVecs);
  for (int64_t j = 0; j < blocks; ++j) {
    const int64_t first = j * vecs / blocks, n = (j + 1) * vecs / blocks - first, at = first * lanes<V>;
    for (int64_t i = 0; i < M; i += kRows)
      block_of<kRows, kVecs, kTransposed, kStart, V>(std::min<int64_t>(kRows, M - i), n,
                                                     A + i * (kTransposed ? 1 : ar), ar, B + at, br, C + i * cr + at,
                                                     cr, K, factor ? factor + i : nullptr);
  }
}

// ---- exponentials and reductions ---------------------------------------------------------------------------------

// 2^r = 1 + r P(r) with |r| <= 1/2, P to 2.0e-9: an error that all weights share would not average out in sums over them.
inline VF exp2_fraction(VF r) {
  VF p = fma(r, set1<VF>(1.535336206e-4f), set1<VF>(1.339887459e-3f));
  p = fma(p, r, set1<VF>(9.618437358e-3f));
  p = fma(p, r, set1<VF>(5.550332471e-2f));
  p = fma(p, r, set1<VF>(2.402264791e-1f));
  p = fma(p, r, set1<VF>(6.931472029e-1f));
  return fma(p, r, set1<VF>(1.0f));
}

// 2^x for x <= 0 or slightly above, 0 below -126, NaN for NaN. Closed keys are scaled as if by 2^-126 and then zeroed: a
// scaling that underflows takes a microcode assist, which made tiles on the diagonal cost twice as much as the others.
inline VF exp2(VF x) {
  const VF lowest = set1<VF>(-126.0f), bounded = max(lowest, x);
  const VF n = round(bounded);
  return x < lowest ? VF{} : scale_by_power_of_two(exp2_fraction(bounded - n), n);
}

// e^x likewise, 0 below 2^-126. The product with log2(e) is not rounded, which would cost as many digits as it has before
// the point.
inline VF exp_weight(VF x) {
  const VF lowest = set1<VF>(-87.336544f), c = set1<VF>(log2e<float>);
#if FASTLM_ISA_LEVEL >= 2
  const VF n = round(x * c);
  const __mmask16 live = _mm512_cmp_ps_mask((__m512)x, (__m512)lowest, _CMP_NLT_UQ);  // lanes left out take no assist
  return (VF)_mm512_maskz_scalef_ps(live, (__m512)exp2_fraction(fma(x, c, -n)), (__m512)n);
#else
  const VF bounded = max(lowest, x), n = round(bounded * c);
  return x < lowest ? VF{} : scale_by_power_of_two(exp2_fraction(fma(bounded, c, -n)), n);
#endif
}
inline VD exp_weight(VD x) { return exp(x); }

// The largest lane; what a NaN gives is left open.
inline float largest(VF v) {
#if FASTLM_ISA_LEVEL >= 2
  return _mm512_reduce_max_ps((__m512)v);
#else
  float m = v[0];
  for (int64_t i = 1; i < lanes<VF>; ++i) m = v[i] > m ? v[i] : m;
  return m;
#endif
}
inline double largest(VD v) {
  double m = v[0];
  for (int64_t i = 1; i < lanes<VD>; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

// ---- packing -----------------------------------------------------------------------------------------------------

// Rows of a fused projection lie a page apart, where the hardware's prefetcher does not follow.
constexpr int64_t kAhead = 16;
template <class T>
inline void prefetch_row(const T* row, int64_t D) {
  for (int64_t d = 0; d < D; d += 64 / (int64_t)sizeof(T)) __builtin_prefetch(row + d);
}

// x with 0 in the place of what is not finite.
template <class V>
inline V cleaned(V x) {
  return x * 0 == V{} ? x : V{};
}

// dst (Dp) = factor * src (D), padded with zeros; kClean: with 0 in the place of what is not finite.
template <class V, bool kClean = false, class T>
inline void pack_row(const T* src, int64_t D, lane_t<V> factor, lane_t<V>* dst) {
  for_lanes<V>(D, [&](int64_t d, auto n) {
    const V x = load<V>(src + d, n) * factor;
    store(dst + d, kClean ? cleaned(x) : x);
  });
}

// Lane i of v[0] becomes the largest lane of v[i], for as many vectors as lanes.
template <int kStep, class V>
inline void reduce_rows(V* v) {
  for (int i = 0; i < kStep; ++i) {
    exchange<kStep>(v[i], v[i + kStep], std::make_index_sequence<(size_t)lanes<V>>{});
    v[i] = max(v[i], v[i + kStep]);
  }
  if constexpr (kStep > 1) reduce_rows<kStep / 2>(v);
}

// Lane i of v[0] becomes the sum of v[i]'s lanes, for as many vectors as lanes.
template <int kStep, class V>
inline void add_rows(V* v) {
  for (int i = 0; i < kStep; ++i) {
    exchange<kStep>(v[i], v[i + kStep], std::make_index_sequence<(size_t)lanes<V>>{});
    v[i] += v[i + kStep];
  }
  if constexpr (kStep > 1) add_rows<kStep / 2>(v);
}

// dst (D, kKeys) = the transpose of n rows of D, with zeros for the keys beyond n.
template <class V, class T>
void pack_transposed(const T* src, int64_t stride, int64_t n, int64_t D, lane_t<V>* dst) {
  constexpr int64_t L = lanes<V>;
  for (int64_t j = 0; j < kKeys; j += L)
    for (int64_t d = 0; d < D; d += L) {
      if (d == 0)
        for (int64_t i = 0; i < L; ++i) prefetch_row(src + (j + i + kAhead) * stride, D);
      const int64_t width = std::min(L, D - d);
      V rows[L];
      for (int64_t i = 0; i < L; ++i) {
        const T* row = src + (j + i) * stride + d;
        rows[i] = j + i >= n ? V{} : width == L ? load<V>(row) : load_n<V>(row, width);
      }
      transpose<L / 2>(rows);
      for (int64_t i = 0; i < width; ++i) store(dst + (d + i) * kKeys + j, rows[i]);
    }
}

// dst (kKeys, Dp) = n rows of D, with zeros for the keys beyond n. Returns whether all are finite. kClean: with 0 in the
// place of what is not.
template <class V, bool kClean = false, class T>
bool pack_keys(const T* src, int64_t stride, int64_t n, int64_t D, lane_t<V>* dst) {
  const int64_t Dp = padded<V>(D);
  V zero{};
  for (int64_t i = 0; i < n; ++i) {
    prefetch_row(src + (i + kAhead) * stride, D);
    for_lanes<V>(D, [&](int64_t d, auto width) {
      const V x = load<V>(src + i * stride + d, width);
      zero += x * 0;
      store(dst + i * Dp + d, kClean ? cleaned(x) : x);
    });
  }
  std::fill(dst + n * Dp, dst + kKeys * Dp, lane_t<V>(0));
  return reduce_add(zero) == 0;
}

// scores + mask; a closed key's score counts for nothing, not even where it is NaN.
template <class V>
inline V masked(V score, V additive) {
  const V closed = set1<V>(minus_infinity<lane_t<V>>);
  return additive == closed ? closed : score + additive;
}

// The log-sum-exp of a row, given its largest score and the sum of exponentials relative to it, and what rounding took
// from it (Knuth's two-sum): beside the lowest number the whole logarithm of the sum.
template <class S>
inline void write_lse(const AttentionArgs& a, int64_t id, S maximum, S sum) {
  if (!a.lse) return;
  const S low = std::log(sum), lse = sum == S(0) ? minus_infinity<S> : maximum + low, added = lse - maximum;
  ((S*)a.lse)[id] = lse;
  if (a.rest) ((S*)a.rest)[id] = sum == S(0) ? S(0) : (maximum - (lse - added)) + (low - added);
}

// ---- rows and masks ------------------------------------------------------------------------------------------------

// The query rows of one key-value head: those of all heads of its group, one after the other.
struct Row {
  int64_t head, index;
  KeyRange keys;  // that it attends by its position
  int64_t mask;   // offset of its mask row
  int64_t id;     // its number among all rows, for lse and dropout
};

// Rows first to first + count of a key-value head of a sequence.
inline void list_rows(const AttentionArgs& a, int64_t kv_head, int64_t first, int64_t count, Row* rows) {
  if (count == 0) return;
  int64_t head = kv_head * (a.H / a.Hkv) + first / a.T, i = first % a.T;
  for (int64_t r = 0; r < count; ++r) {
    rows[r] = {head, i, attention_keys(a, i), head * a.mask.h + i * a.mask.t, head * a.row_stride + a.row + i};
    if (++i == a.T) i = 0, ++head;
  }
}

// What a group of rows attends by position: `any` of them keys in one range, `all` of them those in another.
struct Reach {
  KeyRange any, all;
  bool touches(int64_t j0, int64_t n) const { return any.begin < j0 + n && any.end > j0; }
  bool covers(int64_t j0, int64_t n) const { return all.begin <= j0 && all.end >= j0 + n; }
};
inline Reach reach(const Row* rows, int64_t count) {
  Reach r{{INT64_MAX, 0}, {0, INT64_MAX}};
  for (int64_t i = 0; i < count; ++i) {
    const KeyRange keys = rows[i].keys;
    if (keys.begin < keys.end) r.any = {std::min(r.any.begin, keys.begin), std::max(r.any.end, keys.end)};
    r.all = {std::max(r.all.begin, keys.begin), std::min(r.all.end, keys.end)};
  }
  return r;
}

// The reaches of groups of `size` rows, and what they reach together.
inline KeyRange list_reaches(const Row* rows, int64_t count, int64_t size, Reach* reaches) {
  KeyRange any{INT64_MAX, 0};
  for (int64_t r = 0; r < count; r += size) {
    const Reach one = reaches[r / size] = reach(rows + r, std::min(size, count - r));
    any = {std::min(any.begin, one.any.begin), std::max(any.end, one.any.end)};
  }
  return any;
}

// What a mask does to a tile.
enum class Cover { closed, mixed, open };

// out[j] = mask[j * stride] for n keys; returns whether any of them is open. Not in the exp2 domain, where a large
// finite number, such as the lowest one, would be infinite.
template <class V, class M>
inline bool mask_row(const M* mask, int64_t stride, int64_t n, lane_t<V>* out) {
  const lane_t<V> lowest = minus_infinity<lane_t<V>>;
  const V closed = set1<V>(lowest);
  V open{};
  const auto keep = [&](int64_t j, V x, auto k) {
    store(out + j, x, k);
    open = x == closed ? open : set1<V>(1);
  };
  if (stride == 1 && std::is_same_v<vec_of<M>, V>) {
    if constexpr (std::is_same_v<vec_of<M>, V>)
      for_lanes<V>(n, [&](int64_t j, auto k) { keep(j, load<V>(mask + j, k, lowest), k); });
  } else {
    for (int64_t j = 0; j < n; ++j) out[j] = lane_t<V>(to_float(mask[j * stride]));
    for_lanes<V>(n, [&](int64_t j, auto k) { keep(j, load<V>(out + j, k, lowest), k); });
  }
  return reduce_add(open) != 0;
}

template <class V>
inline bool mask_row(const Mask& m, int64_t offset, int64_t n, lane_t<V>* out) {
  switch ((DType)m.type) {
    case DType::f64: return mask_row<V>((const double*)m.data + offset, m.s, n, out);
    case DType::bf16: return mask_row<V>((const bf16_t*)m.data + offset, m.s, n, out);
    case DType::f16: return mask_row<V>((const f16_t*)m.data + offset, m.s, n, out);
    default: return mask_row<V>((const float*)m.data + offset, m.s, n, out);
  }
}

// What n bytes (0 or 1) have in common: the or in `any`, the and in `all`.
inline void scan(const uint8_t* mask, int64_t stride, int64_t n, uint8_t* any, uint8_t* all) {
  uint8_t o = 0, a = 1;
  if (stride == 1)
    for (int64_t j = 0; j < n; ++j) o |= mask[j], a &= mask[j];
  else
    for (int64_t j = 0; j < n; ++j) o |= mask[j * stride], a &= mask[j * stride];
  *any |= o;
  *all &= a;
}

template <class S>
inline void expand(const uint8_t* mask, int64_t stride, int64_t n, S* out) {
  if (stride == 1)
    for (int64_t j = 0; j < n; ++j) out[j] = mask[j] ? S(0) : minus_infinity<S>;
  else
    for (int64_t j = 0; j < n; ++j) out[j] = mask[j * stride] ? S(0) : minus_infinity<S>;
}

// The first to the last of n keys that a boolean mask opens.
inline KeyRange open_keys(const uint8_t* mask, int64_t stride, int64_t n) {
  KeyRange open{0, n};
  while (open.begin < n && !mask[open.begin * stride]) ++open.begin;
  while (open.end > open.begin && !mask[(open.end - 1) * stride]) --open.end;
  return open;
}

// The additive mask of `count` rows and the n keys from j0 on, into out (count x kWidth, or one row where all share
// it, told by *stride = 0); written only for a mixed tile. `part`: where a caller can leave out the other keys, those
// that a row shared by all, such as padding's, has open; it is the whole tile's cover for the others.
template <class V, int64_t kWidth = kKeys>
Cover mask_tile(const Mask& m, const Row* rows, int64_t count, int64_t j0, int64_t n, lane_t<V>* out, int64_t* stride,
                KeyRange* part = nullptr) {
  const bool shared = m.t == 0 && (m.h == 0 || rows[0].head == rows[count - 1].head);
  if (shared) count = 1;
  *stride = shared ? 0 : kWidth;
  if (m.type == kBool) {
    const uint8_t* mask = (const uint8_t*)m.data + j0 * m.s;
    KeyRange kept{0, n};
    if (part && shared) kept = *part = open_keys(mask + rows[0].mask, m.s, n);
    uint8_t any = 0, all = 1;
    for (int64_t r = 0; r < count; ++r)
      scan(mask + rows[r].mask + kept.begin * m.s, m.s, kept.end - kept.begin, &any, &all);
    if (!any) return Cover::closed;
    if (all) return Cover::open;
    for (int64_t r = 0; r < count; ++r) expand(mask + rows[r].mask, m.s, n, out + r * kWidth);
    return Cover::mixed;
  }
  bool open = false;
  for (int64_t r = 0; r < count; ++r) open |= mask_row<V>(m, rows[r].mask + j0 * m.s, n, out + r * kWidth);
  return open ? Cover::mixed : Cover::closed;
}

// Calls body(j) for the keys of a part of a tile that a row does not attend by its position.
template <class F>
inline void for_outside(KeyRange keys, int64_t j0, KeyRange part, F&& body) {
  for (int64_t j = part.begin; j < std::min(part.end, keys.begin - j0); ++j) body(j);
  for (int64_t j = std::max(part.begin, keys.end - j0); j < part.end; ++j) body(j);
}

// ---- soft cap ------------------------------------------------------------------------------------------------------

// cap tanh(x / cap); its slope there goes to *slope.
template <class V>
inline V soft_cap(V x, lane_t<V> cap, V* slope) {
  const V bounded = tanh(x * (1 / cap));
  *slope = 1 - bounded * bounded;
  return bounded * cap;
}

}  // namespace fastlm::FASTLM_ISA::attention
