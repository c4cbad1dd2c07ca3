// Small parameter vectors (weights, biases) in the type that a kernel computes in. For the dispatching part of a
// kernel file, after the passes.
#pragma once

#include <memory>

namespace fastlm {

// `data` points at n elements in the compute type of `as` (fp64 for f64, else fp32): the given vector itself where
// it already has that type, else a converted copy that lives as long as this object. Null stays null.
struct AsCompute {
  const void* data;

  AsCompute(const void* p, int64_t n, int type, int as) : data(p) {
    const bool wide = (DType)as == DType::f64;
    if (!p || type == (int)(wide ? DType::f64 : DType::f32)) return;
    copy_.reset(new double[(size_t)n]);  // room for either type
    data = copy_.get();
    for (int64_t i = 0; i < n; ++i) {
      const double v = value(p, i, (DType)type);
      if (wide)
        copy_[i] = v;
      else
        reinterpret_cast<float*>(copy_.get())[i] = (float)v;
    }
  }

 private:
  static double value(const void* p, int64_t i, DType type) {
    switch (type) {
      case DType::f32: return static_cast<const float*>(p)[i];
      case DType::f64: return static_cast<const double*>(p)[i];
      case DType::bf16: return baseline::to_float(static_cast<const bf16_t*>(p)[i]);
      case DType::f16: return baseline::to_float(static_cast<const f16_t*>(p)[i]);
    }
    return 0;
  }
  std::unique_ptr<double[]> copy_;
};

}  // namespace fastlm
