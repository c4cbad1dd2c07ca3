// The names of csrc/cuda/matrix.cuh on a CPU, by the definition of the fragments in the PTX ISA: an instruction gathers
// its operands from the 32 lanes into matrices, multiplies those in fp32, and hands the elements out again.
#pragma once

#include <primitives.cuh>

namespace fastlm::cuda {

namespace warp {

struct MatrixLoad {
  const void* row;
  uint32_t word[4];
};

template <bool TRANSPOSED>
void ldmatrix(const char* what, uint32_t (&word)[4], const void* row, int line) {
  emulation::check_shared(row, 16, what);
  if (reinterpret_cast<uintptr_t>(row) % 16) emulation::fail(std::string(what) + " at a misaligned address");
  MatrixLoad mine{row, {}};
  emulation::meet_warp(what, line, &mine, [](MatrixLoad** lanes) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      const auto element = [&](int row, int column) {
        uint16_t x;
        std::memcpy(&x, static_cast<const char*>(lanes[8 * matrix + row]->row) + 2 * column, sizeof x);
        return (uint32_t)x;
      };
      for (int lane = 0; lane < kWarp; ++lane) {
        const int g = lane / 4, t = lane % 4;
        lanes[lane]->word[matrix] = TRANSPOSED ? element(2 * t, g) | element(2 * t + 1, g) << 16
                                               : element(g, 2 * t) | element(g, 2 * t + 1) << 16;
      }
    }
  });
  std::memcpy(word, mine.word, sizeof word);
}

struct Product {
  const uint32_t* a;
  uint32_t b[2];
  float* c;
};

// c (16, 8) += a (16, K) b (K, 8), the matrices whole.
template <int K>
void multiply(Product** lanes, const float (&a)[16][K], const float (&b)[K][8]) {
  for (int lane = 0; lane < kWarp; ++lane)
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
      float sum = 0;
      for (int k = 0; k < K; ++k) sum += a[row][k] * b[k][column];
      lanes[lane]->c[i] += sum;
    }
}

template <class T>
float half_of(uint32_t word, int i) {
  return to_float(T{(uint16_t)(word >> 16 * i)});
}

}  // namespace warp

inline void ldmatrix(uint32_t (&word)[4], const void* row, FASTLM_LINE) {
  warp::ldmatrix<false>("ldmatrix", word, row, line);
}
inline void ldmatrix_transposed(uint32_t (&word)[4], const void* row, FASTLM_LINE) {
  warp::ldmatrix<true>("ldmatrix.trans", word, row, line);
}

template <int N>
Vec<float, N> load_shared(const float* p) {
  emulation::check_shared(p, sizeof(Vec<float, N>), "ld.shared");
  if (reinterpret_cast<uintptr_t>(p) % sizeof(Vec<float, N>)) emulation::fail("ld.shared at a misaligned address");
  Vec<float, N> x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

template <class T>
void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, FASTLM_LINE) {
  warp::Product mine{a, {b0, b1}, c};
  emulation::meet_warp("mma.m16n8k16", line, &mine, [](warp::Product** lanes) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < kWarp; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 2; ++j) a[g + 8 * (i % 2)][2 * t + 8 * (i / 2) + j] = warp::half_of<T>(lanes[lane]->a[i], j);
      for (int i = 0; i < 2; ++i)
        for (int j = 0; j < 2; ++j) b[2 * t + 8 * i + j][g] = warp::half_of<T>(lanes[lane]->b[i], j);
    }
    warp::multiply<16>(lanes, a, b);
  });
}

}  // namespace fastlm::cuda
