// The names of csrc/cuda/primitives.cuh on a CPU, for tests: found first by their include order. See emulation.h.
#pragma once

#include <cmath>
#include <cstring>
#include <tuple>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define FASTLM_DEVICE inline
#define FASTLM_ANY inline

#include "emulation.h"

namespace fastlm::cuda {

// A pointer into global memory whose every access is checked.
template <class T>
class Global {
 public:
  Global(T* p = nullptr) : p_(p) {}
  template <class U, class = std::enable_if_t<std::is_convertible_v<U*, T*>>>
  Global(Global<U> other) : p_(other.raw()) {}
  T& operator[](int64_t i) const {
    emulation::check_global(p_ + i, sizeof(T), "an access");
    return p_[i];
  }
  T& operator*() const { return (*this)[0]; }
  Global operator+(int64_t n) const { return p_ + n; }
  Global operator-(int64_t n) const { return p_ - n; }
  Global& operator+=(int64_t n) { return p_ += n, *this; }
  explicit operator bool() const { return p_ != nullptr; }
  T* raw() const { return p_; }

 private:
  T* p_;
};

template <class T, class U>
Global<T> recast(Global<U> p) {
  return (T*)p.raw();
}
template <class T>
T* address(Global<T> p) {
  return p.raw();
}

constexpr int kWarp = 32;

inline int thread_index() { return emulation::self().index; }
inline int block_threads() { return emulation::block().launch->threads; }
inline int lane_index() { return thread_index() % kWarp; }
inline int warp_index() { return thread_index() / kWarp; }
inline Dim block_index() { return emulation::block().index; }
inline Dim grid_size() { return emulation::block().launch->grid; }

template <class T>
T* shared_memory() {
  return reinterpret_cast<T*>(emulation::block().shared);
}

#define FASTLM_LINE int line = __builtin_LINE()

inline void sync_threads(FASTLM_LINE) { emulation::barrier(0, block_threads(), true, line); }
inline bool sync_threads_or(bool vote, FASTLM_LINE) {
  const int threads = block_threads();
  emulation::meet(emulation::block().votes, "sync_threads_or", line, thread_index(), threads, &vote,
                  [threads](bool** all) {
                    bool any = false;
                    for (int i = 0; i < threads; ++i) any = any || *all[i];
                    for (int i = 0; i < threads; ++i) *all[i] = any;
                  });
  return vote;
}
inline void sync_named(int id, int threads, FASTLM_LINE) { emulation::barrier(id, threads, true, line); }
inline void arrive_named(int id, int threads, FASTLM_LINE) { emulation::barrier(id, threads, false, line); }
inline void sync_warp(FASTLM_LINE) {
  int nothing = 0;
  emulation::meet_warp("sync_warp", line, &nothing, [](int**) {});
}

inline int cluster_rank() { return emulation::block().rank; }
inline int cluster_size() { return emulation::block().launch->cluster; }
inline void sync_cluster(FASTLM_LINE) { emulation::cluster_barrier(line); }
template <class T>
T* cluster_shared(T* p, int rank) {
  emulation::check_shared(p, sizeof(T), "cluster_shared");
  const auto& blocks = emulation::block().cluster->blocks;
  if (rank < 0 || rank >= (int)blocks.size()) emulation::fail("cluster_shared of rank " + std::to_string(rank));
  const auto offset = reinterpret_cast<const unsigned char*>(p) - emulation::block().shared;
  return reinterpret_cast<T*>(blocks[(size_t)rank]->shared + offset);
}

namespace warp {

template <class T>
struct Exchange {
  T value, result;
  int from;
};

// Each lane gets the value of the lane it names.
template <class T>
T exchange(const char* what, T v, int from, int line) {
  Exchange<T> mine{v, v, from};
  emulation::meet_warp(what, line, &mine, [](Exchange<T>** all) {
    for (int i = 0; i < kWarp; ++i) all[i]->result = all[all[i]->from]->value;
  });
  return mine.result;
}

// A butterfly over each group of `width` lanes: what shuffles and `op` give, in one meeting.
template <class Op>
float butterfly(const char* what, float v, int width, int line, Op op) {
  emulation::meet_warp(what, line, &v, [width, op](float** all) {
    for (int mask = width / 2; mask > 0; mask /= 2) {
      float next[kWarp];
      for (int i = 0; i < kWarp; ++i) next[i] = op(*all[i], *all[i ^ mask]);
      for (int i = 0; i < kWarp; ++i) *all[i] = next[i];
    }
  });
  return v;
}

}  // namespace warp

template <class T>
T shuffle(T v, int lane, FASTLM_LINE) {
  return warp::exchange("shuffle", v, lane & 31, line);
}
template <class T>
T shuffle_xor(T v, int mask, FASTLM_LINE) {
  return warp::exchange("shuffle_xor", v, (lane_index() ^ mask) & 31, line);
}
template <class T>
T shuffle_down(T v, int n, FASTLM_LINE) {
  return warp::exchange("shuffle_down", v, lane_index() + n < kWarp ? lane_index() + n : lane_index(), line);
}
inline uint32_t ballot(bool vote, FASTLM_LINE) {
  uint32_t mine = vote;
  emulation::meet_warp("ballot", line, &mine, [](uint32_t** all) {
    uint32_t votes = 0;
    for (int i = 0; i < kWarp; ++i) votes |= *all[i] << i;
    for (int i = 0; i < kWarp; ++i) *all[i] = votes;
  });
  return mine;
}
inline bool any(bool vote, FASTLM_LINE) { return ballot(vote, line) != 0; }
inline bool all(bool vote, FASTLM_LINE) { return ballot(vote, line) == 0xFFFFFFFFu; }
template <int WIDTH = kWarp>
float warp_sum(float v, FASTLM_LINE) {
  return warp::butterfly("warp_sum", v, WIDTH, line, [](float a, float b) { return a + b; });
}
template <int WIDTH = kWarp>
float warp_max(float v, FASTLM_LINE) {
  return warp::butterfly("warp_max", v, WIDTH, line, [](float a, float b) { return std::fmax(a, b); });
}

template <int N, Cache CACHE = Cache::keep, class T>
auto load(Global<T> p) {
  using V = Vec<std::remove_const_t<T>, N>;
  static_assert(sizeof(V) <= 16);
  emulation::check_global(p.raw(), sizeof(V), "a load");
  if (reinterpret_cast<uintptr_t>(p.raw()) % sizeof(V)) emulation::fail("a load at a misaligned address");
  V v;
  std::memcpy(&v, p.raw(), sizeof v);
  return v;
}
template <Cache CACHE = Cache::keep, class T, int N>
void store(Global<T> p, const Vec<T, N>& v) {
  static_assert(sizeof v <= 16);
  emulation::check_global(p.raw(), sizeof v, "a store");
  if (reinterpret_cast<uintptr_t>(p.raw()) % sizeof v) emulation::fail("a store at a misaligned address");
  std::memcpy(p.raw(), &v, sizeof v);
}

template <int N, class T>
auto load_shared(const T* p) {
  using V = Vec<T, N>;
  emulation::check_shared(p, sizeof(V), "a load");
  if (reinterpret_cast<uintptr_t>(p) % sizeof(V)) emulation::fail("a load at a misaligned address");
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class T, int N>
void store_shared(T* p, const Vec<T, N>& v) {
  emulation::check_shared(p, sizeof v, "a store");
  if (reinterpret_cast<uintptr_t>(p) % sizeof v) emulation::fail("a store at a misaligned address");
  std::memcpy(p, &v, sizeof v);
}

template <int BYTES, class T>
void cp_async(void* to, Global<T> from, int valid = BYTES) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16);
  emulation::copy_async(to, from.raw(), BYTES, (size_t)valid);
}
inline void cp_async_commit() { emulation::commit_copies(); }
template <int GROUPS>
void cp_async_wait() {
  emulation::wait_copies(GROUPS);
}

namespace bits {

inline uint32_t of(float x) {
  uint32_t b;
  std::memcpy(&b, &x, sizeof b);
  return b;
}
inline float number(uint32_t b) {
  float x;
  std::memcpy(&x, &b, sizeof x);
  return x;
}
// x times 2^-n as an integer, to nearest even.
inline uint32_t shifted(uint32_t x, int n) { return (x + ((1u << (n - 1)) - 1) + ((x >> n) & 1)) >> n; }

inline uint16_t half(float x) {
  const uint32_t b = of(x), sign = (b >> 16) & 0x8000, magnitude = b & 0x7FFFFFFF;
  if (magnitude > 0x7F800000) return (uint16_t)(sign | 0x7FFF);
  if (magnitude >= 0x477FF000) return (uint16_t)(sign | 0x7C00);  // 65520 and above round to infinity
  if (magnitude >= 0x38800000) return (uint16_t)(sign | shifted(magnitude - (112u << 23), 13));
  // subnormal: a multiple of 2^-24, by the addition's own rounding
  return (uint16_t)(sign | (of(number(magnitude) + 0.5f) - of(0.5f)));
}
inline float from_half(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, fraction = h & 0x3FF;
  if (exponent == 31) return number(sign | 0x7F800000 | fraction << 13);
  if (exponent == 0) return (sign ? -1.0f : 1.0f) * (float)fraction * 0x1p-24f;
  return number(sign | (exponent + 112) << 23 | fraction << 13);
}
inline uint16_t brain(float x) {
  const uint32_t b = of(x);
  return (b & 0x7FFFFFFF) > 0x7F800000 ? 0x7FFF : (uint16_t)shifted(b, 16);
}

}  // namespace bits

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return bits::number((uint32_t)x.bits << 16); }
inline float to_float(fp16 x) { return bits::from_half(x.bits); }
template <class T>
T from_float(float x) {
  if constexpr (std::is_same_v<T, bf16>)
    return {bits::brain(x)};
  else if constexpr (std::is_same_v<T, fp16>)
    return {bits::half(x)};
  else
    return x;
}
template <class T>
uint32_t packed(float low, float high) {
  return (uint32_t)from_float<T>(high).bits << 16 | from_float<T>(low).bits;
}

inline float exp2_approx(float x) { return std::exp2(x); }
inline float log2_approx(float x) { return std::log2(x); }
inline float rcp_approx(float x) { return 1 / x; }
inline float rsqrt_approx(float x) { return 1 / std::sqrt(x); }
inline float tanh_approx(float x) { return std::tanh(x); }

inline int toolkit() { return 0; }
inline int driver() { return 0; }
inline int architecture() { return emulation::architecture(); }
inline int multiprocessors() { return emulation::multiprocessors(); }
inline int shared_bytes_limit() {
  const int found = emulation::architecture();
  return (found == 90 || found == 100 ? 227 : found == 80 ? 163 : 99) * 1024;
}
inline void set_device(int) {}

template <class... P, class... A>
void launch(const Launch& l, void (*kernel)(P...), A&&... args) {
  static_assert(sizeof...(P) == sizeof...(A));
  const std::tuple<P...> values(static_cast<P>(args)...);
  emulation::run(l, [&] { std::apply(kernel, values); });
}

}  // namespace fastlm::cuda
