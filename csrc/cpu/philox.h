// Dropout's random numbers, for inclusion inside a pass of foreach_isa.h: no include guard.
//
// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): a pure function of
// (key, counter), so backward recomputes the mask and no thread order matters. The mask of element (row, column)
// depends on the 64-bit seed (the key), the row, and the column alone:
//     word = philox(key = seed, counter = (column / 4, row low, row high, 0))[column % 4],  kept iff word >= p 2^32.
// fastlm/ops/_dropout.py states the same in torch.
//
// A round is x0, x1, x2, x3 = high(x2 m1) ^ x1 ^ k0, low(x2 m1), high(x0 m0) ^ x3 ^ k1, low(x0 m0). Each word has a
// 64-bit lane: multiplications read its low half alone, so that low() costs nothing. Of the first two rounds only a
// product of the column is left to the lanes, as the others depend on the row alone.
//
// One thread draws a word in 0.40 ns with AVX-512 (0.53 before these two steps, with a factor stored for each), 0.70
// with AVX2 and 2.35 without either. With AVX-512 the 134 vector instructions for 64 words keep both ports busy: more
// chains at a time gain nothing.

namespace fastlm::FASTLM_ISA {

namespace philox {

constexpr int kRounds = 10;
constexpr uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;

inline uint32_t high(uint64_t x) { return (uint32_t)(x >> 32); }

struct Keys {
  uint32_t first[kRounds], second[kRounds];

  explicit Keys(uint64_t seed) {
    for (int round = 0; round < kRounds; ++round) {
      first[round] = (uint32_t)seed + (uint32_t)round * kWeyl0;
      second[round] = high(seed) + (uint32_t)round * kWeyl1;
    }
  }
};

// What a row adds to the words after the second round; x1 is the column's alone and x3 this.
struct Row {
  uint32_t x0, x2, x3;

  Row(const Keys& keys, uint64_t row) {
    const uint64_t outer = (uint64_t)high(row) * kMultiplier1;
    const uint64_t inner = (uint64_t)(high(outer) ^ (uint32_t)row ^ keys.first[0]) * kMultiplier0;
    x0 = (uint32_t)outer ^ keys.first[1];
    x2 = high(inner) ^ keys.second[1];
    x3 = (uint32_t)inner;
  }
};

#if FASTLM_ISA_LEVEL >= 1

typedef uint64_t VW __attribute__((vector_size(FASTLM_VEC_BYTES)));  // the low halves count
constexpr int kLanes = FASTLM_VEC_BYTES / 8;
constexpr int kChains = 2;  // vectors at a time, as a round waits for its products
constexpr int kColumns = 4 * kLanes * kChains;

#if FASTLM_ISA_LEVEL >= 2
inline VW multiply(VW x, uint32_t m) { return (VW)_mm512_mul_epu32((__m512i)x, _mm512_set1_epi64(m)); }
inline VW broadcast(uint32_t word) { return (VW)_mm512_set1_epi32((int)word); }
inline VW exclusive_or(VW a, VW b, VW c) {
  return (VW)_mm512_ternarylogic_epi32((__m512i)a, (__m512i)b, (__m512i)c, 0x96);
}
// Low halves of both, alternating.
inline __m512i join(VW even, VW odd) {
  return _mm512_mask_shuffle_epi32((__m512i)even, 0xAAAA, (__m512i)odd, _MM_PERM_CCAA);
}
// Bit i tells whether word i, in the columns' order, is not below the limit.
inline uint32_t not_below(VW a, VW b, VW c, VW d, uint32_t limit) {
  const __m512i ab = join(a, b), cd = join(c, d), least = _mm512_set1_epi32((int)limit);
  const uint32_t low = _mm512_cmpge_epu32_mask(_mm512_unpacklo_epi64(ab, cd), least);
  return low | (uint32_t)_mm512_cmpge_epu32_mask(_mm512_unpackhi_epi64(ab, cd), least) << 16;
}
#else
inline VW multiply(VW x, uint32_t m) { return (VW)_mm256_mul_epu32((__m256i)x, _mm256_set1_epi64x(m)); }
inline VW broadcast(uint32_t word) { return (VW)_mm256_set1_epi32((int)word); }
inline VW exclusive_or(VW a, VW b, VW c) { return a ^ b ^ c; }
inline __m256i join(VW even, VW odd) { return _mm256_blend_epi32((__m256i)even, (__m256i)(odd << 32), 0xAA); }
inline uint32_t not_below(__m256i words, uint32_t limit) {
  const __m256i larger = _mm256_max_epu32(words, _mm256_set1_epi32((int)limit));
  return (uint32_t)_mm256_movemask_ps((__m256)_mm256_cmpeq_epi32(larger, words));
}
inline uint32_t not_below(VW a, VW b, VW c, VW d, uint32_t limit) {
  const __m256i ab = join(a, b), cd = join(c, d);
  return not_below(_mm256_unpacklo_epi64(ab, cd), limit) | not_below(_mm256_unpackhi_epi64(ab, cd), limit) << 8;
}
#endif

// The counters of the lanes, in the order that `not_below` turns into the columns'.
inline VW counters(uint32_t first) {
  VW x;
  for (int i = 0; i < kLanes; ++i) x[i] = (uint64_t)(i % 2 * (kLanes / 2) + i / 2);
  return x + (uint64_t)first;
}

// Bit i tells whether the word of column 4 * first + i is not below the limit, for kColumns of them.
inline uint64_t kept(const Keys& keys, const Row& row, uint32_t first, uint32_t limit) {
  VW x0[kChains], x1[kChains], x2[kChains], x3[kChains];
  for (int c = 0; c < kChains; ++c) {
    const VW column = multiply(counters(first + (uint32_t)(c * kLanes)), kMultiplier0);
    x1[c] = multiply((column >> 32) ^ broadcast(keys.second[0]), kMultiplier1);
    x0[c] = (x1[c] >> 32) ^ broadcast(row.x0);
    x2[c] = column ^ broadcast(row.x2);
    x3[c] = broadcast(row.x3);
  }
  for (int round = 2; round < kRounds; ++round) {
    const VW first_key = broadcast(keys.first[round]), second_key = broadcast(keys.second[round]);
    for (int c = 0; c < kChains; ++c) {
      const VW a = multiply(x0[c], kMultiplier0), b = multiply(x2[c], kMultiplier1);
      x0[c] = exclusive_or(b >> 32, x1[c], first_key);
      x2[c] = exclusive_or(a >> 32, x3[c], second_key);
      x1[c] = b;
      x3[c] = a;
    }
  }
  uint64_t bits = 0;
  for (int c = 0; c < kChains; ++c) bits |= (uint64_t)not_below(x0[c], x1[c], x2[c], x3[c], limit) << (4 * kLanes * c);
  return bits;
}

#else

constexpr int kColumns = 4;

inline uint64_t kept(const Keys& keys, const Row& row, uint32_t first, uint32_t limit) {
  const uint64_t column = (uint64_t)first * kMultiplier0;
  const uint64_t product = (uint64_t)(high(column) ^ keys.second[0]) * kMultiplier1;
  uint32_t x0 = high(product) ^ row.x0, x1 = (uint32_t)product, x2 = (uint32_t)column ^ row.x2, x3 = row.x3;
  for (int round = 2; round < kRounds; ++round) {
    const uint64_t a = (uint64_t)x0 * kMultiplier0, b = (uint64_t)x2 * kMultiplier1;
    x0 = high(b) ^ x1 ^ keys.first[round];
    x2 = high(a) ^ x3 ^ keys.second[round];
    x1 = (uint32_t)b;
    x3 = (uint32_t)a;
  }
  return (uint64_t)(x0 >= limit) | (uint64_t)(x1 >= limit) << 1 | (uint64_t)(x2 >= limit) << 2 |
         (uint64_t)(x3 >= limit) << 3;
}

#endif

}  // namespace philox

// x in the lanes whose bit is set, from the lowest on, else 0.
inline VF where_kept(uint64_t bits, VF x) {
#if FASTLM_ISA_LEVEL >= 2
  return (VF)_mm512_maskz_mov_ps((__mmask16)bits, (__m512)x);
#else
  VI bit;
  for (int64_t i = 0; i < lanes<VF>; ++i) bit[i] = 1 << i;
  return (VF)((VI)x & (VI)((bit & (int32_t)bits) != 0));
#endif
}
inline VD where_kept(uint64_t bits, VD x) {
  for (int64_t i = 0; i < lanes<VD>; ++i) x[i] = bits >> i & 1 ? x[i] : 0.0;
  return x;
}

struct Dropout {
  philox::Keys keys;
  uint32_t threshold;  // a word below it drops the element
  double scale;        // 1 / (1 - p)

  Dropout(int64_t seed, double p)
      : keys((uint64_t)seed),
        threshold((uint32_t)std::min(std::nearbyint(p * 4294967296.0), 4294967295.0)),
        scale(p < 1.0 ? 1.0 / (1.0 - p) : 0.0) {}

  // Bit i % 64 of bits[i / 64] tells whether column `first + i` of `row` is kept, for i in [0, n) and up to the next
  // multiple of 64; first is a multiple of 4.
  void kept(int64_t row, int64_t first, int64_t n, uint64_t* bits) const {
    const philox::Row start(keys, (uint64_t)row);
    for (int64_t i = 0; i < n; i += 64) {
      uint64_t word = 0;
      for (int64_t j = 0; j < 64; j += philox::kColumns)
        word |= philox::kept(keys, start, (uint32_t)((first + i + j) / 4), threshold) << j;
      bits[i / 64] = word;
    }
  }

  // out[j] = scale where column `first + j` of `row` is kept, else 0, for j in [0, n); first is a multiple of 4.
  template <class S>
  void factors(int64_t row, int64_t first, int64_t n, S* out) const {
    using V = vec_of<S>;
    const V factor = set1<V>(S(scale));
    for (int64_t j = 0; j < n; j += 64) {
      uint64_t bits;
      kept(row, first + j, 64, &bits);
      for_lanes<V>(std::min<int64_t>(64, n - j),
                   [&](int64_t i, auto width) { store(out + j + i, where_kept(bits >> i, factor), width); });
    }
  }
};

}  // namespace fastlm::FASTLM_ISA
