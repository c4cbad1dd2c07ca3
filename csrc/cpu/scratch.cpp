#include "cpu/scratch.h"

#include <cstdlib>
#include <new>

namespace fastlm {

namespace {

struct Kept {
  void* data = nullptr;
  size_t size = 0;
  ~Kept() { std::free(data); }
};

}  // namespace

void* thread_scratch(size_t bytes) {
  thread_local Kept kept;
  if (bytes > kept.size) {
    std::free(kept.data);
    kept.size = (bytes + 4095) / 4096 * 4096;
    kept.data = std::aligned_alloc(4096, kept.size);
    if (!kept.data) {
      kept.size = 0;
      throw std::bad_alloc();
    }
  }
  return kept.data;
}

}  // namespace fastlm
