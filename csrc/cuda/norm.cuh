// The kernels of layer_norm.cu (CENTRED) and rms_norm.cu, which differ in the mean alone.
//
// Forward, a row:   z = residual + dropout(x);  mean, then rstd from the centred values;  y = (z - mean) rstd w + b.
// Backward, a row, with g = dy w and xhat = (z - mean) rstd:
//   dz = rstd (g - mean(g) - xhat mean(g xhat)) + dz_in;   dw = sum of dy xhat, db = sum of dy over the rows.
// Without CENTRED the means of z and of g, and db, are absent.
//
// Rows that fit, with 16-byte vectors: a row lives in the registers of a warp, of a block, or of a cluster of blocks
// (sm_90) that add up their sums in one another's shared memory. Forward reads x (and residual) and writes y (and z)
// once. Backward is persistent: a block owns neighbouring rows, copies the next one's dy and z (and dz_in) into shared
// memory while it works on this one, keeps dw and db in fp32 registers, writes them as one partial, and needs one
// barrier a row, since its sums go to two buffers in turn. A second kernel adds the partials in order.
// Other rows (odd lengths, unaligned tensors, longer than a cluster holds): forward goes over a row three times, from
// L1 or L2; backward sums each row first, then goes down the columns (Walk).
//
// A row of N elements of T bytes moves 2 N T forward (4 N T with a residual), 3 N T backward (4 N T with dz_in), for
// about 8 N and 14 N operations: memory bounds both. Not measured on any GPU yet; the sizes below are by count of
// registers (at most 128 a thread at 512 threads) and of bytes in flight.
#pragma once

#include "common.cuh"

namespace fastlm::cuda::norm {

constexpr int kMaxThreads = 512;
constexpr int kTeam = 128;                             // threads of a block whose warps have a row each
constexpr int kForwardVectors = 4, kBackwardFloats = 16;  // what a thread holds of a row, at most
constexpr int kMaxCluster = 8;

template <class Z>
constexpr int kVec = 16 / (int)sizeof(Z);

// Which vectors of a row a thread holds: `first`, then every `step`th below `end`.
struct Columns {
  int first, step, end;
  FASTLM_DEVICE int vector(int j) const { return first + j * step; }
  FASTLM_DEVICE bool holds(int j) const { return vector(j) < end; }
};

// The part of this thread in a row of `vectors` that `warps` warps in each block of the cluster share.
FASTLM_DEVICE Columns columns_of(int vectors, int warps) {
  const int share = divided_up(vectors, cluster_size()), begin = cluster_rank() * share;
  return {begin + (warps == 1 ? lane_index() : thread_index()), warps * kWarp, smaller(vectors, begin + share)};
}

// A thread's vectors of the row that starts at element `row`, 0 where it holds none. All loads are issued before the
// first is used.
template <int VEC, int PER, class T>
FASTLM_DEVICE void read_row(Global<const T> p, int64_t row, const Columns& mine, Vec<float, VEC> (&out)[PER]) {
  constexpr int kEach = smaller(VEC, 16 / (int)sizeof(T)), kParts = VEC / kEach;
  Vec<T, kEach> raw[PER][kParts] = {};
#pragma unroll
  for (int j = 0; j < PER; ++j)
    if (mine.holds(j))
#pragma unroll
      for (int part = 0; part < kParts; ++part)
        raw[j][part] = load<kEach, Cache::stream>(p + row + (int64_t)mine.vector(j) * VEC + part * kEach);
#pragma unroll
  for (int j = 0; j < PER; ++j)
#pragma unroll
    for (int i = 0; i < VEC; ++i) out[j][i] = to_float(raw[j][i / kEach][i % kEach]);
}
template <int VEC, int PER>
FASTLM_DEVICE void load_row(const Floats& f, int64_t row, const Columns& mine, Vec<float, VEC> (&out)[PER]) {
  switch ((DType)f.type) {
    case DType::bf16: return read_row(recast<const bf16>(f.data), row, mine, out);
    case DType::f16: return read_row(recast<const fp16>(f.data), row, mine, out);
    default: return read_row(recast<const float>(f.data), row, mine, out);
  }
}

// Rows in turn to the warps of a block (`warps` 1), or to blocks and clusters.
struct Rows {
  int64_t row, step;
};
FASTLM_DEVICE Rows rows_of_grid(int warps) {
  const int teams = warps == 1 ? block_threads() / kWarp : 1;
  const int64_t block = block_index().x / cluster_size();
  return {block * teams + (warps == 1 ? warp_index() : 0), (int64_t)(grid_size().x / cluster_size()) * teams};
}

// Division by the row's length and the inverse root, without the slow paths of the exact ones, whose calls cost
// registers: an approximation and one Newton step, good to the last unit or the one before it.
struct Length {
  float N, inverse;
  static Length of(int64_t N) { return {(float)N, 1.0f / (float)N}; }
  FASTLM_DEVICE float divide(float sum) const {
    const float q = sum * inverse;
    return fmaf(fmaf(-q, N, sum), inverse, q);
  }
};
FASTLM_DEVICE float inverse_root(float x) {
  const float r = rsqrt_approx(x);
  return r == 0 ? 0 : fmaf(r * 0.5f, fmaf(-x * r, r, 1.0f), r);  // 0 of infinity
}

template <class Z, int N>
FASTLM_DEVICE Vec<float, N> rounded(Vec<float, N> v) {
#pragma unroll
  for (int i = 0; i < N; ++i) v[i] = to_float(from_float<Z>(v[i]));
  return v;
}

// z = residual + dropout(x) as it is stored, in place of x: elements `column` on of a row.
// Only layer_norm (CENTRED) has dropout.
template <bool CENTRED, class Z, int VEC>
FASTLM_DEVICE void add_residual(Vec<float, VEC>& x, const Vec<float, VEC>& residual, Global<Z> z, int64_t row,
                                int64_t column, int64_t N, const Dropout& dropout) {
  if (CENTRED && dropout.threshold) apply(dropout, row, column, x);
#pragma unroll
  for (int i = 0; i < VEC; ++i) x[i] += residual[i];
  x = rounded<Z>(x);
  write(z + row * N + column, x);
}

// w xhat + b in place.
template <int VEC>
FASTLM_DEVICE void scale_and_shift(const Floats& w, const Floats& b, int64_t column, Vec<float, VEC>& v) {
  if (w.present()) {
    const Vec<float, VEC> scale = load_floats<VEC>(w, column);
#pragma unroll
    for (int i = 0; i < VEC; ++i) v[i] *= scale[i];
  }
  if (b.present()) {
    const Vec<float, VEC> shift = load_floats<VEC>(b, column);
#pragma unroll
    for (int i = 0; i < VEC; ++i) v[i] += shift[i];
  }
}

struct ForwardArgs {
  Floats x, residual, w, b, y;
  Global<float> mean, rstd;
  int64_t M;
  int N, warps;
  Length length;
  float eps;
  Dropout dropout;
};

template <bool CENTRED>
FASTLM_DEVICE void store_statistics(const ForwardArgs& a, int64_t row, float mean, float rstd, bool writer) {
  if (!writer || !a.rstd) return;
  if (CENTRED) a.mean[row] = mean;
  a.rstd[row] = rstd;
}

template <class Z, int PER, bool CENTRED>
__global__ void __launch_bounds__(kMaxThreads, 1) forward_kernel(ForwardArgs a, Global<Z> z) {
  constexpr int VEC = kVec<Z>;
  const Columns mine = columns_of(a.N / VEC, a.warps);
  const int sums = cluster_size() * a.warps;
  float* buffer = shared_memory<float>();
  if (cluster_size() > 1) sync_cluster();  // every block is there before another writes to it
  const Rows rows = rows_of_grid(a.warps);
  for (int64_t row = rows.row; row < a.M; row += rows.step) {
    Vec<float, VEC> v[PER];
    float sum[1] = {0}, squares[1] = {0}, mean = 0;
    load_row(a.x, row * a.N, mine, v);
    if (a.residual.present()) {
      Vec<float, VEC> r[PER];
      read_row(recast<const Z>(a.residual.data), row * a.N, mine, r);
#pragma unroll
      for (int j = 0; j < PER; ++j)
        if (mine.holds(j)) add_residual<CENTRED>(v[j], r[j], z, row, (int64_t)mine.vector(j) * VEC, a.N, a.dropout);
    }
    if constexpr (CENTRED) {  // two passes: one would lose everything to a large mean
#pragma unroll
      for (int j = 0; j < PER; ++j)
#pragma unroll
        for (int i = 0; i < VEC; ++i) sum[0] += v[j][i];
      row_sums(sum, a.warps, buffer);
      mean = a.length.divide(sum[0]);
    }
#pragma unroll
    for (int j = 0; j < PER; ++j)
      if (mine.holds(j))
#pragma unroll
        for (int i = 0; i < VEC; ++i) {
          v[j][i] -= mean;
          squares[0] += v[j][i] * v[j][i];
        }
    row_sums(squares, a.warps, buffer + sums);
    const float rstd = inverse_root(a.length.divide(squares[0]) + a.eps);
#pragma unroll
    for (int j = 0; j < PER; ++j)
      if (mine.holds(j)) {
#pragma unroll
        for (int i = 0; i < VEC; ++i) v[j][i] *= rstd;
        scale_and_shift(a.w, a.b, (int64_t)mine.vector(j) * VEC, v[j]);
        store_floats(a.y, row * a.N + (int64_t)mine.vector(j) * VEC, v[j]);
      }
    store_statistics<CENTRED>(a, row, mean, rstd, mine.first == 0);
    if (!CENTRED) buffer = buffer == shared_memory<float>() ? buffer + 2 * sums : shared_memory<float>();
  }
  if (cluster_size() > 1) sync_cluster();  // none leaves while another writes to it
}

// Any row, three times: VEC elements a thread at a time.
template <class Z, int VEC, bool CENTRED>
__global__ void __launch_bounds__(kMaxThreads, 1) forward_any_kernel(ForwardArgs a, Global<Z> z) {
  const int threads = a.warps * kWarp, first = (a.warps == 1 ? lane_index() : thread_index()) * VEC;
  const Rows rows = rows_of_grid(a.warps);
  const Floats again = a.residual.present() ? Floats{recast<char>(z), a.residual.type} : a.x;
  float* buffer = shared_memory<float>();
  for (int64_t row = rows.row; row < a.M; row += rows.step) {
    float sum[1] = {0}, squares[1] = {0}, mean = 0;
    for (int64_t column = first; column < a.N; column += threads * VEC) {
      Vec<float, VEC> v = load_floats<VEC>(a.x, row * a.N + column);
      if (a.residual.present())
        add_residual<CENTRED>(v, load_floats<VEC>(a.residual, row * a.N + column), z, row, column, a.N, a.dropout);
#pragma unroll
      for (int i = 0; i < VEC; ++i) {
        sum[0] += v[i];
        if (!CENTRED) squares[0] += v[i] * v[i];
      }
    }
    if constexpr (CENTRED) {
      row_sums(sum, a.warps, buffer);
      mean = a.length.divide(sum[0]);
      for (int64_t column = first; column < a.N; column += threads * VEC) {
        const Vec<float, VEC> v = load_floats<VEC, Cache::coherent>(again, row * a.N + column);
#pragma unroll
        for (int i = 0; i < VEC; ++i) squares[0] += (v[i] - mean) * (v[i] - mean);
      }
    }
    row_sums(squares, a.warps, buffer + a.warps);
    const float rstd = inverse_root(a.length.divide(squares[0]) + a.eps);
    for (int64_t column = first; column < a.N; column += threads * VEC) {
      Vec<float, VEC> v = load_floats<VEC, Cache::coherent>(again, row * a.N + column);
#pragma unroll
      for (int i = 0; i < VEC; ++i) v[i] = (v[i] - mean) * rstd;
      scale_and_shift(a.w, a.b, column, v);
      store_floats(a.y, row * a.N + column, v);
    }
    store_statistics<CENTRED>(a, row, mean, rstd, first == 0);
    if (!CENTRED) buffer = buffer == shared_memory<float>() ? buffer + 2 * a.warps : shared_memory<float>();
  }
}

struct BackwardArgs {
  Floats dy, w, dz_in, dx;
  Global<const float> mean, rstd;
  Global<float> partial;  // (shares, CENTRED ? 2 : 1, N)
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

// The shape of a launch in which `warps` warps in each block of a cluster share a row.
struct Shape {
  int warps, threads, cluster, per;  // per: vectors a thread
  int teams() const { return warps == 1 ? threads / kWarp : 1; }
};

// Whether rows of `vectors` fit into the registers of a cluster, `most` vectors a thread, and how.
inline bool shape_of(int64_t vectors, int most, Shape& shape) {
  if (vectors <= kWarp * most) {
    shape = {1, kTeam, 1, vectors <= kWarp ? 1 : most};
    return true;
  }
  int cluster = 1;
  while (cluster < kMaxCluster && divided_up<int64_t>(vectors, cluster) > (int64_t)kMaxThreads * most) cluster *= 2;
  const int64_t share = divided_up<int64_t>(vectors, cluster);
  if (share > (int64_t)kMaxThreads * most || (cluster > 1 && architecture() < 90)) return false;
  const int warps = larger<int>(2, (int)divided_up<int64_t>(divided_up<int64_t>(share, most), kWarp));
  shape = {warps, warps * kWarp, cluster, most};
  return true;
}
// Any row, over and over.
inline Shape any_shape(int64_t N) {
  const int warps = N <= 1024 ? 1 : 8;
  return {warps, warps == 1 ? kTeam : warps * kWarp, 1, 0};
}

// Blocks that walk or own rows, at most: enough to fill the GPU, few enough for the partial sums.
inline int64_t persistent_blocks(int threads) { return (int64_t)multiprocessors() * larger(1, 512 / threads); }

inline unsigned grid_of(const Shape& s, int64_t M) {
  return (unsigned)(smaller<int64_t>(divided_up<int64_t>(M, s.teams()), (1 << 30) / s.cluster) * s.cluster);
}

inline int64_t shares_of(int64_t M, const Shape& s) {
  const int64_t blocks = larger<int64_t>(1, persistent_blocks(s.threads) / s.cluster);
  return larger<int64_t>(1, smaller(blocks, divided_up<int64_t>(M, s.teams())));
}

inline Walk walk_of(int64_t M, int64_t N, int vec) {
  return Walk::over(M, N, vec, persistent_blocks(Walk::kThreads) * 2, 4);
}

template <class Z, bool CENTRED>
void forward_rows(const char* name, Place at, const ForwardArgs& args, Global<Z> z, const Shape& s) {
  const size_t shared = sizeof(float) * 4 * (size_t)(s.cluster * s.warps);
  const Launch l{name, {grid_of(s, args.M)}, s.threads, shared, at.stream, s.cluster};
  if (s.per == 1) return launch(l, forward_kernel<Z, 1, CENTRED>, args, z);
  launch(l, forward_kernel<Z, kForwardVectors, CENTRED>, args, z);
}

template <class Z, bool CENTRED>
void forward(const char* name, Place at, ForwardArgs args, void* z_data, bool vectors) {
  Global<Z> z = static_cast<Z*>(z_data);
  Shape s;
  if (vectors && shape_of(args.N / kVec<Z>, kForwardVectors, s)) {
    args.warps = s.warps;
    return forward_rows<Z, CENTRED>(name, at, args, z, s);
  }
  s = any_shape(args.N);
  args.warps = s.warps;
  const Launch l{name, {grid_of(s, args.M)}, s.threads, sizeof(float) * 4 * (size_t)s.warps, at.stream};
  if (vectors) return launch(l, forward_any_kernel<Z, kVec<Z>, CENTRED>, args, z);
  launch(l, forward_any_kernel<Z, 1, CENTRED>, args, z);
}

template <class Z, int VEC, bool CENTRED>
void backward_any(const char* name, Place at, BackwardArgs& args, Global<const Z> z, Global<Z> dz,
                  Global<float> rows, Walk walk) {
  const Shape s = any_shape(args.N);
  args.warps = s.warps;
  launch({name, {grid_of(s, args.M)}, s.threads, sizeof(float) * 4 * (size_t)s.warps, at.stream},
         backward_rows_kernel<Z, VEC, CENTRED>, args, z, rows);
  launch({name, {(unsigned)(walk.tiles * walk.shares)}, Walk::kThreads, sizeof(float) * VEC * Walk::kThreads, at.stream},
         backward_columns_kernel<Z, VEC, CENTRED>, args, z, dz, rows, walk);
}

// Returns the number of partial sums.
template <class Z, bool CENTRED>
int64_t backward(const char* name, Place at, BackwardArgs args, const void* z_data, void* dz_data, void* rows,
                 bool vectors) {
  constexpr int kPer = kBackwardFloats / kVec<Z>;
  Global<const Z> z = static_cast<const Z*>(z_data);
  Global<Z> dz = static_cast<Z*>(dz_data);
  Shape s;
  if (!vectors || !shape_of(args.N / kVec<Z>, kPer, s)) {
    const Walk walk = walk_of(args.M, args.N, vectors ? kVec<Z> : 1);
    Global<float> sums = static_cast<float*>(rows);
    if (vectors)
      backward_any<Z, kVec<Z>, CENTRED>(name, at, args, z, dz, sums, walk);
    else
      backward_any<Z, 1, CENTRED>(name, at, args, z, dz, sums, walk);
    return walk.shares;
  }
  const size_t buffers = sizeof(float) * 4 * (size_t)(s.cluster * s.warps);
  const size_t slots = (size_t)(2 * kPer * s.threads * Slots<kPer>::kBytes);  // of one tensor
  const bool stage_dz_in = args.dz_in.data && 3 * slots + buffers <= (size_t)shared_bytes_limit();
  const int64_t shares = shares_of(args.M, s);
  args.warps = s.warps;
  args.rows_each = divided_up(args.M, shares);
  const int64_t used = divided_up(args.M, args.rows_each);
  launch({name, {(unsigned)(used * s.cluster)}, s.threads, (stage_dz_in ? 3 : 2) * slots + buffers, at.stream,
          s.cluster},
         backward_kernel<Z, CENTRED>, args, z, dz, stage_dz_in);
  return used;
}

}  // namespace fastlm::cuda::norm
