// Attention's arguments, as the bindings fill them in. Ordinary header, not for inclusion in a pass.
#pragma once

#include <algorithm>

#include "cpu/isa.h"
#include "cpu/scratch.h"

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

// One thread's share: rows [first, first + count) of a key-value head (those of all heads of its group, one after the
// other) of sequence b. In a backward pass: dQ of these rows (if dq) and dK, dV of the keys [j_first, j_end) (if dkv).
struct AttentionTask {
  int64_t b, kv_head, first, count, j_first, j_end;
  bool dq, dkv;
};

constexpr int64_t kUnlimited = int64_t(1) << 40;

struct AttentionArgs {
  Heads q, k, v, out, dout, dq, dk, dv;  // k and v have Hkv heads; dq, dk and dv only where `inputs`
  Mask mask, dmask;                      // dmask: contiguous, compute type, sizes in dmask_sizes; may be null
  void* lse;                             // (B, H, T), compute type; null in a forward pass that does not want it
  void* rest;                            // what its rounding took away, the same; null where that does not matter
  const void* dlse;                      // the same, or null
  int64_t dmask_sizes[4];
  int64_t B, H, Hkv, T, S, D, Dv;
  double scale, dropout_p;
  int64_t seed;
  int64_t left = kUnlimited, right = kUnlimited;  // query i attends keys i - left to i + right
  double softcap;                        // scores become softcap tanh(score / softcap); 0: they stay
  bool inputs;
  int type;
  const int32_t *cu_q, *cu_k;            // packed sequences: the first row of each of B, and T and S last; else null
  int64_t row, row_stride;               // row i of head h is number h row_stride + row + i, in lse and for dropout
  const AttentionTask* tasks;
  int64_t task_count;
  bool parallel;
};

// Keys [begin, end) that query i attends, by its position alone.
struct KeyRange {
  int64_t begin, end;
};
inline KeyRange attention_keys(const AttentionArgs& a, int64_t i) {
  const int64_t begin = std::min(a.S, std::max<int64_t>(0, i - a.left));
  return {begin, std::max(begin, std::min(a.S, i + a.right + 1))};
}

// Sequence b alone, as its kernels see it: B = 1, every pointer at its first row.
AttentionArgs attention_sequence(const AttentionArgs& all, int64_t b);

// Few enough query rows to a key-value head for the forward pass to read keys and values in place.
constexpr int64_t kFew = 4;
inline bool attention_few(const AttentionArgs& a) { return a.H * a.T <= kFew * a.Hkv; }

// The versions for bf16 (attention_bf16.cpp), where the instruction set in force has one.
bool attention_has_bf16(const AttentionArgs& args);
void attention_bf16_fwd(const AttentionArgs& args);
void attention_bf16_bwd(const AttentionArgs& args);  // dq, dk and dv only

}  // namespace fastlm
