// fastlm._cuda: the CUDA kernels behind integer pointers. fastlm/_native_cuda.py is its only caller, with
// the device current.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda/ops.h"

namespace py = pybind11;
using namespace fastlm::cuda;
using ptr = std::uintptr_t;

#define P(name) reinterpret_cast<void*>(name)

#ifndef FASTLM_CUDA_ARCHS  // "80;90a": what the kernels were compiled for
#define FASTLM_CUDA_ARCHS ""
#endif

PYBIND11_MODULE(_cuda, m, py::mod_gil_not_used()) {
  using nogil = py::call_guard<py::gil_scoped_release>;
  m.attr("architectures") = FASTLM_CUDA_ARCHS;
  m.def("toolkit_version", &toolkit_version);
  m.def("driver_version", &driver_version);
  m.def("norm_shares", [](int device, ptr, int64_t M, int64_t N) { return norm_shares(device, M, N); });
  m.def("gelu_shares", [](int device, ptr, int64_t M, int64_t N) { return gelu_shares(device, M, N); });
  m.def("layer_norm_fwd",
        [](int device, ptr stream, ptr x, ptr residual, ptr w, ptr b, ptr z, ptr y, ptr mean, ptr rstd, int64_t M,
           int64_t N, double eps, double p, int64_t seed, int x_type, int r_type, int y_type, int w_type) {
          layer_norm_fwd({device, P(stream)}, P(x), P(residual), P(w), P(b), P(z), P(y), P(mean), P(rstd), M, N, eps, p,
                         seed, x_type, r_type, y_type, w_type);
        },
        nogil());
  m.def("layer_norm_bwd",
        [](int device, ptr stream, ptr dy, ptr z, ptr w, ptr mean, ptr rstd, ptr dz_in, ptr dz, ptr dx, ptr partial,
           ptr sums, ptr rows, int64_t M, int64_t N, double p, int64_t seed, int x_type, int r_type, int y_type,
           int w_type) {
          layer_norm_bwd({device, P(stream)}, P(dy), P(z), P(w), P(mean), P(rstd), P(dz_in), P(dz), P(dx), P(partial),
                         P(sums), P(rows), M, N, p, seed, x_type, r_type, y_type, w_type);
        },
        nogil());
  m.def("rms_norm_fwd",
        [](int device, ptr stream, ptr x, ptr residual, ptr w, ptr z, ptr y, ptr rstd, int64_t M, int64_t N, double eps,
           int x_type, int r_type, int y_type, int w_type) {
          rms_norm_fwd({device, P(stream)}, P(x), P(residual), P(w), P(z), P(y), P(rstd), M, N, eps, x_type, r_type,
                       y_type, w_type);
        },
        nogil());
  m.def("rms_norm_bwd",
        [](int device, ptr stream, ptr dy, ptr z, ptr w, ptr rstd, ptr dz_in, ptr dz, ptr dx, ptr partial, ptr sums,
           ptr rows, int64_t M, int64_t N, int x_type, int r_type, int y_type, int w_type) {
          rms_norm_bwd({device, P(stream)}, P(dy), P(z), P(w), P(rstd), P(dz_in), P(dz), P(dx), P(partial), P(sums),
                       P(rows), M, N, x_type, r_type, y_type, w_type);
        },
        nogil());
  m.def("gelu_fwd",
        [](int device, ptr stream, ptr x, ptr bias, ptr y, int64_t M, int64_t N, bool tanh, double p, int64_t seed,
           int type, int b_type) {
          gelu_fwd({device, P(stream)}, P(x), P(bias), P(y), M, N, tanh, p, seed, type, b_type);
        },
        nogil());
  m.def("gelu_bwd",
        [](int device, ptr stream, ptr dy, ptr x, ptr bias, ptr dx, ptr partial, ptr db, int64_t M, int64_t N,
           bool tanh, double p, int64_t seed, int type, int b_type) {
          gelu_bwd({device, P(stream)}, P(dy), P(x), P(bias), P(dx), P(partial), P(db), M, N, tanh, p, seed, type,
                   b_type);
        },
        nogil());
}
