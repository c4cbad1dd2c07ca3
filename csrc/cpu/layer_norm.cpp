// Layer normalization (Ba et al. 2016), alone and fused with the residual addition (and dropout) before it: the kernels of
// norm.h with the mean.

#include "cpu/isa.h"
#include "cpu/ops.h"
#include "cpu/scratch.h"

#ifndef FASTLM_ISA
#define FASTLM_WANT_BF16  // for its conversion to bf16
#define FASTLM_FILE "cpu/layer_norm.cpp"
#include "cpu/foreach_isa.h"
#endif

#ifdef FASTLM_ISA
#if FASTLM_ISA_LEVEL <= 3  // there is nothing to multiply with tiles
#include "cpu/norm.h"

namespace fastlm::FASTLM_ISA::layer_norm {

void fwd(const NormArgs& a) { norm::forward<true>("layer_norm_fwd", a); }
void bwd(const NormArgs& a) { norm::backward<true>("layer_norm_bwd", a); }

}  // namespace fastlm::FASTLM_ISA::layer_norm
#endif

#else

#include "cpu/convert.h"

namespace fastlm {

void layer_norm_fwd(const NormArgs& args) {
  NormArgs a = args;
  const AsCompute w(a.w, a.N, a.w_type, a.r_type, 1.0);
  const AsCompute b(a.b, a.N, a.w_type, a.r_type, -0.0);  // adding -0 keeps the sign of a 0
  a.w = w.data, a.b = b.data;
  FASTLM_DISPATCH_BF16(layer_norm::fwd, a);
}

void layer_norm_bwd(const NormArgs& args) {
  NormArgs a = args;
  const AsCompute w(a.w, a.N, a.w_type, a.r_type, 1.0);
  a.w = w.data;
  FASTLM_DISPATCH_BF16(layer_norm::bwd, a);
}

}  // namespace fastlm
#endif
