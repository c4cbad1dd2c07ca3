// What attention's kernels share: their parameters, which rows a block works on, and the rules that turn a product
// q.k into a score: scale, soft cap, mask, window, dropout.
#pragma once

#include "attention.h"
#include "attention_tile.cuh"
#include "dropout.cuh"

namespace fastlm::cuda {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kInfinity = __builtin_huge_valf();

struct AttentionParams {
  Heads q, k, v, out, dout, dq, dk, dv;
  Mask mask;
  float *lse, *rest;
  const float* dlse;
  float* stats;
  void* dmask;  // the gradient of a mask as large as the scores, or null
  int dmask_type;
  const int32_t *cu_q, *cu_k;
  int B, H, Hkv, T, S, D, Dv, left, right;
  float scale, softcap, softcap_inverse;
  Dropout dropout;
  bool drops, vectors;
  int64_t stat_rows;  // B H T, or H T of packed sequences

  // Scores that are not just q.k times a positive factor.
  FASTLM_ANY bool general() const { return mask.data || softcap > 0 || !(scale > 0); }
  // Scores in natural units: under an additive mask, whose lowest number would be infinite in units of log2.
  FASTLM_ANY bool natural() const { return mask.data && mask.type != kBool; }
  // What turns scores, or without general() products, into powers of two.
  FASTLM_ANY float unit() const { return natural() ? kLog2e : general() ? 1.0f : scale * kLog2e; }
};

// attention_sm90.cu, attention_bwd_sm90.cu and attention_sm100.cu: whether a call runs on Hopper's own kernels or on
// Blackwell's, and those.
bool attention_fwd_serves_sm90(const AttentionParams& params, const AttentionArgs& args);
void attention_fwd_sm90(const AttentionParams& params, const AttentionArgs& args);
bool attention_bwd_serves_sm90(const AttentionParams& params, const AttentionArgs& args);
void attention_bwd_sm90(const AttentionParams& params, const AttentionArgs& args);
bool attention_fwd_serves_sm100(const AttentionParams& params, const AttentionArgs& args);
void attention_fwd_sm100(const AttentionParams& params, const AttentionArgs& args);

// The sequence, head and rows of a block. `first` is its first query, or key where blocks own keys.
struct Problem {
  int b, head, first;
  int T, S;
  int64_t q_row, k_row;  // of the sequence's first query and key in packed tensors, else 0
  int64_t stat_row;      // of the sequence's first query in lse, stats and dropout's rows, head 0
  int64_t head_rows;     // from one head to the next in them

  FASTLM_DEVICE int64_t row(int query_head) const { return stat_row + query_head * head_rows; }
};

// Sequence b of packed ones starts at tile cu[b] / ROWS + b; that leaves room for all its tiles, and for some empty
// ones, without knowing any length on the host.
template <int ROWS>
FASTLM_DEVICE int sequence_of_tile(Global<const int32_t> cu, int B, int tile) {
  int low = 0, high = B - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (cu[middle] / ROWS + middle <= tile)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

// Tiles of ROWS rows that `rows` rows take, or all of B packed sequences together.
FASTLM_ANY int64_t tile_count(int64_t rows, int64_t size, int64_t B, bool packed) {
  return packed ? rows / size + B : divided_up(rows, size);
}

// Blocks go by batch, head, tile, the tile fastest and the last one first: under a causal mask that has the most work.
// Returns a `first` past the end for a block without work.
template <int ROWS, bool KEYS>
FASTLM_DEVICE Problem locate(const AttentionParams& a) {
  const int heads = KEYS ? a.Hkv : a.H;
  const bool packed = a.cu_q != nullptr;
  const int tiles = (int)tile_count(KEYS ? a.S : a.T, ROWS, a.B, packed);
  const int block = (int)block_index().x;
  const int tile = tiles - 1 - block % tiles;
  Problem p;
  p.head = block / tiles % heads;
  if (packed) {
    const Global<const int32_t> cu_q(a.cu_q), cu_k(a.cu_k), cu = KEYS ? cu_k : cu_q;
    p.b = sequence_of_tile<ROWS>(cu, a.B, tile);
    p.first = (tile - (cu[p.b] / ROWS + p.b)) * ROWS;
    p.q_row = cu_q[p.b], p.k_row = cu_k[p.b];
    p.T = cu_q[p.b + 1] - cu_q[p.b], p.S = cu_k[p.b + 1] - cu_k[p.b];
    p.stat_row = p.q_row, p.head_rows = a.T;
  } else {
    p.b = block / tiles / heads;
    p.first = tile * ROWS;
    p.q_row = p.k_row = 0;
    p.T = a.T, p.S = a.S;
    p.stat_row = (int64_t)p.b * a.H * a.T, p.head_rows = a.T;
  }
  return p;
}

// The matrix of one head of one sequence.
template <class T>
FASTLM_DEVICE Rows<T> rows_of(const Heads& x, int b, int head, int64_t row, int rows, int width, bool vectors) {
  const int64_t offset = b * x.b + head * x.h + row * x.t;
  return {Global<T>((T*)x.data + offset), x.t, rows, width, vectors};
}

// Turns products q.k of one head into scores, in units of log2 or natural ones (AttentionParams).
template <class Element>
struct ScoreRules {
  const AttentionParams& a;
  int T, S;
  const char* mask;  // at (b, head, 0, 0); null: none

  FASTLM_DEVICE ScoreRules(const AttentionParams& params, const Problem& p, int head)
      : a(params), T(p.T), S(p.S), mask(nullptr) {
    if (!a.mask.data) return;
    const int size = a.mask.type == kBool ? 1 : a.mask.type == (int)DType::f32 ? 4 : (int)sizeof(Element);
    mask = (const char*)a.mask.data + (p.b * a.mask.b + head * a.mask.h) * size;
  }

  FASTLM_DEVICE bool inside(int i, int j) const { return i < T && j < S && j - i <= a.right && i - j <= a.left; }
  // Whether queries [i0, i1) attend to all keys [j0, j1), as far as sizes and window go.
  FASTLM_DEVICE bool all_inside(int i0, int i1, int j0, int j1) const {
    return j1 <= S && j1 - 1 - i0 <= a.right && smaller(i1, T) - 1 - j0 <= a.left;
  }

  FASTLM_DEVICE float masked(float x, int i, int j) const {
    const int64_t at = i * a.mask.t + j * a.mask.s;
    if (a.mask.type == kBool) return Global<const uint8_t>((const uint8_t*)mask)[at] ? x : -kInfinity;
    const float added = std::is_same_v<Element, float> || a.mask.type == (int)DType::f32
                            ? Global<const float>((const float*)mask)[at]
                            : to_float(Global<const Element>((const Element*)mask)[at]);
    return added == -kInfinity ? added : x + added;  // whatever x is: NaN or infinite
  }
  FASTLM_DEVICE bool attends(int i, int j) const {
    return inside(i, j) && (!mask || masked(0, i, j) != -kInfinity);
  }

  // The score of a product; slope is its derivative by scale times the product.
  FASTLM_DEVICE float score(float product, int i, int j, float& slope) const {
    slope = 1;
    if (!inside(i, j)) return -kInfinity;
    float x = product * a.scale;
    if (a.softcap > 0) {
      const float bent = tanhf(x * a.softcap_inverse);
      x = a.softcap * bent;
      slope = 1 - bent * bent;
    }
    if (mask) x = masked(x, i, j);
    return a.natural() ? x : x * kLog2e;
  }
};

// The softmax's weight, of a score and log-sum-exp that are `unit` times powers of two, and of the latter's rest, in
// powers of two. Never above 1, which cancellation in huge scores could make infinite; 0 for a closed key, even by NaN.
FASTLM_DEVICE float weight_of(float score, float lse, float rest, float unit) {
  const float x = fmaf(score - lse, unit, -rest);
  return score == -kInfinity ? 0 : exp2_approx(x > 0 ? 0 : x);  // fmin would lose a NaN
}

// The log-sum-exp of a row, given its highest score in natural units and the sum of exponentials relative to it; `rest`
// receives what rounding takes from it (Knuth's two-sum): beside the lowest number the whole logarithm of the sum.
FASTLM_DEVICE float log_sum(float row_max, float total, float& rest) {
  const float low = log2f(total) * kLn2, sum = row_max + low, added = sum - row_max;
  rest = total == 0 ? 0 : (row_max - (sum - added)) + (low - added);
  return total == 0 ? -kInfinity : sum;
}

// Dropout's factors of a warp's accumulator (16, 8) whose rows are queries; `row` and `column` are of this lane's group
// g and of the accumulator's column 0. Two lanes share the four columns of a Philox call: the even one draws for the
// upper row, the odd one for the lower, and they swap halves.
FASTLM_DEVICE void dropout_of_queries(float (&factor)[4], const Dropout& d, int64_t row, int column) {
  const int t = lane_index() % 4;
  const bool odd = t % 2 != 0;
  const Vec<float, 4> mine = d.factors(row + (odd ? 8 : 0), column / 4 + t / 2);
  const float first = shuffle_xor(odd ? mine[0] : mine[2], 1);
  const float second = shuffle_xor(odd ? mine[1] : mine[3], 1);
  factor[0] = odd ? first : mine[0];
  factor[1] = odd ? second : mine[1];
  factor[2] = odd ? mine[2] : first;
  factor[3] = odd ? mine[3] : second;
}

// The same where rows are keys and columns queries; `row` is of the accumulator's column 0, `key` of its row 0. Four
// lanes share the four keys of a Philox call: each draws for one of the four elements they all have, then they
// transpose the 4 x 4 factors.
FASTLM_DEVICE void dropout_of_keys(float (&factor)[4], const Dropout& d, int64_t row, int key) {
  const int g = lane_index() / 4, t = lane_index() % 4, element = g % 4;
  Vec<float, 4> mine = d.factors(row + 2 * t + element % 2, key / 4 + element / 2 * 2 + g / 4);
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool upper = (element & bit) != 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & bit) continue;
      const float got = shuffle_xor(upper ? mine[i] : mine[i | bit], 4 * bit);
      if (upper)
        mine[i] = got;
      else
        mine[i | bit] = got;
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) factor[i] = mine[i];
}

}  // namespace fastlm::cuda
