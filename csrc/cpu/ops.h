// The CPU module's functions, as the bindings see them. Pointers are void where the element type is a run-time
// DType; Python has checked shapes and allocated every output and workspace. Argument order: inputs, outputs,
// sizes, scalars, types. A null pointer means "absent" where the comment says optional.
#pragma once

#include <utility>

#include "cpu/isa.h"

namespace fastlm {

Isa best_isa();
bool set_isa(Isa wanted);  // false where the CPU lacks it
bool is_intel();  // whether Intel made this CPU
int omp_threads();
void use_huge_pages(void* start, int64_t size);  // a wish; start and size are multiples of 2 MiB

// Elementwise functions of vec.h on float arrays, for the tests of their error bounds.
void vec_map(const char* name, const float* x, float* y, int64_t n);
void dropout_factors(float* out, int64_t M, int64_t N, double p, int64_t seed);

// Rows handled by one partial sum of the weight gradients: a function of M alone, so that the result does not
// depend on the number of threads. Workspaces hold ceil_div(M, chunk_rows(M)) partial rows.
int64_t chunk_rows(int64_t M);

// x: (M, N) TX. residual: (M, N) TR, optional. z: (M, N) TR = residual + dropout(x), with residual only.
// w, b: (N), optional. y: (M, N) TY. mean, rstd: (M) fp32, or fp64 where TR is, optional together.
void layer_norm_fwd(const void* x, const void* residual, const void* w, const void* b, void* z, void* y, void* mean,
                    void* rstd, int64_t M, int64_t N, double eps, double p, int64_t seed, int x_type, int r_type,
                    int y_type, int w_type);
// dy: (M, N) TY. z: (M, N) TR, what was normalized. dz_in: (M, N) TR, optional: added to dz.
// dz: (M, N) TR. dx: (M, N) TX = dropout mask * dz, optional. partial: (chunks, 2, N) compute type, and
// dw, db: (N) compute type, optional together (partial is not).
void layer_norm_bwd(const void* dy, const void* z, const void* w, const void* mean, const void* rstd,
                    const void* dz_in, void* dz, void* dx, void* partial, void* dw, void* db, int64_t M, int64_t N,
                    double p, int64_t seed, int x_type, int r_type, int y_type, int w_type);

// x, y: (M, N) T. bias: (N) of b_type, optional. y = dropout(gelu(x + bias)).
void gelu_fwd(const void* x, const void* bias, void* y, int64_t M, int64_t N, bool tanh, double p, int64_t seed,
              int type, int b_type);
// dx: (M, N) T. partial: (chunks, N) and db: (N), compute type, optional together.
void gelu_bwd(const void* dy, const void* x, const void* bias, void* dx, void* partial, void* db, int64_t M, int64_t N,
              bool tanh, double p, int64_t seed, int type, int b_type);

// Attention; attention.h says what the arguments are.
struct AttentionArgs;
void attention_fwd(const AttentionArgs& args);
void attention_bwd(const AttentionArgs& args);
// Cross-entropy over logits x: (M, N) T, target: (M) int64, class weights w: (N) of w_type, optional.
// (row of the first target outside [0, N) that is not ignore_index, or -1; sum of the other targets' weights.)
std::pair<int64_t, double> cross_entropy_targets(const void* target, const void* w, int64_t M, int64_t N,
                                                 int64_t ignore_index, int w_type);
double cross_entropy_total(const void* loss, int64_t M, int type);  // sum of (M) compute type, in order
// loss: (M) and stats: (M, 3), compute type. dx: (M, N) T, optional: the gradient of scale * sum(loss).
void cross_entropy_fwd(const void* x, const void* target, const void* w, void* loss, void* stats, void* dx, int64_t M,
                       int64_t N, int64_t ignore_index, double smoothing, double scale, int type, int w_type);
// The same in windows of columns: x: (M, n) holds columns first .. first + n of N. Windows come in order from 0 and
// begin at multiples of 2048. states: (M, 5) compute type, written by the first update and changed by the others.
void cross_entropy_update(const void* x, const void* target, const void* w, void* states, int64_t M, int64_t n,
                          int64_t first, int64_t N, int64_t ignore_index, double smoothing, int type, int w_type);
void cross_entropy_finish(const void* states, const void* target, const void* w, void* loss, void* stats, int64_t M,
                          int64_t N, int64_t ignore_index, double smoothing, int type, int w_type);
// dx: (M, n) T, may be x itself. g: (M) compute type, one factor a row, or null for `scale`.
void cross_entropy_bwd(const void* x, const void* target, const void* w, const void* stats, const void* g, void* dx,
                       int64_t M, int64_t n, int64_t first, int64_t N, int64_t ignore_index, double smoothing,
                       double scale, int type, int w_type);

// x: (M, N) TX. residual: (M, N) TR, optional. z: (M, N) TR = residual + x, with residual only. w: (N), optional.
// y: (M, N) TY. rstd: (M) fp32, or fp64 where TR is, optional.
void rms_norm_fwd(const void* x, const void* residual, const void* w, void* z, void* y, void* rstd, int64_t M,
                  int64_t N, double eps, int x_type, int r_type, int y_type, int w_type);
// dy: (M, N) TY. z: (M, N) TR, what was normalized. dz_in: (M, N) TR, optional: added to dz. dz: (M, N) TR.
// dx: (M, N) TX = dz, optional. partial: (chunks, N) and dw: (N), compute type, optional together.
void rms_norm_bwd(const void* dy, const void* z, const void* w, const void* rstd, const void* dz_in, void* dz,
                  void* dx, void* partial, void* dw, int64_t M, int64_t N, int x_type, int r_type, int y_type,
                  int w_type);

// gate, up: M rows of N elements of T, a stride apart. y: (M, N) T = silu(gate) up.
void swiglu_fwd(const void* gate, const void* up, void* y, int64_t M, int64_t N, int64_t gate_stride,
                int64_t up_stride, int type);
// dy, dgate, dup: (M, N) T.
void swiglu_bwd(const void* dy, const void* gate, const void* up, void* dgate, void* dup, int64_t M, int64_t N,
                int64_t gate_stride, int64_t up_stride, int type);

// x, y: size (B, H, L, D) of T with strides of the first three. cos, sin: (L, R) compute type, a table_stride apart
// for each of B (0 for one table). 2 R <= D. y may not be x.
void rotary(const void* x, const void* cos, const void* sin, void* y, const int64_t* size, const int64_t* x_stride,
            const int64_t* y_stride, int64_t R, int64_t table_stride, bool interleaved, bool inverse, int type);

// C (M, N) = A (M, K) B (K, N) (+ bias (N)) (+ C). A and B are fp32 or bf16, or the transposes of what is stored; C has
// their type, or is fp32 if `wide`. `a_row` and so on: elements from one stored row to the next. No size is 0.
struct Gemm {
  const void *a, *b;
  const float* bias;  // optional
  void* c;
  int64_t M, N, K, a_row, b_row, c_row;
  bool a_transposed, b_transposed, wide, add;  // add: to C, which is wide
};
void gemm(const Gemm& product, int type);
bool gemm_serves(int type);  // whether the instruction set in force has it

// A parameter of an AdamW step. type: of param, exp_avg and exp_avg_sq, fp32 or bf16. grad: n of grad_type, fp32 or
// bf16. copy: n bf16, optional, with fp32 parameters only: receives the new values rounded.
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

// Linear layers of 1 to 8 rows. x: (M, K). w: (N, K) of w_type. bias: (N), optional. y: (M, N). x and y have w's type
// or its compute type.
void linear_fwd(const void* x, const void* w, const void* bias, void* y, int64_t M, int64_t N, int64_t K, int x_type,
                int w_type, int b_type, int y_type);
// The same with a weight of 8 bits and scale: (N) fp32 where group is 0, else of 4 bits in groups and scale:
// (N, padded_K / group) bf16; quantized_linear.cpp has the layouts. bias: (N) fp32, optional. x and y are not f64.
void quantized_linear_fwd(const void* x, const void* w, const void* scale, const float* bias, void* y, int64_t M,
                          int64_t N, int64_t K, int64_t padded_K, int64_t group, int x_type, int y_type);
// out: (N, K) of type, the weight that is meant.
void dequantize(const void* w, const void* scale, void* out, int64_t N, int64_t K, int64_t padded_K, int64_t group,
                int type);

}  // namespace fastlm
