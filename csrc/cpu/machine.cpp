// Caches, threads and pages of the machine.

#include "cpu/machine.h"

#include "cpu/isa.h"

#if FASTLM_X86
#include <cpuid.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fastlm {

namespace {

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

const int64_t g_last_cache = largest_cache();

}  // namespace

int64_t last_cache() { return g_last_cache; }

// At most 64 chunks: enough for 64 cores, and partials that stay small. At least 4 rows, the kernels' tile.
int64_t chunk_rows(int64_t M) { return std::max<int64_t>(4, ceil_div(ceil_div(M, 64), 4) * 4); }

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
