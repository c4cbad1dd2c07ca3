// Chooses attention's kernel by element type and head size; attention_fwd.cuh, attention_decode.cuh (few queries),
// attention_bwd.cuh and attention_mask.cuh have the kernels, attention_fwd_<head size>.cu and
// attention_bwd_<head size>.cu compile them. Hopper has its own kernels for the calls that attention_sm90.cu and
// attention_bwd_sm90.cu serve, Blackwell for those that attention_sm100.cu does.
#include "attention.cuh"

namespace fastlm::cuda {

template <class T, int D>
void attention_fwd(const AttentionParams& params, const AttentionArgs& args);
template <class T, int D>
void attention_decode(const AttentionParams& params, const AttentionArgs& args);
template <class T, int D>
int64_t attention_splits(const AttentionArgs& args);
template <class T, int D>
void attention_bwd(const AttentionParams& params, const AttentionArgs& args);
template <class T, int D>
int64_t attention_mask_partials(const AttentionArgs& args);

namespace {

// Far beyond any sequence, and adding a position to it does not overflow.
constexpr int64_t kUnlimited = 1 << 30;

int reach(int64_t window) { return (int)(window < 0 ? kUnlimited : smaller(window, kUnlimited)); }

// Whether every row of a view can be copied in whole 16-byte chunks.
bool aligned(const Heads& x, int64_t width, int64_t element) {
  const auto whole = [&](int64_t n) { return n * element % 16 == 0; };
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && whole(x.b) && whole(x.h) && whole(x.t) && whole(width);
}

bool as_large_as_scores(const AttentionArgs& a) {
  const MaskGradient& m = a.dmask;
  return m.B == a.B && m.H == a.H && m.T == a.T && m.S == a.S;
}

AttentionParams params_of(const AttentionArgs& a) {
  AttentionParams p{};
  p.q = a.q, p.k = a.k, p.v = a.v, p.out = a.out, p.dout = a.dout, p.dq = a.dq, p.dk = a.dk, p.dv = a.dv;
  if (a.cu_q)  // sequences differ in their rows alone
    for (Heads* x : {&p.q, &p.k, &p.v, &p.out, &p.dout, &p.dq, &p.dk, &p.dv}) x->b = 0;
  p.mask = a.mask, p.lse = a.lse, p.rest = a.rest, p.dlse = a.dlse, p.stats = a.stats;
  if (as_large_as_scores(a)) p.dmask = a.dmask.data, p.dmask_type = a.dmask.type;
  p.cu_q = a.cu_q, p.cu_k = a.cu_k;
  p.B = (int)a.B, p.H = (int)a.H, p.Hkv = (int)a.Hkv, p.T = (int)a.T, p.S = (int)a.S, p.D = (int)a.D, p.Dv = (int)a.Dv;
  p.left = reach(a.left), p.right = reach(a.right);
  p.scale = (float)a.scale, p.softcap = (float)a.softcap;
  p.softcap_inverse = a.softcap > 0 ? (float)(1 / a.softcap) : 0.0f;
  p.dropout = Dropout::of(a.dropout_p, a.seed);
  p.drops = a.dropout_p > 0;
  const int64_t element = a.type == (int)DType::f32 ? 4 : 2;
  p.vectors = true;
  for (const Heads* x : {&p.q, &p.k, &p.dq, &p.dk}) p.vectors = p.vectors && aligned(*x, a.D, element);
  for (const Heads* x : {&p.v, &p.out, &p.dout, &p.dv}) p.vectors = p.vectors && aligned(*x, a.Dv, element);
  p.stat_rows = (a.cu_q ? 1 : a.B) * a.H * a.T;
  return p;
}

// Calls f with the element type and the smallest class of head sizes that both head sizes fit.
template <class F>
void for_kernel(const AttentionArgs& a, F&& f) {
  const int64_t size = larger(a.D, a.Dv);
  if (size > 256) throw std::invalid_argument("fastlm._cuda: attention has no kernels for head size > 256");
  for_type(a.type, [&](auto type) {
    constexpr bool wide = std::is_same_v<decltype(type), float>;  // three classes are enough there
    const auto sized = [&](auto D) { f(type, D); };
    if constexpr (!wide)
      if (size <= 32) return sized(std::integral_constant<int, 32>{});
    if (size <= 64) return sized(std::integral_constant<int, 64>{});
    if constexpr (!wide)
      if (size <= 96) return sized(std::integral_constant<int, 96>{});
    if (size <= 128) return sized(std::integral_constant<int, 128>{});
    if constexpr (!wide)
      if (size <= 192) return sized(std::integral_constant<int, 192>{});
    sized(std::integral_constant<int, 256>{});
  });
}

}  // namespace

void attention_fwd(const AttentionArgs& args) {
  set_device(args.device);
  const AttentionParams params = params_of(args);
  if (args.partial)
    return for_kernel(args, [&](auto type, auto D) { attention_decode<decltype(type), D()>(params, args); });
  if (attention_fwd_serves_sm90(params, args)) return attention_fwd_sm90(params, args);
  if (attention_fwd_serves_sm100(params, args)) return attention_fwd_sm100(params, args);
  for_kernel(args, [&](auto type, auto D) { attention_fwd<decltype(type), D()>(params, args); });
}

int64_t attention_splits(const AttentionArgs& args) {
  set_device(args.device);
  int64_t splits = 0;
  for_kernel(args, [&](auto type, auto D) { splits = attention_splits<decltype(type), D()>(args); });
  return splits;
}

void attention_bwd(const AttentionArgs& args) {
  set_device(args.device);
  const AttentionParams params = params_of(args);
  if (attention_bwd_serves_sm90(params, args)) return attention_bwd_sm90(params, args);
  for_kernel(args, [&](auto type, auto D) { attention_bwd<decltype(type), D()>(params, args); });
}

int64_t attention_mask_partials(const AttentionArgs& args) {
  if (as_large_as_scores(args)) return 0;
  set_device(args.device);
  int64_t partials = 0;
  for_kernel(args, [&](auto type, auto D) { partials = attention_mask_partials<decltype(type), D()>(args); });
  return partials;
}

}  // namespace fastlm::cuda
