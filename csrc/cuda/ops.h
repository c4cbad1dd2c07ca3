// The kernels' launchers: plain C++, for bindings_cuda.cpp. Pointers are to device memory, sizes are in elements,
// types are the codes of fastlm/backends/cpu, and a null pointer stands for an absent tensor. A launcher returns as soon
// as its kernels are queued on the stream, and throws std::runtime_error where CUDA refuses one.
#pragma once

#include <cstdint>

namespace fastlm::cuda {

// One of the streams of a device, which the caller has made current and whose memory is pointed at.
struct Stream {
  int device;
  void* handle;
};

// Dropout's seed: a number, or the address on the device of one that a CUDA graph draws anew at each replay.
struct Seed {
  int64_t value;
  bool on_device;
};

// LayerNorm and RMSNorm of M rows of N. The residual stream, x or residual, is of r_type; x and y are too, or 16 bits wide
// beside fp32; statistics and sums are fp32.
struct NormArgs {
  Stream on;
  // Forward: z = residual + dropout(x) is stored with a residual; y = (z - mean) rstd w + b. RMSNorm has no mean, b and
  // dropout.
  const void *x, *residual, *w, *b;  // w, b: (N) of w_type
  void *z, *y;
  void *mean, *rstd;  // (M); may be null in forward
  // Backward: dz = gradient of z + dz_in; dx = dropout(dz) in x_type or null.
  const void *dy, *dz_in;
  void *dz, *dx;
  void *partial, *sums;  // dw and db: (norm_partials, 2, N) and (2, N), or RMSNorm's (norm_partials, N) and (N); or null
  void* rows;            // (M, 2), a workspace
  int64_t M, N;
  double eps, dropout_p;
  Seed seed;
  int x_type, r_type, y_type, w_type;
};
void layer_norm_fwd(const NormArgs& args);
void layer_norm_bwd(const NormArgs& args);
void rms_norm_fwd(const NormArgs& args);
void rms_norm_bwd(const NormArgs& args);
// How many partial sums a backward pass may write.
int64_t norm_partials(int device, int64_t M, int64_t N);

// y = dropout(gelu(x + bias)) of M rows of N.
struct GeluArgs {
  Stream on;
  const void *x, *bias;  // bias: (N) or null
  void* y;
  const void* dy;
  void* dx;
  void *partial, *db;  // (gelu_partials, N) and (N) fp32, or null without a bias
  int64_t M, N;
  bool tanh;
  double dropout_p;
  Seed seed;
  int type, bias_type;
};
void gelu_fwd(const GeluArgs& args);
void gelu_bwd(const GeluArgs& args);
int64_t gelu_partials(int device, int64_t M, int64_t N);

// partial (P, K) fp32 -> out (K), added in the order of P.
void sum_partials(Stream, const void* partial, void* out, int64_t P, int64_t K);

// 130 for CUDA 13.0: the toolkit of the build, and the newest that the driver serves (0 without a driver).
int toolkit_version();
int driver_version();

}  // namespace fastlm::cuda
