// fastlm._cpu: the CPU kernels behind integer pointers. fastlm/_native.py is its only caller.

#include <pybind11/pybind11.h>

#include "cpu/ops.h"

namespace py = pybind11;
using namespace fastlm;
using ptr = std::uintptr_t;

#define P(name) reinterpret_cast<void*>(name)

PYBIND11_MODULE(_cpu, m, py::mod_gil_not_used()) {
  using nogil = py::call_guard<py::gil_scoped_release>;
  m.def("best_isa", [] { return (int)best_isa(); });
  m.def("isa", [] { return (int)isa(); });
  m.def("set_isa", [](int level) { return set_isa((Isa)level); });
  m.def("omp_threads", &omp_threads);
  m.def("chunk_rows", &chunk_rows);
  m.def("vec_map", [](const char* name, ptr x, ptr y, int64_t n) { vec_map(name, (float*)x, (float*)y, n); });
  m.def("dropout_factors", [](ptr out, int64_t M, int64_t N, double p, int64_t seed) {
    dropout_factors((float*)out, M, N, p, seed);
  });
  m.def("layer_norm_fwd",
        [](ptr x, ptr residual, ptr w, ptr b, ptr z, ptr y, ptr mean, ptr rstd, int64_t M, int64_t N, double eps,
           double p, int64_t seed, int x_type, int r_type, int y_type, int w_type) {
          layer_norm_fwd(P(x), P(residual), P(w), P(b), P(z), P(y), P(mean), P(rstd), M, N, eps, p, seed, x_type,
                         r_type, y_type, w_type);
        },
        nogil());
  m.def("layer_norm_bwd",
        [](ptr dy, ptr z, ptr w, ptr mean, ptr rstd, ptr dz_in, ptr dz, ptr dx, ptr partial, ptr dw, ptr db, int64_t M,
           int64_t N, double p, int64_t seed, int x_type, int r_type, int y_type, int w_type) {
          layer_norm_bwd(P(dy), P(z), P(w), P(mean), P(rstd), P(dz_in), P(dz), P(dx), P(partial), P(dw), P(db), M, N, p,
                         seed, x_type, r_type, y_type, w_type);
        },
        nogil());
  m.def("gelu_fwd",
        [](ptr x, ptr bias, ptr y, int64_t M, int64_t N, bool tanh, double p, int64_t seed, int type, int b_type) {
          gelu_fwd(P(x), P(bias), P(y), M, N, tanh, p, seed, type, b_type);
        },
        nogil());
  m.def("gelu_bwd",
        [](ptr dy, ptr x, ptr bias, ptr dx, ptr partial, ptr db, int64_t M, int64_t N, bool tanh, double p,
           int64_t seed, int type, int b_type) {
          gelu_bwd(P(dy), P(x), P(bias), P(dx), P(partial), P(db), M, N, tanh, p, seed, type, b_type);
        },
        nogil());
}
