// Attention backward, for inclusion inside a pass of foreach_isa.h: no include guard.
//
// With P = exp(S - lse) recomputed tile by tile and dropout factors F:
//   dV = (P F)^T dO,   dP = dO V^T F,   dS = P (dP - delta),   delta = rowsum(dO O) - dlse,
//   dQ = scale dS K,   dK = scale dS^T Q,   dmask = dS summed over the mask's broadcast dimensions.
// A task owns one key-value head: it walks over key tiles, and for each over blocks of query rows, so that dK and dV
// of the tile stay in cache and dQ is added to in the order of the tiles. Where heads are too few for the threads, one
// set of tasks computes dK and dV of ranges of keys and another dQ of ranges of rows: the same additions in the same
// order, hence the same bits, for 7 products instead of 5.

namespace fastlm::FASTLM_ISA::attention {

template <class T>
struct Bwd {
  using V = vec_of<T>;
  using S = scalar_of<T>;
  static constexpr int64_t L = lanes<V>;
  static constexpr int64_t kBlock = 48;  // query rows at a time

  const AttentionArgs& a;
  Dropout dropout;
  int64_t Dp, Dvp, rows;  // rows: of one key-value head

  struct Scratch {
    S *q, *dout, *dq, *lse, *delta;                 // of the task's rows
    S *keys_t, *keys, *values_t, *dk, *dv;          // of one tile of keys
    S *p, *ds, *additive, *dmask;                   // (kBlock, kKeys)
    Row* rows;
  };

  Scratch scratch(Arena& arena, int64_t count) const {
    Scratch s;
    s.q = arena.take<S>(count * Dp);
    s.dout = arena.take<S>(count * Dvp);
    s.dq = arena.take<S>(count * Dp);
    s.lse = arena.take<S>(count);
    s.delta = arena.take<S>(count);
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
    return s;
  }
  Scratch scratch(int64_t count) const {
    Arena counter{nullptr};
    scratch(counter, count);
    Arena arena{(char*)attention_scratch(counter.used)};
    return scratch(arena, count);
  }

  const T* at(const Heads& x, int64_t b, int64_t h, int64_t t) const {
    return (const T*)x.data + b * x.b + h * x.h + t * x.t;
  }

  // Query rows first to first + count of a key-value head.
  void load_rows(const Scratch& s, int64_t b, int64_t kv_head, int64_t first, int64_t count) const {
    list_rows(a, b, kv_head, first, count, s.rows);
    for (int64_t r = 0; r < count; ++r) {
      const Row& row = s.rows[r];
      pack_row<V>(at(a.q, b, row.head, row.index), a.D, S(1), s.q + r * Dp);
      pack_row<V>(at(a.dout, b, row.head, row.index), a.Dv, S(1), s.dout + r * Dvp);
      const T* out = at(a.out, b, row.head, row.index);
      V sum{};
      for_lanes<V>(a.Dv, [&](int64_t d, auto n) { sum += load<V>(s.dout + r * Dvp + d) * load<V>(out + d, n); });
      s.delta[r] = reduce_add(sum) - (a.dlse ? ((const S*)a.dlse)[row.id] : S(0));
      const S lse = ((const S*)a.lse)[row.id];
      // A row without keys has lse = -inf; with +inf its probabilities come out as 0.
      s.lse[r] = lse == minus_infinity<S> ? -minus_infinity<S> : lse * S(1.4426950408889634);
    }
  }

  void load_tile(const Scratch& s, int64_t b, int64_t kv_head, int64_t j0, bool keys) const {
    const int64_t n = std::min(kKeys, a.S - j0);
    pack_transposed<V>(at(a.k, b, kv_head, j0), a.k.t, n, a.D, s.keys_t);
    pack_transposed<V>(at(a.v, b, kv_head, j0), a.v.t, n, a.Dv, s.values_t);
    if (keys) pack_keys<V>(at(a.k, b, kv_head, j0), a.k.t, n, a.D, s.keys);
  }

  // P F and dS of a block of rows and the loaded tile; false where no row attends to it.
  bool gradient_of_scores(const Scratch& s, int64_t first, int64_t count, int64_t j0) const {
    const Row* row = s.rows + first;
    const Limits limit = limits(row, count);
    if (limit.most <= j0) return false;
    const int64_t n = std::min(kKeys, a.S - j0);
    int64_t mask_stride = 0;
    const Cover cover = a.mask.data ? mask_tile<V>(a.mask, row, count, j0, n, s.additive, &mask_stride) : Cover::open;
    if (cover == Cover::closed) return false;
    product<false, V>(s.q + first * Dp, Dp, s.keys_t, kKeys, s.p, kKeys, count, kKeys, a.D, Start::zero);
    product<false, V>(s.dout + first * Dvp, Dvp, s.values_t, kKeys, s.ds, kKeys, count, kKeys, a.Dv, Start::zero);
    const S scale = S(a.scale * 1.4426950408889634);
    alignas(64) S keep[kKeys];
    for (int64_t r = 0; r < count; ++r) {
      S *p = s.p + r * kKeys, *ds = s.ds + r * kKeys;
      const S lse = s.lse[first + r], delta = s.delta[first + r];
      const S* additive = cover == Cover::mixed ? s.additive + r * mask_stride : nullptr;
      for_lanes<V>(n, [&](int64_t j, auto k) {
        V x = load<V>(p + j) * scale;
        if (additive) x = masked<V>(x, load<V>(additive + j, k));
        store(p + j, exp2(x - lse));
      });
      for (int64_t j = std::max<int64_t>(0, row[r].limit - j0); j < kKeys; ++j) p[j] = 0;
      if (a.dropout_p > 0) dropout.factors(row[r].id, j0, kKeys, keep);
      for (int64_t j = 0; j < kKeys; j += L) {
        const V e = load<V>(p + j);
        V g = load<V>(ds + j);
        if (a.dropout_p > 0) {
          const V f = load<V>(keep + j);
          g *= f;
          store(p + j, e * f);
        }
        store(ds + j, e * (g - delta));
      }
    }
    return true;
  }

  void tile(const Scratch& s, int64_t count, int64_t j0, bool want_dq, bool want_dkv) const {
    if (want_dkv) {
      std::fill(s.dk, s.dk + kKeys * Dp, S(0));
      std::fill(s.dv, s.dv + kKeys * Dvp, S(0));
    }
    for (int64_t r = 0; r < count; r += kBlock) {
      const int64_t n = std::min(kBlock, count - r);
      if (!gradient_of_scores(s, r, n, j0)) continue;
      if (want_dkv) {
        product<true, V>(s.p, kKeys, s.dout + r * Dvp, Dvp, s.dv, Dvp, kKeys, Dvp, n, Start::add);
        product<true, V>(s.ds, kKeys, s.q + r * Dp, Dp, s.dk, Dp, kKeys, Dp, n, Start::add);
      }
      if (want_dq) product<false, V>(s.ds, kKeys, s.keys, Dp, s.dq + r * Dp, Dp, n, Dp, kKeys, Start::add);
    }
  }

  void write(const Heads& x, int64_t b, int64_t h, int64_t t, int64_t width, const S* row, S factor) const {
    T* out = (T*)x.data + b * x.b + h * x.h + t * x.t;
    for_lanes<V>(width, [&](int64_t d, auto n) { store(out + d, V(load<V>(row + d) * factor), n); });
  }

  // dQ of the rows [first, first + count) (if want_dq) and dK, dV of the keys [j_first, j_end) (if want_dkv).
  void task(int64_t b, int64_t kv_head, int64_t first, int64_t count, int64_t j_first, int64_t j_end, bool want_dq,
            bool want_dkv) const {
    const Scratch s = scratch(count);
    load_rows(s, b, kv_head, first, count);
    if (want_dq) std::fill(s.dq, s.dq + count * Dp, S(0));
    for (int64_t j0 = j_first; j0 < j_end; j0 += kKeys) {
      load_tile(s, b, kv_head, j0, want_dq);
      tile(s, count, j0, want_dq, want_dkv);
      if (want_dkv)
        for (int64_t j = 0; j < std::min(kKeys, a.S - j0); ++j) {
          write(a.dk, b, kv_head, j0 + j, a.D, s.dk + j * Dp, S(a.scale));
          write(a.dv, b, kv_head, j0 + j, a.Dv, s.dv + j * Dvp, S(1));
        }
    }
    if (want_dq)
      for (int64_t r = 0; r < count; ++r)
        write(a.dq, b, s.rows[r].head, s.rows[r].index, a.D, s.dq + r * Dp, S(a.scale));
  }

  void run() const {
    const int64_t heads = a.B * a.Hkv, key_tiles = ceil_div(a.S, kKeys), row_blocks = ceil_div(rows, kBlock);
    int64_t threads = 1;
#ifdef _OPENMP
    threads = omp_get_max_threads();
#endif
    const bool parallel = heads * rows * a.S > kParallelGrain;
    if (5 * ceil_div(heads, threads) * threads <= 7 * heads || !parallel) {
#pragma omp parallel for schedule(dynamic) if (parallel)
      for (int64_t i = 0; i < heads; ++i) task(i / a.Hkv, i % a.Hkv, 0, rows, 0, a.S, true, true);
      return;
    }
    const int64_t pieces = ceil_div(4 * threads, heads);
    const int64_t key_pieces = std::min(pieces, key_tiles), row_pieces = std::min(pieces, row_blocks);
    const int64_t first_half = heads * key_pieces, tasks = first_half + heads * row_pieces;
#pragma omp parallel for schedule(dynamic)
    for (int64_t i = 0; i < tasks; ++i) {
      const bool dkv = i < first_half;
      const int64_t part = dkv ? key_pieces : row_pieces, at = dkv ? i : i - first_half;
      const int64_t head = at / part, piece = at % part, b = head / a.Hkv, h = head % a.Hkv;
      if (dkv) {
        const int64_t from = piece * key_tiles / part * kKeys, to = (piece + 1) * key_tiles / part * kKeys;
        task(b, h, 0, rows, from, std::min(a.S, to), false, true);
      } else {
        const int64_t from = piece * row_blocks / part * kBlock, to = (piece + 1) * row_blocks / part * kBlock;
        task(b, h, from, std::min(rows, to) - from, 0, a.S, true, false);
      }
    }
  }

  // ---- the gradient of an additive mask: a task per tile of it, which looks for all that was added to that tile ----

  void add_to_mask(const Scratch& s, int64_t count, int64_t n, bool sum_rows, bool sum_keys) const {
    for (int64_t r = 0; r < count; ++r)
      for (int64_t j = 0; j < n; ++j)
        s.dmask[(sum_rows ? 0 : r) * kKeys + (sum_keys ? 0 : j)] += s.ds[r * kKeys + j];
  }

  void mask_task(int64_t mb, int64_t mh, int64_t mi, int64_t mj) const {
    const int64_t* size = a.dmask_sizes;
    const bool each_b = size[0] > 1, each_h = size[1] > 1, each_i = size[2] > 1, each_j = size[3] > 1;
    const Scratch s = scratch(kBlock);
    std::fill(s.dmask, s.dmask + kBlock * kKeys, S(0));
    const int64_t group = a.H / a.Hkv;
    for (int64_t b = each_b ? mb : 0; b < (each_b ? mb + 1 : a.B); ++b)
      for (int64_t h = each_h ? mh : 0; h < (each_h ? mh + 1 : a.H); ++h)
        for (int64_t j0 = each_j ? mj : 0; j0 < (each_j ? std::min(a.S, mj + kKeys) : a.S); j0 += kKeys) {
          load_tile(s, b, h / group, j0, false);
          for (int64_t i = each_i ? mi : 0; i < (each_i ? std::min(a.T, mi + kBlock) : a.T); i += kBlock) {
            const int64_t count = std::min(kBlock, a.T - i);
            load_rows(s, b, h / group, h % group * a.T + i, count);
            if (gradient_of_scores(s, 0, count, j0)) add_to_mask(s, count, std::min(kKeys, a.S - j0), !each_i, !each_j);
          }
        }
    const int64_t n_i = each_i ? std::min(kBlock, a.T - mi) : 1, n_j = each_j ? std::min(kKeys, a.S - mj) : 1;
    S* out = (S*)a.dmask.data + ((mb * size[1] + mh) * size[2] + mi) * size[3] + mj;
    for (int64_t r = 0; r < n_i; ++r)
      std::copy(s.dmask + r * kKeys, s.dmask + r * kKeys + n_j, out + r * size[3]);
  }

  void run_mask() const {
    const int64_t* size = a.dmask_sizes;
    const int64_t row_blocks = ceil_div(size[2], kBlock), key_tiles = ceil_div(size[3], kKeys);
    const int64_t tasks = size[0] * size[1] * row_blocks * key_tiles;
#pragma omp parallel for schedule(dynamic) if (a.B * a.H * a.T * a.S > kParallelGrain)
    for (int64_t i = 0; i < tasks; ++i) {
      const int64_t j = i % key_tiles, r = i / key_tiles % row_blocks, head = i / key_tiles / row_blocks;
      mask_task(head / size[1], head % size[1], r * kBlock, j * kKeys);
    }
  }
};

template <class T>
void bwd(const AttentionArgs& a) {
  using V = vec_of<T>;
  if (a.B * a.H == 0) return;
  const Bwd<T> kernel{a, Dropout(a.seed, a.dropout_p), padded<V>(a.D), padded<V>(a.Dv), a.H / a.Hkv * a.T};
  if (a.inputs) kernel.run();
  if (a.dmask.data) kernel.run_mask();
}

}  // namespace fastlm::FASTLM_ISA::attention
