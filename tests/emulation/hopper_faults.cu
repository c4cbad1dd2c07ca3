// A product of two tiles on the emulated instructions of Hopper, right or with one mistake, and what is said of it.
#include <hopper.cuh>

namespace fastlm::cuda {
namespace {

enum class Fault {
  none,
  no_barrier_wait,
  wrong_parity,
  too_many_bytes,
  unpublished_barrier,
  no_wgmma_wait,
  no_wgmma_fence,
  operand_overwritten,
  wrong_stride,
  unaligned_panel,
  half_a_warpgroup,
  too_many_registers,
};
const char* const kNames[] = {
    "none",
    "no barrier wait",
    "wrong parity",
    "too many bytes expected",
    "unpublished barrier",
    "no wgmma wait",
    "no wgmma fence",
    "operand overwritten",
    "wrong stride",
    "unaligned panel",
    "half a warpgroup",
    "too many registers",
};

constexpr int kM = 64, kN = 128, kK = kPanelColumns;

struct Shared {
  bf16 b[kN][kK];
  bf16 a[kM][kK];
  bf16 spare[8][kK];
  Barrier full;
};

// out (64, 128) = a (64, 64) b (128, 64)^T by one warpgroup.
__global__ void product(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, Global<float> out,
                        Fault fault) {
  Shared& tile = *shared_memory<Shared>();
  bf16* const left = &tile.a[0][0] + (fault == Fault::unaligned_panel ? kK : 0);
  if (thread_index() == 0) {
    barrier_init(&tile.full, 1);
    if (fault != Fault::unpublished_barrier) publish_barriers();
    barrier_expect(&tile.full, (int)(sizeof(tile.a) + sizeof(tile.b)) + (fault == Fault::too_many_bytes ? 16 : 0));
    copy_panel(left, a, &tile.full, 0, 0, 0, 0);
    copy_panel(tile.b, b, &tile.full, 0, 0, 0, 0);
  }
  sync_threads();
  if (fault == Fault::too_many_registers) take_registers<240>();  // nobody has given any
  if (fault != Fault::no_barrier_wait) barrier_wait(&tile.full, fault == Fault::wrong_parity ? 1 : 0);
  float c[1][kN / 8][4] = {};
  if (fault == Fault::half_a_warpgroup && thread_index() >= kWarpgroup / 2) return;
  if (fault != Fault::no_wgmma_fence) wgmma_fence();
  const int stride = (fault == Fault::wrong_stride ? 4 : 8) * kPanelRowBytes;
  for (int k = 0; k < kK; k += 16)
    wgmma_rows<bf16, true>(c, wgmma_descriptor(left + k, 16, stride), wgmma_descriptor(&tile.b[0][k], 16, stride));
  wgmma_commit();
  if (fault == Fault::operand_overwritten && thread_index() == 0) tile.a[0][0].bits ^= 1;
  if (fault != Fault::no_wgmma_wait) wgmma_wait<0>();
  const int row = warp_index() * 16 + lane_index() / 4, column = lane_index() % 4 * 2;
  for (int n = 0; n < kN / 8; ++n)
    for (int e = 0; e < 4; ++e) out[(row + e / 2 * 8) * kN + 8 * n + column + e % 2] = c[0][n][e];
  if (fault == Fault::no_wgmma_wait) wgmma_wait<0>();
}

std::vector<bf16> matrix(int rows, int factor) {
  std::vector<bf16> x;
  for (int i = 0; i < rows * kK; ++i) x.push_back(from_float<bf16>((float)(i / kK * factor % 7 + i % 5 - 4)));
  return x;
}

std::string run(Fault fault) {
  const std::vector<bf16> a = matrix(kM, 3), b = matrix(kN, 5);
  std::vector<float> out(kM * kN, -1.0f);
  emulation::Buffers buffers;
  buffers.allow(a.data(), sizeof(bf16) * a.size());
  buffers.allow(b.data(), sizeof(bf16) * b.size());
  buffers.allow(out.data(), sizeof(float) * out.size());
  try {
    launch({"product", {}, fault == Fault::too_many_registers ? 3 * kWarpgroup : kWarpgroup, sizeof(Shared)}, product,
           tensor_map<bf16>(a.data(), {kK, kM, 1, 1}, {2 * kK, 16, 16}, kM),
           tensor_map<bf16>(b.data(), {kK, kN, 1, 1}, {2 * kK, 16, 16}, kN), Global<float>(out.data()), fault);
  } catch (const std::exception& error) {
    return error.what();
  }
  for (int row = 0; row < kM; ++row)
    for (int column = 0; column < kN; ++column) {
      float sum = 0;
      for (int k = 0; k < kK; ++k)
        sum += to_float(a[(size_t)(row * kK + k)]) * to_float(b[(size_t)(column * kK + k)]);
      if (out[(size_t)(row * kN + column)] != sum) return "wrong values";
    }
  return "";
}

}  // namespace
}  // namespace fastlm::cuda

// What the emulation says of the product with the named mistake; empty where it is right.
extern "C" __attribute__((visibility("default"))) const char* fastlm_emulation_hopper_fault(const char* name) {
  static std::string message;
  message = "no such fault";
  for (int i = 0; i < (int)(sizeof fastlm::cuda::kNames / sizeof *fastlm::cuda::kNames); ++i)
    if (std::string(fastlm::cuda::kNames[i]) == name) message = fastlm::cuda::run((fastlm::cuda::Fault)i);
  return message.c_str();
}
