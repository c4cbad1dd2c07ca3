// One token of GPT-2 for 1 to 8 rows: every layer in one call, on the kernels of the ops.
//
// A layer is some fifteen small operators; called one by one from Python they cost as much as reading its weights.
// GPT-2 124M, batch 1, on two threads: 3.2 times the speed of Hugging Face's generate() in bf16 (docs/design/decode.md).
// Activations stay in fp32 from the embedding to the logits; attention runs in the cache's dtype.

#include "cpu/decode.h"

#include "cpu/attention.h"
#include "cpu/isa.h"
#include "cpu/ops.h"

#ifndef FASTLM_ISA
#define FASTLM_FILE "cpu/decode.cpp"
#include "cpu/foreach_isa.h"
#endif

#ifdef FASTLM_ISA
namespace fastlm::FASTLM_ISA {

namespace decode {

template <class T>
void convert(const float* x, T* y, int64_t size) {
  for_lanes<VF>(size, [&](int64_t i, auto n) { store(y + i, load<VF>(x + i, n), n); });
}

// qkv (B, 3, H, D) fp32 -> q (B, H, D), and k and v into their place in the cache.
template <class T>
void split(const DecodeModel& m, const DecodeLayer& layer, int64_t position) {
  const int64_t D = m.C / m.H;
  T* q = (T*)m.attention;
  for (int64_t b = 0; b < m.B; ++b) {
    const float* row = m.product + b * 3 * m.C;
    convert(row, q + b * m.C, m.C);
    for (int64_t h = 0; h < m.H; ++h) {
      const int64_t at = ((b * m.H + h) * m.cache_length + position) * D;
      convert(row + m.C + h * D, (T*)layer.keys + at, D);
      convert(row + 2 * m.C + h * D, (T*)layer.values + at, D);
    }
  }
}

void split_any(const DecodeModel& m, const DecodeLayer& layer, int64_t position) {
  for_type_below_double("decode_step", "cache", (int)m.cache_type,
                        [&](auto type) { split<decltype(type)>(m, layer, position); });
}

void widen_any(const void* x, int type, float* y, int64_t size) {
  for_type_below_double("decode_step", "cache", type, [&](auto of) {
    const auto* values = (const decltype(of)*)x;
    for_lanes<VF>(size, [&](int64_t i, auto n) { store(y + i, load<VF>(values + i, n), n); });
  });
}

}  // namespace decode
}  // namespace fastlm::FASTLM_ISA

#else

namespace fastlm {

namespace {

constexpr int kF32 = (int)DType::f32;

void linear(const DecodeLinear& l, int64_t B, const float* x, float* y, bool with_bias = true) {
  const float* bias = with_bias ? l.bias : nullptr;
  if (l.type == kQuantized)
    quantized_linear_fwd({x, l.weight, l.scale, bias, y, B, l.out, l.in, l.padded_in, l.group, kF32, kF32});
  else
    linear_fwd({x, l.weight, bias, y, B, l.out, l.in, kF32, (int)l.type, kF32, kF32});
}

// normed = norm(x), with x += branch before it where there is one.
void add_norm(const DecodeModel& m, const float* branch, const DecodeNorm& norm, double eps) {
  NormArgs a{};
  a.x = m.x, a.y = m.normed;
  if (branch) a.x = branch, a.residual = a.z = m.x;
  a.w = norm.weight, a.b = norm.bias, a.M = m.B, a.N = m.C, a.eps = eps;
  layer_norm_fwd(a);
}

void add_bias_gelu(const DecodeModel& m, const float* bias) {
  GeluArgs a{};
  a.x = a.y = m.product, a.bias = bias, a.M = m.B, a.N = m.hidden, a.tanh = true;
  gelu_fwd(a);
}

// The attention of one new query a row over all positions up to its own: q and out are the halves of m.attention.
void attention(const DecodeModel& m, const DecodeLayer& layer, int64_t position) {
  const int64_t D = m.C / m.H, head = m.cache_length * D;
  const int64_t size = m.cache_type == kF32 ? 4 : 2;
  void* out = (char*)m.attention + m.B * m.C * size;
  AttentionArgs a{};
  a.q = {m.attention, m.C, D, m.C};
  a.out = {out, m.C, D, m.C};
  a.k = {layer.keys, m.H * head, head, D};
  a.v = {layer.values, m.H * head, head, D};
  a.B = m.B, a.H = m.H, a.Hkv = m.H, a.T = 1, a.S = position + 1, a.D = D, a.Dv = D;
  a.scale = 1.0 / std::sqrt((double)D), a.type = (int)m.cache_type;
  a.left = a.right = kUnlimited, a.row_stride = 1;
  attention_fwd(a);
  FASTLM_DISPATCH(decode::widen_any, out, (int)m.cache_type, m.product, m.B * m.C);
}

}  // namespace

void decode_step(const DecodeModel& m, int64_t position, double eps) {
  add_norm(m, nullptr, m.layer[0].norm_1, eps);
  for (int64_t i = 0; i < m.layers; ++i) {
    const DecodeLayer& layer = m.layer[i];
    linear(layer.qkv, m.B, m.normed, m.product);
    FASTLM_DISPATCH(decode::split_any, m, layer, position);
    attention(m, layer, position);
    linear(layer.attention_out, m.B, m.product, m.normed);
    add_norm(m, m.normed, layer.norm_2, eps);
    linear(layer.up, m.B, m.normed, m.product, false);
    add_bias_gelu(m, layer.up.bias);
    linear(layer.down, m.B, m.product, m.normed);
    add_norm(m, m.normed, i + 1 < m.layers ? m.layer[i + 1].norm_1 : m.norm_last, eps);
  }
  linear(m.head, m.B, m.normed, m.logits);
}

}  // namespace fastlm
#endif
