// Values that are infinite or NaN, and keys that a row does not attend to: a product adds 0 times the value, which is
// NaN, to the row. So a block in which some row leaves out some key looks at its result: if that is not finite, it goes
// over its keys once more with 0 in the place of such values (clean_tile), and adds them to the rows that do attend to
// them at the end (spread_not_finite). Rows that do not keep their bits, and calls without such values pay a test of
// their results and a branch a tile. attention_sm90.cuh does the same with tiles that a diagonal alone cuts.
#pragma once

#include "attention_tile.cuh"

namespace fastlm::cuda {

// Waits for a tile and puts 0 in the place of what is not finite.
template <int ROWS, int THREADS, class T, int D>
FASTLM_DEVICE void clean_tile(const Tile<T, D>& tile) {
  cp_async_wait<0>();
  sync_team<THREADS>();
#pragma unroll 1
  for (int i = team_rank<THREADS>(); i < ROWS * D; i += THREADS)
    if (not_finite(tile.data[i])) tile.data[i] = from_float<T>(0.0f);
  sync_team<THREADS>();
}

// Adds the values of keys first to end that are not finite to the rows that attend to them, `rows` of `to` from
// `to_first` on, which this block has written. attends(row, key): row counts from 0. The tiles are not used any more.
template <int N, int THREADS, class T, class To, class Attends>
FASTLM_DEVICE void spread_not_finite(const Rows<const T>& values, int first, int end, const Rows<To>& to, int to_first,
                                     int rows, const Attends& attends) {
  int* const found = shared_memory<int>();  // which keys of N have any
#pragma unroll 1
  for (int j0 = first; j0 < end; j0 += N) {
    sync_threads();
    for (int key = thread_index(); key < N; key += THREADS) found[key] = 0;
    sync_threads();
    const int keys = smaller(N, end - j0);
#pragma unroll 1
    for (int i = thread_index(); i < keys * values.width; i += THREADS) {
      const int key = i / values.width;
      if (not_finite(values.data[(j0 + key) * values.stride + i % values.width])) found[key] = 1;
    }
    sync_threads();
#pragma unroll 1
    for (int key = 0; key < keys; ++key) {
      if (!found[key]) continue;
#pragma unroll 1
      for (int row = thread_index(); row < rows; row += THREADS) {
        if (!attends(row, j0 + key)) continue;
#pragma unroll 1
        for (int d = 0; d < values.width; ++d) {
          const float x = to_float(values.data[(j0 + key) * values.stride + d]);
          To& sum = to.data[(to_first + row) * to.stride + d];
          if (not_finite(x)) sum = from_float<To>(to_float(sum) + x);
        }
      }
    }
  }
}

}  // namespace fastlm::cuda
