// Dropout's random numbers, for inclusion inside a pass of foreach_isa.h: no include guard.
//
// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): a pure function of
// (key, counter), so backward recomputes the mask and no thread order matters. The mask of element (row, column)
// depends on the 64-bit seed (the key), the row, and the column alone:
//     word = philox(key = seed, counter = (column / 4, row low, row high, 0))[column % 4],  kept iff word >= p 2^32.
// fastlm/ops/_dropout.py states the same in torch.

namespace fastlm::FASTLM_ISA {

struct Dropout {
  uint32_t key[2];
  uint32_t threshold;  // a word below it drops the element
  double scale;        // 1 / (1 - p)

  Dropout(int64_t seed, double p)
      : key{(uint32_t)(uint64_t)seed, (uint32_t)((uint64_t)seed >> 32)},
        threshold((uint32_t)std::min(std::nearbyint(p * 4294967296.0), 4294967295.0)),
        scale(p < 1.0 ? 1.0 / (1.0 - p) : 0.0) {}

  // out[j] = scale where column `first + j` of `row` is kept, else 0, for j in [0, n); first is a multiple of 4.
  // Sixteen counters a step: the loop over c is what the compiler turns into vector code.
  template <class S>
  void factors(int64_t row, int64_t first, int64_t n, S* out) const {
    constexpr int kCounters = 16;
    for (int64_t j = 0; j < n; j += 4 * kCounters) {
      uint32_t x0[kCounters], x1[kCounters], x2[kCounters], x3[kCounters];
      for (int c = 0; c < kCounters; ++c) {
        x0[c] = (uint32_t)((first + j) / 4 + c);
        x1[c] = (uint32_t)(uint64_t)row;
        x2[c] = (uint32_t)((uint64_t)row >> 32);
        x3[c] = 0;
      }
      uint32_t k0 = key[0], k1 = key[1];
      for (int round = 0; round < 10; ++round) {
        for (int c = 0; c < kCounters; ++c) {
          const uint64_t a = (uint64_t)x0[c] * 0xD2511F53u, b = (uint64_t)x2[c] * 0xCD9E8D57u;
          const uint32_t y1 = x1[c], y3 = x3[c];
          x0[c] = (uint32_t)(b >> 32) ^ y1 ^ k0;
          x1[c] = (uint32_t)b;
          x2[c] = (uint32_t)(a >> 32) ^ y3 ^ k1;
          x3[c] = (uint32_t)a;
        }
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
      }
      S f[4 * kCounters];
      for (int c = 0; c < kCounters; ++c) {
        f[4 * c + 0] = x0[c] < threshold ? S(0) : S(scale);
        f[4 * c + 1] = x1[c] < threshold ? S(0) : S(scale);
        f[4 * c + 2] = x2[c] < threshold ? S(0) : S(scale);
        f[4 * c + 3] = x3[c] < threshold ? S(0) : S(scale);
      }
      std::memcpy(out + j, f, sizeof(S) * (size_t)std::min<int64_t>(n - j, 4 * kCounters));
    }
  }
};

}  // namespace fastlm::FASTLM_ISA
