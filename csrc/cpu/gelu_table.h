// GELU's curves as piecewise polynomials, for CPUs that look 32 values up in one instruction. Ordinary header.
//
// Both forms are x F(x), and F and the derivative of x F(x) are 1 minus their own mirror image; so the left half serves.
// It decays: beyond 6 it is below 1e-8 and counts as 0. 32 intervals of degree 5 (Chebyshev interpolation in fp64,
// at load) keep a relative error below 3e-6 up to 5, where F is 3e-7, and an absolute one below 1e-8.
#pragma once

#include <cmath>

namespace fastlm {

struct GeluTable {
  static constexpr int kIntervals = 32, kTerms = 6;
  static constexpr double kEnd = 6;
  alignas(64) float coefficient[kTerms][kIntervals];  // of powers of the place within an interval, 0 to 1

  explicit GeluTable(double (*f)(double)) {
    for (int i = 0; i < kIntervals; ++i) fit(f, i);
  }

 private:
  // Newton's form through Chebyshev nodes, multiplied out.
  void fit(double (*f)(double), int i) {
    double node[kTerms], difference[kTerms], power[kTerms]{};
    for (int k = 0; k < kTerms; ++k) {
      node[k] = 0.5 - 0.5 * std::cos(3.14159265358979323846 * (k + 0.5) / kTerms);
      difference[k] = f((i + node[k]) * kEnd / kIntervals);
    }
    for (int order = 1; order < kTerms; ++order)
      for (int k = kTerms - 1; k >= order; --k)
        difference[k] = (difference[k] - difference[k - 1]) / (node[k] - node[k - order]);
    for (int k = kTerms - 1; k >= 0; --k) {
      for (int j = kTerms - 1; j > 0; --j) power[j] = power[j - 1] - node[k] * power[j];
      power[0] = difference[k] - node[k] * power[0];
    }
    for (int k = 0; k < kTerms; ++k) coefficient[k][i] = (float)power[k];
  }
};

// Of F (tanh: false, the exact form) or of the derivative, at -a.
const GeluTable& gelu_table(bool tanh, bool derivative);

}  // namespace fastlm
