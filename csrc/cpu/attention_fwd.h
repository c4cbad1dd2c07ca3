// Attention forward, for inclusion inside a pass of foreach_isa.h: no include guard.
//
// A task is a chunk of the query rows that share one key-value head. It walks over the keys tile by tile: the tile is
// packed once (keys transposed), then each group of kRows rows takes its scores, updates its running maximum and sum
// (Milakov and Gimelshein 2018, in the exp2 domain) and adds its share of the output. A row's result depends on
// neither the chunk nor the group it falls in, so any division of the work gives the same bits.

namespace fastlm::FASTLM_ISA::attention {

template <class T>
struct Fwd {
  using V = vec_of<T>;
  using S = scalar_of<T>;
  static constexpr int64_t L = lanes<V>;
  // Large enough that packing a tile is 1 or 2 % of its arithmetic, small enough that the outputs stay in L2.
  static constexpr int64_t kChunk = 64 * kRows;
  static constexpr int64_t kState = 16;  // kRows padded to whole vectors of any width

  const AttentionArgs& a;
  Dropout dropout;
  int64_t Dp, Dvp, chunk;
  bool few;  // kFew rows or fewer share a head: keys and values are not packed

  // Scratch of one task.
  struct Scratch {
    S *q, *out, *maximum, *keys, *values;
    V* sum;
    Row* rows;
  };

  Scratch scratch(Arena& arena) const {
    Scratch s;
    s.q = arena.take<S>(chunk * Dp);
    s.out = arena.take<S>(chunk * Dvp);
    s.maximum = arena.take<S>(chunk);
    s.keys = arena.take<S>(a.D * kKeys);
    s.values = arena.take<S>(kKeys * Dvp);
    s.sum = arena.take<V>(chunk);
    s.rows = arena.take<Row>(chunk);
    return s;
  }

  // One group of rows and one tile of keys.
  void group(const Scratch& s, int64_t first, int64_t count, int64_t j0, int64_t n, bool finite, const T* k,
             const T* v) const {
    const Row* rows = s.rows + first;
    const Limits limit = limits(rows, count);
    if (limit.most <= j0) return;
    alignas(64) S p[kRows * kKeys], additive[kRows * kKeys];
    int64_t mask_stride = 0;
    const Cover cover = a.mask.data ? mask_tile<V>(a.mask, rows, count, j0, n, additive, &mask_stride) : Cover::open;
    if (cover == Cover::closed) return;
    if (few)
      scores_of_few<V>(count, s.q, Dp, k, a.k.t, n, a.D, p);
    else
      product<false, V>(s.q + first * Dp, Dp, s.keys, kKeys, p, kKeys, count, kKeys, a.D, Start::zero);
    if (cover == Cover::mixed)
      for (int64_t r = 0; r < count; ++r)
        for_lanes<V>(n, [&](int64_t j, auto k) {
          store(p + r * kKeys + j, masked<V>(load<V>(p + r * kKeys + j), load<V>(additive + r * mask_stride + j, k)), k);
        });
    if (limit.least < j0 + kKeys) close_beyond(rows, count, j0, p);
    alignas(64) S factor[kState];
    softmax(p, count, s.maximum + first, s.sum + first, factor);
    if (a.dropout_p > 0) drop(rows, count, j0, p);
    S* out = s.out + first * Dvp;
    if (few)
      add_values_of_few<V>(count, p, v, a.v.t, n, a.Dv, out, Dvp, factor);
    else if (finite || (cover == Cover::open && limit.least >= j0 + n))
      product<false, V>(p, kKeys, s.values, Dvp, out, Dvp, count, Dvp, std::min(n, limit.most - j0), Start::scale, factor);
    else
      add_open_values(s, p, count, n, out, factor);
  }

  // For a tile with closed keys and with an infinity or NaN among its values, which times 0 would be NaN.
  void add_open_values(const Scratch& s, const S* p, int64_t count, int64_t n, S* out, const S* factor) const {
    product<false, V>(p, kKeys, s.values, Dvp, out, Dvp, count, Dvp, 0, Start::scale, factor);
    for (int64_t r = 0; r < count; ++r)
      for (int64_t j = 0; j < n; ++j)
        if (p[r * kKeys + j] != 0)
          product<false, V>(p + r * kKeys + j, 1, s.values + j * Dvp, Dvp, out + r * Dvp, Dvp, 1, Dvp, 1, Start::add);
  }

  // scores -> probabilities relative to the new running maximum; factor: what the sums so far shrink by.
  void softmax(S* p, int64_t count, S* maximum, V* sum, S* factor) const {
    alignas(64) S pivot[kState];
    for (int64_t r = 0; r < count; ++r) {
      V m = load<V>(p + r * kKeys);
      for (int64_t j = L; j < kKeys; j += L) m = max(m, load<V>(p + r * kKeys + j));
      const S old = maximum[r], now = std::max(old, largest(m));
      maximum[r] = now;
      pivot[r] = now == minus_infinity<S> ? S(0) : now;
      factor[r] = old - pivot[r];
    }
    for (int64_t r = 0; r < count; r += L) store(factor + r, exp2(load<V>(factor + r)));
    for (int64_t r = 0; r < count; ++r) {
      V total = sum[r] * factor[r];
      for (int64_t j = 0; j < kKeys; j += L) {
        const V e = exp2(load<V>(p + r * kKeys + j) - pivot[r]);
        store(p + r * kKeys + j, e);
        total += e;
      }
      sum[r] = total;
    }
  }

  void drop(const Row* rows, int64_t count, int64_t j0, S* p) const {
    alignas(64) S keep[kKeys];
    for (int64_t r = 0; r < count; ++r) {
      dropout.factors(rows[r].id, j0, kKeys, keep);
      for (int64_t j = 0; j < kKeys; j += L)
        store(p + r * kKeys + j, V(load<V>(p + r * kKeys + j) * load<V>(keep + j)));
    }
  }

  // Rows [first, first + count) of key-value head kv_head of batch b.
  void task(int64_t b, int64_t kv_head, int64_t first, int64_t count) const {
    Arena counter{nullptr};
    scratch(counter);
    Arena arena{(char*)attention_scratch(counter.used)};
    const Scratch s = scratch(arena);
    const S scale = S(a.scale * 1.4426950408889634);
    list_rows(a, b, kv_head, first, count, s.rows);
    int64_t end = 0;
    for (int64_t r = 0; r < count; ++r) {
      const Row& row = s.rows[r];
      pack_row<V>((const T*)a.q.data + b * a.q.b + row.head * a.q.h + row.index * a.q.t, a.D, scale, s.q + r * Dp);
      s.maximum[r] = minus_infinity<S>;
      s.sum[r] = V{};
      end = std::max(end, row.limit);
    }
    std::fill(s.out, s.out + count * Dvp, S(0));
    const T* k = (const T*)a.k.data + b * a.k.b + kv_head * a.k.h;
    const T* v = (const T*)a.v.data + b * a.v.b + kv_head * a.v.h;
    for (int64_t j0 = 0; j0 < end; j0 += kKeys) {
      const int64_t n = std::min(kKeys, a.S - j0);
      const T *keys = k + j0 * a.k.t, *values = v + j0 * a.v.t;
      if (!few) pack_transposed<V>(keys, a.k.t, n, a.D, s.keys);
      const bool finite = few || pack_keys<V>(values, a.v.t, n, a.Dv, s.values);
      for (int64_t r = 0; r < count; r += kRows)
        group(s, r, std::min<int64_t>(kRows, count - r), j0, n, finite, keys, values);
    }
    for (int64_t r = 0; r < count; ++r) finish(s, b, r);
  }

  void finish(const Scratch& s, int64_t b, int64_t r) const {
    const Row& row = s.rows[r];
    const S sum = reduce_add(s.sum[r]), inverse = sum == S(0) ? S(0) : S(1) / sum;
    T* out = (T*)a.out.data + b * a.out.b + row.head * a.out.h + row.index * a.out.t;
    for_lanes<V>(a.Dv, [&](int64_t d, auto n) { store(out + d, V(load<V>(s.out + r * Dvp + d) * inverse), n); });
    if (a.lse)
      ((S*)a.lse)[row.id] = sum == S(0) ? minus_infinity<S> : S((s.maximum[r] + std::log2(sum)) * S(0.6931471805599453));
  }

  void run() {
    if (a.B * a.H * a.T == 0) return;
    const int64_t rows = a.H / a.Hkv * a.T, heads = a.B * a.Hkv;
    int64_t threads = 1;
#ifdef _OPENMP
    threads = omp_get_max_threads();
#endif
    // Enough tasks for the threads to share evenly, as long as a chunk is worth packing the keys for.
    int64_t per_head = std::max(ceil_div(rows, kChunk), std::min(ceil_div(rows, 8 * kRows), ceil_div(4 * threads, heads)));
    chunk = ceil_div(ceil_div(rows, per_head), kRows) * kRows;
    per_head = ceil_div(rows, chunk);
    const int64_t tasks = heads * per_head;
#pragma omp parallel for schedule(dynamic) if (tasks > 1 && heads * rows * a.S > kParallelGrain)
    for (int64_t i = 0; i < tasks; ++i) {
      const int64_t head = i / per_head, first = (per_head - 1 - i % per_head) * chunk;  // causal: longest first
      task(head / a.Hkv, head % a.Hkv, first, std::min(chunk, rows - first));
    }
  }
};

template <class T>
void fwd(const AttentionArgs& a) {
  using V = vec_of<T>;
  Fwd<T>{a, Dropout(a.seed, a.dropout_p), padded<V>(a.D), padded<V>(a.Dv), 0, attention_few(a)}.run();
}

}  // namespace fastlm::FASTLM_ISA::attention
