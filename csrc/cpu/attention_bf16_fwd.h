// Forward on bf16, for inclusion inside a pass of level 3 or 4: no include guard.

namespace fastlm::FASTLM_ISA::attention {

constexpr int64_t kWide = 128;  // keys at a time

struct Fwd16 {
  static constexpr int64_t kGroup = 32;   // query rows at a time: two tiles
  static constexpr int64_t kChunk = 512;  // query rows of a task

  const AttentionArgs& a;
  Dropout dropout;
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
    if (a.mask.data && !mask_tile<VF, kWide>(a.mask, rows, count, j0, n, s.additive, &mask_stride)) return;
    product(s.q + first * Dp, Dp, s.keys, Dp * 16, s.scores, kWide, kGroup, width, Dp, false);
    for (int64_t r = 0; r < count; ++r) {
      const float* additive = a.mask.data ? s.additive + r * mask_stride : nullptr;
      const float factor = softmax(s, first + r, r, std::min(n, rows[r].limit - j0), j0, width, additive);
      float* out = s.out + (first + r) * Dvp;
      if (factor != 1.0f)
        for (int64_t d = 0; d < Dvp; d += 16) store(out + d, VF(load<VF>(out + d) * factor));
    }
    if (open_values && (a.mask.data || limit.least < j0 + n))
      add_open_values(s, first, count, n, open_values);
    else
      product(s.p, kWide, s.values, up32(n) * 16, s.out + first * Dvp, Dvp, kGroup, Dvp, width, true);
  }

  // Row r's scores become weights relative to its new running maximum, in bf16; returns what earlier sums shrink by.
  float softmax(const Scratch& s, int64_t row, int64_t r, int64_t n, int64_t j0, int64_t width,
                const float* additive) const {
    float* x = s.scores + r * kWide;
    float scale = (float)std::abs(a.scale * 1.4426950408889634);
    if (additive) {
      for (int64_t j = 0; j < n; j += 16)
        store(x + j, masked<VF>(load<VF>(x + j) * scale, load<VF>(additive + j)));
      scale = 1.0f;
    }
    const __m512 closed = _mm512_set1_ps(minus_infinity<float>);
    __m512 m = closed;
    int64_t j = 0;
    for (; j + 16 <= n; j += 16) m = _mm512_max_ps(m, _mm512_loadu_ps(x + j));
    if (j < n) m = _mm512_mask_max_ps(m, first16(n - j), m, _mm512_loadu_ps(x + j));
    const float old = s.maximum[row], now = std::max(old, _mm512_reduce_max_ps(m) * scale);
    const float pivot = now == minus_infinity<float> ? 0.0f : now;
    const float factor = old == now ? 1.0f : exp2(set1<VF>(old - pivot))[0];
    s.maximum[row] = now;
    alignas(64) float keep[kWide];
    if (a.dropout_p > 0) dropout.factors(s.rows[row].id, j0, width, keep);
    const __m512 c = _mm512_set1_ps(scale), shift = _mm512_set1_ps(-pivot);
    __m512 sum0 = _mm512_mul_ps((__m512)s.sum[row], _mm512_set1_ps(factor)), sum1 = _mm512_setzero_ps();
    for (int64_t i = 0; i < width; i += 32) {
      __m512 e0 = exp2_short(_mm512_fmadd_ps(_mm512_loadu_ps(x + i), c, shift), first16(n - i));
      __m512 e1 = exp2_short(_mm512_fmadd_ps(_mm512_loadu_ps(x + i + 16), c, shift), first16(n - i - 16));
      sum0 = _mm512_add_ps(sum0, e0);
      sum1 = _mm512_add_ps(sum1, e1);
      if (a.dropout_p > 0) {
        e0 = _mm512_mul_ps(e0, _mm512_load_ps(keep + i));
        e1 = _mm512_mul_ps(e1, _mm512_load_ps(keep + i + 16));
      }
      _mm512_storeu_si512(s.p + r * kWide + i, (__m512i)_mm512_cvtne2ps_pbh(e1, e0));
    }
    s.sum[row] = (VF)_mm512_add_ps(sum0, sum1);
    return factor;
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
    const uint16_t sign = a.scale < 0 ? 0x8000 : 0;  // the scale itself stays positive, for the maximum's sake
    int64_t end = 0;
    for (int64_t r = 0; r < count; ++r) {
      const Row row = s.rows[r] = row_of(a, b, kv_head, first + r);
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

void fwd_bf16(const AttentionArgs& a) { Fwd16{a, Dropout(a.seed, a.dropout_p), up32(a.D), up32(a.Dv), 0}.run(); }

}  // namespace fastlm::FASTLM_ISA::attention
