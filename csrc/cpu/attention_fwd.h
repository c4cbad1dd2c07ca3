// Attention forward, for inclusion inside a pass of foreach_isa.h: no include guard.
//
// A task is a chunk of the query rows that share one key-value head. It walks over the keys tile by tile: the tile is
// packed once (keys transposed), then each group of kRows rows takes its scores, updates its running maximum and sum
// (Milakov and Gimelshein 2018) and adds its share of the output. A row's result depends on neither the chunk nor the
// group it falls in, so any division of the work gives the same bits.

namespace fastlm::FASTLM_ISA::attention {

template <class T>
struct Fwd {
  using V = vec_of<T>;
  using S = scalar_of<T>;
  static constexpr int64_t L = lanes<V>;
  static constexpr int64_t kState = 16;  // kRows padded to whole vectors of any width

  const AttentionArgs a;  // of one sequence
  Dropout dropout;
  int64_t Dp, Dvp;
  bool few;  // kFew rows or fewer share a head: keys and values are not packed

  Fwd(const AttentionArgs& all, int64_t b)
      : a(attention_sequence(all, b)), dropout(a.seed, a.dropout_p), Dp(padded<V>(a.D)), Dvp(padded<V>(a.Dv)),
        few(attention_few(a)) {
    if (few) Dp = ceil_div(Dp, 2 * L) * 2 * L, Dvp = ceil_div(Dvp, 2 * L) * 2 * L;
  }

  // Scratch of one task.
  struct Scratch {
    S *q, *out, *maximum, *keys, *values;
    V* sum;
    Row* rows;
    Reach* reaches;  // of groups of kRows
  };

  Scratch scratch(Arena& arena, int64_t chunk) const {
    Scratch s;
    s.q = arena.take<S>(chunk * Dp);
    s.out = arena.take<S>(chunk * Dvp);
    s.maximum = arena.take<S>(chunk);
    s.keys = arena.take<S>(a.D * kKeys);
    s.values = arena.take<S>(kKeys * Dvp);
    s.sum = arena.take<V>(chunk);
    s.rows = arena.take<Row>(chunk);
    s.reaches = arena.take<Reach>(ceil_div(chunk, kRows));
    return s;
  }

  // One group of rows and one tile of keys.
  void group(const Scratch& s, int64_t first, int64_t count, int64_t j0, int64_t n, bool finite, const T* k,
             const T* v) const {
    const Row* rows = s.rows + first;
    const Reach reach = s.reaches[first / kRows];
    if (!reach.touches(j0, n)) return;
    alignas(64) S p[kRows * kKeys], additive[kRows * kKeys];
    int64_t mask_stride = 0;
    const Cover cover = a.mask.data ? mask_tile<V>(a.mask, rows, count, j0, n, additive, &mask_stride) : Cover::open;
    if (cover == Cover::closed) return;
    const int64_t from = std::max<int64_t>(0, reach.any.begin - j0), to = std::min(n, reach.any.end - j0);
    const KeyRange part{from / L * L, padded<V>(to)};  // whole vectors
    if (few)
      scores_of_few<V>(count, s.q, Dp, k + part.begin * a.k.t, a.k.t, to - part.begin, a.D, p + part.begin);
    else
      product<false, Start::zero, V>(s.q + first * Dp, Dp, s.keys + part.begin, kKeys, p + part.begin, kKeys, count,
                        part.end - part.begin, a.D);
    if (a.softcap > 0)
      for (int64_t r = 0; r < count; ++r)
        for (int64_t j = part.begin; j < part.end; j += L) {
          V slope;
          store(p + r * kKeys + j, soft_cap(load<V>(p + r * kKeys + j), S(a.softcap), &slope));
        }
    if (cover == Cover::mixed)
      for (int64_t r = 0; r < count; ++r)
        for_lanes<V>(to - part.begin, [&](int64_t i, auto k) {
          const int64_t j = part.begin + i;
          store(p + r * kKeys + j, masked<V>(load<V>(p + r * kKeys + j), load<V>(additive + r * mask_stride + j, k)), k);
        });
    if (!reach.covers(j0 + part.begin, part.end - part.begin))
      for (int64_t r = 0; r < count; ++r)
        for_outside(rows[r].keys, j0, part, [&](int64_t j) { p[r * kKeys + j] = minus_infinity<S>; });
    alignas(64) S factor[kState];
    softmax(p, count, part, s.maximum + first, s.sum + first, factor);
    if (a.dropout_p > 0) drop(rows, count, j0, part, p);
    S* out = s.out + first * Dvp;
    if (few)
      add_values_of_few<V>(count, p + from, v + from * a.v.t, a.v.t, to - from, a.Dv, out, Dvp, factor);
    else if (finite || (cover == Cover::open && reach.covers(j0, n)))
      product<false, Start::scale, V>(p + from, kKeys, s.values + from * Dvp, Dvp, out, Dvp, count, Dvp, to - from, factor);
    else
      add_open_values(s, p, count, {from, to}, out, factor);
  }

  // For a tile with closed keys and with an infinity or NaN among its values, which times 0 would be NaN.
  void add_open_values(const Scratch& s, const S* p, int64_t count, KeyRange part, S* out, const S* factor) const {
    product<false, Start::scale, V>(p, kKeys, s.values, Dvp, out, Dvp, count, Dvp, 0, factor);
    for (int64_t r = 0; r < count; ++r)
      for (int64_t j = part.begin; j < part.end; ++j)
        if (p[r * kKeys + j] != 0)
          product<false, Start::add, V>(p + r * kKeys + j, 1, s.values + j * Dvp, Dvp, out + r * Dvp, Dvp, 1, Dvp, 1);
  }

  // scores of some keys -> probabilities relative to the new running maximum; factor: what the sums so far shrink by.
  void softmax(S* p, int64_t count, KeyRange part, S* maximum, V* sum, S* factor) const {
    alignas(64) S pivot[kState];
    for (int64_t r = 0; r < count; ++r) {
      V m = load<V>(p + r * kKeys + part.begin);
      for (int64_t j = part.begin + L; j < part.end; j += L) m = max(m, load<V>(p + r * kKeys + j));
      const S old = maximum[r], now = std::max(old, largest(m));
      maximum[r] = now;
      pivot[r] = now == minus_infinity<S> ? S(0) : now;
      factor[r] = old - pivot[r];
    }
    for (int64_t r = 0; r < count; r += L) store(factor + r, exp_weight(load<V>(factor + r)));
    for (int64_t r = 0; r < count; ++r) {
      V total = sum[r] * factor[r];
      for (int64_t j = part.begin; j < part.end; j += L) {
        const V e = exp_weight(load<V>(p + r * kKeys + j) - pivot[r]);
        store(p + r * kKeys + j, e);
        total += e;
      }
      sum[r] = total;
    }
  }

  void drop(const Row* rows, int64_t count, int64_t j0, KeyRange part, S* p) const {
    for (int64_t r = 0; r < count; ++r) {
      uint64_t kept;
      dropout.kept(rows[r].id, j0, kKeys, &kept);
      for (int64_t j = part.begin; j < part.end; j += L)
        store(p + r * kKeys + j, where_kept(kept >> j, load<V>(p + r * kKeys + j)));
    }
  }

  void task(const AttentionTask& part) const {
    const Scratch s = in_scratch([&](Arena& arena) { return scratch(arena, part.count); });
    const S scale = S(a.scale);
    list_rows(a, part.kv_head, part.first, part.count, s.rows);
    for (int64_t r = 0; r < part.count; ++r) {
      const Row& row = s.rows[r];
      const T* q = (const T*)a.q.data + row.head * a.q.h + row.index * a.q.t;
      prefetch_row(q + kAhead * a.q.t, a.D);
      few ? pack_twos<V>(q, a.D, scale, s.q + r * Dp) : pack_row<V>(q, a.D, scale, s.q + r * Dp);
      s.maximum[r] = minus_infinity<S>;
      s.sum[r] = V{};
    }
    std::fill(s.out, s.out + part.count * Dvp, S(0));
    const T* k = (const T*)a.k.data + part.kv_head * a.k.h;
    const T* v = (const T*)a.v.data + part.kv_head * a.v.h;
    const KeyRange reached = list_reaches(s.rows, part.count, kRows, s.reaches);
    for (int64_t j0 = reached.begin / kKeys * kKeys; j0 < reached.end; j0 += kKeys) {
      const int64_t n = std::min(kKeys, a.S - j0);
      const T *keys = k + j0 * a.k.t, *values = v + j0 * a.v.t;
      if (!few) pack_transposed<V>(keys, a.k.t, n, a.D, s.keys);
      const bool finite = few || pack_keys<V>(values, a.v.t, n, a.Dv, s.values);
      for (int64_t r = 0; r < part.count; r += kRows)
        group(s, r, std::min<int64_t>(kRows, part.count - r), j0, n, finite, keys, values);
    }
    for (int64_t r = 0; r < part.count; ++r) finish(s, r);
  }

  void finish(const Scratch& s, int64_t r) const {
    const Row& row = s.rows[r];
    const S sum = reduce_add(s.sum[r]), inverse = sum == S(0) ? S(0) : S(dropout.scale) / sum;
    T* out = (T*)a.out.data + row.head * a.out.h + row.index * a.out.t;
    if (few) unpack_twos<V, T>(s.out + r * Dvp, a.Dv);
    for_lanes<V>(a.Dv, [&](int64_t d, auto n) { store(out + d, V(load<V>(s.out + r * Dvp + d) * inverse), n); });
    write_lse(a, row.id, s.maximum[r], sum);
  }
};

template <class T>
void fwd(const AttentionArgs& a) {
  const auto run = [&](int64_t i) { Fwd<T>(a, a.tasks[i].b).task(a.tasks[i]); };
  if (attention_few(a) && !a.cu_q) {  // equal tasks: decoding, where each thread finds its heads' keys in its own cache
#pragma omp parallel for schedule(static) if (a.parallel && a.task_count > 1)
    for (int64_t i = 0; i < a.task_count; ++i) run(i);
  } else {
#pragma omp parallel for schedule(dynamic) if (a.parallel && a.task_count > 1)
    for (int64_t i = 0; i < a.task_count; ++i) run(i);
  }
}

}  // namespace fastlm::FASTLM_ISA::attention
