// Attention forward of a few queries over many keys, for sm_80 and later: decoding from a cache. One block a head would
// leave most of the GPU idle, so the keys are split over blocks, and a second kernel combines their results in order.
//
// A block reads a split of the keys of one key head for 16 rows, which are the queries of all heads of its group one
// after the other, so that keys and values are read once for the group while it has at most 16 rows (more rows take
// more blocks side by side, which share the reads through L2). Its warps share the keys, not the rows: each goes over
// every WARPS-th tile of N keys by an online softmax of its own, with copies of its own in flight, and no barrier until
// they add up what they have. How keys are split depends on their number and the GPU alone: a row's bits do not depend
// on the batch.
//
// FLOPs: 2 (D + Dv) for each pair of row, of 16, and key. Bytes: keys and values once, and for each row and split
// 2 x 4 (Dv + 2) of partial results: with 8 rows of 16 bits at most 1/16 of the keys and values, since a split has 256
// keys or more.
//
// Ladder; the gains are by count, no step has been timed on a GPU:
//   a block a head (attention_fwd.cuh)         B H blocks on a GPU that takes hundreds; keys read by each head
//   + keys split over blocks                   enough blocks for the GPU
//   + the heads of a group in one tile         keys and values once for up to 16 rows
//   + a walk of its own for each warp          no barrier until the end
#pragma once

#include "attention_not_finite.cuh"
#include "attention_softmax.cuh"

namespace fastlm::cuda {

// Tiles by element type and largest head size: 32 to 64 KB of keys and values, of which most are in flight.
template <class T, int D>
struct DecodeTile {
  static constexpr int kWide = D * (int)sizeof(T);  // bytes of a row
  static constexpr int M = 16;                      // rows
  static constexpr int WARPS = 4;
  static constexpr int N = kWide <= 128 ? 64 : kWide <= 256 ? 32 : kWide <= 512 ? 16 : 8;  // keys of a warp
  static constexpr size_t kSharedBytes = (size_t)(M + WARPS * 2 * N) * kWide;
  static_assert(kSharedBytes <= kSharedLimit);
  static_assert(2 * N * kWide >= M * D * (int)sizeof(float) && M * kWide >= 2 * WARPS * M * (int)sizeof(float));
};

constexpr int kMostDecodeQueries = 16, kLeastSplitKeys = 256;

// How a call's keys are split: into two at least where this kernel serves it.
struct DecodePlan {
  int keys, split_keys, splits, row_tiles;

  template <class C>
  static DecodePlan of(const AttentionArgs& a) {
    DecodePlan p{};
    p.keys = (int)(a.right < 0 ? a.S : smaller(a.S, a.T + a.right));
    const int most = smaller(p.keys / kLeastSplitKeys, 2 * multiprocessors());
    if (a.cu_q || a.T > kMostDecodeQueries || most < 2) return p;
    const int step = C::WARPS * C::N;
    p.split_keys = divided_up(divided_up(p.keys, most), step) * step;
    p.splits = divided_up(p.keys, p.split_keys);
    p.row_tiles = (int)divided_up<int64_t>(a.H / a.Hkv * a.T, C::M);
    return p;
  }
};

// Starts copying the rows first to first + 16 of a group's: row r is query r % T of the group's head r / T.
template <int THREADS, class T, int D>
FASTLM_DEVICE void load_packed_queries(const Tile<T, D>& tile, const AttentionParams& a, int b, int head, int first,
                                       int rows) {
  constexpr int kStep = Tile<T, D>::kChunk;
  const auto at = [&](int row) {
    const int packed = first + row;
    return Global<const T>((const T*)a.q.data + b * a.q.b + (head + packed / a.T) * a.q.h + packed % a.T * a.q.t);
  };
#pragma unroll 1
  for (int i = thread_index(); i < 16 * D / kStep; i += THREADS) {
    const int row = i / (D / kStep), column = i % (D / kStep) * kStep;
    const bool there = first + row < rows;
    if (a.vectors) {
      const bool inside = there && column < a.D;
      cp_async<16>(tile.at(row, column), at(inside ? row : 0) + (inside ? column : 0), inside ? 16 : 0);
    } else {
#pragma unroll 1
      for (int d = column; d < column + kStep; ++d)
        *tile.at(row, d) = there && d < a.D ? at(row)[d] : from_float<T>(0.0f);
    }
  }
}

// Adds up the warps' results of 16 rows in order, and writes `rows` of them, normalized, at `out`, `stride` apart, and
// their highest scores in natural units and the sums relative to them at `row_max` and `row_sum`, `sums_stride` apart.
// The tiles are not used any more; they hold the warps' highest scores and sums in the place of the queries, then their
// weighted values.
template <class T, int D, int WARPS>
FASTLM_DEVICE void combine_warps(float (&out)[1][D / 8][4], const SoftmaxState<1>& state, float to_natural, int rows,
                                 int width, Global<float> to, int64_t stride, Global<float> row_max,
                                 Global<float> row_sum, int64_t sums_stride) {
  constexpr int M = 16;
  float* const stats = shared_memory<float>();  // (2, WARPS, M)
  float* const values = reinterpret_cast<float*>(shared_memory<T>() + M * D);  // (WARPS, M, D)
  const int g = lane_index() / 4, t = lane_index() % 4, warp = warp_index();
  sync_threads();  // the tiles have been used
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float total = warp_sum<4>(state.row_sum[0][half]);
    if (t != 0) continue;
    stats[warp * M + 8 * half + g] = total == 0 ? -kInfinity : state.row_max[0][half] * to_natural;
    stats[(WARPS + warp) * M + 8 * half + g] = total;
  }
  sync_threads();
  // Of a row: the warps' common pivot, and their sum relative to it.
  const auto combined = [&](int row, float& pivot) {
    float most = -kInfinity, total = 0;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) most = fmaxf(most, stats[w * M + row]);
    pivot = most == -kInfinity ? 0 : most;
#pragma unroll
    for (int w = 0; w < WARPS; ++w)
      total = fmaf(stats[(WARPS + w) * M + row], exp2_approx((stats[w * M + row] - pivot) * kLog2e), total);
    return total;
  };
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = 8 * half + g;
    float pivot;
    const float total = combined(row, pivot);
    const float factor = total == 0 ? 0 : exp2_approx((stats[warp * M + row] - pivot) * kLog2e) / total;
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) values[(warp * M + row) * D + 8 * n + 2 * t + e] = out[0][n][2 * half + e] * factor;
  }
  sync_threads();
#pragma unroll 1
  for (int i = thread_index(); i < rows * D; i += WARPS * kWarp) {
    const int row = i / D, d = i % D;
    if (d >= width) continue;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) sum += values[(w * M + row) * D + d];
    to[row * stride + d] = sum;
  }
  if (thread_index() >= rows) return;
  float pivot;
  const float total = combined(thread_index(), pivot);
  row_max[thread_index() * sums_stride] = total == 0 ? -kInfinity : pivot;
  row_sum[thread_index() * sums_stride] = total;
}

// partial: (B, H, T, splits, Dv); row_max, row_sum: (B, H, T, splits).
template <class T, int D, int WARPS, int N>
__global__ void __launch_bounds__(WARPS* kWarp, 1)
    attention_decode_kernel(const __grid_constant__ AttentionParams a, const DecodePlan plan, Global<float> partial,
                            Global<float> row_max, Global<float> row_sum) {
  constexpr int M = 16, kThreads = WARPS * kWarp;
  const int block = (int)block_index().x, group = a.H / a.Hkv;
  const int first = block % plan.row_tiles * M, split = block / plan.row_tiles % plan.splits;
  const int kv = block / plan.row_tiles / plan.splits, kv_head = kv % a.Hkv;
  Problem p{};
  p.b = kv / a.Hkv, p.head = kv_head * group, p.T = a.T, p.S = a.S;
  const int64_t row = ((int64_t)p.b * a.H + p.head) * a.T + first;  // of all rows, of this block's first
  const int rows = smaller(M, group * a.T - first), begin = split * plan.split_keys;
  const int end = smaller(plan.keys, begin + plan.split_keys);
  const auto keys = rows_of<const T>(a.k, p.b, kv_head, 0, p.S, a.D, a.vectors);
  const auto values = rows_of<const T>(a.v, p.b, kv_head, 0, p.S, a.Dv, a.vectors);
  const Tile<T, D> q{shared_memory<T>()}, k{q.data + q.elements(M + warp_index() * 2 * N)}, v{k.data + k.elements(N)};

  const auto rules_of = [&](int r) { return ScoreRules<T>(a, p, p.head + (first + r) / a.T); };
  const auto query_of = [&](int r) { return r < rows ? (first + r) % a.T : a.T; };
  const int g = lane_index() / 4, t = lane_index() % 4;
  const int query[2] = {query_of(g), query_of(g + 8)};
  const bool general = a.general();
  const float unit = a.unit();
  const bool closed = a.mask.data || !rules_of(0).all_inside(0, a.T, begin, end);
  float out[1][D / 8][4], scores[1][N / 8][4], factor[1][2];
  SoftmaxState<1> state;

  load_packed_queries<kThreads>(q, a, p.b, p.head, first, first + rows);
  cp_async_commit();
  cp_async_wait<0>();
  sync_threads();
  bool careful = false;
  for (;; careful = true) {
    clear(out);
    state = {};
    const int warp_begin = begin + warp_index() * N;
    if (warp_begin < end) load_tile<N, kWarp>(k, keys, warp_begin);
    cp_async_commit();
    for (int j0 = warp_begin; j0 < end; j0 += WARPS * N) {
      cp_async_wait<0>();
      sync_warp();  // the keys are there, and the last tile's values have been used
      load_tile<N, kWarp>(v, values, j0);
      cp_async_commit();
      if (careful) clean_tile<N, kWarp>(v);
      product_of_rows(scores, q, 0, k);
      sync_warp();  // the keys have been used
      if (j0 + WARPS * N < end) load_tile<N, kWarp>(k, keys, j0 + WARPS * N);
      cp_async_commit();
      if (general || !rules_of(0).all_inside(0, a.T, j0, j0 + N)) {
        const ScoreRules<T> rules[2] = {rules_of(g), rules_of(g + 8)};
#pragma unroll
        for (int n = 0; n < N / 8; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int half = e / 2, key = j0 + 8 * n + 2 * t + e % 2;
            float slope;
            if (general)
              scores[0][n][e] = rules[half].score(scores[0][n][e], query[half], key, slope);
            else if (!rules[half].inside(query[half], key))
              scores[0][n][e] = -kInfinity;
          }
      }
      softmax_step(scores, state, unit, factor, a.natural());
      multiply_rows(out, factor);
      if (a.drops) drop_weights(scores, a.dropout, row + g, j0);
      cp_async_wait<1>();
      sync_warp();  // the values are there
      add_weighted(out, scores, v, 0);
    }
    cp_async_wait<0>();
    if (careful || !closed || !any(not_finite(out))) break;
    sync_warp();  // the tiles have been used
  }

  partial += (row * plan.splits + split) * a.Dv;
  const int64_t stride = (int64_t)plan.splits * a.Dv;
  const int64_t index = row * plan.splits + split;
  combine_warps<T, D, WARPS>(out, state, a.natural() ? 1.0f : unit * kLn2, rows, a.Dv, partial, stride, row_max + index,
                             row_sum + index, plan.splits);
  if (closed && sync_threads_or(careful))
    spread_not_finite<WARPS * N, kThreads>(
        values, begin, end, Rows<float>{partial, stride, rows, a.Dv, false}, 0, rows,
        [&](int r, int key) { return rules_of(r).attends(query_of(r), key); });
}

// out = sum of partial row_sum exp(row_max - lse) over the splits: a block a row, whose warps share the splits.
template <class T>
__global__ void __launch_bounds__(256)
    attention_combine_kernel(const __grid_constant__ AttentionParams a, int splits, Global<const float> partial,
                             Global<const float> row_max, Global<const float> row_sum) {
  constexpr int WARPS = 8;
  float* const parts = shared_memory<float>();  // (WARPS, Dv)
  const int64_t row = block_index().x;
  partial += row * splits * a.Dv;
  row_max += row * splits;
  row_sum += row * splits;
  float most = -kInfinity, total = 0;
  for (int s = lane_index(); s < splits; s += kWarp) most = fmaxf(most, row_max[s]);
  most = warp_max(most);
  const float pivot = most == -kInfinity ? 0 : most;
  const auto weight = [&](int s) { return exp2_approx((row_max[s] - pivot) * kLog2e) * row_sum[s]; };
  for (int s = lane_index(); s < splits; s += kWarp) total += weight(s);
  total = warp_sum(total);
  for (int d = lane_index(); d < a.Dv; d += kWarp) {
    float sum = 0;
#pragma unroll 4
    for (int s = warp_index(); s < splits; s += WARPS)
      sum = fmaf(weight(s), partial[(int64_t)s * a.Dv + d], sum);
    parts[warp_index() * a.Dv + d] = sum;
  }
  sync_threads();
  const int64_t i = row % a.T, head = row / a.T % a.H, b = row / a.T / a.H;
  const Global<T> out((T*)a.out.data + (b * a.out.b + head * a.out.h + i * a.out.t));
  const float normalize = total == 0 ? 0 : 1 / total;
  for (int d = thread_index(); d < a.Dv; d += WARPS * kWarp) {
    float sum = 0;
    for (int w = 0; w < WARPS; ++w) sum += parts[w * a.Dv + d];
    out[d] = from_float<T>(sum * normalize);
  }
  if (!a.lse || thread_index() != 0) return;
  float rest;
  Global<float>(a.lse)[row] = log_sum(pivot, total, rest);
  if (a.rest) Global<float>(a.rest)[row] = rest;
}

template <class T, int D>
int64_t attention_splits(const AttentionArgs& args) {
  return DecodePlan::of<DecodeTile<T, D>>(args).splits;
}

template <class T, int D>
void attention_decode(const AttentionParams& params, const AttentionArgs& args) {
  using C = DecodeTile<T, D>;
  const DecodePlan plan = DecodePlan::of<C>(args);
  const int64_t rows = args.B * args.H * args.T, blocks = args.B * args.Hkv * plan.splits * plan.row_tiles;
  Global<float> partial = args.partial, row_max = args.partial + rows * plan.splits * args.Dv;
  Global<float> row_sum = row_max + rows * plan.splits;
  launch({"attention_decode", {(unsigned)blocks}, C::WARPS * kWarp, C::kSharedBytes, args.stream},
         attention_decode_kernel<T, D, C::WARPS, C::N>, params, plan, partial, row_max, row_sum);
  launch({"attention_combine", {(unsigned)rows}, 256, sizeof(float) * 8 * (size_t)args.Dv, args.stream},
         attention_combine_kernel<T>, params, plan.splits, partial, row_max, row_sum);
}

}  // namespace fastlm::cuda
