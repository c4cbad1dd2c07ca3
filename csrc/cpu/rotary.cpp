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
void run(const void* x_, const void* cos_, const void* sin_, void* y_, const int64_t* size, const int64_t* x_stride,
         const int64_t* y_stride, int64_t R, int64_t table_stride, bool interleaved, bool inverse) {
  using S = scalar_of<T>;
  const int64_t B = size[0], H = size[1], L = size[2], D = size[3];
  if (D == 0) return;  // there may be no memory at all
  const S sign = inverse ? S(-1) : S(1);
#pragma omp parallel for schedule(static) if (B * H * L * D > kParallelGrain)
  for (int64_t i = 0; i < B * H * L; ++i) {
    const int64_t b = i / (H * L), h = i / L % H, t = i % L, at = b * table_stride + t * R;
    const T* x = (const T*)x_ + b * x_stride[0] + h * x_stride[1] + t * x_stride[2];
    T* y = (T*)y_ + b * y_stride[0] + h * y_stride[1] + t * y_stride[2];
    const S *cos = (const S*)cos_ + at, *sin = (const S*)sin_ + at;
    if (interleaved)
      neighbours<T>(x, cos, sin, sign, y, R);
    else
      halves<T>(x, cos, sin, sign, y, R);
    std::memcpy(y + 2 * R, x + 2 * R, sizeof(T) * (size_t)(D - 2 * R));
  }
}

void dispatch(const void* x, const void* cos, const void* sin, void* y, const int64_t* size, const int64_t* x_stride,
              const int64_t* y_stride, int64_t R, int64_t table_stride, bool interleaved, bool inverse, int type) {
#define FASTLM_RUN(T) return run<T>(x, cos, sin, y, size, x_stride, y_stride, R, table_stride, interleaved, inverse)
  switch ((DType)type) {
    case DType::f32: FASTLM_RUN(float);
    case DType::f64: FASTLM_RUN(double);
    case DType::bf16: FASTLM_RUN(bf16_t);
    case DType::f16: FASTLM_RUN(f16_t);
  }
#undef FASTLM_RUN
}

}  // namespace rotary
}  // namespace fastlm::FASTLM_ISA

#else

namespace fastlm {

void rotary(const void* x, const void* cos, const void* sin, void* y, const int64_t* size, const int64_t* x_stride,
            const int64_t* y_stride, int64_t R, int64_t table_stride, bool interleaved, bool inverse, int type) {
  FASTLM_DISPATCH(rotary::dispatch, x, cos, sin, y, size, x_stride, y_stride, R, table_stride, interleaved, inverse,
                  type);
}

}  // namespace fastlm
#endif
