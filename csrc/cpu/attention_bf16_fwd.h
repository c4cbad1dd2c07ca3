// Forward on bf16, for inclusion inside a pass of level 3 or 4: no include guard.

namespace fastlm::FASTLM_ISA::attention {

constexpr int64_t kWide = 256;  // keys at a time

struct Fwd16 {
  static constexpr int64_t kGroup = 32;  // query rows at a time: two tiles

  const AttentionArgs a;  // of one sequence
  Dropout dropout;
  int64_t Dp, Dvp;
  // Scores and their maxima are in the exp2 domain, where a weight costs one multiplication less, but with an additive
  // mask: its lowest number would be infinite there.
  bool natural;
  float unit;   // what turns a score into an exponent of 2
  float scale;  // positive, for the maximum's sake; its sign goes into the queries
  float cap;    // the soft cap

  Fwd16(const AttentionArgs& all, int64_t b)
      : a(attention_sequence(all, b)), dropout(a.seed, a.dropout_p), Dp(up32(a.D)), Dvp(up32(a.Dv)),
        natural(a.mask.data && a.mask.type != kBool), unit(natural ? log2e<float> : 1.0f),
        scale((float)std::abs(a.scale * exponents())), cap((float)(a.softcap * exponents())) {}

  double exponents() const { return natural ? 1.0 : log2e<double>; }

  struct Scratch {
    bf16_t *q, *keys, *values, *p;
    float *out, *maximum, *scores, *additive;
    VF* sum;
    Row* rows;
    Reach* reaches;  // of groups
    bool* begun;     // groups that have added to `out`
  };

  Scratch scratch(Arena& arena, int64_t count) const {
    const int64_t chunk = up32(count);
    Scratch s;
    s.q = arena.take<bf16_t>(chunk * Dp);
    s.keys = arena.take<bf16_t>(kWide * Dp);
    s.values = arena.take<bf16_t>(kWide * Dvp);
    s.p = arena.take<bf16_t>(kGroup * kWide);
    s.out = arena.take<float>(chunk * Dvp);
    s.maximum = arena.take<float>(chunk);
    s.scores = arena.take<float>(kGroup * kWide);
    s.additive = arena.take<float>(kGroup * kWide);
    s.sum = arena.take<VF>(chunk);
    s.rows = arena.take<Row>(chunk);
    s.reaches = arena.take<Reach>(chunk / kGroup);
    s.begun = arena.take<bool>(chunk / kGroup);
    return s;
  }

  // The part of a block of n keys from j0 on that a group works on: columns [from, to), a multiple of 32 each.
  struct Columns {
    int64_t from, to;
  };

  // One group of rows and the n packed keys from j0 on.
  void group(const Scratch& s, int64_t first, int64_t count, int64_t j0, int64_t n, const bf16_t* open_values) const {
    const Row* rows = s.rows + first;
    const Reach reach = s.reaches[first / kGroup];
    const int64_t panel = up32(n) * 16;
    if (!reach.touches(j0, n)) return;
    KeyRange part{0, std::min(n, reach.any.end - j0)};  // not n: that depends on the task
    int64_t mask_stride = 0;
    const Cover cover =
        a.mask.data ? mask_tile<VF, kWide>(a.mask, rows, count, j0, part.end, s.additive, &mask_stride, &part) : Cover::open;
    if (cover == Cover::closed) return;
    const Columns columns{std::max(part.begin, reach.any.begin - j0) / 32 * 32, up32(part.end)};
    const int64_t from = columns.from, width = columns.to - from;
    if (width <= 0) return;
    product(s.q + first * Dp, Dp, s.keys + from * Dp, Dp * 16, s.scores + from, kWide, kGroup, width, Dp, false);
    const float* additive = cover == Cover::mixed ? s.additive : nullptr;
    const bool ready = prepare(s, first, count, j0, part, columns, additive, mask_stride);
    alignas(64) float factor[kGroup], shift[kGroup];
    const uint32_t moved = maxima(s, first, count, j0, part, ready ? 1.0f : scale, factor, shift);
    const bool begun = std::exchange(s.begun[first / kGroup], true);
    for (int64_t r = 0; r < count; ++r) {
      if (begun && moved >> r & 1) {
        float* out = s.out + (first + r) * Dvp;
        for (int64_t d = 0; d < Dvp; d += 16) store(out + d, VF(load<VF>(out + d) * factor[r]));
      }
      const KeyRange open = within(rows[r].keys, j0, part);
      const bool full = open.begin <= from && open.end >= columns.to;
      const auto make = natural ? full ? &Fwd16::weights<true, true> : &Fwd16::weights<false, true>
                                : full ? &Fwd16::weights<true, false> : &Fwd16::weights<false, false>;
      (this->*make)(s, first, r, open, j0, columns, ready ? 1.0f : scale, factor[r], shift[r]);
    }
    if (open_values && (additive || part.begin > 0 || part.end < n || !reach.covers(j0, n))) {
      if (!begun) std::fill_n(s.out + first * Dvp, kGroup * Dvp, 0.0f);
      add_open_values(s, first, count, j0, part, open_values);
    } else {
      product(s.p + from, kWide, s.values + from * 16, panel, s.out + first * Dvp, Dvp, kGroup, Dvp, width, begun);
    }
  }

  // The columns of a part of the keys from j0 on that a row attends by its position.
  static KeyRange within(KeyRange keys, int64_t j0, KeyRange part) {
    return {std::max(part.begin, keys.begin - j0), std::min(part.end, keys.end - j0)};
  }

  // Scores with soft cap and mask, where there is either: scaled then, so that maxima and weights need not.
  bool prepare(const Scratch& s, int64_t first, int64_t count, int64_t j0, KeyRange part, Columns columns,
               const float* additive, int64_t mask_stride) const {
    if (!additive && a.softcap == 0) return false;
    for (int64_t r = 0; r < count; ++r) {
      float* x = s.scores + r * kWide;
      const int64_t end = within(s.rows[first + r].keys, j0, part).end;
      for (int64_t j = columns.from; j < end; j += 16) {
        VF y = load<VF>(x + j) * scale, slope;
        if (a.softcap > 0) y = soft_cap_short(y, cap, &slope);
        if (additive) y = masked<VF>(y, load<VF>(additive + r * mask_stride + j));
        store(x + j, y);
      }
    }
    return true;
  }

  // The running maxima of a group with these scores; shift: minus the maxima, and factor: what earlier sums shrink by.
  // Returns the rows whose maximum moved. Sixteen rows share one reduction.
  uint32_t maxima(const Scratch& s, int64_t first, int64_t count, int64_t j0, KeyRange part, float scale, float* factor,
                  float* shift) const {
    uint32_t moved = 0;
    for (int64_t half = 0; half < count; half += 16) {
      VF largest[16];
      for (int64_t i = 0; i < 16; ++i) {
        const int64_t r = half + i;
        const KeyRange open = r < count ? within(s.rows[first + r].keys, j0, part) : KeyRange{0, 0};
        const float* x = s.scores + r * kWide;
        __m512 m = _mm512_set1_ps(minus_infinity<float>);
        int64_t j = open.begin / 16 * 16;
        if (j < open.begin && j < open.end) {
          m = _mm512_mask_max_ps(m, columns16(open, j), m, _mm512_loadu_ps(x + j));
          j += 16;
        }
        for (; j + 16 <= open.end; j += 16) m = _mm512_max_ps(m, _mm512_loadu_ps(x + j));
        if (j < open.end) m = _mm512_mask_max_ps(m, first16(open.end - j), m, _mm512_loadu_ps(x + j));
        largest[i] = (VF)m;
      }
      reduce_rows<8>(largest);
      const VF old = load<VF>(s.maximum + first + half);
      const VF now = max(largest[0] * scale, old);
      const VF closed = set1<VF>(minus_infinity<float>), pivot = now == closed ? VF{} : now;
      store(s.maximum + first + half, now);
      store(factor + half, exp2((old - pivot) * unit));
      store(shift + half, -pivot);
      moved |= (uint32_t)_mm512_cmp_ps_mask((__m512)old, (__m512)now, _CMP_NEQ_UQ) << half;
    }
    return moved;
  }

  // Row r's scores become weights relative to its maximum, in bf16.
  template <bool kFull, bool kNatural>
  void weights(const Scratch& s, int64_t first, int64_t r, KeyRange open, int64_t j0, Columns columns, float scale,
               float factor, float shift) const {
    const float* x = s.scores + r * kWide;
    bf16_t* p = s.p + r * kWide;
    uint64_t kept[kWide / 64];
    const bool drops = a.dropout_p > 0;
    const int64_t drawn = columns.from / 64 * 64;
    if (drops) dropout.kept(s.rows[first + r].id, j0 + drawn, columns.to - drawn, kept + drawn / 64);
    const __m512 c = _mm512_set1_ps(kNatural ? log2e<float> : scale), d = _mm512_set1_ps(shift);
    const auto exponent = [&](const float* score) {  // an additive mask's scores are ready: their scale is 1
      const __m512 y = _mm512_loadu_ps(score);
      return kNatural ? _mm512_mul_ps(_mm512_add_ps(y, d), c) : _mm512_fmadd_ps(y, c, d);
    };
    __m512 sum0 = _mm512_mul_ps((__m512)s.sum[first + r], _mm512_set1_ps(factor)), sum1 = _mm512_setzero_ps();
    for (int64_t i = columns.from; i < columns.to; i += 32) {
      const __mmask16 open0 = kFull ? 0xffff : columns16(open, i), open1 = kFull ? 0xffff : columns16(open, i + 16);
      const __m512 e0 = exp2_short(exponent(x + i), open0);
      const __m512 e1 = exp2_short(exponent(x + i + 16), open1);
      sum0 = _mm512_add_ps(sum0, e0);
      sum1 = _mm512_add_ps(sum1, e1);
      const __mmask32 added = drops ? (__mmask32)(kept[i / 64] >> i % 64) : ~0u;
      _mm512_storeu_si512(p + i, (__m512i)_mm512_maskz_cvtne2ps_pbh(added, e1, e0));
    }
    s.sum[first + r] = (VF)_mm512_add_ps(sum0, sum1);
  }

  // For keys that are partly closed with an infinity or NaN among their values, which times 0 would be NaN.
  void add_open_values(const Scratch& s, int64_t first, int64_t count, int64_t j0, KeyRange part,
                       const bf16_t* values) const {
    for (int64_t r = 0; r < count; ++r) {
      const KeyRange open = within(s.rows[first + r].keys, j0, part);
      for (int64_t j = open.begin; j < open.end; ++j) {
        const float p = to_float(s.p[r * kWide + j]);
        for (int64_t d = 0; p != 0 && d < a.Dv; ++d)
          s.out[(first + r) * Dvp + d] += p * to_float(values[j * a.v.t + d]);
      }
    }
  }

  void task(const AttentionTask& part) const {
    const int64_t count = part.count;
    const Scratch s = in_scratch([&](Arena& arena) { return scratch(arena, count); });
    const Tiles tiles;
    const uint16_t sign = a.scale < 0 ? 0x8000 : 0;
    list_rows(a, part.kv_head, part.first, count, s.rows);
    for (int64_t r = 0; r < count; ++r) {
      const Row& row = s.rows[r];
      const bf16_t* q = (const bf16_t*)a.q.data + row.head * a.q.h + row.index * a.q.t;
      prefetch_row(q + kAhead * a.q.t, a.D);
      pack_row(q, a.D, sign, s.q + r * Dp);
      s.maximum[r] = minus_infinity<float>;
      s.sum[r] = VF{};
    }
    std::memset((void*)(s.q + count * Dp), 0, (size_t)((up32(count) - count) * Dp) * sizeof(bf16_t));
    std::fill_n(s.begun, up32(count) / kGroup, false);
    if (count % kGroup != 0) std::memset((void*)s.p, 0, kGroup * kWide * sizeof(bf16_t));
    const bf16_t* k = (const bf16_t*)a.k.data + part.kv_head * a.k.h;
    const bf16_t* v = (const bf16_t*)a.v.data + part.kv_head * a.v.h;
    const KeyRange reached = list_reaches(s.rows, count, kGroup, s.reaches);
    for (int64_t j0 = reached.begin / kWide * kWide; j0 < reached.end; j0 += kWide) {
      const int64_t n = std::min(kWide, reached.end - j0);
      pack_columns(k + j0 * a.k.t, a.k.t, n, a.D, s.keys);
      const bool finite = pack_rows(v + j0 * a.v.t, a.v.t, n, a.Dv, s.values);
      for (int64_t r = 0; r < count; r += kGroup)
        group(s, r, std::min(kGroup, count - r), j0, n, finite ? nullptr : v + j0 * a.v.t);
    }
    for (int64_t r = 0; r < count; ++r) finish(s, r);
  }

  void finish(const Scratch& s, int64_t r) const {
    const Row& row = s.rows[r];
    const float sum = reduce_add(s.sum[r]);
    bf16_t* out = (bf16_t*)a.out.data + row.head * a.out.h + row.index * a.out.t;
    if (sum == 0)
      std::memset((void*)out, 0, (size_t)a.Dv * sizeof(bf16_t));
    else
      write_row(s.out + r * Dvp, (float)dropout.scale / sum, a.Dv, out);
    write_lse(a, row.id, natural ? s.maximum[r] : s.maximum[r] / log2e<float>, sum);
  }
};

void fwd_bf16(const AttentionArgs& a) {
#pragma omp parallel for schedule(dynamic) if (a.parallel && a.task_count > 1)
  for (int64_t i = 0; i < a.task_count; ++i) Fwd16(a, a.tasks[i].b).task(a.tasks[i]);
}

}  // namespace fastlm::FASTLM_ISA::attention
