// Scaled dot-product attention with an online softmax: no (T, S) matrix reaches memory.
//
// attention_tile.h has the matrix products, packing and masks; attention_fwd.h and attention_bwd.h the two passes,
// attention_few.h the products of decoding. Here 16-bit inputs are widened to fp32 while they are packed;
// attention_bf16.cpp has the kernels for CPUs with bf16 arithmetic.
//
// fp32 at head size 64 takes 77 to 81 % of a Zen 4 thread's peak forward from 1024 keys on; docs/design/attention.md has
// the ladder. What it rests on: the start of a product as a constant of its template keeps the sums in registers; exp2 of a
// closed key's -inf is zeroed afterwards, since scalef would underflow into a microcode assist; a boolean tile's bytes are
// looked at before they are widened; tiles on the diagonal stop at the last keys that their rows reach; dropout selects
// weights by bits and leaves its factor to the output.

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
  for_any_type("attention_fwd", "q", a.type, [&](auto type) { fwd<decltype(type)>(a); });
}
void backward(const AttentionArgs& a) {
  for_any_type("attention_bwd", "q", a.type, [&](auto type) { bwd<decltype(type)>(a); });
}

}  // namespace fastlm::FASTLM_ISA::attention

#else

namespace fastlm {

namespace {

// Elements of a forward task's queries and outputs, 512 KB in fp32.
constexpr int64_t kTaskElements = 1 << 17;

// Whether the kernels of attention_bf16.cpp take the call; tiles and pairs need packed keys, which a few rows do not
// repay. A packed sequence's choice may not depend on its neighbours, so there it is made for all.
bool forward_in_bf16(const AttentionArgs& args) {
  return attention_has_bf16(args) && (args.cu_q || !attention_few(args));
}

void check_types(const char* op, const AttentionArgs& a) {
  if (a.type < 0 || a.type >= kBool) unsupported_type(op, "q", a.type, {0, 1, 2, 3});
  if (a.mask.data && (a.mask.type < 0 || a.mask.type > kBool)) unsupported_type(op, "mask", a.mask.type, {0, 1, 2, 3});
}

AttentionArgs with_tasks(AttentionArgs args, const std::vector<AttentionTask>& tasks) {
  args.tasks = tasks.data();
  args.task_count = (int64_t)tasks.size();
  args.parallel = worth_threads(args);
  return args;
}

}  // namespace

void attention_fwd(const AttentionArgs& args) {
  check_types("attention_fwd", args);
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
  check_types("attention_bwd", args);
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
