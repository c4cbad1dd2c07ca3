// Dropout's random numbers, for inclusion inside a pass of foreach_isa.h: no include guard.
//
// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): a pure function of
// (key, counter), so backward recomputes the mask and no thread order matters. The mask of element (row, column)
// depends on the 64-bit seed (the key), the row, and the column alone:
//     word = philox(key = seed, counter = (column / 4, row low, row high, 0))[column % 4],  kept iff word >= p 2^32.
// fastlm/ops/_dropout.py states the same in torch.

namespace fastlm::FASTLM_ISA {

namespace philox {

constexpr uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;

#if FASTLM_ISA_LEVEL >= 1

// High and low words of x * m, lane by lane, from two products of every other lane. One thread makes a factor in
// about 0.5 ns with AVX-512, 0.8 with AVX2 and 2.0 without either.
inline void multiply(VU x, uint32_t m, VU* high, VU* low) {
#if FASTLM_ISA_LEVEL >= 2
  const __m512i factor = _mm512_set1_epi64(m);
  const __m512i even = _mm512_mul_epu32((__m512i)x, factor);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64((__m512i)x, 32), factor);
  *high = (VU)_mm512_mask_mov_epi32(_mm512_srli_epi64(even, 32), 0xAAAA, odd);
  *low = (VU)_mm512_mask_mov_epi32(even, 0xAAAA, _mm512_slli_epi64(odd, 32));
#else
  const __m256i factor = _mm256_set1_epi64x(m);
  const __m256i even = _mm256_mul_epu32((__m256i)x, factor);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)x, 32), factor);
  *high = (VU)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
  *low = (VU)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
#endif
}

// Words 0 to 3 of all lanes to column order: each 128-bit part of an output holds the four words of one counter.
inline void interleave(VU x[4]) {
#if FASTLM_ISA_LEVEL >= 2
#define FASTLM_UNPACK(half, bits, a, b) _mm512_unpack##half##_epi##bits((__m512i)(a), (__m512i)(b))
#else
#define FASTLM_UNPACK(half, bits, a, b) _mm256_unpack##half##_epi##bits((__m256i)(a), (__m256i)(b))
#endif
  const auto a = FASTLM_UNPACK(lo, 32, x[0], x[1]), b = FASTLM_UNPACK(lo, 32, x[2], x[3]);
  const auto c = FASTLM_UNPACK(hi, 32, x[0], x[1]), d = FASTLM_UNPACK(hi, 32, x[2], x[3]);
  x[0] = (VU)FASTLM_UNPACK(lo, 64, a, b), x[1] = (VU)FASTLM_UNPACK(hi, 64, a, b);
  x[2] = (VU)FASTLM_UNPACK(lo, 64, c, d), x[3] = (VU)FASTLM_UNPACK(hi, 64, c, d);
#undef FASTLM_UNPACK
}

constexpr int kCounters = (int)lanes<VF>;

// The words of counters first to first + kCounters, in column order.
inline void words(uint32_t first, int64_t row, const uint32_t key[2], uint32_t* out) {
  VU x[4];
  for (int i = 0; i < kCounters; ++i)  // the order that `interleave` turns into the columns'
    x[0][i] = (uint32_t)(i % 4 * (kCounters / 4) + i / 4);
  x[0] += first;
  x[1] = VU{} + (uint32_t)(uint64_t)row;
  x[2] = VU{} + (uint32_t)((uint64_t)row >> 32);
  x[3] = VU{};
  uint32_t k0 = key[0], k1 = key[1];
  for (int round = 0; round < 10; ++round) {
    VU high0, low0, high1, low1;
    multiply(x[0], kMultiplier0, &high0, &low0);
    multiply(x[2], kMultiplier1, &high1, &low1);
    x[0] = high1 ^ x[1] ^ k0;
    x[1] = low1;
    x[2] = high0 ^ x[3] ^ k1;
    x[3] = low0;
    k0 += kWeyl0;
    k1 += kWeyl1;
  }
  interleave(x);
  std::memcpy(out, x, sizeof x);
}

#else

constexpr int kCounters = 4;

inline void words(uint32_t first, int64_t row, const uint32_t key[2], uint32_t* out) {
  for (int c = 0; c < kCounters; ++c) {
    uint32_t x0 = first + (uint32_t)c, x1 = (uint32_t)(uint64_t)row, x2 = (uint32_t)((uint64_t)row >> 32), x3 = 0;
    uint32_t k0 = key[0], k1 = key[1];
    for (int round = 0; round < 10; ++round) {
      const uint64_t a = (uint64_t)x0 * kMultiplier0, b = (uint64_t)x2 * kMultiplier1;
      x0 = (uint32_t)(b >> 32) ^ x1 ^ k0;
      x1 = (uint32_t)b;
      x2 = (uint32_t)(a >> 32) ^ x3 ^ k1;
      x3 = (uint32_t)a;
      k0 += kWeyl0;
      k1 += kWeyl1;
    }
    out[4 * c] = x0, out[4 * c + 1] = x1, out[4 * c + 2] = x2, out[4 * c + 3] = x3;
  }
}

#endif

}  // namespace philox

struct Dropout {
  uint32_t key[2];
  uint32_t threshold;  // a word below it drops the element
  double scale;        // 1 / (1 - p)

  Dropout(int64_t seed, double p)
      : key{(uint32_t)(uint64_t)seed, (uint32_t)((uint64_t)seed >> 32)},
        threshold((uint32_t)std::min(std::nearbyint(p * 4294967296.0), 4294967295.0)),
        scale(p < 1.0 ? 1.0 / (1.0 - p) : 0.0) {}

  // out[j] = scale where column `first + j` of `row` is kept, else 0, for j in [0, n); first is a multiple of 4.
  template <class S>
  void factors(int64_t row, int64_t first, int64_t n, S* out) const {
    constexpr int kWords = 4 * philox::kCounters;
    const uint32_t limit = threshold;  // copies, since writing `out` might change the members
    const S kept = S(scale);
    uint32_t word[kWords];
    S factor[kWords];
    for (int64_t j = 0; j < n; j += kWords) {
      philox::words((uint32_t)((first + j) / 4), row, key, word);
      for (int i = 0; i < kWords; ++i) factor[i] = word[i] < limit ? S(0) : kept;
      if (j + kWords <= n)
        std::memcpy(out + j, factor, sizeof factor);
      else
        std::memcpy(out + j, factor, sizeof(S) * (size_t)(n - j));
    }
  }
};

}  // namespace fastlm::FASTLM_ISA
