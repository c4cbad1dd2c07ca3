// Which instruction set the kernels use, and glibc's allocator settings.

#include "cpu/isa.h"

#include "cpu/ops.h"

namespace fastlm {

namespace {

Isa detect() {
#if FASTLM_X86
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("bmi2"))
    return Isa::baseline;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
    return Isa::avx2;
  return __builtin_cpu_supports("avx512bf16") ? Isa::avx512_bf16 : Isa::avx512;
#else
  return Isa::baseline;
#endif
}

const Isa g_best = detect();
Isa g_isa = g_best;

}  // namespace

Isa isa() { return g_isa; }
Isa best_isa() { return g_best; }
bool set_isa(Isa wanted) {
  if (wanted > g_best) return false;
  g_isa = wanted;
  return true;
}

int omp_threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

}  // namespace fastlm
