// Softmax cross-entropy over rows of logits, whole or in windows of columns, and its gradient.
//
// Of a row x with class y, in blocks of kBlock columns: the block's maximum, then the sum of exp(x - maximum) over
// the classes other than y, both while the block is in the first-level cache. Blocks are folded in the order of
// columns, so a row has the same bits wherever the threads and the windows are cut (at multiples of kBlock).
// With m the row's maximum, o the sum over the others and s = o + exp(x_y - m):
//   nll = m - x_y + log s,  log s = log1p(o) where y holds the maximum;   1 - p_y = o / s
// which keep all their digits where p_y is near 1. Loss and gradient, with smoothing e, class weights w, W = sum w:
//   loss = (1 - e) w_y nll + e/N sum_c w_c (m + log s - x_c)
//   dx_c = g (((1 - e) w_y + e W/N) p_c - (1 - e) w_y [c = y] - e/N w_c)
// The functions that compute are not inlined: a second copy could contract its products differently.
// Ignored rows have loss 0 and gradient 0, whatever they hold.
//
// Exponentials come from a table; logits are prefetched into both levels of cache, the next row's while this one's gradient
// is made; bf16 gradients are stored past the caches in whole lines. Computing the gradient in the forward sweep leaves
// out one read of the logits: 1024 x 50257 in fp32 4.8 times as fast as F.cross_entropy, forward and backward, on two
// threads with AVX-512 (docs/design/cross_entropy.md).

#include "cpu/isa.h"
#include "cpu/ops.h"

#ifndef FASTLM_ISA
#define FASTLM_WANT_BF16  // for its conversion to bf16
#define FASTLM_FILE "cpu/cross_entropy.cpp"

#include <cmath>
#include <cstdlib>
#include <limits>

namespace fastlm::cross_entropy {

constexpr int64_t kBlock = 2048;

// 2^(i / 32), for CPUs that look 32 values up in one instruction.
struct alignas(64) PowersOfTwo {
  float at[32];
  PowersOfTwo() {
    for (int i = 0; i < 32; ++i) at[i] = (float)std::exp2(i / 32.0);
  }
};
const PowersOfTwo kPowers;

// A call, and what follows from it.
struct Problem : CrossEntropyArgs {
  double w_sum;  // of the class weights, with smoothing only
  bool stream;   // whether the gradient goes past the caches
};

}  // namespace fastlm::cross_entropy

#include "cpu/foreach_isa.h"
#endif

#ifdef FASTLM_ISA
#if FASTLM_ISA_LEVEL <= 3  // there is nothing to multiply with tiles
#include "cpu/cross_entropy_block.h"

namespace fastlm::FASTLM_ISA {

namespace cross_entropy {

template <class T>
struct Rows {
  using V = vec_of<T>;
  using S = scalar_of<T>;
  static constexpr int64_t L = lanes<V>;
  const Problem& p;
  const T* x = (const T*)p.x;
  const S* w = (const S*)p.w;
  State<S>* states = (State<S>*)p.states;
  S* loss = (S*)p.loss;
  Stats<S>* stats = (Stats<S>*)p.stats;
  const int64_t blocks = ceil_div(p.n, kBlock);

  bool ignored(int64_t i) const { return p.target[i] == p.ignore_index; }

  // Few rows are shared out by blocks, many by rows: a matter of speed alone.
  bool split() const { return blocks > 1 && p.M < 4 * (int64_t)omp_threads(); }

  __attribute__((noinline)) State<S> block(int64_t i, int64_t b) const {
    const int64_t from = b * kBlock, k = std::min(kBlock, p.n - from), column = p.first + from;
    int64_t y = p.target[i] - column;
    if (y < 0 || y >= k) y = -1;
    const T* at = x + i * p.n + from;
    const S* weights = w ? w + column : nullptr;
    return p.smoothing > 0 ? Block<T, true>{at, weights, from}.run(k, y) : Block<T, false>{at, weights, from}.run(k, y);
  }

  __attribute__((noinline)) void take(State<S>* state, const State<S>& part, int64_t i, int64_t b) const {
    fold(state, part);
    const int64_t y = p.target[i] - p.first - b * kBlock;
    if (y >= 0 && y < kBlock && y + b * kBlock < p.n) state->x_y = part.x_y;
  }

  void update() const { update(states); }

  void update(State<S>* states) const {
    if (split()) return update_split(states);
#pragma omp parallel for schedule(static) if (p.M * p.n > kParallelGrain)
    for (int64_t i = 0; i < p.M; ++i) update_row(states + i, i);
  }

  void update_row(State<S>* state, int64_t i) const {
    if (p.first == 0) start(state);
    if (!ignored(i))
      for (int64_t b = 0; b < blocks; ++b) take(state, block(i, b), i, b);
  }

  void update_split(State<S>* states) const {
    State<S>* parts = (State<S>*)std::malloc((size_t)(p.M * blocks) * sizeof(State<S>));
#pragma omp parallel for schedule(static) if (p.M * p.n > kParallelGrain)
    for (int64_t k = 0; k < p.M * blocks; ++k)
      if (!ignored(k / blocks)) parts[k] = block(k / blocks, k % blocks);
    for (int64_t i = 0; i < p.M; ++i) {
      if (p.first == 0) start(states + i);
      if (!ignored(i))
        for (int64_t b = 0; b < blocks; ++b) take(states + i, parts[i * blocks + b], i, b);
    }
    std::free(parts);
  }

  __attribute__((noinline)) S finish(const State<S>& a, Stats<S>* out, int64_t i) const {
    if (ignored(i)) {
      *out = {0, 0, 0};
      return 0;
    }
    const S nan = std::numeric_limits<S>::quiet_NaN();
    const S s = std::isinf(a.m) ? nan : a.others + std::exp(a.x_y - a.m);
    const S log_s = std::isinf(a.m) ? nan : a.x_y == a.m ? std::log1p(a.others) : std::log(s);
    *out = {a.m, S(1) / s, a.others / s};
    const S w_y = w ? w[p.target[i]] : S(1);
    const S nll = w_y * (log_s + (a.m - a.x_y));
    if (p.smoothing == 0) return nll;
    return S(1 - p.smoothing) * nll + S(p.smoothing / (double)p.N) * (a.weight * log_s - a.smooth);
  }

  // `ahead`: bytes from what is read here to what will be read from memory next.
  template <bool kSmooth>
  __attribute__((noinline)) void gradient_block(const Stats<S>& stats, int64_t i, int64_t b, int64_t ahead) const {
    const int64_t from = b * kBlock, k = std::min(kBlock, p.n - from), column = p.first + from;
    const T* in = x + i * p.n + from;
    T* out = (T*)p.dx + i * p.n + from;
    const S g = p.g ? ((const S*)p.g)[i] : S(p.scale);
    const S w_y = w ? w[p.target[i]] : S(1), keep = S(1 - p.smoothing) * w_y;
    const S spread = S(p.smoothing / (double)p.N), total = S(p.w_sum);
    const S factor = (keep + spread * total) * stats.inv_s * g, minus = spread * g, m = stats.m;
    const int64_t y = p.target[i] - column;
    const bool here = y >= 0 && y < k;
    const S x_y = here ? S(to_float(in[y])) : S(0);  // before out, which may be in, is written
    const Exponential<V> exponential{};
    const V factors = set1<V>(factor);
    auto value = [&](int64_t j, auto n) __attribute__((always_inline)) {
      V v = exponential.times(factors, V(load<V>(in + j, n) - m));
      if constexpr (kSmooth) v -= w ? load<V>(w + column + j, n) * minus : set1<V>(minus);
      return v;
    };
    constexpr std::integral_constant<int64_t, L> whole;
    constexpr bool full_lines = 2 * L * sizeof(T) >= kLine || sizeof(T) >= 4;  // bf16's halves: 45 ms cached, 50 so
    const bool stream = p.stream && full_lines;
    const int64_t head = stream ? std::min<int64_t>(k, (-(uintptr_t)out & (kLine - 1)) / sizeof(T)) : 0;
    int64_t j = 0;
    for (int64_t n; j < head; j += n) n = std::min(L, head - j), store(out + j, value(j, n), n);
    for (; j + 2 * L <= k; j += 2 * L) {
      fetch<2 * L>(in - from, from + j, ahead);
      if (stream)
        put_two<true>(out + j, value(j, whole), value(j + L, whole));
      else
        put_two<false>(out + j, value(j, whole), value(j + L, whole));
    }
    if (j + L <= k) store(out + j, value(j, whole)), j += L;
    if (j < k) store(out + j, value(j, k - j), k - j);
    if (stream) fence();
    if (!here) return;
    const S p_y = std::exp(x_y - m) * stats.inv_s;
    from_float(g * (spread * (total * p_y - w_y) - keep * stats.q), out + y);
  }

  void gradient_block(const Stats<S>& stats, int64_t i, int64_t b, int64_t ahead) const {
    if (ignored(i)) {
      const int64_t from = b * kBlock;
      std::memset((T*)p.dx + i * p.n + from, 0, (size_t)std::min(kBlock, p.n - from) * sizeof(T));
    } else if (p.smoothing > 0) {
      gradient_block<true>(stats, i, b, ahead);
    } else {
      gradient_block<false>(stats, i, b, ahead);
    }
  }

  void backward() const {
    const int64_t pieces = split() ? blocks : 1, size = ceil_div(blocks, pieces);
#pragma omp parallel for schedule(static) if (p.M * p.n > kParallelGrain)
    for (int64_t k = 0; k < p.M * pieces; ++k)
      for (int64_t b = k % pieces * size; b < std::min(blocks, (k % pieces + 1) * size); ++b)
        gradient_block(stats[k / pieces], k / pieces, b, kAhead);
  }

  void forward() const {
    const int64_t next_row = p.n * (int64_t)sizeof(T);
    if (split()) return forward_split();
#pragma omp parallel for schedule(static) if (p.M * p.n > kParallelGrain)
    for (int64_t i = 0; i < p.M; ++i) {
      State<S> state;
      update_row(&state, i);
      loss[i] = finish(state, stats + i, i);
      for (int64_t b = 0; p.dx && b < blocks; ++b) gradient_block(stats[i], i, b, next_row);
    }
  }

  void forward_split() const {
    State<S>* states = (State<S>*)std::malloc((size_t)p.M * sizeof(State<S>));
    update_split(states);
    for (int64_t i = 0; i < p.M; ++i) loss[i] = finish(states[i], stats + i, i);
    std::free(states);
    if (p.dx) backward();
  }

  void finish() const {
    for (int64_t i = 0; i < p.M; ++i) loss[i] = finish(states[i], stats + i, i);
  }
};

void forward_any(const Problem& p) {
  for_any_type("cross_entropy_fwd", "logits", p.type, [&](auto type) { Rows<decltype(type)>{p}.forward(); });
}
void update_any(const Problem& p) {
  for_any_type("cross_entropy_update", "logits", p.type, [&](auto type) { Rows<decltype(type)>{p}.update(); });
}
void finish_any(const Problem& p) {
  for_any_type("cross_entropy_finish", "states", p.type, [&](auto type) { Rows<decltype(type)>{p}.finish(); });
}
void backward_any(const Problem& p) {
  for_any_type("cross_entropy_bwd", "logits", p.type, [&](auto type) { Rows<decltype(type)>{p}.backward(); });
}

}  // namespace cross_entropy
}  // namespace fastlm::FASTLM_ISA
#endif

#else

#include "cpu/convert.h"

namespace fastlm {

namespace {

double weight(const void* w, int64_t c, int type) {
  if (!w) return 1;
  return (DType)type == DType::f64 ? ((const double*)w)[c] : ((const float*)w)[c];
}

// Of class weights already in the compute type of `type`.
double weight_sum(const void* w, int64_t N, int type) {
  double sum = 0;
  for (int64_t c = 0; c < N; ++c) sum += weight(w, c, type);
  return sum;
}

// The call with its class weights in the compute type, `w`.
cross_entropy::Problem problem(const CrossEntropyArgs& args, const AsCompute& w) {
  cross_entropy::Problem p{args, 0, false};
  p.w = w.data;
  if (p.smoothing > 0) p.w_sum = weight_sum(p.w, p.N, p.type);
  p.stream = p.dx != p.x && p.M * p.n > (int64_t(4) << 20);  // a new tensor larger than the caches
  return p;
}

}  // namespace

std::pair<int64_t, double> cross_entropy_targets(const CrossEntropyArgs& a) {
  const AsCompute w(a.w, a.N, a.w_type, (int)DType::f64);
  double sum = 0;
  for (int64_t i = 0; i < a.M; ++i) {
    const int64_t t = a.target[i];
    if (t == a.ignore_index) continue;
    if (t < 0 || t >= a.N) return {i, 0};
    sum += weight(w.data, t, (int)DType::f64);
  }
  return {-1, sum};
}

double cross_entropy_total(const void* loss, int64_t M, int type) {
  if (type != (int)DType::f32 && type != (int)DType::f64)
    unsupported_type("cross_entropy_total", "loss", type, {(int)DType::f32, (int)DType::f64});
  double sum = 0;
  for (int64_t i = 0; i < M; ++i)
    sum += (DType)type == DType::f64 ? ((const double*)loss)[i] : ((const float*)loss)[i];
  return sum;
}

void cross_entropy_fwd(const CrossEntropyArgs& args) {
  CrossEntropyArgs whole = args;
  whole.n = whole.N;
  const AsCompute w(args.w, args.N, args.w_type, args.type);
  FASTLM_DISPATCH_BF16(cross_entropy::forward_any, problem(whole, w));
}

void cross_entropy_update(const CrossEntropyArgs& args) {
  const AsCompute w(args.w, args.N, args.w_type, args.type);
  FASTLM_DISPATCH_BF16(cross_entropy::update_any, problem(args, w));
}

void cross_entropy_finish(const CrossEntropyArgs& args) {
  const AsCompute w(args.w, args.N, args.w_type, args.type);
  FASTLM_DISPATCH_BF16(cross_entropy::finish_any, problem(args, w));
}

void cross_entropy_bwd(const CrossEntropyArgs& args) {
  const AsCompute w(args.w, args.N, args.w_type, args.type);
  FASTLM_DISPATCH_BF16(cross_entropy::backward_any, problem(args, w));
}

}  // namespace fastlm
#endif
