// Backward on bf16, for inclusion inside a pass of level 3 or 4: no include guard.
//
// dV and dK are computed transposed: dV^T = dO^T P needs P as a right operand, which two rows of P become by one
// shuffle, where dV = P^T dO would need P transposed. attention_bwd.h says what is done about infinities and NaN.

namespace fastlm::FASTLM_ISA::attention {

struct Bwd16 {
  static constexpr int64_t kBlock = 64;  // query rows at a time
  static constexpr int64_t kKeyBlock = 128;  // keys at a time

  const AttentionArgs a;  // of one sequence
  Dropout dropout;
  int64_t Dp, Dvp;

  Bwd16(const AttentionArgs& all, int64_t b)
      : a(attention_sequence(all, b)), dropout(a.seed, a.dropout_p), Dp(up32(a.D)), Dvp(up32(a.Dv)) {}

  struct Scratch {
    bf16_t *q, *dout, *q_t, *dout_t;          // of the task's rows; transposed block by block
    float *dq, *lse, *rest, *delta;           // rest: negative, in the exp2 domain
    bf16_t *keys_t, *keys, *values_t;         // of kKeyBlock keys
    float *dk_t, *dv_t;                       // (Dp, kKeyBlock), (Dvp, kKeyBlock)
    float *scores, *dp, *additive;            // (kBlock, kKeyBlock)
    bf16_t *p_pairs, *ds_pairs, *ds;          // the same
    Row* rows;
    Reach* reaches;                           // of blocks
    bool* finite;                             // whether dO is, of blocks
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
    s.rest = arena.take<float>(n);
    s.delta = arena.take<float>(n);
    s.keys_t = arena.take<bf16_t>(kKeyBlock * Dp);
    s.keys = arena.take<bf16_t>(kKeyBlock * Dp);
    s.values_t = arena.take<bf16_t>(kKeyBlock * Dvp);
    s.dk_t = arena.take<float>(kKeyBlock * Dp);
    s.dv_t = arena.take<float>(kKeyBlock * Dvp);
    s.scores = arena.take<float>(kBlock * kKeyBlock);
    s.dp = arena.take<float>(kBlock * kKeyBlock);
    s.additive = arena.take<float>(kBlock * kKeyBlock);
    s.p_pairs = arena.take<bf16_t>(kBlock * kKeyBlock);
    s.ds_pairs = arena.take<bf16_t>(kBlock * kKeyBlock);
    s.ds = arena.take<bf16_t>(kBlock * kKeyBlock);
    s.rows = arena.take<Row>(n);
    s.reaches = arena.take<Reach>(n / kBlock);
    s.finite = arena.take<bool>(n / kBlock);
    return s;
  }

  static const bf16_t* at(const Heads& x, int64_t h, int64_t t) { return (const bf16_t*)x.data + h * x.h + t * x.t; }

  void load_row(const Scratch& s, int64_t r, const Row& row) const {
    pack_row<true>(at(a.q, row.head, row.index), a.D, 0, s.q + r * Dp);
    s.finite[r / kBlock] &= pack_row(at(a.dout, row.head, row.index), a.Dv, 0, s.dout + r * Dvp);
    const bf16_t* out = at(a.out, row.head, row.index);
    VF sum{};
    for_lanes<VF>(a.Dv, [&](int64_t d, auto n) { sum += load<VF>(s.dout + r * Dvp + d, n) * load<VF>(out + d, n); });
    s.delta[r] = reduce_add(sum) - (a.dlse ? ((const float*)a.dlse)[row.id] : 0.0f);
    const float lse = ((const float*)a.lse)[row.id];
    s.lse[r] = lse == minus_infinity<float> ? -minus_infinity<float> : lse;
    s.rest[r] = a.rest ? ((const float*)a.rest)[row.id] * -log2e<float> : 0.0f;
  }

  // Query rows first to first + count of a key-value head. Returns the keys that they attend by position.
  KeyRange load_rows(const Scratch& s, int64_t kv_head, int64_t first, int64_t count, bool transposed) const {
    const int64_t n = ceil_div(count, kBlock) * kBlock;
    list_rows(a, kv_head, first, count, s.rows);
    std::fill_n(s.finite, n / kBlock, true);
    for (int64_t r = 0; r < count; ++r) load_row(s, r, s.rows[r]);
    for (int64_t r = count; r < n; ++r) {
      s.rows[r] = {0, 0, {0, 0}, 0, 0};
      s.lse[r] = s.rest[r] = s.delta[r] = 0;
      std::memset((void*)(s.q + r * Dp), 0, (size_t)Dp * sizeof(bf16_t));
      std::memset((void*)(s.dout + r * Dvp), 0, (size_t)Dvp * sizeof(bf16_t));
    }
    for (int64_t r = 0; transposed && r < n; r += kBlock) {
      pack_transposed_rows(s.q + r * Dp, kBlock, Dp, s.q_t + r * Dp, kBlock);
      pack_transposed_rows(s.dout + r * Dvp, kBlock, Dvp, s.dout_t + r * Dvp, kBlock);
    }
    return list_reaches(s.rows, count, kBlock, s.reaches);
  }

  // The columns of a part of the keys from j0 on that a row of a block attends by its position.
  static KeyRange within(KeyRange keys, int64_t j0, KeyRange part) {
    return {std::max(part.begin, keys.begin - j0), std::min(part.end, keys.end - j0)};
  }

  // P F / factor (as pairs of rows) and dS (both ways) of rows r and r + 1 of the block that starts at `first`, columns
  // [from, to), of which only those in `part` are open. kPlain: all of them, without mask, dropout and soft cap.
  template <bool kPlain>
  void gradient_of_scores(const Scratch& s, int64_t first, int64_t r, int64_t j0, int64_t from, int64_t to,
                          KeyRange part, const float* additive, int64_t mask_stride) const {
    const __m512 scale = _mm512_set1_ps((float)a.scale), to_exp2 = _mm512_set1_ps(log2e<float>);
    const __m512 closed = _mm512_set1_ps(minus_infinity<float>);
    const float cap = kPlain ? 0.0f : (float)a.softcap;
    const __m512 factor = _mm512_set1_ps((float)dropout.scale);
    const bool drops = !kPlain && a.dropout_p > 0;
    const int64_t drawn = from / 64 * 64;
    uint64_t kept[2][kKeyBlock / 64];
    KeyRange reached[2];
    __m512 lse[2], rest[2], delta[2];
    for (int i = 0; i < 2; ++i) {
      const Row& row = s.rows[first + r + i];
      reached[i] = within(row.keys, j0, part);
      lse[i] = _mm512_set1_ps(s.lse[first + r + i]);
      rest[i] = _mm512_set1_ps(s.rest[first + r + i]);
      delta[i] = _mm512_set1_ps(s.delta[first + r + i]);
      if (drops) dropout.kept(row.id, j0 + drawn, to - drawn, kept[i] + drawn / 64);
    }
    for (int64_t j = from; j < to; j += 16) {
      __m512 p[2], ds[2];
      for (int i = 0; i < 2; ++i) {
        const __m512 product = _mm512_loadu_ps(s.scores + (r + i) * kKeyBlock + j);
        VF slope;
        __mmask16 open = 0xffff;  // keys that the row attends to
        if constexpr (kPlain) {
          const __m512 x = _mm512_fmsub_ps(product, scale, lse[i]);
          p[i] = exp2_short(_mm512_fmadd_ps(x, to_exp2, rest[i]));
        } else {
          VF x = (VF)_mm512_mul_ps(product, scale);
          if (cap > 0) x = soft_cap_short(x, cap, &slope);
          if (additive) x = masked<VF>(x, load<VF>(additive + (r + i) * mask_stride + j));
          open = columns16(reached[i], j);
          if (additive) open = _mm512_mask_cmp_ps_mask(open, (__m512)x, closed, _CMP_NEQ_UQ);
          p[i] = exp2_short(_mm512_fmadd_ps(_mm512_sub_ps((__m512)x, lse[i]), to_exp2, rest[i]), open);
        }
        __m512 g = _mm512_loadu_ps(s.dp + (r + i) * kKeyBlock + j);
        const __mmask16 added = drops ? (__mmask16)(kept[i][j / 64] >> j % 64) : 0xffff;
        if (drops) g = _mm512_maskz_mul_ps(added, g, factor);
        ds[i] = _mm512_maskz_mul_ps(open, p[i], _mm512_sub_ps(g, delta[i]));
        if (cap > 0) ds[i] = _mm512_maskz_mul_ps(open, ds[i], (__m512)slope);
        p[i] = _mm512_maskz_mov_ps(added, p[i]);
        _mm256_storeu_si256((__m256i*)(s.ds + (r + i) * kKeyBlock + j), (__m256i)_mm512_cvtneps_pbh(ds[i]));
      }
      _mm512_storeu_si512(s.p_pairs + j * kBlock + r * 16, pairs(p[0], p[1]));
      _mm512_storeu_si512(s.ds_pairs + j * kBlock + r * 16, pairs(ds[0], ds[1]));
    }
  }

  // dV of the columns [from, to), for rows of dO with an infinity or NaN, which times 0 would be NaN.
  void add_open_rows(const Scratch& s, int64_t first, int64_t from, int64_t to) const {
    for (int64_t r = 0; r < kBlock; ++r)
      for (int64_t j = from; j < to; ++j) {
        const float p = to_float(s.p_pairs[j / 16 * 16 * kBlock + r / 2 * 32 + j % 16 * 2 + r % 2]);
        for (int64_t d = 0; p != 0 && d < a.Dv; ++d)
          s.dv_t[d * kKeyBlock + j] += p * to_float(s.dout[(first + r) * Dvp + d]);
      }
  }

  // A block of `count` rows and the n packed keys from j0 on.
  void block(const Scratch& s, int64_t first, int64_t count, int64_t j0, int64_t n, bool want_dq, bool want_dkv) const {
    const Reach reach = s.reaches[first / kBlock];
    if (!reach.touches(j0, n)) return;
    KeyRange part{0, std::min(n, reach.any.end - j0)};
    int64_t mask_stride = 0;
    const Cover cover = a.mask.data ? mask_tile<VF, kKeyBlock>(a.mask, s.rows + first, count, j0, part.end, s.additive,
                                                           &mask_stride, &part)
                                    : Cover::open;
    if (cover == Cover::closed) return;
    const int64_t from = std::max(part.begin, reach.any.begin - j0) / 32 * 32, to = up32(part.end);
    const int64_t width = to - from, panel = up32(n) * 16;
    if (width <= 0) return;
    product(s.q + first * Dp, Dp, s.keys_t + from * Dp, Dp * 16, s.scores + from, kKeyBlock, kBlock, width, Dp, false);
    product(s.dout + first * Dvp, Dvp, s.values_t + from * Dvp, Dvp * 16, s.dp + from, kKeyBlock, kBlock, width, Dvp, false);
    const bool plain = cover == Cover::open && a.dropout_p == 0 && a.softcap == 0;
    for (int64_t r = 0; r < kBlock; r += 2) {
      const KeyRange one = within(s.rows[first + r].keys, j0, part), two = within(s.rows[first + r + 1].keys, j0, part);
      if (plain && std::max(one.begin, two.begin) <= from && std::min(one.end, two.end) >= to)
        gradient_of_scores<true>(s, first, r, j0, from, to, part, nullptr, 0);
      else
        gradient_of_scores<false>(s, first, r, j0, from, to, part, cover == Cover::mixed ? s.additive : nullptr,
                                  mask_stride);
    }
    if (want_dkv) {
      const int64_t at = from * kBlock;
      if (s.finite[first / kBlock] || (cover == Cover::open && part.begin == 0 && part.end == n && reach.covers(j0, n)))
        product(s.dout_t + first * Dvp, kBlock, s.p_pairs + at, kBlock * 16, s.dv_t + from, kKeyBlock, Dvp, width, kBlock, true);
      else
        add_open_rows(s, first, from, to);
      product(s.q_t + first * Dp, kBlock, s.ds_pairs + at, kBlock * 16, s.dk_t + from, kKeyBlock, Dp, width, kBlock, true);
    }
    if (want_dq) product(s.ds + from, kKeyBlock, s.keys + from * 16, panel, s.dq + first * Dp, Dp, kBlock, Dp, width, true);
  }

  // n rows of x from t on = factor * the transpose of x_t (width, kKeyBlock).
  void write_transposed(const Heads& x, int64_t h, int64_t t, int64_t n, int64_t width, const float* x_t,
                        float factor) const {
    for (int64_t j = 0; j < n; j += 16)
      for (int64_t d = 0; d < width; d += 16) {
        VF square[16];
        for (int64_t i = 0; i < 16; ++i) square[i] = load<VF>(x_t + (d + i) * kKeyBlock + j);
        transpose<8>(square);
        for (int64_t i = 0; i < std::min<int64_t>(16, n - j); ++i) {
          bf16_t* out = (bf16_t*)x.data + h * x.h + (t + j + i) * x.t + d;
          _mm256_mask_storeu_epi16(out, first16(width - d), (__m256i)_mm512_cvtneps_pbh((__m512)(square[i] * factor)));
        }
      }
  }

  void task(const AttentionTask& part) const {
    const int64_t count = part.count, head = part.kv_head;
    const Scratch s = in_scratch([&](Arena& arena) { return scratch(arena, count); });
    const Tiles tiles;
    const KeyRange reached = load_rows(s, head, part.first, count, part.dkv);
    if (part.dq) std::fill(s.dq, s.dq + ceil_div(count, kBlock) * kBlock * Dp, 0.0f);
    for (int64_t j0 = part.j_first; j0 < part.j_end; j0 += kKeyBlock) {
      const int64_t n = std::min(kKeyBlock, part.j_end - j0);
      if (!part.dkv && (j0 >= reached.end || j0 + n <= reached.begin)) continue;
      pack_columns(at(a.k, head, j0), a.k.t, n, a.D, s.keys_t);
      pack_columns(at(a.v, head, j0), a.v.t, n, a.Dv, s.values_t);
      if (part.dq) pack_rows<true>(at(a.k, head, j0), a.k.t, n, a.D, s.keys);
      if (part.dkv) {
        std::fill(s.dk_t, s.dk_t + kKeyBlock * Dp, 0.0f);
        std::fill(s.dv_t, s.dv_t + kKeyBlock * Dvp, 0.0f);
      }
      for (int64_t r = 0; r < count; r += kBlock) block(s, r, std::min(kBlock, count - r), j0, n, part.dq, part.dkv);
      if (part.dkv) {
        write_transposed(a.dk, head, j0, n, a.D, s.dk_t, (float)a.scale);
        write_transposed(a.dv, head, j0, n, a.Dv, s.dv_t, (float)dropout.scale);
      }
    }
    for (int64_t r = 0; part.dq && r < count; ++r) {
      bf16_t* out = (bf16_t*)a.dq.data + s.rows[r].head * a.dq.h + s.rows[r].index * a.dq.t;
      write_row(s.dq + r * Dp, (float)a.scale, a.D, out);
    }
  }
};

void bwd_bf16(const AttentionArgs& a) {
#pragma omp parallel for schedule(dynamic) if (a.parallel && a.task_count > 1)
  for (int64_t i = 0; i < a.task_count; ++i) Bwd16(a, a.tasks[i].b).task(a.tasks[i]);
}

}  // namespace fastlm::FASTLM_ISA::attention
