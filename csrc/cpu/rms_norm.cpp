// RMS normalization (Zhang & Sennrich 2019), alone and fused with the residual addition before it.
//
// Forward, a row: z = x + residual; rstd = 1 / sqrt(mean(z^2) + eps); y = z rstd w.
// Backward, a row, with g = dy w and xhat = z rstd:
//   dz = rstd (g - xhat mean(g xhat)) + dz_in,   dw = sum dy xhat.
// Rows go four at a time, so that the partial sums of dw are read and written once per four rows. Partials belong to
// chunks of rows fixed by M alone and are added in order: same bits for any number of threads.

#include "cpu/isa.h"
#include "cpu/ops.h"

#ifndef FASTLM_ISA
#define FASTLM_FILE "cpu/rms_norm.cpp"
#include "cpu/foreach_isa.h"
#endif

#ifdef FASTLM_ISA
namespace fastlm::FASTLM_ISA {

namespace rms_norm {

// Sum of squares over the row; four accumulators hide the latency of the additions.
template <class V, class T>
inline lane_t<V> square_sum(const T* row, int64_t N) {
  constexpr int64_t L = lanes<V>;
  V a[4] = {};
  int64_t j = 0;
  for (; j + 4 * L <= N; j += 4 * L)
    for (int k = 0; k < 4; ++k) {
      const V v = load<V>(row + j + k * L);
      a[k] += v * v;
    }
  for (; j < N; j += L) {
    const V v = load_n<V>(row + j, std::min(L, N - j), 0);
    a[0] += v * v;
  }
  return reduce_add((a[0] + a[1]) + (a[2] + a[3]));
}

template <class TX, class TR, class TY>
void fwd(const TX* x, const TR* residual, const scalar_of<TR>* w, TR* z, TY* y, scalar_of<TR>* rstd_out, int64_t M,
         int64_t N, double eps) {
  using V = vec_of<TR>;
  using S = scalar_of<TR>;
#pragma omp parallel for schedule(static) if (M * N > kParallelGrain)
  for (int64_t i = 0; i < M; ++i) {
    const TR* row = reinterpret_cast<const TR*>(x) + i * N;
    if (residual) {
      for_lanes<V>(N, [&](int64_t j, auto n) {
        store(z + i * N + j, V(load<V>(residual + i * N + j, n) + load<V>(x + i * N + j, n)), n);
      });
      row = z + i * N;
    }
    const S rstd = S(1) / std::sqrt(square_sum<V>(row, N) / N + S(eps));
    for_lanes<V>(N, [&](int64_t j, auto n) {
      V v = load<V>(row + j, n) * rstd;
      if (w) v *= load<V>(w + j, n);
      store(y + i * N + j, v, n);
    });
    if (rstd_out) rstd_out[i] = rstd;
  }
}

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

  // R rows from row i on; sum_w is this chunk's partial sum.
  template <int R>
  void rows(int64_t i, S* sum_w) const {
    S c[R];
    for (int r = 0; r < R; ++r) {
      const int64_t at = (i + r) * N;
      V a{};
      for_lanes<V>(N, [&](int64_t j, auto n) {
        V g = load<V>(dy + at + j, n);
        if (w) g *= load<V>(w + j, n);
        a += g * load<V>(z + at + j, n);
      });
      c[r] = reduce_add(a) * rstd[i + r] / N;
    }
    for_lanes<V>(N, [&](int64_t j, auto n) {
      const V weight = w ? load<V>(w + j, n) : set1<V>(1);
      V total = sum_w ? load<V>(sum_w + j, n) : V{};
      for (int r = 0; r < R; ++r) {
        const int64_t at = (i + r) * N + j;
        const V g = load<V>(dy + at, n);
        const V xhat = load<V>(z + at, n) * rstd[i + r];
        total += g * xhat;
        V d = (g * weight - xhat * c[r]) * rstd[i + r];
        if (dz_in) d += load<V>(dz_in + at, n);
        store(dz + at, d, n);
        if (dx) store(dx + at, d, n);
      }
      if (sum_w) store(sum_w + j, total, n);
    });
  }

  void run() const {
    const int64_t size = chunk_rows(M), chunks = ceil_div(M, size);
#pragma omp parallel for schedule(static) if (M * N > kParallelGrain)
    for (int64_t c = 0; c < chunks; ++c) {
      S* sum_w = dw ? partial + c * N : nullptr;
      if (dw) std::fill(sum_w, sum_w + N, S(0));
      int64_t i = c * size;
      const int64_t end = std::min(M, i + size);
      for (; i + 4 <= end; i += 4) rows<4>(i, sum_w);
      for (; i < end; ++i) rows<1>(i, sum_w);
    }
    if (!dw) return;
    for_lanes<V>(N, [&](int64_t j, auto n) {
      V v{};
      for (int64_t c = 0; c < chunks; ++c) v += load<V>(partial + c * N + j, n);
      store(dw + j, v, n);
    });
  }
};

template <class TX, class TR, class TY>
void fwd_any(const void* x, const void* residual, const void* w, void* z, void* y, void* rstd, int64_t M, int64_t N,
             double eps) {
  using S = scalar_of<TR>;
  fwd<TX, TR, TY>((const TX*)x, (const TR*)residual, (const S*)w, (TR*)z, (TY*)y, (S*)rstd, M, N, eps);
}

template <class TX, class TR, class TY>
void bwd_any(const void* dy, const void* z, const void* w, const void* rstd, const void* dz_in, void* dz, void* dx,
             void* partial, void* dw, int64_t M, int64_t N) {
  using S = scalar_of<TR>;
  Bwd<TX, TR, TY>{(const TY*)dy, (const TR*)z, (const S*)w, (const S*)rstd, (const TR*)dz_in, (TR*)dz, (TX*)dx,
                  (S*)partial, (S*)dw, M, N}
      .run();
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
  FASTLM_TYPES(fwd_any, x, residual, w, z, y, rstd, M, N, eps)
}
void bwd_dispatch(const void* dy, const void* z, const void* w, const void* rstd, const void* dz_in, void* dz,
                  void* dx, void* partial, void* dw, int64_t M, int64_t N, int x_type, int r_type, int y_type) {
  FASTLM_TYPES(bwd_any, dy, z, w, rstd, dz_in, dz, dx, partial, dw, M, N)
}
#undef FASTLM_TYPES

}  // namespace rms_norm
}  // namespace fastlm::FASTLM_ISA

#else

#include "cpu/convert.h"

namespace fastlm {

void rms_norm_fwd(const void* x, const void* residual, const void* w, void* z, void* y, void* rstd, int64_t M,
                  int64_t N, double eps, int x_type, int r_type, int y_type, int w_type) {
  const AsCompute wc(w, N, w_type, r_type);
  FASTLM_DISPATCH(rms_norm::fwd_dispatch, x, residual, wc.data, z, y, rstd, M, N, eps, x_type, r_type, y_type);
}

void rms_norm_bwd(const void* dy, const void* z, const void* w, const void* rstd, const void* dz_in, void* dz,
                  void* dx, void* partial, void* dw, int64_t M, int64_t N, int x_type, int r_type, int y_type,
                  int w_type) {
  const AsCompute wc(w, N, w_type, r_type);
  FASTLM_DISPATCH(rms_norm::bwd_dispatch, dy, z, wc.data, rstd, dz_in, dz, dx, partial, dw, M, N, x_type, r_type,
                  y_type);
}

}  // namespace fastlm
#endif
