// layer_norm and add_layer_norm (with dropout), forward and backward: the kernels of norm.cuh with the mean.

#include "norm_backward.cuh"
#include "norm_forward.cuh"

namespace fastlm::cuda {

void layer_norm_fwd(Place at, const void* x, const void* residual, const void* w, const void* b, void* z, void* y,
                    void* mean, void* rstd, int64_t M, int64_t N, double eps, double p, Seed seed, int x_type,
                    int r_type, int y_type, int w_type) {
  if (M == 0) return;
  set_device(at.device);
  const norm::ForwardArgs args{Floats::of(x, x_type), Floats::of(residual, r_type), Floats::of(w, w_type),
                               Floats::of(b, w_type), Floats::of(y, y_type), static_cast<float*>(mean),
                               static_cast<float*>(rstd), M, (int)N, 0, norm::Length::of(N), (float)eps,
                               Dropout::of(p, seed)};
  for_type(r_type, [&](auto type) {
    using Z = decltype(type);
    const bool vectors = N % norm::kVec<Z> == 0 && aligned(x, residual, w, b, z, y);
    norm::forward<Z, true>("layer_norm_fwd", at, args, z, vectors);
  });
}

void layer_norm_bwd(Place at, const void* dy, const void* z, const void* w, const void* mean, const void* rstd,
                    const void* dz_in, void* dz, void* dx, void* partial, void* sums, void* rows, int64_t M, int64_t N,
                    double p, Seed seed, int x_type, int r_type, int y_type, int w_type) {
  if (M == 0) return;
  set_device(at.device);
  const norm::BackwardArgs args{Floats::of(dy, y_type), Floats::of(w, w_type), Floats::of(dz_in, r_type),
                                Floats::of(dx, x_type), static_cast<const float*>(mean),
                                static_cast<const float*>(rstd), static_cast<float*>(partial), M, 0, (int)N, 0,
                                norm::Length::of(N), Dropout::of(p, seed)};
  for_type(r_type, [&](auto type) {
    using Z = decltype(type);
    const bool vectors = N % norm::kVec<Z> == 0 && aligned(dy, z, w, dz_in, dz, dx, partial);
    const int64_t shares = norm::backward<Z, true>("layer_norm_bwd", at, args, z, dz, rows, vectors);
    if (partial) sum_partials(at, partial, sums, shares, 2 * N);
  });
}

int64_t norm_shares(int device, int64_t M, int64_t N) {
  if (M == 0) return 0;
  set_device(device);
  int64_t most = 1;
  for (const int vec : {1, 4, 8}) {
    norm::Shape s;
    most = larger(most, norm::walk_of(M, N, vec).shares);
    if (vec > 1 && norm::shape_of(N / vec, norm::kBackwardFloats / vec, s)) most = larger(most, norm::shares_of(M, s));
  }
  return most;
}

}  // namespace fastlm::cuda
