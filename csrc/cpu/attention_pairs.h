// Products of bf16 matrices with fp32 sums, and their packing; for inclusion inside a pass of level 3 or 4.
//
// The left operand is row-major. The right operand (K x N) is packed in panels of 16 columns, each a run of K / 2 rows
// of 16 pairs (two consecutive k of one column): what vdpbf16ps takes as a vector and tdpbf16ps as a tile. Panels lie
// `panel` elements apart. All sizes are multiples of 32, padded with zeros.

namespace fastlm::FASTLM_ISA::attention {

inline int64_t up32(int64_t n) { return (n + 31) / 32 * 32; }

#if FASTLM_ISA_LEVEL >= 4

// All eight tiles have 16 rows of 64 bytes. Released after each task, or every context switch would save them.
struct Tiles {
  Tiles() {
    alignas(64) struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
};

// C (M x N) = or += A (M x K) B (K x N), two by two tiles at a time.
inline void product(const bf16_t* A, int64_t ar, const bf16_t* B, int64_t panel, float* C, int64_t cr, int64_t M,
                    int64_t N, int64_t K, bool add) {
  for (int64_t n = 0; n < N; n += 32) {
    const bf16_t* b = B + n / 16 * panel;
    for (int64_t m = 0; m < M; m += 32) {
      float* c = C + m * cr + n;
      if (add) {
        _tile_loadd(0, c, cr * 4);
        _tile_loadd(1, c + 16, cr * 4);
        _tile_loadd(2, c + 16 * cr, cr * 4);
        _tile_loadd(3, c + 16 * cr + 16, cr * 4);
      } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
      }
      const bf16_t* a = A + m * ar;
      for (int64_t k = 0; k < K; k += 32) {
        _tile_loadd(6, b + k * 16, 64);
        _tile_loadd(4, a + k, ar * 2);
        _tile_loadd(5, a + 16 * ar + k, ar * 2);
        _tile_loadd(7, b + panel + k * 16, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, c, cr * 4);
      _tile_stored(1, c + 16, cr * 4);
      _tile_stored(2, c + 16 * cr, cr * 4);
      _tile_stored(3, c + 16 * cr + 16, cr * 4);
    }
  }
}

#else

struct Tiles {
  Tiles() {}
};

// C (M x N) = or += A (M x K) B (K x N), 8 rows by 2 panels at a time.
inline void product(const bf16_t* A, int64_t ar, const bf16_t* B, int64_t panel, float* C, int64_t cr, int64_t M,
                    int64_t N, int64_t K, bool add) {
  constexpr int R = 8;
  for (int64_t n = 0; n < N; n += 32)
    for (int64_t m = 0; m < M; m += R) {
      const bf16_t *a = A + m * ar, *b = B + n / 16 * panel;
      float* c = C + m * cr + n;
      __m512 sum[R][2];
      for (int r = 0; r < R; ++r)
        for (int i = 0; i < 2; ++i) sum[r][i] = add ? _mm512_loadu_ps(c + r * cr + 16 * i) : _mm512_setzero_ps();
      for (int64_t k = 0; k < K; k += 2) {
        const __m512bh b0 = (__m512bh)_mm512_loadu_si512(b + k * 16);
        const __m512bh b1 = (__m512bh)_mm512_loadu_si512(b + panel + k * 16);
        for (int r = 0; r < R; ++r) {
          int32_t pair;
          std::memcpy(&pair, a + r * ar + k, 4);
          const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
          sum[r][0] = _mm512_dpbf16_ps(sum[r][0], x, b0);
          sum[r][1] = _mm512_dpbf16_ps(sum[r][1], x, b1);
        }
      }
      for (int r = 0; r < R; ++r)
        for (int i = 0; i < 2; ++i) _mm512_storeu_ps(c + r * cr + 16 * i, sum[r][i]);
    }
}

#endif

// ---- exponential -----------------------------------------------------------------------------------------------

// 2^x for x below 1, to a relative 1e-4, which the rounding to bf16 that follows hides; 0 below -126, NaN for NaN.
// Adding 1.5 * 2^23 leaves the nearest integer in the low bits, ready to be shifted into the exponent.
inline __m512 exp2_short(__m512 x, __mmask16 open = 0xffff) {
  const __m512 magic = _mm512_set1_ps(12582912.0f);
  const __mmask16 live = _mm512_mask_cmp_ps_mask(open, x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  const __m512 t = _mm512_add_ps(x, magic);
  const __m512 r = _mm512_sub_ps(x, _mm512_sub_ps(t, magic));
  __m512 p = _mm512_fmadd_ps(r, _mm512_set1_ps(5.500893126e-2f), _mm512_set1_ps(2.422109678e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.932829281e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return _mm512_castsi512_ps(
      _mm512_maskz_add_epi32(live, _mm512_castps_si512(p), _mm512_slli_epi32(_mm512_castps_si512(t), 23)));
}

// As soft_cap, to an absolute 1e-7 of the cap: t = (1 - e) / (1 + e) with e = 2^(-2 log2e |x / cap|).
inline VF soft_cap_short(VF x, float cap, VF* slope) {
  const VF e = exp2(abs(x) * (-2.885390082f / cap));
  const VF bounded = copysign((1.0f - e) * reciprocal(1.0f + e), x);
  *slope = 1.0f - bounded * bounded;
  return bounded * cap;
}

// ---- packing -----------------------------------------------------------------------------------------------------

inline __mmask32 first32(int64_t n) { return n >= 32 ? ~0u : n <= 0 ? 0u : (1u << n) - 1; }
// Which of the columns j to j + 15 lie in a range.
inline __mmask16 columns16(KeyRange range, int64_t j) {
  return (__mmask16)(first16(range.end - j) & ~first16(range.begin - j));
}

// Which of 32 are finite.
inline __mmask32 finite32(__m512i x) {
  const __m512i exponent = _mm512_set1_epi16(0x7f80);
  return _mm512_cmpneq_epi16_mask(_mm512_and_si512(x, exponent), exponent);
}

// A left operand's row: dst (up32(D)) = src (D), its signs flipped by `sign` (0 or 0x8000). Returns whether all are
// finite; kClean: with 0 in the place of what is not.
template <bool kClean = false>
inline bool pack_row(const bf16_t* src, int64_t D, uint16_t sign, bf16_t* dst) {
  __mmask32 all = ~0u;
  for (int64_t d = 0; d < D; d += 32) {
    __m512i x = _mm512_maskz_loadu_epi16(first32(D - d), src + d);
    const __mmask32 finite = finite32(x);
    all &= finite;
    if (kClean) x = _mm512_maskz_mov_epi16(finite, x);
    _mm512_storeu_si512(dst + d, _mm512_xor_si512(x, _mm512_set1_epi16((int16_t)sign)));
  }
  return all == ~0u;
}

// dst (D) = factor * src (up32(D)).
inline void write_row(const float* src, float factor, int64_t D, bf16_t* dst) {
  const __m512 scale = _mm512_set1_ps(factor);
  for (int64_t d = 0; d < D; d += 32) {
    const __m512 low = _mm512_mul_ps(_mm512_loadu_ps(src + d), scale);
    const __m512 high = _mm512_mul_ps(_mm512_loadu_ps(src + d + 16), scale);
    _mm512_mask_storeu_epi16(dst + d, first32(D - d), (__m512i)_mm512_cvtne2ps_pbh(high, low));
  }
}

// A right operand whose columns are the n rows of src and whose k is D.
inline void pack_columns(const bf16_t* src, int64_t stride, int64_t n, int64_t D, bf16_t* dst) {
  const int64_t Dp = up32(D);
  for (int64_t j = 0; j < up32(n); j += 16)
    for (int64_t d = 0; d < Dp; d += 32) {
      VF rows[16];
      for (int64_t i = 0; i < 16; ++i) __builtin_prefetch(src + (j + i + kAhead) * stride + d);
      for (int64_t i = 0; i < 16; ++i)
        rows[i] = (VF)(j + i < n ? _mm512_maskz_loadu_epi16(first32(D - d), src + (j + i) * stride + d)
                                 : _mm512_setzero_si512());
      transpose<8>(rows);
      for (int64_t i = 0; i < 16; ++i) _mm512_storeu_si512(dst + j * Dp + (d + 2 * i) * 16, (__m512i)rows[i]);
    }
}

// Two rows of 32 as 32 pairs: columns 0 to 15 in `low`, the others in `high`.
inline void interleave(__m512i first, __m512i second, __m512i* low, __m512i* high) {
  const __m512i order = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5,
                                         36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  *low = _mm512_permutex2var_epi16(first, order, second);
  *high = _mm512_permutex2var_epi16(first, _mm512_add_epi16(order, _mm512_set1_epi16(16)), second);
}

// A right operand whose k are the n rows of src and whose columns are D. Returns whether all are finite; kClean: with 0
// in the place of what is not.
template <bool kClean = false>
inline bool pack_rows(const bf16_t* src, int64_t stride, int64_t n, int64_t D, bf16_t* dst) {
  const int64_t rows = up32(n);
  const __m512i exponent = _mm512_set1_epi16(0x7f80);
  __m512i largest = _mm512_setzero_si512();  // exponent
  for (int64_t j = 0; j < rows; j += 2) {
    for (int64_t i = 0; i < 2; ++i) prefetch_row(src + (j + i + kAhead) * stride, D);
    for (int64_t d = 0; d < D; d += 32) {
      const __mmask32 width = first32(D - d);
      __m512i first = _mm512_maskz_loadu_epi16(j < n ? width : 0, src + j * stride + d);
      __m512i second = _mm512_maskz_loadu_epi16(j + 1 < n ? width : 0, src + (j + 1) * stride + d);
      if constexpr (kClean) {
        first = _mm512_maskz_mov_epi16(finite32(first), first);
        second = _mm512_maskz_mov_epi16(finite32(second), second);
      }
      largest = _mm512_max_epu16(largest, _mm512_max_epu16(_mm512_and_si512(first, exponent),
                                                           _mm512_and_si512(second, exponent)));
      __m512i low, high;
      interleave(first, second, &low, &high);
      _mm512_storeu_si512(dst + d * rows + j * 16, low);
      _mm512_storeu_si512(dst + (d + 16) * rows + j * 16, high);
    }
  }
  return _mm512_cmpeq_epi16_mask(largest, exponent) == 0;
}

// A left operand that is the transpose of `count` (up to 32) packed rows: dst[d * stride + i] = rows[i * Dp + d].
inline void pack_transposed_rows(const bf16_t* rows, int64_t count, int64_t Dp, bf16_t* dst, int64_t stride) {
  for (int64_t i = 0; i < count; i += 16)
    for (int64_t d = 0; d < Dp; d += 16) {
      VF square[16];
      for (int64_t r = 0; r < 16; ++r)
        square[r] = (VF)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(rows + (i + r) * Dp + d)));
      transpose<8>(square);
      for (int64_t r = 0; r < 16; ++r)
        _mm256_storeu_si256((__m256i*)(dst + (d + r) * stride + i), _mm512_cvtepi32_epi16((__m512i)square[r]));
    }
}

// Two rows of 16 values as 16 pairs.
inline __m512i pairs(__m512 first, __m512 second) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                         20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(second, first));
}

}  // namespace fastlm::FASTLM_ISA::attention
