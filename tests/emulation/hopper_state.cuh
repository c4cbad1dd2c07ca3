// What stands behind tests/emulation/hopper.cuh: mbarriers and copies under way, products in flight, writes that no
// fence has shown to others yet, registers.
#pragma once

#include <primitives.cuh>

namespace fastlm::cuda {

constexpr int kWarpgroup = 128;
constexpr int kPanelColumns = 64, kPanelRowBytes = 128;

using Barrier = uint64_t;

// 16-bit elements, as cuTensorMapEncodeTiled takes them; sizes are columns, rows, heads, batch.
struct TensorMap {
  const char* data;
  int64_t size[4], stride[3];
  int rows;
};

namespace hopper {

// The block's state of a kind, or the one kept for an address.
template <class State>
State& state_of(const void* at) {
  auto& kept = emulation::block().objects[at];
  if (!kept) kept = std::make_shared<State>();
  return *std::static_pointer_cast<State>(kept);
}

inline int shared_offset(const void* p) {
  return (int)(static_cast<const unsigned char*>(p) - emulation::block().shared);
}
inline int swizzled(int address) { return address ^ (address >> 7 & 7) << 4; }

// Words of shared memory that a thread wrote and has not fenced.
struct Unfenced {
  std::map<int, int> writers;  // by the word's offset
};
inline Unfenced& unfenced() {
  static const char key = 0;
  return state_of<Unfenced>(&key);
}
inline void write_word(void* to, uint32_t word, int thread) {
  std::memcpy(to, &word, sizeof word);
  unfenced().writers[shared_offset(to)] = thread;
}
inline void check_fenced(const void* p, int bytes) {
  const auto& writers = unfenced().writers;
  if (writers.empty()) return;
  const auto found = writers.lower_bound(shared_offset(p) / 4 * 4);
  if (found != writers.end() && found->first < shared_offset(p) + bytes)
    emulation::fail("read what thread " + std::to_string(found->second) + " wrote and has not fenced");
}

// Bulk copies of one thread, from shared to global memory.
struct BulkCopy {
  Global<float> to;
  const float* from;
  bool add;
  std::vector<float> numbers;  // as they were when it was issued
};
struct BulkCopies {
  std::vector<BulkCopy> open;
  std::vector<std::vector<BulkCopy>> groups;  // committed, oldest first
  size_t read = 0;                            // groups whose numbers have been read

  void issue(Global<float> to, const float* from, int bytes, bool add) {
    emulation::check_shared(from, (size_t)bytes, "a bulk copy");
    emulation::check_global(to.raw(), (size_t)bytes, "a bulk copy");
    if (bytes % 16 || shared_offset(from) % 16 || reinterpret_cast<uintptr_t>(to.raw()) % 16)
      emulation::fail("a bulk copy of a misaligned address or size");
    check_fenced(from, bytes);
    const int count = bytes / 4;
    open.push_back({to, from, add, {from, from + count}});
    if (!add)
      for (int i = 0; i < count; ++i) to[i] = __builtin_nanf("");
  }
  void finish_reading(size_t groups_left) {
    for (; groups.size() - read > groups_left; ++read)
      for (const BulkCopy& copy : groups[read])
        if (std::memcmp(copy.from, copy.numbers.data(), copy.numbers.size() * sizeof(float)) != 0)
          emulation::fail("the source of a bulk copy changed before it was read");
  }
  void finish(size_t groups_left) {
    while (groups.size() > groups_left) {
      if (read == 0) finish_reading(groups.size() - 1);
      for (const BulkCopy& copy : groups.front())
        for (size_t i = 0; i < copy.numbers.size(); ++i)
          copy.to[(int64_t)i] = copy.add ? copy.to[(int64_t)i] + copy.numbers[i] : copy.numbers[i];
      groups.erase(groups.begin());
      --read;
    }
  }
};
inline BulkCopies& bulk_copies() { return state_of<BulkCopies>(&emulation::self()); }

struct Copy {
  void* to;
  TensorMap map;
  int at[4];

  int bytes() const { return map.rows * kPanelRowBytes; }

  // By chunks of 16 bytes: they lie inside of the tensor or outside, since its columns are whole chunks.
  void land() const {
    auto* shared = emulation::block().shared;
    for (int r = 0; r < map.rows; ++r)
      for (int c = 0; c < kPanelColumns; c += 8) {
        const int64_t place[4] = {at[0] + c, at[1] + r, at[2], at[3]};
        bool inside = true;
        int64_t offset = 2 * place[0];
        for (int i = 0; i < 4; ++i) inside = inside && place[i] >= 0 && place[i] < map.size[i];
        for (int i = 0; i < 3; ++i) offset += place[i + 1] * map.stride[i];
        auto* target = shared + swizzled(shared_offset(to) + r * kPanelRowBytes + 2 * c);
        if (inside) emulation::check_global(map.data + offset, 16, "a tile's copy");
        if (inside)
          std::memcpy(target, map.data + offset, 16);
        else
          std::memset(target, 0, 16);
      }
  }
};

struct BarrierState {
  int arrivals = 0, missing = 0;
  int64_t bytes = 0;
  uint64_t phase = 0;
  bool published = false;
  std::vector<Copy> copies;

  void advance() {
    if (missing < 0) emulation::fail("an mbarrier got more arrivals than it was made for");
    if (missing > 0 || bytes != 0) return;
    missing = arrivals;
    ++phase;
  }
  void poll() {
    for (const Copy& copy : std::exchange(copies, {})) {
      copy.land();
      bytes -= copy.bytes();
      advance();
    }
  }
};

struct Barriers {
  std::map<const Barrier*, BarrierState> made;
};
inline Barriers& barriers() {
  static const char key = 0;
  return state_of<Barriers>(&key);
}

constexpr Barrier kMade = 0x6d62617272696572;

inline BarrierState& barrier(const Barrier* b) {
  const auto found = barriers().made.find(b);
  if (found == barriers().made.end() || *b != kMade) emulation::fail("an mbarrier that was not made or is overwritten");
  if (!found->second.published) emulation::fail("an mbarrier that was not published");
  return found->second;
}

// One product of a warpgroup; the operands as 16-bit words, b as (16, n).
struct Product {
  bool brain, add, from_registers;
  int n;
  uint64_t a_descriptor, b_descriptor;
  bool a_transposed, b_transposed;
  const uint32_t* a[kWarpgroup];
  float* c[kWarpgroup];
  std::vector<uint16_t> left, right;

  static int field(uint64_t descriptor, int bit) { return (int)(descriptor >> bit & 0x3FFF) * 16; }

  // The element at the row of 8-row group `group`, line `line` in it, `bytes` into the row.
  static uint16_t element(uint64_t descriptor, int64_t offset) {
    if (descriptor >> 62 != 1) emulation::fail("a wgmma descriptor without the 128-byte swizzle");
    const int start = field(descriptor, 0);
    if ((descriptor >> 49 & 7) || start % 1024 >= 128)
      emulation::fail("a wgmma descriptor of a panel that does not start at a multiple of 1024 bytes");
    const auto* at = emulation::block().shared + swizzled(start + (int)offset);
    emulation::check_shared(at, 2, "wgmma");
    check_fenced(at, 2);
    uint16_t word;
    std::memcpy(&word, at, sizeof word);
    return word;
  }
  static uint16_t of_rows(uint64_t descriptor, int row, int k) {
    return element(descriptor, (int64_t)row / 8 * field(descriptor, 32) + row % 8 * kPanelRowBytes + 2 * k);
  }
  static uint16_t of_columns(uint64_t descriptor, int k, int n) {
    return element(descriptor, (int64_t)n / 64 * field(descriptor, 16) + n % 64 * 2 +
                                   (int64_t)k / 8 * field(descriptor, 32) + k % 8 * kPanelRowBytes);
  }

  std::vector<uint16_t> read_left() const {
    std::vector<uint16_t> found(64 * 16);
    for (int row = 0; row < 64; ++row)
      for (int k = 0; k < 16; ++k) {
        if (!from_registers) {
          found[(size_t)(16 * row + k)] =
              a_transposed ? of_columns(a_descriptor, k, row) : of_rows(a_descriptor, row, k);
          continue;
        }
        const int thread = row / 16 * 32 + row % 8 * 4 + k % 8 / 2, word = row % 16 / 8 + k / 8 * 2;
        found[(size_t)(16 * row + k)] = (uint16_t)(a[thread][word] >> k % 2 * 16);
      }
    return found;
  }
  std::vector<uint16_t> read_right() const {
    std::vector<uint16_t> found((size_t)(16 * n));
    for (int k = 0; k < 16; ++k)
      for (int column = 0; column < n; ++column)
        found[(size_t)(n * k + column)] =
            b_transposed ? of_columns(b_descriptor, k, column) : of_rows(b_descriptor, column, k);
    return found;
  }
  float value(uint16_t word) const { return brain ? to_float(bf16{word}) : to_float(fp16{word}); }

  void run(std::vector<float>& sums) const {
    if (left != read_left() || right != read_right())
      emulation::fail("an operand of wgmma changed before the product was waited for");
    if (!add) std::fill(sums.begin(), sums.end(), 0.0f);
    std::vector<float> b((size_t)(16 * n));
    for (size_t i = 0; i < b.size(); ++i) b[i] = value(right[i]);
    for (int row = 0; row < 64; ++row)
      for (int k = 0; k < 16; ++k) {
        const float x = value(left[(size_t)(16 * row + k)]);
        for (int column = 0; column < n; ++column)
          sums[(size_t)(row * n + column)] += x * b[(size_t)(n * k + column)];
      }
  }
};

// Accumulators that products in flight hold, by thread 0's registers.
struct Accumulator {
  float* c[kWarpgroup];
  int n, pending = 0;
  std::vector<float> sums;

  // f(a thread's register, its place in the sums).
  template <class F>
  void each(F f) {
    for (int thread = 0; thread < kWarpgroup; ++thread)
      for (int i = 0; i < n / 2; ++i) {
        const int row = thread / 32 * 16 + thread % 32 / 4 + i % 4 / 2 * 8, column = i / 4 * 8 + thread % 4 * 2 + i % 2;
        f(c[thread][i], sums[(size_t)(row * n + column)]);
      }
  }
};

struct Warpgroup {
  bool fenced = false;
  std::vector<Product> open;
  std::vector<std::vector<Product>> groups;  // committed, oldest first
  std::map<const float*, Accumulator> accumulators;
  int registers = 0;

  void issue(Product product) {
    if (!fenced) emulation::fail("wgmma without a wgmma_fence since the last wait");
    product.left = product.read_left(), product.right = product.read_right();
    auto [found, fresh] = accumulators.try_emplace(product.c[0]);
    Accumulator& sums = found->second;
    if (fresh) {
      std::copy(product.c, product.c + kWarpgroup, sums.c);
      sums.n = product.n, sums.sums.resize((size_t)(64 * product.n));
      sums.each([&](float& mine, float& sum) {
        if (product.add) sum = mine;
        mine = __builtin_nanf("");
      });
    }
    ++sums.pending;
    open.push_back(std::move(product));
  }
  void finish(size_t groups_left) {
    fenced = false;
    while (groups.size() > groups_left) {
      for (const Product& product : groups.front()) {
        Accumulator& sums = accumulators.at(product.c[0]);
        product.run(sums.sums);
        if (--sums.pending > 0) continue;
        sums.each([](float& mine, float& sum) { mine = sum; });
        accumulators.erase(product.c[0]);
      }
      groups.erase(groups.begin());
    }
  }
};

inline Warpgroup& warpgroup() {
  return state_of<Warpgroup>(&emulation::block().warpgroups[(size_t)thread_index() / kWarpgroup]);
}

// All threads of the warpgroup meet, one of them acts.
template <class Act>
void together(const char* what, int line, Act act) {
  int nothing = 0;
  emulation::meet_warpgroup(what, line, &nothing, [&](int**) { act(); });
}

struct Operands {
  Product product;
  float* c;
  const uint32_t* a;
};

inline void issue(const char* what, int line, const Product& product, float* c, const uint32_t* a) {
  Operands mine{product, c, a};
  emulation::meet_warpgroup(what, line, &mine, [](Operands** all) {
    Product whole = all[0]->product;
    for (int i = 0; i < kWarpgroup; ++i) {
      const Product& other = all[i]->product;
      if (other.a_descriptor != whole.a_descriptor || other.b_descriptor != whole.b_descriptor)
        emulation::fail("descriptors differ within a warpgroup");
      whole.c[i] = all[i]->c, whole.a[i] = all[i]->a;
    }
    warpgroup().issue(std::move(whole));
  });
}

struct RegisterPool {
  int left = -1;  // for each thread of a warpgroup
};
inline void set_registers(const char* what, int line, int count, bool more) {
  static const char key = 0;
  RegisterPool& pool = state_of<RegisterPool>(&key);
  const int groups = (int)emulation::block().warpgroups.size(), at_start = 512 / groups / 8 * 8;
  if (pool.left < 0) pool.left = 512 - groups * at_start;
  Warpgroup& mine = warpgroup();
  if (mine.registers == 0) mine.registers = at_start;
  if (count % 8 || count < 24 || count > 256 || (more ? count < mine.registers : count > mine.registers))
    emulation::fail("setmaxnreg of " + std::to_string(count) + " from " + std::to_string(mine.registers));
  const int needed = count - mine.registers;
  emulation::wait(what, line, [&] { return pool.left >= needed; });
  together(what, line, [&] { pool.left -= needed, mine.registers = count; });
}

}  // namespace hopper

}  // namespace fastlm::cuda
