// Everything in the kernels that is not plain C++: indices, barriers, shuffles, memory instructions, approximate
// functions, launches. Kernels use these names alone, so that tests/emulation/primitives.cuh, found first by the
// tests' include order (`#include <primitives.cuh>`), runs the same source on a CPU.
//
// Rules that the emulation checks: global memory is reached only through Global<T>, shared memory is dynamic and taken
// from shared_memory<T>(), whole warps take part in warp functions, all threads of a block in sync_threads().
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define FASTLM_DEVICE __device__ __forceinline__
#define FASTLM_ANY __host__ __device__ __forceinline__

#include "types.cuh"

namespace fastlm::cuda {

// A pointer into global memory.
template <class T>
using Global = T*;

// The same place as a pointer to another type.
template <class T, class U>
FASTLM_ANY T* recast(U* p) {
  return (T*)p;
}
// Its address, for instructions written by hand.
template <class T>
FASTLM_ANY T* address(T* p) {
  return p;
}

constexpr int kWarp = 32;

// Where a thread is; blocks are one-dimensional.
FASTLM_DEVICE int thread_index() { return (int)threadIdx.x; }
FASTLM_DEVICE int block_threads() { return (int)blockDim.x; }
FASTLM_DEVICE int lane_index() { return (int)threadIdx.x % kWarp; }
FASTLM_DEVICE int warp_index() { return (int)threadIdx.x / kWarp; }
FASTLM_DEVICE Dim block_index() { return {blockIdx.x, blockIdx.y, blockIdx.z}; }
FASTLM_DEVICE Dim grid_size() { return {gridDim.x, gridDim.y, gridDim.z}; }

// Shared memory.
template <class T>
FASTLM_DEVICE T* shared_memory() {
  extern __shared__ __align__(1024) unsigned char fastlm_shared[];
  return reinterpret_cast<T*>(fastlm_shared);
}
// The address that instructions on shared memory take.
FASTLM_DEVICE uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

// Barriers.
FASTLM_DEVICE void sync_threads() { __syncthreads(); }
// As sync_threads; whether any thread of the block votes for it.
FASTLM_DEVICE bool sync_threads_or(bool vote) { return __syncthreads_or(vote) != 0; }
FASTLM_DEVICE void sync_warp() { __syncwarp(); }
// Barrier `id` in 1 to 15 for `threads` threads, a multiple of 32: sync waits for all of them, arrive does not.
FASTLM_DEVICE void sync_named(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
FASTLM_DEVICE void arrive_named(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Clusters of blocks (sm_90); without one, a block is a cluster of its own.
FASTLM_DEVICE int cluster_rank() {
#if __CUDA_ARCH__ >= 900
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return (int)rank;
#else
  return 0;
#endif
}
FASTLM_DEVICE int cluster_size() {
#if __CUDA_ARCH__ >= 900
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return (int)size;
#else
  return 1;
#endif
}
// Waits for every thread of the cluster; what they wrote to shared memory before it is seen by all after it.
FASTLM_DEVICE void sync_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
#else
  __syncthreads();
#endif
}
// The same place as `p`, which is in this block's shared memory, in that of block `rank` of the cluster.
template <class T>
FASTLM_DEVICE T* cluster_shared(T* p, int rank) {
#if __CUDA_ARCH__ >= 900
  T* mapped;
  asm("mapa.u64 %0, %1, %2;" : "=l"(mapped) : "l"(p), "r"(rank));
  return mapped;
#else
  return p;
#endif
}

// Warps: every lane calls, every lane gets an answer.
template <class T>
FASTLM_DEVICE T shuffle(T v, int lane) {
  return __shfl_sync(0xFFFFFFFFu, v, lane);
}
template <class T>
FASTLM_DEVICE T shuffle_xor(T v, int mask) {
  return __shfl_xor_sync(0xFFFFFFFFu, v, mask);
}
// From lane + n; lanes past the end keep their own value.
template <class T>
FASTLM_DEVICE T shuffle_down(T v, int n) {
  return __shfl_down_sync(0xFFFFFFFFu, v, n);
}
FASTLM_DEVICE uint32_t ballot(bool vote) { return __ballot_sync(0xFFFFFFFFu, vote); }
FASTLM_DEVICE bool any(bool vote) { return __any_sync(0xFFFFFFFFu, vote); }
FASTLM_DEVICE bool all(bool vote) { return __all_sync(0xFFFFFFFFu, vote); }

// Sum and maximum over each group of WIDTH neighbouring lanes, the same bits in all of them.
template <int WIDTH = kWarp>
FASTLM_DEVICE float warp_sum(float v) {
#pragma unroll
  for (int mask = WIDTH / 2; mask > 0; mask /= 2) v += shuffle_xor(v, mask);
  return v;
}
template <int WIDTH = kWarp>
FASTLM_DEVICE float warp_max(float v) {
#pragma unroll
  for (int mask = WIDTH / 2; mask > 0; mask /= 2) v = fmaxf(v, shuffle_xor(v, mask));
  return v;
}

// Global memory, N elements at an address that is a multiple of their size.
template <int BYTES>
struct Word;
template <>
struct Word<2> {
  using type = unsigned short;
};
template <>
struct Word<4> {
  using type = unsigned int;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

template <int N, Cache CACHE = Cache::keep, class T>
FASTLM_DEVICE auto load(Global<T> p) {
  using V = Vec<std::remove_const_t<T>, N>;
  using W = typename Word<(int)sizeof(V)>::type;
  union {
    W word;
    V vec;
  } u;
  const W* from = reinterpret_cast<const W*>(p);
  if constexpr (CACHE == Cache::stream)
    u.word = __ldcs(from);
  else if constexpr (CACHE == Cache::coherent)
    u.word = *from;
  else
    u.word = __ldg(from);
  return u.vec;
}
template <Cache CACHE = Cache::keep, class T, int N>
FASTLM_DEVICE void store(Global<T> p, const Vec<T, N>& v) {
  using W = typename Word<(int)sizeof(Vec<T, N>)>::type;
  union U {
    W word;
    Vec<T, N> vec;
    __device__ U() {}
  } u;
  u.vec = v;
  W* to = reinterpret_cast<W*>(p);
  if constexpr (CACHE == Cache::stream)
    __stcs(to, u.word);
  else
    *to = u.word;
}

// The same from and to shared memory.
template <int N, class T>
FASTLM_DEVICE auto load_shared(const T* p) {
  return load<N, Cache::coherent>(p);
}
template <class T, int N>
FASTLM_DEVICE void store_shared(T* p, const Vec<T, N>& v) {
  store<Cache::keep>(p, v);
}

// Asynchronous copies of 4, 8 or 16 bytes from global to shared memory; bytes from `valid` on become 0.
// Those issued since the last commit form a group; wait<N> returns when all but the newest N groups of this thread
// have landed. Other threads see them after a barrier.
template <int BYTES, class T>
FASTLM_DEVICE void cp_async(void* to, Global<T> from, int valid = BYTES) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16);
  if constexpr (BYTES == 16)  // past L1, which would not see it again
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(valid)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to)), "l"(from), "n"(BYTES),
                 "r"(valid)
                 : "memory");
}
FASTLM_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int GROUPS>
FASTLM_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
}

// Conversions, to nearest even.
FASTLM_DEVICE float to_float(float x) { return x; }
FASTLM_DEVICE float to_float(bf16 x) { return __uint_as_float((uint32_t)x.bits << 16); }
FASTLM_DEVICE float to_float(fp16 x) { return __half2float(__ushort_as_half(x.bits)); }

template <class T>
FASTLM_DEVICE T from_float(float x) {
  if constexpr (std::is_same_v<T, bf16>)
    return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
  else if constexpr (std::is_same_v<T, fp16>)
    return {__half_as_ushort(__float2half_rn(x))};
  else
    return x;
}
// Two numbers in the 32 bits that matrix instructions take, `low` in the low half.
template <class T>
FASTLM_DEVICE uint32_t packed(float low, float high) {
  uint32_t bits;
  if constexpr (std::is_same_v<T, bf16>)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

// Functions of one instruction, good to about 2 units in the last place (ex2, rcp) or 2^-11 (tanh).
FASTLM_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FASTLM_DEVICE float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FASTLM_DEVICE float rcp_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FASTLM_DEVICE float rsqrt_approx(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FASTLM_DEVICE float tanh_approx(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The host's side.
inline void check(cudaError_t error, const std::string& what) {
  if (error != cudaSuccess) throw std::runtime_error(what + ": " + cudaGetErrorString(error));
}
inline int attribute(cudaDeviceAttr which) {
  int device, value;
  check(cudaGetDevice(&device), "current device");
  check(cudaDeviceGetAttribute(&value, which, device), "device attribute");
  return value;
}
inline int toolkit() { return CUDART_VERSION / 10; }
// The newest toolkit that the driver serves, 0 without a driver.
inline int driver() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version / 10 : 0;
}
// Of the current device: 90 for sm_90.
inline int architecture() {
  return 10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor);
}
inline int multiprocessors() { return attribute(cudaDevAttrMultiProcessorCount); }
inline int shared_bytes_limit() { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }
// For this copy of the runtime, which the module links statically, what the caller's copy has done already.
inline void set_device(int index) { check(cudaSetDevice(index), "set_device"); }

// Puts the kernel on the stream of the current device, or throws a std::runtime_error that names it.
template <class... P, class... A>
void launch(const Launch& l, void (*kernel)(P...), A&&... args) {
  static_assert(sizeof...(P) == sizeof...(A));
  if (l.shared_bytes > 48 * 1024)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)l.shared_bytes),
          described(l));
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {(unsigned)l.cluster, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(l.grid.x, l.grid.y, l.grid.z);
  config.blockDim = dim3((unsigned)l.threads);
  config.dynamicSmemBytes = l.shared_bytes;
  config.stream = static_cast<cudaStream_t>(l.stream);
  config.attrs = &cluster;
  config.numAttrs = l.cluster > 1 ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<P>(args)...), described(l));
}

}  // namespace fastlm::cuda
