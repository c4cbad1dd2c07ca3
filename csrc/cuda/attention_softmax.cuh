// The online softmax of a warp's rows, which lie in accumulators as matrix.cuh says: what the forward kernels share.
#pragma once

#include "attention.cuh"

namespace fastlm::cuda {

// Of each lane's rows: the highest score so far, and this lane's part of the sum of exponentials relative to it.
template <int ROWS>
struct SoftmaxState {
  float row_max[ROWS][2], row_sum[ROWS][2];

  FASTLM_DEVICE SoftmaxState() {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) row_max[r][0] = row_max[r][1] = -kInfinity, row_sum[r][0] = row_sum[r][1] = 0;
  }
};

// Applies the rules to products of this lane's first query i and first key j on, in a tile that they do not leave alone.
// Without mask and soft cap, scores stay products, in units of 1 / scale.
template <class T, int ROWS, int N>
FASTLM_DEVICE void apply_rules(float (&scores)[ROWS][N][4], const ScoreRules<T>& rules, bool general, int i,
                               int j) {
#pragma unroll
  for (int r = 0; r < ROWS; ++r)
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int query = i + 16 * r + 8 * (e / 2), key = j + 8 * n + e % 2;
        float slope;
        if (general)
          scores[r][n][e] = rules.score(scores[r][n][e], query, key, slope);
        else if (!rules.inside(query, key))
          scores[r][n][e] = -kInfinity;
      }
}

// Turns scores, which times `unit` are powers of two, into weights relative to the highest score so far; shrink is what
// earlier weights have to be multiplied by. natural: scores may be as large as numbers are, so that they are multiplied
// after the highest one is subtracted.
template <int ROWS, int N>
FASTLM_DEVICE void softmax_step(float (&scores)[ROWS][N][4], SoftmaxState<ROWS>& state, float unit,
                                float (&shrink)[ROWS][2], bool natural = false) {
#pragma unroll
  for (int r = 0; r < ROWS; ++r)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float most = state.row_max[r][half];
#pragma unroll
      for (int n = 0; n < N; ++n) most = fmaxf(most, fmaxf(scores[r][n][2 * half], scores[r][n][2 * half + 1]));
      most = warp_max<4>(most);
      const float shift = most == -kInfinity || !natural ? 0 : most;  // finite for a row without keys so far
      const float pivot = most == -kInfinity || natural ? 0 : most * unit;
      shrink[r][half] = exp2_approx((state.row_max[r][half] - shift) * unit - pivot);
      state.row_max[r][half] = most;
      if (natural)
#pragma unroll
        for (int n = 0; n < N; ++n) scores[r][n][2 * half] -= shift, scores[r][n][2 * half + 1] -= shift;
      float added = 0;
#pragma unroll
      for (int n = 0; n < N; ++n)
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          scores[r][n][e] = exp2_approx(fmaf(scores[r][n][e], unit, -pivot));
          added += scores[r][n][e];
        }
      state.row_sum[r][half] = fmaf(state.row_sum[r][half], shrink[r][half], added);
    }
}

// Weights times dropout's factors; `row` is dropout's row of this lane's first query, `column` of the first key.
template <int ROWS, int N>
FASTLM_DEVICE void drop_weights(float (&weights)[ROWS][N][4], const Dropout& dropout, int64_t row, int column) {
#pragma unroll
  for (int r = 0; r < ROWS; ++r)
#pragma unroll
    for (int n = 0; n < N; ++n) {
      float factor[4];
      dropout_of_queries(factor, dropout, row + 16 * r, column + 8 * n);
#pragma unroll
      for (int e = 0; e < 4; ++e) weights[r][n][e] *= factor[e];
    }
}

// Finishes the sums, writes each row's log-sum-exp where it is wanted, and gives the factors that normalize the rows:
// 0 for a row that attends to nothing. `i` is this lane's first query, of `queries`; `row` is lse's of the head's query 0.
template <int ROWS>
FASTLM_DEVICE void finish_softmax(const SoftmaxState<ROWS>& state, const AttentionParams& a, int64_t row, int i,
                                  int queries, float (&normalize)[ROWS][2]) {
  const float to_natural = a.natural() ? 1.0f : a.unit() * kLn2;
#pragma unroll
  for (int r = 0; r < ROWS; ++r)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float total = warp_sum<4>(state.row_sum[r][half]);
      const int query = i + 16 * r + 8 * half;
      normalize[r][half] = total == 0 ? 0 : 1 / total;
      if (!a.lse || lane_index() % 4 != 0 || query >= queries) continue;
      float rest;
      Global<float>(a.lse)[row + query] = log_sum(state.row_max[r][half] * to_natural, total, rest);
      if (a.rest) Global<float>(a.rest)[row + query] = rest;
    }
}

}  // namespace fastlm::cuda
