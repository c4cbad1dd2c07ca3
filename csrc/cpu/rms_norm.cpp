// RMS normalization (Zhang & Sennrich 2019), alone and fused with the residual addition before it.
//
// Forward, a row: z = x + residual; rstd = 1 / sqrt(mean(z^2) + eps); y = z rstd w.
// Backward, a row, with g = dy w and xhat = z rstd:
//   dz = rstd (g - xhat mean(g xhat)) + dz_in,   dw = sum dy xhat.
// As in layer_norm.cpp rows go one at a time, the next ones are asked for, and large outputs are stored past the caches:
// on two threads of a Zen 4 backward 1.4 to 1.7 times as fast in fp32 and 1.3 to 1.6 times in bf16 as four rows at a
// time, and forward at 16384x1024 in fp32 1.1 to 1.3 times; against PyTorch's composition of operators 7 to 9, 10 to 16
// and 3.3 times. To keep 16-bit rows converted for the second pass gained nothing: there are two, and not three.
// Partial sums of dw belong to chunks of rows fixed by M alone and are added in order: same bits for any number of
// threads.

#include "cpu/isa.h"
#include "cpu/ops.h"

#ifndef FASTLM_ISA
#define FASTLM_WANT_BF16  // for its conversion to bf16
#define FASTLM_FILE "cpu/rms_norm.cpp"
#include "cpu/foreach_isa.h"
#endif

#ifdef FASTLM_ISA
#if FASTLM_ISA_LEVEL <= 3  // there is nothing to multiply with tiles
#include "cpu/norm.h"

namespace fastlm::FASTLM_ISA {

namespace rms_norm {

using namespace norm;

// Methods copy the members that their loops use: behind `this` each would be read again after every store.
template <class TX, class TR, class TY>
struct Fwd {
  using V = vec_of<TR>;
  using S = scalar_of<TR>;
  const TX* x;
  const TR* residual;
  const S* w;
  TR* z;
  TY* y;
  S* rstd_out;
  int64_t M, N;
  double eps;

  // z = residual + x
  void add(int64_t i) const {
    const int64_t N = this->N;
    const TX* branch = x + i * N;
    const TR* stream = residual + i * N;
    TR* sum = z + i * N;
    for_lanes<V>(N, [&](int64_t j, auto n) {
      prefetch(branch + N, j);
      prefetch(stream + N, j);
      store(sum + j, V(load<V>(stream + j, n) + load<V>(branch + j, n)), n);
    });
  }

  template <bool STREAM>
  void row(int64_t i) const {
    const int64_t N = this->N;
    const S* w = this->w;
    if (residual) add(i);
    const TR* in = residual ? z + i * N : reinterpret_cast<const TR*>(x) + i * N;
    TY* out = y + i * N;
    const S square = row_sum<V>(N, [&](int64_t j, auto n) {
                       prefetch(in + N, j);
                       const V v = load<V>(in + j, n);
                       return V(v * v);
                     }) / N;
    const S rstd = S(1) / std::sqrt(square + S(eps));
    const auto normed = [&](int64_t j, auto n) __attribute__((always_inline)) {
      return V(load<V>(in + j, n) * rstd * load<V>(w + j, n));
    };
    constexpr std::integral_constant<int64_t, lanes<V>> whole;
    int64_t first = 0;
    for (; first + 2 * whole <= N; first += 2 * whole)
      put_two<STREAM>(out + first, normed(first, whole), normed(first + whole, whole));
    for_lanes<V>(N - first, [&](int64_t j, auto n) {
      store_or_stream<STREAM>(out + first + j, normed(first + j, n), n);
    });
    if (rstd_out) rstd_out[i] = rstd;
  }

  template <bool STREAM>
  void run() const {
    if (M * N <= kParallelGrain) {  // without OpenMP, whose region of one thread costs as much as a row
      for (int64_t i = 0; i < M; ++i) row<STREAM>(i);
      return;
    }
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < M; ++i) row<STREAM>(i);
  }
};

template <class TX, class TR, class TY>
struct Bwd {
  using V = vec_of<TR>;
  using S = scalar_of<TR>;
  const TY* dy;
  const TR* z;
  const S *w, *rstd;
  const TR* dz_in;
  TR* dz;
  TX* dx;
  S *partial, *dw;
  int64_t M, N;

  // Row i; sum_w is this chunk's partial sum, if there is one.
  template <bool STREAM>
  void row(int64_t i, S* sum_w) const {
    constexpr int64_t kAhead = 2;  // rows
    const int64_t N = this->N;
    const S *w = this->w, s = rstd[i];
    const TY* dy = this->dy + i * N;
    const TR* z = this->z + i * N;
    const TR* more = dz_in ? dz_in + i * N : nullptr;
    TR* out = dz + i * N;
    TX* copy = dx ? dx + i * N : nullptr;
    V a[2]{};
    const auto add = [&](int k, int64_t j, auto n) __attribute__((always_inline)) {
      a[k] += load<V>(dy + j, n) * load<V>(w + j, n) * load<V>(z + j, n);
    };
    constexpr std::integral_constant<int64_t, lanes<V>> whole;
    int64_t first = 0;
    for (; first + 2 * whole <= N; first += 2 * whole) add(0, first, whole), add(1, first + whole, whole);
    for_lanes<V>(N - first, [&](int64_t j, auto n) { add(0, first + j, n); });
    const S c = reduce_add(V(a[0] + a[1])) * s / N;
    const auto gradient = [&](int64_t j, auto n) __attribute__((always_inline)) {
      prefetch<2>(dy + kAhead * N, j);
      prefetch<2>(z + kAhead * N, j);
      const V g = load<V>(dy + j, n), xhat = load<V>(z + j, n) * s;
      if (sum_w) store(sum_w + j, V(load<V>(sum_w + j, n) + g * xhat), n);
      V d = (g * load<V>(w + j, n) - xhat * c) * s;
      if (more) d += load<V>(more + j, n);
      if (copy) store(copy + j, d, n);
      return d;
    };
    for (first = 0; first + 2 * whole <= N; first += 2 * whole)
      put_two<STREAM>(out + first, gradient(first, whole), gradient(first + whole, whole));
    for_lanes<V>(N - first, [&](int64_t j, auto n) {
      store_or_stream<STREAM>(out + first + j, gradient(first + j, n), n);
    });
  }

  template <bool STREAM>
  void run() const {
    const int64_t size = chunk_rows(M), chunks = ceil_div(M, size);
#pragma omp parallel for schedule(static) if (M * N > kParallelGrain)
    for (int64_t c = 0; c < chunks; ++c) {
      S* sum_w = dw ? partial + c * N : nullptr;
      if (dw) std::fill(sum_w, sum_w + N, S(0));
      const int64_t end = std::min(M, (c + 1) * size);
      for (int64_t i = c * size; i < end; ++i) row<STREAM>(i, sum_w);
    }
    if (dw) add_partials(partial, N, chunks, N, dw);
  }
};

template <class TX, class TR, class TY>
void fwd(const void* x, const void* residual, const void* w, void* z, void* y, void* rstd, int64_t M, int64_t N,
             double eps) {
  using S = scalar_of<TR>;
  const Fwd<TX, TR, TY> all{(const TX*)x, (const TR*)residual, (const S*)w, (TR*)z, (TY*)y, (S*)rstd, M, N, eps};
  streams((const TY*)y, M, N, residual ? 4 : 2) ? all.template run<true>() : all.template run<false>();
}

template <class TX, class TR, class TY>
void bwd(const void* dy, const void* z, const void* w, const void* rstd, const void* dz_in, void* dz, void* dx,
             void* partial, void* dw, int64_t M, int64_t N) {
  using S = scalar_of<TR>;
  const Bwd<TX, TR, TY> all{(const TY*)dy, (const TR*)z, (const S*)w, (const S*)rstd, (const TR*)dz_in,
                            (TR*)dz, (TX*)dx, (S*)partial, (S*)dw, M, N};
  streams((const TR*)dz, M, N, dz_in || dx ? 4 : 3) ? all.template run<true>() : all.template run<false>();
}

// The storage types that meet in one call: all alike, or a 16-bit x and y around an fp32 residual stream.
#define FASTLM_TYPES(fn, ...)                                     \
  switch (x_type * 16 + r_type * 4 + y_type) {                    \
    case 0x00: return fn<float, float, float>(__VA_ARGS__);       \
    case 0x15: return fn<double, double, double>(__VA_ARGS__);    \
    case 0x2a: return fn<bf16_t, bf16_t, bf16_t>(__VA_ARGS__);    \
    case 0x3f: return fn<f16_t, f16_t, f16_t>(__VA_ARGS__);       \
    case 0x20: return fn<bf16_t, float, float>(__VA_ARGS__);      \
    case 0x22: return fn<bf16_t, float, bf16_t>(__VA_ARGS__);     \
    case 0x02: return fn<float, float, bf16_t>(__VA_ARGS__);      \
    case 0x30: return fn<f16_t, float, float>(__VA_ARGS__);       \
    case 0x33: return fn<f16_t, float, f16_t>(__VA_ARGS__);       \
    case 0x03: return fn<float, float, f16_t>(__VA_ARGS__);       \
  }

void fwd_dispatch(const void* x, const void* residual, const void* w, void* z, void* y, void* rstd, int64_t M,
                  int64_t N, double eps, int x_type, int r_type, int y_type) {
  FASTLM_TYPES(fwd, x, residual, w, z, y, rstd, M, N, eps)
}
void bwd_dispatch(const void* dy, const void* z, const void* w, const void* rstd, const void* dz_in, void* dz,
                  void* dx, void* partial, void* dw, int64_t M, int64_t N, int x_type, int r_type, int y_type) {
  FASTLM_TYPES(bwd, dy, z, w, rstd, dz_in, dz, dx, partial, dw, M, N)
}
#undef FASTLM_TYPES

}  // namespace rms_norm
}  // namespace fastlm::FASTLM_ISA
#endif

#else

#include "cpu/convert.h"

namespace fastlm {

void rms_norm_fwd(const void* x, const void* residual, const void* w, void* z, void* y, void* rstd, int64_t M,
                  int64_t N, double eps, int x_type, int r_type, int y_type, int w_type) {
  const AsCompute wc(w, N, w_type, r_type, 1.0);
  FASTLM_DISPATCH_BF16(rms_norm::fwd_dispatch, x, residual, wc.data, z, y, rstd, M, N, eps, x_type, r_type, y_type);
}

void rms_norm_bwd(const void* dy, const void* z, const void* w, const void* rstd, const void* dz_in, void* dz,
                  void* dx, void* partial, void* dw, int64_t M, int64_t N, int x_type, int r_type, int y_type,
                  int w_type) {
  const AsCompute wc(w, N, w_type, r_type, 1.0);
  FASTLM_DISPATCH_BF16(rms_norm::bwd_dispatch, dy, z, wc.data, rstd, dz_in, dz, dx, partial, dw, M, N, x_type, r_type,
                       y_type);
}

}  // namespace fastlm
#endif
