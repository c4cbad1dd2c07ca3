// Rotary position embedding (Su et al. 2021): pairs of the first 2 R elements of a head turn by their position's angle.
//
//   y1 = x1 cos - x2 sin,   y2 = x2 cos + x1 sin;   the pair is (i, i + R), or (2 i, 2 i + 1) where interleaved.
// The inverse, with -sin, is also the gradient. Elements beyond 2 R are copied.

#include "cpu/isa.h"
#include "cpu/ops.h"

#ifndef FASTLM_ISA
#define FASTLM_FILE "cpu/rotary.cpp"
#include "cpu/foreach_isa.h"
#endif

#ifdef FASTLM_ISA
namespace fastlm::FASTLM_ISA {

namespace rotary {

template <class T>
void halves(const T* x, const scalar_of<T>* cos, const scalar_of<T>* sin, scalar_of<T> sign, T* y, int64_t R) {
  using V = vec_of<T>;
  for_lanes<V>(R, [&](int64_t j, auto n) {
    const V a = load<V>(x + j, n), b = load<V>(x + R + j, n);
    const V c = load<V>(cos + j, n), s = load<V>(sin + j, n) * sign;
    store(y + j, V(a * c - b * s), n);
    store(y + R + j, V(b * c + a * s), n);
  });
}

template <class T>
void neighbours(const T* x, const scalar_of<T>* cos, const scalar_of<T>* sin, scalar_of<T> sign, T* y, int64_t R) {
  using S = scalar_of<T>;
  for (int64_t j = 0; j < R; ++j) {
    const S a = to_float(x[2 * j]), b = to_float(x[2 * j + 1]), c = cos[j], s = sin[j] * sign;
    from_float(S(a * c - b * s), y + 2 * j);
    from_float(S(b * c + a * s), y + 2 * j + 1);
  }
}

template <class T>
void run(const RotaryArgs& a) {
  using S = scalar_of<T>;
  const int64_t B = a.size[0], H = a.size[1], L = a.size[2], D = a.size[3];
  const int64_t R = a.R;
  if (D == 0) return;  // there may be no memory at all
  const S sign = a.inverse ? S(-1) : S(1);
#pragma omp parallel for schedule(static) if (B * H * L * D > kParallelGrain)
  for (int64_t i = 0; i < B * H * L; ++i) {
    const int64_t b = i / (H * L), h = i / L % H, t = i % L, at = b * a.table_stride + t * R;
    const T* x = (const T*)a.x + b * a.x_stride[0] + h * a.x_stride[1] + t * a.x_stride[2];
    T* y = (T*)a.y + b * a.y_stride[0] + h * a.y_stride[1] + t * a.y_stride[2];
    const S *cos = (const S*)a.cos + at, *sin = (const S*)a.sin + at;
    if (a.interleaved)
      neighbours<T>(x, cos, sin, sign, y, R);
    else
      halves<T>(x, cos, sin, sign, y, R);
    std::memcpy(y + 2 * R, x + 2 * R, sizeof(T) * (size_t)(D - 2 * R));
  }
}

void any(const RotaryArgs& a) {
  for_any_type("rotary", "x", a.type, [&](auto type) { run<decltype(type)>(a); });
}

}  // namespace rotary
}  // namespace fastlm::FASTLM_ISA

#else

namespace fastlm {

void rotary(const RotaryArgs& args) { FASTLM_DISPATCH(rotary::any, args); }

}  // namespace fastlm
#endif
