// The forward kernels of norm.cuh.
#pragma once

#include "norm.cuh"

namespace fastlm::cuda::norm {

// z = residual + dropout(x) as it is stored, in place of x: elements `column` on of a row.
// Only layer_norm (CENTRED) has dropout.
template <bool CENTRED, class Z, int VEC>
FASTLM_DEVICE void add_residual(Vec<float, VEC>& x, const Vec<float, VEC>& residual, Global<Z> z, int64_t row,
                                int64_t column, int64_t N, const Dropout& dropout) {
  if (CENTRED && dropout.threshold) apply(dropout, row, column, x);
#pragma unroll
  for (int i = 0; i < VEC; ++i) x[i] += residual[i];
  x = rounded<Z>(x);
  write(z + row * N + column, x);
}

struct ForwardArgs {
  Floats x, residual, w, b, y;
  Global<float> mean, rstd;
  int64_t M;
  int N, warps;
  Length length;
  float eps;
  Dropout dropout;
};

template <bool CENTRED>
FASTLM_DEVICE void store_statistics(const ForwardArgs& a, int64_t row, float mean, float rstd, bool writer) {
  if (!writer || !a.rstd) return;
  if (CENTRED) a.mean[row] = mean;
  a.rstd[row] = rstd;
}

// Sums over the elements d of a row without its mean: of d^2, and CENTRED also of d, which is what rounding left of the
// mean. With it, the mean of equal numbers is that number.
template <bool CENTRED>
struct Moments {
  float sums[CENTRED ? 2 : 1];
  FASTLM_DEVICE void add(float d) {
    sums[0] += d * d;
    if constexpr (CENTRED) sums[1] += d;
  }
  // The variance; corrects the mean.
  FASTLM_DEVICE float finish(const Length& length, float& mean) const {
    if constexpr (!CENTRED) return length.divide(sums[0]);
    const float rest = length.divide(sums[CENTRED]), spread = sums[0] - sums[CENTRED] * rest;
    mean += rest;
    return spread < 0 ? 0 : length.divide(spread);
  }
};

template <class Z, int PER, bool CENTRED>
__global__ void __launch_bounds__(kMaxThreads, 1) forward_kernel(ForwardArgs a, Global<Z> z) {
  constexpr int VEC = kVec<Z>;
  const Columns mine = columns_of(a.N / VEC, a.warps);
  const int sums = cluster_size() * a.warps;
  float* buffer = shared_memory<float>();
  if (cluster_size() > 1) sync_cluster();  // every block is there before another writes to it
  const Rows rows = rows_of_grid(a.warps);
  for (int64_t row = rows.row; row < a.M; row += rows.step) {
    Vec<float, VEC> v[PER];
    float sum[1] = {0}, mean = 0;
    load_row(a.x, row * a.N, mine, v);
    if (a.residual.present()) {
      Vec<float, VEC> r[PER];
      read_row(recast<const Z>(a.residual.data), row * a.N, mine, r);
#pragma unroll
      for (int j = 0; j < PER; ++j)
        if (mine.holds(j)) add_residual<CENTRED>(v[j], r[j], z, row, (int64_t)mine.vector(j) * VEC, a.N, a.dropout);
    }
    if constexpr (CENTRED) {  // two passes: one would lose everything to a large mean
#pragma unroll
      for (int j = 0; j < PER; ++j)
#pragma unroll
        for (int i = 0; i < VEC; ++i) sum[0] += v[j][i];
      row_sums(sum, a.warps, buffer);
      mean = a.length.divide(sum[0]);
    }
    Moments<CENTRED> left{};
#pragma unroll
    for (int j = 0; j < PER; ++j)
      if (mine.holds(j))
#pragma unroll
        for (int i = 0; i < VEC; ++i) left.add(v[j][i] - mean);
    row_sums(left.sums, a.warps, buffer + sums);
    const float rstd = inverse_root(left.finish(a.length, mean) + a.eps);
#pragma unroll
    for (int j = 0; j < PER; ++j)
      if (mine.holds(j)) {
#pragma unroll
        for (int i = 0; i < VEC; ++i) v[j][i] = (v[j][i] - mean) * rstd;
        scale_and_shift(a.w, a.b, (int64_t)mine.vector(j) * VEC, v[j]);
        store_floats(a.y, row * a.N + (int64_t)mine.vector(j) * VEC, v[j]);
      }
    store_statistics<CENTRED>(a, row, mean, rstd, mine.first == 0);
    if (!CENTRED) buffer = buffer == shared_memory<float>() ? buffer + 2 * sums : shared_memory<float>();
  }
  if (cluster_size() > 1) sync_cluster();  // none leaves while another writes to it
}

// Any row, three times: VEC elements a thread at a time.
template <class Z, int VEC, bool CENTRED>
__global__ void __launch_bounds__(kMaxThreads, 1) forward_any_kernel(ForwardArgs a, Global<Z> z) {
  const int threads = a.warps * kWarp, first = (a.warps == 1 ? lane_index() : thread_index()) * VEC;
  const Rows rows = rows_of_grid(a.warps);
  const Floats stored = a.residual.present() ? Floats{recast<char>(z), a.residual.type} : a.x;
  float* buffer = shared_memory<float>();
  for (int64_t row = rows.row; row < a.M; row += rows.step) {
    float sum[1] = {0}, mean = 0;
    Moments<CENTRED> left{};
    for (int64_t column = first; column < a.N; column += threads * VEC) {
      Vec<float, VEC> v = load_floats<VEC>(a.x, row * a.N + column);
      if (a.residual.present())
        add_residual<CENTRED>(v, load_floats<VEC>(a.residual, row * a.N + column), z, row, column, a.N, a.dropout);
#pragma unroll
      for (int i = 0; i < VEC; ++i) {
        sum[0] += v[i];
        if (!CENTRED) left.add(v[i]);
      }
    }
    if constexpr (CENTRED) {
      row_sums(sum, a.warps, buffer);
      mean = a.length.divide(sum[0]);
      for (int64_t column = first; column < a.N; column += threads * VEC) {
        const Vec<float, VEC> v = load_floats<VEC, Cache::coherent>(stored, row * a.N + column);
#pragma unroll
        for (int i = 0; i < VEC; ++i) left.add(v[i] - mean);
      }
    }
    row_sums(left.sums, a.warps, buffer + a.warps);
    const float rstd = inverse_root(left.finish(a.length, mean) + a.eps);
    for (int64_t column = first; column < a.N; column += threads * VEC) {
      Vec<float, VEC> v = load_floats<VEC, Cache::coherent>(stored, row * a.N + column);
#pragma unroll
      for (int i = 0; i < VEC; ++i) v[i] = (v[i] - mean) * rstd;
      scale_and_shift(a.w, a.b, column, v);
      store_floats(a.y, row * a.N + column, v);
    }
    store_statistics<CENTRED>(a, row, mean, rstd, first == 0);
    if (!CENTRED) buffer = buffer == shared_memory<float>() ? buffer + 2 * a.warps : shared_memory<float>();
  }
}

template <class Z, bool CENTRED>
void forward_rows(const char* name, Stream on, const ForwardArgs& args, Global<Z> z, const Shape& s) {
  const size_t shared = sizeof(float) * 4 * (size_t)(s.cluster * s.warps);
  const Launch l{name, {grid_of(s, args.M)}, s.threads, shared, on.handle, s.cluster};
  if (s.per == 1) return launch(l, forward_kernel<Z, 1, CENTRED>, args, z);
  launch(l, forward_kernel<Z, kForwardVectors, CENTRED>, args, z);
}

template <class Z, bool CENTRED>
void forward_as(const char* name, Stream on, ForwardArgs args, void* z_data, bool vectors) {
  Global<Z> z = static_cast<Z*>(z_data);
  Shape s;
  if (vectors && shape_of(args.N / kVec<Z>, kForwardVectors, s)) {
    args.warps = s.warps;
    return forward_rows<Z, CENTRED>(name, on, args, z, s);
  }
  s = any_shape(args.N);
  args.warps = s.warps;
  const Launch l{name, {grid_of(s, args.M)}, s.threads, sizeof(float) * 4 * (size_t)s.warps, on.handle};
  if (vectors) return launch(l, forward_any_kernel<Z, kVec<Z>, CENTRED>, args, z);
  launch(l, forward_any_kernel<Z, 1, CENTRED>, args, z);
}

template <bool CENTRED>
void forward(const char* name, const NormArgs& a) {
  if (a.M == 0) return;
  set_device(a.on.device);
  const ForwardArgs args{Floats::of(a.x, a.x_type), Floats::of(a.residual, a.r_type), Floats::of(a.w, a.w_type),
                         Floats::of(a.b, a.w_type), Floats::of(a.y, a.y_type), static_cast<float*>(a.mean),
                         static_cast<float*>(a.rstd), a.M, (int)a.N, 0, Length::of(a.N), (float)a.eps,
                         Dropout::of(a.dropout_p, a.seed)};
  for_type(a.r_type, [&](auto type) {
    using Z = decltype(type);
    const bool vectors = a.N % kVec<Z> == 0 && aligned(a.x, a.residual, a.w, a.b, a.z, a.y);
    forward_as<Z, CENTRED>(name, a.on, args, a.z, vectors);
  });
}

}  // namespace fastlm::cuda::norm
