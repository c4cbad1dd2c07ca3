// Instructions of sm_90a: mbarriers, tiles copied by the tensor memory accelerator (TMA), bulk copies and sums to global
// memory, products of a warpgroup (wgmma), registers handed from one warpgroup to another, turns of blocks.
// tests/emulation/hopper.cuh has the same names for a CPU.
//
// Encodings, by the PTX ISA (sections "Matrix Descriptor Format" and "Shared Memory Matrix Layout" of wgmma):
//   Tiles lie in shared memory as panels of 64 16-bit columns: rows of 128 bytes whose 16-byte chunk c is stored at
//   c ^ (row % 8), as TMA's 128-byte swizzle writes them. Panels start at multiples of 1024 bytes.
//   A descriptor has the start address / 16 in bits 0 to 13, the leading offset / 16 in 16 to 29, the stride offset /
//   16 in 32 to 45, a base offset of 0 in 49 to 51, and the swizzle in 62 and 63: 1 for 128 bytes.
//   Rows are m or n, columns k (K-major): the stride offset is from 8 rows to the next, the leading one is not used.
//   Rows are k, columns n (MN-major): the stride offset is from 8 rows to the next, the leading one from 64 columns to
//   the next, that is, from panel to panel.
//   The swizzle is of address bits, so the next 16 columns of K-major operands start 32 bytes further.
//   The accumulators (64, N) of a warpgroup: warp w has rows 16 w to 16 w + 15, each as mma.m16n8k16's (matrix.cuh);
//   the left operand in registers likewise.
//
// What the emulation does not show: that hardware decodes descriptors, and the driver tensor maps, as read here; fences
// between the generic and the asynchronous proxy except after barriers are made and after store_matrices and
// store_numbers; the memory model (all threads run on one processor, in turns, and blocks one after the other); how
// hardware rounds the sums of a product; what the compiler does with registers that an asynchronous product still uses,
// or with setmaxnreg; speed. Nothing here has run on a GPU.
#pragma once

#include <primitives.cuh>

#include <cuda.h>

// Whether this pass of the compiler may use the instructions.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define FASTLM_SM90A 1
#else
#define FASTLM_SM90A 0
#endif

namespace fastlm::cuda {

constexpr int kWarpgroup = 128;
constexpr int kPanelColumns = 64, kPanelRowBytes = 128;

// For kernels that were not compiled for the GPU they run on: an error instead of a wrong result.
FASTLM_DEVICE void refuse_to_run() { __trap(); }

// mbarriers count arrivals and bytes; each time all of a phase have come, the next phase begins.
using Barrier = uint64_t;

FASTLM_DEVICE void barrier_init(Barrier* b, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(arrivals) : "memory");
}
// Shows new barriers to the copy engine; a sync_threads shows them to the block.
FASTLM_DEVICE void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}
FASTLM_DEVICE void barrier_arrive(Barrier* b) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(b)) : "memory");
}
// Arrives, and has the phase wait for so many bytes more.
FASTLM_DEVICE void barrier_expect(Barrier* b, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes)
               : "memory");
}
// Waits for the end of the phase of this parity: 0 for the first phase, 1 for the second, and so on. The phase before
// the first counts as ended.
FASTLM_DEVICE void barrier_wait(Barrier* b, int parity) {
  uint32_t done = 0;
  while (!done)
    asm volatile("{\n.reg .pred done;\nmbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
                 "selp.u32 %0, 1, 0, done;\n}"
                 : "=r"(done)
                 : "r"(shared_address(b)), "r"(parity)
                 : "memory");
}

// How TMA finds a tile of a tensor (batch, head, row, column).
using TensorMap = CUtensorMap;

// The driver's encoder of tensor maps, null without a driver that has it: the module does not link with the driver.
inline auto tensor_map_encoder() {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    const auto error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault,
                                                        &result);
#else
    const auto error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? (Encode)found : nullptr;
  }();
  return encode;
}
inline bool has_tensor_maps() { return tensor_map_encoder() != nullptr; }

// Of 16-bit elements, for tiles of `rows` rows and one panel; size: columns, rows, heads, batch; stride: bytes from row
// to row, head to head, batch to batch.
template <class T>
TensorMap tensor_map(const void* data, const int64_t (&size)[4], const int64_t (&stride)[3], int rows) {
  static_assert(sizeof(T) == 2);
  const cuuint64_t sizes[4] = {(cuuint64_t)size[0], (cuuint64_t)size[1], (cuuint64_t)size[2], (cuuint64_t)size[3]};
  const cuuint64_t strides[3] = {(cuuint64_t)stride[0], (cuuint64_t)stride[1], (cuuint64_t)stride[2]};
  const cuuint32_t box[4] = {kPanelColumns, (cuuint32_t)rows, 1, 1}, steps[4] = {1, 1, 1, 1};
  const auto type = std::is_same_v<T, bf16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  TensorMap map;
  const CUresult result = tensor_map_encoder()(
      &map, type, 4, const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string((int)result));
  return map;
}

// Has TMA write a panel of a tile to shared memory and report its bytes to the barrier; what lies outside of the tensor
// becomes 0, and counts. One thread calls.
FASTLM_DEVICE void copy_panel(void* to, const TensorMap& map, Barrier* b, int column, int row, int head, int batch) {
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
               "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared_address(to)),
               "l"(&map), "r"(shared_address(b)), "r"(column), "r"(row), "r"(head), "r"(batch)
               : "memory");
}

// What threads write for products and copies to read goes through these two and a fence_async of each writing thread
// before the barrier that tells of it.
// Four 8 x 8 matrices of 16-bit elements, spread over the warp as ldmatrix's are; lane 8 i + r gives the place of row r
// of matrix i, 16 bytes.
FASTLM_DEVICE void store_matrices(void* row, const uint32_t (&word)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
               "r"(word[0]), "r"(word[1]), "r"(word[2]), "r"(word[3])
               : "memory");
}
FASTLM_DEVICE void store_numbers(float* to, const float (&x)[4]) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(to)), "f"(x[0]), "f"(x[1]), "f"(x[2]),
               "f"(x[3])
               : "memory");
}
FASTLM_DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Has the copy engine write `bytes` bytes, a multiple of 16, to global memory, or add so many fp32 numbers to what is
// there. One thread calls; those since its last commit form a group. wait_read returns when its groups need shared
// memory no more, wait when global memory has them.
FASTLM_DEVICE void bulk_store(Global<float> to, const float* from, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(shared_address(from)),
               "r"(bytes)
               : "memory");
}
FASTLM_DEVICE void bulk_add(Global<float> to, const float* from, int bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to),
               "r"(shared_address(from)), "r"(bytes)
               : "memory");
}
FASTLM_DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int GROUPS>
FASTLM_DEVICE void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(GROUPS) : "memory");
}
template <int GROUPS>
FASTLM_DEVICE void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(GROUPS) : "memory");
}

// Blocks wait for one another by counters in global memory, which a launch finds at 0. Whoever takes tickets first has
// started first: a block that only waits for lower tickets waits for blocks that run.
FASTLM_DEVICE int take_ticket(Global<int> counter) { return atomicAdd(counter, 1); }
// Waits for a counter to reach a value; what was written before that, the copy engine's writes too, is seen after it.
FASTLM_DEVICE void await_count(Global<int> counter, int value) {
  int found;
  do asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(found) : "l"(counter) : "memory");
  while (found != value);
  asm volatile("fence.proxy.async.global;" ::: "memory");
}
FASTLM_DEVICE void set_count(Global<int> counter, int value) {
  asm volatile("fence.proxy.async.global;\nst.release.gpu.global.s32 [%0], %1;" ::"l"(counter), "r"(value) : "memory");
}
// Has the stream set bytes to 0.
inline void queue_zeros(void* data, size_t bytes, void* stream) {
  check(cudaMemsetAsync(data, 0, bytes, static_cast<cudaStream_t>(stream)), "zeros");
}

// Sets the registers of each thread of the calling warpgroup, from fewer or from more.
template <int REGISTERS>
FASTLM_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
FASTLM_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// Products of a warpgroup: fence, issue some, commit them as a group; wait<N> returns when all but the newest N groups
// are done. Until then neither accumulators nor operands may be touched.
FASTLM_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
FASTLM_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int GROUPS>
FASTLM_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(GROUPS) : "memory");
}
// Keeps the compiler from moving uses of the accumulators to the other side of it.
template <int N>
FASTLM_DEVICE void hold(float (&c)[1][N][4]) {
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(c[0][n][i])::"memory");
}

FASTLM_DEVICE uint64_t wgmma_descriptor(const void* start, int leading_bytes, int stride_bytes) {
  return (uint64_t)(shared_address(start) >> 4 & 0x3FFF) | (uint64_t)(leading_bytes >> 4 & 0x3FFF) << 16 |
         (uint64_t)(stride_bytes >> 4 & 0x3FFF) << 32 | (uint64_t)1 << 62;
}

#define FASTLM_C1(n) "+f"(c[0][n][0]), "+f"(c[0][n][1]), "+f"(c[0][n][2]), "+f"(c[0][n][3])
#define FASTLM_C4(n) FASTLM_C1(n), FASTLM_C1(n + 1), FASTLM_C1(n + 2), FASTLM_C1(n + 3)
#define FASTLM_C64 FASTLM_C4(0), FASTLM_C4(4)
#define FASTLM_C128 FASTLM_C64, FASTLM_C4(8), FASTLM_C4(12)
#define FASTLM_R64                                                                                            \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, " \
  "%23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FASTLM_R128                                                                                               \
  FASTLM_R64 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, " \
             "%51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FASTLM_WGMMA(N, TYPE) "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {"

// c (64, 8 N) = a b, added to c where ADD, N is 8 or 16; both operands are in shared memory, K-major or MN-major.
template <class T, bool ADD, bool MN_MAJOR, int N>
FASTLM_DEVICE void wgmma_shared(float (&c)[1][N][4], uint64_t a, uint64_t b) {
  static_assert(N == 8 || N == 16);
#define FASTLM_SHARED(SIZE, TYPE, A, B, ADDED, MAJOR)                                                           \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " ADDED ", 0;\n" FASTLM_WGMMA(SIZE, TYPE) FASTLM_R##SIZE \
               "}, " A ", " B ", add, 1, 1, " MAJOR ", " MAJOR ";\n}"                                           \
               : FASTLM_C##SIZE                                                                                \
               : "l"(a), "l"(b), "r"((int)ADD), "n"((int)MN_MAJOR))
#define FASTLM_SHARED_64(TYPE) FASTLM_SHARED(64, TYPE, "%32", "%33", "%34", "%35")
#define FASTLM_SHARED_128(TYPE) FASTLM_SHARED(128, TYPE, "%64", "%65", "%66", "%67")
  constexpr bool brain = std::is_same_v<T, bf16>;
  if constexpr (N == 8 && brain)
    FASTLM_SHARED_64("bf16");
  else if constexpr (N == 8)
    FASTLM_SHARED_64("f16");
  else if constexpr (brain)
    FASTLM_SHARED_128("bf16");
  else
    FASTLM_SHARED_128("f16");
#undef FASTLM_SHARED_128
#undef FASTLM_SHARED_64
#undef FASTLM_SHARED
}

// c (64, 8 N) = a (64, 16) b (8 N, 16)^T, added to c where ADD; both K-major.
template <class T, bool ADD, int N>
FASTLM_DEVICE void wgmma_rows(float (&c)[1][N][4], uint64_t a, uint64_t b) {
  wgmma_shared<T, ADD, false>(c, a, b);
}

// c (64, 8 N) = a (16, 64)^T b (16, 8 N), added to c where ADD; both MN-major.
template <class T, bool ADD, int N>
FASTLM_DEVICE void wgmma_columns(float (&c)[1][N][4], uint64_t a, uint64_t b) {
  wgmma_shared<T, ADD, true>(c, a, b);
}

// c (64, 8 N) += a (64, 16) b (16, 8 N), N is 8 or 16; a is in registers, b MN-major in shared memory.
template <class T, int N>
FASTLM_DEVICE void wgmma_weighted(float (&c)[1][N][4], const uint32_t (&a)[4], uint64_t b) {
  static_assert(N == 8 || N == 16);
#define FASTLM_WEIGHTED(SIZE, TYPE, A, B, ADD)                                                               \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " ADD ", 0;\n" FASTLM_WGMMA(SIZE, TYPE) FASTLM_R##SIZE \
               "}, {" A "}, " B ", add, 1, 1, 1;\n}"                                                         \
               : FASTLM_C##SIZE                                                                              \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1))
#define FASTLM_WEIGHTED_64(TYPE) FASTLM_WEIGHTED(64, TYPE, "%32, %33, %34, %35", "%36", "%37")
#define FASTLM_WEIGHTED_128(TYPE) FASTLM_WEIGHTED(128, TYPE, "%64, %65, %66, %67", "%68", "%69")
  constexpr bool brain = std::is_same_v<T, bf16>;
  if constexpr (N == 8 && brain)
    FASTLM_WEIGHTED_64("bf16");
  else if constexpr (N == 8)
    FASTLM_WEIGHTED_64("f16");
  else if constexpr (brain)
    FASTLM_WEIGHTED_128("bf16");
  else
    FASTLM_WEIGHTED_128("f16");
#undef FASTLM_WEIGHTED_128
#undef FASTLM_WEIGHTED_64
#undef FASTLM_WEIGHTED
}

#undef FASTLM_WGMMA
#undef FASTLM_R128
#undef FASTLM_R64
#undef FASTLM_C128
#undef FASTLM_C64
#undef FASTLM_C4
#undef FASTLM_C1

}  // namespace fastlm::cuda
