// SwiGLU (Shazeer 2020): y = silu(gate) up, with silu(a) = a s and s = 1 / (1 + e^-a).
//
//   dgate = dy up s (1 + a (1 - s)),   dup = dy a s.
// Rows of gate and up may lie apart (halves of one projection); the outputs are contiguous.

#include "cpu/isa.h"
#include "cpu/ops.h"

#ifndef FASTLM_ISA
#define FASTLM_FILE "cpu/swiglu.cpp"
#include "cpu/foreach_isa.h"
#endif

#ifdef FASTLM_ISA
namespace fastlm::FASTLM_ISA {

namespace swiglu {

template <class V>
inline V sigmoid(V a) {
  return lane_t<V>(1) / (lane_t<V>(1) + exp(-a));
}

template <class T>
void fwd(const void* gate, const void* up, void* y, int64_t M, int64_t N, int64_t gate_stride, int64_t up_stride) {
  using V = vec_of<T>;
#pragma omp parallel for schedule(static) if (M * N > kParallelGrain)
  for (int64_t i = 0; i < M; ++i) {
    const T *a = (const T*)gate + i * gate_stride, *b = (const T*)up + i * up_stride;
    T* out = (T*)y + i * N;
    for_lanes<V>(N, [&](int64_t j, auto n) {
      const V g = load<V>(a + j, n);
      store(out + j, V(g * sigmoid(g) * load<V>(b + j, n)), n);
    });
  }
}

template <class T>
void bwd(const void* dy, const void* gate, const void* up, void* dgate, void* dup, int64_t M, int64_t N,
         int64_t gate_stride, int64_t up_stride) {
  using V = vec_of<T>;
  using S = lane_t<V>;
#pragma omp parallel for schedule(static) if (M * N > kParallelGrain)
  for (int64_t i = 0; i < M; ++i) {
    const T *a = (const T*)gate + i * gate_stride, *b = (const T*)up + i * up_stride, *d = (const T*)dy + i * N;
    T *da = (T*)dgate + i * N, *db = (T*)dup + i * N;
    for_lanes<V>(N, [&](int64_t j, auto n) {
      const V g = load<V>(a + j, n), dv = load<V>(d + j, n);
      const V s = sigmoid(g);
      store(da + j, V(dv * load<V>(b + j, n) * s * (S(1) + g * (S(1) - s))), n);
      store(db + j, V(dv * g * s), n);
    });
  }
}

#define FASTLM_TYPES(fn, ...)                            \
  switch ((DType)type) {                                 \
    case DType::f32: return fn<float>(__VA_ARGS__);      \
    case DType::f64: return fn<double>(__VA_ARGS__);     \
    case DType::bf16: return fn<bf16_t>(__VA_ARGS__);    \
    case DType::f16: return fn<f16_t>(__VA_ARGS__);      \
  }

void fwd_dispatch(const void* gate, const void* up, void* y, int64_t M, int64_t N, int64_t gate_stride,
                  int64_t up_stride, int type) {
  FASTLM_TYPES(fwd, gate, up, y, M, N, gate_stride, up_stride)
}
void bwd_dispatch(const void* dy, const void* gate, const void* up, void* dgate, void* dup, int64_t M, int64_t N,
                  int64_t gate_stride, int64_t up_stride, int type) {
  FASTLM_TYPES(bwd, dy, gate, up, dgate, dup, M, N, gate_stride, up_stride)
}
#undef FASTLM_TYPES

}  // namespace swiglu
}  // namespace fastlm::FASTLM_ISA

#else

namespace fastlm {

void swiglu_fwd(const void* gate, const void* up, void* y, int64_t M, int64_t N, int64_t gate_stride,
                int64_t up_stride, int type) {
  FASTLM_DISPATCH(swiglu::fwd_dispatch, gate, up, y, M, N, gate_stride, up_stride, type);
}

void swiglu_bwd(const void* dy, const void* gate, const void* up, void* dgate, void* dup, int64_t M, int64_t N,
                int64_t gate_stride, int64_t up_stride, int type) {
  FASTLM_DISPATCH(swiglu::bwd_dispatch, dy, gate, up, dgate, dup, M, N, gate_stride, up_stride, type);
}

}  // namespace fastlm
#endif
