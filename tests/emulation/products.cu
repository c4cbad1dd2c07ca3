// Products of tiles on the emulated matrix instructions, for a test that compares them with plain ones.
#include "attention_tile.cuh"

namespace fastlm::cuda {
namespace {

constexpr int kSize = 16, kWidth = 32;

// rows: (16, 16) = a b^T; weighted: (16, 32) = (a b^T, rounded to T) b. One warp; a and b: (16, 32).
template <class T>
__global__ void products_kernel(Global<const T> a, Global<const T> b, Global<float> rows, Global<float> weighted) {
  const Tile<T, kWidth> left{shared_memory<T>()}, right{left.data + left.elements(kSize)};
  load_tile<kSize, kWarp>(left, Rows<const T>{a, kWidth, kSize, kWidth, true}, 0);
  load_tile<kSize, kWarp>(right, Rows<const T>{b, kWidth, kSize, kWidth, true}, 0);
  cp_async_commit();
  cp_async_wait<0>();
  sync_threads();
  float scores[1][kSize / 8][4], sums[1][kWidth / 8][4];
  product_of_rows(scores, left, 0, right);
  clear(sums);
  add_weighted(sums, scores, right, 0);
  const int g = lane_index() / 4, t = lane_index() % 4;
  for (int e = 0; e < 4; ++e) {
    const int row = g + e / 2 * 8, column = 2 * t + e % 2;
    for (int n = 0; n < kSize / 8; ++n) rows[row * kSize + 8 * n + column] = scores[0][n][e];
    for (int n = 0; n < kWidth / 8; ++n) weighted[row * kWidth + 8 * n + column] = sums[0][n][e];
  }
}

}  // namespace

extern "C" __attribute__((visibility("default"))) void fastlm_emulation_products(const void* a, const void* b,
                                                                                 float* rows, float* weighted,
                                                                                 int type) {
  for_type(type, [&](auto t) {
    using T = decltype(t);
    emulation::Buffers buffers;
    for (const void* p : {a, b}) buffers.allow(p, sizeof(T) * kSize * kWidth);
    buffers.allow(rows, sizeof(float) * kSize * kSize);
    buffers.allow(weighted, sizeof(float) * kSize * kWidth);
    launch({"products", {}, kWarp, 2 * kSize * kWidth * sizeof(T)}, products_kernel<T>,
           Global<const T>(static_cast<const T*>(a)), Global<const T>(static_cast<const T*>(b)), Global<float>(rows),
           Global<float>(weighted));
  });
}

}  // namespace fastlm::cuda
