// GELU's curves as piecewise polynomials, for CPUs that look 32 values up in one instruction. Ordinary header.
//
// Both forms are x F(x), and F and the derivative of x F(x) are 1 minus their own mirror image; so the left half serves:
// x F(x) = max(x, 0) - |x| F(-|x|). F(-a) decays: beyond 6 it is below 1e-8 and counts as 0. Chebyshev interpolation in
// fp64, at load, in 32 intervals: degree 5 keeps a relative error of F below 3e-6 up to 5, where F is 3e-7, and an
// absolute one below 1e-8; degree 3, for results of 16 bits, 3e-4 and 1e-6.
#pragma once

#include <cmath>

namespace fastlm {

constexpr int kGeluIntervals = 32;
constexpr double kGeluEnd = 6, kGeluWidth = kGeluEnd / kGeluIntervals;

template <int TERMS>
struct GeluTable {
  alignas(64) float coefficient[TERMS][kGeluIntervals];  // of powers of the place within an interval, 0 to 1

  // Of factor * f.
  GeluTable(double (*f)(double), double factor) {
    for (int i = 0; i < kGeluIntervals; ++i) fit(f, factor, i);
  }

 private:
  // Newton's form through Chebyshev nodes, multiplied out.
  void fit(double (*f)(double), double factor, int i) {
    double node[TERMS], difference[TERMS], power[TERMS]{};
    for (int k = 0; k < TERMS; ++k) {
      node[k] = 0.5 - 0.5 * std::cos(3.14159265358979323846 * (k + 0.5) / TERMS);
      difference[k] = factor * f((i + node[k]) * kGeluWidth);
    }
    for (int order = 1; order < TERMS; ++order)
      for (int k = TERMS - 1; k >= order; --k)
        difference[k] = (difference[k] - difference[k - 1]) / (node[k] - node[k - order]);
    for (int k = TERMS - 1; k >= 0; --k) {
      for (int j = TERMS - 1; j > 0; --j) power[j] = power[j - 1] - node[k] * power[j];
      power[0] = difference[k] - node[k] * power[0];
    }
    for (int k = 0; k < TERMS; ++k) coefficient[k][i] = (float)power[k];
  }
};

// At -a: F in units of an interval's inverse width, for the product with a in such units, or the derivative as it is.
template <int TERMS>
const GeluTable<TERMS>& gelu_table(bool tanh, bool derivative);

}  // namespace fastlm
