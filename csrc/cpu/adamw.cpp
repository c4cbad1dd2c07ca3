// AdamW (Loshchilov & Hutter 2019) over any number of tensors in one parallel region, and the norm that clips them.
//
// The norm reads every gradient once. The update then reads gradient, parameter and both moments once and writes the
// last three once, scaling the gradient on the way, so that clipping never rewrites it; the same pass rounds the new
// parameter to bf16 for the next forward pass where there is a copy:
//   g = scale grad;   m += (1 - beta1) (g - m);   v = beta2 v + (1 - beta2) g^2
//   p = (1 - lr decay) p - lr / (1 - beta1^t)  m / (sqrt(v / (1 - beta2^t)) + eps)
// Work is cut into pieces of kPiece elements across all tensors: small tensors cost no call and no team of their own.
// Sums of squares are kept a piece and added in order, so the norm has the same bits for any number of threads.

#include "cpu/isa.h"
#include "cpu/ops.h"

#ifndef FASTLM_ISA
#define FASTLM_FILE "cpu/adamw.cpp"

#include <vector>

namespace fastlm::adamw {

constexpr int64_t kPiece = 32 * 1024;
constexpr int64_t kBlock = 4096;  // squares added up in fp32 before they join an fp64 sum

// Elements from .. from + n of tensor `index`.
struct Piece {
  int64_t index, from, n;
};

}  // namespace fastlm::adamw

#include "cpu/foreach_isa.h"
#endif

#ifdef FASTLM_ISA
namespace fastlm::FASTLM_ISA {

namespace adamw {

using namespace ::fastlm::adamw;

// How far ahead to prefetch: the hardware's prefetchers stop at the end of every page.
constexpr int64_t kAhead = 1024;

// Into the second-level cache, which allows more misses under way: the norm takes 0.9 of the time that it does with the
// first, the update the same.
template <class T>
inline void prefetch(const T* p) {
  __builtin_prefetch(p + kAhead, 0, 2);
}

template <class T>
double square_sum(const T* g, int64_t n) {
  constexpr int64_t L = lanes<VF>;
  double total = 0;
  for (int64_t from = 0; from < n; from += kBlock) {
    const int64_t end = std::min(n, from + kBlock);
    VF a{}, b{}, c{}, d{};
    int64_t j = from;
    for (; j + 4 * L <= end; j += 4 * L) {
      for (int64_t k = 0; k < 4 * L; k += 64 / (int64_t)sizeof(T)) prefetch(g + j + k);
      const VF w = load<VF>(g + j), x = load<VF>(g + j + L), y = load<VF>(g + j + 2 * L), z = load<VF>(g + j + 3 * L);
      a += w * w;
      b += x * x;
      c += y * y;
      d += z * z;
    }
    for (; j < end; j += L) {
      const VF w = load_n<VF>(g + j, std::min(L, end - j));
      a += w * w;
    }
    total += reduce_add((a + b) + (c + d));
  }
  return total;
}

void square_sums(const AdamWTensor* tensors, const Piece* pieces, int64_t count, double* sums) {
#pragma omp parallel for schedule(static) if (count > 1)
  for (int64_t i = 0; i < count; ++i) {
    const Piece& piece = pieces[i];
    const AdamWTensor& t = tensors[piece.index];
    sums[i] = (DType)t.grad_type == DType::bf16 ? square_sum((const bf16_t*)t.grad + piece.from, piece.n)
                                                : square_sum((const float*)t.grad + piece.from, piece.n);
  }
}

// One piece of a parameter of type T with gradients of type G.
template <class T, class G>
struct Update {
  static constexpr int64_t L = lanes<VF>;
  T *p, *m, *v;
  const G* g;
  bf16_t* copy;
  float scale, keep, beta2, gain1, gain2, rate, spread, eps;

  Update(const AdamWTensor& t, int64_t from)
      : p((T*)t.param + from), m((T*)t.exp_avg + from), v((T*)t.exp_avg_sq + from), g((const G*)t.grad + from),
        copy(t.copy ? (bf16_t*)t.copy + from : nullptr), scale((float)t.grad_scale), keep((float)t.decay),
        beta2((float)t.beta2), gain1((float)(1 - t.beta1)), gain2((float)(1 - t.beta2)), rate((float)t.step_size),
        spread((float)t.sqrt_factor), eps((float)t.eps) {}

  // The new values of n parameters from j on, which it also stores.
  template <class Count>
  inline __attribute__((always_inline)) VF at(int64_t j, Count n) const {
    prefetch(g + j);
    prefetch(p + j);
    prefetch(m + j);
    prefetch(v + j);
    const VF grad = load<VF>(g + j, n) * scale;
    const VF mean = load<VF>(m + j, n);
    const VF m_new = mean + (grad - mean) * gain1;
    const VF v_new = load<VF>(v + j, n) * beta2 + grad * grad * gain2;
    const VF p_new = load<VF>(p + j, n) * keep - rate * m_new / (sqrt(v_new) * spread + eps);
    store(m + j, m_new, n);
    store(v + j, v_new, n);
    store(p + j, p_new, n);
    return p_new;
  }

  void run(int64_t n) const {
    int64_t j = 0;
#if FASTLM_ISA_LEVEL >= 2
    // The copy is not read soon: whole lines go past the caches, which would read each before writing it.
    if (copy && ((uintptr_t)copy & 63) == 0) {
      using whole = std::integral_constant<int64_t, L>;
      alignas(64) bf16_t line[2 * L];
      for (; j + 2 * L <= n; j += 2 * L) {
        store(line, at(j, whole{}));
        store(line + L, at(j + L, whole{}));
        _mm512_stream_si512((__m512i*)(copy + j), _mm512_load_si512(line));
      }
      fence();
    }
#endif
    for_lanes<VF>(n - j, [&](int64_t i, auto k) __attribute__((always_inline)) {
      const VF p_new = at(j + i, k);
      if (copy) store(copy + j + i, p_new, k);
    });
  }
};

void update_dispatch(const AdamWTensor* tensors, const Piece* pieces, int64_t count) {
#pragma omp parallel for schedule(static) if (count > 1)
  for (int64_t i = 0; i < count; ++i) {
    const Piece& piece = pieces[i];
    const AdamWTensor& t = tensors[piece.index];
    const bool short_grad = (DType)t.grad_type == DType::bf16;
    if ((DType)t.type == DType::bf16)
      Update<bf16_t, bf16_t>(t, piece.from).run(piece.n);
    else if (short_grad)
      Update<float, bf16_t>(t, piece.from).run(piece.n);
    else
      Update<float, float>(t, piece.from).run(piece.n);
  }
}

}  // namespace adamw
}  // namespace fastlm::FASTLM_ISA

#else

namespace fastlm {

namespace {

constexpr int kF32 = (int)DType::f32, kBf16 = (int)DType::bf16;

void check_grads(const char* op, const AdamWTensor* tensors, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if (tensors[i].grad_type != kF32 && tensors[i].grad_type != kBf16)
      unsupported_type(op, "grad", tensors[i].grad_type, {kF32, kBf16});
}

std::vector<adamw::Piece> pieces_of(const AdamWTensor* tensors, int64_t count) {
  std::vector<adamw::Piece> pieces;
  for (int64_t i = 0; i < count; ++i)
    for (int64_t from = 0; from < tensors[i].n; from += adamw::kPiece)
      pieces.push_back({i, from, std::min(adamw::kPiece, tensors[i].n - from)});
  return pieces;
}

}  // namespace

double gradient_square_sum(const AdamWTensor* tensors, int64_t count) {
  check_grads("gradient_square_sum", tensors, count);
  const auto pieces = pieces_of(tensors, count);
  std::vector<double> sums(pieces.size());
  FASTLM_DISPATCH(adamw::square_sums, tensors, pieces.data(), (int64_t)pieces.size(), sums.data());
  double total = 0;
  for (const double sum : sums) total += sum;
  return total;
}

void adamw_update(const AdamWTensor* tensors, int64_t count) {
  check_grads("adamw_update", tensors, count);
  for (int64_t i = 0; i < count; ++i) {
    const AdamWTensor& t = tensors[i];
    if (t.type != kF32 && !(t.type == kBf16 && t.grad_type == kBf16))
      unsupported_types("adamw_update", "param and grad", {t.type, t.grad_type}, "both bfloat16, or a float32 param");
  }
  const auto pieces = pieces_of(tensors, count);
  FASTLM_DISPATCH(adamw::update_dispatch, tensors, pieces.data(), (int64_t)pieces.size());
}

}  // namespace fastlm
#endif
