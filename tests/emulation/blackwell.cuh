// The names of csrc/cuda/blackwell.cuh on a CPU, as strict as the PTX ISA lets hardware be: products run only when
// someone has to wait for the barrier of a commit that came after them, in the order of their issue; until then their
// sums may not be touched, and an operand that changes is an error; descriptors are decoded bit by bit; loads from
// tensor memory land when they are waited for, until then registers hold NaN; stores too, and products and other
// threads may read them only when the thread that wrote has published them.
#pragma once

#include <deque>

#include "hopper.cuh"

#define FASTLM_SM100A 1

namespace fastlm::cuda {

constexpr int kTensorColumns = 512;

namespace blackwell {

constexpr int kLanes = 128;

// A product (128, 16) (16, n), or a commit, which has a barrier.
struct Issued {
  Barrier* barrier = nullptr;
  uint32_t sums = 0, instruction = 0;
  bool add = false, from_tensor = false;
  uint64_t a = 0, b = 0;
  std::vector<uint16_t> left, right;  // as they were when it was issued: (128, 16), (16, n)

  int n() const { return (int)(instruction >> 17 & 0x3F) * 8; }
};

struct Stored {
  int lane, column;
  std::vector<uint32_t> words;
};
struct Loaded {
  float* to;
  int lane, column, count;
};

// What a thread has under way, and where it wrote since it last published.
struct Traffic {
  std::vector<Stored> stores;
  std::vector<Loaded> loads;
  std::vector<std::pair<int, int>> unpublished;  // lane, column
};

struct Memory {
  uint32_t word[kLanes][kTensorColumns];
  int writer[kLanes][kTensorColumns];                          // thread + 1 that has not published, or 0
  int writing[kTensorColumns] = {}, reading[kTensorColumns] = {};  // products issued and not done
  bool held = false;
  int holder = -1, issuer = -1;  // the warp that allocated, the thread that issues products
  std::deque<Issued> queue;
  std::map<int, Traffic> traffic;
  const char* name = "";

  Memory() {
    std::memset(word, 0xFF, sizeof word);
    std::memset(writer, 0, sizeof writer);
  }
  ~Memory() {
    if (held) left_held() = name;
  }
  // A kernel whose block ended without freeing tensor memory, where every later block would wait for ever.
  static std::string& left_held() {
    static thread_local std::string name;
    return name;
  }
  // Blocks that have freed it so far.
  static int64_t& freed() {
    static thread_local int64_t blocks = 0;
    return blocks;
  }
  Traffic& mine() { return traffic[thread_index()]; }
};

inline Memory& memory() {
  static const char key = 0;
  return hopper::state_of<Memory>(&key);
}

// Memory that the calling thread may use, `columns` from an address on.
inline Memory& memory_at(const char* what, uint32_t address, int columns) {
  Memory& m = memory();
  const int column = (int)(address & 0xFFFF);
  if (!m.held) emulation::fail(std::string(what) + ": tensor memory is not allocated");
  if (column + columns > kTensorColumns || (int)(address >> 16) >= kLanes)
    emulation::fail(std::string(what) + " outside of tensor memory, at column " + std::to_string(column));
  return m;
}

inline void check_published(const Memory& m, int lane, int column, int reader) {
  const int writer = m.writer[lane][column];
  if (writer != 0 && writer != reader + 1)
    emulation::fail("read what thread " + std::to_string(writer - 1) + " wrote to tensor memory and has not published");
}

inline void check_written(const Memory& m, int first, int columns) {
  for (int column = first; column < first + columns; ++column)
    if (m.writing[column]) emulation::fail("a load of sums that are not there yet, column " + std::to_string(column));
}

// As hopper::Product's, with the fields of sm_100: eight neighbours, `offset` bytes from the start before the swizzle.
inline void read_chunk(uint64_t descriptor, int64_t offset, uint16_t (&to)[8]) {
  if (descriptor >> 61 != 2) emulation::fail("a descriptor of tcgen05 without the 128-byte swizzle");
  if ((descriptor >> 46 & 3) != 1) emulation::fail("a descriptor of tcgen05 without its version");
  const int start = hopper::Product::field(descriptor, 0);
  if ((descriptor >> 49 & 15) || start % 1024 >= 128)
    emulation::fail("a descriptor of tcgen05 of a panel that does not start at a multiple of 1024 bytes");
  const auto* at = emulation::block().shared + hopper::swizzled(start + (int)offset);
  emulation::check_shared(at, sizeof to, "tcgen05.mma");
  hopper::check_fenced(at, sizeof to);
  std::memcpy(to, at, sizeof to);
}
// Rows `row`, columns k on; and rows k, columns n on.
inline void read_row(uint64_t descriptor, int row, int k, uint16_t (&to)[8]) {
  const int64_t group = (int64_t)row / 8 * hopper::Product::field(descriptor, 32);
  read_chunk(descriptor, group + row % 8 * kPanelRowBytes + 2 * k, to);
}
inline void read_column(uint64_t descriptor, int k, int n, uint16_t (&to)[8]) {
  const int64_t group = (int64_t)k / 8 * hopper::Product::field(descriptor, 32);
  const int64_t panel = (int64_t)n / 64 * hopper::Product::field(descriptor, 16);
  read_chunk(descriptor, panel + n % 64 * 2 + group + k % 8 * kPanelRowBytes, to);
}

// left: (128, 16), right: (16, n).
inline void read_operands(const Memory& m, const Issued& product, std::vector<uint16_t>& left,
                          std::vector<uint16_t>& right) {
  const int n = product.n();
  uint16_t chunk[8];
  left.resize(kLanes * 16), right.resize((size_t)(16 * n));
  for (int row = 0; row < kLanes; ++row)
    for (int k = 0; k < 16; k += 8) {
      for (int i = 0; i < 8 && product.from_tensor; ++i) {
        const int column = (int)(product.a & 0xFFFF) + (k + i) / 2;
        check_published(m, row, column, -1);
        chunk[i] = (uint16_t)(m.word[row][column] >> i % 2 * 16);
      }
      if (!product.from_tensor) read_row(product.a, row, k, chunk);
      std::copy(chunk, chunk + 8, &left[(size_t)(16 * row + k)]);
    }
  const bool mn_major = product.instruction >> 16 & 1;
  for (int i = 0; i < 16 * n; i += 8) {
    const int k = mn_major ? i / n : i % 16, column = mn_major ? i % n : i / 16;
    mn_major ? read_column(product.b, k, column, chunk) : read_row(product.b, column, k, chunk);
    for (int e = 0; e < 8; ++e) right[(size_t)(mn_major ? n * k + column + e : n * (k + e) + column)] = chunk[e];
  }
}

inline void check_instruction(uint32_t instruction) {
  const uint32_t type = instruction >> 7 & 7, n = instruction >> 17 & 0x3F;
  const uint32_t known = 1u << 4 | type << 7 | type << 10 | (instruction & 1u << 16) | n << 17 | 8u << 24;
  if (instruction != known || type > 1 || n % 2 != 0 || n == 0 || n > 32)
    emulation::fail("an instruction descriptor that is not emulated");
}

inline void issue(Issued product) {
  check_instruction(product.instruction);
  Memory& m = memory_at("tcgen05.mma", product.sums, product.n());
  if (product.from_tensor) memory_at("tcgen05.mma", (uint32_t)product.a, 8);
  if ((product.sums | (product.from_tensor ? product.a : 0)) >> 16 & 0xFFFF)
    emulation::fail("a product whose tensor memory does not start at lane 0");
  if (m.issuer < 0) m.issuer = thread_index();
  if (m.issuer != thread_index()) emulation::fail("products of two threads, whose order is not known");
  read_operands(m, product, product.left, product.right);
  const int first = (int)(product.sums & 0xFFFF);
  for (int column = first; column < first + product.n(); ++column) {
    ++m.writing[column];
    for (int lane = 0; lane < kLanes; ++lane) check_published(m, lane, column, -1);
  }
  if (product.from_tensor)
    for (int i = 0; i < 8; ++i) ++m.reading[(product.a & 0xFFFF) + (uint64_t)i];
  m.queue.push_back(std::move(product));
}

inline void run(Memory& m, const Issued& product) {
  std::vector<uint16_t> left, right;
  read_operands(m, product, left, right);
  if (left != product.left || right != product.right)
    emulation::fail("an operand of tcgen05.mma changed before the product was done");
  const bool brain = product.instruction >> 7 & 1;
  const auto value = [brain](uint16_t word) { return brain ? to_float(bf16{word}) : to_float(fp16{word}); };
  const int n = product.n(), first = (int)(product.sums & 0xFFFF);
  std::vector<float> b(right.size()), sums((size_t)n);
  for (size_t i = 0; i < b.size(); ++i) b[i] = value(right[i]);
  for (int row = 0; row < kLanes; ++row) {
    uint32_t* const at = &m.word[row][first];
    for (int column = 0; column < n; ++column) sums[(size_t)column] = product.add ? bits::number(at[column]) : 0;
    for (int k = 0; k < 16; ++k) {
      const float x = value(left[(size_t)(16 * row + k)]);
      for (int column = 0; column < n; ++column) sums[(size_t)column] += x * b[(size_t)(n * k + column)];
    }
    std::memcpy(at, sums.data(), sizeof(float) * (size_t)n);
  }
  for (int column = first; column < first + n; ++column) --m.writing[column];
  if (product.from_tensor)
    for (int i = 0; i < 8; ++i) --m.reading[(product.a & 0xFFFF) + (uint64_t)i];
}

// Runs products until a commit to this barrier has arrived; nothing where none is under way.
inline void run_until(const Barrier* b) {
  Memory& m = memory();
  const auto commits_it = [b](const Issued& x) { return x.barrier == b; };
  if (std::none_of(m.queue.begin(), m.queue.end(), commits_it)) return;
  for (bool arrived = false; !arrived;) {
    const Issued next = std::move(m.queue.front());
    m.queue.pop_front();
    if (next.barrier)
      barrier_arrive(next.barrier);
    else
      run(m, next);
    arrived = commits_it(next);
  }
}

// This thread's lane; the address is its warp's.
inline int lane_at(const char* what, uint32_t address) {
  const int first = warp_index() % 4 * kWarp;
  if ((int)(address >> 16) != first)
    emulation::fail(std::string(what) + " of lane " + std::to_string(address >> 16) +
                    " by a warp that reaches lanes from " + std::to_string(first) + " on");
  return first + lane_index();
}

inline void together(const char* what, int line) {
  int nothing = 0;
  emulation::meet_warp(what, line, &nothing, [](int**) {});
}

template <class Word, int N>
void store(const char* what, uint32_t address, const Word (&x)[N], int line) {
  together(what, line);
  Memory& m = memory_at(what, address, N);
  Stored stored{lane_at(what, address), (int)(address & 0xFFFF), std::vector<uint32_t>(N)};
  std::memcpy(stored.words.data(), x, sizeof x);
  for (int i = 0; i < N; ++i) {
    const int column = stored.column + i;
    if (m.writing[column] || m.reading[column])
      emulation::fail("a store to tensor memory that a product still uses, column " + std::to_string(column));
    m.word[stored.lane][column] = 0xFFFFFFFF;
    m.writer[stored.lane][column] = thread_index() + 1;
    m.mine().unpublished.push_back({stored.lane, column});
  }
  m.mine().stores.push_back(std::move(stored));
}

}  // namespace blackwell

inline void tensor_alloc(uint32_t* address, FASTLM_LINE) {
  emulation::check_shared(address, sizeof *address, "tensor_alloc");
  blackwell::together("tensor_alloc", line);
  if (lane_index() != 0) return;
  blackwell::Memory& m = blackwell::memory();
  if (m.held) emulation::fail("tensor memory is allocated twice");
  m.held = true, m.holder = warp_index(), m.name = emulation::block().launch->name;
  *address = 0;
}
inline void tensor_free(uint32_t address, FASTLM_LINE) {
  blackwell::together("tensor_free", line);
  if (lane_index() != 0) return;
  blackwell::Memory& m = blackwell::memory_at("tensor_free", address, kTensorColumns);
  if (m.holder != warp_index()) emulation::fail("tensor memory is freed by another warp than allocated it");
  for (const blackwell::Issued& x : m.queue)
    if (!x.barrier) emulation::fail("tensor memory is freed while a product is under way");
  for (const auto& [thread, traffic] : m.traffic)
    if (!traffic.stores.empty() || !traffic.loads.empty())
      emulation::fail("tensor memory is freed while thread " + std::to_string(thread) + " uses it");
  m.held = false;
  ++blackwell::Memory::freed();
}

inline void tensor_fence_before() {
  blackwell::Memory& m = blackwell::memory();
  const auto found = m.traffic.find(thread_index());
  if (found == m.traffic.end() || !found->second.stores.empty()) return;
  for (const auto& [lane, column] : found->second.unpublished) m.writer[lane][column] = 0;
  found->second.unpublished.clear();
}
inline void tensor_fence_after() {}

inline void wait_tensor(Barrier* b, int parity, FASTLM_LINE) {
  auto& state = hopper::barrier(b);
  emulation::wait("an mbarrier of products", line, [&] {
    const auto ended = [&] { return (int)(state.phase % 2) != parity; };
    if (!ended()) blackwell::run_until(b);
    if (!ended()) state.poll();
    return ended();
  });
}

inline void tensor_load(float (&x)[32], uint32_t address, FASTLM_LINE) {
  blackwell::together("tensor_load", line);
  blackwell::Memory& m = blackwell::memory_at("tensor_load", address, 32);
  blackwell::check_written(m, (int)(address & 0xFFFF), 32);
  m.mine().loads.push_back({x, blackwell::lane_at("tensor_load", address), (int)(address & 0xFFFF), 32});
  for (float& number : x) number = __builtin_nanf("");
}
template <int N>
void tensor_wait_loads(float (&)[N][32], FASTLM_LINE) {
  blackwell::together("tensor_wait_loads", line);
  blackwell::Memory& m = blackwell::memory();
  for (const blackwell::Loaded& load : std::exchange(m.mine().loads, {})) {
    blackwell::check_written(m, load.column, load.count);
    for (int i = 0; i < load.count; ++i) {
      blackwell::check_published(m, load.lane, load.column + i, thread_index());
      load.to[i] = bits::number(m.word[load.lane][load.column + i]);
    }
  }
}

inline void tensor_store(uint32_t address, const float (&x)[32], FASTLM_LINE) {
  blackwell::store("tensor_store", address, x, line);
}
inline void tensor_store(uint32_t address, const uint32_t (&x)[16], FASTLM_LINE) {
  blackwell::store("tensor_store of pairs", address, x, line);
}
inline void tensor_publish(FASTLM_LINE) {
  blackwell::together("tensor_publish", line);
  blackwell::Memory& m = blackwell::memory();
  for (const blackwell::Stored& store : std::exchange(m.mine().stores, {}))
    std::memcpy(&m.word[store.lane][store.column], store.words.data(), sizeof(uint32_t) * store.words.size());
  tensor_fence_before();
}

inline uint64_t umma_descriptor(const void* start, int leading_bytes, int stride_bytes) {
  const auto field = [](int bytes) { return (uint64_t)(bytes >> 4 & 0x3FFF); };
  return field(hopper::shared_offset(start)) | field(leading_bytes) << 16 | field(stride_bytes) << 32 |
         (uint64_t)1 << 46 | (uint64_t)2 << 61;
}
template <class T, int N, bool MN_MAJOR>
constexpr uint32_t umma_instruction() {
  static_assert(N % 16 == 0 && N >= 16 && N <= 256);
  const uint32_t type = std::is_same_v<T, bf16> ? 1 : 0;
  return 1u << 4 | type << 7 | type << 10 | (uint32_t)MN_MAJOR << 16 | (uint32_t)(N / 8) << 17 | 128u / 16 << 24;
}
inline void umma_shared(uint32_t sums, uint64_t a, uint64_t b, uint32_t instruction, bool add) {
  blackwell::issue({nullptr, sums, instruction, add, false, a, b, {}, {}});
}
inline void umma_tensor(uint32_t sums, uint32_t a, uint64_t b, uint32_t instruction, bool add) {
  blackwell::issue({nullptr, sums, instruction, add, true, a, b, {}, {}});
}
inline void umma_commit(Barrier* b) {
  hopper::barrier(b);
  blackwell::memory().queue.push_back({b, 0, 0, false, false, 0, 0, {}, {}});
}

inline float max_or_nan(float a, float b) { return a != a || b != b ? __builtin_nanf("") : std::fmax(a, b); }
inline float times_power(float x, float shifted) { return bits::number(bits::of(x) + (bits::of(shifted) << 23)); }

}  // namespace fastlm::cuda
