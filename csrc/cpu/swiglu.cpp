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
void fwd(const SwigluArgs& c) {
  using V = vec_of<T>;
#pragma omp parallel for schedule(static) if (c.M * c.N > kParallelGrain)
  for (int64_t i = 0; i < c.M; ++i) {
    const T *a = (const T*)c.gate + i * c.gate_stride, *b = (const T*)c.up + i * c.up_stride;
    T* out = (T*)c.y + i * c.N;
    for_lanes<V>(c.N, [&](int64_t j, auto n) {
      const V g = load<V>(a + j, n);
      store(out + j, V(g * sigmoid(g) * load<V>(b + j, n)), n);
    });
  }
}

template <class T>
void bwd(const SwigluArgs& c) {
  using V = vec_of<T>;
  using S = lane_t<V>;
#pragma omp parallel for schedule(static) if (c.M * c.N > kParallelGrain)
  for (int64_t i = 0; i < c.M; ++i) {
    const T *a = (const T*)c.gate + i * c.gate_stride, *b = (const T*)c.up + i * c.up_stride;
    const T* d = (const T*)c.dy + i * c.N;
    T *da = (T*)c.dgate + i * c.N, *db = (T*)c.dup + i * c.N;
    for_lanes<V>(c.N, [&](int64_t j, auto n) {
      const V g = load<V>(a + j, n), dv = load<V>(d + j, n);
      const V s = sigmoid(g);
      store(da + j, V(dv * load<V>(b + j, n) * s * (S(1) + g * (S(1) - s))), n);
      store(db + j, V(dv * g * s), n);
    });
  }
}

void fwd_any(const SwigluArgs& a) {
  for_any_type("swiglu_fwd", "gate", a.type, [&](auto type) { fwd<decltype(type)>(a); });
}
void bwd_any(const SwigluArgs& a) {
  for_any_type("swiglu_bwd", "gate", a.type, [&](auto type) { bwd<decltype(type)>(a); });
}

}  // namespace swiglu
}  // namespace fastlm::FASTLM_ISA

#else

namespace fastlm {

void swiglu_fwd(const SwigluArgs& args) { FASTLM_DISPATCH(swiglu::fwd_any, args); }
void swiglu_bwd(const SwigluArgs& args) { FASTLM_DISPATCH(swiglu::bwd_any, args); }

}  // namespace fastlm
#endif
