// The linear layers in dot products (AVX512_BF16, VNNI), linear_dots.cpp, for linear.cpp and quantized_linear.cpp.
// Ordinary header, not for inclusion in a pass.
#pragma once

#include "cpu/ops.h"

namespace fastlm {

// Whether the instruction set in force has dot products, and no tiles.
bool linear_has_dots();

void linear_dots_bf16(const LinearArgs& args);  // linear_fwd with a bf16 weight; the bias is fp32
void linear_dots_quantized(const QuantizedLinearArgs& args);

}  // namespace fastlm
