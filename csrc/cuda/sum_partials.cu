// The second stage of every gradient that is summed over rows: (P, K) fp32 -> (K), in an order that P alone decides.
//
// A block takes 32 columns; each of its warps adds every eighth row, then the warps' sums are added in order. P is at
// most a few hundred, so that this reads 4 P K bytes, a few MB where the first stage read hundreds, for P K additions.
// Ladder, not timed on a GPU: a thread a column, then eight warps a column, an eighth of the loads one after the other.

#include "common.cuh"

namespace fastlm::cuda {

constexpr int kSumWarps = 8;

__global__ void __launch_bounds__(kSumWarps* kWarp)
    sum_partials_kernel(Global<const float> partial, Global<float> out, int64_t P, int64_t K) {
  float* sums = shared_memory<float>();
  const int64_t column = (int64_t)block_index().x * kWarp + lane_index();
  float sum = 0;
  if (column < K)
    for (int64_t p = warp_index(); p < P; p += kSumWarps) sum += load<1>(partial + p * K + column)[0];
  sums[thread_index()] = sum;
  sync_threads();
  if (warp_index() > 0 || column >= K) return;
  for (int i = 1; i < kSumWarps; ++i) sum += sums[i * kWarp + lane_index()];
  out[column] = sum;
}

void sum_partials(Stream on, const void* partial, void* out, int64_t P, int64_t K) {
  if (K == 0) return;
  set_device(on.device);
  const auto blocks = (unsigned)divided_up<int64_t>(K, kWarp);
  launch({"sum_partials", {blocks}, kSumWarps * kWarp, sizeof(float) * kSumWarps * kWarp, on.handle},
         sum_partials_kernel, static_cast<const float*>(partial), static_cast<float*>(out), P, K);
}

int toolkit_version() { return toolkit(); }
int driver_version() { return driver(); }

}  // namespace fastlm::cuda
