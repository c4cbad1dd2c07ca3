// Attention on bf16 with the CPU's own bf16 arithmetic: tiles (AMX) or dot products of pairs (AVX512-BF16). The
// algorithm is attention_fwd.h's and attention_bwd.h's; weights and their gradients are rounded to bf16 for the second
// products, sums are fp32.
//
// The tiles leave so little time that exponentials weigh as much as products: sixteen rows share one reduction of
// their maxima, the exponential is as short as bf16 allows, and the outputs are rescaled only where a maximum moved.
//
// Measured as in attention.cpp, tiles (the library's GEMM at 1350 GFLOP/s, fp32 attention at 150): forward 353 to 621
// full and 224 to 544 causal, 1.1 to 2 times PyTorch's speed; backward 235 to 654, 3.2 to 4.7 times.
// - 256 keys at a time instead of 128: 15 % on the forward pass; 512 is slower, as the scores leave L1.
// - At 256 keys: maxima for sixteen rows at once 1.3 times; before it, the exp2 without underflow together with
//   prefetching the rows of a fused projection 1.5 times.
// - Outputs converted 32 at a time and never filled with zeros: 1.05 times at 256 keys, 1.11 with heads of 128.
//   Multiplying a group's values only after the next group's scores, so that no product loads what has just been
//   stored, gave nothing.
// - Leaving out of a backward span the columns that padding closes: 1.15 times at 256 keys, 64 of them closed.
// - Dot products of pairs reach only 95 GFLOP/s on that core, whose fp32 kernel is faster; their place is a CPU that
//   issues them at full rate. So an Intel CPU without tiles takes the fp32 kernels unless FASTLM_CPU_ISA says otherwise.

#include "cpu/attention.h"

#include <limits>
#include <utility>

#include "cpu/ops.h"

#ifndef FASTLM_ISA
#define FASTLM_FILE "cpu/attention_bf16.cpp"
#define FASTLM_WANT_BF16
#include "cpu/foreach_isa.h"
#endif

#ifdef FASTLM_ISA
#if FASTLM_ISA_LEVEL >= 3
#include "cpu/attention_tile.h"
#include "cpu/attention_pairs.h"
#include "cpu/attention_bf16_fwd.h"
#include "cpu/attention_bf16_bwd.h"
#endif
#else

namespace fastlm {

#if FASTLM_X86
bool attention_has_bf16(const AttentionArgs& args) {
  if (args.type != (int)DType::bf16 || isa() < Isa::avx512_bf16) return false;
  // Intel's cores issue dot products of pairs at less than half the rate that would pay: see above.
  return isa() == Isa::amx || isa_chosen() || !is_intel();
}
void attention_bf16_fwd(const AttentionArgs& args) {
  isa() == Isa::amx ? amx::attention::fwd_bf16(args) : avx512_bf16::attention::fwd_bf16(args);
}
void attention_bf16_bwd(const AttentionArgs& args) {
  isa() == Isa::amx ? amx::attention::bwd_bf16(args) : avx512_bf16::attention::bwd_bf16(args);
}
#else
bool attention_has_bf16(const AttentionArgs&) { return false; }
void attention_bf16_fwd(const AttentionArgs&) {}
void attention_bf16_bwd(const AttentionArgs&) {}
#endif

}  // namespace fastlm
#endif
