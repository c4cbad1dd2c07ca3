// Memory of the calling thread that kernels work in. Ordinary header, not for inclusion in a pass.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastlm {

// At least `bytes` of 64-byte aligned memory that belongs to the calling thread and is kept for its next call: fresh
// memory would cost page faults that outweigh the arithmetic of a small call.
void* thread_scratch(size_t bytes);

// Hands out aligned pieces of a scratch allocation; with a null base it only counts.
struct Arena {
  char* base;
  size_t used = 0;
  template <class T>
  T* take(int64_t n) {
    T* p = reinterpret_cast<T*>(base + used);
    used += ((size_t)n * sizeof(T) + 63) / 64 * 64;
    return p;
  }
};

// What lay_out(arena) returns of pieces of this thread's scratch memory, which holds all that it takes.
template <class F>
auto in_scratch(F&& lay_out) {
  Arena counter{nullptr};
  lay_out(counter);
  Arena arena{static_cast<char*>(thread_scratch(counter.used))};
  return lay_out(arena);
}

}  // namespace fastlm
