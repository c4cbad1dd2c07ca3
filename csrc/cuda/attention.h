// Attention's arguments as the bindings fill them in; plain C++. Python has checked shapes and allocated every output
// and workspace.
#pragma once

#include <cstdint>

#include "ops.h"

namespace fastlm::cuda {

// A (B, H, T, D) view whose last dimension is contiguous; strides in elements. Packed sequences have no b.
struct Heads {
  void* data;
  int64_t b, h, t;
};

// A (B, H, T, S) view; broadcast dimensions have stride 0. type: kBool, f32, or the type of q.
struct Mask {
  const void* data;  // null: no mask
  int64_t b, h, t, s;
  int type;
};
constexpr int kBool = 4;

// The gradient of an additive mask of sizes B, H, T and S, each 1 or the scores'. One as large as the scores is of
// `type`, f32 or the type of q, and holds 0 where no query attends; others are f32.
struct MaskGradient {
  void* data;  // contiguous; null: not wanted
  int type;
  float* partial;  // attention_mask_partials() times as many numbers, where there are more than one
  int64_t B, H, T, S;
};

struct AttentionArgs {
  Heads q, k, v, out, dout, dq, dk, dv;  // k and v have Hkv heads; any of dq, dk and dv may be null
  Mask mask;
  float* partial;      // forward's workspace of (B, H, T, attention_splits(), Dv + 2) numbers, null without splits
  float* lse;          // (B, H, T), or (H, T) of packed sequences; null in a forward pass that does not want it
  float* rest;         // what rounding takes from lse, the same; null where that does not matter
  const float* dlse;   // the same, or null
  float* stats;        // backward's workspace: (3, B, H, T), and what Hopper's kernel adds to it
  MaskGradient dmask;
  const int32_t* cu_q;  // (B + 1) first rows of packed sequences, T and S the totals; null for a batch of equal ones
  const int32_t* cu_k;
  int64_t B, H, Hkv, T, S, D, Dv;
  int64_t left, right;  // query i attends to keys i - left to i + right; negative: unlimited
  double scale, softcap, dropout_p;
  Seed seed;
  int type, device;
  void* stream;
};

void attention_fwd(const AttentionArgs& args);
void attention_bwd(const AttentionArgs& args);
// Over how many parts of the keys a forward pass of these sizes, type and window is split; 0 for not at all.
int64_t attention_splits(const AttentionArgs& args);
// Partial sums of a mask's gradient by the sizes, type and device of `args`; 0 where it is as large as the scores.
int64_t attention_mask_partials(const AttentionArgs& args);
// How many floats the workspace of attention_bwd has; plain: without mask, dropout and packed sequences.
int64_t attention_bwd_workspace(int device, int64_t B, int64_t H, int64_t T, int64_t D, int64_t Dv, int type,
                                bool plain);

}  // namespace fastlm::cuda
