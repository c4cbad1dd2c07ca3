// rms_norm and add_rms_norm, forward and backward: the kernels of norm.cuh without the mean.

#include "norm_backward.cuh"
#include "norm_forward.cuh"

namespace fastlm::cuda {

void rms_norm_fwd(const NormArgs& args) { norm::forward<false>("rms_norm_fwd", args); }
void rms_norm_bwd(const NormArgs& args) { norm::backward<false>("rms_norm_bwd", args); }

}  // namespace fastlm::cuda
