// Attention backward, for inclusion inside a pass of foreach_isa.h: no include guard.
//
// With P = exp(S - lse - rest) recomputed tile by tile from the very scores of the forward pass, and dropout factors F:
//   dV = (P F)^T dO,   dP = dO V^T F,   dS = P (dP - delta),   delta = rowsum(dO O) - dlse,
//   dQ = scale dS K,   dK = scale dS^T Q,   dmask = dS summed over the mask's broadcast dimensions.
// A task owns one key-value head: it walks over key tiles, and for each over blocks of query rows, so that dK and dV
// of the tile stay in cache and dQ is added to in the order of the tiles. Where heads are too few for the threads, one
// set of tasks computes dK and dV of ranges of keys and another dQ of ranges of rows: the same additions in the same
// order, hence the same bits, for 7 products instead of 5.
//
// An infinity or NaN reaches no gradient of a row or key that does not attend to it. A weight of 0 makes dS 0, whatever
// dP is. Of queries and keys the finite elements alone enter dK and dQ: where a row attends to another, its own weights
// tell, as its log-sum-exp is NaN. Rows of dO are multiplied one by one where a block has such elements (add_open_rows).

namespace fastlm::FASTLM_ISA::attention {

template <class T>
struct Bwd {
  using V = vec_of<T>;
  using S = scalar_of<T>;
  static constexpr int64_t L = lanes<V>;
  static constexpr int64_t kBlock = 48;  // query rows at a time

  const AttentionArgs a;  // of one sequence
  Dropout dropout;
  int64_t Dp, Dvp;
  bool few;  // the forward pass did not pack keys, and summed scores in another order

  Bwd(const AttentionArgs& all, int64_t b)
      : a(attention_sequence(all, b)), dropout(a.seed, a.dropout_p), Dp(padded<V>(a.D)), Dvp(padded<V>(a.Dv)),
        few(attention_few(a)) {}

  int64_t twos() const { return ceil_div(Dp, 2 * L) * 2 * L; }  // elements of a row in the order of load_two

  struct Scratch {
    S *q, *dout, *dq, *lse, *rest, *delta;          // of the task's rows; q scaled
    S* q_twos;                                      // q of few rows, in the order of load_two
    S *keys_t, *keys, *values_t, *dk, *dv;          // of one tile of keys
    S *p, *ds, *additive, *dmask;                   // (kBlock, kKeys)
    Row* rows;
    Reach* reaches;                                 // of blocks
    bool* finite;                                   // whether dO is, of blocks
  };

  Scratch scratch(Arena& arena, int64_t count) const {
    Scratch s;
    s.q = arena.take<S>(count * Dp);
    s.dout = arena.take<S>(count * Dvp);
    s.dq = arena.take<S>(count * Dp);
    s.lse = arena.take<S>(count);
    s.rest = arena.take<S>(count);
    s.delta = arena.take<S>(count);
    s.q_twos = arena.take<S>(few ? kFew * twos() : 0);
    s.keys_t = arena.take<S>(a.D * kKeys);
    s.keys = arena.take<S>(kKeys * Dp);
    s.values_t = arena.take<S>(a.Dv * kKeys);
    s.dk = arena.take<S>(kKeys * Dp);
    s.dv = arena.take<S>(kKeys * Dvp);
    s.p = arena.take<S>(kBlock * kKeys);
    s.ds = arena.take<S>(kBlock * kKeys);
    s.additive = arena.take<S>(kBlock * kKeys);
    s.dmask = arena.take<S>(kBlock * kKeys);
    s.rows = arena.take<Row>(count);
    s.reaches = arena.take<Reach>(ceil_div(count, kBlock));
    s.finite = arena.take<bool>(ceil_div(count, kBlock));
    return s;
  }
  Scratch scratch(int64_t count) const {
    return in_scratch([&](Arena& arena) { return scratch(arena, count); });
  }

  static const T* at(const Heads& x, int64_t h, int64_t t) { return (const T*)x.data + h * x.h + t * x.t; }

  // Query rows first to first + count of a key-value head. Returns the keys that they attend by position.
  KeyRange load_rows(const Scratch& s, int64_t kv_head, int64_t first, int64_t count) const {
    list_rows(a, kv_head, first, count, s.rows);
    std::fill_n(s.finite, ceil_div(count, kBlock), true);
    for (int64_t r = 0; r < count; ++r) {
      const Row& row = s.rows[r];
      for (const Heads* x : {&a.q, &a.dout, &a.out}) prefetch_row(at(*x, row.head, row.index + kAhead), a.D);
      pack_row<V, true>(at(a.q, row.head, row.index), a.D, S(a.scale), s.q + r * Dp);
      if (few) pack_twos<V>(at(a.q, row.head, row.index), a.D, S(a.scale), s.q_twos + r * twos());
      pack_row<V>(at(a.dout, row.head, row.index), a.Dv, S(1), s.dout + r * Dvp);
      const T* out = at(a.out, row.head, row.index);
      V sum{}, zero{};
      for_lanes<V>(a.Dv, [&](int64_t d, auto n) {
        const V x = load<V>(s.dout + r * Dvp + d);
        sum += x * load<V>(out + d, n);
        zero += x * 0;
      });
      s.finite[r / kBlock] &= reduce_add(zero) == 0;
      s.delta[r] = reduce_add(sum) - (a.dlse ? ((const S*)a.dlse)[row.id] : S(0));
      const S lse = ((const S*)a.lse)[row.id];
      // A row without keys has lse = -inf; with +inf its probabilities come out as 0.
      s.lse[r] = lse == minus_infinity<S> ? -minus_infinity<S> : lse;
      s.rest[r] = a.rest ? ((const S*)a.rest)[row.id] : S(0);
    }
    return list_reaches(s.rows, count, kBlock, s.reaches);
  }

  void load_tile(const Scratch& s, int64_t kv_head, int64_t j0, bool keys) const {
    const int64_t n = std::min(kKeys, a.S - j0);
    pack_transposed<V>(at(a.k, kv_head, j0), a.k.t, n, a.D, s.keys_t);
    pack_transposed<V>(at(a.v, kv_head, j0), a.v.t, n, a.Dv, s.values_t);
    if (keys) pack_keys<V, true>(at(a.k, kv_head, j0), a.k.t, n, a.D, s.keys);
  }

  // P F / factor and dS of a block of rows and the loaded tile, whose cover is told: by position and mask together. dS is
  // the gradient of the scores before the soft cap, or after it, which is that of an additive mask.
  Cover gradient_of_scores(const Scratch& s, int64_t first, int64_t count, int64_t j0, bool before_cap) const {
    const Row* row = s.rows + first;
    const int64_t n = std::min(kKeys, a.S - j0);
    if (!s.reaches[first / kBlock].touches(j0, n)) return Cover::closed;
    int64_t mask_stride = 0;
    const Cover cover = a.mask.data ? mask_tile<V>(a.mask, row, count, j0, n, s.additive, &mask_stride) : Cover::open;
    if (cover == Cover::closed) return cover;
    if (few)
      scores_of_few<V>(count, s.q_twos, twos(), at(a.k, row->head / (a.H / a.Hkv), j0), a.k.t, n, a.D, s.p);
    else
      product<false, Start::zero, V>(s.q + first * Dp, Dp, s.keys_t, kKeys, s.p, kKeys, count, kKeys, a.D);
    product<false, Start::zero, V>(s.dout + first * Dvp, Dvp, s.values_t, kKeys, s.ds, kKeys, count, kKeys, a.Dv);
    const V closed = set1<V>(minus_infinity<S>);
    alignas(64) S slope[kKeys];
    uint64_t kept = 0;
    for (int64_t r = 0; r < count; ++r) {
      S *p = s.p + r * kKeys, *ds = s.ds + r * kKeys;
      const S lse = s.lse[first + r], rest = s.rest[first + r], delta = s.delta[first + r];
      const S* additive = cover == Cover::mixed ? s.additive + r * mask_stride : nullptr;
      for_lanes<V>(n, [&](int64_t j, auto k) {
        V x = load<V>(p + j), steep = set1<V>(1);
        if (a.softcap > 0) x = soft_cap(x, S(a.softcap), &steep);
        store(slope + j, steep);
        if (additive) x = masked<V>(x, load<V>(additive + j, k));
        // Never above 1, which rounding in huge scores could make infinite where a few rows were summed otherwise.
        const V e = exp_weight(min(V{}, (x - lse) - rest));
        store(p + j, additive ? (x == closed ? V{} : e) : e);
      });
      for_outside(row[r].keys, j0, {0, kKeys}, [&](int64_t j) { p[j] = 0; });
      if (a.dropout_p > 0) dropout.kept(row[r].id, j0, kKeys, &kept);
      for (int64_t j = 0; j < kKeys; j += L) {
        const V e = load<V>(p + j);
        V g = load<V>(ds + j);
        if (a.dropout_p > 0) {
          g = where_kept(kept >> j, V(g * S(dropout.scale)));
          store(p + j, where_kept(kept >> j, e));
        }
        g = e * (g - delta);
        if (a.softcap > 0 && before_cap && j < n) g *= load<V>(slope + j);
        store(ds + j, e == V{} ? V{} : g);
      }
    }
    return cover == Cover::open && s.reaches[first / kBlock].covers(j0, n) ? Cover::open : Cover::mixed;
  }

  // dV of a tile, for rows of dO with an infinity or NaN, which times 0 would be NaN.
  void add_open_rows(const Scratch& s, int64_t first, int64_t count) const {
    for (int64_t r = 0; r < count; ++r)
      for (int64_t j = 0; j < kKeys; ++j)
        if (const S* p = s.p + r * kKeys + j; *p != 0)
          product<false, Start::add, V>(p, 1, s.dout + (first + r) * Dvp, Dvp, s.dv + j * Dvp, Dvp, 1, Dvp, 1);
  }

  void tile(const Scratch& s, int64_t count, int64_t j0, bool want_dq, bool want_dkv) const {
    if (want_dkv) {
      std::fill(s.dk, s.dk + kKeys * Dp, S(0));
      std::fill(s.dv, s.dv + kKeys * Dvp, S(0));
    }
    for (int64_t r = 0; r < count; r += kBlock) {
      const int64_t n = std::min(kBlock, count - r);
      const Cover cover = gradient_of_scores(s, r, n, j0, true);
      if (cover == Cover::closed) continue;
      if (want_dkv) {
        if (cover == Cover::open || s.finite[r / kBlock])
          product<true, Start::add, V>(s.p, kKeys, s.dout + r * Dvp, Dvp, s.dv, Dvp, kKeys, Dvp, n);
        else
          add_open_rows(s, r, n);
        product<true, Start::add, V>(s.ds, kKeys, s.q + r * Dp, Dp, s.dk, Dp, kKeys, Dp, n);
      }
      if (want_dq) product<false, Start::add, V>(s.ds, kKeys, s.keys, Dp, s.dq + r * Dp, Dp, n, Dp, kKeys);
    }
  }

  void write(const Heads& x, int64_t h, int64_t t, int64_t width, const S* row, S factor) const {
    T* out = (T*)x.data + h * x.h + t * x.t;
    for_lanes<V>(width, [&](int64_t d, auto n) { store(out + d, V(load<V>(row + d) * factor), n); });
  }

  void task(const AttentionTask& part) const {
    const Scratch s = scratch(part.count);
    const KeyRange reached = load_rows(s, part.kv_head, part.first, part.count);
    if (part.dq) std::fill(s.dq, s.dq + part.count * Dp, S(0));
    for (int64_t j0 = part.j_first; j0 < part.j_end; j0 += kKeys) {
      if (!part.dkv && (j0 >= reached.end || j0 + kKeys <= reached.begin)) continue;
      load_tile(s, part.kv_head, j0, part.dq);
      tile(s, part.count, j0, part.dq, part.dkv);
      for (int64_t j = 0; part.dkv && j < std::min(kKeys, a.S - j0); ++j) {
        write(a.dk, part.kv_head, j0 + j, a.D, s.dk + j * Dp, S(1));
        write(a.dv, part.kv_head, j0 + j, a.Dv, s.dv + j * Dvp, S(dropout.scale));
      }
    }
    for (int64_t r = 0; part.dq && r < part.count; ++r)
      write(a.dq, s.rows[r].head, s.rows[r].index, a.D, s.dq + r * Dp, S(a.scale));
  }

  // Adds what the rows and keys of one tile of an additive mask contribute, in this sequence, to its gradient s.dmask:
  // those from i_first and j_first on, one block and one tile of them or (`all_`) every one.
  void add_to_mask(const Scratch& s, int64_t h, int64_t i_first, int64_t j_first, bool all_i, bool all_j) const {
    const int64_t group = a.H / a.Hkv;
    for (int64_t j0 = j_first; j0 < (all_j ? a.S : std::min(a.S, j_first + kKeys)); j0 += kKeys) {
      const int64_t n = std::min(kKeys, a.S - j0);
      load_tile(s, h / group, j0, false);
      for (int64_t i = i_first; i < (all_i ? a.T : std::min(a.T, i_first + kBlock)); i += kBlock) {
        const int64_t count = std::min(kBlock, a.T - i);
        load_rows(s, h / group, h % group * a.T + i, count);
        if (gradient_of_scores(s, 0, count, j0, false) == Cover::closed) continue;
        for (int64_t r = 0; r < count; ++r)
          for (int64_t j = 0; j < n; ++j) s.dmask[(all_i ? 0 : r) * kKeys + (all_j ? 0 : j)] += s.ds[r * kKeys + j];
      }
    }
  }
};

// The gradient of an additive mask: a task per tile of it, which looks for all that was added to that tile.
template <class T>
void mask_task(const AttentionArgs& all, int64_t mb, int64_t mh, int64_t mi, int64_t mj) {
  using S = scalar_of<T>;
  constexpr int64_t kBlock = Bwd<T>::kBlock;
  const int64_t* size = all.dmask_sizes;
  const bool each_b = size[0] > 1, each_h = size[1] > 1, each_i = size[2] > 1, each_j = size[3] > 1;
  const auto s = Bwd<T>(all, 0).scratch(kBlock);
  std::fill(s.dmask, s.dmask + kBlock * kKeys, S(0));
  for (int64_t b = each_b ? mb : 0; b < (each_b ? mb + 1 : all.B); ++b)
    for (int64_t h = each_h ? mh : 0; h < (each_h ? mh + 1 : all.H); ++h)
      Bwd<T>(all, b).add_to_mask(s, h, each_i ? mi : 0, each_j ? mj : 0, !each_i, !each_j);
  const int64_t rows = each_i ? std::min(kBlock, all.T - mi) : 1, keys = each_j ? std::min(kKeys, all.S - mj) : 1;
  S* out = (S*)all.dmask.data + ((mb * size[1] + mh) * size[2] + mi) * size[3] + mj;
  for (int64_t r = 0; r < rows; ++r) std::copy(s.dmask + r * kKeys, s.dmask + r * kKeys + keys, out + r * size[3]);
}

template <class T>
void mask_gradient(const AttentionArgs& a) {
  const int64_t* size = a.dmask_sizes;
  const int64_t row_blocks = ceil_div(size[2], Bwd<T>::kBlock), key_tiles = ceil_div(size[3], kKeys);
  const int64_t tasks = size[0] * size[1] * row_blocks * key_tiles;
#pragma omp parallel for schedule(dynamic) if (a.parallel)
  for (int64_t i = 0; i < tasks; ++i) {
    const int64_t j = i % key_tiles, r = i / key_tiles % row_blocks, head = i / key_tiles / row_blocks;
    mask_task<T>(a, head / size[1], head % size[1], r * Bwd<T>::kBlock, j * kKeys);
  }
}

template <class T>
void bwd(const AttentionArgs& a) {
#pragma omp parallel for schedule(dynamic) if (a.parallel && a.task_count > 1)
  for (int64_t i = 0; i < a.task_count; ++i) Bwd<T>(a, a.tasks[i].b).task(a.tasks[i]);
  if (a.dmask.data) mask_gradient<T>(a);
}

}  // namespace fastlm::FASTLM_ISA::attention
