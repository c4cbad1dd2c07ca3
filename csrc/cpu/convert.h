// Small parameter vectors (weights, biases) in the type that a kernel computes in. For the dispatching part of a
// kernel file, after the passes.
#pragma once

#include <memory>

namespace fastlm {

void widen(const bf16_t* x, float* y, int64_t size);  // bf16 parameters are common enough for vectors

// `data` points at n elements in the compute type of `as` (fp64 for f64, else fp32): the given vector itself where
// it already has that type, else a converted copy that lives as long as this object. Null stays null.
struct AsCompute {
  const void* data;

  AsCompute(const void* p, int64_t n, int type, int as) : data(p) {
    const bool wide = (DType)as == DType::f64;
    if (p && type != (int)(wide ? DType::f64 : DType::f32)) convert(p, n, (DType)type, wide);
  }
  // The same, but n times `absent` in place of null.
  AsCompute(const void* p, int64_t n, int type, int as, double absent) : AsCompute(p, n, type, as) {
    if (p) return;
    double* copy = room(n);
    if ((DType)as == DType::f64)
      std::fill_n(copy, n, absent);
    else
      std::fill_n(reinterpret_cast<float*>(copy), n, (float)absent);
  }

 private:
  // For n of either type.
  double* room(int64_t n) {
    if (n > kFew) copy_.reset(new double[(size_t)n]);
    double* p = n > kFew ? copy_.get() : few_;
    data = p;
    return p;
  }
  void convert(const void* p, int64_t n, DType type, bool wide) {
    double* out = room(n);
    if (wide)
      copy(p, n, type, out);
    else
      copy(p, n, type, reinterpret_cast<float*>(out));
  }
  template <class S>
  static void copy(const void* p, int64_t n, DType type, S* out) {
    switch (type) {
      case DType::f32: return each(static_cast<const float*>(p), n, out);
      case DType::f64: return each(static_cast<const double*>(p), n, out);
      case DType::bf16: return each(static_cast<const bf16_t*>(p), n, out);
      case DType::f16: return each(static_cast<const f16_t*>(p), n, out);
      default: unsupported_types("fastlm._cpu", "a weight or bias", {(int)type}, "a floating dtype");
    }
  }
  static void each(const bf16_t* p, int64_t n, float* out) { widen(p, out, n); }
  template <class T, class S>
  static void each(const T* p, int64_t n, S* out) {
    for (int64_t i = 0; i < n; ++i) out[i] = (S)baseline::to_float(p[i]);
  }
  static constexpr int64_t kFew = 1024;  // an allocation for these takes as long as converting them
  double few_[kFew];
  std::unique_ptr<double[]> copy_;
};

}  // namespace fastlm
