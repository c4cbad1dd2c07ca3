// Linear layer of a few rows (decoding): y = x w^T + bias, where reading the weight is the whole cost.
//
// The weight is read once and in order for up to 8 rows of x, which are widened once into scratch memory. A sum's order
// depends neither on the other rows nor on the number of threads: two accumulators take the vectors of K in turn.
//
// Memory is prefetched 2 KiB ahead: bf16, one row, reads 28 to 31 GB/s in huge pages, as a bare sum of the same memory does
// (docs/design/linear.md). Where there are tiles (AMX), a bf16 weight goes through linear_tiles.cpp; where there are dot
// products of bf16 alone, through linear_dots.cpp.

#include "cpu/isa.h"
#include "cpu/ops.h"
#include "cpu/scratch.h"

#ifndef FASTLM_ISA
#define FASTLM_FILE "cpu/linear.cpp"
#include "cpu/foreach_isa.h"
#endif

#ifdef FASTLM_ISA
namespace fastlm::FASTLM_ISA {

namespace linear {

constexpr int64_t kAhead = 2048;                        // bytes that memory is prefetched in advance
constexpr int kGroup = FASTLM_ISA_LEVEL >= 2 ? 8 : 4;  // rows of x whose accumulators fit in registers

template <class S>
struct Call {
  const S* x;  // (M padded with zeros to a whole group, K)
  const void* w;
  const S* bias;
  void* y;
  int64_t M, N, K;
  bool wide_y;  // y in the compute type, or in the weight's
};

template <class T>
inline void put(const Call<scalar_of<T>>& c, int64_t m, int64_t n, scalar_of<T> v) {
  if (c.bias) v += c.bias[n];
  if (c.wide_y)
    ((scalar_of<T>*)c.y)[m * c.N + n] = v;
  else
    from_float(v, (T*)c.y + m * c.N + n);
}

// M rows of x, from row m on, times row n of the weight.
template <int M, class T>
inline void dot(const Call<scalar_of<T>>& c, int64_t m0, int64_t n) {
  using V = vec_of<T>;
  constexpr int64_t L = lanes<V>;
  const int64_t K = c.K;
  const T* w = (const T*)c.w + n * K;
  const scalar_of<T>* x = c.x + m0 * K;
  V even[M]{}, odd[M]{};
  int64_t k = 0;
  for (; k + 2 * L <= K; k += 2 * L) {
    __builtin_prefetch((const char*)(w + k) + kAhead);
    const V a = load<V>(w + k), b = load<V>(w + k + L);
    for (int m = 0; m < M; ++m) {
      even[m] = fma(a, load<V>(x + m * K + k), even[m]);
      odd[m] = fma(b, load<V>(x + m * K + k + L), odd[m]);
    }
  }
  for_lanes<V>(K - k, [&](int64_t j, auto count) {
    const V a = load<V>(w + k + j, count);
    for (int m = 0; m < M; ++m) even[m] = fma(a, load<V>(x + m * K + k + j, count), even[m]);
  });
  for (int m = 0; m < M; ++m)
    if (m0 + m < c.M) put<T>(c, m0 + m, n, reduce_add(V(even[m] + odd[m])));
}

template <int M, class T>
void all_rows(const Call<scalar_of<T>>& c) {
#pragma omp parallel for schedule(static) if (c.N * c.K > kParallelGrain)
  for (int64_t n = 0; n < c.N; ++n)
    for (int64_t m = 0; m < c.M; m += M) dot<M, T>(c, m, n);
}

// At most 8 rows.
template <class T>
void fwd(const LinearArgs& a) {
  using V = vec_of<T>;
  using S = scalar_of<T>;
  const int64_t M = a.M, K = a.K, group = M <= 2 ? M : M <= 4 ? 4 : kGroup, padded = ceil_div(M, group) * group;
  S* wide = (S*)thread_scratch(sizeof(S) * (size_t)(padded * K));
  for_lanes<V>(M * K, [&](int64_t k, auto n) {
    store(wide + k, a.wide_x() ? load<V>((const S*)a.x + k, n) : load<V>((const T*)a.x + k, n), n);
  });
  std::fill(wide + M * K, wide + padded * K, S(0));
  const Call<S> call{wide, a.w, (const S*)a.bias, a.y, M, a.N, K, a.wide_y() || sizeof(T) == sizeof(S)};
  switch (group) {
    case 1: return all_rows<1, T>(call);
    case 2: return all_rows<2, T>(call);
    case 4: return all_rows<4, T>(call);
    default: return all_rows<kGroup, T>(call);
  }
}

void any(const LinearArgs& a) {
  for_any_type("linear_fwd", "weight", a.w_type, [&](auto type) { fwd<decltype(type)>(a); });
}

}  // namespace linear
}  // namespace fastlm::FASTLM_ISA

#else

#include "cpu/convert.h"
#include "cpu/linear_dots.h"
#include "cpu/linear_tiles.h"

namespace fastlm {

namespace {

// x or y, of the weight's type or its compute type.
void check(const char* argument, int type, int w_type) {
  if (type == w_type) return;
  if (w_type == (int)DType::f32 || w_type == (int)DType::f64) unsupported_type("linear_fwd", argument, type, {w_type});
  if (type != (int)DType::f32) unsupported_type("linear_fwd", argument, type, {w_type, (int)DType::f32});
}

}  // namespace

void linear_fwd(const LinearArgs& args) {
  LinearArgs a = args;
  check("x", a.x_type, a.w_type);
  check("y", a.y_type, a.w_type);
  const AsCompute bias(a.bias, a.N, a.bias_type, a.w_type);
  a.bias = bias.data;
  if (a.w_type == (int)DType::bf16 && linear_has_tiles()) return linear_tiles_bf16(a);
  if (a.w_type == (int)DType::bf16 && linear_has_dots()) return linear_dots_bf16(a);
  FASTLM_DISPATCH(linear::any, a);
}

}  // namespace fastlm
#endif
