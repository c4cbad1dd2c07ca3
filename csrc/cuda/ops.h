// The kernels' launchers: plain C++, for bindings_cuda.cpp. Pointers are to device memory, sizes are in elements,
// types are the codes of fastlm/backends/cpu, and a null pointer stands for an absent tensor. A launcher returns as soon
// as its kernels are queued on the stream, and throws std::runtime_error where CUDA refuses one.
#pragma once

#include <cstdint>

namespace fastlm::cuda {

// The device whose memory is pointed at, which the caller has made current, and one of its streams.
struct Place {
  int device;
  void* stream;
};

// Dropout's seed: a number, or the address on the device of one that a CUDA graph draws anew at each replay.
struct Seed {
  int64_t value;
  bool on_device;
};

// x, residual, y (M, N); z = residual + dropout(x) is stored with a residual; w, b (N) share a type; mean and rstd
// (M) fp32 may be null. The stream, x or residual, is of r_type; x and y are too, or 16 bits wide beside fp32.
void layer_norm_fwd(Place, const void* x, const void* residual, const void* w, const void* b, void* z, void* y,
                    void* mean, void* rstd, int64_t M, int64_t N, double eps, double p, Seed seed, int x_type,
                    int r_type, int y_type, int w_type);
// dz = gradient of what was normalized + dz_in; dx = dropout(dz) in x_type or null; partial (norm_shares, 2, N) and
// sums (2, N) fp32 or null: dw and db; rows (M, 2) fp32 is a workspace.
void layer_norm_bwd(Place, const void* dy, const void* z, const void* w, const void* mean, const void* rstd,
                    const void* dz_in, void* dz, void* dx, void* partial, void* sums, void* rows, int64_t M, int64_t N,
                    double p, Seed seed, int x_type, int r_type, int y_type, int w_type);
void rms_norm_fwd(Place, const void* x, const void* residual, const void* w, void* z, void* y, void* rstd, int64_t M,
                  int64_t N, double eps, int x_type, int r_type, int y_type, int w_type);
// partial (norm_shares, N), sums (N).
void rms_norm_bwd(Place, const void* dy, const void* z, const void* w, const void* rstd, const void* dz_in, void* dz,
                  void* dx, void* partial, void* sums, void* rows, int64_t M, int64_t N, int x_type, int r_type,
                  int y_type, int w_type);
// How many partial sums a backward pass may write.
int64_t norm_shares(int device, int64_t M, int64_t N);

// y = dropout(gelu(x + bias)); bias (N) or null.
void gelu_fwd(Place, const void* x, const void* bias, void* y, int64_t M, int64_t N, bool tanh, double p, Seed seed,
              int type, int bias_type);
// partial (gelu_shares, N) and db (N) fp32, or null without a bias.
void gelu_bwd(Place, const void* dy, const void* x, const void* bias, void* dx, void* partial, void* db, int64_t M,
              int64_t N, bool tanh, double p, Seed seed, int type, int bias_type);
int64_t gelu_shares(int device, int64_t M, int64_t N);

// partial (P, K) fp32 -> out (K), added in the order of P.
void sum_partials(Place, const void* partial, void* out, int64_t P, int64_t K);

// 130 for CUDA 13.0: the toolkit of the build, and the newest that the driver serves (0 without a driver).
int toolkit_version();
int driver_version();

}  // namespace fastlm::cuda
