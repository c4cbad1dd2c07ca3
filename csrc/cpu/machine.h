// Caches, threads and pages of the machine. Ordinary header, not for inclusion in a pass.
#pragma once

#include <cstdint>

namespace fastlm {

int64_t last_cache();  // bytes of the cache nearest to memory, or of a fair share of it
int omp_threads();
// Advises huge pages for this memory, which the system may ignore; start and size are multiples of 2 MiB.
void use_huge_pages(void* start, int64_t size);

// Work below this many elements stays on the calling thread: waking a team costs about 5 us.
constexpr int64_t kParallelGrain = 16 * 1024;

// Rows handled by one partial sum of the weight gradients: a function of M alone, so that the result does not
// depend on the number of threads. Workspaces hold ceil_div(M, chunk_rows(M)) partial rows.
int64_t chunk_rows(int64_t M);

}  // namespace fastlm
