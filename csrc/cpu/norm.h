// The kernels of layer_norm.cpp (CENTRED) and rms_norm.cpp, which differ in the mean, its gradient and dropout. For
// inclusion inside a pass of foreach_isa.h: no include guard.
//
// Forward, a row: z = residual + dropout(x); the mean, then the variance from the centred values (two passes, so that a
// mean of 1000 costs no digits); y = (z - mean) rstd w + b. One read of each input and one write of each output reach
// memory: the second and third pass find the row in cache.
// Backward, a row, with g = dy w and xhat = (z - mean) rstd:
//   dz = rstd (g - mean(g) - xhat mean(g xhat)) + dz_in,   dw = sum dy xhat,   db = sum dy.
// Rows go one at a time, so that memory sees one stream an array. The next row is prefetched during this one, backward
// the row after next and into the second-level cache; large outputs are streamed past the caches (1.1 to 1.5 times
// PyTorch's speed forward at 16384x1024 in fp32; docs/design/layer_norm.md has what else was tried).
// Partial sums of dw and db belong to chunks of rows fixed by M alone and are added in order: same bits for any number
// of threads.

namespace fastlm::FASTLM_ISA::norm {

// Sum of term(j, n) over elements j to `end` of a row; four accumulators hide the latency of the additions.
template <class V, class F>
inline __attribute__((always_inline)) V part_sum(int64_t j, int64_t end, F&& term) {
  constexpr int64_t L = lanes<V>;
  using whole = std::integral_constant<int64_t, L>;
  V a0{}, a1{}, a2{}, a3{};
  for (; j + 4 * L <= end; j += 4 * L) {
    a0 += term(j, whole{});
    a1 += term(j + L, whole{});
    a2 += term(j + 2 * L, whole{});
    a3 += term(j + 3 * L, whole{});
  }
  for (; j + L <= end; j += L) a0 += term(j, whole{});
  if (j < end) a1 += term(j, end - j);
  return (a0 + a1) + (a2 + a3);
}

// The same over a row of N; parts keep the rounding small where rows are long.
template <class V, class F>
inline __attribute__((always_inline)) lane_t<V> row_sum(int64_t N, F&& term) {
  constexpr int64_t kPart = 8192;
  V sum = part_sum<V>(0, std::min(N, kPart), term);
  for (int64_t j = kPart; j < N; j += kPart) sum += part_sum<V>(j, std::min(N, j + kPart), term);
  return reduce_add(sum);
}

// Prefetches the cache line that begins at element j of a row; between two lines, nothing. LOCALITY 3 is the first-level
// cache, 2 the second.
template <int LOCALITY = 3, class T>
inline void prefetch(const T* row, int64_t j) {
  constexpr int64_t kLine = 64 / sizeof(T);
  if (lanes<vec_of<T>> >= kLine || j % kLine == 0) __builtin_prefetch(row + j, 0, LOCALITY);
}

// out (N) = the sum of `chunks` rows of N, a stride apart, in order.
template <class S>
void add_partials(const S* partial, int64_t stride, int64_t chunks, int64_t N, S* out) {
  using V = vec_of<S>;
  constexpr int64_t kColumns = 256;
#pragma omp parallel for schedule(static) if (chunks * N > kParallelGrain)
  for (int64_t first = 0; first < N; first += kColumns)
    for_lanes<V>(std::min(kColumns, N - first), [&](int64_t k, auto n) {
      V v{};
      for (int64_t c = 0; c < chunks; ++c) v += load<V>(partial + c * stride + first + k, n);
      store(out + first + k, v, n);
    });
}

// Writes f(j, n) to a row of N, two vectors at a time while they last.
template <bool STREAM, class V, class T, class F>
inline __attribute__((always_inline)) void write_row(T* out, int64_t N, F&& f) {
  constexpr std::integral_constant<int64_t, lanes<V>> whole;
  int64_t first = 0;
  for (; first + 2 * whole <= N; first += 2 * whole)
    put_two<STREAM>(out + first, f(first, whole), f(first + whole, whole));
  for_lanes<V>(N - first, [&](int64_t j, auto n) { store_or_stream<STREAM>(out + first + j, f(first + j, n), n); });
}

// Methods copy the members that their loops use: behind `this` each would be read again after every store.
template <bool CENTRED, class TX, class TR, class TY>
struct Forward {
  using V = vec_of<TR>;
  using S = scalar_of<TR>;
  static constexpr bool kWiden = CENTRED && sizeof(TR) < sizeof(S);
  static constexpr S kNearlyConstant = 1 << 24;  // a mean of 4096 standard deviations
  const TX* x;
  const TR* residual;
  const S *w, *b;
  TR* z;
  TY* y;
  S *mean_out, *rstd_out;
  int64_t M, N;
  double eps, p;
  Dropout dropout;

  explicit Forward(const NormArgs& a)
      : x((const TX*)a.x), residual((const TR*)a.residual), w((const S*)a.w), b((const S*)a.b), z((TR*)a.z),
        y((TY*)a.y), mean_out((S*)a.mean), rstd_out((S*)a.rstd), M(a.M), N(a.N), eps(a.eps), p(a.dropout_p),
        dropout(a.seed, a.dropout_p) {}

  // z = residual + dropout(x)
  void add(int64_t i) const {
    constexpr int64_t kBlock = 64;
    S factor[kBlock];
    const int64_t N = this->N;
    const TX* branch = x + i * N;
    const TR* stream = residual + i * N;
    TR* sum = z + i * N;
    const bool drops = CENTRED && p > 0;
    const int64_t block = drops ? kBlock : N;
    for (int64_t first = 0; first < N; first += block) {
      const int64_t n_block = std::min(block, N - first);
      if (drops) dropout.factors(i, first, n_block, factor);
      for_lanes<V>(n_block, [&](int64_t k, auto n) {
        const int64_t j = first + k;
        prefetch(branch + N, j);
        prefetch(stream + N, j);
        const V v = load<V>(branch + j, n), before = load<V>(stream + j, n);
        store(sum + j, drops ? fma(v, load<V>(factor + k, n), before) : V(before + v), n);
      });
    }
  }

  // `wide` has room for a row in the compute type: 16-bit values are converted once for the three passes of CENTRED.
  template <bool STREAM>
  void row(int64_t i, S* wide) const {
    const int64_t N = this->N;
    const S *w = this->w, *b = this->b;
    if (residual) add(i);
    const TR* in = residual ? z + i * N : reinterpret_cast<const TR*>(x) + i * N;
    TY* out = y + i * N;
    const S first = row_sum<V>(N, [&](int64_t j, auto n) {
                      prefetch(in + N, j);
                      const V v = load<V>(in + j, n);
                      if constexpr (kWiden) store(wide + j, v, n);
                      if constexpr (CENTRED) return v;
                      return V(v * v);
                    }) / N;
    if constexpr (CENTRED) {
      const S spread = row_sum<V>(N, [&](int64_t j, auto n) {
                         if constexpr (!STREAM) prefetch(out + N, j);
                         const V d = (kWiden ? load<V>(wide + j, n, first) : load<V>(in + j, n, first)) - first;
                         return d * d;
                       }) / N;
      const bool nearly_constant = __builtin_expect(spread * kNearlyConstant <= first * first && first != 0, 0);
      const auto [mean, var] = nearly_constant ? corrected(in, first) : std::pair{first, spread};
      const S m = mean, rstd = S(1) / std::sqrt(var + S(eps));
      write_row<STREAM, V>(out, N, [&](int64_t j, auto n) __attribute__((always_inline)) {
        const V v = ((kWiden ? load<V>(wide + j, n) : load<V>(in + j, n)) - m) * rstd;
        return V(v * load<V>(w + j, n) + load<V>(b + j, n));
      });
      if (mean_out) mean_out[i] = m;
      if (rstd_out) rstd_out[i] = rstd;
    } else {
      const S rstd = S(1) / std::sqrt(first + S(eps));
      write_row<STREAM, V>(out, N, [&](int64_t j, auto n) __attribute__((always_inline)) {
        return V(load<V>(in + j, n) * rstd * load<V>(w + j, n));
      });
      if (rstd_out) rstd_out[i] = rstd;
    }
  }

  // The mean and variance of a row whose deviations are so small that the mean's own rounding shows in them. The mean of
  // equal numbers becomes that number.
  __attribute__((noinline)) std::pair<S, S> corrected(const TR* row, S rough) const {
    const S mean = rough + row_sum<V>(N, [&](int64_t j, auto n) { return V(load<V>(row + j, n, rough) - rough); }) / N;
    const S var = row_sum<V>(N, [&](int64_t j, auto n) {
                    const V d = load<V>(row + j, n, mean) - mean;
                    return V(d * d);
                  }) / N;
    return {mean, var};
  }

  S* room() const { return kWiden ? (S*)thread_scratch(N * sizeof(S)) : nullptr; }

  template <bool STREAM>
  void run() const {
    if (M * N <= kParallelGrain) {  // without OpenMP, whose region of one thread costs as much as a row
      S* wide = room();
      for (int64_t i = 0; i < M; ++i) row<STREAM>(i, wide);
      return;
    }
#pragma omp parallel
    {
      S* wide = room();
#pragma omp for schedule(static)
      for (int64_t i = 0; i < M; ++i) row<STREAM>(i, wide);
    }
  }
};

template <bool CENTRED, class TX, class TR, class TY>
struct Backward {
  using V = vec_of<TR>;
  using S = scalar_of<TR>;
  static constexpr int64_t kSums = CENTRED ? 2 : 1;  // of a chunk: dw, and db
  const TY* dy;
  const TR* z;
  const S *w, *mean, *rstd;
  const TR* dz_in;
  TR* dz;
  TX* dx;
  S *partial, *dw, *db;
  int64_t M, N;
  double p;
  Dropout dropout;

  explicit Backward(const NormArgs& a)
      : dy((const TY*)a.dy), z((const TR*)a.z), w((const S*)a.w), mean((const S*)a.mean), rstd((const S*)a.rstd),
        dz_in((const TR*)a.dz_in), dz((TR*)a.dz), dx((TX*)a.dx), partial((S*)a.partial), dw((S*)a.dw), db((S*)a.db),
        M(a.M), N(a.N), p(a.dropout_p), dropout(a.seed, a.dropout_p) {}

  // Row i; `sums` are this chunk's partial sums of dw, and of db after them, if they are wanted.
  template <bool STREAM>
  void row(int64_t i, S* sums) const {
    constexpr int64_t kAhead = 2;  // rows
    const int64_t N = this->N;
    const S *w = this->w, m = CENTRED ? mean[i] : S(0), s = rstd[i];
    const TY* dy = this->dy + i * N;
    const TR* z = this->z + i * N;
    const TR* more = dz_in ? dz_in + i * N : nullptr;
    TX* copy = dx && p == 0 ? dx + i * N : nullptr;
    V a[2]{}, b[2]{};
    const auto add = [&](int k, int64_t j, auto n) __attribute__((always_inline)) {
      if constexpr (CENTRED) {
        const V g = load<V>(dy + j, n) * load<V>(w + j, n);
        a[k] += g;
        b[k] += g * (load<V>(z + j, n, m) - m);
      } else {
        b[k] += load<V>(dy + j, n) * load<V>(w + j, n) * load<V>(z + j, n);
      }
    };
    constexpr std::integral_constant<int64_t, lanes<V>> whole;
    int64_t first = 0;
    for (; first + 2 * whole <= N; first += 2 * whole) add(0, first, whole), add(1, first + whole, whole);
    for_lanes<V>(N - first, [&](int64_t j, auto n) { add(0, first + j, n); });
    const S c1 = CENTRED ? reduce_add(a[0] + a[1]) / N : S(0), c2 = reduce_add(b[0] + b[1]) * s / N;
    write_row<STREAM, V>(dz + i * N, N, [&](int64_t j, auto n) __attribute__((always_inline)) {
      prefetch<2>(dy + kAhead * N, j);
      prefetch<2>(z + kAhead * N, j);
      const V g = load<V>(dy + j, n);
      const V xhat = CENTRED ? V((load<V>(z + j, n) - m) * s) : V(load<V>(z + j, n) * s);
      if (sums) {
        store(sums + j, V(load<V>(sums + j, n) + g * xhat), n);
        if constexpr (CENTRED) store(sums + N + j, V(load<V>(sums + N + j, n) + g), n);
      }
      V d;
      if constexpr (CENTRED)
        d = (g * load<V>(w + j, n) - c1 - xhat * c2) * s;
      else
        d = (g * load<V>(w + j, n) - xhat * c2) * s;
      if (more) d += load<V>(more + j, n);
      if (copy) store(copy + j, d, n);
      return d;
    });
    if (CENTRED && dx && p > 0) dropped(i);
  }

  // dx of row i from dz, as it is stored.
  void dropped(int64_t i) const {
    constexpr int64_t kBlock = 64;
    S factor[kBlock];
    for (int64_t first = 0; first < N; first += kBlock) {
      const int64_t n_block = std::min(kBlock, N - first), at = i * N + first;
      dropout.factors(i, first, n_block, factor);
      for_lanes<V>(n_block, [&](int64_t k, auto n) {
        store(dx + at + k, V(load<V>(dz + at + k, n) * load<V>(factor + k, n)), n);
      });
    }
  }

  template <bool STREAM>
  void run() const {
    const int64_t size = chunk_rows(M), chunks = ceil_div(M, size);
#pragma omp parallel for schedule(static) if (M * N > kParallelGrain)
    for (int64_t c = 0; c < chunks; ++c) {
      S* sums = dw ? partial + c * kSums * N : nullptr;
      if (dw) std::fill(sums, sums + kSums * N, S(0));
      const int64_t end = std::min(M, (c + 1) * size);
      for (int64_t i = c * size; i < end; ++i) row<STREAM>(i, sums);
    }
    if (!dw) return;
    add_partials(partial, kSums * N, chunks, N, dw);
    if constexpr (CENTRED) add_partials(partial + N, kSums * N, chunks, N, db);
  }
};

template <bool CENTRED>
void forward(const char* op, const NormArgs& a) {
  for_norm_types(op, a.x_type, a.r_type, a.y_type, [&](auto types) {
    using T = decltype(types);
    const Forward<CENTRED, typename T::x, typename T::stream, typename T::y> all(a);
    streams(all.y, a.M, a.N, a.residual ? 4 : 2) ? all.template run<true>() : all.template run<false>();
  });
}

template <bool CENTRED>
void backward(const char* op, const NormArgs& a) {
  for_norm_types(op, a.x_type, a.r_type, a.y_type, [&](auto types) {
    using T = decltype(types);
    const Backward<CENTRED, typename T::x, typename T::stream, typename T::y> all(a);
    // Dropout reads dz once more, for dx.
    const bool stream = !(a.dx && a.dropout_p > 0) && streams(all.dz, a.M, a.N, a.dz_in || a.dx ? 4 : 3);
    stream ? all.template run<true>() : all.template run<false>();
  });
}

}  // namespace fastlm::FASTLM_ISA::norm
