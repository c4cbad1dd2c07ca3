// What one step of GPT decoding reads and writes; fastlm/inference/decoder.py fills these in, in this order, as int64.
#pragma once

#include <cstdint>

namespace fastlm {

struct DecodeLinear {
  const void* weight;  // (out, in)
  const void* scale;   // quantized weights only
  const float* bias;   // (out), or null
  int64_t out, in, padded_in;
  int64_t type;   // a DType, or kQuantized
  int64_t group;  // of quantized weights; 0 for int8
};
constexpr int64_t kQuantized = 4;

struct DecodeNorm {
  const float *weight, *bias;  // (C)
};

struct DecodeLayer {
  DecodeNorm norm_1;
  DecodeLinear qkv, attention_out;
  DecodeNorm norm_2;
  DecodeLinear up, down;  // the bias of `up` is added inside the GELU
  void *keys, *values;    // (B, H, S, D) of cache_type
};

struct DecodeModel {
  int64_t B, C, H, hidden;  // rows, width, heads, width of the MLP
  int64_t cache_length;     // positions that keys and values have room for
  int64_t cache_type, layers;
  const DecodeLayer* layer;
  DecodeNorm norm_last;
  DecodeLinear head;
  float *x, *normed, *product, *logits;  // (B, C), (B, C), (B, max(3 C, hidden)), (B, V)
  void* attention;                       // (2, B, C) of cache_type
};

// x: (B, C) embeddings of the tokens at `position`, overwritten; logits are written, keys and values appended.
void decode_step(const DecodeModel& model, int64_t position, double eps);

}  // namespace fastlm
