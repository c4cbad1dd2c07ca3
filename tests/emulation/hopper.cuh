// The names of csrc/cuda/hopper.cuh on a CPU, as strict as the PTX ISA lets hardware be: a copy lands only when someone
// has to wait for its barrier, until then its place holds NaN; products are done when they are waited for, until then
// their accumulators are NaN, and an operand that changes meanwhile is an error; descriptors are decoded bit by bit;
// what store_matrices and store_numbers wrote must be fenced by who wrote it before a product or a copy reads it; a
// bulk copy reaches global memory when it is waited for, and no count may be set before that.
#pragma once

#include "hopper_state.cuh"

#define FASTLM_SM90A 1

namespace fastlm::cuda {

inline void barrier_init(Barrier* b, int arrivals) {
  emulation::check_shared(b, sizeof *b, "mbarrier");
  if (hopper::shared_offset(b) % 8) emulation::fail("an mbarrier at a misaligned address");
  *b = hopper::kMade;
  auto& state = hopper::barriers().made[b];
  state = {};
  state.arrivals = state.missing = arrivals;
}
inline void publish_barriers() {
  for (auto& [b, state] : hopper::barriers().made) state.published = true;
}
inline void barrier_arrive(Barrier* b) {
  auto& state = hopper::barrier(b);
  --state.missing;
  state.advance();
}
inline void barrier_expect(Barrier* b, int bytes) {
  hopper::barrier(b).bytes += bytes;
  barrier_arrive(b);
}
inline void barrier_wait(Barrier* b, int parity, FASTLM_LINE) {
  auto& state = hopper::barrier(b);
  emulation::wait("an mbarrier", line, [&] {
    const auto ended = [&] { return (int)(state.phase % 2) != parity; };
    if (!ended()) state.poll();
    return ended();
  });
}

inline bool has_tensor_maps() { return true; }
template <class T>
TensorMap tensor_map(const void* data, const int64_t (&size)[4], const int64_t (&stride)[3], int rows) {
  static_assert(sizeof(T) == 2);
  bool right = reinterpret_cast<uintptr_t>(data) % 16 == 0 && rows > 0 && rows <= 256 && size[0] % 8 == 0;
  for (const int64_t n : size) right = right && n > 0 && n <= (int64_t)1 << 32;
  for (const int64_t n : stride) right = right && n > 0 && n % 16 == 0 && n < (int64_t)1 << 40;
  if (!right) throw std::runtime_error("cuTensorMapEncodeTiled would refuse this tensor");
  const auto* at = static_cast<const char*>(data);
  return {at, {size[0], size[1], size[2], size[3]}, {stride[0], stride[1], stride[2]}, rows};
}
inline void copy_panel(void* to, const TensorMap& map, Barrier* b, int column, int row, int head, int batch) {
  hopper::Copy copy{to, map, {column, row, head, batch}};
  emulation::check_shared(to, (size_t)copy.bytes(), "a tile");
  if (hopper::shared_offset(to) % 1024) emulation::fail("a tile at a misaligned address");
  std::memset(to, 0xFF, (size_t)copy.bytes());
  hopper::barrier(b).copies.push_back(copy);
}

inline void store_matrices(void* row, const uint32_t (&word)[4], FASTLM_LINE) {
  struct Matrices {
    void* row;
    const uint32_t* word;
  } mine{row, word};
  emulation::meet_warp("store_matrices", line, &mine, [](Matrices** all) {
    const int first = thread_index() - lane_index();
    for (int i = 0; i < 32; ++i) {
      auto* to = static_cast<unsigned char*>(all[i]->row);
      emulation::check_shared(to, 16, "store_matrices");
      if (hopper::shared_offset(to) % 16) emulation::fail("store_matrices at a misaligned address");
      for (int t = 0; t < 4; ++t) {
        const int lane = i % 8 * 4 + t;
        hopper::write_word(to + 4 * t, all[lane]->word[i / 8], first + lane);
      }
    }
  });
}
inline void store_numbers(float* to, const float (&x)[4]) {
  emulation::check_shared(to, 16, "store_numbers");
  if (hopper::shared_offset(to) % 16) emulation::fail("store_numbers at a misaligned address");
  for (int i = 0; i < 4; ++i) hopper::write_word(to + i, bits::of(x[i]), thread_index());
}
inline void fence_async() {
  auto& writers = hopper::unfenced().writers;
  for (auto at = writers.begin(); at != writers.end();)
    at = at->second == thread_index() ? writers.erase(at) : std::next(at);
}

inline void bulk_store(Global<float> to, const float* from, int bytes) {
  hopper::bulk_copies().issue(to, from, bytes, false);
}
inline void bulk_add(Global<float> to, const float* from, int bytes) {
  hopper::bulk_copies().issue(to, from, bytes, true);
}
inline void bulk_commit() {
  auto& mine = hopper::bulk_copies();
  mine.groups.push_back(std::exchange(mine.open, {}));
}
template <int GROUPS>
void bulk_wait_read(FASTLM_LINE) {
  emulation::pause("bulk_wait_read", line);
  hopper::bulk_copies().finish_reading(GROUPS);
}
template <int GROUPS>
void bulk_wait(FASTLM_LINE) {
  emulation::pause("bulk_wait", line);
  hopper::bulk_copies().finish(GROUPS);
}

inline int take_ticket(Global<int> counter) { return (*counter)++; }
inline void await_count(Global<int> counter, int value, FASTLM_LINE) {
  emulation::wait("a count in global memory", line, [&] { return *counter == value; });
}
inline void set_count(Global<int> counter, int value) {
  if (const auto& mine = hopper::bulk_copies(); !mine.open.empty() || !mine.groups.empty())
    emulation::fail("a count was set while bulk copies of its thread were under way");
  *counter = value;
}
inline void queue_zeros(void* data, size_t bytes, void*) { std::memset(data, 0, bytes); }

template <int REGISTERS>
void take_registers(FASTLM_LINE) {
  hopper::set_registers("setmaxnreg.inc", line, REGISTERS, true);
}
template <int REGISTERS>
void give_registers(FASTLM_LINE) {
  hopper::set_registers("setmaxnreg.dec", line, REGISTERS, false);
}

inline void wgmma_fence(FASTLM_LINE) {
  hopper::together("wgmma.fence", line, [] { hopper::warpgroup().fenced = true; });
}
inline void wgmma_commit(FASTLM_LINE) {
  hopper::together("wgmma.commit_group", line, [] {
    auto& mine = hopper::warpgroup();
    mine.groups.push_back(std::exchange(mine.open, {}));
  });
}
template <int GROUPS>
void wgmma_wait(FASTLM_LINE) {
  hopper::together("wgmma.wait_group", line, [] { hopper::warpgroup().finish(GROUPS); });
}
template <int N>
void hold(float (&)[1][N][4]) {}

inline uint64_t wgmma_descriptor(const void* start, int leading_bytes, int stride_bytes) {
  const auto field = [](int bytes) { return (uint64_t)(bytes >> 4 & 0x3FFF); };
  return field(hopper::shared_offset(start)) | field(leading_bytes) << 16 | field(stride_bytes) << 32 |
         (uint64_t)1 << 62;
}

template <class T, bool ADD, int N>
void wgmma_rows(float (&c)[1][N][4], uint64_t a, uint64_t b, FASTLM_LINE) {
  const hopper::Product product{std::is_same_v<T, bf16>, ADD, false, 8 * N, a, b, false, false, {}, {}, {}, {}};
  hopper::issue("wgmma of rows", line, product, &c[0][0][0], nullptr);
}
template <class T, bool ADD, int N>
void wgmma_columns(float (&c)[1][N][4], uint64_t a, uint64_t b, FASTLM_LINE) {
  const hopper::Product product{std::is_same_v<T, bf16>, ADD, false, 8 * N, a, b, true, true, {}, {}, {}, {}};
  hopper::issue("wgmma of columns", line, product, &c[0][0][0], nullptr);
}
template <class T, int N>
void wgmma_weighted(float (&c)[1][N][4], const uint32_t (&a)[4], uint64_t b, FASTLM_LINE) {
  const hopper::Product product{std::is_same_v<T, bf16>, true, true, 8 * N, 0, b, false, true, {}, {}, {}, {}};
  hopper::issue("wgmma with a in registers", line, product, &c[0][0][0], a);
}

}  // namespace fastlm::cuda
