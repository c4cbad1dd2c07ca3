// fastlm._cpu: the CPU kernels behind integer pointers. fastlm/backends/cpu is its only caller.

#include "bindings/define.h"
#include "bindings/words.h"
#include "cpu/attention.h"
#include "cpu/decode.h"
#include "cpu/ops.h"

namespace py = pybind11;
using namespace fastlm;
using fastlm::bindings::define;
using ptr = std::uintptr_t;

#define P(name) reinterpret_cast<void*>(name)

namespace {

void layer_norm_plain(const NormArgs& args) {
  NormArgs a = args;
  a.r_type = a.y_type = a.w_type = a.x_type;
  layer_norm_fwd(a);
}

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
  using N = NormArgs;
  define<&N::x, &N::residual, &N::w, &N::b, &N::z, &N::y, &N::mean, &N::rstd, &N::M, &N::N, &N::eps, &N::dropout_p,
         &N::seed, &N::x_type, &N::r_type, &N::y_type, &N::w_type>(m, "layer_norm_fwd", &layer_norm_fwd);
  // Without residual, dropout, statistics and mixed dtypes: half the arguments take half the time to convert.
  define<&N::x, &N::w, &N::b, &N::y, &N::M, &N::N, &N::eps, &N::x_type>(m, "layer_norm", &layer_norm_plain);
  define<&N::dy, &N::z, &N::w, &N::mean, &N::rstd, &N::dz_in, &N::dz, &N::dx, &N::partial, &N::dw, &N::db, &N::M,
         &N::N, &N::dropout_p, &N::seed, &N::x_type, &N::r_type, &N::y_type, &N::w_type>
      (m, "layer_norm_bwd", &layer_norm_bwd);
  define<&N::x, &N::residual, &N::w, &N::z, &N::y, &N::rstd, &N::M, &N::N, &N::eps, &N::x_type, &N::r_type,
         &N::y_type, &N::w_type>(m, "rms_norm_fwd", &rms_norm_fwd);
  define<&N::dy, &N::z, &N::w, &N::rstd, &N::dz_in, &N::dz, &N::dx, &N::partial, &N::dw, &N::M, &N::N, &N::x_type,
         &N::r_type, &N::y_type, &N::w_type>(m, "rms_norm_bwd", &rms_norm_bwd);
  using G = GeluArgs;
  define<&G::x, &G::bias, &G::y, &G::M, &G::N, &G::tanh, &G::dropout_p, &G::seed, &G::type, &G::bias_type>
      (m, "gelu_fwd", &gelu_fwd);
  define<&G::dy, &G::x, &G::bias, &G::dx, &G::partial, &G::db, &G::M, &G::N, &G::tanh, &G::dropout_p, &G::seed,
         &G::type, &G::bias_type>(m, "gelu_bwd", &gelu_bwd);
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
  using C = CrossEntropyArgs;
  define<&C::target, &C::w, &C::M, &C::N, &C::ignore_index, &C::w_type>
      (m, "cross_entropy_targets", &cross_entropy_targets);
  m.def("cross_entropy_total", [](ptr loss, int64_t M, int type) { return cross_entropy_total(P(loss), M, type); });
  define<&C::x, &C::target, &C::w, &C::loss, &C::stats, &C::dx, &C::M, &C::N, &C::ignore_index, &C::smoothing,
         &C::scale, &C::type, &C::w_type>(m, "cross_entropy_fwd", &cross_entropy_fwd);
  define<&C::x, &C::target, &C::w, &C::states, &C::M, &C::n, &C::first, &C::N, &C::ignore_index, &C::smoothing,
         &C::type, &C::w_type>(m, "cross_entropy_update", &cross_entropy_update);
  define<&C::states, &C::target, &C::w, &C::loss, &C::stats, &C::M, &C::N, &C::ignore_index, &C::smoothing, &C::type,
         &C::w_type>(m, "cross_entropy_finish", &cross_entropy_finish);
  define<&C::x, &C::target, &C::w, &C::stats, &C::g, &C::dx, &C::M, &C::n, &C::first, &C::N, &C::ignore_index,
         &C::smoothing, &C::scale, &C::type, &C::w_type>(m, "cross_entropy_bwd", &cross_entropy_bwd);
  using S = SwigluArgs;
  define<&S::gate, &S::up, &S::y, &S::M, &S::N, &S::gate_stride, &S::up_stride, &S::type>(m, "swiglu_fwd", &swiglu_fwd);
  define<&S::dy, &S::gate, &S::up, &S::dgate, &S::dup, &S::M, &S::N, &S::gate_stride, &S::up_stride, &S::type>
      (m, "swiglu_bwd", &swiglu_bwd);
  using R = RotaryArgs;
  define<&R::x, &R::cos, &R::sin, &R::y, &R::size, &R::x_stride, &R::y_stride, &R::R, &R::table_stride,
         &R::interleaved, &R::inverse, &R::type>(m, "rotary", &rotary);
  m.def("gemm_serves", &gemm_serves);
  using M = GemmArgs;
  define<&M::a, &M::b, &M::bias, &M::c, &M::M, &M::N, &M::K, &M::a_row, &M::b_row, &M::c_row, &M::a_transposed,
         &M::b_transposed, &M::wide, &M::add, &M::type>(m, "gemm", &gemm);
  m.def("gradient_square_sum", &square_sum_of, nogil());
  m.def("adamw_update", &adamw_update_of, nogil());
  using L = LinearArgs;
  define<&L::x, &L::w, &L::bias, &L::y, &L::M, &L::N, &L::K, &L::x_type, &L::w_type, &L::bias_type, &L::y_type>
      (m, "linear_fwd", &linear_fwd);
  using Q = QuantizedLinearArgs;
  define<&Q::x, &Q::w, &Q::scale, &Q::bias, &Q::y, &Q::M, &Q::N, &Q::K, &Q::padded_K, &Q::group, &Q::x_type,
         &Q::y_type>(m, "quantized_linear_fwd", &quantized_linear_fwd);
  define<&Q::w, &Q::scale, &Q::y, &Q::N, &Q::K, &Q::padded_K, &Q::group, &Q::y_type>(m, "dequantize", &dequantize);
  fastlm::bindings::define_words(m);
  m.def("use_huge_pages", [](ptr start, int64_t size) { use_huge_pages(P(start), size); });
  m.def("decode_step",
        [](ptr model, int64_t position, double eps) {
          decode_step(*static_cast<const DecodeModel*>(P(model)), position, eps);
        },
        nogil());
}
