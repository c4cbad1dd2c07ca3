// The linear layers in tiles (AMX), linear_tiles.cpp, for linear.cpp and quantized_linear.cpp. Ordinary header, not for
// inclusion in a pass.
#pragma once

#include "cpu/ops.h"

namespace fastlm {

// Whether the instruction set in force has tiles.
bool linear_has_tiles();

void linear_tiles_bf16(const LinearArgs& args);           // linear_fwd with a bf16 weight; the bias is fp32
void linear_tiles_int8(const QuantizedLinearArgs& args);  // group is 0

// Row `row` of x (M, K) as 16-bit integers q; returns what they are multiples of. In quantized_linear.cpp.
float quantize_row(const void* x, int64_t row, int64_t K, int type, int16_t* q);

}  // namespace fastlm
