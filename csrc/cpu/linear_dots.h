// The linear layers in dot products (AVX512_BF16, VNNI), linear_dots.cpp, for linear.cpp and quantized_linear.cpp.
// Ordinary header, not for inclusion in a pass.
#pragma once

#include <cstdint>

namespace fastlm {

// Whether the instruction set in force has dot products, and no tiles.
bool linear_has_dots();

// linear_fwd with a bf16 weight; x is fp32 or bf16, bias fp32.
void linear_dots_bf16(const void* x, const void* w, const float* bias, void* y, int64_t M, int64_t N, int64_t K,
                      bool wide_x, bool wide_y);

// quantized_linear_fwd.
void linear_dots_quantized(const void* x, const void* w, const void* scale, const float* bias, void* y, int64_t M,
                           int64_t N, int64_t K, int64_t padded_K, int64_t group, int x_type, int y_type);

}  // namespace fastlm
