// Attention backward for Hopper (sm_90a), full or causal, head sizes 64 and 128, bf16 and fp16; what is computed stands
// in attention_bwd.cuh.
//
// Four steps on the stream: zeros for the counters, attention_bwd.cuh's delta, this kernel, and a conversion of dQ.
// A block owns 128 keys of one head and walks over the query tiles (64 queries at head size 128, 128 at 64) of every
// head that shares them. Each of its two consumer warpgroups owns 64 keys and has, for every tile, five products by
// wgmma: S^T = K Q^T and dP^T = V dO^T from shared memory; dV += P^T dO and dK += dS^T Q, whose left operands go from
// accumulators to registers without passing through memory; and, after both have put their dS^T into shared memory,
// dQ = dS K, of which each makes one half. dK and dV stay in registers. In the producer warpgroup one warp has TMA load
// tiles into a ring of two stages, one brings the rows' lse and delta, and two hand dQ to the copy engine.
//
// Every block adds its part of dQ to an fp32 workspace, in the order of the keys, so that the same bits come out of
// every run: a counter for each query tile says whose turn it is, and while the copy engine adds, nobody else touches
// the tile. Blocks take their keys by a ticket in the same order, so that a block only ever waits for blocks that have
// started, and no schedule can lock them. All blocks of a head go from the last queries to the first: under a causal
// mask too they begin at the same tile, each one handing-over behind the block before it, the longest walks first.
//
// FLOPs: 10 D for each pair of query and key in a tile that is not skipped. Bytes: k, v, dk and dv once; q, dout and
// the rows' statistics once for each 128 keys, mostly from L2; the fp32 dQ written or added to once for each 128 keys,
// and read once. hopper.cuh says what the emulation leaves open.
//
// Ladder from attention_bwd.cuh's; no step has been timed on a GPU, since the kernel has not run on one:
//   + dQ added up in global memory             five products instead of seven, for 4 bytes a number of dQ and 128 keys
//   + in turns                                 the same bits in every run; blocks start in the order of their turns
//   + wgmma, TMA, setmaxnreg                   as in attention_sm90.cuh
//   + dQ by the copy engine                    consumers wait for shared memory alone
#pragma once

#include "attention_bwd.cuh"
#include "attention_tile_sm90.cuh"

namespace fastlm::cuda {

template <class T, int D>
struct HopperBackwardTile {
  static constexpr int kConsumers = 2, kRows = 64;  // keys of a warpgroup, rows of its wgmma
  static constexpr int N = kConsumers * kRows, M = D == 64 ? 128 : 64, kStages = 2;
  static constexpr int kPanels = D / kPanelColumns, kQueryPanels = M / kPanelColumns;
  static constexpr int kPart = kRows * kPanelColumns;  // a warpgroup's part of a tile of dQ
  static constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
  static_assert(kPanels * kQueryPanels == kConsumers);
  static_assert((kProducerRegisters + kConsumers * kConsumerRegisters) * kWarpgroup <= 64 * 1024);

  T k[kConsumers][kPanels][kRows][kPanelColumns], v[kConsumers][kPanels][kRows][kPanelColumns];
  T q[kStages][kPanels][M][kPanelColumns], dout[kStages][kPanels][M][kPanelColumns];
  T dscores[kStages][kQueryPanels][N][kPanelColumns];  // transposed: (stage, panel of queries, key)
  float dq[kConsumers][kPart];                         // as the accumulators lie: (n, thread, element)
  float lse[kStages][M], delta[kStages][M];
  Barrier k_full, v_full, q_full[kStages], q_empty[kStages], dout_full[kStages], dout_empty[kStages];
  int ticket;

  FASTLM_DEVICE static int stage(int step) { return step % kStages; }
  FASTLM_DEVICE static int turn(int step) { return step / kStages % 2; }

  FASTLM_DEVICE void init() {
    barrier_init(&k_full, 1), barrier_init(&v_full, 1);
#pragma unroll
    for (int s = 0; s < kStages; ++s) {
      barrier_init(&q_full[s], 1), barrier_init(&dout_full[s], 2);  // with dout come lse and delta
      const int warps = kConsumers * kWarpgroup / kWarp;
      barrier_init(&q_empty[s], warps), barrier_init(&dout_empty[s], warps);
    }
    publish_barriers();
  }
};

struct HopperBackwardMaps {
  TensorMap q, k, v, dout;
};

// In the workspace: dQ as (batch, head, tile, warpgroup, kPart), and the counters: the ticket, then a turn for each
// (batch, head, tile).
struct HopperBackwardSpace {
  float* dq;
  int* counters;
};

// The query tiles of a block of keys, in the order in which it walks over them.
struct QueryWalk {
  int begin, end, head, tile;

  FASTLM_DEVICE QueryWalk(int first_tile, int end_tile, int first_head)
      : begin(first_tile), end(end_tile), head(first_head), tile(end_tile - 1) {}
  FASTLM_DEVICE void next() {
    if (--tile >= begin) return;
    tile = end - 1;
    ++head;
  }
};

// Named barriers: of all consumers; of each of them, and of all, with a warp that hands dQ on.
constexpr int kDscoresReady = 1, kDqEmpty = 2, kDqFull = 4, kConsumerThreads = 2 * kWarpgroup;

// One thread has TMA load tiles.
template <class T, int D>
FASTLM_DEVICE void load_tiles(HopperBackwardTile<T, D>& tile, const HopperBackwardMaps& maps, const Problem& p,
                              QueryWalk walk, int steps) {
  using C = HopperBackwardTile<T, D>;
  const auto load = [&](auto& to, const TensorMap& map, Barrier* full, int row, int head) {
#pragma unroll
    for (int panel = 0; panel < C::kPanels; ++panel)
      copy_panel(to[panel], map, full, panel * kPanelColumns, row, head, p.b);
  };
  const auto load_keys = [&](auto& to, const TensorMap& map, Barrier* full) {
    barrier_expect(full, (int)sizeof(to));
#pragma unroll
    for (int w = 0; w < C::kConsumers; ++w) load(to[w], map, full, p.first + w * C::kRows, p.head);
  };
  load_keys(tile.k, maps.k, &tile.k_full);
#pragma unroll 1
  for (int step = 0; step < steps; ++step, walk.next()) {
    const int s = C::stage(step), emptied = C::turn(step) ^ 1;  // the first turn waits for nothing
    barrier_wait(&tile.q_empty[s], emptied);
    barrier_expect(&tile.q_full[s], (int)sizeof(tile.q[s]));
    load(tile.q[s], maps.q, &tile.q_full[s], walk.tile * C::M, walk.head);
    if (step == 0) load_keys(tile.v, maps.v, &tile.v_full);
    barrier_wait(&tile.dout_empty[s], emptied);
    barrier_expect(&tile.dout_full[s], (int)sizeof(tile.dout[s]));
    load(tile.dout[s], maps.dout, &tile.dout_full[s], walk.tile * C::M, walk.head);
  }
}

// One warp brings the statistics of the tiles' rows.
template <class T, int D>
FASTLM_DEVICE void load_statistics(HopperBackwardTile<T, D>& tile, const AttentionParams& a, const Problem& p,
                                   QueryWalk walk, int steps) {
  using C = HopperBackwardTile<T, D>;
#pragma unroll 1
  for (int step = 0; step < steps; ++step, walk.next()) {
    const int s = C::stage(step);
    const Global<const float> lse(a.stats + p.row(walk.head)), delta = lse + a.stat_rows;
    barrier_wait(&tile.dout_empty[s], C::turn(step) ^ 1);
#pragma unroll
    for (int row = lane_index(); row < C::M; row += kWarp) {
      const int i = walk.tile * C::M + row;
      tile.lse[s][row] = i < p.T ? lse[i] : kInfinity;
      tile.delta[s][row] = i < p.T ? delta[i] : 0;
    }
    sync_warp();
    release(&tile.dout_full[s]);
  }
}

// Two warps hand dQ on, every other step each, so that one step's part may still be on its way to global memory while
// the next one's sets out. Block `order` of its head's keys comes after `order` others.
template <class T, int D>
FASTLM_DEVICE void write_dq(HopperBackwardTile<T, D>& tile, const HopperBackwardSpace& space, const AttentionParams& a,
                            const Problem& p, int order, QueryWalk walk, int steps, int first_step) {
  using C = HopperBackwardTile<T, D>;
  const bool leader = lane_index() == 0;
  for (int i = 0; i < first_step; ++i) walk.next();
#pragma unroll 1
  for (int step = first_step; step < steps; step += 2, walk.next(), walk.next()) {
    const int64_t index = (int64_t)(p.b * a.H + walk.head) * walk.end + walk.tile;
    const Global<float> dq = Global<float>(space.dq) + index * (C::kConsumers * C::kPart);
    const Global<int> turn = Global<int>(space.counters) + (1 + index);
    if (leader) await_count(turn, order);
    sync_warp();
    sync_named(kDqFull + step % 2, kConsumerThreads + kWarp);
    if (leader) {
      float* const from = tile.dq[0];
      order == 0 ? bulk_store(dq, from, (int)sizeof(tile.dq)) : bulk_add(dq, from, (int)sizeof(tile.dq));
      bulk_commit();
      bulk_wait_read<0>();
    }
    sync_warp();
    if (step + 1 < steps)
#pragma unroll
      for (int w = 0; w < C::kConsumers; ++w) arrive_named(kDqEmpty + w, kWarpgroup + kWarp);
    if (leader) bulk_wait<0>(), set_count(turn, order + 1);
  }
}

// dq (64, 64) = dS K: of D 64 this warpgroup's 64 queries, of D 128 its 64 columns.
template <class T, int D>
FASTLM_DEVICE void issue_dq(float (&dq)[1][8][4], const HopperBackwardTile<T, D>& tile, int s, int w) {
  using C = HopperBackwardTile<T, D>;
  const auto& dscores = tile.dscores[s][C::kQueryPanels == 1 ? 0 : w];
  const int panel = C::kPanels == 1 ? 0 : w;
#pragma unroll
  for (int key = 0; key < C::N; key += 16) {
    const uint64_t left = wgmma_descriptor(dscores[key], 16, 8 * kPanelRowBytes);
    const uint64_t right = wgmma_descriptor(tile.k[key / C::kRows][panel][key % C::kRows], 16, 8 * kPanelRowBytes);
    if (key == 0)
      wgmma_columns<T, false>(dq, left, right);
    else
      wgmma_columns<T, true>(dq, left, right);
  }
  wgmma_commit();
}

// A consumer warpgroup, number w.
template <class T, int D>
FASTLM_DEVICE void add_gradients(HopperBackwardTile<T, D>& tile, const AttentionParams& a, const Problem& p, int w,
                                 QueryWalk walk, int steps) {
  using C = HopperBackwardTile<T, D>;
  constexpr int M = C::M;
  const ScoreRules<T> rules(a, p, p.head);
  const float unit = a.scale * kLog2e;
  const int lane = lane_index(), warp_row = warp_index() % 4 * 16, first = p.first + w * C::kRows;
  const int j = first + warp_row + lane / 4;  // this lane's first key
  float dk[1][D / 8][4], dv[1][D / 8][4];
  clear(dk), clear(dv);
  if (steps > 0) barrier_wait(&tile.k_full, 0);

#pragma unroll 1
  for (int step = 0; step < steps; ++step, walk.next()) {
    const int s = C::stage(step), i0 = walk.tile * M;
    float weights[1][M / 8][4], dscores[1][M / 8][4];
    barrier_wait(&tile.q_full[s], C::turn(step));
    hold(weights), hold(dscores);
    wgmma_fence();
    issue_scores(weights, tile.k[w], tile.q[s]);
    if (step == 0) barrier_wait(&tile.v_full, 0);
    barrier_wait(&tile.dout_full[s], C::turn(step));
    wgmma_fence();
    issue_scores(dscores, tile.v[w], tile.dout[s]);

    wgmma_wait<1>();
    hold(weights);
    if (!rules.all_inside(i0, i0 + M, first, first + C::kRows))
#pragma unroll
      for (int n = 0; n < M / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (!rules.inside(i0 + 8 * n + lane % 4 * 2 + e % 2, j + e / 2 * 8)) weights[0][n][e] = -kInfinity;
#pragma unroll
    for (int n = 0; n < M / 8; ++n) {
      const Vec<float, 2> lse = load_shared<2>(&tile.lse[s][8 * n + lane % 4 * 2]);
#pragma unroll
      for (int e = 0; e < 4; ++e) weights[0][n][e] = exp2_approx(fmaf(weights[0][n][e], unit, -lse[e % 2]));
    }

    hold(dv);
    Left<T> left[M / 16], left_dscores[M / 16];
#pragma unroll
    for (int half = 0; half < M / kPanelColumns; ++half) {  // registers do not suffice for more queries at a time
#pragma unroll
      for (int n = 4 * half; n < 4 * half + 4; ++n) left[n].take(weights[0][2 * n], weights[0][2 * n + 1]);
      wgmma_fence();
#pragma unroll
      for (int n = 4 * half; n < 4 * half + 4; ++n)
        wgmma_weighted<T>(dv, left[n].word,
                          wgmma_descriptor(&tile.dout[s][0][16 * n], (int)sizeof(tile.dout[s][0]), 8 * kPanelRowBytes));
      wgmma_commit();
      if (half == 0) wgmma_wait<1>();
      if (half == 0) hold(dscores);
#pragma unroll
      for (int n = 8 * half; n < 8 * half + 8; ++n) {
        const Vec<float, 2> delta = load_shared<2>(&tile.delta[s][8 * n + lane % 4 * 2]);
#pragma unroll
        for (int e = 0; e < 4; ++e) dscores[0][n][e] = weights[0][n][e] * (dscores[0][n][e] - delta[e % 2]);
      }
#pragma unroll
      for (int n = 4 * half; n < 4 * half + 4; ++n) {
        left_dscores[n].take(dscores[0][2 * n], dscores[0][2 * n + 1]);
        const int row = w * C::kRows + warp_row + lane % 16, chunk = 2 * n % 8 + lane / 16;
        store_matrices(&tile.dscores[s][half][row][(chunk ^ row % 8) * 8], left_dscores[n].word);
      }
    }
    fence_async();
    sync_named(kDscoresReady, kConsumerThreads);  // and the products with the other stage's dS are done

    float dq[1][8][4];
    hold(dq), hold(dk);
    wgmma_fence();
    issue_dq(dq, tile, s, w);
    issue_weighted(dk, left_dscores, tile.q[s]);
    wgmma_wait<1>();
    hold(dv), hold(dq);
    release(&tile.dout_empty[s]);
    if (step > 0) sync_named(kDqEmpty + w, kWarpgroup + kWarp);
#pragma unroll
    for (int n = 0; n < 8; ++n)
      store_numbers(&tile.dq[w][(n * kWarpgroup + thread_index() % kWarpgroup) * 4], dq[0][n]);
    fence_async();
    arrive_named(kDqFull + step % 2, kConsumerThreads + kWarp);
    wgmma_wait<0>();
    hold(dk);
    release(&tile.q_empty[s]);
  }

  sync_named(kDscoresReady, kConsumerThreads);  // nobody needs keys and values any more: their place takes the results
  const float scale[1][2] = {{a.scale, a.scale}};
  multiply_rows(dk, scale);
  const auto to = [&](const Heads& x) { return rows_of<T>(x, p.b, p.head, 0, p.S, D, true); };
  store_rows(to(a.dk), first + warp_row, Tile<T, D>{&tile.k[w][0][0][0]}, warp_row, 0, dk);
  store_rows(to(a.dv), first + warp_row, Tile<T, D>{&tile.v[w][0][0][0]}, warp_row, 0, dv);
}

template <class T, int D>
__global__ void __launch_bounds__(HopperBackwardTile<T, D>::kThreads, 1)
    attention_bwd_sm90_kernel(const __grid_constant__ AttentionParams a,
                              const __grid_constant__ HopperBackwardMaps maps,
                              const __grid_constant__ HopperBackwardSpace space) {
#if FASTLM_SM90A
  using C = HopperBackwardTile<T, D>;
  static_assert(sizeof(C) <= kHopperSharedLimit);
  C& tile = *shared_memory<C>();
  if (thread_index() == 0) {
    tile.init();
    tile.ticket = take_ticket(Global<int>(space.counters));
  }
  sync_threads();
  const int blocks = divided_up(a.S, C::N), order = tile.ticket % blocks, head = tile.ticket / blocks;
  Problem p{};
  p.b = head / a.Hkv, p.head = head % a.Hkv, p.first = order * C::N;
  p.T = a.T, p.S = a.S;
  p.stat_row = (int64_t)p.b * a.H * a.T, p.head_rows = a.T;
  const int group = a.H / a.Hkv, end = divided_up(p.T, C::M), begin = larger(0, p.first - a.right) / C::M;
  const QueryWalk walk(begin, end, p.head * group);
  const int steps = larger(0, end - begin) * group;
  const int warpgroup = shuffle(thread_index() / kWarpgroup, 0);  // tells the compiler that a warp's lanes agree
  if (warpgroup == 0) {
    give_registers<C::kProducerRegisters>();
    const int warp = shuffle(warp_index(), 0);
    if (warp == 0 && lane_index() == 0 && steps > 0) load_tiles(tile, maps, p, walk, steps);
    if (warp == 1) load_statistics(tile, a, p, walk, steps);
    if (warp >= 2) write_dq(tile, space, a, p, order, walk, steps, warp - 2);
  } else {
    take_registers<C::kConsumerRegisters>();
    add_gradients(tile, a, p, warpgroup - 1, walk, steps);
  }
#else
  refuse_to_run();
#endif
}

// dq = scale times the workspace's, a block a tile.
template <class T, int D>
__global__ void __launch_bounds__(2 * kWarpgroup)
    attention_dq_sm90_kernel(const __grid_constant__ AttentionParams a,
                             const __grid_constant__ HopperBackwardSpace space) {
  using C = HopperBackwardTile<T, D>;
  const int64_t index = block_index().x;
  const int tiles = divided_up(a.T, C::M), head = (int)(index / tiles % a.H), b = (int)(index / tiles / a.H);
  const int thread = thread_index() % kWarpgroup, w = thread_index() / kWarpgroup;
  const Global<const float> from = Global<const float>(space.dq) + (index * C::kConsumers + w) * C::kPart;
  float dq[1][8][4];
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    const auto x = load<4, Cache::stream>(from + (n * kWarpgroup + thread) * 4);
#pragma unroll
    for (int e = 0; e < 4; ++e) dq[0][n][e] = x[e] * a.scale;
  }
  const int row = warp_index() % 4 * 16 + (C::kQueryPanels == 1 ? 0 : w * C::kRows);
  const int column = C::kPanels == 1 ? 0 : w * kPanelColumns;
  store_rows(rows_of<T>(a.dq, b, head, 0, a.T, D, true), (int)(index % tiles) * C::M + row,
             Tile<T, D>{shared_memory<T>()}, row, column, dq);
}

}  // namespace fastlm::cuda
