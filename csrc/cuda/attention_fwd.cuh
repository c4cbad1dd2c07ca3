// Attention forward for sm_80 and later: out = dropout(softmax(scale q k^T + mask)) v by an online softmax.
//
// A block owns 16 ROWS WARPS queries of one head and walks over tiles of N keys; a warp owns 16 ROWS of the queries, so
// that a row's maximum and sum stay within four lanes. The weights go from the accumulators of q k^T straight into the
// left operand of the product with v. cp.async brings the values while q k^T runs and the next keys while the softmax
// and the second product run. Only tiles that window or sizes cut, or all where there is a mask or a soft cap, pay for
// the general rules; tiles outside of the window are never loaded. attention_not_finite.cuh says what happens to values
// that are infinite or NaN.
//
// FLOPs: 2 (D + Dv) for each pair of query and key that is not in a skipped tile. Bytes: q, out and lse once; k and v
// once for each 16 ROWS WARPS queries, of which L2 serves most, since neighbouring blocks read the same head.
//
// Ladder; the gains are by count, no step has been timed on a GPU:
//   three kernels with a matrix of scores      4 T S numbers written and read for each head
//   + tiles and an online softmax              none of them
//   + mma.sync                                 a 64th of the multiply instructions, fp32 excepted
//   + weights from accumulators to operands    none of them through shared memory
//   + cp.async, values under q k^T             loads wait under products
//   + tiles outside of the window not loaded   half of all under a causal mask
#pragma once

#include "attention_not_finite.cuh"
#include "attention_softmax.cuh"

namespace fastlm::cuda {

// Tiles by element type and largest head size. Shared memory holds a tile of queries, of keys and of values.
template <class T, int D>
struct ForwardTile {
  static constexpr int kWide = D * (int)sizeof(T);  // bytes of a row
  static constexpr int ROWS = kWide <= 192 ? 2 : 1;
  static constexpr int WARPS = kWide == 256 || kWide == 384 ? 8 : 4;
  static constexpr int N = kWide == 1024 ? 16 : ROWS == 2 || kWide == 512 || sizeof(T) == 4 ? 32 : 64;
  static constexpr int M = 16 * ROWS * WARPS;
  static constexpr size_t kSharedBytes = (size_t)(M + 2 * N) * kWide;
  static_assert(kSharedBytes <= kSharedLimit);
};

template <class T, int D, int ROWS, int WARPS, int N>
__global__ void __launch_bounds__(WARPS* kWarp, 1) attention_fwd_kernel(const __grid_constant__ AttentionParams a) {
  constexpr int M = 16 * ROWS * WARPS, kThreads = WARPS * kWarp;
  const Problem p = locate<M, false>(a);
  if (p.first >= p.T) return;
  const int kv_head = p.head / (a.H / a.Hkv);
  const auto keys = rows_of<const T>(a.k, p.b, kv_head, p.k_row, p.S, a.D, a.vectors);
  const auto values = rows_of<const T>(a.v, p.b, kv_head, p.k_row, p.S, a.Dv, a.vectors);
  const ScoreRules<T> rules(a, p, p.head);
  const Tile<T, D> q{shared_memory<T>()}, k{q.data + q.elements(M)}, v{k.data + k.elements(N)};

  const int warp_row = warp_index() * 16 * ROWS;
  const int i = p.first + warp_row + lane_index() / 4;  // this lane's first query
  const int begin = larger(0, p.first - a.left) / N * N;
  const int end = smaller(p.S, smaller(p.first + M, p.T) + a.right);
  const bool general = a.general();
  const float unit = a.unit();
  float out[ROWS][D / 8][4], scores[ROWS][N / 8][4], factor[ROWS][2];
  SoftmaxState<ROWS> state;

  load_tile<M, kThreads>(q, rows_of<const T>(a.q, p.b, p.head, p.q_row, p.T, a.D, a.vectors), p.first);
  const bool closed = a.mask.data || !rules.all_inside(p.first, p.first + M, begin, end);
  bool careful = false;
  for (;; careful = true) {
    clear(out);
    state = {};
    if (begin < end) load_tile<N, kThreads>(k, keys, begin);
    cp_async_commit();
    for (int j0 = begin; j0 < end; j0 += N) {
      cp_async_wait<0>();
      sync_threads();  // the keys are there, and the last tile's values have been used
      load_tile<N, kThreads>(v, values, j0);
      cp_async_commit();
      if (careful) clean_tile<N, kThreads>(v);
      product_of_rows(scores, q, warp_row, k);
      if (general || !rules.all_inside(p.first, p.first + M, j0, j0 + N))
        apply_rules(scores, rules, general, i, j0 + 2 * (lane_index() % 4));
      cp_async_wait<0>();
      sync_threads();  // the values are there, and the keys have been used
      if (j0 + N < end) load_tile<N, kThreads>(k, keys, j0 + N);
      cp_async_commit();
      softmax_step(scores, state, unit, factor, a.natural());
      multiply_rows(out, factor);
      if (a.drops) drop_weights(scores, a.dropout, p.row(p.head) + i, j0);
      add_weighted(out, scores, v, 0);
    }
    cp_async_wait<0>();
    if (careful || !closed || !sync_threads_or(not_finite(out))) break;
  }

  finish_softmax(state, a, p.row(p.head), i, p.T, factor);
  multiply_rows(out, factor);
  const auto target = rows_of<T>(a.out, p.b, p.head, p.q_row, p.T, a.Dv, a.vectors);
  store_rows(target, p.first + warp_row, q, warp_row, 0, out);
  if (careful)
    spread_not_finite<N, kThreads>(values, begin, end, target, p.first, smaller(M, p.T - p.first),
                                   [&](int row, int key) { return rules.attends(p.first + row, key); });
}

template <class T, int D>
void attention_fwd(const AttentionParams& params, const AttentionArgs& args) {
  using C = ForwardTile<T, D>;
  const int64_t tiles = tile_count(args.T, C::M, args.B, args.cu_q != nullptr);
  const int64_t blocks = tiles * args.H * (args.cu_q ? 1 : args.B);
  if (blocks == 0) return;
  launch({"attention_fwd", {(unsigned)blocks}, C::WARPS * kWarp, C::kSharedBytes, args.stream},
         attention_fwd_kernel<T, D, C::ROWS, C::WARPS, C::N>, params);
}

}  // namespace fastlm::cuda
