// The CPU module's functions and their arguments, as the bindings fill them in. Pointers are void where the element type
// is a run-time DType; Python has checked shapes and allocated every output and workspace. A null pointer means "absent"
// where the comment says optional. A type that no kernel serves throws std::invalid_argument.
#pragma once

#include <array>
#include <utility>

#include "cpu/isa.h"

namespace fastlm {

Isa best_isa();
bool set_isa(Isa wanted);  // false where the CPU lacks it
bool is_intel();           // whether Intel made this CPU

// Elementwise functions of vec.h on float arrays, for the tests of their error bounds.
void vec_map(const char* name, const float* x, float* y, int64_t n);
void dropout_factors(float* out, int64_t M, int64_t N, double p, int64_t seed);

// LayerNorm and RMSNorm of M rows of N. TX, TR and TY are x_type, r_type and y_type; the compute type is fp64 where TR
// is, else fp32.
struct NormArgs {
  // Forward: z = residual + dropout(x), with residual only; y = (z - mean) rstd w + b. RMSNorm has no mean, b and dropout.
  const void *x, *residual;  // TX; TR, optional
  const void *w, *b;         // (N) of w_type, optional
  void *z, *y;               // TR; TY
  void *mean, *rstd;         // (M) compute type, optional in forward
  // Backward: dz = gradient of z + dz_in, dx = dropout mask * dz.
  const void* dy;     // TY
  const void* dz_in;  // TR, optional
  void *dz, *dx;      // TR; TX, optional
  void* partial;      // (chunks, 2, N) or RMSNorm's (chunks, N), compute type
  void *dw, *db;      // (N) compute type, optional together
  int64_t M, N;
  double eps, dropout_p;
  int64_t seed;
  int x_type, r_type, y_type, w_type;
};
void layer_norm_fwd(const NormArgs& args);
void layer_norm_bwd(const NormArgs& args);
void rms_norm_fwd(const NormArgs& args);
void rms_norm_bwd(const NormArgs& args);

// y = dropout(gelu(x + bias)) of M rows of N.
struct GeluArgs {
  const void *x, *bias;  // (M, N); (N) of bias_type, optional
  void* y;
  const void* dy;
  void* dx;
  void *partial, *db;  // (chunks, N) and (N), compute type, optional together
  int64_t M, N;
  bool tanh;
  double dropout_p;
  int64_t seed;
  int type, bias_type;
};
void gelu_fwd(const GeluArgs& args);
void gelu_bwd(const GeluArgs& args);

// Attention; attention.h says what the arguments are.
struct AttentionArgs;
void attention_fwd(const AttentionArgs& args);
void attention_bwd(const AttentionArgs& args);

// Cross-entropy over logits, or over a window of their columns. Windows come in order from 0 and begin at multiples of
// 2048.
struct CrossEntropyArgs {
  const void* x;          // (M, n): columns first to first + n of N
  const int64_t* target;  // (M)
  const void* w;          // (N) class weights of w_type, optional
  void *loss, *stats;     // (M) and (M, 3), compute type
  void* states;           // (M, 5) compute type: written by the first update and changed by the others
  void* dx;               // (M, n), may be x itself; optional in forward, which makes the gradient of scale * sum(loss)
  const void* g;          // (M) compute type, one factor a row, or null for `scale`
  int64_t M, n, first, N, ignore_index;
  double smoothing, scale;
  int type, w_type;
};
void cross_entropy_fwd(const CrossEntropyArgs& args);     // n is N
void cross_entropy_update(const CrossEntropyArgs& args);  // folds a window into states
void cross_entropy_finish(const CrossEntropyArgs& args);  // states to loss and stats; there is no x
void cross_entropy_bwd(const CrossEntropyArgs& args);
// (row of the first target outside [0, N) that is not ignore_index, or -1; sum of the other targets' weights.)
std::pair<int64_t, double> cross_entropy_targets(const CrossEntropyArgs& args);
double cross_entropy_total(const void* loss, int64_t M, int type);  // sum of (M) compute type, in order

// y = silu(gate) up, of M rows of N.
struct SwigluArgs {
  const void *gate, *up;  // rows a stride apart
  void* y;                // this and what follows (M, N)
  const void* dy;
  void *dgate, *dup;
  int64_t M, N, gate_stride, up_stride;
  int type;
};
void swiglu_fwd(const SwigluArgs& args);
void swiglu_bwd(const SwigluArgs& args);

struct RotaryArgs {
  const void* x;
  const void *cos, *sin;  // (L, R) compute type, a table_stride apart for each of B (0 for one table)
  void* y;                // may not be x
  std::array<int64_t, 4> size, x_stride, y_stride;  // of (B, H, L, D)
  int64_t R, table_stride;                          // 2 R <= D
  bool interleaved, inverse;
  int type;
};
void rotary(const RotaryArgs& args);

// C (M, N) = A (M, K) B (K, N) (+ bias (N)) (+ C). A and B are fp32 or bf16, or the transposes of what is stored; C has
// their type, or is fp32 if `wide`. `a_row` and so on: elements from one stored row to the next. No size is 0.
struct GemmArgs {
  const void *a, *b;
  const float* bias;  // optional
  void* c;
  int64_t M, N, K, a_row, b_row, c_row;
  bool a_transposed, b_transposed, wide, add;  // add: to C, which is wide
  int type;
};
void gemm(const GemmArgs& args);
bool gemm_serves(int type);  // whether the instruction set in force has it

// A parameter of an AdamW step. type: of param, exp_avg and exp_avg_sq, fp32 or bf16. grad: n of grad_type, fp32 or
// bf16, and bf16 beside bf16. copy: n bf16, optional, with fp32 parameters only: receives the new values rounded.
struct AdamWTensor {
  void* param;
  const void* grad;
  void *exp_avg, *exp_avg_sq, *copy;
  int64_t n;
  int type, grad_type;
  // decay = 1 - lr weight_decay, step_size = lr / (1 - beta1^t), sqrt_factor = 1 / sqrt(1 - beta2^t)
  double grad_scale, decay, beta1, beta2, step_size, sqrt_factor, eps;
};
double gradient_square_sum(const AdamWTensor* tensors, int64_t count);  // of grad, n and grad_type alone
void adamw_update(const AdamWTensor* tensors, int64_t count);

// y = x w^T + bias of 1 to 8 rows.
struct LinearArgs {
  const void *x, *w, *bias;  // (M, K); (N, K); (N) of bias_type, optional
  void* y;                   // (M, N)
  int64_t M, N, K;
  int x_type, w_type, bias_type, y_type;  // x and y have w's type or its compute type
  bool wide_x() const { return x_type != w_type; }
  bool wide_y() const { return y_type != w_type; }
};
void linear_fwd(const LinearArgs& args);

// The same with a weight of 8 bits and scale: (N) fp32 where group is 0, else of 4 bits in groups and scale:
// (N, padded_K / group) bf16; quantized_linear.cpp has the layouts. x and y are not fp64.
struct QuantizedLinearArgs {
  const void *x, *w, *scale;
  const float* bias;  // (N), optional
  void* y;
  int64_t M, N, K, padded_K, group;
  int x_type, y_type;
};
void quantized_linear_fwd(const QuantizedLinearArgs& args);
void dequantize(const QuantizedLinearArgs& args);  // y: (N, K), the weight that is meant; there is no x and no bias

}  // namespace fastlm
