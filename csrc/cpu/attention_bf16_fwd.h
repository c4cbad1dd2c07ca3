// Forward on bf16, for inclusion inside a pass of level 3 or 4: no include guard.

namespace fastlm::FASTLM_ISA::attention {

constexpr int64_t kWide = 256;  // keys at a time

struct Fwd16 {
  static constexpr int64_t kGroup = 32;   // query rows at a time: two tiles
  static constexpr int64_t kChunk = 512;  // query rows of a task

  const AttentionArgs& a;
  Dropout dropout;
  float scale;  // positive, for the maximum's sake, and in the exp2 domain; its sign goes into the queries
  int64_t Dp, Dvp, chunk;

  struct Scratch {
    bf16_t *q, *keys, *values, *p;
    float *out, *maximum, *scores, *additive;
    VF* sum;
    Row* rows;
  };

  Scratch scratch(Arena& arena) const {
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
    return s;
  }

  // One group of rows and the n packed keys from j0 on.
  void group(const Scratch& s, int64_t first, int64_t count, int64_t j0, int64_t n, const bf16_t* open_values) const {
    const Row* rows = s.rows + first;
    const Limits limit = limits(rows, count);
    if (limit.most <= j0) return;
    const int64_t width = up32(std::min(n, limit.most - j0));
    int64_t mask_stride = 0;
    const Cover cover =
        a.mask.data ? mask_tile<VF, kWide>(a.mask, rows, count, j0, n, s.additive, &mask_stride) : Cover::open;
    if (cover == Cover::closed) return;
    product(s.q + first * Dp, Dp, s.keys, Dp * 16, s.scores, kWide, kGroup, width, Dp, false);
    const float* additive = cover == Cover::mixed ? s.additive : nullptr;
    alignas(64) float factor[kGroup], shift[kGroup];
    const uint32_t moved = maxima(s, first, count, j0, n, width, additive, mask_stride, factor, shift);
    for (int64_t r = 0; r < count; ++r) {
      if (moved >> r & 1) {
        float* out = s.out + (first + r) * Dvp;
        for (int64_t d = 0; d < Dvp; d += 16) store(out + d, VF(load<VF>(out + d) * factor[r]));
      }
      const int64_t open = std::min(n, rows[r].limit - j0);
      if (open < width)
        weights<false>(s, first, r, open, j0, width, additive ? 1.0f : scale, factor[r], shift[r]);
      else
        weights<true>(s, first, r, open, j0, width, additive ? 1.0f : scale, factor[r], shift[r]);
    }
    if (open_values && (additive || limit.least < j0 + n))
      add_open_values(s, first, count, n, open_values);
    else
      product(s.p, kWide, s.values, up32(n) * 16, s.out + first * Dvp, Dvp, kGroup, Dvp, width, true);
  }

  // The running maxima of a group with these scores, to which the mask is added on the way; shift: minus the maxima, and
  // factor: what earlier sums shrink by. Returns the rows whose maximum moved. Sixteen rows share one reduction.
  uint32_t maxima(const Scratch& s, int64_t first, int64_t count, int64_t j0, int64_t n, int64_t width,
                  const float* additive, int64_t mask_stride, float* factor, float* shift) const {
    uint32_t moved = 0;
    for (int64_t part = 0; part < count; part += 16) {
      VF largest[16];
      for (int64_t i = 0; i < 16; ++i) {
        const int64_t r = part + i, open = r < count ? std::min(n, s.rows[first + r].limit - j0) : 0;
        float* x = s.scores + r * kWide;
        if (additive)
          for (int64_t j = 0; j < open; j += 16)
            store(x + j, masked<VF>(load<VF>(x + j) * scale, load<VF>(additive + r * mask_stride + j)));
        __m512 m = _mm512_set1_ps(minus_infinity<float>);
        int64_t j = 0;
        for (; j + 16 <= open; j += 16) m = _mm512_max_ps(m, _mm512_loadu_ps(x + j));
        if (j < open) m = _mm512_mask_max_ps(m, first16(open - j), m, _mm512_loadu_ps(x + j));
        largest[i] = (VF)m;
      }
      reduce_rows<8>(largest);
      const VF old = load<VF>(s.maximum + first + part);
      const VF now = max(largest[0] * (additive ? 1.0f : scale), old);
      const VF closed = set1<VF>(minus_infinity<float>), pivot = now == closed ? VF{} : now;
      store(s.maximum + first + part, now);
      store(factor + part, exp2(old - pivot));
      store(shift + part, -pivot);
      moved |= (uint32_t)_mm512_cmp_ps_mask((__m512)old, (__m512)now, _CMP_NEQ_UQ) << part;
    }
    return moved;
  }

  // Row r's scores become weights relative to its maximum, in bf16.
  template <bool kFull>
  void weights(const Scratch& s, int64_t first, int64_t r, int64_t open, int64_t j0, int64_t width, float scale,
               float factor, float shift) const {
    const float* x = s.scores + r * kWide;
    alignas(64) float keep[kWide];
    if (a.dropout_p > 0) dropout.factors(s.rows[first + r].id, j0, width, keep);
    const __m512 c = _mm512_set1_ps(scale), d = _mm512_set1_ps(shift);
    __m512 sum0 = _mm512_mul_ps((__m512)s.sum[first + r], _mm512_set1_ps(factor)), sum1 = _mm512_setzero_ps();
    for (int64_t i = 0; i < width; i += 32) {
      const __mmask16 open0 = kFull ? 0xffff : first16(open - i), open1 = kFull ? 0xffff : first16(open - i - 16);
      __m512 e0 = exp2_short(_mm512_fmadd_ps(_mm512_loadu_ps(x + i), c, d), open0);
      __m512 e1 = exp2_short(_mm512_fmadd_ps(_mm512_loadu_ps(x + i + 16), c, d), open1);
      sum0 = _mm512_add_ps(sum0, e0);
      sum1 = _mm512_add_ps(sum1, e1);
      if (a.dropout_p > 0) {
        e0 = _mm512_mul_ps(e0, _mm512_load_ps(keep + i));
        e1 = _mm512_mul_ps(e1, _mm512_load_ps(keep + i + 16));
      }
      _mm512_storeu_si512(s.p + r * kWide + i, (__m512i)_mm512_cvtne2ps_pbh(e1, e0));
    }
    s.sum[first + r] = (VF)_mm512_add_ps(sum0, sum1);
  }

  // For keys that are partly closed with an infinity or NaN among their values, which times 0 would be NaN.
  void add_open_values(const Scratch& s, int64_t first, int64_t count, int64_t n, const bf16_t* values) const {
    for (int64_t r = 0; r < count; ++r)
      for (int64_t j = 0; j < std::min(n, s.rows[first + r].limit); ++j) {
        const float p = to_float(s.p[r * kWide + j]);
        for (int64_t d = 0; p != 0 && d < a.Dv; ++d)
          s.out[(first + r) * Dvp + d] += p * to_float(values[j * a.v.t + d]);
      }
  }

  void task(int64_t b, int64_t kv_head, int64_t first, int64_t count) const {
    Arena counter{nullptr};
    scratch(counter);
    Arena arena{(char*)attention_scratch(counter.used)};
    const Scratch s = scratch(arena);
    const Tiles tiles;
    const uint16_t sign = a.scale < 0 ? 0x8000 : 0;
    list_rows(a, b, kv_head, first, count, s.rows);
    int64_t end = 0;
    for (int64_t r = 0; r < count; ++r) {
      const Row& row = s.rows[r];
      const bf16_t* q = (const bf16_t*)a.q.data + b * a.q.b + row.head * a.q.h + row.index * a.q.t;
      prefetch_row(q + kAhead * a.q.t, a.D);
      pack_row(q, a.D, sign, s.q + r * Dp);
      s.maximum[r] = minus_infinity<float>;
      s.sum[r] = VF{};
      end = std::max(end, row.limit);
    }
    std::memset((void*)(s.q + count * Dp), 0, (size_t)((up32(count) - count) * Dp) * sizeof(bf16_t));
    std::fill(s.out, s.out + up32(count) * Dvp, 0.0f);
    std::memset((void*)s.p, 0, kGroup * kWide * sizeof(bf16_t));
    const bf16_t* k = (const bf16_t*)a.k.data + b * a.k.b + kv_head * a.k.h;
    const bf16_t* v = (const bf16_t*)a.v.data + b * a.v.b + kv_head * a.v.h;
    for (int64_t j0 = 0; j0 < end; j0 += kWide) {
      const int64_t n = std::min(kWide, end - j0);
      pack_columns(k + j0 * a.k.t, a.k.t, n, a.D, s.keys);
      const bool finite = pack_rows(v + j0 * a.v.t, a.v.t, n, a.Dv, s.values);
      for (int64_t r = 0; r < count; r += kGroup)
        group(s, r, std::min(kGroup, count - r), j0, n, finite ? nullptr : v + j0 * a.v.t);
    }
    for (int64_t r = 0; r < count; ++r) finish(s, b, r);
  }

  void finish(const Scratch& s, int64_t b, int64_t r) const {
    const Row& row = s.rows[r];
    const float sum = reduce_add(s.sum[r]), inverse = sum == 0 ? 0.0f : 1.0f / sum;
    bf16_t* out = (bf16_t*)a.out.data + b * a.out.b + row.head * a.out.h + row.index * a.out.t;
    for_lanes<VF>(a.Dv, [&](int64_t d, auto n) { store(out + d, VF(load<VF>(s.out + r * Dvp + d) * inverse), n); });
    if (a.lse)
      ((float*)a.lse)[row.id] =
          sum == 0 ? minus_infinity<float> : (s.maximum[r] + std::log2(sum)) * 0.6931471805599453f;
  }

  void run() {
    if (a.B * a.H * a.T == 0) return;
    const int64_t rows = a.H / a.Hkv * a.T, heads = a.B * a.Hkv;
    int64_t threads = 1;
#ifdef _OPENMP
    threads = omp_get_max_threads();
#endif
    int64_t per_head = std::max(ceil_div(rows, kChunk), std::min(ceil_div(rows, 4 * kGroup), ceil_div(4 * threads, heads)));
    chunk = up32(ceil_div(rows, per_head));
    per_head = ceil_div(rows, chunk);
    const int64_t tasks = heads * per_head;
#pragma omp parallel for schedule(dynamic) if (tasks > 1 && heads * rows * a.S > kParallelGrain)
    for (int64_t i = 0; i < tasks; ++i) {
      const int64_t head = i / per_head, first = (per_head - 1 - i % per_head) * chunk;
      task(head / a.Hkv, head % a.Hkv, first, std::min(chunk, rows - first));
    }
  }
};

void fwd_bf16(const AttentionArgs& a) {
  const float scale = (float)std::abs(a.scale * 1.4426950408889634);
  Fwd16{a, Dropout(a.seed, a.dropout_p), scale, up32(a.D), up32(a.Dv), 0}.run();
}

}  // namespace fastlm::FASTLM_ISA::attention
