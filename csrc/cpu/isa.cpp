// Which instruction set the kernels use, and what else belongs to the machine: caches, threads and pages.

#include "cpu/isa.h"

#include "cpu/ops.h"

#if FASTLM_X86
#include <cpuid.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#endif
#if FASTLM_X86 && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastlm {

namespace {

// Tiles hold 8 KiB of state, which Linux gives a process only on request (arch_prctl ARCH_REQ_XCOMP_PERM).
bool amx() {
#if FASTLM_X86 && defined(__linux__) && defined(SYS_arch_prctl)
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const unsigned tiles = 1u << 22 | 1u << 24 | 1u << 25;  // bf16, tiles at all, int8
  return (d & tiles) == tiles && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
  return false;
#endif
}

Isa detect() {
#if FASTLM_X86
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("bmi2"))
    return Isa::baseline;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
    return Isa::avx2;
  if (!__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("avx512vnni")) return Isa::avx512;
  return amx() ? Isa::amx : Isa::avx512_bf16;
#else
  return Isa::baseline;
#endif
}

int64_t largest_cache() {
  constexpr int64_t kShare = int64_t(32) << 20;  // a larger one serves many cores, most of them others'
  int64_t largest = 0;
#if FASTLM_X86
  unsigned a, b, c, d;
  for (const unsigned leaf : {0x4u, 0x8000001du})  // Intel's, AMD's
    for (unsigned i = 0; __get_cpuid_count(leaf, i, &a, &b, &c, &d) && (a & 31) != 0; ++i) {
      const int64_t line = (b & 0xfff) + 1, partitions = ((b >> 12) & 0x3ff) + 1, ways = (b >> 22) + 1;
      largest = std::max(largest, line * partitions * ways * (c + 1));
    }
#endif
  return largest ? std::min(largest, kShare) : kShare;
}

const Isa g_best = detect();
const int64_t g_last_cache = largest_cache();
Isa g_isa = g_best;
bool g_chosen = false;

}  // namespace

int64_t last_cache() { return g_last_cache; }
Isa isa() { return g_isa; }
bool isa_chosen() { return g_chosen; }
Isa best_isa() { return g_best; }
bool is_intel() {
#if FASTLM_X86
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}
bool set_isa(Isa wanted) {
  if (wanted > g_best) return false;
  g_isa = wanted;
  g_chosen = true;
  return true;
}

int omp_threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

void use_huge_pages(void* start, int64_t size) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (size > 0) madvise(start, (size_t)size, MADV_HUGEPAGE);
#else
  (void)start, (void)size;
#endif
}

}  // namespace fastlm
