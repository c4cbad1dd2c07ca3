// Runs a kernel launch on the CPU: each thread of a block is a fiber, blocks run one after the other (those of a
// cluster together). Threads wait for one another through `wait` and `meet`; when none can go on, the launch fails with
// an error that says who waits where. Both implementations of primitives build on this.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "types.cuh"

namespace fastlm::emulation {

using cuda::Dim;
using cuda::Launch;

struct Block;

// A cp.async that has been issued and not waited for.
struct Copy {
  void* to;
  const void* from;
  size_t bytes, valid;
};

struct Thread {
  Block* block = nullptr;
  int index = 0;
  void* stack_pointer = nullptr;
  bool done = false;
  // While it waits: whether it may go on, and where it stands for the error.
  bool (*ready)(void*) = nullptr;
  void* ready_argument = nullptr;
  const char* waits_at = nullptr;
  int waits_line = 0;

  std::vector<std::vector<Copy>> copy_groups;  // committed, oldest first
  std::vector<Copy> open_copies;
};

// A place where `arrived` members of a group wait for the rest; `arguments` has one entry a member.
struct Meeting {
  const char* what = nullptr;
  int line = 0, size = 0, arrived = 0;
  uint64_t round = 0;
  std::vector<void*> arguments;
};

struct Cluster {
  const Launch* launch;
  std::vector<Block*> blocks;
  Meeting barrier;
  int idle;  // rounds in which no thread could run, except for those that pause
};

struct Block {
  const Launch* launch;
  Cluster* cluster;
  Dim index;
  int rank = 0;  // in the cluster
  unsigned char* shared = nullptr;
  std::vector<Thread> threads;
  std::vector<Meeting> warps;       // one a warp: shuffles and everything else that a warp does together
  std::vector<Meeting> warpgroups;  // one a group of four warps
  Meeting barriers[16];
  Meeting votes;                    // barriers that combine something
  std::map<const void*, std::shared_ptr<void>> objects;  // state that other headers keep: mbarriers, products in flight
};

// The thread that runs; only inside a launch.
Thread& self();
inline Block& block() { return *self().block; }

// Ends the launch with an error that names kernel, block and thread.
[[noreturn]] void fail(const std::string& message);

// Lets the other threads run.
void yield_to_scheduler();

// Runs other threads until ready() is true. `what` and `line` stand in the error if that never happens.
template <class Ready>
void wait(const char* what, int line, Ready ready) {
  if (ready()) return;
  Thread& t = self();
  t.ready = [](void* f) { return (bool)(*static_cast<Ready*>(f))(); };
  t.ready_argument = &ready;
  t.waits_at = what, t.waits_line = line;
  yield_to_scheduler();
  t.ready = nullptr;
}

// Runs every other thread as far as it gets.
inline void pause(const char* what, int line) {
  wait(what, line, [] { return block().cluster->idle > 0; });
}

void enter(Meeting& m, const char* what, int line, int size);

// All `size` members of a group meet: each hands in its `mine` under its rank, the last to come runs
// combine(Argument** by rank), which may write into all of them, and then everyone goes on.
template <class Argument, class Combine>
void meet(Meeting& m, const char* what, int line, int rank, int size, Argument* mine, Combine combine) {
  enter(m, what, line, size);
  m.arguments[(size_t)rank] = mine;
  const uint64_t round = m.round;
  if (++m.arrived == size) {
    combine(reinterpret_cast<Argument**>(m.arguments.data()));
    m.arrived = 0;
    ++m.round;
    return;
  }
  wait(what, line, [&m, round] { return m.round != round; });
}

// The 32 lanes of this thread's warp meet.
template <class Argument, class Combine>
void meet_warp(const char* what, int line, Argument* mine, Combine combine) {
  Thread& t = self();
  meet(t.block->warps[(size_t)t.index / 32], what, line, t.index % 32, 32, mine, combine);
}
// The 128 threads of this thread's warpgroup meet.
template <class Argument, class Combine>
void meet_warpgroup(const char* what, int line, Argument* mine, Combine combine) {
  Thread& t = self();
  meet(t.block->warpgroups[(size_t)t.index / 128], what, line, t.index % 128, 128, mine, combine);
}

// Barrier `id` of the block for `threads` threads; `waits` is false for an arrival that goes on at once.
void barrier(int id, int threads, bool waits, int line);
void cluster_barrier(int line);

// Fails unless [p, p + bytes) lies in one of the buffers that the launch may use.
void check_global(const void* p, size_t bytes, const char* what);
// Fails unless [p, p + bytes) lies in the shared memory of a block of this thread's cluster.
void check_shared(const void* p, size_t bytes, const char* what);

// As the cp.async instructions: a copy lands when it is waited for, until then its destination is NaN.
void copy_async(void* to, const void* from, size_t bytes, size_t valid);
void commit_copies();
void wait_copies(size_t groups_left);

// Lets launches touch buffers, until it goes out of scope.
struct Buffers {
  void allow(const void* p, size_t bytes);
  ~Buffers();
};

// The GPU that launches find.
int architecture();
int multiprocessors();

void run(const Launch& launch, const std::function<void()>& body);

}  // namespace fastlm::emulation
