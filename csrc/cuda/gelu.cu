// GELU (Hendrycks & Gimpel 2016), exact and tanh form, with the bias addition before it and dropout after it.
//
//   none: x Phi(x),  Phi from erfc of |x| / sqrt 2, so the left tail keeps its relative accuracy;
//         derivative Phi(x) + x phi(x), whose e^(-x^2 / 2) the erfc has already computed.
//   tanh: x s with s = sigmoid(2 u) = 1 / (1 + e), e = e^(-2u), u = sqrt(2/pi) (x + 0.044715 x^3);
//         derivative s + 2 x s (1 - s) u'.
// Forward reads x and writes y, 2 T bytes an element; backward reads dy and x and writes dx, 3 T bytes. A thread keeps
// a vector of columns and goes down the rows of its share (Walk), a few loads at a time, so that the bias is read once
// and its gradient stays in registers: one partial a block, added in order by a second kernel. Without bias and
// dropout the shape does not matter, and the array is cut into rows of one tile.
//
// An element costs about 12 (tanh) to 25 (exact, fp32) operations forward. At 4.8 TB/s and 2-byte elements the
// arithmetic units have about 24 operations an element, which is why 16-bit results take the short erfc.
//
// Ladder; the gains are by count, no step has been timed on a GPU:
//   an element a thread, bias and dropout apart   6 T an element forward: three readings and writings
//   + all three in one pass                       2 T
//   + 16-byte loads, several rows in flight       no fewer bytes, an eighth of the load instructions
//   + bias gradient in registers on the way       no second reading of dx, T less backward
//   + short erfc for 16-bit results               fewer operations where they, not memory, would bound it

#include "common.cuh"

namespace fastlm::cuda {

namespace gelu {

constexpr int kForwardRows = 4, kBackwardRows = 2;  // of a thread in flight
constexpr float kInvSqrt2 = 0.70710678118654752440f, kInvSqrt2Pi = 0.39894228040143267794f;
constexpr float kSqrt2OverPi = 0.79788456080286535588f, kCubic = 0.044715f;
constexpr float kLog2E = 1.44269504088896340736f, kLn2 = 0.69314718055994530942f;

// To the last unit or the one before it, without the slow path of a division; SHORT to two.
template <bool SHORT>
FASTLM_DEVICE float reciprocal(float x) {
  const float r = rcp_approx(x);
  return SHORT ? r : fmaf(r, fmaf(-x, r, 1.0f), r);
}

// fmin and fmax would turn a NaN into the limit.
FASTLM_DEVICE float between(float x, float low, float high) { return x < low ? low : x > high ? high : x; }

// erfc x and e^(-x^2) for x >= 0 as e^(-x^2) t S(t), t = 1 / (1 + 0.35 x), with the polynomials of csrc/cpu/vec.h.
FASTLM_DEVICE float erfc_positive(float x, float& gauss) {  // S to 7.2e-9
  const float square = x * x;
  gauss = exp2_approx(-square * kLog2E);
  // what the rounding of x^2 and of its product with log2 e lost, or they alone would cost x^2 units
  const float lost = fmaf(square, 1.925963033e-8f, fmaf(square, kLog2E, -(square * kLog2E)));  // of the exponent
  gauss -= fmaf(lost, kLn2, fmaf(x, x, -square)) * gauss;
  const float t = reciprocal<false>(fmaf(x, 0.35f, 1.0f));
  float s = fmaf(t, 3.854594753e-2f, -1.597394754e-1f);
  s = fmaf(s, t, 1.834336031e-1f);
  s = fmaf(s, t, -3.043471073e-2f);
  s = fmaf(s, t, 8.938261805e-2f);
  s = fmaf(s, t, 1.447152936e-1f);
  s = fmaf(s, t, 1.516680224e-1f);
  s = fmaf(s, t, 1.877934294e-1f);
  s = fmaf(s, t, 1.971522634e-1f);
  s = fmaf(s, t, 1.974830158e-1f);
  return gauss * t * s;
}
FASTLM_DEVICE float erfc_short(float x, float& gauss) {  // to 3e-5, for 16 bits; x up to 6
  gauss = exp2_approx(-x * x * kLog2E);
  const float t = rcp_approx(fmaf(x, 0.35f, 1.0f));
  float s = fmaf(t, 5.404327735e-1f, -3.146127153e-1f);
  s = fmaf(s, t, 4.368943361e-1f);
  s = fmaf(s, t, 1.335005630e-1f);
  s = fmaf(s, t, 2.037939869e-1f);
  return gauss * t * s;
}

// Phi(x), and phi(x) in `density`.
template <bool SHORT>
FASTLM_DEVICE float cdf(float x, float& density) {
  float gauss, tail;
  const float z = (x < 0 ? -x : x) * kInvSqrt2;
  if constexpr (SHORT)
    tail = erfc_short(between(z, 0, 6), gauss);
  else
    tail = erfc_positive(between(z, 0, 40), gauss);
  density = gauss * kInvSqrt2Pi;
  return x > 0 ? fmaf(tail, -0.5f, 1.0f) : 0.5f * tail;
}

// e^(-2u) for |x| <= 10; beyond, the sigmoid is 1 or below 1e-37, and this would overflow.
FASTLM_DEVICE float exp_minus_2u(float x) {
  return exp2_approx(x * fmaf(x * x, -2 * kSqrt2OverPi * kCubic * kLog2E, -2 * kSqrt2OverPi * kLog2E));
}

template <bool TANH, bool SHORT>
FASTLM_DEVICE float value(float x) {
  if constexpr (TANH) return (x < -10 ? -10 : x) * reciprocal<SHORT>(1.0f + exp_minus_2u(between(x, -10, 10)));
  float density;
  return (x < -40 ? -40 : x) * cdf<SHORT>(x, density);
}

template <bool TANH, bool SHORT>
FASTLM_DEVICE float derivative(float x) {
  if constexpr (TANH) {
    const float c = between(x, -10, 10), e = exp_minus_2u(c), s = reciprocal<SHORT>(1.0f + e);
    const float slope = fmaf(c * c, 6 * kSqrt2OverPi * kCubic, 2 * kSqrt2OverPi);
    return fmaf(c * slope, s * (e * s), s);  // 1 - s = e s: a difference would lose it near 1
  }
  float density;
  const float phi = cdf<SHORT>(x, density);
  return fmaf(between(x, -40, 40), density, phi);
}

struct Args {
  Floats bias;
  Global<float> partial;  // (splits, N)
  int64_t M, N, total;    // total: elements, which the last row of a flat array does not fill
  Dropout dropout;
};

// The elements of this thread's next rows: up to ROWS whole vectors, issued together.
template <class T, int VEC, int ROWS>
struct Batch {
  Vec<T, VEC> at[ROWS] = {};

  FASTLM_DEVICE void load_from(Global<const T> p, const Args& a, const Walker& at_row, int64_t row) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const int64_t next = row + r * at_row.step, i = next * a.N + at_row.column;
      if (next < at_row.end && i + VEC <= a.total) at[r] = load<VEC, Cache::stream>(p + i);
    }
  }
};

template <class T, int VEC>
FASTLM_DEVICE Vec<float, VEC> bias_of(const Args& a, const Walker& at) {
  Vec<float, VEC> bias;
#pragma unroll
  for (int i = 0; i < VEC; ++i) bias[i] = 0;
  if (a.bias.present() && at.column < a.N) bias = load_floats<VEC>(a.bias, at.column);
  return bias;
}

template <class T, int VEC, bool TANH>
__global__ void __launch_bounds__(Walk::kThreads) fwd_kernel(Global<const T> x, Global<T> y, Args a, Walk walk) {
  const Walker at(walk, a.M, VEC);
  const Vec<float, VEC> bias = bias_of<T, VEC>(a, at);
  for (int64_t row = at.row; at.column < a.N && row < at.end; row += kForwardRows * at.step) {
    Batch<T, VEC, kForwardRows> batch;
    batch.load_from(x, a, at, row);
#pragma unroll
    for (int r = 0; r < kForwardRows; ++r) {
      const int64_t next = row + r * at.step, i = next * a.N + at.column;
      if (next >= at.end || i + VEC > a.total) continue;
      Vec<float, VEC> v;
#pragma unroll
      for (int k = 0; k < VEC; ++k) v[k] = value<TANH, sizeof(T) == 2>(to_float(batch.at[r][k]) + bias[k]);
      if (a.dropout.threshold) apply(a.dropout, next, at.column, v);
      write(y + i, v);
    }
  }
}

template <class T, int VEC, bool TANH>
__global__ void __launch_bounds__(Walk::kThreads)
    bwd_kernel(Global<const T> dy, Global<const T> x, Global<T> dx, Args a, Walk walk) {
  const Walker at(walk, a.M, VEC);
  const Vec<float, VEC> bias = bias_of<T, VEC>(a, at);
  Vec<float, VEC> sum;
#pragma unroll
  for (int k = 0; k < VEC; ++k) sum[k] = 0;
  for (int64_t row = at.row; at.column < a.N && row < at.end; row += kBackwardRows * at.step) {
    Batch<T, VEC, kBackwardRows> dys, xs;
    dys.load_from(dy, a, at, row);
    xs.load_from(x, a, at, row);
#pragma unroll
    for (int r = 0; r < kBackwardRows; ++r) {
      const int64_t next = row + r * at.step, i = next * a.N + at.column;
      if (next >= at.end || i + VEC > a.total) continue;
      Vec<float, VEC> g;
#pragma unroll
      for (int k = 0; k < VEC; ++k) g[k] = to_float(dys.at[r][k]);
      if (a.dropout.threshold) apply(a.dropout, next, at.column, g);
#pragma unroll
      for (int k = 0; k < VEC; ++k) {
        g[k] *= derivative<TANH, sizeof(T) == 2>(to_float(xs.at[r][k]) + bias[k]);
        sum[k] += g[k];
      }
      write(dx + i, g);
    }
  }
  if (a.partial) store_column_sums(walk, at, sum, a.partial + at.share * a.N, a.N);
}

template <class T>
constexpr int kVec = 16 / (int)sizeof(T);

// Blocks at most: forward enough for kForwardRows rows a thread, backward few enough for the partial sums.
Walk forward_walk(const Args& a, int vec) { return Walk::over(a.M, a.N, vec, 1 << 30, kForwardRows); }
Walk backward_walk(int64_t M, int64_t N, int vec, bool with_bias) {
  return Walk::over(M, N, vec, with_bias ? multiprocessors() * 8 : 1 << 30, kBackwardRows);
}

// Whether vectors serve, and the shape the kernels see: rows of one tile where the array's own do not matter.
struct View {
  Args args;
  bool vectors;
};
// partial: null forward.
template <class T, class... P>
View view_of(const GeluArgs& g, void* partial, P... data) {
  Args a{Floats::of(g.bias, g.bias_type), static_cast<float*>(partial), g.M, g.N, g.M * g.N,
         Dropout::of(g.dropout_p, g.seed)};
  const bool flat = !g.bias && g.dropout_p == 0;
  const bool vectors = aligned(g.bias, data...) && (flat ? a.total : g.N) % kVec<T> == 0;
  if (flat) {
    a.N = Walk::kThreads * (vectors ? kVec<T> : 1);
    a.M = divided_up(a.total, a.N);
  }
  return {a, vectors};
}

template <class T, int VEC>
void run_fwd(const GeluArgs& g, const Args& a) {
  const Walk walk = forward_walk(a, VEC);
  const Launch l{"gelu_fwd", {(unsigned)(walk.tiles * walk.splits)}, Walk::kThreads, 0, g.on.handle};
  Global<const T> from = static_cast<const T*>(g.x);
  Global<T> to = static_cast<T*>(g.y);
  if (g.tanh) return launch(l, fwd_kernel<T, VEC, true>, from, to, a, walk);
  launch(l, fwd_kernel<T, VEC, false>, from, to, a, walk);
}

template <class T, int VEC>
void run_bwd(const GeluArgs& g, const Args& a) {
  const Walk walk = backward_walk(a.M, a.N, VEC, (bool)a.partial);
  const Launch l{"gelu_bwd", {(unsigned)(walk.tiles * walk.splits)}, Walk::kThreads,
                 sizeof(float) * VEC * Walk::kThreads, g.on.handle};
  Global<const T> dy = static_cast<const T*>(g.dy), from = static_cast<const T*>(g.x);
  Global<T> to = static_cast<T*>(g.dx);
  if (g.tanh)
    launch(l, bwd_kernel<T, VEC, true>, dy, from, to, a, walk);
  else
    launch(l, bwd_kernel<T, VEC, false>, dy, from, to, a, walk);
  if (a.partial) sum_partials(g.on, address(a.partial), g.db, walk.splits, a.N);
}

}  // namespace gelu

void gelu_fwd(const GeluArgs& g) {
  if (g.M * g.N == 0) return;
  set_device(g.on.device);
  for_type(g.type, [&](auto type) {
    using T = decltype(type);
    const gelu::View view = gelu::view_of<T>(g, nullptr, g.x, g.y);
    if (view.vectors) return gelu::run_fwd<T, gelu::kVec<T>>(g, view.args);
    gelu::run_fwd<T, 1>(g, view.args);
  });
}

void gelu_bwd(const GeluArgs& g) {
  if (g.M * g.N == 0) return;
  set_device(g.on.device);
  for_type(g.type, [&](auto type) {
    using T = decltype(type);
    const gelu::View view = gelu::view_of<T>(g, g.partial, g.dy, g.x, g.dx);
    if (view.vectors) return gelu::run_bwd<T, gelu::kVec<T>>(g, view.args);
    gelu::run_bwd<T, 1>(g, view.args);
  });
}

int64_t gelu_partials(int device, int64_t M, int64_t N) {
  if (M * N == 0) return 0;
  set_device(device);
  int64_t most = 1;
  for (const int vec : {1, 4, 8}) most = larger(most, gelu::backward_walk(M, N, vec, true).splits);
  return most;
}

}  // namespace fastlm::cuda
