// RMS normalization (Zhang & Sennrich 2019), alone and fused with the residual addition before it: the kernels of norm.h
// without the mean. 16-bit rows are not kept converted for the second pass, which gained nothing.

#include "cpu/isa.h"
#include "cpu/ops.h"
#include "cpu/scratch.h"

#ifndef FASTLM_ISA
#define FASTLM_WANT_BF16  // for its conversion to bf16
#define FASTLM_FILE "cpu/rms_norm.cpp"
#include "cpu/foreach_isa.h"
#endif

#ifdef FASTLM_ISA
#if FASTLM_ISA_LEVEL <= 3  // there is nothing to multiply with tiles
#include "cpu/norm.h"

namespace fastlm::FASTLM_ISA::rms_norm {

void fwd(const NormArgs& a) { norm::forward<false>("rms_norm_fwd", a); }
void bwd(const NormArgs& a) { norm::backward<false>("rms_norm_bwd", a); }

}  // namespace fastlm::FASTLM_ISA::rms_norm
#endif

#else

#include "cpu/convert.h"

namespace fastlm {

void rms_norm_fwd(const NormArgs& args) {
  NormArgs a = args;
  const AsCompute w(a.w, a.N, a.w_type, a.r_type, 1.0);
  a.w = w.data;
  FASTLM_DISPATCH_BF16(rms_norm::fwd, a);
}

void rms_norm_bwd(const NormArgs& args) {
  NormArgs a = args;
  const AsCompute w(a.w, a.N, a.w_type, a.r_type, 1.0);
  a.w = w.data;
  FASTLM_DISPATCH_BF16(rms_norm::bwd, a);
}

}  // namespace fastlm
#endif
