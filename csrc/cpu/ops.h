// The CPU module's functions, as the bindings see them. Pointers are void where the element type is a run-time
// DType; Python has checked shapes and allocated every output and workspace. Argument order: inputs, outputs,
// sizes, scalars, types. A null pointer means "absent" where the comment says optional.
#pragma once

#include "cpu/isa.h"

namespace fastlm {

Isa best_isa();
bool set_isa(Isa wanted);  // false where the CPU lacks it
int omp_threads();

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
// dw, db: (N) compute type, optional together.
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

}  // namespace fastlm
