// Conversion of small vectors, in the instruction set in force.

#include "cpu/isa.h"

#ifndef FASTLM_ISA
#define FASTLM_FILE "cpu/convert.cpp"
#include "cpu/foreach_isa.h"
#endif

#ifdef FASTLM_ISA
namespace fastlm::FASTLM_ISA {

namespace convert {

void widen(const bf16_t* x, float* y, int64_t size) {
  for_lanes<VF>(size, [&](int64_t j, auto n) { store(y + j, load<VF>(x + j, n), n); });
}

}  // namespace convert
}  // namespace fastlm::FASTLM_ISA

#else

#include "cpu/convert.h"

namespace fastlm {

void widen(const bf16_t* x, float* y, int64_t size) { FASTLM_DISPATCH(convert::widen, x, y, size); }

}  // namespace fastlm
#endif
