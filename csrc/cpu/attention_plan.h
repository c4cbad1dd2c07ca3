// How a call's work is divided into tasks. Results do not depend on it. Ordinary header, not for inclusion in a pass.
#pragma once

#include <vector>

#include "cpu/attention.h"

namespace fastlm {

// Rows of a task of the forward pass: a multiple of `unit`, about `most` where there are enough of them, and `least` or
// more where the threads would otherwise have too few tasks.
struct ForwardGrain {
  int64_t unit, least, most;
};
std::vector<AttentionTask> plan_forward(const AttentionArgs& args, const ForwardGrain& grain);

// Whole heads, or ranges of keys and of rows (multiples of these) where heads are too few or too unequal.
struct BackwardGrain {
  int64_t rows, keys;
};
std::vector<AttentionTask> plan_backward(const AttentionArgs& args, const BackwardGrain& grain);

// Whether the work repays waking the other threads.
bool worth_threads(const AttentionArgs& args);

}  // namespace fastlm
