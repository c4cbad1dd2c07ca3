// Blocks that add a product to one matrix in turns, on the emulated instructions of Hopper: right or with one mistake,
// and what is said of it.
#include <hopper.cuh>
#include <matrix.cuh>

namespace fastlm::cuda {
namespace {

enum class Fault { none, matrices_not_fenced, numbers_not_fenced, count_set_early, source_overwritten, no_such_turn };
const char* const kNames[] = {
    "none",
    "matrices not fenced",
    "numbers not fenced",
    "count set before the copy is waited for",
    "source of a bulk copy overwritten",
    "a turn that never comes",
};

constexpr int kSize = kPanelColumns, kBlocks = 3;

struct Shared {
  bf16 a[kSize][kSize], b[kSize][kSize];
  float sums[kSize * kSize];
  Barrier full;
  int ticket;
};

float element(int row, int column) { return (float)(row * 3 % 7 + column % 5 - 4); }

// out += (ticket + 1) a^T b for each block, where a = b + 1; counters are the ticket and whose turn it is.
__global__ void add_product(const __grid_constant__ TensorMap b, Global<float> out, Global<int> counters, Fault fault) {
  Shared& tile = *shared_memory<Shared>();
  if (thread_index() == 0) {
    barrier_init(&tile.full, 1);
    publish_barriers();
    barrier_expect(&tile.full, (int)sizeof(tile.b));
    copy_panel(tile.b, b, &tile.full, 0, 0, 0, 0);
    tile.ticket = take_ticket(counters);
  }
  sync_threads();
  const int lane = lane_index(), ticket = tile.ticket;
  for (int column = 0; column < kSize; column += 16) {
    uint32_t word[4];
    for (int i = 0; i < 4; ++i) {
      const int row = warp_index() * 16 + i % 2 * 8 + lane / 4, first = column + i / 2 * 8 + lane % 4 * 2;
      const float scale = (float)(ticket + 1);
      word[i] = packed<bf16>(scale * (element(row, first) + 1), scale * (element(row, first + 1) + 1));
    }
    const int row = warp_index() * 16 + lane % 16;
    store_matrices(&tile.a[row][((column / 8 + lane / 16) ^ row % 8) * 8], word);
  }
  if (fault != Fault::matrices_not_fenced || thread_index() != 77) fence_async();
  sync_threads();
  barrier_wait(&tile.full, 0);

  float c[1][kSize / 8][4] = {};
  wgmma_fence();
  for (int k = 0; k < kSize; k += 16)
    wgmma_columns<bf16, true>(c, wgmma_descriptor(tile.a[k], 16, 8 * kPanelRowBytes),
                              wgmma_descriptor(tile.b[k], 16, 8 * kPanelRowBytes));
  wgmma_commit();
  wgmma_wait<0>();
  for (int n = 0; n < kSize / 8; ++n) store_numbers(&tile.sums[(n * kWarpgroup + thread_index()) * 4], c[0][n]);
  if (fault != Fault::numbers_not_fenced || thread_index() != 77) fence_async();
  sync_threads();
  if (thread_index() != 0) return;
  const Global<int> turn = counters + 1;
  await_count(turn, fault == Fault::no_such_turn ? kBlocks : ticket);
  ticket == 0 ? bulk_store(out, tile.sums, (int)sizeof(tile.sums)) : bulk_add(out, tile.sums, (int)sizeof(tile.sums));
  bulk_commit();
  if (fault == Fault::source_overwritten) tile.sums[5] = 0;
  if (fault != Fault::count_set_early) bulk_wait<0>();
  set_count(turn, ticket + 1);
}

std::string run(Fault fault) {
  std::vector<bf16> b;
  for (int i = 0; i < kSize * kSize; ++i) b.push_back(from_float<bf16>(element(i / kSize, i % kSize)));
  std::vector<float> out(kSize * kSize + 4, -1.0f);
  float* const place = out.data() + (16 - reinterpret_cast<uintptr_t>(out.data()) % 16) % 16 / sizeof(float);
  int counters[2] = {};
  emulation::Buffers buffers;
  buffers.allow(b.data(), sizeof(bf16) * b.size());
  buffers.allow(place, sizeof(float) * kSize * kSize);
  buffers.allow(counters, sizeof counters);
  try {
    launch({"add_product", {kBlocks}, kWarpgroup, sizeof(Shared)}, add_product,
           tensor_map<bf16>(b.data(), {kSize, kSize, 1, 1}, {2 * kSize, 16, 16}, kSize), Global<float>(place),
           Global<int>(counters), fault);
  } catch (const std::exception& error) {
    return error.what();
  }
  for (int i = 0; i < kSize * kSize; ++i) {
    const int n = i / 4 / kWarpgroup, thread = i / 4 % kWarpgroup, e = i % 4;
    const int row = thread / 32 * 16 + thread % 32 / 4 + e / 2 * 8, column = 8 * n + thread % 4 * 2 + e % 2;
    float sum = 0;
    for (int k = 0; k < kSize; ++k) sum += (element(k, row) + 1) * element(k, column);
    if (place[i] != sum * (kBlocks * (kBlocks + 1) / 2)) return "wrong values";
  }
  return "";
}

}  // namespace
}  // namespace fastlm::cuda

// What the emulation says of the sum with the named mistake; empty where it is right.
extern "C" __attribute__((visibility("default"))) const char* fastlm_emulation_turn_fault(const char* name) {
  static std::string message;
  message = "no such fault";
  for (int i = 0; i < (int)(sizeof fastlm::cuda::kNames / sizeof *fastlm::cuda::kNames); ++i)
    if (std::string(fastlm::cuda::kNames[i]) == name) message = fastlm::cuda::run((fastlm::cuda::Fault)i);
  return message.c_str();
}
