// Attention backward for sm_80 and later. With P = exp(score - lse - rest) made tile by tile and dropout's factors F:
//   dV = (P F)^T dO,   dP = dO V^T F,   dS = P (dP - delta),   delta = rowsum(dO O) - dlse,
//   dQ = scale dS K,   dK = scale dS^T Q,   and dS is the gradient of a mask as large as the scores, which the pass over
//   dQ writes; attention_mask.cuh has those of smaller masks.
//
// Three launches: delta, lse and its rest, a warp per row; dK and dV; dQ. The last two are one kernel in which a
// block owns a tile of rows of one side and walks over tiles of the other, two of them in shared memory: owners of keys
// compute S^T = K Q^T and dP^T = V dO^T, walk over the queries of every head that shares the keys, and add up dK and dV;
// owners of queries compute S and dP and add up dQ. So every sum is made in one block in a fixed order, without atomics,
// and P and dS go from accumulators to the left operand of the next product without passing through memory. The price
// is that S and dP are computed twice: seven products instead of five.
//
// What is infinite or NaN reaches only rows and keys that attend to it, as attention_not_finite.cuh says of the forward
// pass. Of queries and keys the finite elements alone are multiplied then: a row's weights are NaN where it attends to
// others. Of dO those that are not finite are added to the keys that their rows attend to.
//
// FLOPs: 14 D for each pair of query and key outside of skipped tiles. Bytes: q, k, v, dout, out, dq, dk and dv once,
// and the walked side once for each owner's tile, of which L2 serves most.
//
// Ladder; the gains are by count, no step has been timed on a GPU:
//   weights and their gradients stored         4 T S numbers written and read for each head
//   + recomputed tile by tile from lse         none of them, for one product more
//   + an owner for every sum                   no atomics and the same bits in every run, for two products more
//   + dS from accumulators to operands         none of it through shared memory
//   + two stages by cp.async                   loads wait under products
#pragma once

#include "attention_mask.cuh"
#include "attention_not_finite.cuh"

namespace fastlm::cuda {

// Tiles by element type and largest head size, without spills on any architecture. PARTS warps share the rows of an
// owner of keys and split the columns of dK and dV, which would not fit the registers of one; they repeat the scores.
template <class T, int D, bool KEYS>
struct BackwardTile {
  static constexpr int kWide = D * (int)sizeof(T);  // bytes of a row
  static constexpr int PARTS = !KEYS ? 1 : kWide == 1024 ? 4 : D >= 192 || kWide == 512 ? 2 : 1;
  static constexpr int WARPS = kWide <= 256 ? 8 : kWide <= 512 ? 4 * PARTS : PARTS;
  static constexpr int N = kWide <= (KEYS ? 64 : 128)               ? 64
                           : kWide > 384 || (KEYS && kWide == 256) ? 16
                                                                   : 32;
  static constexpr int M = 16 * WARPS / PARTS;  // rows of the owner
  static constexpr size_t kSharedBytes = (size_t)(2 * M + 4 * N) * kWide + 6 * N * sizeof(float);
  static_assert(kSharedBytes <= kSharedLimit);
};

// stats = (lse in the scores' units, +inf for a row that attends to nothing, so that its P is 0; delta; where there is a
// rest, that in powers of two).
template <class T>
__global__ void __launch_bounds__(256) attention_delta_kernel(const __grid_constant__ AttentionParams a) {
  const int64_t row = (int64_t)block_index().x * 8 + warp_index();
  if (row >= a.stat_rows) return;
  const int64_t i = row % a.T, head = row / a.T % a.H, b = row / a.T / a.H;
  const Global<const T> dout((const T*)a.dout.data + (b * a.dout.b + head * a.dout.h + i * a.dout.t));
  const Global<const T> out((const T*)a.out.data + (b * a.out.b + head * a.out.h + i * a.out.t));
  float sum = 0;
  for (int d = lane_index(); d < a.Dv; d += kWarp) sum = fmaf(to_float(dout[d]), to_float(out[d]), sum);
  sum = warp_sum(sum);
  if (lane_index() != 0) return;
  const float lse = Global<const float>(a.lse)[row];
  const Global<float> stats(a.stats);
  stats[row] = lse == -kInfinity ? kInfinity : a.natural() ? lse : lse * kLog2e;
  if (a.rest) stats[2 * a.stat_rows + row] = Global<const float>(a.rest)[row] * kLog2e;
  stats[a.stat_rows + row] = sum - (a.dlse ? Global<const float>(a.dlse)[row] : 0.0f);
}

// Starts copying `count` of an array's elements from `first` on, zeros past `limit`.
template <int COUNT>
FASTLM_DEVICE void load_stats(float* to, const float* from, int64_t row, int first, int limit) {
  const int i = thread_index();
  if (i >= COUNT) return;
  const bool inside = first + i < limit;
  cp_async<4>(to + i, Global<const float>(from + row + (inside ? first + i : 0)), inside ? 4 : 0);
}

template <class T>
FASTLM_DEVICE void store_dmask(const AttentionParams& a, int64_t at, float x) {
  if (std::is_same_v<T, float> || a.dmask_type == (int)DType::f32)
    Global<float>((float*)a.dmask)[at] = x;
  else
    Global<T>((T*)a.dmask)[at] = from_float<T>(x);
}

template <class T, int D, int WARPS, int PARTS, int N, bool KEYS>
__global__ void __launch_bounds__(WARPS* kWarp, 1) attention_bwd_kernel(const __grid_constant__ AttentionParams a) {
  constexpr int M = 16 * WARPS / PARTS, kThreads = WARPS * kWarp, kColumns = D / PARTS;
  const Problem p = locate<M, KEYS>(a);
  const int size = KEYS ? p.S : p.T, others = KEYS ? p.T : p.S;
  if (p.first >= size) return;
  const int group = a.H / a.Hkv, kv_head = KEYS ? p.head : p.head / group;
  const Tile<T, D> own{shared_memory<T>()}, own_grad{own.data + own.elements(M)};
  T* const walked = own_grad.data + own.elements(M);  // two stages of two tiles
  float* const walked_stats = reinterpret_cast<float*>(walked + 4 * own.elements(N));  // and of (lse, delta, rest)

  // Owners of keys hold k and v and walk over q and dout; owners of queries the reverse.
  const auto keys = rows_of<const T>(a.k, p.b, kv_head, p.k_row, p.S, a.D, a.vectors);
  const auto values = rows_of<const T>(a.v, p.b, kv_head, p.k_row, p.S, a.Dv, a.vectors);
  const auto queries = [&](int head) { return rows_of<const T>(a.q, p.b, head, p.q_row, p.T, a.D, a.vectors); };
  const auto douts = [&](int head) { return rows_of<const T>(a.dout, p.b, head, p.q_row, p.T, a.Dv, a.vectors); };
  const int reach_back = KEYS ? a.right : a.left, reach_on = KEYS ? a.left : a.right;
  const int begin = larger(0, p.first - reach_back) / N * N;
  const int end = smaller(others, smaller(p.first + M, size) + reach_on);
  const int tiles = begin < end ? divided_up(end - begin, N) : 0, steps = KEYS ? tiles * group : tiles;

  const auto load_step = [&](int step) {
    const int head = KEYS ? kv_head * group + step / tiles : p.head, first = begin + step % tiles * N;
    const Tile<T, D> one{walked + step % 2 * 2 * own.elements(N)}, two{one.data + own.elements(N)};
    if constexpr (KEYS) {
      load_tile<N, kThreads>(one, queries(head), first);
      load_tile<N, kThreads>(two, douts(head), first);
      float* const stats = walked_stats + step % 2 * 3 * N;
      load_stats<N>(stats, a.stats, p.row(head), first, p.T);
      load_stats<N>(stats + N, a.stats + a.stat_rows, p.row(head), first, p.T);
      if (a.rest) load_stats<N>(stats + 2 * N, a.stats + 2 * a.stat_rows, p.row(head), first, p.T);
    } else {
      load_tile<N, kThreads>(one, keys, first);
      load_tile<N, kThreads>(two, values, first);
    }
  };

  const int warp_row = warp_index() / PARTS * 16, column = warp_index() % PARTS * kColumns;
  const int g = lane_index() / 4, t = lane_index() % 4;
  const bool general = a.general();
  const float unit = a.scale * kLog2e, general_unit = a.natural() ? kLog2e : 1;
  float grad[1][kColumns / 8][4], grad_v[1][KEYS ? kColumns / 8 : 2][4];
  float own_stats[2][3] = {};  // (lse, delta, rest) of this lane's two queries
  if constexpr (!KEYS) {
    const Global<const float> stats(a.stats);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = p.first + warp_row + 8 * half + g;
      if (i >= p.T) continue;
      own_stats[half][0] = stats[p.row(p.head) + i];
      own_stats[half][1] = stats[a.stat_rows + p.row(p.head) + i];
      if (a.rest) own_stats[half][2] = stats[2 * a.stat_rows + p.row(p.head) + i];
    }
    load_tile<M, kThreads>(own, queries(p.head), p.first);
    load_tile<M, kThreads>(own_grad, douts(p.head), p.first);
  } else {
    load_tile<M, kThreads>(own, keys, p.first);
    load_tile<M, kThreads>(own_grad, values, p.first);
  }
  const ScoreRules<T> sides(a, p, KEYS ? kv_head * group : p.head);
  const bool closed = a.mask.data || !(KEYS ? sides.all_inside(begin, end, p.first, p.first + M)
                                            : sides.all_inside(p.first, p.first + M, begin, end));
  bool careful = false;
#pragma unroll 1
  for (;; careful = true) {
    clear(grad);
    clear(grad_v);
    if (steps > 0) load_step(0);
    cp_async_commit();
    for (int step = 0; step < steps; ++step) {
      if (step + 1 < steps) load_step(step + 1);
      cp_async_commit();
      cp_async_wait<1>();
      sync_threads();  // this step's tiles are there
      const int head = KEYS ? kv_head * group + step / tiles : p.head, first = begin + step % tiles * N;
      const Tile<T, D> one{walked + step % 2 * 2 * own.elements(N)}, two{one.data + own.elements(N)};
      const float* const stats = walked_stats + step % 2 * 3 * N;
      const ScoreRules<T> rules(a, p, head);
      float weights[1][N / 8][4], dscores[1][N / 8][4];
      product_of_rows(weights, own, warp_row, one);
      product_of_rows(dscores, own_grad, warp_row, two);

      const bool plain = !general && (KEYS ? rules.all_inside(first, first + N, p.first, p.first + M)
                                           : rules.all_inside(p.first, p.first + M, first, first + N));
#pragma unroll
      for (int n = 0; n < N / 8; ++n) {
        float factor[4] = {1, 1, 1, 1};
        if (a.drops && KEYS) dropout_of_keys(factor, a.dropout, p.row(head) + first + 8 * n, p.first + warp_row);
        if (a.drops && !KEYS)
          dropout_of_queries(factor, a.dropout, p.row(head) + p.first + warp_row + g, first + 8 * n);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int owned = p.first + warp_row + 8 * (e / 2) + g, walked_column = 8 * n + 2 * t + e % 2;
          const int i = KEYS ? first + walked_column : owned, j = KEYS ? owned : first + walked_column;
          const float lse = KEYS ? stats[walked_column] : own_stats[e / 2][0];
          const float delta = KEYS ? stats[N + walked_column] : own_stats[e / 2][1];
          float slope = 1, weight;
          if (plain)
            weight = exp2_approx(fmaf(weights[0][n][e], unit, -lse));
          else
            weight = weight_of(rules.score(weights[0][n][e], i, j, slope), lse,
                               !a.rest ? 0 : KEYS ? stats[2 * N + walked_column] : own_stats[e / 2][2], general_unit);
          float dscore = weight * (dscores[0][n][e] * factor[e] - delta);
          if (!plain && weight == 0) dscore = 0, slope = 1;  // whatever a closed key holds
          if constexpr (!KEYS)
            if (a.dmask && i < p.T && j < p.S) store_dmask<T>(a, (p.row(head) + i) * p.S + j, dscore);
          weights[0][n][e] = weight * factor[e];
          dscores[0][n][e] = dscore * slope;
        }
      }
      if (careful) {
        clean_tile<N, kThreads>(one);
        if constexpr (KEYS) clean_tile<N, kThreads>(two);
      }
      add_weighted(grad, dscores, one, column);
      if constexpr (KEYS) add_weighted(grad_v, weights, two, column);
      sync_threads();  // this step's tiles have been used
    }
    cp_async_wait<0>();
    sync_threads();
    if (careful || !closed || !sync_threads_or(not_finite(grad) || (KEYS && not_finite(grad_v)))) break;
  }

  const float scale[1][2] = {{a.scale, a.scale}};
  multiply_rows(grad, scale);
  const int from = p.first + warp_row;
  if constexpr (KEYS) {
    store_rows(rows_of<T>(a.dk, p.b, kv_head, p.k_row, p.S, a.D, a.vectors), from, own, warp_row, column, grad);
    const auto target = rows_of<T>(a.dv, p.b, kv_head, p.k_row, p.S, a.Dv, a.vectors);
    store_rows(target, from, own_grad, warp_row, column, grad_v);
    for (int head = kv_head * group; careful && head < (kv_head + 1) * group; ++head) {
      const ScoreRules<T> rules(a, p, head);
      spread_not_finite<N, kThreads>(douts(head), begin, end, target, p.first, smaller(M, p.S - p.first),
                                     [&](int key, int query) { return rules.attends(query, p.first + key); });
    }
  } else if (a.dq.data) {
    store_rows(rows_of<T>(a.dq, p.b, p.head, p.q_row, p.T, a.D, a.vectors), from, own, warp_row, column, grad);
  }
}

template <class T, int D, bool KEYS>
void attention_bwd_pass(const AttentionParams& params, const AttentionArgs& args) {
  using C = BackwardTile<T, D, KEYS>;
  const bool packed = args.cu_q != nullptr;
  const int64_t tiles = tile_count(KEYS ? args.S : args.T, C::M, args.B, packed);
  const int64_t blocks = tiles * (KEYS ? args.Hkv : args.H) * (packed ? 1 : args.B);
  if (blocks == 0) return;
  launch({KEYS ? "attention_bwd_dkdv" : "attention_bwd_dq", {(unsigned)blocks}, C::WARPS * kWarp, C::kSharedBytes,
          args.stream},
         attention_bwd_kernel<T, D, C::WARPS, C::PARTS, C::N, KEYS>, params);
}

template <class T, int D>
void attention_bwd(const AttentionParams& params, const AttentionArgs& args) {
  if (params.stat_rows > 0)
    launch({"attention_delta", {(unsigned)divided_up<int64_t>(params.stat_rows, 8)}, 256, 0, args.stream},
           attention_delta_kernel<T>, params);
  if (args.dk.data || args.dv.data) attention_bwd_pass<T, D, true>(params, args);  // either may be empty
  if (args.dq.data || params.dmask) attention_bwd_pass<T, D, false>(params, args);
  if (args.dmask.data && !params.dmask) attention_bwd_mask<T, D>(params, args);
}

}  // namespace fastlm::cuda
