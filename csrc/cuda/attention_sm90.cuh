// Attention forward for Hopper (sm_90a): out = softmax(scale q k^T) v, full or causal, head sizes 64 and 128, bf16 and
// fp16, by an online softmax.
//
// A block owns 128 queries of one head. A producer thread has TMA load the queries once, and keys and values in tiles
// of 128 into a ring of two stages each. Two consumer warpgroups own 64 queries each: S = q k^T by wgmma from shared
// memory, the softmax in registers, the weights straight from S's accumulators into the left operand of the product
// with v, which wgmma reads transposed. The next tile's S runs together with this tile's product with v, and the
// warpgroups take turns, so that the softmax of one runs under the products of the other. The producer gives its
// registers to the consumers. Tiles beyond the diagonal are never loaded; only tiles that the diagonal or the sizes cut
// pay for the rules. Everything else (masks, dropout, soft cap, windows, packed sequences) is attention_fwd.cuh's.
//
// Values that are infinite or NaN times a weight of 0 would reach rows that do not attend to them. A block that the
// diagonal cuts looks at its sums once, after its last tile; if they are not finite, producer and consumers go over all
// tiles again, with 0 in the place of such values in the tiles that the diagonal cuts, and then add them to the rows
// that attend to them. Other blocks pay nothing, and rows without such values keep their bits.
//
// FLOPs: 4 D for each pair of query and key in a tile that is not skipped. Bytes: q, out and lse once; k and v once for
// each 128 queries, mostly from L2. hopper.cuh says what the emulation leaves open.
//
// Ladder from attention_fwd.cuh's; no step has been timed on a GPU, since the kernel has not run on one:
//   + wgmma from shared memory                 operands no longer pass through registers, but for the weights
//   + TMA by a producer thread                 no addresses, registers or instructions of consumers for loads
//   + setmaxnreg                               240 registers for a consumer, so 64 queries by 128 keys without spills
//   + the next S beside this product with v    softmax runs under products of its own warpgroup
//   + warpgroups take turns                    and under those of the other one
#pragma once

#include "attention_softmax.cuh"
#include "attention_tile_sm90.cuh"

namespace fastlm::cuda {

template <class T, int D>
struct HopperTile {
  static constexpr int kConsumers = 2, kRows = 64;  // rows of a warpgroup's wgmma
  static constexpr int M = kConsumers * kRows, N = 128, kStages = 2, kPanels = D / kPanelColumns;
  static constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
  static_assert((kProducerRegisters + kConsumers * kConsumerRegisters) * kWarpgroup <= 64 * 1024);

  // Each warpgroup has its own tile of queries: (panel, row). Keys and values: (stage, panel, row).
  T q[kConsumers][kPanels][kRows][kPanelColumns];
  T k[kStages][kPanels][N][kPanelColumns];
  T v[kStages][kPanels][N][kPanelColumns];
  Barrier q_full, k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
  Barrier judged;  // every warp has looked at its sums
  int non_finite;  // whether some of them are not finite

  // Where tile n stands in the ring, and the parity of its turn.
  FASTLM_DEVICE static int stage(int n) { return n % kStages; }
  FASTLM_DEVICE static int turn(int n) { return n / kStages % 2; }

  FASTLM_DEVICE void init() {
    const int warps = kConsumers * kWarpgroup / kWarp;
    barrier_init(&q_full, 1), barrier_init(&judged, warps);
#pragma unroll
    for (int s = 0; s < kStages; ++s) {
      barrier_init(&k_full[s], 1), barrier_init(&v_full[s], 1);
      barrier_init(&k_empty[s], warps), barrier_init(&v_empty[s], warps);
    }
    publish_barriers();
    non_finite = 0;
  }

  FASTLM_DEVICE bool must_repeat() {
    barrier_wait(&judged, 0);
    return non_finite != 0;
  }
};

// The tiles of keys of a block; from `cut` on, some of its queries leave out some key for the diagonal.
struct KeyWalk {
  int tiles, cut;

  FASTLM_DEVICE KeyWalk(const Problem& p, int right, int rows, int columns)
      : tiles(divided_up(smaller(p.S, smaller(p.first + rows, p.T) + right), columns)),
        cut(smaller(tiles, (p.first + right + 1) / columns)) {}
  FASTLM_DEVICE bool is_cut() const { return cut < tiles; }
};

struct HopperMaps {
  TensorMap q, k, v;
};

// The producer: one thread.
template <class T, int D>
FASTLM_DEVICE void produce(HopperTile<T, D>& tile, const HopperMaps& maps, const Problem& p, int kv_head,
                           const KeyWalk& walk) {
  using C = HopperTile<T, D>;
  barrier_expect(&tile.q_full, (int)sizeof(tile.q));
#pragma unroll
  for (int w = 0; w < C::kConsumers; ++w)
#pragma unroll
    for (int panel = 0; panel < C::kPanels; ++panel)
      copy_panel(tile.q[w][panel], maps.q, &tile.q_full, panel * kPanelColumns, p.first + w * C::kRows, p.head, p.b);
#pragma unroll 1
  for (int n = 0; n < 2 * walk.tiles; ++n) {
    const bool recompute = n >= walk.tiles;
    if (n == walk.tiles && !(walk.is_cut() && tile.must_repeat())) break;
    const int j0 = (recompute ? n - walk.tiles : n) * C::N;
    const int s = C::stage(n), emptied = C::turn(n) ^ 1;  // the first turn waits for nothing
    const auto load = [&](T(&to)[C::kPanels][C::N][kPanelColumns], const TensorMap& map, Barrier* full,
                          Barrier* empty) {
      barrier_wait(empty, emptied);
      barrier_expect(full, (int)sizeof(to));
#pragma unroll
      for (int panel = 0; panel < C::kPanels; ++panel)
        copy_panel(to[panel], map, full, panel * kPanelColumns, j0, kv_head, p.b);
    };
    load(tile.k[s], maps.k, &tile.k_full[s], &tile.k_empty[s]);
    load(tile.v[s], maps.v, &tile.v_full[s], &tile.v_empty[s]);
  }
}

// The warpgroups' turns at issuing products: barrier 1 + w is warpgroup w's, 3 + w is for its own threads.
FASTLM_DEVICE void await_turn(int w) { sync_named(1 + w, 2 * kWarpgroup); }
FASTLM_DEVICE void pass_turn(int w) { arrive_named(2 - w, 2 * kWarpgroup); }

// Puts 0 in the place of what is not finite, for the products of this warpgroup, number w. The other one may be doing
// the same.
template <class T, int D>
FASTLM_DEVICE void clean(T (&values)[D / kPanelColumns][HopperTile<T, D>::N][kPanelColumns], int w) {
  T* const all = &values[0][0][0];
#pragma unroll 1
  for (int i = thread_index() % kWarpgroup; i < HopperTile<T, D>::N * D; i += kWarpgroup)
    if (not_finite(all[i])) all[i] = from_float<T>(0.0f);
  fence_async();
  sync_named(3 + w, kWarpgroup);
}

// Adds the values of keys from `first_key` on that are not finite to the warpgroup's rows that attend to them, which it
// has written. A thread has a column; each row attends to what the row before it does, and one key more.
template <class T>
FASTLM_DEVICE void spread_not_finite(const Rows<T>& out, const Rows<const T>& values, int first, int end, int first_key,
                                     int right) {
  const int column = thread_index() % kWarpgroup;
  if (column >= out.width) return;
  float sum = 0;
  int key = first_key;
#pragma unroll 1
  for (int row = first; row < end; ++row) {
#pragma unroll 1
    for (; key < smaller(values.rows, row + right + 1); ++key) {
      const float x = to_float(values.data[key * values.stride + column]);
      if (not_finite(x)) sum += x;
    }
    T& x = out.data[row * out.stride + column];
    if (not_finite(sum)) x = from_float<T>(to_float(x) + sum);
  }
}

// A consumer warpgroup, number w.
template <class T, int D>
FASTLM_DEVICE void consume(HopperTile<T, D>& tile, const AttentionParams& a, const Problem& p, int w,
                           const KeyWalk& walk) {
  using C = HopperTile<T, D>;
  const ScoreRules<T> rules(a, p, p.head);
  const float unit = a.scale * kLog2e;
  const int warp_row = warp_index() % 4 * 16, first = p.first + w * C::kRows;
  const int i = first + warp_row + lane_index() / 4;  // this lane's first query
  float out[1][D / 8][4], scores[1][C::N / 8][4], factor[1][2];
  Left<T> weights[C::N / 16];
  SoftmaxState<1> state;
  const auto soften = [&](int n) {
    const int j0 = n * C::N;
    if (!rules.all_inside(first, first + C::kRows, j0, j0 + C::N))
      apply_rules(scores, rules, false, i, j0 + 2 * (lane_index() % 4));
    softmax_step(scores, state, unit, factor);
  };
  const auto take_weights = [&] {
#pragma unroll
    for (int n = 0; n < C::N / 16; ++n) weights[n].take(scores[0][2 * n], scores[0][2 * n + 1]);
  };

  barrier_wait(&tile.q_full, 0);
  int loaded = 0;  // tiles before this pass
#pragma unroll 1
  for (;;) {
    const bool recompute = loaded > 0;
    // Waits for the values of tile n.
    const auto values_of = [&](int n) -> auto& {
      const int s = C::stage(loaded + n);
      barrier_wait(&tile.v_full[s], C::turn(loaded + n));
      if (recompute && n >= walk.cut) clean<T, D>(tile.v[s], w);
      return tile.v[s];
    };
    clear(out);
    state = {};
    if (w == 1 && walk.tiles > 1) pass_turn(w);  // warpgroup 0 begins
    barrier_wait(&tile.k_full[C::stage(loaded)], C::turn(loaded));
    hold(scores);
    wgmma_fence();
    issue_scores(scores, tile.q[w], tile.k[C::stage(loaded)]);
    wgmma_wait<0>();
    hold(scores);
    release(&tile.k_empty[C::stage(loaded)]);
    soften(0);
    take_weights();
#pragma unroll 1
    for (int n = 1; n < walk.tiles; ++n) {
      const int s = C::stage(loaded + n), before = C::stage(loaded + n - 1);
      barrier_wait(&tile.k_full[s], C::turn(loaded + n));
      await_turn(w);
      hold(scores), hold(out);
      wgmma_fence();
      issue_scores(scores, tile.q[w], tile.k[s]);
      const auto& values = values_of(n - 1);
      wgmma_fence();
      issue_weighted(out, weights, values);
      if (w == 0 || n + 1 < walk.tiles) pass_turn(w);
      wgmma_wait<1>();
      hold(scores);
      release(&tile.k_empty[s]);
      soften(n);
      wgmma_wait<0>();
      hold(out);
      release(&tile.v_empty[before]);
      multiply_rows(out, factor);
      take_weights();
    }
    const auto& values = values_of(walk.tiles - 1);
    hold(out);
    wgmma_fence();
    issue_weighted(out, weights, values);
    wgmma_wait<0>();
    hold(out);
    release(&tile.v_empty[C::stage(loaded + walk.tiles - 1)]);
    if (recompute || !walk.is_cut()) break;
    if (not_finite(out)) tile.non_finite = 1;
    sync_warp();
    release(&tile.judged);
    if (!tile.must_repeat()) break;
    loaded = walk.tiles;
  }

  finish_softmax(state, a, p.row(p.head), i, p.T, factor);
  multiply_rows(out, factor);
  sync_named(3 + w, kWarpgroup);  // no warp needs the queries any more: their place takes the result
  const auto target = rows_of<T>(a.out, p.b, p.head, 0, p.T, D, true);
  store_rows(target, first + warp_row, Tile<T, D>{&tile.q[w][0][0][0]}, warp_row, 0, out);
  if (loaded == 0) return;
  sync_named(3 + w, kWarpgroup);  // the result is written
  spread_not_finite(target, rows_of<const T>(a.v, p.b, p.head / (a.H / a.Hkv), 0, p.S, D, true), first,
                    smaller(first + C::kRows, p.T), walk.cut * C::N, a.right);
}

template <class T, int D>
__global__ void __launch_bounds__(HopperTile<T, D>::kThreads, 1)
    attention_fwd_sm90_kernel(const __grid_constant__ AttentionParams a, const __grid_constant__ HopperMaps maps) {
#if FASTLM_SM90A
  using C = HopperTile<T, D>;
  static_assert(sizeof(C) <= kHopperSharedLimit);
  const Problem p = locate<C::M, false>(a);
  C& tile = *shared_memory<C>();
  const KeyWalk walk(p, a.right, C::M, C::N);
  if (thread_index() == 0) tile.init();
  sync_threads();
  const int warpgroup = shuffle(thread_index() / kWarpgroup, 0);  // tells the compiler that a warp's lanes agree
  if (warpgroup == 0) {
    give_registers<C::kProducerRegisters>();
    if (thread_index() == 0) produce(tile, maps, p, p.head / (a.H / a.Hkv), walk);
  } else {
    take_registers<C::kConsumerRegisters>();
    consume(tile, a, p, warpgroup - 1, walk);
  }
#else
  refuse_to_run();
#endif
}

}  // namespace fastlm::cuda
