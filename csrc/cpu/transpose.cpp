// The transpose of an fp32 matrix on every core. PyTorch's copy of one is made by a single thread: of 1024 x 3072 it took
// a quarter of the time of the product that needs it.

#include "cpu/isa.h"
#include "cpu/ops.h"

#ifndef FASTLM_ISA
#define FASTLM_FILE "cpu/transpose.cpp"
#include "cpu/foreach_isa.h"
#endif

#ifdef FASTLM_ISA
namespace fastlm::FASTLM_ISA {

namespace transposing {

// n rows of y = the transpose of m rows of x, at most as many of either as a vector has lanes.
inline void square(const float* x, int64_t x_stride, float* y, int64_t y_stride, int64_t m, int64_t n) {
  constexpr int64_t L = lanes<VF>;
  VF rows[L];
  for (int64_t i = 0; i < L; ++i) {
    const float* row = x + i * x_stride;
    rows[i] = i >= m ? VF{} : n == L ? load<VF>(row) : load_n<VF>(row, n);
  }
  transpose<L / 2>(rows);
  for (int64_t i = 0; i < n; ++i) {
    if (m == L)
      store(y + i * y_stride, rows[i]);
    else
      store_n(y + i * y_stride, rows[i], m);
  }
}

void run(const float* x, float* y, int64_t M, int64_t N, int64_t x_stride) {
  constexpr int64_t L = lanes<VF>, kColumns = 64;  // of x at a time: whole cache lines of each row
#pragma omp parallel for schedule(static) if (M * N > kParallelGrain)
  for (int64_t n0 = 0; n0 < N; n0 += kColumns)
    for (int64_t m = 0; m < M; m += L)
      for (int64_t n = n0; n < std::min(N, n0 + kColumns); n += L)
        square(x + m * x_stride + n, x_stride, y + n * M + m, M, std::min(L, M - m), std::min(L, N - n));
}

}  // namespace transposing
}  // namespace fastlm::FASTLM_ISA

#else

namespace fastlm {

void transpose(const void* x, void* y, int64_t M, int64_t N, int64_t x_stride) {
  FASTLM_DISPATCH(transposing::run, (const float*)x, (float*)y, M, N, x_stride);
}

}  // namespace fastlm
#endif
