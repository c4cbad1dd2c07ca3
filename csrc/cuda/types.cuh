// Plain C++ that both implementations of primitives.cuh share: storage types, vectors, launch shapes, Philox.
// Included by them alone, after they have defined FASTLM_DEVICE (functions for the GPU) and FASTLM_ANY (for both).
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace fastlm::cuda {

// 16-bit floating-point numbers as they lie in memory; arithmetic is done in fp32.
struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

// The codes that fastlm/backends/cpu passes.
enum class DType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

[[noreturn]] inline void unsupported_type(int type) {
  throw std::invalid_argument("fastlm._cuda: no kernels for dtype code " + std::to_string(type));
}

// Calls f with a value of the type that `type` names.
template <class F>
void for_type(int type, F&& f) {
  switch ((DType)type) {
    case DType::f32: return f(float{});
    case DType::bf16: return f(bf16{});
    case DType::f16: return f(fp16{});
    default: unsupported_type(type);
  }
}

// N neighbouring elements, moved by one instruction where they are 2, 4, 8 or 16 bytes.
template <class T, int N>
struct alignas(sizeof(T) * N) Vec {
  T at[N];
  FASTLM_ANY T& operator[](int i) { return at[i]; }
  FASTLM_ANY const T& operator[](int i) const { return at[i]; }
};

// How a cache line is used: `keep` where others will read it and no thread of the launch writes it, `stream` where it
// is touched once, `coherent` where the launch writes it itself.
enum class Cache { keep, stream, coherent };

struct Dim {
  unsigned x = 1, y = 1, z = 1;
};

// The shape of a launch, `threads` and `cluster` along x. A kernel's name is for errors.
struct Launch {
  const char* name;
  Dim grid;
  int threads;
  size_t shared_bytes = 0;
  void* stream = nullptr;
  int cluster = 1;
};

inline std::string described(const Launch& l) {
  return std::string(l.name) + " (grid " + std::to_string(l.grid.x) + " x " + std::to_string(l.grid.y) + " x " +
         std::to_string(l.grid.z) + ", cluster " + std::to_string(l.cluster) + ", " + std::to_string(l.threads) +
         " threads, " + std::to_string(l.shared_bytes) + " bytes of shared memory)";
}

template <class T>
FASTLM_ANY constexpr T divided_up(T a, T b) {
  return (a + b - 1) / b;
}
template <class T>
FASTLM_ANY constexpr T smaller(T a, T b) {
  return a < b ? a : b;
}
template <class T>
FASTLM_ANY constexpr T larger(T a, T b) {
  return a < b ? b : a;
}

// Philox4x32-10 as fastlm/ops/_dropout.py states it: the words of columns 4 group to 4 group + 3 of a row.
FASTLM_ANY Vec<uint32_t, 4> philox(int64_t seed, uint32_t group, int64_t row) {
  uint32_t x0 = group, x1 = (uint32_t)(uint64_t)row, x2 = (uint32_t)((uint64_t)row >> 32), x3 = 0;
  uint32_t k0 = (uint32_t)(uint64_t)seed, k1 = (uint32_t)((uint64_t)seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = (uint64_t)x0 * 0xD2511F53u, b = (uint64_t)x2 * 0xCD9E8D57u;
    x0 = (uint32_t)(b >> 32) ^ x1 ^ k0;
    x1 = (uint32_t)b;
    x2 = (uint32_t)(a >> 32) ^ x3 ^ k1;
    x3 = (uint32_t)a;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{x0, x1, x2, x3}};
}

}  // namespace fastlm::cuda
