// Instructions of sm_100a: tensor memory, products of one thread (tcgen05.mma) whose sums stay there, and loads and
// stores between it and registers. mbarriers, TMA and setmaxnreg are hopper.cuh's. tests/emulation/blackwell.cuh has
// the same names for a CPU.
//
// Encodings, by the PTX ISA 8.6 (sections of "tcgen05": "Tensor Memory Addressing", "Shared memory descriptor",
// "Instruction descriptor", "Data path layout"), compared with CUTLASS's mma_sm100_desc.hpp:
//   Tensor memory has 128 lanes of 512 columns of 32 bits; an address has the lane in bits 16 to 31, the column in 0 to
//   15. Warp w of a warpgroup reaches lanes 32 w to 32 w + 31, its lane i the tensor memory's lane 32 w + i.
//   A product's sums (128, N) in fp32 take a lane a row, a column a column. A left operand (128, 16) there takes a lane
//   a row, eight columns of two 16-bit elements each, the lower k in the lower half.
//   Tiles in shared memory are hopper.cuh's panels. A descriptor has the start address / 16 in bits 0 to 13, the
//   leading offset / 16 in 16 to 29, the stride offset / 16 in 32 to 45, the version, 1, in 46 and 47, a base offset of
//   0 in 49 to 51, the leading offset's mode, 0, in 52, and the swizzle in 61 to 63: 2 for 128 bytes. Offsets mean what
//   they do for wgmma.
//   An instruction descriptor has the type of the sums in bits 4 and 5 (1: fp32), of the left operand in 7 to 9 and of
//   the right one in 10 to 12 (0: fp16, 1: bf16), whether they are MN-major in 15 and 16, N / 8 in 17 to 22, M / 16 in
//   24 to 28; all else is 0.
//
// The ISA orders products of one thread by their issue where they have the same accumulator, shape and kind.
// attention_sm100.cuh also has a product write where an earlier one reads its left operand; CUTLASS's example 77 and
// FlashAttention-4 rely on that order too, and the emulation follows it.
//
// What the emulation does not show, beside what hopper.cuh says: that hardware decodes these descriptors and lays out
// tensor memory as read here; that order; whether a wait that guards tensor memory is wait_tensor and not barrier_wait.
// Nothing here has run on a GPU.
#pragma once

#include <hopper.cuh>

// Whether this pass of the compiler may use the instructions.
#ifdef __CUDA_ARCH_FEAT_SM100_ALL
#define FASTLM_SM100A 1
#else
#define FASTLM_SM100A 0
#endif

namespace fastlm::cuda {

constexpr int kTensorColumns = 512;

// Reserves all of tensor memory and has its address written to shared memory; waits while another block holds some. One
// warp calls, and the same one frees it when no product, load or store is under way.
FASTLM_DEVICE void tensor_alloc(uint32_t* address) {
  asm volatile(
      "tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%0], %1;\n"
      "tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;" ::"r"(shared_address(address)),
      "n"(kTensorColumns)
      : "memory");
}
FASTLM_DEVICE void tensor_free(uint32_t address) {
  asm volatile("tcgen05.dealloc.cta_group::1.sync.aligned.b32 %0, %1;" ::"r"(address), "n"(kTensorColumns) : "memory");
}

// What this thread did in tensor memory and has waited for comes before what others do there after they have learned,
// through a barrier, that it called `before`, and have called `after`.
FASTLM_DEVICE void tensor_fence_before() { asm volatile("tcgen05.fence::before_thread_sync;" ::: "memory"); }
FASTLM_DEVICE void tensor_fence_after() { asm volatile("tcgen05.fence::after_thread_sync;" ::: "memory"); }

// barrier_wait for what goes on in tensor memory or for products.
FASTLM_DEVICE void wait_tensor(Barrier* b, int parity) {
  barrier_wait(b, parity);
  tensor_fence_after();
}

#define FASTLM_X8(x, n, c) \
  c(x[n]), c(x[n + 1]), c(x[n + 2]), c(x[n + 3]), c(x[n + 4]), c(x[n + 5]), c(x[n + 6]), c(x[n + 7])
#define FASTLM_X16(x, n, c) FASTLM_X8(x, n, c), FASTLM_X8(x, n + 8, c)
#define FASTLM_X32(x, c) FASTLM_X16(x, 0, c), FASTLM_X16(x, 16, c)
#define FASTLM_FIRST16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define FASTLM_FIRST32 FASTLM_FIRST16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"

// Loads 32 columns of this thread's lane; a whole warp calls, with the address of its first lane. x is not there before
// tensor_wait_loads.
FASTLM_DEVICE void tensor_load(float (&x)[32], uint32_t address) {
#define FASTLM_OUT(x) "=f"(x)
  asm volatile("tcgen05.ld.sync.aligned.32x32b.x32.b32 {" FASTLM_FIRST32 "}, [%32];"
               : FASTLM_X32(x, FASTLM_OUT)
               : "r"(address)
               : "memory");
#undef FASTLM_OUT
}
// Waits for all loads of this thread, of which those into x are used.
template <int N>
FASTLM_DEVICE void tensor_wait_loads(float (&x)[N][32]) {
  asm volatile("tcgen05.wait::ld.sync.aligned;" ::: "memory");
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int i = 0; i < 32; ++i) asm volatile("" : "+f"(x[n][i])::"memory");  // no use comes before the wait
}

// The reverse: 32 columns of fp32, or 16 of pairs. Products and other threads see them after tensor_publish.
FASTLM_DEVICE void tensor_store(uint32_t address, const float (&x)[32]) {
#define FASTLM_IN(x) "f"(x)
  asm volatile("tcgen05.st.sync.aligned.32x32b.x32.b32 [%32], {" FASTLM_FIRST32 "};" ::FASTLM_X32(x, FASTLM_IN),
               "r"(address)
               : "memory");
#undef FASTLM_IN
}
FASTLM_DEVICE void tensor_store(uint32_t address, const uint32_t (&x)[16]) {
#define FASTLM_IN(x) "r"(x)
  asm volatile("tcgen05.st.sync.aligned.32x32b.x16.b32 [%16], {" FASTLM_FIRST16 "};" ::FASTLM_X16(x, 0, FASTLM_IN),
               "r"(address)
               : "memory");
#undef FASTLM_IN
}
#undef FASTLM_FIRST32
#undef FASTLM_FIRST16
#undef FASTLM_X32
#undef FASTLM_X16
#undef FASTLM_X8

// Waits for this thread's stores, and has them come before what others do after the barrier at which it arrives next.
FASTLM_DEVICE void tensor_publish() {
  asm volatile("tcgen05.wait::st.sync.aligned;" ::: "memory");
  tensor_fence_before();
}

FASTLM_DEVICE uint64_t umma_descriptor(const void* start, int leading_bytes, int stride_bytes) {
  return (uint64_t)(shared_address(start) >> 4 & 0x3FFF) | (uint64_t)(leading_bytes >> 4 & 0x3FFF) << 16 |
         (uint64_t)(stride_bytes >> 4 & 0x3FFF) << 32 | (uint64_t)1 << 46 | (uint64_t)2 << 61;
}

// Of products (128, 16) (16, N) of 16-bit elements into fp32; the left operand is K-major.
template <class T, int N, bool MN_MAJOR>
FASTLM_ANY constexpr uint32_t umma_instruction() {
  static_assert(N % 16 == 0 && N >= 16 && N <= 256);
  const uint32_t type = std::is_same_v<T, bf16> ? 1 : 0;
  return 1u << 4 | type << 7 | type << 10 | (uint32_t)MN_MAJOR << 16 | (uint32_t)(N / 8) << 17 | 128u / 16 << 24;
}

// Products: sums (128, N) in tensor memory = a b, added to what is there where `add`. b is in shared memory; a too, or
// in tensor memory. One thread issues and commits all of them; they are done when a barrier has got the arrival of a
// commit that came after them. Until then neither sums nor operands may be touched.
FASTLM_DEVICE void umma_shared(uint32_t sums, uint64_t a, uint64_t b, uint32_t instruction, bool add) {
  asm volatile(
      "{\n.reg .pred add;\nsetp.ne.b32 add, %4, 0;\n"
      "tcgen05.mma.cta_group::1.kind::f16 [%0], %1, %2, %3, add;\n}" ::"r"(sums),
      "l"(a), "l"(b), "r"(instruction), "r"((int)add)
      : "memory");
}
FASTLM_DEVICE void umma_tensor(uint32_t sums, uint32_t a, uint64_t b, uint32_t instruction, bool add) {
  asm volatile(
      "{\n.reg .pred add;\nsetp.ne.b32 add, %4, 0;\n"
      "tcgen05.mma.cta_group::1.kind::f16 [%0], [%1], %2, %3, add;\n}" ::"r"(sums),
      "r"(a), "l"(b), "r"(instruction), "r"((int)add)
      : "memory");
}
// Arrives at the barrier once, when all products that this thread has issued are done.
FASTLM_DEVICE void umma_commit(Barrier* b) {
  asm volatile("tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%0];" ::"r"(shared_address(b))
               : "memory");
}

// The larger one, or NaN where either is.
FASTLM_DEVICE float max_or_nan(float a, float b) {
  float most;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(most) : "f"(a), "f"(b));
  return most;
}

// x times 2^n, where `shifted` is 1.5 * 2^23 + n; 0 where that is below the exponents.
FASTLM_DEVICE float times_power(float x, float shifted) {
  return __uint_as_float(__float_as_uint(x) + (__float_as_uint(shifted) << 23));
}

}  // namespace fastlm::cuda
