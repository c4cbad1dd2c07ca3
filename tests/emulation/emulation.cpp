#include "primitives.cuh"

#include <sys/mman.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include <algorithm>
#include <exception>
#include <random>

namespace fastlm::emulation {

namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr size_t kRedZone = 4096;       // around shared memory
constexpr unsigned char kUnset = 0xFF;  // NaN in every floating-point type
constexpr unsigned char kRed = 0xA5;

struct Span {
  const char* begin;
  const char* end;
};

struct Settings {
  uint64_t seed = 0;  // of the order of blocks, warps and threads; 0 for ascending
  int architecture = 90, multiprocessors = 3;
  std::vector<Span> spans;  // buffers that the launch may touch
};
thread_local Settings settings;

// What runs at present on this operating-system thread.
struct Machine {
  Thread* current = nullptr;
  const std::function<void()>* body = nullptr;
  void* scheduler = nullptr;
  std::exception_ptr error;
  char* stacks = nullptr;
  size_t stack_count = 0;
  ~Machine() {
    if (stacks) munmap(stacks, stack_count * kStackBytes);
  }
};
thread_local Machine machine;

void run_body() {
  Thread& t = *machine.current;
  try {
    (*machine.body)();
    for (auto& group : t.copy_groups)
      if (!group.empty()) fail("ended with a cp.async that it never waited for");
  } catch (...) {
    if (!machine.error) machine.error = std::current_exception();
  }
  t.done = true;
  yield_to_scheduler();
}

// A switch of stacks: saves the registers that a call keeps and the stack pointer, and continues at `to`.
#if defined(__x86_64__)
extern "C" void fastlm_switch_stack(void** from, void* to);
asm(R"(
.text
.globl fastlm_switch_stack
.hidden fastlm_switch_stack
fastlm_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
void* prepare_stack(char* base) {
  auto** top = reinterpret_cast<void**>(base + kStackBytes);
  *--top = nullptr;  // run_body starts as after a call: 8 bytes off a multiple of 16
  *--top = reinterpret_cast<void*>(&run_body);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  return top;
}
void switch_stack(void** from, void* to) { fastlm_switch_stack(from, to); }
#else
thread_local std::vector<ucontext_t> contexts;
thread_local ucontext_t scheduler_context;
void* prepare_stack(char* base) {
  const size_t i = (size_t)(base - machine.stacks) / kStackBytes;
  if (contexts.size() < machine.stack_count) contexts.resize(machine.stack_count);
  getcontext(&contexts[i]);
  contexts[i].uc_stack = {base, 0, kStackBytes};
  makecontext(&contexts[i], run_body, 0);
  return &contexts[i];
}
void switch_stack(void** from, void* to) {
  *from = from == &machine.scheduler ? &scheduler_context : *from;
  swapcontext(static_cast<ucontext_t*>(*from), static_cast<ucontext_t*>(to));
}
#endif

char* stack_of(size_t i, size_t count) {
  if (machine.stack_count < count) {
    if (machine.stacks) munmap(machine.stacks, machine.stack_count * kStackBytes);
    void* p = mmap(nullptr, count * kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                   -1, 0);
    if (p == MAP_FAILED) throw std::runtime_error("emulation: no memory for stacks");
    machine.stacks = static_cast<char*>(p), machine.stack_count = count;
  }
  return machine.stacks + i * kStackBytes;
}

std::string text(Dim d) {
  return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
}

std::string place(const char* what, int line) { return std::string(what) + " (line " + std::to_string(line) + ")"; }

// Says of a launch in which no thread can go on how many of which block wait where.
[[noreturn]] void report_deadlock(const Cluster& cluster) {
  std::string message = cluster.launch->name;
  for (const Block* b : cluster.blocks) {
    std::map<std::string, std::vector<int>> where;
    for (const Thread& t : b->threads) where[t.done ? "have ended" : "wait at " + place(t.waits_at, t.waits_line)]
        .push_back(t.index);
    message += ": block " + text(b->index) + " can't go on";
    for (const auto& [state, threads] : where)
      message += "; " + std::to_string(threads.size()) + " threads, the first of them " +
                 std::to_string(threads.front()) + ", " + state;
  }
  throw std::runtime_error(message);
}

void resume(Thread& t) {
  machine.current = &t;
  switch_stack(&machine.scheduler, t.stack_pointer);
  machine.current = nullptr;
  if (machine.error) std::rethrow_exception(machine.error);
}

// Lets each thread of a warp run that can; whether any did.
bool step(Block& b, int warp, bool backwards) {
  bool ran = false;
  const int first = warp * 32, end = std::min(first + 32, (int)b.threads.size());
  for (int i = first; i < end; ++i) {
    Thread& t = b.threads[(size_t)(backwards ? end - 1 - (i - first) : i)];
    machine.current = &t;  // whose block and errors a condition speaks of
    if (t.done || (t.ready && !t.ready(t.ready_argument))) continue;
    resume(t);
    ran = true;
  }
  return ran;
}

struct SharedMemory {
  std::vector<unsigned char> bytes;
  size_t size;
  explicit SharedMemory(size_t n) : bytes(n + 2 * kRedZone + 1024, kRed), size(n) { std::memset(data(), kUnset, n); }
  unsigned char* data() {
    const auto p = reinterpret_cast<uintptr_t>(bytes.data()) + kRedZone;
    return reinterpret_cast<unsigned char*>((p + 1023) / 1024 * 1024);
  }
  bool intact() {
    const auto red = [](unsigned char c) { return c == kRed; };
    return std::all_of(bytes.data(), data(), red) &&
           std::all_of(data() + size, bytes.data() + bytes.size(), red);
  }
};

void start(Block& b, size_t first_stack, size_t stacks) {
  const auto threads = (size_t)b.launch->threads;
  b.threads.resize(threads);
  b.warps.resize((threads + 31) / 32);
  b.warpgroups.resize((threads + 127) / 128);
  for (size_t i = 0; i < threads; ++i) {
    b.threads[i].block = &b;
    b.threads[i].index = (int)i;
    b.threads[i].stack_pointer = prepare_stack(stack_of(first_stack + i, stacks));
  }
}

bool finished(const Cluster& cluster) {
  for (const Block* b : cluster.blocks)
    for (const Thread& t : b->threads)
      if (!t.done) return false;
  return true;
}

void run_cluster(Cluster& cluster, std::mt19937_64* random) {
  struct Warp {
    Block* block;
    int index;
  };
  std::vector<Warp> warps;
  for (Block* b : cluster.blocks)
    for (size_t w = 0; w < b->warps.size(); ++w) warps.push_back({b, (int)w});
  while (!finished(cluster)) {
    if (random) std::shuffle(warps.begin(), warps.end(), *random);
    bool progress = false;
    for (const Warp& w : warps)
      while (step(*w.block, w.index, random && (*random)() % 2)) progress = true;
    cluster.idle = progress ? 0 : cluster.idle + 1;
    if (cluster.idle > 1) report_deadlock(cluster);
  }
}

// The blocks [first, first + launch.cluster) along x of one (y, z).
void run_blocks(const Launch& launch, Dim first, std::mt19937_64* random) {
  Cluster cluster{&launch, {}, {}, 0};
  std::vector<Block> blocks((size_t)launch.cluster);
  std::vector<SharedMemory> shared;
  const size_t stacks = (size_t)launch.cluster * (size_t)launch.threads;
  for (size_t i = 0; i < blocks.size(); ++i) shared.emplace_back(launch.shared_bytes);
  for (size_t i = 0; i < blocks.size(); ++i) {
    Block& b = blocks[i];
    b.launch = &launch, b.cluster = &cluster, b.rank = (int)i;
    b.index = {first.x + (unsigned)i, first.y, first.z};
    b.shared = shared[i].data();
    cluster.blocks.push_back(&b);
    start(b, i * (size_t)launch.threads, stacks);
  }
  run_cluster(cluster, random);
  for (size_t i = 0; i < blocks.size(); ++i)
    if (!shared[i].intact())
      throw std::runtime_error(std::string(launch.name) + ": block " + text(blocks[i].index) +
                               " wrote outside of its shared memory");
}

void check_shape(const Launch& l) {
  const bool ok = l.grid.x && l.grid.y && l.grid.z && l.grid.x < 1u << 31 && l.grid.y < 65536 && l.grid.z < 65536 &&
                  l.threads > 0 && l.threads <= 1024 && l.shared_bytes <= (size_t)cuda::shared_bytes_limit() && l.cluster >= 1 &&
                  l.cluster <= 16 && l.grid.x % (unsigned)l.cluster == 0;
  if (!ok) throw std::runtime_error(described(l) + ": invalid configuration");
}

}  // namespace

Thread& self() { return *machine.current; }

void yield_to_scheduler() { switch_stack(&machine.current->stack_pointer, machine.scheduler); }

void fail(const std::string& message) {
  const Thread& t = self();
  throw std::runtime_error(std::string(t.block->launch->name) + ": block " + text(t.block->index) + ", thread " +
                           std::to_string(t.index) + ": " + message);
}

void enter(Meeting& m, const char* what, int line, int size) {
  m.arguments.resize((size_t)size);
  if (m.arrived == 0) {
    m.what = what, m.line = line, m.size = size;
  } else if (std::strcmp(m.what, what) != 0 || m.line != line || m.size != size) {
    fail("came to " + place(what, line) + " while others of its group wait at " + place(m.what, m.line));
  }
}

void barrier(int id, int threads, bool waits, int line) {
  static const char* const names[] = {"barrier 0",  "barrier 1",  "barrier 2",  "barrier 3",
                                      "barrier 4",  "barrier 5",  "barrier 6",  "barrier 7",
                                      "barrier 8",  "barrier 9",  "barrier 10", "barrier 11",
                                      "barrier 12", "barrier 13", "barrier 14", "barrier 15"};
  if (id < 0 || id > 15) fail("barrier " + std::to_string(id) + ", expected 0 to 15");
  Meeting& m = block().barriers[id];
  if (id > 0 && (threads % 32 != 0 || threads < 32 || threads > block().launch->threads))
    fail(place(names[id], line) + " for " + std::to_string(threads) + " threads");
  if (m.arrived > 0 && m.size != threads)
    fail(place(names[id], line) + " for " + std::to_string(threads) + " threads, others said " +
         std::to_string(m.size));
  m.size = threads;
  const uint64_t round = m.round;
  if (++m.arrived == threads) {
    m.arrived = 0;
    ++m.round;
  } else if (waits) {
    wait(names[id], line, [&m, round] { return m.round != round; });
  }
}

void cluster_barrier(int line) {
  Cluster& cluster = *block().cluster;
  Meeting& m = cluster.barrier;
  const uint64_t round = m.round;
  if (++m.arrived == (int)cluster.blocks.size() * cluster.launch->threads) {
    m.arrived = 0;
    ++m.round;
  } else {
    wait("the cluster's barrier", line, [&m, round] { return m.round != round; });
  }
}

void check_global(const void* p, size_t bytes, const char* what) {
  const char* begin = static_cast<const char*>(p);
  for (const Span& s : settings.spans)
    if (s.begin <= begin && begin + bytes <= s.end) return;
  std::string nearest = "no buffer";
  for (const Span& s : settings.spans)
    if (begin + bytes > s.begin - kRedZone && begin < s.end + kRedZone)
      nearest = std::to_string(begin - s.begin) + " of a buffer of " + std::to_string(s.end - s.begin) + " bytes";
  fail(std::string(what) + " of " + std::to_string(bytes) + " bytes out of bounds, at " + nearest);
}

void check_shared(const void* p, size_t bytes, const char* what) {
  const auto* begin = static_cast<const unsigned char*>(p);
  for (const Block* b : block().cluster->blocks)
    if (b->shared <= begin && begin + bytes <= b->shared + b->launch->shared_bytes) return;
  fail(std::string(what) + " of " + std::to_string(bytes) + " bytes outside of shared memory");
}

void copy_async(void* to, const void* from, size_t bytes, size_t valid) {
  check_shared(to, bytes, "cp.async");
  if (reinterpret_cast<uintptr_t>(to) % bytes || (valid && reinterpret_cast<uintptr_t>(from) % bytes))
    fail("cp.async of " + std::to_string(bytes) + " bytes at a misaligned address");
  if (valid > bytes) fail("cp.async of more valid bytes than bytes");
  if (valid) check_global(from, valid, "cp.async");
  std::memset(to, kUnset, bytes);
  self().open_copies.push_back({to, from, bytes, valid});
}

void commit_copies() {
  Thread& t = self();
  t.copy_groups.push_back(std::move(t.open_copies));
  t.open_copies.clear();
}

void wait_copies(size_t groups_left) {
  auto& groups = self().copy_groups;
  while (groups.size() > groups_left) {
    for (const Copy& c : groups.front()) {
      if (c.valid) std::memcpy(c.to, c.from, c.valid);
      std::memset(static_cast<char*>(c.to) + c.valid, 0, c.bytes - c.valid);
    }
    groups.erase(groups.begin());
  }
}

void Buffers::allow(const void* p, size_t bytes) {
  const char* begin = static_cast<const char*>(p);
  settings.spans.push_back({begin, begin + bytes});
}
Buffers::~Buffers() { settings.spans.clear(); }

int architecture() { return settings.architecture; }
int multiprocessors() { return settings.multiprocessors; }

void run(const Launch& launch, const std::function<void()>& body) {
  check_shape(launch);
  std::vector<Dim> firsts;
  for (unsigned z = 0; z < launch.grid.z; ++z)
    for (unsigned y = 0; y < launch.grid.y; ++y)
      for (unsigned x = 0; x < launch.grid.x; x += (unsigned)launch.cluster) firsts.push_back({x, y, z});
  std::mt19937_64 random(settings.seed);
  if (settings.seed) std::shuffle(firsts.begin(), firsts.end(), random);
  machine.body = &body;
  machine.error = nullptr;
  for (const Dim& first : firsts) run_blocks(launch, first, settings.seed ? &random : nullptr);
}

}  // namespace fastlm::emulation

// What tests set, through ctypes: it holds for the calling thread.
extern "C" {
__attribute__((visibility("default"))) void fastlm_emulation_allow(const void* p, int64_t bytes) {
  const char* begin = static_cast<const char*>(p);
  fastlm::emulation::settings.spans.push_back({begin, begin + bytes});
}
__attribute__((visibility("default"))) void fastlm_emulation_forget() { fastlm::emulation::settings.spans.clear(); }
__attribute__((visibility("default"))) void fastlm_emulation_device(int architecture, int multiprocessors) {
  fastlm::emulation::settings.architecture = architecture;
  fastlm::emulation::settings.multiprocessors = multiprocessors;
}
__attribute__((visibility("default"))) void fastlm_emulation_order(uint64_t seed) {
  fastlm::emulation::settings.seed = seed;
}
}
