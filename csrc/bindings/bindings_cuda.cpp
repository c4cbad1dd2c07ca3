// fastlm._cuda: the CUDA kernels behind integer pointers. fastlm/backends/cuda is its only caller, with
// the device current.

#include "bindings/define.h"
#include "cuda/attention.h"
#include "cuda/ops.h"

namespace fastlm::bindings {

// A seed comes as (value or address, whether it is an address).
template <>
struct Passed<cuda::Seed> {
  using type = std::pair<int64_t, bool>;
  static cuda::Seed taken(const type& value) { return {value.first, value.second}; }
};

}  // namespace fastlm::bindings

namespace py = pybind11;
using fastlm::bindings::passed;
using namespace fastlm::cuda;
using ptr = std::uintptr_t;

#define P(name) reinterpret_cast<void*>(name)

#ifndef FASTLM_CUDA_ARCHS  // "80;90a": what the kernels were compiled for
#define FASTLM_CUDA_ARCHS ""
#endif
#ifndef FASTLM_CUDA_SOURCES  // a hash of what the kernels were compiled from
#define FASTLM_CUDA_SOURCES ""
#endif

namespace {

// As `define`, of an op that runs on a stream: device and stream come first.
template <auto... Members, class Args>
void define(py::module_& m, const char* name, void (*op)(const Args&)) {
  m.def(
      name,
      [op](int device, ptr stream, typename passed<Members>::type... values) {
        Args args{};
        args.on = {device, P(stream)};
        ((args.*Members = passed<Members>::taken(values)), ...);
        op(args);
      },
      py::call_guard<py::gil_scoped_release>());
}

Heads heads(ptr data, const py::tuple& strides) {
  if (!data) return {};
  return {P(data), strides[0].cast<int64_t>(), strides[1].cast<int64_t>(), strides[2].cast<int64_t>()};
}

// What both directions of attention share, as Python passes it; sizes are (B, H, Hkv, T, S, D, Dv, left, right).
// `mask_owner` keeps a converted mask alive.
AttentionArgs attention_args(int device, ptr stream, ptr q, const py::tuple& qs, ptr k, const py::tuple& ks, ptr v,
                             const py::tuple& vs, ptr mask, const py::tuple& ms, int mask_type, const py::object&,
                             ptr cu_q, ptr cu_k, const py::tuple& sizes, double scale, double softcap, double p,
                             int64_t seed, bool on_device, int type) {
  AttentionArgs a{};
  a.device = device, a.stream = P(stream);
  a.q = heads(q, qs), a.k = heads(k, ks), a.v = heads(v, vs);
  if (mask)
    a.mask = {P(mask), ms[0].cast<int64_t>(), ms[1].cast<int64_t>(), ms[2].cast<int64_t>(), ms[3].cast<int64_t>(),
              mask_type};
  a.cu_q = static_cast<const int32_t*>(P(cu_q)), a.cu_k = static_cast<const int32_t*>(P(cu_k));
  int64_t* const size[] = {&a.B, &a.H, &a.Hkv, &a.T, &a.S, &a.D, &a.Dv, &a.left, &a.right};
  for (size_t i = 0; i < 9; ++i) *size[i] = sizes[i].cast<int64_t>();
  a.scale = scale, a.softcap = softcap, a.dropout_p = p, a.seed = {seed, on_device}, a.type = type;
  return a;
}

MaskGradient mask_gradient(ptr data, int type, ptr partial, const py::tuple& sizes) {
  return {P(data), type, static_cast<float*>(P(partial)), sizes[0].cast<int64_t>(), sizes[1].cast<int64_t>(),
          sizes[2].cast<int64_t>(), sizes[3].cast<int64_t>()};
}

}  // namespace

PYBIND11_MODULE(_cuda, m, py::mod_gil_not_used()) {
  m.attr("architectures") = FASTLM_CUDA_ARCHS;
  m.attr("sources") = FASTLM_CUDA_SOURCES;
  m.def("toolkit_version", &toolkit_version);
  m.def("driver_version", &driver_version);
  m.def("norm_partials", [](int device, ptr, int64_t M, int64_t N) { return norm_partials(device, M, N); });
  m.def("gelu_partials", [](int device, ptr, int64_t M, int64_t N) { return gelu_partials(device, M, N); });
  using N = NormArgs;
  define<&N::x, &N::residual, &N::w, &N::b, &N::z, &N::y, &N::mean, &N::rstd, &N::M, &N::N, &N::eps, &N::dropout_p,
         &N::seed, &N::x_type, &N::r_type, &N::y_type, &N::w_type>(m, "layer_norm_fwd", &layer_norm_fwd);
  define<&N::dy, &N::z, &N::w, &N::mean, &N::rstd, &N::dz_in, &N::dz, &N::dx, &N::partial, &N::sums, &N::rows, &N::M,
         &N::N, &N::dropout_p, &N::seed, &N::x_type, &N::r_type, &N::y_type, &N::w_type>
      (m, "layer_norm_bwd", &layer_norm_bwd);
  define<&N::x, &N::residual, &N::w, &N::z, &N::y, &N::rstd, &N::M, &N::N, &N::eps, &N::x_type, &N::r_type,
         &N::y_type, &N::w_type>(m, "rms_norm_fwd", &rms_norm_fwd);
  define<&N::dy, &N::z, &N::w, &N::rstd, &N::dz_in, &N::dz, &N::dx, &N::partial, &N::sums, &N::rows, &N::M, &N::N,
         &N::x_type, &N::r_type, &N::y_type, &N::w_type>(m, "rms_norm_bwd", &rms_norm_bwd);
  using G = GeluArgs;
  define<&G::x, &G::bias, &G::y, &G::M, &G::N, &G::tanh, &G::dropout_p, &G::seed, &G::type, &G::bias_type>
      (m, "gelu_fwd", &gelu_fwd);
  define<&G::dy, &G::x, &G::bias, &G::dx, &G::partial, &G::db, &G::M, &G::N, &G::tanh, &G::dropout_p, &G::seed,
         &G::type, &G::bias_type>(m, "gelu_bwd", &gelu_bwd);
  m.def("attention_fwd", [](int device, ptr stream, ptr q, const py::tuple& qs, ptr k, const py::tuple& ks, ptr v,
                            const py::tuple& vs, ptr mask, const py::tuple& ms, int mask_type, const py::object& owner,
                            ptr cu_q, ptr cu_k, const py::tuple& sizes, double scale, double softcap, double p,
                            int64_t seed, bool on_device, int type, ptr out, const py::tuple& outs, ptr lse,
                            ptr rest, ptr partial) {
    AttentionArgs a = attention_args(device, stream, q, qs, k, ks, v, vs, mask, ms, mask_type, owner, cu_q, cu_k, sizes,
                                     scale, softcap, p, seed, on_device, type);
    a.out = heads(out, outs), a.lse = static_cast<float*>(P(lse)), a.rest = static_cast<float*>(P(rest));
    a.partial = static_cast<float*>(P(partial));
    const py::gil_scoped_release nogil_here;
    attention_fwd(a);
  });
  m.def("attention_splits", [](int device, ptr, int64_t H, int64_t Hkv, int64_t T, int64_t S, int64_t D, int64_t right,
                               int type) {
    AttentionArgs a{};
    a.device = device, a.H = H, a.Hkv = Hkv, a.T = T, a.S = S, a.D = D, a.right = right, a.type = type;
    return attention_splits(a);
  });
  // sizes are (B, H, T, S, D)
  m.def("attention_mask_partials", [](int device, ptr, const py::tuple& mask, const py::tuple& sizes, int type) {
    AttentionArgs a{};
    a.device = device, a.type = type, a.dmask = mask_gradient(0, 0, 0, mask);
    int64_t* const size[] = {&a.B, &a.H, &a.T, &a.S, &a.D};
    for (size_t i = 0; i < 5; ++i) *size[i] = sizes[i].cast<int64_t>();
    return attention_mask_partials(a);
  });
  m.def("attention_bwd_workspace", [](int device, ptr, int64_t B, int64_t H, int64_t T, int64_t D, int64_t Dv, int type,
                                      bool plain) {
    return attention_bwd_workspace(device, B, H, T, D, Dv, type, plain);
  });
  m.def("attention_bwd", [](int device, ptr stream, ptr q, const py::tuple& qs, ptr k, const py::tuple& ks, ptr v,
                            const py::tuple& vs, ptr mask, const py::tuple& ms, int mask_type, const py::object& owner,
                            ptr cu_q, ptr cu_k, const py::tuple& sizes, double scale, double softcap, double p,
                            int64_t seed, bool on_device, int type, ptr out, const py::tuple& outs, ptr lse, ptr rest,
                            ptr dout, const py::tuple& douts, ptr dlse, ptr dq, const py::tuple& dqs, ptr dk,
                            const py::tuple& dks, ptr dv, const py::tuple& dvs, ptr stats, ptr dmask, int dmask_type,
                            ptr partial, const py::tuple& dmask_sizes) {
    AttentionArgs a = attention_args(device, stream, q, qs, k, ks, v, vs, mask, ms, mask_type, owner, cu_q, cu_k, sizes,
                                     scale, softcap, p, seed, on_device, type);
    a.out = heads(out, outs), a.lse = static_cast<float*>(P(lse)), a.rest = static_cast<float*>(P(rest));
    a.dout = heads(dout, douts), a.dlse = static_cast<const float*>(P(dlse));
    a.dq = heads(dq, dqs), a.dk = heads(dk, dks), a.dv = heads(dv, dvs);
    a.stats = static_cast<float*>(P(stats));
    if (dmask) a.dmask = mask_gradient(dmask, dmask_type, partial, dmask_sizes);
    const py::gil_scoped_release nogil_here;
    attention_bwd(a);
  });
}
