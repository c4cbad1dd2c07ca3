// The backward kernels of norm.cuh.
#pragma once

#include "norm.cuh"

namespace fastlm::cuda::norm {

struct BackwardArgs {
  Floats dy, w, dz_in, dx;
  Global<const float> mean, rstd;
  Global<float> partial;  // (splits, CENTRED ? 2 : 1, N)
  int64_t M, rows_each;
  int N, warps;
  Length length;
  Dropout dropout;
};

template <bool CENTRED, class Z, int VEC>
FASTLM_DEVICE void store_gradients(const BackwardArgs& a, Global<Z> dz, int64_t row, int64_t column,
                                   Vec<float, VEC> v) {
  const int64_t i = row * a.N + column;
  write(dz + i, v);
  if (!a.dx.present()) return;
  if (CENTRED && a.dropout.threshold) apply(a.dropout, row, column, v);
  store_floats(a.dx, i, v);
}

// Elements i to i + VEC to 16 bytes of shared memory, asynchronously, and from there.
template <int VEC>
FASTLM_DEVICE void stage(char* slot, const Floats& f, int64_t i) {
  if constexpr (VEC == 4) {
    if ((DType)f.type == DType::f32) return cp_async<16>(slot, recast<const float>(f.data) + i);
    return cp_async<8>(slot, recast<const bf16>(f.data) + i);
  } else {
    cp_async<16>(slot, recast<const bf16>(f.data) + i);
  }
}
template <class T, int VEC>
FASTLM_DEVICE Vec<float, VEC> staged_as(const char* slot) {
  const auto part = load_shared<VEC>(reinterpret_cast<const T*>(slot));
  Vec<float, VEC> v;
#pragma unroll
  for (int i = 0; i < VEC; ++i) v[i] = to_float(part[i]);
  return v;
}
template <int VEC>
FASTLM_DEVICE Vec<float, VEC> staged(const char* slot, int type) {
  if constexpr (VEC == 4)
    if ((DType)type == DType::f32) return staged_as<float, VEC>(slot);
  if ((DType)type == DType::bf16) return staged_as<bf16, VEC>(slot);
  return staged_as<fp16, VEC>(slot);
}

// A thread's slots for one row in flight: each holds a vector that this thread copies and reads by itself, so that no
// barrier is needed between the two.
template <int PER>
struct Slots {
  char* base;
  int tensors;  // dy, z and perhaps dz_in
  static constexpr int kBytes = 16;

  FASTLM_DEVICE char* at(int turn, int tensor, int j) const {
    return base + (((turn * tensors + tensor) * PER + j) * block_threads() + thread_index()) * kBytes;
  }
};

// Adds up the sums of a block's warps, in order, at `out`, where each has the whole row.
template <int PER, int VEC>
FASTLM_DEVICE void store_team_sums(const Columns& mine, const Vec<float, VEC> (&sum)[PER], Global<float> out, int N) {
  float* all = shared_memory<float>();
  const int teams = block_threads() / kWarp;
  for (int team = 0; team < teams; ++team) {
    sync_threads();
    if (warp_index() != team) continue;
#pragma unroll
    for (int j = 0; j < PER; ++j)
      if (mine.holds(j))
#pragma unroll
        for (int i = 0; i < VEC; ++i) {
          float& total = all[mine.vector(j) * VEC + i];
          total = team == 0 ? sum[j][i] : total + sum[j][i];
        }
  }
  sync_threads();
  for (int i = thread_index(); i < N; i += block_threads()) out[i] = all[i];
}

template <int PER, int VEC>
FASTLM_DEVICE void store_sums(const Columns& mine, int warps, const Vec<float, VEC> (&sum)[PER], Global<float> out,
                              int N) {
  if (warps == 1) return store_team_sums(mine, sum, out, N);
#pragma unroll
  for (int j = 0; j < PER; ++j)
    if (mine.holds(j)) write(out + (int64_t)mine.vector(j) * VEC, sum[j]);
}

template <class Z, bool CENTRED>
__global__ void __launch_bounds__(kMaxThreads, 1)
    backward_kernel(BackwardArgs a, Global<const Z> z, Global<Z> dz, bool stage_dz_in) {
  constexpr int VEC = kVec<Z>, PER = kBackwardFloats / VEC;
  const Columns mine = columns_of(a.N / VEC, a.warps);
  const int64_t share = block_index().x / cluster_size(), begin = share * a.rows_each;
  const int64_t end = smaller(a.M, begin + a.rows_each), step = a.warps == 1 ? block_threads() / kWarp : 1;
  const Slots<PER> slots{shared_memory<char>(), stage_dz_in ? 3 : 2};
  float* buffer = reinterpret_cast<float*>(slots.base + 2 * slots.tensors * PER * block_threads() * slots.kBytes);
  const int z_type = sizeof(Z) == 4 ? (int)DType::f32 : a.dy.type;  // the stream of 16 bits is of dy's type
  const Floats z_floats{recast<char>(z), z_type};
  Vec<float, VEC> w[PER], dw[PER], db[PER];
#pragma unroll
  for (int j = 0; j < PER; ++j)
#pragma unroll
    for (int i = 0; i < VEC; ++i) w[j][i] = 1, dw[j][i] = 0, db[j][i] = 0;
  if (a.w.present())
#pragma unroll
    for (int j = 0; j < PER; ++j)
      if (mine.holds(j)) w[j] = load_floats<VEC>(a.w, mine.vector(j) * VEC);

  const auto prefetch = [&](int64_t row, int turn) {
    if (row < end)
#pragma unroll
      for (int j = 0; j < PER; ++j)
        if (mine.holds(j)) {
          const int64_t i = row * a.N + (int64_t)mine.vector(j) * VEC;
          stage<VEC>(slots.at(turn, 0, j), a.dy, i);
          stage<VEC>(slots.at(turn, 1, j), z_floats, i);
          if (stage_dz_in) stage<VEC>(slots.at(turn, 2, j), a.dz_in, i);
        }
    cp_async_commit();
  };
  int64_t row = begin + (a.warps == 1 ? warp_index() : 0);
  float next_mean = 0, next_rstd = 0;
  const auto prefetch_statistics = [&](int64_t row) {
    if (row >= end) return;
    if (CENTRED) next_mean = a.mean[row];
    next_rstd = a.rstd[row];
  };
  if (cluster_size() > 1) sync_cluster();
  prefetch(row, 0);
  prefetch_statistics(row);
  for (int turn = 0; row < end; row += step, turn ^= 1) {
    const float mean = next_mean, rstd = next_rstd;
    prefetch(row + step, turn ^ 1);
    prefetch_statistics(row + step);
    cp_async_wait<1>();
    // A thread's dy and xhat, read from shared memory before and after the sums: registers for both are not there.
    const auto read_staged = [&](int j, Vec<float, VEC>& dy, Vec<float, VEC>& xhat) {
      dy = staged<VEC>(slots.at(turn, 0, j), a.dy.type);
      xhat = staged<VEC>(slots.at(turn, 1, j), z_type);
#pragma unroll
      for (int i = 0; i < VEC; ++i) xhat[i] = (xhat[i] - mean) * rstd;
    };
    float sum[2] = {0, 0};  // of g xhat and of g
#pragma unroll
    for (int j = 0; j < PER; ++j)
      if (mine.holds(j)) {
        Vec<float, VEC> dy, xhat;
        read_staged(j, dy, xhat);
#pragma unroll
        for (int i = 0; i < VEC; ++i) {
          const float g = dy[i] * w[j][i];
          sum[0] += g * xhat[i];
          sum[1] += g;
          dw[j][i] += dy[i] * xhat[i];
          db[j][i] += dy[i];
        }
      }
    row_sums(sum, a.warps, buffer + turn * 2 * cluster_size() * a.warps);
    const float along = a.length.divide(sum[0]), mean_g = CENTRED ? a.length.divide(sum[1]) : 0;
#pragma unroll
    for (int j = 0; j < PER; ++j)
      if (mine.holds(j)) {
        const int64_t column = (int64_t)mine.vector(j) * VEC;
        Vec<float, VEC> g, xhat;
        read_staged(j, g, xhat);
#pragma unroll
        for (int i = 0; i < VEC; ++i) g[i] = (g[i] * w[j][i] - mean_g - xhat[i] * along) * rstd;
        if (a.dz_in.present()) {
          const Vec<float, VEC> before =
              stage_dz_in ? staged<VEC>(slots.at(turn, 2, j), z_type) : load_floats<VEC>(a.dz_in, row * a.N + column);
#pragma unroll
          for (int i = 0; i < VEC; ++i) g[i] += before[i];
        }
        store_gradients<CENTRED>(a, dz, row, column, g);
      }
  }
  cp_async_wait<0>();
  if (a.partial) {
    Global<float> out = a.partial + share * (CENTRED ? 2 : 1) * a.N;
    store_sums(mine, a.warps, dw, out, a.N);
    if (CENTRED) store_sums(mine, a.warps, db, out + a.N, a.N);
  }
  if (cluster_size() > 1) sync_cluster();
}

// The sums of each row that backward needs: rows[row] = (mean of g xhat, mean of g).
template <class Z, int VEC, bool CENTRED>
__global__ void __launch_bounds__(kMaxThreads, 1)
    backward_rows_kernel(BackwardArgs a, Global<const Z> z, Global<float> sums) {
  const int threads = a.warps * kWarp, first = (a.warps == 1 ? lane_index() : thread_index()) * VEC;
  const Rows rows = rows_of_grid(a.warps);
  int turn = 0;
  for (int64_t row = rows.row; row < a.M; row += rows.step, turn ^= 1) {
    const float mean = CENTRED ? a.mean[row] : 0, rstd = a.rstd[row];
    float sum[2] = {0, 0};
    for (int64_t column = first; column < a.N; column += threads * VEC) {
      Vec<float, VEC> g = load_floats<VEC>(a.dy, row * a.N + column), v;
      read<VEC, Cache::keep>(z + row * a.N + column, v);
      if (a.w.present()) scale_and_shift(a.w, Floats{}, column, g);
#pragma unroll
      for (int i = 0; i < VEC; ++i) {
        sum[0] += g[i] * ((v[i] - mean) * rstd);
        sum[1] += g[i];
      }
    }
    row_sums(sum, a.warps, shared_memory<float>() + turn * 2 * a.warps);
    if (first == 0) {
      sums[2 * row] = a.length.divide(sum[0]);
      sums[2 * row + 1] = CENTRED ? a.length.divide(sum[1]) : 0;
    }
  }
}

// Down the columns, with the rows' sums known.
template <class Z, int VEC, bool CENTRED>
__global__ void __launch_bounds__(Walk::kThreads)
    backward_columns_kernel(BackwardArgs a, Global<const Z> z, Global<Z> dz, Global<const float> sums, Walk walk) {
  const Walker at(walk, a.M, VEC);
  const bool inside = at.column < a.N;
  Vec<float, VEC> w, dw, db;
#pragma unroll
  for (int i = 0; i < VEC; ++i) w[i] = 1, dw[i] = 0, db[i] = 0;
  if (inside && a.w.present()) w = load_floats<VEC>(a.w, at.column);
  for (int64_t row = at.row; inside && row < at.end; row += at.step) {
    const float mean = CENTRED ? a.mean[row] : 0, rstd = a.rstd[row];
    const Vec<float, VEC> dy = load_floats<VEC, Cache::stream>(a.dy, row * a.N + at.column);
    Vec<float, VEC> v;
    read<VEC, Cache::stream>(z + row * a.N + at.column, v);
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
      const float xhat = (v[i] - mean) * rstd;
      dw[i] += dy[i] * xhat;
      db[i] += dy[i];
      v[i] = (dy[i] * w[i] - sums[2 * row + 1] - xhat * sums[2 * row]) * rstd;
    }
    if (a.dz_in.present()) {
      const Vec<float, VEC> before = load_floats<VEC, Cache::stream>(a.dz_in, row * a.N + at.column);
#pragma unroll
      for (int i = 0; i < VEC; ++i) v[i] += before[i];
    }
    store_gradients<CENTRED>(a, dz, row, at.column, v);
  }
  if (!a.partial) return;
  Global<float> out = a.partial + (int64_t)at.share * (CENTRED ? 2 : 1) * a.N;
  store_column_sums(walk, at, dw, out, a.N);
  if (CENTRED) store_column_sums(walk, at, db, out + a.N, a.N);
}

template <class Z, int VEC, bool CENTRED>
void backward_any(const char* name, Stream on, BackwardArgs& args, Global<const Z> z, Global<Z> dz,
                  Global<float> rows, Walk walk) {
  const Shape s = any_shape(args.N);
  args.warps = s.warps;
  launch({name, {grid_of(s, args.M)}, s.threads, sizeof(float) * 4 * (size_t)s.warps, on.handle},
         backward_rows_kernel<Z, VEC, CENTRED>, args, z, rows);
  launch({name, {(unsigned)(walk.tiles * walk.splits)}, Walk::kThreads, sizeof(float) * VEC * Walk::kThreads,
          on.handle},
         backward_columns_kernel<Z, VEC, CENTRED>, args, z, dz, rows, walk);
}

// Returns the number of partial sums.
template <class Z, bool CENTRED>
int64_t backward_as(const char* name, Stream on, BackwardArgs args, const void* z_data, void* dz_data, void* rows,
                 bool vectors) {
  constexpr int kPer = kBackwardFloats / kVec<Z>;
  Global<const Z> z = static_cast<const Z*>(z_data);
  Global<Z> dz = static_cast<Z*>(dz_data);
  Shape s;
  const auto shared_bytes = [&](int tensors) {  // with rows of so many tensors in flight
    return (size_t)(tensors * 2 * kPer * s.threads * Slots<kPer>::kBytes) +
           sizeof(float) * 4 * (size_t)(s.cluster * s.warps);
  };
  const size_t limit = (size_t)shared_bytes_limit();  // 99 KB on sm_86 and sm_89, where wide fp32 rows need 128
  if (!vectors || !shape_of(args.N / kVec<Z>, kPer, s) || shared_bytes(2) > limit) {
    const Walk walk = walk_of(args.M, args.N, vectors ? kVec<Z> : 1);
    Global<float> sums = static_cast<float*>(rows);
    if (vectors)
      backward_any<Z, kVec<Z>, CENTRED>(name, on, args, z, dz, sums, walk);
    else
      backward_any<Z, 1, CENTRED>(name, on, args, z, dz, sums, walk);
    return walk.splits;
  }
  const bool stage_dz_in = args.dz_in.data && shared_bytes(3) <= limit;
  const int64_t splits = splits_of(args.M, s);
  args.warps = s.warps;
  args.rows_each = divided_up(args.M, splits);
  const int64_t used = divided_up(args.M, args.rows_each);
  launch({name, {(unsigned)(used * s.cluster)}, s.threads, shared_bytes(stage_dz_in ? 3 : 2), on.handle, s.cluster},
         backward_kernel<Z, CENTRED>, args, z, dz, stage_dz_in);
  return used;
}

template <bool CENTRED>
void backward(const char* name, const NormArgs& a) {
  if (a.M == 0) return;
  set_device(a.on.device);
  const BackwardArgs args{Floats::of(a.dy, a.y_type), Floats::of(a.w, a.w_type), Floats::of(a.dz_in, a.r_type),
                          Floats::of(a.dx, a.x_type), static_cast<const float*>(a.mean),
                          static_cast<const float*>(a.rstd), static_cast<float*>(a.partial), a.M, 0, (int)a.N, 0,
                          Length::of(a.N), Dropout::of(a.dropout_p, a.seed)};
  for_type(a.r_type, [&](auto type) {
    using Z = decltype(type);
    const bool vectors = a.N % kVec<Z> == 0 && aligned(a.dy, a.z, a.w, a.dz_in, a.dz, a.dx, a.partial);
    const int64_t splits = backward_as<Z, CENTRED>(name, a.on, args, a.z, a.dz, a.rows, vectors);
    if (a.partial) sum_partials(a.on, a.partial, a.sums, splits, (CENTRED ? 2 : 1) * a.N);
  });
}

}  // namespace fastlm::cuda::norm
