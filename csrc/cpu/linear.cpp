// Linear layer of a few rows (decoding): y = x w^T + bias, where reading the weight is the whole cost.
//
// The weight is read once and in order for up to 8 rows of x, which are widened once into scratch memory. A sum's order
// depends neither on the other rows nor on the number of threads: two accumulators take the vectors of K in turn.
//
// Measured on two threads of a Sapphire-Rapids-class core, bf16, one row: 22 to 24 GB/s in pages of 4 KiB, where a bare
// sum of the same memory reached 19, and 28 to 31 in huge pages, where it reached 31. Four rows of the weight at a time
// were no faster, eight slower; asking for memory 1 or 4 KiB ahead instead of 2 lost 5 to 20 %.
// fp32, one row, against PyTorch: 0.91 times the speed at 3072x768 and 0.98 at 50257x768. Four rows of the weight at a
// time gained on the smallest weights alone (0.80 to 0.87 at 768x768) and cost bf16 12 to 28 %. Where there are tiles
// (AMX), a bf16 weight goes through linear_tiles.cpp; where there are dot products of bf16 alone, through
// linear_dots.cpp.

#include "cpu/attention.h"
#include "cpu/isa.h"
#include "cpu/ops.h"

#ifndef FASTLM_ISA
#define FASTLM_FILE "cpu/linear.cpp"
#include "cpu/foreach_isa.h"
#endif

#ifdef FASTLM_ISA
namespace fastlm::FASTLM_ISA {

namespace linear {

constexpr int64_t kAhead = 2048;                        // bytes that memory is asked for in advance
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
void fwd(const void* x, const void* w, const scalar_of<T>* bias, void* y, int64_t M, int64_t N, int64_t K, bool wide_x,
         bool wide_y) {
  using V = vec_of<T>;
  using S = scalar_of<T>;
  const int64_t group = M <= 2 ? M : M <= 4 ? 4 : kGroup, padded = ceil_div(M, group) * group;
  S* wide = (S*)attention_scratch(sizeof(S) * (size_t)(padded * K));
  for_lanes<V>(M * K, [&](int64_t k, auto n) {
    store(wide + k, wide_x ? load<V>((const S*)x + k, n) : load<V>((const T*)x + k, n), n);
  });
  std::fill(wide + M * K, wide + padded * K, S(0));
  const Call<S> call{wide, w, bias, y, M, N, K, wide_y};
  switch (group) {
    case 1: return all_rows<1, T>(call);
    case 2: return all_rows<2, T>(call);
    case 4: return all_rows<4, T>(call);
    default: return all_rows<kGroup, T>(call);
  }
}

void fwd_dispatch(const void* x, const void* w, const void* bias, void* y, int64_t M, int64_t N, int64_t K, bool wide_x,
                  bool wide_y, int type) {
  switch ((DType)type) {
    case DType::f32: return fwd<float>(x, w, (const float*)bias, y, M, N, K, true, true);
    case DType::f64: return fwd<double>(x, w, (const double*)bias, y, M, N, K, true, true);
    case DType::bf16: return fwd<bf16_t>(x, w, (const float*)bias, y, M, N, K, wide_x, wide_y);
    case DType::f16: return fwd<f16_t>(x, w, (const float*)bias, y, M, N, K, wide_x, wide_y);
  }
}

}  // namespace linear
}  // namespace fastlm::FASTLM_ISA

#else

#include "cpu/convert.h"
#include "cpu/linear_dots.h"
#include "cpu/linear_tiles.h"

namespace fastlm {

void linear_fwd(const void* x, const void* w, const void* bias, void* y, int64_t M, int64_t N, int64_t K, int x_type,
                int w_type, int b_type, int y_type) {
  const AsCompute b(bias, N, b_type, w_type);
  if (w_type == (int)DType::bf16 && linear_has_tiles())
    return linear_tiles_bf16(x, w, (const float*)b.data, y, M, N, K, x_type != w_type, y_type != w_type);
  if (w_type == (int)DType::bf16 && linear_has_dots())
    return linear_dots_bf16(x, w, (const float*)b.data, y, M, N, K, x_type != w_type, y_type != w_type);
  FASTLM_DISPATCH(linear::fwd_dispatch, x, w, b.data, y, M, N, K, x_type != w_type, y_type != w_type, w_type);
}

}  // namespace fastlm
#endif
