// Matrix instructions of sm_80: fragments are spread over a warp as the PTX ISA's "Matrix fragments for mma.m16n8k16"
// say. With lane = 4 g + t, g in 0 to 7 and t in 0 to 3:
//   accumulator c (16, 8):   c0, c1 = (g, 2t), (g, 2t + 1);  c2, c3 = (g + 8, 2t), (g + 8, 2t + 1).
//   16-bit a (16, 16):       a0 = (g, 2t..), a1 = (g + 8, 2t..), a2 = (g, 2t + 8..), a3 = (g + 8, 2t + 8..).
//   16-bit b (16, 8):        b0 = (2t.., g), b1 = (2t + 8.., g).
// tests/emulation/matrix.cuh has the same functions for a CPU. Whole warps call them.
#pragma once

#include <primitives.cuh>

namespace fastlm::cuda {

// Four 8 x 8 matrices of 16-bit elements; lane 8 i + r gives the address of row r of matrix i, 16 bytes in shared
// memory. Word i of a lane is then elements (g, 2t) and (g, 2t + 1) of matrix i.
FASTLM_DEVICE void ldmatrix(uint32_t (&word)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same of the transposed matrices: elements (2t, g) and (2t + 1, g).
FASTLM_DEVICE void ldmatrix_transposed(uint32_t (&word)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
               : "r"(shared_address(row))
               : "memory");
}

// N neighbouring numbers in shared memory, read where the program says so: the compiler would read whole tiles ahead.
template <int N>
FASTLM_DEVICE Vec<float, N> load_shared(const float* p) {
  Vec<float, N> x;
  if constexpr (N == 4)
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(x[0]), "=f"(x[1]), "=f"(x[2]), "=f"(x[3])
                 : "r"(shared_address(p))
                 : "memory");
  else
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x[0]), "=f"(x[1]) : "r"(shared_address(p)) : "memory");
  return x;
}

// c (16, 8) += a (16, 16) b (16, 8), T is bf16 or fp16.
template <class T>
FASTLM_DEVICE void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, bf16>)
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace fastlm::cuda
