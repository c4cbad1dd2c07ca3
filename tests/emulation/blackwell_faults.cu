// Two products in a row on the emulated instructions of Blackwell, right or with one mistake, and what is said of it.
#include <blackwell.cuh>

namespace fastlm::cuda {
namespace {

enum class Fault {
  none,
  no_product_wait,
  no_commit,
  no_load_wait,
  not_published,
  not_waited_for,
  stored_under_a_product,
  operand_overwritten,
  descriptor_of_hopper,
  wrong_stride,
  wrong_major,
  wrong_lanes,
  past_the_columns,
  not_allocated,
  not_freed,
  freed_too_early,
  two_issuers,
  half_a_warp,
};
const char* const kNames[] = {
    "none",
    "no wait for a product",
    "no commit",
    "no wait for a load",
    "weights not published",
    "stores not waited for",
    "a store under a product",
    "operand overwritten",
    "a descriptor of Hopper",
    "wrong stride",
    "wrong major",
    "lanes of another warp",
    "past the last column",
    "not allocated",
    "not freed",
    "freed too early",
    "two threads issue",
    "half a warp",
};

constexpr int kRows = 128, kK = kPanelColumns, kScores = 0, kOut = 128;

struct Shared {
  bf16 a[kRows][kK], b[kRows][kK], c[kRows][kK];
  Barrier full, scores_full, weights_full, out_full;
  uint32_t tensor;
};

// out (128, 64) = (a (128, 64) b (128, 64)^T / 4) c (128, 64): the first product's sums, rounded, are the second's left
// operand.
__global__ void products(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b,
                         const __grid_constant__ TensorMap c, Global<float> out, Fault fault) {
  Shared& tile = *shared_memory<Shared>();
  const bool allocates = warp_index() == 3;
  if (thread_index() == 0) {
    barrier_init(&tile.full, 1), barrier_init(&tile.scores_full, 1), barrier_init(&tile.out_full, 1);
    barrier_init(&tile.weights_full, kWarpgroup);
    publish_barriers();
    barrier_expect(&tile.full, 3 * (int)sizeof(tile.a));
    copy_panel(tile.a, a, &tile.full, 0, 0, 0, 0);
    copy_panel(tile.b, b, &tile.full, 0, 0, 0, 0);
    copy_panel(tile.c, c, &tile.full, 0, 0, 0, 0);
  }
  if (allocates && fault == Fault::not_allocated) tile.tensor = 0;
  if (allocates && fault != Fault::not_allocated) tensor_alloc(&tile.tensor);
  tensor_fence_before();
  sync_threads();
  tensor_fence_after();
  const uint32_t tensor = tile.tensor;
  const auto descriptor = [&](const bf16* start, int leading) {
    const int stride = (fault == Fault::wrong_stride ? 4 : 8) * kPanelRowBytes;
    return fault == Fault::descriptor_of_hopper ? wgmma_descriptor(start, leading, stride)
                                                : umma_descriptor(start, leading, stride);
  };
  if (thread_index() == 0) {
    barrier_wait(&tile.full, 0);
    for (int k = 0; k < kK; k += 16)
      umma_shared(tensor + (fault == Fault::past_the_columns ? kTensorColumns - 64 : kScores),
                  descriptor(&tile.a[0][k], 16), descriptor(&tile.b[0][k], 16), umma_instruction<bf16, 128, false>(),
                  k > 0);
    if (fault != Fault::no_commit) umma_commit(&tile.scores_full);
    if (fault == Fault::operand_overwritten) tile.a[5][7].bits ^= 1;
  }
  const int warp_row = warp_index() * kWarp, row = thread_index();
  const uint32_t mine = tensor + ((uint32_t)(fault == Fault::wrong_lanes ? 0 : warp_row) << 16);
  if (fault == Fault::stored_under_a_product) {
    const uint32_t word[16] = {};
    sync_threads();
    tensor_store(mine + kScores, word);
  }
  if (fault == Fault::no_product_wait)
    sync_threads();
  else
    wait_tensor(&tile.scores_full, 0);
  if (fault == Fault::half_a_warp && lane_index() >= kWarp / 2) return;
  float scores[4][32];
  for (int i = 0; i < 4; ++i) tensor_load(scores[i], mine + kScores + 32 * i);
  if (fault != Fault::no_load_wait) tensor_wait_loads(scores);
  uint32_t word[4][16];
  for (int i = 0; i < 64; ++i)
    word[i / 16][i % 16] = packed<bf16>(scores[i / 16][i % 16 * 2] / 4, scores[i / 16][i % 16 * 2 + 1] / 4);
  if (fault == Fault::no_load_wait) tensor_wait_loads(scores);
  for (int i = 0; i < 4; ++i) tensor_store(mine + kScores + 16 * i, word[i]);
  if (fault == Fault::not_waited_for) tensor_fence_before();
  if (fault != Fault::not_published && fault != Fault::not_waited_for) tensor_publish();
  barrier_arrive(&tile.weights_full);
  if (thread_index() == (fault == Fault::two_issuers ? 32 : 0)) {
    wait_tensor(&tile.weights_full, 0);
    for (int k = 0; k < kRows; k += 16)
      umma_tensor(
          tensor + kOut, tensor + kScores + k / 2, descriptor(tile.c[k], (int)sizeof(tile.c)),
          fault == Fault::wrong_major ? umma_instruction<bf16, kK, false>() : umma_instruction<bf16, kK, true>(),
          k > 0);
    umma_commit(&tile.out_full);
  }
  if (fault == Fault::freed_too_early) {
    sync_threads();
    if (allocates) tensor_free(tensor);
    sync_threads();
  }
  wait_tensor(&tile.out_full, 0);
  float sums[2][32];
  for (int i = 0; i < 2; ++i) tensor_load(sums[i], mine + kOut + 32 * i);
  tensor_wait_loads(sums);
  for (int i = 0; i < kK; ++i) out[row * kK + i] = sums[i / 32][i % 32];
  tensor_fence_before();
  sync_threads();
  tensor_fence_after();
  if (allocates && fault != Fault::not_freed) tensor_free(tensor);
}

// Small integers: products and their quarters are exact but for the rounding to bf16.
std::vector<bf16> matrix(int factor) {
  std::vector<bf16> x;
  for (int i = 0; i < kRows * kK; ++i) x.push_back(from_float<bf16>((float)(i / kK * factor % 7 + i % 5 - 4)));
  return x;
}

std::string run(Fault fault) {
  const std::vector<bf16> a = matrix(3), b = matrix(5), c = matrix(2);
  std::vector<float> out(kRows * kK, -1.0f);
  emulation::Buffers buffers;
  for (const auto* x : {&a, &b, &c}) buffers.allow(x->data(), sizeof(bf16) * x->size());
  buffers.allow(out.data(), sizeof(float) * out.size());
  const auto map = [](const std::vector<bf16>& x) {
    return tensor_map<bf16>(x.data(), {kK, kRows, 1, 1}, {2 * kK, 16, 16}, kRows);
  };
  blackwell::Memory::left_held().clear();
  try {
    launch({"products", {}, kWarpgroup, sizeof(Shared)}, products, map(a), map(b), map(c), Global<float>(out.data()),
           fault);
  } catch (const std::exception& error) {
    return error.what();
  }
  if (!blackwell::Memory::left_held().empty()) return blackwell::Memory::left_held() + " left tensor memory allocated";
  const auto value = [](const std::vector<bf16>& x, int row, int column) {
    return to_float(x[(size_t)(row * kK + column)]);
  };
  for (int row = 0; row < kRows; ++row) {
    float weights[kRows];
    for (int j = 0; j < kRows; ++j) {
      float score = 0;
      for (int k = 0; k < kK; ++k) score += value(a, row, k) * value(b, j, k);
      weights[j] = to_float(from_float<bf16>(score / 4));
    }
    for (int column = 0; column < kK; ++column) {
      float sum = 0;
      for (int j = 0; j < kRows; ++j) sum += weights[j] * value(c, j, column);
      if (out[(size_t)(row * kK + column)] != sum) return "wrong values";
    }
  }
  return "";
}

}  // namespace
}  // namespace fastlm::cuda

extern "C" {
// What the emulation says of the products with the named mistake; empty where they are right.
__attribute__((visibility("default"))) const char* fastlm_emulation_blackwell_fault(const char* name) {
  static std::string message;
  message = "no such fault";
  for (int i = 0; i < (int)(sizeof fastlm::cuda::kNames / sizeof *fastlm::cuda::kNames); ++i)
    if (std::string(fastlm::cuda::kNames[i]) == name) message = fastlm::cuda::run((fastlm::cuda::Fault)i);
  return message.c_str();
}
// How many blocks have used tensor memory and freed it so far.
__attribute__((visibility("default"))) int64_t fastlm_emulation_blackwell_blocks() {
  return fastlm::cuda::blackwell::Memory::freed();
}
}
