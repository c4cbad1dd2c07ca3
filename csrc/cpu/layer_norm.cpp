// Layer normalization, alone and fused with the residual addition (and dropout) before it.
//
// Forward, a row: z = residual + dropout(x); mean, then variance from the centred values (two passes, so a mean of
// 1000 costs nothing); y = (z - mean) rstd w + b. One read of each input and one write of each output reach memory:
// the second and third pass find the row in cache.
// Backward, a row, with g = dy w and xhat = (z - mean) rstd:
//   dz = rstd (g - mean(g) - xhat mean(g xhat)) + dz_in,   dw = sum dy xhat,   db = sum dy.
// Measured on two threads, freed memory kept, against PyTorch:
// - Large outputs are streamed past the caches: at 16384x1024 in fp32 forward 1.5 times its speed, where it was 1.1.
// - Forward the next row is asked for during this one, and members are copied before loops: 4096x768 in fp32 1.12 to
//   1.29 times.
// - 16-bit rows are converted once for the three passes forward: 4096x768 in bf16 1.19 to 1.69 times, and to 2.2 where
//   one instruction converts two vectors to bf16, which made backward 1.1 times as fast.
// - Backward takes a row at a time, so that memory sees one stream an array, and asks for the row after next in the
//   second-level cache. Two rows at a time touched the partial sums of dw and db half as often, but, asking the first
//   level, took 1.5 times as long at 16384x1024 in fp32 and 1.15 times at 4096x768. There streaming gained another 1.5,
//   or 1.3 with what reads the gradient next: in all 1.3 to 2.3 times PyTorch's speed, and 1.6 to 2.5 at 16384x1024.
// - With SSE2 alone bf16 is as fast forward and 1.6 times as fast backward; before converting took less than half the
//   instructions, 0.6 and 0.9 to 1.05 times.
// Partial sums of dw and db belong to chunks of rows fixed by M alone and are added in order: same bits for any number
// of threads.

#include "cpu/attention.h"
#include "cpu/isa.h"
#include "cpu/ops.h"

#ifndef FASTLM_ISA
#define FASTLM_WANT_BF16  // for its conversion to bf16
#define FASTLM_FILE "cpu/layer_norm.cpp"
#include "cpu/foreach_isa.h"
#endif

#ifdef FASTLM_ISA
#if FASTLM_ISA_LEVEL <= 3  // there is nothing to multiply with tiles
#include "cpu/norm.h"

namespace fastlm::FASTLM_ISA {

namespace layer_norm {

using namespace norm;

// Methods copy the members that their loops use: behind `this` each would be read again after every store.
template <class TX, class TR, class TY>
struct Fwd {
  using V = vec_of<TR>;
  using S = scalar_of<TR>;
  static constexpr bool kWiden = sizeof(TR) < sizeof(S);
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

  // z = residual + dropout(x)
  void add(int64_t i) const {
    constexpr int64_t kBlock = 64;
    S factor[kBlock];
    const int64_t N = this->N;
    const TX* branch = x + i * N;
    const TR* stream = residual + i * N;
    TR* sum = z + i * N;
    for (int64_t first = 0; first < N; first += kBlock) {
      const int64_t n_block = std::min(kBlock, N - first);
      const bool drops = p > 0;
      if (drops) dropout.factors(i, first, n_block, factor);
      for_lanes<V>(n_block, [&](int64_t k, auto n) {
        const int64_t j = first + k;
        prefetch(branch + N, j);
        prefetch(stream + N, j);
        V v = load<V>(branch + j, n);
        if (drops) v *= load<V>(factor + k, n);
        store(sum + j, V(load<V>(stream + j, n) + v), n);
      });
    }
  }

  // `wide` has room for a row in the compute type: 16-bit values are converted once for the three passes.
  template <bool STREAM>
  void row(int64_t i, S* wide) const {
    const int64_t N = this->N;
    const S *w = this->w, *b = this->b;
    if (residual) add(i);
    const TR* in = residual ? z + i * N : reinterpret_cast<const TR*>(x) + i * N;
    TY* out = y + i * N;
    const S rough = row_sum<V>(N, [&](int64_t j, auto n) {
                      prefetch(in + N, j);
                      const V v = load<V>(in + j, n);
                      if constexpr (kWiden) store(wide + j, v, n);
                      return v;
                    }) / N;
    const S spread = row_sum<V>(N, [&](int64_t j, auto n) {
                       if constexpr (!STREAM) prefetch(out + N, j);
                       const V d = (kWiden ? load<V>(wide + j, n, rough) : load<V>(in + j, n, rough)) - rough;
                       return d * d;
                     }) / N;
    const bool nearly_constant = __builtin_expect(spread * kNearlyConstant <= rough * rough && rough != 0, 0);
    const auto [mean, var] = nearly_constant ? corrected(in, rough) : std::pair{rough, spread};
    const S rstd = S(1) / std::sqrt(var + S(eps));
    const auto normed = [&](int64_t j, auto n) __attribute__((always_inline)) {
      const V v = ((kWiden ? load<V>(wide + j, n) : load<V>(in + j, n)) - mean) * rstd;
      return V(v * load<V>(w + j, n) + load<V>(b + j, n));
    };
    constexpr std::integral_constant<int64_t, lanes<V>> whole;
    int64_t first = 0;
    for (; first + 2 * whole <= N; first += 2 * whole)
      put_two<STREAM>(out + first, normed(first, whole), normed(first + whole, whole));
    for_lanes<V>(N - first, [&](int64_t j, auto n) {
      store_or_stream<STREAM>(out + first + j, normed(first + j, n), n);
    });
    if (mean_out) {
      mean_out[i] = mean;
      rstd_out[i] = rstd;
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

  S* room() const { return kWiden ? (S*)attention_scratch(N * sizeof(S)) : nullptr; }

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

template <class TX, class TR, class TY>
struct Bwd {
  using V = vec_of<TR>;
  using S = scalar_of<TR>;
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

  // Row i; sum_w and sum_b are this chunk's partial sums.
  template <bool STREAM>
  void row(int64_t i, S* sum_w, S* sum_b) const {
    constexpr int64_t kAhead = 2;  // rows
    const int64_t N = this->N;
    const S *w = this->w, m = mean[i], s = rstd[i];
    const TY* dy = this->dy + i * N;
    const TR* z = this->z + i * N;
    const TR* more = dz_in ? dz_in + i * N : nullptr;
    TR* out = dz + i * N;
    V a[2]{}, b[2]{};
    const auto add = [&](int k, int64_t j, auto n) __attribute__((always_inline)) {
      const V g = load<V>(dy + j, n) * load<V>(w + j, n);
      a[k] += g;
      b[k] += g * (load<V>(z + j, n, m) - m);
    };
    constexpr std::integral_constant<int64_t, lanes<V>> whole;
    int64_t first = 0;
    for (; first + 2 * whole <= N; first += 2 * whole) add(0, first, whole), add(1, first + whole, whole);
    for_lanes<V>(N - first, [&](int64_t j, auto n) { add(0, first + j, n); });
    const S c1 = reduce_add(a[0] + a[1]) / N, c2 = reduce_add(b[0] + b[1]) * s / N;
    const auto gradient = [&](int64_t j, auto n) __attribute__((always_inline)) {
      prefetch<2>(dy + kAhead * N, j);
      prefetch<2>(z + kAhead * N, j);
      const V g = load<V>(dy + j, n);
      const V xhat = (load<V>(z + j, n) - m) * s;
      store(sum_w + j, V(load<V>(sum_w + j, n) + g * xhat), n);
      store(sum_b + j, V(load<V>(sum_b + j, n) + g), n);
      V d = (g * load<V>(w + j, n) - c1 - xhat * c2) * s;
      if (more) d += load<V>(more + j, n);
      return d;
    };
    for (first = 0; first + 2 * whole <= N; first += 2 * whole)
      put_two<STREAM>(out + first, gradient(first, whole), gradient(first + whole, whole));
    for_lanes<V>(N - first, [&](int64_t j, auto n) {
      store_or_stream<STREAM>(out + first + j, gradient(first + j, n), n);
    });
    if (dx) dropped(i);
  }

  void dropped(int64_t row) const {
    constexpr int64_t kBlock = 64;
    S factor[kBlock];
    for (int64_t first = 0; first < N; first += kBlock) {
      const int64_t n_block = std::min(kBlock, N - first), at = row * N + first;
      if (p > 0) dropout.factors(row, first, n_block, factor);
      for_lanes<V>(n_block, [&](int64_t k, auto n) {
        V v = load<V>(dz + at + k, n);
        if (p > 0) v *= load<V>(factor + k, n);
        store(dx + at + k, v, n);
      });
    }
  }

  template <bool STREAM>
  void run() const {
    const int64_t size = chunk_rows(M), chunks = ceil_div(M, size);
#pragma omp parallel for schedule(static) if (M * N > kParallelGrain)
    for (int64_t c = 0; c < chunks; ++c) {
      S *sum_w = partial + c * 2 * N, *sum_b = sum_w + N;
      std::fill(sum_w, sum_w + 2 * N, S(0));
      const int64_t end = std::min(M, (c + 1) * size);
      for (int64_t i = c * size; i < end; ++i) row<STREAM>(i, sum_w, sum_b);
    }
    if (!dw) return;
    add_partials(partial, 2 * N, chunks, N, dw);
    add_partials(partial + N, 2 * N, chunks, N, db);
  }
};

template <class TX, class TR, class TY>
void bwd(const void* dy, const void* z, const void* w, const void* mean, const void* rstd, const void* dz_in, void* dz,
         void* dx, void* partial, void* dw, void* db, int64_t M, int64_t N, double p, int64_t seed) {
  using S = scalar_of<TR>;
  const Bwd<TX, TR, TY> all{(const TY*)dy, (const TR*)z, (const S*)w, (const S*)mean, (const S*)rstd, (const TR*)dz_in,
                            (TR*)dz, (TX*)dx, (S*)partial, (S*)dw, (S*)db, M, N, p, Dropout(seed, p)};
  const bool stream = !dx && streams((const TR*)dz, M, N, dz_in ? 4 : 3);  // dx is made from dz
  stream ? all.template run<true>() : all.template run<false>();
}

template <class TX, class TR, class TY>
void fwd(const void* x, const void* residual, const void* w, const void* b, void* z, void* y, void* mean,
             void* rstd, int64_t M, int64_t N, double eps, double p, int64_t seed) {
  using S = scalar_of<TR>;
  const Fwd<TX, TR, TY> all{(const TX*)x, (const TR*)residual, (const S*)w, (const S*)b, (TR*)z, (TY*)y,
                            (S*)mean, (S*)rstd, M, N, eps, p, Dropout(seed, p)};
  streams((const TY*)y, M, N, residual ? 4 : 2) ? all.template run<true>() : all.template run<false>();
}

// The storage types that meet in one call: all alike, or a 16-bit x and y around an fp32 residual stream.
#define FASTLM_TYPES(fn, ...)                                                                      \
  switch (x_type * 16 + r_type * 4 + y_type) {                                                     \
    case 0x00: return fn<float, float, float>(__VA_ARGS__);                                        \
    case 0x15: return fn<double, double, double>(__VA_ARGS__);                                     \
    case 0x2a: return fn<bf16_t, bf16_t, bf16_t>(__VA_ARGS__);                                     \
    case 0x3f: return fn<f16_t, f16_t, f16_t>(__VA_ARGS__);                                        \
    case 0x20: return fn<bf16_t, float, float>(__VA_ARGS__);                                       \
    case 0x22: return fn<bf16_t, float, bf16_t>(__VA_ARGS__);                                      \
    case 0x02: return fn<float, float, bf16_t>(__VA_ARGS__);                                       \
    case 0x30: return fn<f16_t, float, float>(__VA_ARGS__);                                        \
    case 0x33: return fn<f16_t, float, f16_t>(__VA_ARGS__);                                        \
    case 0x03: return fn<float, float, f16_t>(__VA_ARGS__);                                        \
  }

void fwd_dispatch(const void* x, const void* residual, const void* w, const void* b, void* z, void* y, void* mean,
                  void* rstd, int64_t M, int64_t N, double eps, double p, int64_t seed, int x_type, int r_type,
                  int y_type) {
  FASTLM_TYPES(fwd, x, residual, w, b, z, y, mean, rstd, M, N, eps, p, seed)
}
void bwd_dispatch(const void* dy, const void* z, const void* w, const void* mean, const void* rstd, const void* dz_in,
                  void* dz, void* dx, void* partial, void* dw, void* db, int64_t M, int64_t N, double p, int64_t seed,
                  int x_type, int r_type, int y_type) {
  FASTLM_TYPES(bwd, dy, z, w, mean, rstd, dz_in, dz, dx, partial, dw, db, M, N, p, seed)
}
#undef FASTLM_TYPES

}  // namespace layer_norm
}  // namespace fastlm::FASTLM_ISA
#endif

#else

#include "cpu/convert.h"

namespace fastlm {

void layer_norm_fwd(const void* x, const void* residual, const void* w, const void* b, void* z, void* y, void* mean,
                    void* rstd, int64_t M, int64_t N, double eps, double p, int64_t seed, int x_type, int r_type,
                    int y_type, int w_type) {
  const AsCompute wc(w, N, w_type, r_type, 1.0), bc(b, N, w_type, r_type, -0.0);  // adding -0 keeps the sign of a 0
  FASTLM_DISPATCH_BF16(layer_norm::fwd_dispatch, x, residual, wc.data, bc.data, z, y, mean, rstd, M, N, eps, p, seed,
                       x_type, r_type, y_type);
}

void layer_norm_bwd(const void* dy, const void* z, const void* w, const void* mean, const void* rstd,
                    const void* dz_in, void* dz, void* dx, void* partial, void* dw, void* db, int64_t M, int64_t N,
                    double p, int64_t seed, int x_type, int r_type, int y_type, int w_type) {
  const AsCompute wc(w, N, w_type, r_type, 1.0);
  FASTLM_DISPATCH_BF16(layer_norm::bwd_dispatch, dy, z, wc.data, mean, rstd, dz_in, dz, dx, partial, dw, db, M, N, p,
                       seed, x_type, r_type, y_type);
}

}  // namespace fastlm
#endif
