// The one switch from the codes of storage types to types, for inclusion inside a pass of foreach_isa.h: no include
// guard. A kernel's list of types is what it serves; anything else is an error that names the op and what it got.

namespace fastlm::FASTLM_ISA {

// The storage types of x, the residual stream and y that meet in one normalization.
template <class TX, class TR, class TY>
struct NormTypes {
  using x = TX;
  using stream = TR;
  using y = TY;
};

template <class T>
constexpr int code_of() {
  if constexpr (std::is_same_v<T, float>) return (int)DType::f32;
  if constexpr (std::is_same_v<T, double>) return (int)DType::f64;
  if constexpr (std::is_same_v<T, bf16_t>) return (int)DType::bf16;
  return (int)DType::f16;
}

// Calls f with a value of that one of the types T which `type` names.
template <class... T, class F>
inline void for_types(const char* op, const char* argument, int type, F&& f) {
  const bool served = ((type == code_of<T>() && (f(T{}), true)) || ...);
  if (!served) unsupported_type(op, argument, type, {code_of<T>()...});
}
template <class F>
inline void for_any_type(const char* op, const char* argument, int type, F&& f) {
  for_types<float, double, bf16_t, f16_t>(op, argument, type, f);
}
template <class F>
inline void for_type_below_double(const char* op, const char* argument, int type, F&& f) {
  for_types<float, bf16_t, f16_t>(op, argument, type, f);
}

template <class F, class... X, class... R, class... Y>
inline bool for_listed(int x, int stream, int y, F&& f, NormTypes<X, R, Y>... listed) {
  return ((x == code_of<X>() && stream == code_of<R>() && y == code_of<Y>() && (f(listed), true)) || ...);
}

// Calls f with the NormTypes that the codes name: all alike, or a 16-bit x and y around an fp32 stream.
template <class F>
inline void for_norm_types(const char* op, int x, int stream, int y, F&& f) {
  const bool served =
      for_listed(x, stream, y, f, NormTypes<float, float, float>{}, NormTypes<double, double, double>{},
                 NormTypes<bf16_t, bf16_t, bf16_t>{}, NormTypes<f16_t, f16_t, f16_t>{},
                 NormTypes<bf16_t, float, float>{}, NormTypes<bf16_t, float, bf16_t>{},
                 NormTypes<float, float, bf16_t>{}, NormTypes<f16_t, float, float>{},
                 NormTypes<f16_t, float, f16_t>{}, NormTypes<float, float, f16_t>{});
  if (!served)
    unsupported_types(op, "x, stream and y", {x, stream, y}, "one dtype, or a float32 stream beside one 16-bit dtype");
}

}  // namespace fastlm::FASTLM_ISA
