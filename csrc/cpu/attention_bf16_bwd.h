// Backward on bf16, for inclusion inside a pass of level 3 or 4: no include guard.
//
// dV and dK are computed transposed: dV^T = dO^T P needs P as a right operand, which two rows of P become by one
// shuffle, where dV = P^T dO would need P transposed.

namespace fastlm::FASTLM_ISA::attention {

struct Bwd16 {
  static constexpr int64_t kBlock = 64;  // query rows at a time
  static constexpr int64_t kSpan = 128;  // keys at a time

  const AttentionArgs& a;
  Dropout dropout;
  int64_t Dp, Dvp, rows;  // rows: of one key-value head

  struct Scratch {
    bf16_t *q, *dout, *q_t, *dout_t;          // of the task's rows; transposed block by block
    float *dq, *lse, *delta;
    bf16_t *keys_t, *keys, *values_t;         // of kSpan keys
    float *dk_t, *dv_t;                       // (Dp, kSpan), (Dvp, kSpan)
    float *scores, *dp, *additive;            // (kBlock, kSpan)
    bf16_t *p_pairs, *ds_pairs, *ds;          // the same
    Row* rows;
  };

  Scratch scratch(Arena& arena, int64_t count) const {
    const int64_t n = ceil_div(count, kBlock) * kBlock;
    Scratch s;
    s.q = arena.take<bf16_t>(n * Dp);
    s.dout = arena.take<bf16_t>(n * Dvp);
    s.q_t = arena.take<bf16_t>(n * Dp);
    s.dout_t = arena.take<bf16_t>(n * Dvp);
    s.dq = arena.take<float>(n * Dp);
    s.lse = arena.take<float>(n);
    s.delta = arena.take<float>(n);
    s.keys_t = arena.take<bf16_t>(kSpan * Dp);
    s.keys = arena.take<bf16_t>(kSpan * Dp);
    s.values_t = arena.take<bf16_t>(kSpan * Dvp);
    s.dk_t = arena.take<float>(kSpan * Dp);
    s.dv_t = arena.take<float>(kSpan * Dvp);
    s.scores = arena.take<float>(kBlock * kSpan);
    s.dp = arena.take<float>(kBlock * kSpan);
    s.additive = arena.take<float>(kBlock * kSpan);
    s.p_pairs = arena.take<bf16_t>(kBlock * kSpan);
    s.ds_pairs = arena.take<bf16_t>(kBlock * kSpan);
    s.ds = arena.take<bf16_t>(kBlock * kSpan);
    s.rows = arena.take<Row>(n);
    return s;
  }

  const bf16_t* at(const Heads& x, int64_t b, int64_t h, int64_t t) const {
    return (const bf16_t*)x.data + b * x.b + h * x.h + t * x.t;
  }

  void load_row(const Scratch& s, int64_t b, int64_t r, const Row& row) const {
    pack_row(at(a.q, b, row.head, row.index), a.D, 0, s.q + r * Dp);
    pack_row(at(a.dout, b, row.head, row.index), a.Dv, 0, s.dout + r * Dvp);
    const bf16_t* out = at(a.out, b, row.head, row.index);
    VF sum{};
    for_lanes<VF>(a.Dv, [&](int64_t d, auto n) { sum += load<VF>(s.dout + r * Dvp + d, n) * load<VF>(out + d, n); });
    s.delta[r] = reduce_add(sum) - (a.dlse ? ((const float*)a.dlse)[row.id] : 0.0f);
    const float lse = ((const float*)a.lse)[row.id];
    s.lse[r] = lse == minus_infinity<float> ? -minus_infinity<float> : lse * 1.4426950408889634f;
  }

  void load_rows(const Scratch& s, int64_t b, int64_t kv_head, int64_t first, int64_t count, bool transposed) const {
    const int64_t n = ceil_div(count, kBlock) * kBlock;
    list_rows(a, b, kv_head, first, count, s.rows);
    for (int64_t r = 0; r < count; ++r) load_row(s, b, r, s.rows[r]);
    for (int64_t r = count; r < n; ++r) {
      s.rows[r] = {0, 0, 0, 0, 0};
      s.lse[r] = s.delta[r] = 0;
      std::memset((void*)(s.q + r * Dp), 0, (size_t)Dp * sizeof(bf16_t));
      std::memset((void*)(s.dout + r * Dvp), 0, (size_t)Dvp * sizeof(bf16_t));
    }
    for (int64_t r = 0; transposed && r < n; r += kBlock) {
      pack_transposed_rows(s.q + r * Dp, kBlock, Dp, s.q_t + r * Dp, kBlock);
      pack_transposed_rows(s.dout + r * Dvp, kBlock, Dvp, s.dout_t + r * Dvp, kBlock);
    }
  }

  // P F (as pairs of rows) and dS (both ways) of rows r and r + 1 of the block that starts at `first`.
  void gradient_of_scores(const Scratch& s, int64_t first, int64_t r, int64_t j0, int64_t width,
                          const float* additive, int64_t mask_stride) const {
    const __m512 scale = _mm512_set1_ps((float)(a.scale * 1.4426950408889634));
    alignas(64) float keep[2][kSpan];
    int64_t n[2];
    __m512 lse[2], delta[2];
    for (int i = 0; i < 2; ++i) {
      n[i] = s.rows[first + r + i].limit - j0;
      lse[i] = _mm512_set1_ps(s.lse[first + r + i]);
      delta[i] = _mm512_set1_ps(s.delta[first + r + i]);
      if (a.dropout_p > 0) dropout.factors(s.rows[first + r + i].id, j0, width, keep[i]);
    }
    for (int64_t j = 0; j < width; j += 16) {
      __m512 p[2], ds[2];
      for (int i = 0; i < 2; ++i) {
        __m512 x = _mm512_mul_ps(_mm512_loadu_ps(s.scores + (r + i) * kSpan + j), scale);
        if (additive) x = (__m512)masked<VF>((VF)x, load<VF>(additive + (r + i) * mask_stride + j));
        p[i] = exp2_short(_mm512_sub_ps(x, lse[i]), first16(n[i] - j));
        __m512 g = _mm512_loadu_ps(s.dp + (r + i) * kSpan + j);
        if (a.dropout_p > 0) g = _mm512_mul_ps(g, _mm512_load_ps(keep[i] + j));
        ds[i] = _mm512_mul_ps(p[i], _mm512_sub_ps(g, delta[i]));
        if (a.dropout_p > 0) p[i] = _mm512_mul_ps(p[i], _mm512_load_ps(keep[i] + j));
        _mm256_storeu_si256((__m256i*)(s.ds + (r + i) * kSpan + j), (__m256i)_mm512_cvtneps_pbh(ds[i]));
      }
      _mm512_storeu_si512(s.p_pairs + j * kBlock + r * 16, pairs(p[0], p[1]));
      _mm512_storeu_si512(s.ds_pairs + j * kBlock + r * 16, pairs(ds[0], ds[1]));
    }
  }

  // A block of `count` rows and the n packed keys from j0 on.
  void block(const Scratch& s, int64_t first, int64_t count, int64_t j0, int64_t n, bool want_dq, bool want_dkv) const {
    const Limits limit = limits(s.rows + first, count);
    if (limit.most <= j0) return;
    const int64_t width = up32(std::min(n, limit.most - j0));
    int64_t mask_stride = 0;
    const Cover cover =
        a.mask.data ? mask_tile<VF, kSpan>(a.mask, s.rows + first, count, j0, n, s.additive, &mask_stride) : Cover::open;
    if (cover == Cover::closed) return;
    product(s.q + first * Dp, Dp, s.keys_t, Dp * 16, s.scores, kSpan, kBlock, width, Dp, false);
    product(s.dout + first * Dvp, Dvp, s.values_t, Dvp * 16, s.dp, kSpan, kBlock, width, Dvp, false);
    for (int64_t r = 0; r < kBlock; r += 2)
      gradient_of_scores(s, first, r, j0, width, cover == Cover::mixed ? s.additive : nullptr, mask_stride);
    if (want_dkv) {
      product(s.dout_t + first * Dvp, kBlock, s.p_pairs, kBlock * 16, s.dv_t, kSpan, Dvp, width, kBlock, true);
      product(s.q_t + first * Dp, kBlock, s.ds_pairs, kBlock * 16, s.dk_t, kSpan, Dp, width, kBlock, true);
    }
    if (want_dq) product(s.ds, kSpan, s.keys, up32(n) * 16, s.dq + first * Dp, Dp, kBlock, Dp, width, true);
  }

  // n rows of x from t on = factor * the transpose of x_t (width, kSpan).
  void write_transposed(const Heads& x, int64_t b, int64_t h, int64_t t, int64_t n, int64_t width, const float* x_t,
                        float factor) const {
    for (int64_t j = 0; j < n; j += 16)
      for (int64_t d = 0; d < width; d += 16) {
        VF square[16];
        for (int64_t i = 0; i < 16; ++i) square[i] = load<VF>(x_t + (d + i) * kSpan + j);
        transpose<8>(square);
        for (int64_t i = 0; i < std::min<int64_t>(16, n - j); ++i) {
          bf16_t* out = (bf16_t*)x.data + b * x.b + h * x.h + (t + j + i) * x.t + d;
          _mm256_mask_storeu_epi16(out, first16(width - d), (__m256i)_mm512_cvtneps_pbh((__m512)(square[i] * factor)));
        }
      }
  }

  // dQ of the rows [first, first + count) (if want_dq) and dK, dV of the keys [j_first, j_end) (if want_dkv).
  void task(int64_t b, int64_t kv_head, int64_t first, int64_t count, int64_t j_first, int64_t j_end, bool want_dq,
            bool want_dkv) const {
    Arena counter{nullptr};
    scratch(counter, count);
    Arena arena{(char*)attention_scratch(counter.used)};
    const Scratch s = scratch(arena, count);
    const Tiles tiles;
    load_rows(s, b, kv_head, first, count, want_dkv);
    if (want_dq) std::fill(s.dq, s.dq + ceil_div(count, kBlock) * kBlock * Dp, 0.0f);
    for (int64_t j0 = j_first; j0 < j_end; j0 += kSpan) {
      const int64_t n = std::min(kSpan, j_end - j0);
      pack_columns(at(a.k, b, kv_head, j0), a.k.t, n, a.D, s.keys_t);
      pack_columns(at(a.v, b, kv_head, j0), a.v.t, n, a.Dv, s.values_t);
      if (want_dq) pack_rows(at(a.k, b, kv_head, j0), a.k.t, n, a.D, s.keys);
      if (want_dkv) {
        std::fill(s.dk_t, s.dk_t + kSpan * Dp, 0.0f);
        std::fill(s.dv_t, s.dv_t + kSpan * Dvp, 0.0f);
      }
      for (int64_t r = 0; r < count; r += kBlock) block(s, r, std::min(kBlock, count - r), j0, n, want_dq, want_dkv);
      if (want_dkv) {
        write_transposed(a.dk, b, kv_head, j0, n, a.D, s.dk_t, (float)a.scale);
        write_transposed(a.dv, b, kv_head, j0, n, a.Dv, s.dv_t, 1.0f);
      }
    }
    for (int64_t r = 0; want_dq && r < count; ++r) {
      bf16_t* out = (bf16_t*)a.dq.data + b * a.dq.b + s.rows[r].head * a.dq.h + s.rows[r].index * a.dq.t;
      for_lanes<VF>(a.D, [&](int64_t d, auto n) { store(out + d, VF(load<VF>(s.dq + r * Dp + d) * (float)a.scale), n); });
    }
  }

  // As Bwd::run: whole heads, or ranges of keys and of rows where heads are too few for the threads.
  void run() const {
    const int64_t heads = a.B * a.Hkv, key_tiles = ceil_div(a.S, kSpan), row_blocks = ceil_div(rows, kBlock);
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
      const int64_t part = dkv ? key_pieces : row_pieces, index = dkv ? i : i - first_half;
      const int64_t head = index / part, piece = index % part, b = head / a.Hkv, h = head % a.Hkv;
      if (dkv) {
        const int64_t from = piece * key_tiles / part * kSpan, to = (piece + 1) * key_tiles / part * kSpan;
        task(b, h, 0, rows, from, std::min(a.S, to), false, true);
      } else {
        const int64_t from = piece * row_blocks / part * kBlock, to = (piece + 1) * row_blocks / part * kBlock;
        task(b, h, from, std::min(rows, to) - from, 0, a.S, true, false);
      }
    }
  }
};

void bwd_bf16(const AttentionArgs& a) {
  if (a.B * a.H == 0) return;
  Bwd16{a, Dropout(a.seed, a.dropout_p), up32(a.D), up32(a.Dv), a.H / a.Hkv * a.T}.run();
}

}  // namespace fastlm::FASTLM_ISA::attention
