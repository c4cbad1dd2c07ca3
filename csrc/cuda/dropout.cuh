// A call's dropout: which elements of an array are dropped, by the generator that fastlm/ops/_dropout.py states.
#pragma once

#include <primitives.cuh>

#include "ops.h"

namespace fastlm::cuda {

// A call's dropout as kernels take it. `threshold` 0 with `scale` 1 keeps everything.
struct Dropout {
  Seed seed;
  uint32_t threshold;  // a word below it drops the element
  float scale;         // 1 / (1 - p)

  static Dropout of(double p, Seed seed) {
    const double limit = p * 4294967296.0;
    const uint32_t threshold = limit >= 4294967295.0 ? 0xFFFFFFFFu : (uint32_t)(limit + 0.5);
    return {seed, threshold, p < 1 ? (float)(1 / (1 - p)) : 0.0f};
  }

  // 0 where column 4 group + i of the row is dropped, `scale` where it is kept.
  FASTLM_DEVICE Vec<float, 4> factors(int64_t row, int64_t group) const {
    const int64_t key = seed.on_device ? *Global<const int64_t>((const int64_t*)seed.value) : seed.value;
    const Vec<uint32_t, 4> word = philox(key, (uint32_t)group, row);
    Vec<float, 4> factor;
    for (int i = 0; i < 4; ++i) factor[i] = word[i] < threshold ? 0.0f : scale;
    return factor;
  }
};

}  // namespace fastlm::cuda
