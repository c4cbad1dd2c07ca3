// Attention forward for Blackwell (sm_100a): out = softmax(scale q k^T) v, full or causal, head sizes 64 and 128, bf16
// and fp16, by an online softmax whose scores, weights and sums stay in tensor memory.
//
// A block owns two tiles of 128 queries of one head, its halves, and has four warpgroups. Warp 0 has TMA load the
// queries once, and keys and values in tiles of 128 into a ring of stages. Warp 1 issues all products: S = q k^T into
// tensor memory, then O += P v with P from there. A half's softmax warpgroup has a row a thread: it reads its scores
// without a shuffle, writes the 16-bit weights P over them, and says by how much the sums so far have to shrink; the
// correction warpgroup multiplies O by that, and in the end brings O to memory. The softmax of one half runs under the
// products of the other. Tiles of keys beyond a half's diagonal are skipped.
//
// The shift of a row's exponentials, its highest score at first, is raised only where the highest score has grown by
// more than 8 powers of two: until then weights are at most 256, which both types hold, O need not be touched, and the
// quotient of O and the sum of weights, relative to the same shift, is exact. Each row decides for itself, so that it
// does not depend on others. A quarter of the powers of two are made by a polynomial, since the special function units
// take longer than the products; it is right to 2.9e-6, far below what rounding the weights to 16 bits costs.
//
// Values that are infinite or NaN times a weight of 0 reach rows that do not attend to them: as in attention_sm90.cuh a
// block that the diagonal cuts looks at its sums, and if they are not finite all go over the tiles again, with 0 in the
// place of such values, which are added to the rows that attend to them afterwards.
//
// Tensor memory, 512 columns: scores of both tiles (2 x 128, weights in the lower half of each), sums (2 x D).
//
// FLOPs: 4 D for each pair of query and key in a tile that is not skipped. Bytes: q, out and lse once; k and v once for
// each 256 queries, mostly from L2. The plan is that of FlashAttention-4 (Zadouri et al. 2026, as published), the code
// is not. No step has been timed: the kernel has not run on a GPU; blackwell.cuh says what the emulation leaves open.
#pragma once

#include "attention_tile_sm100.cuh"

namespace fastlm::cuda {

// One thread of warp 0: loads.
template <class T, int D>
FASTLM_DEVICE void load_tiles(BlackwellTile<T, D>& tile, const HopperMaps& maps, const Problem& p, int kv_head,
                              const BlackwellWalk<BlackwellTile<T, D>>& walk) {
  using C = BlackwellTile<T, D>;
#pragma unroll
  for (int h = 0; h < C::kHalves; ++h) {
    if (walk.of_half(h) == 0) continue;
    barrier_expect(&tile.q_full[h], (int)sizeof(tile.q[h]));
#pragma unroll
    for (int panel = 0; panel < C::kPanels; ++panel)
      copy_panel(tile.q[h][panel], maps.q, &tile.q_full[h], panel * kPanelColumns, p.first + h * C::kRows, p.head, p.b);
  }
  int n = 0;
#pragma unroll 1
  for (; n < 2 * walk.tiles; ++n) {
    if (n == walk.tiles && !(walk.is_cut() && tile.must_repeat())) break;
    const int j0 = n % walk.tiles * C::N, s = C::stage(n);
    const int emptied = C::turn(n) ^ 1;  // the first turn waits for nothing
    const auto load = [&](T(&to)[C::kPanels][C::N][kPanelColumns], const TensorMap& map, Barrier* full,
                          Barrier* empty) {
      wait_tensor(empty, emptied);
      barrier_expect(full, (int)sizeof(to));
#pragma unroll
      for (int panel = 0; panel < C::kPanels; ++panel)
        copy_panel(to[panel], map, full, panel * kPanelColumns, j0, kv_head, p.b);
    };
    load(tile.k[s], maps.k, &tile.k_full[s], &tile.k_empty[s]);
    load(tile.v[s], maps.v, &tile.v_full[s], &tile.v_empty[s]);
  }
  // A block must not end while arrivals are on their way to its shared memory.
  for (int last = larger(0, n - C::kStages); last < n; ++last) {
    wait_tensor(&tile.k_empty[C::stage(last)], C::turn(last));
    wait_tensor(&tile.v_empty[C::stage(last)], C::turn(last));
  }
}

// One thread of warp 1: products.
template <class T, int D>
struct BlackwellProducts {
  using C = BlackwellTile<T, D>;
  C& tile;
  uint32_t tensor;

  // S of a half = q k^T.
  FASTLM_DEVICE void scores(int half, int s) const {
#pragma unroll
    for (int column = 0; column < D; column += 16) {
      const int panel = column / kPanelColumns, in_panel = column % kPanelColumns;
      umma_shared(tensor + C::scores_column(half),
                  umma_descriptor(&tile.q[half][panel][0][in_panel], 16, 8 * kPanelRowBytes),
                  umma_descriptor(&tile.k[s][panel][0][in_panel], 16, 8 * kPanelRowBytes),
                  umma_instruction<T, C::N, false>(), column > 0);
    }
    umma_commit(&tile.scores_full[half]);
  }
  // O of a half = P v, added to what is there but for the first tile.
  FASTLM_DEVICE void weighted(int half, int s, bool add) const {
#pragma unroll
    for (int key = 0; key < C::N; key += 16)
      umma_tensor(tensor + C::out_column(half), tensor + C::scores_column(half) + key / 2,
                  umma_descriptor(&tile.v[s][0][key], (int)sizeof(tile.v[s][0]), 8 * kPanelRowBytes),
                  umma_instruction<T, D, true>(), add || key > 0);
  }
};

template <class T, int D>
FASTLM_DEVICE void issue_products(BlackwellTile<T, D>& tile, const BlackwellWalk<BlackwellTile<T, D>>& walk) {
  using C = BlackwellTile<T, D>;
  const BlackwellProducts<T, D> products{tile, tile.tensor};
#pragma unroll 1
  for (int pass = 0; pass < 2; ++pass) {
    if (pass > 0 && !(walk.is_cut() && tile.must_repeat())) break;
    const int loaded = pass * walk.tiles;
    barrier_wait(&tile.k_full[C::stage(loaded)], C::turn(loaded));
#pragma unroll
    for (int h = 0; h < C::kHalves; ++h) {
      if (walk.of_half(h) == 0) continue;
      barrier_wait(&tile.q_full[h], 0);
      products.scores(h, C::stage(loaded));
    }
    umma_commit(&tile.k_empty[C::stage(loaded)]);
#pragma unroll 1
    for (int n = 0; n < walk.tiles; ++n) {
      const int at = loaded + n, s = C::stage(at), next = C::stage(at + 1);
      barrier_wait(&tile.v_full[s], C::turn(at));
      if (pass > 0 && n >= walk.cut) barrier_wait(&tile.cleaned[s], C::turn(n - walk.cut));
      if (n + 1 < walk.tiles) barrier_wait(&tile.k_full[next], C::turn(at + 1));
#pragma unroll
      for (int h = 0; h < C::kHalves; ++h) {
        if (n >= walk.of_half(h)) continue;
        wait_tensor(&tile.weights_full[h], (pass * walk.of_half(h) + n) % 2);
        products.weighted(h, s, n > 0);
        if (n + 1 < walk.of_half(h))
          products.scores(h, next);
        else
          umma_commit(&tile.out_full[h]);
      }
      umma_commit(&tile.v_empty[s]);
      if (n + 1 < walk.tiles) umma_commit(&tile.k_empty[next]);
    }
  }
}

// A softmax warpgroup, of half h.
template <class T, int D>
FASTLM_DEVICE void soften(BlackwellTile<T, D>& tile, const AttentionParams& a, const Problem& p, int h,
                          const BlackwellWalk<BlackwellTile<T, D>>& walk) {
  using C = BlackwellTile<T, D>;
  const ScoreRules<T> rules(a, p, p.head);
  const int row = thread_index() % kWarpgroup, tiles = walk.of_half(h);
  const int first = p.first + h * C::kRows, i = first + row;
  const int keys = i < p.T ? smaller(p.S, i + a.right + 1) : 0;  // that this row attends to
  const uint32_t scores_at = tile.tensor + C::scores_column(h) + ((uint32_t)(row / kWarp * kWarp) << 16);
  const float unit = a.scale * kLog2e;
  int told = 0;
  const auto tell = [&](float shrink) {
    barrier_wait(&tile.shrink_empty[h], told % 2 ^ 1);  // nothing is there at first
    tile.shrink[h][row] = shrink;
    sync_warp();
    release(&tile.shrink_full[h]);
    ++told;
  };
#pragma unroll 1
  for (int pass = 0; pass < 2; ++pass) {
    if (pass > 0 && !(walk.is_cut() && tile.must_repeat())) break;
    BlackwellRow state;
#pragma unroll 1
    for (int n = 0; n < tiles; ++n) {
      float scores[C::N / 32][32];
      wait_tensor(&tile.scores_full[h], (pass * tiles + n) % 2);
#pragma unroll
      for (int c = 0; c < C::N / 32; ++c) tensor_load(scores[c], scores_at + 32 * c);
      tensor_wait_loads(scores);
      const int j0 = n * C::N;
      if (!rules.all_inside(first, first + C::kRows, j0, j0 + C::N))
#pragma unroll
        for (int j = 0; j < C::N; ++j)
          if (j0 + j >= keys) scores[j / 32][j % 32] = -kInfinity;
      state.template step<T, C::N>(
          scores, unit,
          [&](float shrink) {
            if (n > 0) tell(shrink);
          },
          [&](int c, const uint32_t (&word)[16]) { tensor_store(scores_at + 16 * c, word); });
      tensor_publish();
      sync_warp();
      release(&tile.weights_full[h]);
    }
    if (tiles == 0) continue;
    tell(state.sum == 0 ? 0 : 1 / state.sum);
    if (!a.lse || i >= p.T) continue;
    float rest;
    Global<float>(a.lse)[p.row(p.head) + i] = log_sum(state.shift * unit * kLn2, state.sum, rest);
    if (a.rest) Global<float>(a.rest)[p.row(p.head) + i] = rest;
  }
}

// The correction warpgroup.
template <class T, int D>
struct BlackwellCorrection {
  using C = BlackwellTile<T, D>;
  C& tile;
  const Problem& p;
  const Rows<T> out;
  const int row, warp_row;  // this thread's row of a half, the first one of its warp
  const uint32_t tensor;  // at this warp's lanes
  int taken[C::kHalves];  // factors so far

  FASTLM_DEVICE BlackwellCorrection(C& t, const AttentionParams& a, const Problem& problem)
      : tile(t), p(problem), out(rows_of<T>(a.out, p.b, p.head, 0, p.T, D, true)), row(thread_index() % kWarpgroup),
        warp_row(row / kWarp * kWarp), tensor(t.tensor + ((uint32_t)warp_row << 16)), taken{} {}

  FASTLM_DEVICE float take(int h) {
    barrier_wait(&tile.shrink_full[h], taken[h]++ % 2);
    const float factor = tile.shrink[h][row];
    sync_warp();
    release(&tile.shrink_empty[h]);
    return factor;
  }
  // Multiplies a half's sums by their rows' factors, where any row of this warp has another one than 1. The scores of
  // the half's tile `at` came after the product before it.
  FASTLM_DEVICE void shrink(int h, int at) {
    const float factor = take(h);
    if (any(factor != 1)) {
      wait_tensor(&tile.scores_full[h], at % 2);
#pragma unroll
      for (int column = 0; column < D; column += 32) {
        float x[1][32];
        tensor_load(x[0], tensor + C::out_column(h) + column);
        tensor_wait_loads(x);
#pragma unroll
        for (int i = 0; i < 32; ++i) x[0][i] *= factor;
        tensor_store(tensor + C::out_column(h) + column, x[0]);
      }
      tensor_publish();
    }
    sync_warp();
    release(&tile.weights_full[h]);
  }
  // Puts 0 in the place of values of tile `at` that are not finite.
  FASTLM_DEVICE void clean(int at) {
    const int s = C::stage(at);
    barrier_wait(&tile.v_full[s], C::turn(at));
    T* const all = &tile.v[s][0][0][0];
#pragma unroll 1
    for (int i = row; i < C::N * D; i += kWarpgroup)
      if (not_finite(all[i])) all[i] = from_float<T>(0.0f);
    fence_async();
    sync_warp();
    release(&tile.cleaned[s]);
  }
  // Writes a half's rows, divided by their sums of weights; whether some of its sums are not finite.
  FASTLM_DEVICE bool finish(int h, int pass) {
    constexpr int kChunk = 8, kChunks = D / kChunk;  // elements, of a row
    const Tile<T, D> lines{&tile.out[0][0]};
    const float factor = take(h);
    wait_tensor(&tile.out_full[h], pass);
    bool bad = false;
#pragma unroll
    for (int column = 0; column < D; column += 32) {
      float x[1][32];
      tensor_load(x[0], tensor + C::out_column(h) + column);
      tensor_wait_loads(x);
      float zero = 0;
#pragma unroll
      for (int i = 0; i < 32; ++i) zero = fmaf(x[0][i], 0.0f, zero), x[0][i] *= factor;
      bad = bad || zero != 0;
#pragma unroll
      for (int i = 0; i < 32; i += kChunk) {
        Vec<uint32_t, 4> words;
#pragma unroll
        for (int e = 0; e < 4; ++e) words[e] = packed<T>(x[0][i + 2 * e], x[0][i + 2 * e + 1]);
        store_shared(reinterpret_cast<uint32_t*>(lines.chunk(row, (column + i) / kChunk)), words);
      }
    }
    sync_warp();
    const int first = p.first + h * C::kRows;
#pragma unroll 4
    for (int i = lane_index(); i < kWarp * kChunks; i += kWarp) {
      const int line = warp_row + i / kChunks;
      if (first + line < p.T)
        store(out.data + ((first + line) * out.stride + i % kChunks * kChunk),
              load_shared<kChunk>(lines.chunk(line, i % kChunks)));
    }
    sync_warp();
    return bad;
  }
};

template <class T, int D>
FASTLM_DEVICE void correct(BlackwellTile<T, D>& tile, const AttentionParams& a, const Problem& p,
                           const BlackwellWalk<BlackwellTile<T, D>>& walk) {
  using C = BlackwellTile<T, D>;
  BlackwellCorrection<T, D> mine(tile, a, p);
#pragma unroll 1
  for (int pass = 0; pass < 2; ++pass) {
    if (pass > 0 && !(walk.is_cut() && tile.must_repeat())) return;
#pragma unroll 1
    for (int n = 0; n < walk.tiles; ++n) {
      if (pass > 0 && n >= walk.cut) mine.clean(walk.tiles + n);
#pragma unroll
      for (int h = 0; h < C::kHalves; ++h) {
        if (n >= walk.of_half(h)) continue;
        if (n > 0)
          mine.shrink(h, pass * walk.of_half(h) + n);
        else
          release(&tile.weights_full[h]);  // nothing is there yet
      }
    }
    bool bad = false;
#pragma unroll
    for (int h = 0; h < C::kHalves; ++h)
      if (walk.of_half(h) > 0) bad = mine.finish(h, pass) || bad;
    if (!walk.is_cut() || pass > 0) break;
    if (bad) tile.non_finite = 1;
    tensor_fence_before();
    sync_warp();
    release(&tile.judged);
  }
  if (!walk.is_cut()) return;
  sync_named(1, kWarpgroup);  // the result is written
  spread_not_finite(mine.out, rows_of<const T>(a.v, p.b, p.head / (a.H / a.Hkv), 0, p.S, D, true), p.first,
                    smaller(p.first + C::M, p.T), walk.cut * C::N, a.right);
}

template <class T, int D>
__global__ void __launch_bounds__(BlackwellTile<T, D>::kThreads, 1)
    attention_fwd_sm100_kernel(const __grid_constant__ AttentionParams a, const __grid_constant__ HopperMaps maps) {
#if FASTLM_SM100A
  using C = BlackwellTile<T, D>;
  static_assert(sizeof(C) <= kHopperSharedLimit);
  C& tile = *shared_memory<C>();
  const int warp = shuffle(warp_index(), 0), warpgroup = warp / C::kWarps;  // the same for all lanes, as compilers see
  const bool holds_tensor = warp == 3 * C::kWarps;
  if (thread_index() == 0) tile.init();
  if (holds_tensor) tensor_alloc(&tile.tensor);
  tensor_fence_before();
  sync_threads();
  tensor_fence_after();
  // Each role finds its place for itself: what all of them held would take registers before these are handed round.
  if (warpgroup == 0) {
    give_registers<C::kIssueRegisters>();
    if (lane_index() != 0 || warp > 1) return;
    const Problem p = locate<C::M, false>(a);
    const BlackwellWalk<C> walk(p, a.right);
    warp == 0 ? load_tiles(tile, maps, p, p.head / (a.H / a.Hkv), walk) : issue_products(tile, walk);
  } else if (warpgroup < 3) {
    take_registers<C::kSoftmaxRegisters>();
    const Problem p = locate<C::M, false>(a);
    soften(tile, a, p, warpgroup - 1, BlackwellWalk<C>(p, a.right));
  } else {
    give_registers<C::kCorrectionRegisters>();
    const Problem p = locate<C::M, false>(a);
    correct(tile, a, p, BlackwellWalk<C>(p, a.right));
    tensor_fence_before();
    sync_named(1, kWarpgroup);  // all rows have left tensor memory, and with them all else
    tensor_fence_after();
    if (holds_tensor) tensor_free(tile.tensor);
  }
#else
  refuse_to_run();
#endif
}

}  // namespace fastlm::cuda
