// The linear layers in tiles (AMX), linear_tiles.cpp, for linear.cpp and quantized_linear.cpp. Ordinary header, not for
// inclusion in a pass.
#pragma once

#include <cstdint>

namespace fastlm {

// Whether the instruction set in force has tiles.
bool linear_has_tiles();

// linear_fwd with a bf16 weight; x is fp32 or bf16, bias fp32.
void linear_tiles_bf16(const void* x, const void* w, const float* bias, void* y, int64_t M, int64_t N, int64_t K,
                       bool wide_x, bool wide_y);

// quantized_linear_fwd with an int8 weight (N, padded_K).
void linear_tiles_int8(const void* x, const void* w, const void* scale, const float* bias, void* y, int64_t M,
                       int64_t N, int64_t K, int64_t padded_K, int x_type, int y_type);

// Row `row` of x (M, K) as 16-bit integers q; returns what they are multiples of. In quantized_linear.cpp.
float quantize_row(const void* x, int64_t row, int64_t K, int type, int16_t* q);

}  // namespace fastlm
