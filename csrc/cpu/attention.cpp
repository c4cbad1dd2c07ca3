// Scaled dot-product attention with an online softmax: no (T, S) matrix reaches memory.
//
// attention_tile.h has the matrix products, packing and masks; attention_fwd.h and attention_bwd.h the two passes,
// attention_few.h the products of decoding. Here 16-bit inputs are widened to fp32 while they are packed;
// attention_bf16.cpp has the kernels for CPUs with bf16 arithmetic.
//
// Measured in CPU time of one thread of a Sapphire-Rapids-class core, fp32, head size 64, with freed memory kept (the
// library's GEMM at 187 GFLOP/s): forward 122 to 147 full and 95 to 142 causal, backward 129 to 154 and 91 to 157
// (useful FLOPs); 1.1 to 1.2 times PyTorch's speed on full attention, 1.4 to 2 on causal.
// Of a Zen 4 thread's peak, 116 GFLOP/s, fp32 takes 77 to 81 % forward and 72 to 80 % backward from 1024 keys on.
// - The start of a product as a constant of its template and its loops unrolled early keep the sums in registers, which
//   GCC wrote to the stack around every block: there 1.05 to 1.1 times the speed forward. Rows asked for ahead and tasks
//   of 1024 rows instead of 384 gave 1.05 in bf16.
// - exp2 of a closed key's -inf through scalef underflowed into a microcode assist: zeroing it afterwards instead made
//   causal forward at 256 keys 1.5 times as fast.
// - Looking at a boolean tile's bytes before widening them took a triangular mask from 2.4 to 1.3 times causal's time.
// - Scores, exponentials and masks of a tile on the diagonal stop at the last vector of keys that its rows reach:
//   1.05 times the speed at 256 keys, 1.02 at 512.
// - Dropout takes a causal forward pass of 24 heads of 512 keys, on two threads, to 1.3 times its time in fp32 and
//   1.9 times in bf16: Philox alone is 0.4 ns a weight. Bits that select weights, with the factor left to the output,
//   gave 1.08 and 1.2 times the speed of an array of factors. A soft cap takes it to 1.2 and 1.6 times.
// - Decoding, one query of 12 heads against 1024 keys in cache, two threads: 1.0 times PyTorch's speed in bf16 and 1.1 in
//   fp32, 2.0 and 1.1 for two queries. Sums that stay in registers, bf16 widened in pairs and heads that stay with their
//   thread took bf16 from 93 to 56 us; out of cache memory is the limit of both.

#include "cpu/attention.h"

#include <limits>
#include <utility>

#include "cpu/attention_plan.h"
#include "cpu/ops.h"

#ifndef FASTLM_ISA
#define FASTLM_FILE "cpu/attention.cpp"
#include "cpu/foreach_isa.h"
#endif

#ifdef FASTLM_ISA
#include "cpu/attention_tile.h"
#include "cpu/attention_few.h"
#include "cpu/attention_fwd.h"
#include "cpu/attention_bwd.h"

namespace fastlm::FASTLM_ISA::attention {

void forward(const AttentionArgs& a) {
  switch ((DType)a.type) {
    case DType::f32: return fwd<float>(a);
    case DType::f64: return fwd<double>(a);
    case DType::bf16: return fwd<bf16_t>(a);
    case DType::f16: return fwd<f16_t>(a);
  }
}
void backward(const AttentionArgs& a) {
  switch ((DType)a.type) {
    case DType::f32: return bwd<float>(a);
    case DType::f64: return bwd<double>(a);
    case DType::bf16: return bwd<bf16_t>(a);
    case DType::f16: return bwd<f16_t>(a);
  }
}

}  // namespace fastlm::FASTLM_ISA::attention

#else

#include <cstdlib>
#include <new>

namespace fastlm {

namespace {
struct Kept {
  void* data = nullptr;
  size_t size = 0;
  ~Kept() { std::free(data); }
};
}  // namespace

void* attention_scratch(size_t bytes) {
  thread_local Kept kept;
  if (bytes > kept.size) {
    std::free(kept.data);
    kept.size = (bytes + 4095) / 4096 * 4096;
    kept.data = std::aligned_alloc(4096, kept.size);
    if (!kept.data) {
      kept.size = 0;
      throw std::bad_alloc();
    }
  }
  return kept.data;
}

namespace {

// Elements of a forward task's queries and outputs, 512 KB in fp32.
constexpr int64_t kTaskElements = 1 << 17;

// Whether the kernels of attention_bf16.cpp take the call; tiles and pairs need packed keys, which a few rows do not
// repay. A packed sequence's choice may not depend on its neighbours, so there it is made for all.
bool forward_in_bf16(const AttentionArgs& args) {
  return attention_has_bf16(args) && (args.cu_q || !attention_few(args));
}

AttentionArgs with_tasks(AttentionArgs args, const std::vector<AttentionTask>& tasks) {
  args.tasks = tasks.data();
  args.task_count = (int64_t)tasks.size();
  args.parallel = worth_threads(args);
  return args;
}

}  // namespace

void attention_fwd(const AttentionArgs& args) {
  if (args.B * args.H * args.T == 0) return;
  const bool bf16 = forward_in_bf16(args);
  // A task is so long that packing keys is 1 or 2 % of its arithmetic, and its queries and outputs stay in L2.
  const int64_t most = std::max<int64_t>(kTaskElements / std::max<int64_t>(args.D + args.Dv, 1), 64) / 64 * 64;
  const ForwardGrain grain = bf16 ? ForwardGrain{32, 128, most} : ForwardGrain{12, 48, most / 12 * 12};
  const std::vector<AttentionTask> tasks = plan_forward(args, grain);
  const AttentionArgs planned = with_tasks(args, tasks);
  if (bf16) return attention_bf16_fwd(planned);
  FASTLM_DISPATCH(attention::forward, planned);
}

void attention_bwd(const AttentionArgs& args) {
  if (args.B * args.H == 0) return;
  const bool bf16 = attention_has_bf16(args);
  std::vector<AttentionTask> tasks;
  if (args.inputs) tasks = plan_backward(args, bf16 ? BackwardGrain{64, 128} : BackwardGrain{48, 64});
  AttentionArgs planned = with_tasks(args, tasks);
  if (!bf16) return FASTLM_DISPATCH(attention::backward, planned);
  attention_bf16_bwd(planned);
  planned.task_count = 0;
  if (args.dmask.data) FASTLM_DISPATCH(attention::backward, planned);
}

}  // namespace fastlm
#endif
