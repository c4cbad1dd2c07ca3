// rms_norm and add_rms_norm, forward and backward: the kernels of norm.cuh without the mean.

#include "norm_backward.cuh"
#include "norm_forward.cuh"

namespace fastlm::cuda {

void rms_norm_fwd(Place at, const void* x, const void* residual, const void* w, void* z, void* y, void* rstd, int64_t M,
                  int64_t N, double eps, int x_type, int r_type, int y_type, int w_type) {
  if (M == 0) return;
  set_device(at.device);
  const norm::ForwardArgs args{Floats::of(x, x_type), Floats::of(residual, r_type), Floats::of(w, w_type),
                               Floats{}, Floats::of(y, y_type), nullptr, static_cast<float*>(rstd), M, (int)N, 0,
                               norm::Length::of(N), (float)eps, Dropout::of(0, {})};
  for_type(r_type, [&](auto type) {
    using Z = decltype(type);
    const bool vectors = N % norm::kVec<Z> == 0 && aligned(x, residual, w, z, y);
    norm::forward<Z, false>("rms_norm_fwd", at, args, z, vectors);
  });
}

void rms_norm_bwd(Place at, const void* dy, const void* z, const void* w, const void* rstd, const void* dz_in, void* dz,
                  void* dx, void* partial, void* sums, void* rows, int64_t M, int64_t N, int x_type, int r_type,
                  int y_type, int w_type) {
  if (M == 0) return;
  set_device(at.device);
  const norm::BackwardArgs args{Floats::of(dy, y_type), Floats::of(w, w_type), Floats::of(dz_in, r_type),
                                Floats::of(dx, x_type), nullptr, static_cast<const float*>(rstd),
                                static_cast<float*>(partial), M, 0, (int)N, 0, norm::Length::of(N), Dropout::of(0, {})};
  for_type(r_type, [&](auto type) {
    using Z = decltype(type);
    const bool vectors = N % norm::kVec<Z> == 0 && aligned(dy, z, w, dz_in, dz, dx, partial);
    const int64_t shares = norm::backward<Z, false>("rms_norm_bwd", at, args, z, dz, rows, vectors);
    if (partial) sum_partials(at, partial, sums, shares, N);
  });
}

}  // namespace fastlm::cuda
