// Attention on bf16 with the CPU's own bf16 arithmetic: tiles (AMX) or dot products of pairs (AVX512-BF16). The
// algorithm is attention_fwd.h's and attention_bwd.h's; weights and their gradients are rounded to bf16 for the second
// products, sums are fp32.
//
// The tiles leave so little time that exponentials weigh as much as products: sixteen rows share one reduction of
// their maxima, the exponential is as short as bf16 allows, and the outputs are rescaled only where a maximum moved.
//
// 256 keys at a time, and in a backward block the columns that padding closes are left out: with tiles forward 1.1 to 2
// times PyTorch's speed, backward 3.2 to 4.7 times (docs/design/attention.md).
// Intel's cores issue dot products of pairs at less than half the rate that would pay, so an Intel CPU without tiles takes
// the fp32 kernels unless FASTLM_CPU_ISA says otherwise.

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
