// fastlm._cpu: the CPU kernels behind integer pointers. fastlm/backends/cpu is its only caller.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/attention.h"
#include "cpu/decode.h"
#include "cpu/ops.h"

namespace py = pybind11;
using namespace fastlm;
using ptr = std::uintptr_t;

#define P(name) reinterpret_cast<void*>(name)

namespace {

// A (B, H, T, D) tensor as (address, strides).
Heads heads(ptr data, const py::tuple& strides) {
  return {P(data), strides[0].cast<int64_t>(), strides[1].cast<int64_t>(), strides[2].cast<int64_t>()};
}

Mask mask_of(ptr data, const py::tuple& strides, int type) {
  if (!data) return {};
  return {P(data), strides[0].cast<int64_t>(), strides[1].cast<int64_t>(), strides[2].cast<int64_t>(),
          strides[3].cast<int64_t>(), type};
}

// What both directions of attention share; sizes are (B, H, Hkv, T, S, D, Dv). A side of the window below 0 is open.
AttentionArgs attention_args(const Heads& q, const Heads& k, const Heads& v, const Mask& mask, const Heads& out,
                             ptr lse, ptr rest, ptr cu_q, ptr cu_k, const py::tuple& sizes, double scale, double p, int64_t seed,
                             int64_t left, int64_t right, double softcap, int type) {
  AttentionArgs a{};
  a.q = q, a.k = k, a.v = v, a.mask = mask, a.out = out, a.lse = P(lse), a.rest = P(rest);
  a.cu_q = (const int32_t*)cu_q, a.cu_k = (const int32_t*)cu_k;
  int64_t* const size[] = {&a.B, &a.H, &a.Hkv, &a.T, &a.S, &a.D, &a.Dv};
  for (size_t i = 0; i < 7; ++i) *size[i] = sizes[i].cast<int64_t>();
  a.row_stride = a.T;
  a.left = left < 0 ? kUnlimited : std::min(left, kUnlimited);
  a.right = right < 0 ? kUnlimited : std::min(right, kUnlimited);
  a.scale = scale, a.dropout_p = p, a.seed = seed, a.softcap = softcap, a.type = type;
  return a;
}

// (grad address, elements, grad type), one a tensor.
using GradRow = std::array<int64_t, 3>;
// (param, grad, exp_avg, exp_avg_sq and copy addresses, elements, type, grad type) and
// (grad_scale, decay, beta1, beta2, step_size, sqrt_factor, eps).
using AdamWRow = std::pair<std::array<int64_t, 8>, std::array<double, 7>>;

double square_sum_of(const std::vector<GradRow>& rows) {
  std::vector<AdamWTensor> tensors;
  for (const auto& [grad, n, type] : rows) {
    tensors.emplace_back();
    tensors.back().grad = P(grad), tensors.back().n = n, tensors.back().grad_type = (int)type;
  }
  return gradient_square_sum(tensors.data(), (int64_t)tensors.size());
}

void adamw_update_of(const std::vector<AdamWRow>& rows) {
  std::vector<AdamWTensor> tensors;
  for (const auto& [at, of] : rows)
    tensors.push_back({P(at[0]), P(at[1]), P(at[2]), P(at[3]), P(at[4]), at[5], (int)at[6], (int)at[7], of[0], of[1],
                       of[2], of[3], of[4], of[5], of[6]});
  adamw_update(tensors.data(), (int64_t)tensors.size());
}

}  // namespace

PYBIND11_MODULE(_cpu, m, py::mod_gil_not_used()) {
  using nogil = py::call_guard<py::gil_scoped_release>;
  m.def("best_isa", [] { return (int)best_isa(); });
  m.def("isa", [] { return (int)isa(); });
  m.def("set_isa", [](int level) { return set_isa((Isa)level); });
  m.def("is_intel", &is_intel);
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
  // The same without residual, dropout, statistics and mixed dtypes: half the arguments take half the time to convert.
  m.def("layer_norm",
        [](ptr x, ptr w, ptr b, ptr y, int64_t M, int64_t N, double eps, int type) {
          layer_norm_fwd(P(x), nullptr, P(w), P(b), nullptr, P(y), nullptr, nullptr, M, N, eps, 0.0, 0, type, type, type,
                         type);
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
  m.def("attention_fwd", [](ptr q, const py::tuple& qs, ptr k, const py::tuple& ks, ptr v, const py::tuple& vs, ptr mask,
                            const py::tuple& ms, int mask_type, ptr out, const py::tuple& os, ptr lse, ptr rest,
                            ptr cu_q, ptr cu_k, const py::tuple& sizes, double scale, double p, int64_t seed,
                            int64_t left, int64_t right, double softcap, int type) {
    const AttentionArgs a =
        attention_args(heads(q, qs), heads(k, ks), heads(v, vs), mask_of(mask, ms, mask_type), heads(out, os), lse,
                       rest, cu_q, cu_k, sizes, scale, p, seed, left, right, softcap, type);
    const py::gil_scoped_release nogil_here;
    attention_fwd(a);
  });
  m.def("attention_plain_fwd", [](ptr q, const py::tuple& qs, ptr k, const py::tuple& ks, ptr v, const py::tuple& vs,
                                  ptr out, int64_t B, int64_t H, int64_t T, int64_t S, int64_t D, double scale,
                                  bool causal, int type) {
    AttentionArgs a{};
    a.q = heads(q, qs), a.k = heads(k, ks), a.v = heads(v, vs), a.out = {P(out), T * H * D, D, H * D};
    a.B = B, a.H = a.Hkv = H, a.T = a.row_stride = T, a.S = S, a.D = a.Dv = D;
    a.scale = scale, a.type = type;
    if (causal) a.right = 0;
    const py::gil_scoped_release nogil_here;
    attention_fwd(a);
  });
  m.def("attention_bwd", [](ptr q, const py::tuple& qs, ptr k, const py::tuple& ks, ptr v, const py::tuple& vs, ptr mask,
                            const py::tuple& ms, int mask_type, ptr out, const py::tuple& os, ptr lse, ptr rest,
                            ptr cu_q, ptr cu_k, ptr dout, const py::tuple& dos, ptr dlse, ptr dq,
                            const py::tuple& dqs, ptr dk, const py::tuple& dks, ptr dv, const py::tuple& dvs, ptr dmask,
                            const py::tuple& dmask_sizes, const py::tuple& sizes, double scale, double p, int64_t seed,
                            int64_t left, int64_t right, double softcap, int type) {
    AttentionArgs a =
        attention_args(heads(q, qs), heads(k, ks), heads(v, vs), mask_of(mask, ms, mask_type), heads(out, os), lse,
                       rest, cu_q, cu_k, sizes, scale, p, seed, left, right, softcap, type);
    a.dout = heads(dout, dos), a.dlse = P(dlse);
    a.inputs = dqs.size() > 0;
    if (a.inputs) a.dq = heads(dq, dqs), a.dk = heads(dk, dks), a.dv = heads(dv, dvs);
    a.dmask.data = P(dmask);
    for (size_t i = 0; dmask && i < 4; ++i) a.dmask_sizes[i] = dmask_sizes[i].cast<int64_t>();
    const py::gil_scoped_release nogil_here;
    attention_bwd(a);
  });
  m.def("cross_entropy_targets", [](ptr target, ptr w, int64_t M, int64_t N, int64_t ignore_index, int w_type) {
    return cross_entropy_targets(P(target), P(w), M, N, ignore_index, w_type);
  });
  m.def("cross_entropy_total", [](ptr loss, int64_t M, int type) { return cross_entropy_total(P(loss), M, type); });
  m.def("cross_entropy_fwd",
        [](ptr x, ptr target, ptr w, ptr loss, ptr stats, ptr dx, int64_t M, int64_t N, int64_t ignore_index,
           double smoothing, double scale, int type, int w_type) {
          cross_entropy_fwd(P(x), P(target), P(w), P(loss), P(stats), P(dx), M, N, ignore_index, smoothing, scale, type,
                            w_type);
        },
        nogil());
  m.def("cross_entropy_update",
        [](ptr x, ptr target, ptr w, ptr states, int64_t M, int64_t n, int64_t first, int64_t N, int64_t ignore_index,
           double smoothing, int type, int w_type) {
          cross_entropy_update(P(x), P(target), P(w), P(states), M, n, first, N, ignore_index, smoothing, type, w_type);
        },
        nogil());
  m.def("cross_entropy_finish",
        [](ptr states, ptr target, ptr w, ptr loss, ptr stats, int64_t M, int64_t N, int64_t ignore_index,
           double smoothing, int type, int w_type) {
          cross_entropy_finish(P(states), P(target), P(w), P(loss), P(stats), M, N, ignore_index, smoothing, type,
                               w_type);
        },
        nogil());
  m.def("cross_entropy_bwd",
        [](ptr x, ptr target, ptr w, ptr stats, ptr g, ptr dx, int64_t M, int64_t n, int64_t first, int64_t N,
           int64_t ignore_index, double smoothing, double scale, int type, int w_type) {
          cross_entropy_bwd(P(x), P(target), P(w), P(stats), P(g), P(dx), M, n, first, N, ignore_index, smoothing,
                            scale, type, w_type);
        },
        nogil());
  m.def("rms_norm_fwd",
        [](ptr x, ptr residual, ptr w, ptr z, ptr y, ptr rstd, int64_t M, int64_t N, double eps, int x_type, int r_type,
           int y_type, int w_type) {
          rms_norm_fwd(P(x), P(residual), P(w), P(z), P(y), P(rstd), M, N, eps, x_type, r_type, y_type, w_type);
        },
        nogil());
  m.def("rms_norm_bwd",
        [](ptr dy, ptr z, ptr w, ptr rstd, ptr dz_in, ptr dz, ptr dx, ptr partial, ptr dw, int64_t M, int64_t N,
           int x_type, int r_type, int y_type, int w_type) {
          rms_norm_bwd(P(dy), P(z), P(w), P(rstd), P(dz_in), P(dz), P(dx), P(partial), P(dw), M, N, x_type, r_type,
                       y_type, w_type);
        },
        nogil());
  m.def("swiglu_fwd",
        [](ptr gate, ptr up, ptr y, int64_t M, int64_t N, int64_t gate_stride, int64_t up_stride, int type) {
          swiglu_fwd(P(gate), P(up), P(y), M, N, gate_stride, up_stride, type);
        },
        nogil());
  m.def("swiglu_bwd",
        [](ptr dy, ptr gate, ptr up, ptr dgate, ptr dup, int64_t M, int64_t N, int64_t gate_stride, int64_t up_stride,
           int type) { swiglu_bwd(P(dy), P(gate), P(up), P(dgate), P(dup), M, N, gate_stride, up_stride, type); },
        nogil());
  using Four = std::array<int64_t, 4>;
  m.def("rotary",
        [](ptr x, ptr cos, ptr sin, ptr y, Four size, Four x_stride, Four y_stride, int64_t R, int64_t table_stride,
           bool interleaved, bool inverse, int type) {
          rotary(P(x), P(cos), P(sin), P(y), size.data(), x_stride.data(), y_stride.data(), R, table_stride,
                 interleaved, inverse, type);
        },
        nogil());
  m.def("gemm_serves", &gemm_serves);
  m.def("gemm",
        [](ptr a, ptr b, ptr bias, ptr c, std::array<int64_t, 3> size, std::array<int64_t, 3> row, bool a_transposed,
           bool b_transposed, bool wide, bool add, int type) {
          gemm({P(a), P(b), (const float*)bias, P(c), size[0], size[1], size[2], row[0], row[1], row[2], a_transposed,
                b_transposed, wide, add},
               type);
        },
        nogil());
  m.def("gradient_square_sum", &square_sum_of, nogil());
  m.def("adamw_update", &adamw_update_of, nogil());
  m.def("linear_fwd",
        [](ptr x, ptr w, ptr bias, ptr y, int64_t M, int64_t N, int64_t K, int x_type, int w_type, int b_type,
           int y_type) { linear_fwd(P(x), P(w), P(bias), P(y), M, N, K, x_type, w_type, b_type, y_type); },
        nogil());
  m.def("quantized_linear_fwd",
        [](ptr x, ptr w, ptr scale, ptr bias, ptr y, int64_t M, int64_t N, int64_t K, int64_t padded_K, int64_t group,
           int x_type, int y_type) {
          quantized_linear_fwd(P(x), P(w), P(scale), (const float*)bias, P(y), M, N, K, padded_K, group, x_type,
                               y_type);
        },
        nogil());
  m.def("dequantize",
        [](ptr w, ptr scale, ptr out, int64_t N, int64_t K, int64_t padded_K, int64_t group, int type) {
          dequantize(P(w), P(scale), P(out), N, K, padded_K, group, type);
        },
        nogil());
  m.def("use_huge_pages", [](ptr start, int64_t size) { use_huge_pages(P(start), size); });
  m.def("decode_step",
        [](ptr model, int64_t position, double eps) {
          decode_step(*static_cast<const DecodeModel*>(P(model)), position, eps);
        },
        nogil());
}
