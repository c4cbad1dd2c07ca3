// layer_norm and add_layer_norm (with dropout), forward and backward: the kernels of norm.cuh with the mean.

#include "norm_backward.cuh"
#include "norm_forward.cuh"

namespace fastlm::cuda {

void layer_norm_fwd(const NormArgs& args) { norm::forward<true>("layer_norm_fwd", args); }
void layer_norm_bwd(const NormArgs& args) { norm::backward<true>("layer_norm_bwd", args); }

int64_t norm_partials(int device, int64_t M, int64_t N) {
  if (M == 0) return 0;
  set_device(device);
  int64_t most = 1;
  for (const int vec : {1, 4, 8}) {
    norm::Shape s;
    most = larger(most, norm::walk_of(M, N, vec).splits);
    if (vec > 1 && norm::shape_of(N / vec, norm::kBackwardFloats / vec, s)) most = larger(most, norm::splits_of(M, s));
  }
  return most;
}

}  // namespace fastlm::cuda
