// What the warps of attention's kernel for Blackwell share: a block's memory and barriers, its tiles of keys, and the
// softmax of a row that one thread has. attention_sm100.cuh has the kernel.
#pragma once

#include <blackwell.cuh>

#include "attention_sm90.cuh"  // the walk over the keys, values that are not finite

namespace fastlm::cuda {

template <class T, int D>
struct BlackwellTile {
  static constexpr int kHalves = 2, kRows = 128;  // tiles of queries, rows of each
  static constexpr int M = kHalves * kRows, N = 128, kStages = 256 / D, kPanels = D / kPanelColumns;
  static constexpr int kWarps = kWarpgroup / kWarp, kThreads = 4 * kWarpgroup;
  static constexpr int kIssueRegisters = 48, kSoftmaxRegisters = 184, kCorrectionRegisters = 96;
  static_assert((kIssueRegisters + kHalves * kSoftmaxRegisters + kCorrectionRegisters) * kWarpgroup <= 64 * 1024);
  static_assert(kHalves * (N + D) <= kTensorColumns);

  // (half, panel, row), (stage, panel, row); `out` is where rows turn into lines of memory.
  T q[kHalves][kPanels][kRows][kPanelColumns];
  T k[kStages][kPanels][N][kPanelColumns];
  T v[kStages][kPanels][N][kPanelColumns];
  T out[kRows][D];
  float shrink[kHalves][kRows];  // a row's factor for O: at each tile but the first, and the last one after the tiles
  Barrier q_full[kHalves], k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
  Barrier scores_full[kHalves];  // by the products
  Barrier weights_full[kHalves];  // by softmax, and by the correction: O has shrunk
  Barrier shrink_full[kHalves], shrink_empty[kHalves];  // from softmax to correction and back
  Barrier out_full[kHalves];  // by the last products
  Barrier cleaned[kStages];  // by the correction, of the second pass alone
  Barrier judged;  // by the correction: it has looked at the sums
  uint32_t tensor;  // the address of tensor memory
  int non_finite;  // whether some sums are not finite

  FASTLM_DEVICE static int stage(int n) { return n % kStages; }
  FASTLM_DEVICE static int turn(int n) { return n / kStages % 2; }
  // In tensor memory: columns of a half's scores, weights and sums.
  FASTLM_DEVICE static int scores_column(int half) { return half * N; }
  FASTLM_DEVICE static int out_column(int half) { return kHalves * N + half * D; }

  FASTLM_DEVICE void init() {
#pragma unroll
    for (int s = 0; s < kStages; ++s) {
      barrier_init(&k_full[s], 1), barrier_init(&v_full[s], 1);
      barrier_init(&k_empty[s], 1), barrier_init(&v_empty[s], 1), barrier_init(&cleaned[s], kWarps);
    }
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {
      barrier_init(&q_full[h], 1), barrier_init(&scores_full[h], 1), barrier_init(&out_full[h], 1);
      barrier_init(&weights_full[h], 2 * kWarps);
      barrier_init(&shrink_full[h], kWarps), barrier_init(&shrink_empty[h], kWarps);
    }
    barrier_init(&judged, kWarps);
    publish_barriers();
    non_finite = 0;
  }

  FASTLM_DEVICE bool must_repeat() {
    wait_tensor(&judged, 0);
    return non_finite != 0;
  }
};

// A block's tiles of keys: those of all its queries, and how many each half goes over, 0 for one without queries.
template <class C>
struct BlackwellWalk : KeyWalk {
  int upper, lower;

  FASTLM_DEVICE BlackwellWalk(const Problem& p, int right)
      : KeyWalk(p, right, C::M, C::N), upper(divided_up(smaller(p.S, smaller(p.first + C::kRows, p.T) + right), C::N)),
        lower(p.first + C::kRows < p.T ? tiles : 0) {}
  FASTLM_DEVICE int of_half(int h) const { return h == 0 ? upper : lower; }
};

// 2^x for x up to 100 without the special function unit, by the polynomial of degree 4 on [-1/2, 1/2] that is 1 at 0
// and has the least of greatest relative errors: 2.9e-6 in fp32. Exactly 0 below 2^-127, and for NaN.
FASTLM_DEVICE float exp2_polynomial(float x) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  x = fmaxf(x, -127.0f);
  const float shifted = x + kShift, f = x - (shifted - kShift);
  float p = fmaf(0.009582855738699436f, f, 0.05590642988681793f);
  p = fmaf(p, f, 0.24024099111557007f);
  p = fmaf(p, f, 0.6931241750717163f);
  return times_power(fmaf(p, f, 1.0f), shifted);
}

// A thread's row: the shift of its exponentials in units of products, and their sum.
struct BlackwellRow {
  static constexpr float kSlack = 8;  // powers of two
  float shift = -kInfinity, sum = 0;

  // Turns scores into weights and hands them to `store`, 32 at a time, packed in pairs. Before that `tell` receives
  // what earlier weights have to be multiplied by.
  template <class T, int N, class Tell, class Store>
  FASTLM_DEVICE void step(float (&scores)[N / 32][32], float unit, const Tell& tell, const Store& store) {
    float most[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) most[i] = scores[0][i];
#pragma unroll
    for (int j = 4; j < N; ++j) most[j % 4] = max_or_nan(most[j % 4], scores[j / 32][j % 32]);
    const float highest = max_or_nan(max_or_nan(most[0], most[1]), max_or_nan(most[2], most[3]));
    float shrink = 1;
    if ((highest - shift) * unit > kSlack) {  // true for the first tile, unless it has no key for the row
      shrink = exp2_approx((shift - highest) * unit);
      shift = highest;
    }
    tell(shrink);
    const float pivot = shift == -kInfinity ? 0 : shift * unit;
    float added[4] = {};
#pragma unroll
    for (int c = 0; c < N / 32; ++c) {
      uint32_t word[16];
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        const float x = fmaf(scores[c][i], unit, -pivot);
        scores[c][i] = i % 8 < 2 ? exp2_polynomial(x) : exp2_approx(x);
        added[i % 4] += scores[c][i];
      }
#pragma unroll
      for (int i = 0; i < 16; ++i) word[i] = packed<T>(scores[c][2 * i], scores[c][2 * i + 1]);
      store(c, word);
    }
    sum = fmaf(sum, shrink, (added[0] + added[1]) + (added[2] + added[3]));
    if (!(highest * unit < kInfinity)) sum = __builtin_nanf("");  // by NaN or infinity, which the polynomial loses
  }
};

}  // namespace fastlm::cuda
