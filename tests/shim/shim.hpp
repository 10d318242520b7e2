// The machine of cuda/device.cuh on a CPU: every thread of a block is a fiber, and the kernels are those that nvcc compiles.
//
// It is harsher than a GPU. Blocks come in a random order, and so do the threads between two barriers, so that what no
// barrier orders goes wrong; shared memory holds NaN before a block starts, and has no byte more than was asked for.
// A barrier that a thread has left behind or never comes to, lanes that disagree about a shuffle, and a launch that a GPU
// would refuse end the program with a line that says so. NORMKIT_SHIM_SEED in the environment chooses the order.
#pragma once

#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#include "vec/half.hpp"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define NORMKIT_DEVICE inline
#define NORMKIT_UNROLL
#define NORMKIT_ROLL

namespace normkit::cuda {

using Stream = void*;

struct Grid {
  std::int64_t blocks = 1;
  int threads = 256;
  int shared_bytes = 0;
};

struct DeviceGuard {
  explicit DeviceGuard(int) {}
};
inline constexpr const char* kBuild = "shim";
inline bool has_device() { return true; }

namespace shim {

constexpr int kWarp = 32;
constexpr std::size_t kStackBytes = std::size_t{256} << 10;
constexpr int kSharedBytes = 48 << 10;  // what every GPU gives without being asked

enum class State { ready, at_barrier, at_shuffle, done };

struct Fiber {
  ucontext_t context;
  State state = State::ready;
  const void* given = nullptr;  // of a shuffle
  void* taken = nullptr;
  std::size_t bytes = 0;
  int source = 0;
  unsigned members = 0;
};

struct Block {
  std::int64_t index = 0, count = 0;
  int running = 0;  // thread
  std::vector<Fiber> fibers;
  std::byte* shared = nullptr;
  const char* kernel = "";
  void (*body)(const void*) = nullptr;
  const void* argument = nullptr;
  ucontext_t scheduler;
  const void* scheduler_stack = nullptr;  // for the address sanitizer, which must know of every change of stacks
  std::size_t scheduler_bytes = 0;
  void* scheduler_frames = nullptr;
};
inline Block block;
inline std::mutex one_at_a_time;  // threads of a test may launch together

[[noreturn]] inline void stop(const char* what) {
  std::fprintf(stderr, "shim: %s: kernel %s, block %lld, thread %d\n", what, block.kernel,
               static_cast<long long>(block.index), block.running);
  std::exit(70);
}

inline std::mt19937& order() {
  static std::mt19937 random = [] {
    const char* seed = std::getenv("NORMKIT_SHIM_SEED");
    return std::mt19937(seed ? static_cast<unsigned>(std::atoi(seed)) : 1u);
  }();
  return random;
}

template <class T> void shuffle_order(std::vector<T>& items) {
  for (std::size_t k = items.size(); k > 1; --k) std::swap(items[k - 1], items[order()() % k]);
}

inline char* stack(int thread) {
  static std::vector<std::unique_ptr<char[]>> stacks;
  while (static_cast<int>(stacks.size()) <= thread) stacks.emplace_back(new char[kStackBytes]);
  return stacks[static_cast<std::size_t>(thread)].get();
}

inline Fiber& current() { return block.fibers[static_cast<std::size_t>(block.running)]; }

/// Back to the scheduler, until it finds that this thread may go on.
inline void wait(State state) {
  Fiber& self = current();
  self.state = state;
#if defined(__SANITIZE_ADDRESS__)
  void* frames = nullptr;
  __sanitizer_start_switch_fiber(state == State::done ? nullptr : &frames, block.scheduler_stack,
                                 block.scheduler_bytes);
#endif
  swapcontext(&self.context, &block.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(frames, nullptr, nullptr);
#endif
}

inline void enter() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &block.scheduler_stack, &block.scheduler_bytes);
#endif
  block.body(block.argument);
  wait(State::done);
}

inline void resume(int thread) {
  block.running = thread;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&block.scheduler_frames, stack(thread), kStackBytes);
#endif
  swapcontext(&block.scheduler, &current().context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(block.scheduler_frames, nullptr, nullptr);
#endif
}

/// Lets the lanes go on that wait for each other in a shuffle; false where none do.
inline bool release_shuffles() {
  bool released = false;
  const int threads = static_cast<int>(block.fibers.size());
  for (int first = 0; first < threads; first += kWarp) {
    const auto lane = [&](int k) -> Fiber& { return block.fibers[static_cast<std::size_t>(first + k)]; };
    const int lanes = threads - first < kWarp ? threads - first : kWarp;
    for (int k = 0; k < lanes; ++k) {
      if (lane(k).state != State::at_shuffle) continue;
      block.running = first + k;
      const unsigned members = lane(k).members;
      if (!(members >> k & 1)) stop("a lane shuffles that is not among its own members");
      bool complete = true;
      for (int j = 0; j < kWarp; ++j)
        if (members >> j & 1) {
          if (j >= lanes || lane(j).state == State::done) stop("a shuffle with a lane that has left");
          if (lane(j).state != State::at_shuffle) complete = false;
          else if (lane(j).members != members || lane(j).bytes != lane(k).bytes)
            stop("lanes that disagree about a shuffle");
        }
      if (!complete) continue;
      for (int j = 0; j < lanes; ++j)
        if (members >> j & 1) {
          if (!(members >> lane(j).source & 1)) stop("a shuffle from a lane that is not a member");
          std::memcpy(lane(j).taken, lane(lane(j).source).given, lane(j).bytes);
          lane(j).state = State::ready;
        }
      released = true;
    }
  }
  return released;
}

/// Runs one block until all its threads are done.
inline void run_block() {
  std::vector<int> turn(block.fibers.size());
  std::iota(turn.begin(), turn.end(), 0);
  for (;;) {
    shuffle_order(turn);
    bool moved = false;
    for (const int thread : turn)
      if (block.fibers[static_cast<std::size_t>(thread)].state == State::ready) resume(thread), moved = true;
    if (release_shuffles() || moved) continue;
    std::size_t done = 0, waiting = 0;
    for (const Fiber& f : block.fibers) done += f.state == State::done, waiting += f.state == State::at_barrier;
    if (done == block.fibers.size()) return;
    if (waiting + done != block.fibers.size()) stop("threads wait for a shuffle that others never come to");
    if (done > 0) stop("threads wait at a barrier that others have left behind");
    for (Fiber& f : block.fibers) f.state = State::ready;
  }
}

}  // namespace shim

inline int thread_index() { return shim::block.running; }
inline int block_threads() { return static_cast<int>(shim::block.fibers.size()); }
inline std::int64_t block_index() { return shim::block.index; }
inline std::int64_t block_count() { return shim::block.count; }
inline std::byte* shared_memory() { return shim::block.shared; }
inline void sync_block() { shim::wait(shim::State::at_barrier); }

template <class T> T shuffle(T v, int lane, unsigned members) {
  T found = v;
  shim::Fiber& self = shim::current();
  self.given = &v, self.taken = &found, self.bytes = sizeof(T), self.source = lane, self.members = members;
  shim::wait(shim::State::at_shuffle);
  return found;
}

using normkit::narrow;
using normkit::widen;

namespace shim {

inline void prepare(int thread) {
  ucontext_t& context = block.fibers[static_cast<std::size_t>(thread)].context;
  getcontext(&context);
  context.uc_stack.ss_sp = stack(thread), context.uc_stack.ss_size = kStackBytes, context.uc_link = nullptr;
  makecontext(&context, enter, 0);
}

inline void run_grid(Grid grid) {
  block.running = 0, block.count = grid.blocks;
  if (grid.blocks < 1 || grid.blocks > 0x7fffffff || grid.threads < 1 || grid.threads > 256 ||
      grid.shared_bytes > kSharedBytes)
    stop("a launch that a GPU would refuse");
  std::vector<std::int64_t> blocks(static_cast<std::size_t>(grid.blocks));
  std::iota(blocks.begin(), blocks.end(), 0);
  shuffle_order(blocks);
  for (const std::int64_t index : blocks) {
    block.index = index;
    // Of the very size, so that the address sanitizer sees a byte too far. 0xff is NaN in every format.
    const auto bytes = static_cast<std::size_t>(grid.shared_bytes);
    const std::unique_ptr<std::byte[]> shared(new std::byte[bytes]);
    if (bytes) std::memset(shared.get(), 0xff, bytes);
    block.shared = shared.get();
    block.fibers.assign(static_cast<std::size_t>(grid.threads), {});
    for (int thread = 0; thread < grid.threads; ++thread) prepare(thread);
    run_block();
  }
}

}  // namespace shim

template <class Kernel> void launch(const Kernel& kernel, Grid grid, Stream) {
  static_assert(sizeof(Kernel) <= 4096, "the arguments of a kernel must fit 4 KB");
  const std::lock_guard<std::mutex> lock(shim::one_at_a_time);
  shim::block.kernel = Kernel::kName, shim::block.argument = &kernel;
  shim::block.body = [](const void* k) { (*static_cast<const Kernel*>(k))(); };
  shim::run_grid(grid);
}

}  // namespace normkit::cuda
