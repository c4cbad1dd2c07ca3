// Gradient of attention's additive mask where it broadcasts: dS = P (dP - delta), summed over what the mask has size 1
// in. A mask as large as the scores gets its gradient from the pass over dQ instead.
//
// A block owns M queries and N keys of one (batch, head) of the mask, makes their dS for every batch and head that
// share them, in order, and keeps the sum in registers. Where the mask has one row or one column it writes the sum over
// its own rows or columns. Where such tiles are too few for the GPU, blocks share the batches and heads too. Partial
// sums of either kind are added in order by sum_partials: no atomics, and no matrix of the scores' gradients.
//
// FLOPs: 2 (D + Dv) for each pair of query and key, as the scores are made once more. Bytes: q and dout once for each N
// keys, k and v once for each M queries, of which L2 serves most.
//
// Ladder; the gains are by count, no step has been timed on a GPU:
//   gradients of all scores, then their sum    T S numbers for each batch and head written and read
//   + a block owns a tile of the mask          none of them, for two products more
//   + blocks share batches and heads           as many blocks as the GPU takes, where the mask is small
#pragma once

#include "attention.cuh"
#include "ops.h"

namespace fastlm::cuda {

// Tiles in shared memory: queries, their output's gradients, keys and values.
template <class T, int D>
struct MaskTile {
  static constexpr int kWide = D * (int)sizeof(T);  // bytes of a row
  static constexpr int M = kWide <= 192 ? 128 : kWide <= 512 ? 64 : 32;
  static constexpr int N = kWide <= 384 ? 64 : kWide == 512 ? 32 : 16;
  static constexpr int WARPS = M / 16;
  static constexpr size_t kSharedBytes = (size_t)2 * (M + N) * kWide;
  static_assert(kSharedBytes <= kSharedLimit);
};

// The blocks of a call; all that decides the sums' order.
struct MaskPlan {
  int B, H;                  // the mask's, each 1 or the scores'
  bool one_row, one_column;  // whether it has size 1 in T and in S
  int tiles_t, tiles_s;
  int shared, each, splits;  // batches and heads that share an element, those of a block, blocks for all

  int64_t tiles() const { return (int64_t)B * H * tiles_t * tiles_s; }
  int64_t partials() const {
    return (int64_t)splits * (one_row ? tiles_t : 1) * (one_column ? tiles_s : 1);
  }

  template <class C>
  static MaskPlan of(const AttentionArgs& a) {
    MaskPlan p{};
    p.B = (int)a.dmask.B, p.H = (int)a.dmask.H, p.one_row = a.dmask.T == 1, p.one_column = a.dmask.S == 1;
    p.tiles_t = (int)divided_up<int64_t>(a.T, C::M), p.tiles_s = (int)divided_up<int64_t>(a.S, C::N);
    p.shared = (int)(a.B / p.B * (a.H / p.H));
    const int64_t wanted = divided_up<int64_t>(2 * multiprocessors(), larger<int64_t>(1, p.tiles()));
    p.each = divided_up(p.shared, (int)smaller<int64_t>(wanted, p.shared));
    p.splits = divided_up(p.shared, p.each);
    return p;
  }
};

// The sum over the queries of a tile, one for each key, at `out`: of a warp's by shuffles, of the warps' in order.
template <int N, int WARPS>
FASTLM_DEVICE void store_row(float (&sum)[N / 8][4], Global<float> out, int keys) {
  float* const sums = shared_memory<float>();
  const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
  for (int n = 0; n < N / 8; ++n)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float x = sum[n][e] + sum[n][2 + e];
#pragma unroll
      for (int mask = 4; mask < kWarp; mask *= 2) x += shuffle_xor(x, mask);
      if (g == 0) sums[warp_index() * N + 8 * n + 2 * t + e] = x;
    }
  sync_threads();
  for (int j = thread_index(); j < smaller(N, keys); j += WARPS * kWarp) {
    float total = 0;
    for (int warp = 0; warp < WARPS; ++warp) total += sums[warp * N + j];
    out[j] = total;
  }
}

template <class T, int D, int M, int N>
__global__ void __launch_bounds__(2 * M, 1)
    attention_bwd_mask_kernel(const __grid_constant__ AttentionParams a, const __grid_constant__ MaskPlan plan,
                              Global<float> partial) {
  constexpr int kThreads = 2 * M;
  const int64_t block = block_index().x;
  const int tile_s = (int)(block % plan.tiles_s), tile_t = (int)(block / plan.tiles_s % plan.tiles_t);
  const int64_t rest = block / plan.tiles_s / plan.tiles_t;
  const int split = (int)(rest % plan.splits), matrix = (int)(rest / plan.splits);
  const int first = tile_t * M, j0 = tile_s * N;
  const Tile<T, D> q{shared_memory<T>()}, dout{q.data + q.elements(M)}, k{dout.data + q.elements(M)},
      v{k.data + q.elements(N)};
  const int heads = a.H / plan.H, group = a.H / a.Hkv;

  // The batch and head of the block's nth part.
  const auto part = [&](int n) {
    Problem p{};
    p.b = matrix / plan.H + n / heads, p.head = matrix % plan.H + n % heads;
    p.first = first, p.T = a.T, p.S = a.S;
    p.stat_row = (int64_t)p.b * a.H * a.T, p.head_rows = a.T;
    return p;
  };
  const auto load_scores = [&](int n) {
    const Problem p = part(n);
    load_tile<M, kThreads>(q, rows_of<const T>(a.q, p.b, p.head, 0, a.T, a.D, a.vectors), first);
    load_tile<N, kThreads>(k, rows_of<const T>(a.k, p.b, p.head / group, 0, a.S, a.D, a.vectors), j0);
  };

  const int warp_row = warp_index() * 16, g = lane_index() / 4, t = lane_index() % 4;
  const int begin = split * plan.each;
  // nothing to add where the window leaves the tile out
  const bool empty = j0 - (first + M - 1) > a.right || first - (j0 + N - 1) > a.left;
  const int end = empty ? begin : smaller(plan.shared, begin + plan.each);
  float sum[1][N / 8][4];
  clear(sum);
  if (begin < end) load_scores(begin);
  cp_async_commit();
  for (int n = begin; n < end; ++n) {
    const Problem p = part(n);
    cp_async_wait<0>();
    sync_threads();  // queries and keys are there, and the last part's other tiles have been used
    load_tile<M, kThreads>(dout, rows_of<const T>(a.dout, p.b, p.head, 0, a.T, a.Dv, a.vectors), first);
    load_tile<N, kThreads>(v, rows_of<const T>(a.v, p.b, p.head / group, 0, a.S, a.Dv, a.vectors), j0);
    cp_async_commit();
    const Global<const float> stats(a.stats);
    float lse[2] = {kInfinity, kInfinity}, delta[2] = {}, rest[2] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = first + warp_row + 8 * half + g;
      if (i >= a.T) continue;
      lse[half] = stats[p.row(p.head) + i];
      delta[half] = stats[a.stat_rows + p.row(p.head) + i];
      if (a.rest) rest[half] = stats[2 * a.stat_rows + p.row(p.head) + i];
    }
    const ScoreRules<T> rules(a, p, p.head);
    float weights[1][N / 8][4], dweights[1][N / 8][4];
    product_of_rows(weights, q, warp_row, k);
    cp_async_wait<0>();
    sync_threads();  // the other two are there, and queries and keys have been used
    if (n + 1 < end) load_scores(n + 1);
    cp_async_commit();
    product_of_rows(dweights, dout, warp_row, v);
#pragma unroll
    for (int c = 0; c < N / 8; ++c) {
      float factor[4] = {1, 1, 1, 1};
      if (a.drops) dropout_of_queries(factor, a.dropout, p.row(p.head) + first + warp_row + g, j0 + 8 * c);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int i = first + warp_row + 8 * (e / 2) + g, j = j0 + 8 * c + 2 * t + e % 2;
        float slope;
        const float weight =
            weight_of(rules.score(weights[0][c][e], i, j, slope), lse[e / 2], rest[e / 2], a.natural() ? kLog2e : 1);
        if (weight != 0) sum[0][c][e] += weight * (dweights[0][c][e] * factor[e] - delta[e / 2]);
      }
    }
  }
  cp_async_wait<0>();
  sync_threads();

  // The offset of this block's sums: partial (splits, tiles_t or 1, tiles_s or 1, mask's B, H, T, S).
  const int rows = plan.one_row ? 1 : a.T, columns = plan.one_column ? 1 : a.S;
  int64_t offset = split;
  if (plan.one_row) offset = offset * plan.tiles_t + tile_t;
  if (plan.one_column) offset = offset * plan.tiles_s + tile_s;
  offset = (offset * plan.B * plan.H + matrix) * rows * columns;
  if (plan.one_column) {  // a row's columns lie with four lanes
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float x = 0;
#pragma unroll
      for (int c = 0; c < N / 8; ++c) x += sum[0][c][2 * half] + sum[0][c][2 * half + 1];
      x = warp_sum<4>(x);
      const int i = first + warp_row + 8 * half + g;
      if (!plan.one_row && t == 0 && i < a.T) partial[offset + i] = x;
#pragma unroll
      for (int c = 0; c < N / 8; ++c) sum[0][c][2 * half] = sum[0][c][2 * half + 1] = x;
    }
    if (plan.one_row) store_row<N, M / 16>(sum[0], partial + offset, 1);
  } else if (plan.one_row) {
    store_row<N, M / 16>(sum[0], partial + offset + j0, a.S - j0);
  } else {
#pragma unroll
    for (int c = 0; c < N / 8; ++c)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int i = first + warp_row + 8 * (e / 2) + g, j = j0 + 8 * c + 2 * t + e % 2;
        if (i < a.T && j < a.S) partial[offset + (int64_t)i * columns + j] = sum[0][c][e];
      }
  }
}

template <class T, int D>
int64_t attention_mask_partials(const AttentionArgs& args) {
  return MaskPlan::of<MaskTile<T, D>>(args).partials();
}

template <class T, int D>
void attention_bwd_mask(const AttentionParams& params, const AttentionArgs& args) {
  using C = MaskTile<T, D>;
  const MaskPlan plan = MaskPlan::of<C>(args);
  const int64_t blocks = plan.tiles() * plan.splits;
  if (blocks == 0 || plan.shared == 0) return;
  const MaskGradient& m = args.dmask;
  const bool whole = plan.partials() == 1;
  launch({"attention_bwd_mask", {(unsigned)blocks}, C::WARPS * kWarp, C::kSharedBytes, args.stream},
         attention_bwd_mask_kernel<T, D, C::M, C::N>, params, plan, whole ? static_cast<float*>(m.data) : m.partial);
  if (!whole) sum_partials({args.device, args.stream}, m.partial, m.data, plan.partials(), m.B * m.H * m.T * m.S);
}

}  // namespace fastlm::cuda
