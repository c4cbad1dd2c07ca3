// What attention's passes share: its arguments and its scratch memory. Ordinary header, not for inclusion in a pass.
#pragma once

#include "cpu/isa.h"

namespace fastlm {

// A (B, H, T, D) view whose last dimension is contiguous; strides in elements.
struct Heads {
  void* data;
  int64_t b, h, t;
};

// A (B, H, T, S) view; broadcast dimensions have stride 0.
struct Mask {
  void* data;  // null: no mask
  int64_t b, h, t, s;
  int type;  // a DType, or kBool
};
constexpr int kBool = 4;

struct AttentionArgs {
  Heads q, k, v, out, dout, dq, dk, dv;  // k and v have Hkv heads; dq, dk and dv only where `inputs`
  Mask mask, dmask;                      // dmask: contiguous, compute type, sizes in dmask_sizes; may be null
  void* lse;                             // (B, H, T), compute type; null in a forward pass that does not want it
  const void* dlse;                      // the same, or null
  int64_t dmask_sizes[4];
  int64_t B, H, Hkv, T, S, D, Dv;
  double scale, dropout_p;
  int64_t seed;
  bool causal, inputs;
  int type;
};

// At least `bytes` of 64-byte aligned memory that belongs to the calling thread and is kept for its next call: fresh
// memory would cost page faults that outweigh the arithmetic of a short sequence.
void* attention_scratch(size_t bytes);

// Hands out aligned pieces of a scratch allocation; with a null base it only counts.
struct Arena {
  char* base;
  size_t used = 0;
  template <class T>
  T* take(int64_t n) {
    T* p = reinterpret_cast<T*>(base + used);
    used += ((size_t)n * sizeof(T) + 63) / 64 * 64;
    return p;
  }
};

// Few enough query rows to a key-value head for the forward pass to read keys and values in place.
constexpr int64_t kFew = 4;
inline bool attention_few(const AttentionArgs& a) { return a.H * a.T <= kFew * a.Hkv; }

// The versions for bf16 (attention_bf16.cpp), where the instruction set in force has one.
bool attention_has_bf16(const AttentionArgs& args);
void attention_bf16_fwd(const AttentionArgs& args);
void attention_bf16_bwd(const AttentionArgs& args);  // dq, dk and dv only

}  // namespace fastlm
