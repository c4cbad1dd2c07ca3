// Kernels with one mistake each, and what the emulation says of it.

#include <primitives.cuh>

#include <vector>

namespace fastlm::cuda {

namespace {

// Sums 128 numbers of a block; the barrier is missing for all warps but one.
__global__ void missing_barrier(Global<const float> x, Global<float> out) {
  float* sums = shared_memory<float>();
  const float sum = warp_sum(x[thread_index()]);
  if (lane_index() == 0) sums[warp_index()] = sum;
  if (warp_index() == 0) sync_threads();
  if (thread_index() == 0) out[0] = sums[0] + sums[1] + sums[2] + sums[3];
}

// No barrier at all: a thread reads what its neighbour has not written yet.
__global__ void no_barrier(Global<const float> x, Global<float> out) {
  float* values = shared_memory<float>();
  values[thread_index()] = x[thread_index()];
  out[thread_index()] = values[block_threads() - 1 - thread_index()];
}

__global__ void write_past_the_end(Global<const float> x, Global<float> out) { out[thread_index() + 1] = x[0]; }

__global__ void read_before_the_start(Global<const float> x, Global<float> out) {
  out[thread_index()] = (x - 1)[thread_index()];
}

__global__ void misaligned_load(Global<const float> x, Global<float> out) {
  out[thread_index()] = load<4>(x + 1)[0];
}

__global__ void shared_overflow(Global<const float> x, Global<float> out) {
  shared_memory<float>()[128 + thread_index()] = x[thread_index()];
  sync_threads();
  out[thread_index()] = 0;
}

template <bool WAITS>
__global__ void copy(Global<const float> x, Global<float> out) {
  float* values = shared_memory<float>();
  cp_async<4>(values + thread_index(), x + thread_index());
  cp_async_commit();
  if (WAITS) cp_async_wait<0>();
  out[thread_index()] = values[thread_index()];
  if (!WAITS) cp_async_wait<0>();
}

__global__ void divergent_shuffle(Global<const float> x, Global<float> out) {
  float v = x[thread_index()];
  if (lane_index() < 16)
    v = shuffle_xor(v, 1);
  else
    v = warp_sum(v);
  out[thread_index()] = v;
}

__global__ void half_a_warp(Global<const float> x, Global<float> out) {
  if (lane_index() < 16) out[thread_index()] = shuffle(x[thread_index()], 0);
}

// Each block adds to what the blocks before it have left.
__global__ void depends_on_block_order(Global<const float> x, Global<float> out) {
  if (thread_index() == 0) out[0] = out[0] * 2 + (float)block_index().x * x[0];
}

using Kernel = void (*)(Global<const float>, Global<float>);

const struct {
  const char* name;
  Kernel kernel;
  unsigned blocks;
} kFaults[] = {
    {"missing_barrier", missing_barrier, 2},
    {"no_barrier", no_barrier, 1},
    {"write_past_the_end", write_past_the_end, 1},
    {"read_before_the_start", read_before_the_start, 1},
    {"misaligned_load", misaligned_load, 1},
    {"shared_overflow", shared_overflow, 1},
    {"missing_wait", copy<false>, 1},
    {"right", copy<true>, 1},
    {"divergent_shuffle", divergent_shuffle, 1},
    {"half_a_warp", half_a_warp, 1},
    {"depends_on_block_order", depends_on_block_order, 8},
};

}  // namespace

}  // namespace fastlm::cuda

// The error of the named kernel; "unset values" or "first N" where it ends with a NaN or another value than 1 first.
extern "C" __attribute__((visibility("default"))) const char* fastlm_emulation_fault(const char* name) {
  using namespace fastlm;
  static std::string message;
  message = "no such kernel";
  const std::vector<float> x(128, 1.0f);
  std::vector<float> out(128, 1.0f);
  emulation::Buffers buffers;
  buffers.allow(x.data(), sizeof(float) * x.size());
  buffers.allow(out.data(), sizeof(float) * out.size());
  for (const auto& fault : cuda::kFaults) {
    if (fault.name != std::string(name)) continue;
    try {
      cuda::launch({fault.name, {fault.blocks}, 128, 128 * sizeof(float)}, fault.kernel, x.data(), out.data());
      message.clear();
      for (const float v : out)
        if (v != v) message = "unset values";
      if (message.empty() && out[0] != 1) message = "first " + std::to_string(out[0]);
    } catch (const std::exception& error) {
      message = error.what();
    }
  }
  return message.c_str();
}
