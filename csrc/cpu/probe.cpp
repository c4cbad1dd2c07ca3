// Windows into vec.h and philox.h for the tests.

#include "cpu/isa.h"
#include "cpu/ops.h"

#ifndef FASTLM_ISA
#define FASTLM_FILE "cpu/probe.cpp"
#include "cpu/foreach_isa.h"
#endif

#ifdef FASTLM_ISA
namespace fastlm::FASTLM_ISA {

namespace probe {

VF erfc(VF x) {
  VF gauss;
  return erfc_positive(x, &gauss);
}

void map(VF (*f)(VF), const float* x, float* y, int64_t size) {
  for_lanes<VF>(size, [&](int64_t j, auto n) { store(y + j, f(load<VF>(x + j, n)), n); });
}

void vec_map(const char* name, const float* x, float* y, int64_t n) {
  if (!std::strcmp(name, "exp")) map(exp, x, y, n);
  if (!std::strcmp(name, "tanh")) map(tanh, x, y, n);
  if (!std::strcmp(name, "erf")) map(erf, x, y, n);
  if (!std::strcmp(name, "erfc")) map(erfc, x, y, n);
  if (!std::strcmp(name, "reciprocal")) map(reciprocal, x, y, n);
}

void dropout_factors(float* out, int64_t M, int64_t N, double p, int64_t seed) {
  const Dropout dropout(seed, p);
  for (int64_t i = 0; i < M; ++i) dropout.factors(i, 0, N, out + i * N);
}

}  // namespace probe
}  // namespace fastlm::FASTLM_ISA

#else

namespace fastlm {

void vec_map(const char* name, const float* x, float* y, int64_t n) { FASTLM_DISPATCH(probe::vec_map, name, x, y, n); }

void dropout_factors(float* out, int64_t M, int64_t N, double p, int64_t seed) {
  FASTLM_DISPATCH(probe::dropout_factors, out, M, N, p, seed);
}

}  // namespace fastlm
#endif
