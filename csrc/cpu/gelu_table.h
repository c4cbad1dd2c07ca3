// GELU's curves as piecewise polynomials. Ordinary header.
//
// Both forms are x F(x), and F and the derivative of x F(x) are 1 minus their own mirror image; so the left half
// serves: x F(x) = max(x, 0) - |x| F(-|x|). F(-a) decays: beyond 6 it is below 1e-8 and counts as 0. Chebyshev
// interpolation in fp64, at load:
// - For CPUs that look 32 values up in one instruction, in 32 intervals: degree 5 keeps a relative error of F below
//   3e-6 up to 5, where F is 3e-7, and an absolute one below 1e-8; degree 3, for results of 16 bits, 3e-4 and 1e-6.
// - For the others, which look up in memory, in 1024 intervals: degree 2 is more exact than degree 5 above.
#pragma once

#include <cmath>

namespace fastlm {

constexpr int kGeluIntervals = 32, kGeluFineIntervals = 1024;
constexpr double kGeluEnd = 6;

// Of powers of the place within an interval, 0 to 1, for factor * f in interval i. Newton's form through Chebyshev
// nodes, multiplied out.
template <int TERMS>
void gelu_fit(double (*f)(double), double factor, double width, int i, double* power) {
  double node[TERMS], difference[TERMS];
  for (int k = 0; k < TERMS; ++k) {
    node[k] = 0.5 - 0.5 * std::cos(3.14159265358979323846 * (k + 0.5) / TERMS);
    difference[k] = factor * f((i + node[k]) * width);
    power[k] = 0;
  }
  for (int order = 1; order < TERMS; ++order)
    for (int k = TERMS - 1; k >= order; --k)
      difference[k] = (difference[k] - difference[k - 1]) / (node[k] - node[k - order]);
  for (int k = TERMS - 1; k >= 0; --k) {
    for (int j = TERMS - 1; j > 0; --j) power[j] = power[j - 1] - node[k] * power[j];
    power[0] = difference[k] - node[k] * power[0];
  }
}

template <int TERMS>
struct GeluTable {
  static constexpr double kWidth = kGeluEnd / kGeluIntervals;
  alignas(64) float coefficient[TERMS][kGeluIntervals];

  GeluTable(double (*f)(double), bool per_place) {
    for (int i = 0; i < kGeluIntervals; ++i) {
      double power[TERMS];
      gelu_fit<TERMS>(f, per_place ? kWidth : 1, kWidth, i, power);
      for (int k = 0; k < TERMS; ++k) coefficient[k][i] = (float)power[k];
    }
  }
};

struct GeluFineTable {
  static constexpr double kWidth = kGeluEnd / kGeluFineIntervals;
  alignas(64) float coefficient[kGeluFineIntervals + 1][4] = {};  // the fourth is padding, the last interval 0

  GeluFineTable(double (*f)(double), bool per_place) {
    for (int i = 0; i < kGeluFineIntervals; ++i) {
      double power[3];
      gelu_fit<3>(f, per_place ? kWidth : 1, kWidth, i, power);
      for (int k = 0; k < 3; ++k) coefficient[i][k] = (float)power[k];
    }
  }
};

// GeluTable<4>, GeluTable<6> or GeluFineTable. At -a: F in units of an interval's inverse width, for the product with a
// in such units, or the derivative as it is.
template <class Table>
const Table& gelu_table(bool tanh, bool derivative);

}  // namespace fastlm
