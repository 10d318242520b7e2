// The machine of cuda/device.cuh on a CPU: every thread of a block is a fiber, and the kernels are those that nvcc compiles.
//
// It is harsher than a GPU. Blocks come in a random order, and so do the threads between two barriers; of a cluster one block
// mostly runs alone, as far as it gets, before another begins: what no barrier orders goes wrong. Copies aside land at any moment
// between their start and the wait for their batch, in any order. Shared memory holds NaN before a block starts, has no byte more
// than was asked for, and is gone when the block is.
// A barrier that a thread has left behind or never comes to, lanes that disagree about a shuffle, shared memory of a block of
// which nobody knows that it runs, or that may leave meanwhile, and a launch that a GPU would refuse end the program with a line
// that says so. In the
// environment, NORMKIT_SHIM_SEED chooses the order, NORMKIT_SHIM_EXTENT what the device gives (plain, large or clusters), and
// NORMKIT_SHIM_PLANT a mistake that the kernels are to make.
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
#if defined(__SANITIZE_THREAD__) && !defined(NORMKIT_SHIM_COUNTS)
#define NORMKIT_SHIM_FINDS_RACES
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

#define NORMKIT_DEVICE inline
#define NORMKIT_CALLED inline
#define NORMKIT_UNROLL
#define NORMKIT_ROLL
#define NORMKIT_UNROLL_BY(n)
#define NORMKIT_PLANTED(mistake) (::normkit::cuda::shim::planted == ::normkit::cuda::shim::Mistake::mistake)

namespace normkit::cuda {

using Stream = void*;

struct DeviceGuard {
  explicit DeviceGuard(int) {}
};
inline constexpr const char* kBuild = "shim";
inline bool has_device() { return true; }

namespace shim {

constexpr std::size_t kStackBytes = std::size_t{256} << 10;

// The list of mistakes makes the enumeration and the names.
#define NORMKIT_MISTAKES(X)  \
  X(none)                    \
  X(missing_barrier)         \
  X(missing_second_barrier)  \
  X(missing_group_barrier)   \
  X(missing_cluster_barrier) \
  X(missing_wait)            \
  X(short_wait)              \
  X(early_post)              \
  X(early_leave)             \
  X(early_tile) X(one_board) X(early_return) X(read_of_peer) X(misaligned_load) X(int_overflow) X(long_tail)
enum class Mistake {
#define NORMKIT_ENUMERATOR(name) name,
  NORMKIT_MISTAKES(NORMKIT_ENUMERATOR)
};
inline const Mistake planted = [] {
  const char* const name = std::getenv("NORMKIT_SHIM_PLANT");
#define NORMKIT_COMPARED(mistake) \
  if (name && std::strcmp(name, #mistake) == 0) return Mistake::mistake;
  NORMKIT_MISTAKES(NORMKIT_COMPARED)
  return Mistake::none;
}();

enum class State { ready, at_barrier, at_shuffle, at_cluster, done };

/// A copy from global to shared memory that is still on its way, as one of a batch. Its source is read when it starts, or else when
/// it lands.
struct Copy {
  void* to;
  const void* from;
  std::byte byte[16];
  int bytes, batch;
};

struct Fiber {
  ucontext_t context;
  State state = State::ready;
  std::uint32_t random = 0;
  bool arrived = false, passed = false;  // of the barrier of the cluster
  /// Blocks, one bit each, whose memory it has asked for: since it came to that barrier last, and before.
  unsigned touches = 0, touched = 0;
  int barriers = 0, warp_barriers = 0, cluster_barriers = 0;  // that it has come to
  std::vector<Copy> copies;  // on their way
  int batch = 0;
  const void* given = nullptr;  // of a shuffle
  void* taken = nullptr;
  std::size_t bytes = 0;
  int source = 0;
  unsigned members = 0;
};

/// Blocks that run together: fibers block by block, and the shared memory of each.
struct Cluster {
  std::int64_t first = 0, count = 0;  // index of the first block, blocks of the grid
  int threads = 0;  // of a block
  int running = 0;  // fiber
  bool met = false;  // at a barrier of the cluster: all its blocks are known to run
  std::vector<Fiber> fibers;
  std::vector<std::unique_ptr<std::byte[]>> shared;
  const char* kernel = "";
  void (*body)(const void*) = nullptr;
  const void* argument = nullptr;
  std::size_t argument_bytes = 0;
  int shared_bytes = 0;  // of a block
  ucontext_t scheduler;
  const void* scheduler_stack = nullptr;  // for the address sanitizer, which must know of every change of stacks
  std::size_t scheduler_bytes = 0;
  void* scheduler_frames = nullptr;

  int blocks() const { return static_cast<int>(shared.size()); }
  Fiber& fiber(int block, int thread) { return fibers[static_cast<std::size_t>(block * threads + thread)]; }
};
inline Cluster cluster;
inline std::mutex one_at_a_time;  // threads of a test may launch together

[[noreturn]] inline void stop(const char* what) {
  std::fprintf(stderr, "shim: %s: kernel %s, block %lld, thread %d\n", what, cluster.kernel,
               static_cast<long long>(cluster.first + cluster.running / cluster.threads),
               cluster.running % cluster.threads);
  std::fflush(nullptr);
  std::_Exit(70);  // on the stack of a fiber nothing else is to run
}

inline const std::uint32_t seed = [] {
  const char* const text = std::getenv("NORMKIT_SHIM_SEED");
  return text ? static_cast<std::uint32_t>(std::atoi(text)) : 1u;
}();
/// The order of blocks and threads.
inline std::mt19937& order() {
  static std::mt19937 random(seed);
  return random;
}

template <class T> void shuffle_order(std::vector<T>& items) {
  for (std::size_t k = items.size(); k > 1; --k) std::swap(items[k - 1], items[order()() % k]);
}

inline char* stack(int fiber) {
  static std::vector<std::unique_ptr<char[]>> stacks;
  while (static_cast<int>(stacks.size()) <= fiber) stacks.emplace_back(new char[kStackBytes]);
  return stacks[static_cast<std::size_t>(fiber)].get();
}

inline Fiber& current() { return cluster.fibers[static_cast<std::size_t>(cluster.running)]; }

// What sanitizers must know. The address sanitizer, of every change of stacks. The thread sanitizer sees in each fiber a thread of
// its own, and no order between them but what barriers make: a race in shared memory is one whatever the order was.
#if defined(__SANITIZE_ADDRESS__)
inline void leave_fiber(void** frames) {
  __sanitizer_start_switch_fiber(frames, cluster.scheduler_stack, cluster.scheduler_bytes);
}
inline void come_back(void* frames) { __sanitizer_finish_switch_fiber(frames, nullptr, nullptr); }
inline void begin_fiber() {
  __sanitizer_finish_switch_fiber(nullptr, &cluster.scheduler_stack, &cluster.scheduler_bytes);
}
inline void leave_scheduler(int fiber) {
  __sanitizer_start_switch_fiber(&cluster.scheduler_frames, stack(fiber), kStackBytes);
}
#elif defined(NORMKIT_SHIM_FINDS_RACES)
inline void leave_fiber(void**) { __tsan_switch_to_fiber(cluster.scheduler_frames, __tsan_switch_to_fiber_no_sync); }
inline void come_back(void*) {}
inline void begin_fiber() {}
inline void leave_scheduler(int fiber) {
  static std::vector<void*> threads;
  while (static_cast<int>(threads.size()) <= fiber) threads.push_back(__tsan_create_fiber(0));
  cluster.scheduler_frames = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(threads[static_cast<std::size_t>(fiber)], __tsan_switch_to_fiber_no_sync);
}
#else
inline void leave_fiber(void**) {}
inline void come_back(void*) {}
inline void begin_fiber() {}
inline void leave_scheduler(int) {}
#endif

/// Places that threads meet at. What a thread did before it came to one is known to those that have left it.
struct Meeting {
  char launch, end, block[kMostClusterBlocks][2], warp[kMostClusterBlocks][kBlockThreads / kWarp][2], cluster[2];
};
inline Meeting meeting;
#if defined(NORMKIT_SHIM_FINDS_RACES)
inline void come_to(char& place) { __tsan_release(&place); }
inline void go_from(char& place) { __tsan_acquire(&place); }
/// While it lives, what this thread reads and writes is the shim's own affair.
struct Unwatched {
  Unwatched() { AnnotateIgnoreReadsBegin(__FILE__, __LINE__), AnnotateIgnoreWritesBegin(__FILE__, __LINE__); }
  ~Unwatched() { AnnotateIgnoreWritesEnd(__FILE__, __LINE__), AnnotateIgnoreReadsEnd(__FILE__, __LINE__); }
};
#define NORMKIT_SHIM_UNSEEN [[gnu::no_sanitize_thread]]
#else
inline void come_to(char&) {}
inline void go_from(char&) {}
struct Unwatched {
  Unwatched() {}
};
#define NORMKIT_SHIM_UNSEEN
#endif

// ---- what a launch moves -----------------------------------------------------------------------------------------

/// Bytes of global memory.
struct Bytes { std::int64_t loaded = 0, stored = 0; };

/// What the threads of a launch read and write: element by element as each of them asks; in sectors of 32 bytes, each once for a
/// block between two of its barriers, as the caches of a multiprocessor leave it; and each once, as a large enough cache of all
/// of them would.
struct Traffic { Bytes asked, by_block, once; };

/// A launch: blocks of 256 threads that the registers of a multiprocessor have room for, at least; bytes of global memory that a
/// block has on their way at once; and what it does to arrays and to the workspace, where count.cpp is linked.
struct Launched {
  const char* kernel;
  Grid grid;
  int resident_blocks, in_flight_bytes;
  int answer;  // to `question`, just before
  Traffic arrays = {}, workspace = {};
};
template <class Kernel> int in_flight_bytes(const Kernel& kernel) {
  if constexpr (requires { kernel.given.policy; }) return kernel.given.policy.in_flight_bytes(kernel.given.stage);
  else return 0;
}

/// Whether launches are kept: `launches` are all since the moment that this was set.
inline bool records = false;
inline int (*question)() = nullptr;
inline std::int64_t launch_number = 0;
inline std::vector<Launched> launches;

/// Memory that is the workspace of the job that this thread launches: [begin, end).
struct Range {
  const std::byte *begin = nullptr, *end = nullptr;
  bool holds(const void* p) const { return p >= begin && p < end; }
};
inline thread_local Range workspace;

/// True while a thread is in the code of its kernel. The compiler does not know who reads it: calls of count.cpp come last.
inline volatile bool counts = false;
/// Sets `counts` as long as it lives: false where the shim reads and writes for itself.
#if defined(NORMKIT_SHIM_FINDS_RACES)  // then nobody counts
struct Counting {
  explicit Counting(bool) {}
};
#else
class Counting {
 public:
  explicit Counting(bool on) : before_(counts) { counts = on; }
  Counting(const Counting&) = delete;
  Counting& operator=(const Counting&) = delete;
  ~Counting() { counts = before_; }

 private:
  bool before_;
};
#endif

// ---- threads -----------------------------------------------------------------------------------------------------

/// A number below n, from a generator of the fiber's own: of one that fibers share, the thread sanitizer would say that they race.
inline std::uint32_t chosen(Fiber& fiber, std::uint32_t n) {
  fiber.random = fiber.random * 1664525u + 1013904223u;
  return (fiber.random >> 16) % n;
}

inline void land(const Copy& copy) {
  std::memcpy(copy.to, copy.from ? copy.from : copy.byte, static_cast<std::size_t>(copy.bytes));
}
/// Copies of the batches before `whole` land, and here and there one of the others, in any order.
inline void land_copies(Fiber& self, int whole) {
  std::vector<Copy>& copies = self.copies;
  for (std::size_t k = copies.size(); k > 0; --k) {
    std::swap(copies[k - 1], copies[chosen(self, static_cast<std::uint32_t>(k))]);
    if (copies[k - 1].batch >= whole && chosen(self, 8) != 0) continue;
    land(copies[k - 1]);
    copies[k - 1] = copies.back(), copies.pop_back();
  }
}

/// Back to the scheduler, until it finds that this thread may go on.
NORMKIT_SHIM_UNSEEN inline void wait(State state) {
  const Counting off(false);
  Fiber& self = current();
  if (state != State::done) land_copies(self, 0);
  self.state = state;
  void* frames = nullptr;
  leave_fiber(state == State::done ? nullptr : &frames);
  swapcontext(&self.context, &cluster.scheduler);
  come_back(frames);
}

NORMKIT_SHIM_UNSEEN inline void enter() {
  begin_fiber();
  go_from(meeting.launch);
  {
    const Counting on(true);
    cluster.body(cluster.argument);
  }
  if (!current().copies.empty()) stop("a thread that leaves while copies of its are on their way");
  if (current().arrived || current().passed)
    stop("a thread that leaves after it has come to the barrier of its cluster, and before it has waited there");
  come_to(meeting.end);
  wait(State::done);
}

inline void resume(int fiber) {
  cluster.running = fiber;
  leave_scheduler(fiber);
  swapcontext(&cluster.scheduler, &current().context);
  come_back(cluster.scheduler_frames);
}

/// Lets the lanes of one block go on that wait for each other in a shuffle; false where none do.
inline bool release_shuffles(int block) {
  bool released = false;
  const int threads = cluster.threads;
  for (int first = 0; first < threads; first += kWarp) {
    const auto lane = [&](int k) -> Fiber& { return cluster.fiber(block, first + k); };
    const int lanes = threads - first < kWarp ? threads - first : kWarp;
    for (int k = 0; k < lanes; ++k) {
      if (lane(k).state != State::at_shuffle) continue;
      cluster.running = block * threads + first + k;
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

/// A block has left, and its memory with it, which nobody may be about to touch: all who did have come to a barrier since then, where
/// the block has waited for them.
inline void leave_block(int block) {
  for (std::size_t k = 0; k < cluster.fibers.size(); ++k) {
    const Fiber& f = cluster.fibers[k];
    if (((f.touches | f.touched) >> block & 1) == 0) continue;
    cluster.running = static_cast<int>(k);
    stop("a thread may still touch the shared memory of a block that leaves");
  }
  cluster.shared[static_cast<std::size_t>(block)].reset();
}

/// Lets the threads of one block go on that wait at a barrier of it; false where some are still to come.
inline bool release_barrier(int block) {
  int done = 0, waiting = 0;
  for (int thread = 0; thread < cluster.threads; ++thread) {
    const State state = cluster.fiber(block, thread).state;
    done += state == State::done, waiting += state == State::at_barrier;
  }
  if (done == cluster.threads && cluster.shared[static_cast<std::size_t>(block)]) leave_block(block);
  if (waiting == 0 || waiting + done != cluster.threads) return false;
  cluster.running = block * cluster.threads;
  if (done > 0) stop("threads wait at a barrier that others have left behind");
  for (int thread = 0; thread < cluster.threads; ++thread) cluster.fiber(block, thread).state = State::ready;
  return true;
}

/// Lets the threads that wait at the barrier of the cluster go on; false where some are still to come.
inline bool release_cluster() {
  std::size_t arrived = 0, done = 0, waiting = 0;
  for (const Fiber& f : cluster.fibers)
    arrived += f.arrived, done += f.state == State::done, waiting += f.state == State::at_cluster;
  if (waiting == 0) return false;
  if (done > 0) stop("threads wait at the barrier of a cluster that others have left behind");
  if (arrived < cluster.fibers.size()) return false;
  cluster.met = true;
  // A thread that has come but does not wait yet passes when it does.
  for (Fiber& f : cluster.fibers) {
    f.arrived = false, f.touched = 0;
    if (f.state == State::at_cluster) f.state = State::ready;
    else f.passed = true;
  }
  return true;
}

/// Runs one cluster until all its threads are done: one block alone, as far ahead of the others as it gets, then another; now
/// and then all together.
inline void run_cluster() {
  std::vector<int> turn(cluster.fibers.size());
  std::iota(turn.begin(), turn.end(), 0);
  const auto choose = [] {
    return order()() % 8 == 0 ? cluster.blocks() : static_cast<int>(order()() % cluster.shared.size());
  };
  for (int ahead = choose();;) {
    shuffle_order(turn);
    bool moved = false, waits = false;
    for (const int fiber : turn) {
      if (cluster.fibers[static_cast<std::size_t>(fiber)].state != State::ready) continue;
      if (ahead < cluster.blocks() && fiber / cluster.threads != ahead) waits = true;
      else resume(fiber), moved = true;
    }
    for (int block = 0; block < cluster.blocks(); ++block) {
      if (release_shuffles(block)) moved = true;
      if (release_barrier(block)) moved = true;
    }
    if (release_cluster() || moved) continue;
    ahead = choose();
    if (waits) continue;
    for (const Fiber& f : cluster.fibers)
      if (f.state != State::done) stop("threads wait for what others never come to");
    return;
  }
}

}  // namespace shim

inline int thread_index() { return shim::cluster.running % shim::cluster.threads; }
inline int block_threads() { return shim::cluster.threads; }
inline int log2_of(int power_of_two) { return 31 - __builtin_clz(static_cast<unsigned>(power_of_two)); }
inline int cluster_rank() { return shim::cluster.running / shim::cluster.threads; }
inline std::int64_t block_index() { return shim::cluster.first + cluster_rank(); }
inline std::int64_t block_count() { return shim::cluster.count; }
inline int computed_anew(int v) { return v; }
inline std::byte* shared_memory() {
  const shim::Counting off(false);
  return shim::cluster.shared[static_cast<std::size_t>(cluster_rank())].get();
}
inline void sync_block() {
  const shim::Counting off(false);
  char& place = shim::meeting.block[cluster_rank()][shim::current().barriers++ % 2];
  shim::come_to(place);
  shim::wait(shim::State::at_barrier);
  shim::go_from(place);
}

inline void store_words(void* to, const std::uint32_t (&word)[4]) {
  struct alignas(16) Words { std::uint32_t word[4]; };
  *static_cast<Words*>(to) = {{word[0], word[1], word[2], word[3]}};
}

inline constexpr bool kHasClusters = true;
inline void arrive_at_cluster() {
  const shim::Counting off(false);
  shim::Fiber& self = shim::current();
  if (self.arrived || self.passed) shim::stop("a thread comes twice to the barrier of its cluster");
  self.arrived = true, self.touched |= self.touches, self.touches = 0;
  shim::come_to(shim::meeting.cluster[self.cluster_barriers % 2]);
}
inline void announce_to_cluster() { arrive_at_cluster(); }
inline void wait_for_cluster() {
  const shim::Counting off(false);
  shim::Fiber& self = shim::current();
  if (!self.arrived && !self.passed) shim::stop("a thread waits at the barrier of its cluster that it has not come to");
  if (!self.passed) shim::wait(shim::State::at_cluster);
  self.passed = false;
  shim::go_from(shim::meeting.cluster[self.cluster_barriers++ % 2]);
}
inline std::byte* peer_memory(int rank) {
  const shim::Counting off(false);
  if (rank < 0 || rank >= shim::cluster.blocks()) shim::stop("shared memory of a block that the cluster does not have");
  if (!shim::cluster.met) shim::stop("shared memory of a block that may not run yet");
  std::byte* const memory = shim::cluster.shared[static_cast<std::size_t>(rank)].get();
  if (!memory) shim::stop("shared memory of a block that has left");
  if (rank != cluster_rank()) shim::current().touches |= 1u << rank;
  return memory;
}

/// The Room that NORMKIT_SHIM_EXTENT names: clusters (an H200), portable (an H200 with clusters of eight), large (no
/// clusters) or plain; NORMKIT_SHIM_PROCESSORS is the number of multiprocessors of the first two.
inline Room room() {
  const char *const extent = std::getenv("NORMKIT_SHIM_EXTENT"), *const processors =
                                                                     std::getenv("NORMKIT_SHIM_PROCESSORS");
  Room room{227 << 10, kMostClusterBlocks, 132};
  if (processors) room.processors = static_cast<std::int16_t>(std::atoi(processors));
  if (!extent || *extent == 'c') return room;
  if (std::strcmp(extent, "portable") == 0) return room.cluster = kPortableCluster, room;
  return *extent == 'l' ? Room{99 << 10, 1, 84} : kPlainRoom;
}
template <class Kernel> Room room_of(int) { return room(); }

template <class T> T shuffle(T v, int lane, unsigned members) {
  const shim::Counting off(false);
  T found = v;
  shim::Fiber& self = shim::current();
  self.given = &v, self.taken = &found, self.bytes = sizeof(T), self.source = lane, self.members = members;
  shim::wait(shim::State::at_shuffle);
  return found;
}

inline void sync_warp(unsigned members) {
  const shim::Counting off(false);
  char& place = shim::meeting.warp[cluster_rank()][thread_index() / kWarp][shim::current().warp_barriers++ % 2];
  shim::come_to(place);
  static_cast<void>(shuffle(0, thread_index() % kWarp, members));
  shim::go_from(place);
}

/// A copy lands at once, or at any moment until it is waited for; meanwhile there is NaN. It may also be so late in reading.
template <int kBytes> void copy_aside(void* to, const void* from) {
  struct alignas(kBytes) Word { std::byte byte[kBytes]; };
  const Word word = *static_cast<const Word*>(from);
  const shim::Counting off(false);
  if (reinterpret_cast<std::uintptr_t>(to) % kBytes) shim::stop("a copy to a misaligned address");
  shim::Fiber& self = shim::current();
  const std::uint32_t way = shim::chosen(self, 3);
  shim::Copy copy{to, way == 2 ? from : nullptr, {}, kBytes, self.batch};
  std::memcpy(copy.byte, &word, kBytes);
  if (way == 0) return shim::land(copy);
  std::memset(to, 0xff, kBytes);
  self.copies.push_back(copy);
}
inline void end_batch() {
  const shim::Counting off(false);
  ++shim::current().batch;
}
template <int kLast> void wait_for_batches() {
  const shim::Counting off(false);
  shim::land_copies(shim::current(), shim::current().batch - kLast);
}

using normkit::narrow;
using normkit::widen;

namespace shim {

inline void prepare(int fiber) {
  Fiber& self = cluster.fibers[static_cast<std::size_t>(fiber)];
  self.random = seed + static_cast<std::uint32_t>(cluster.first * cluster.threads + fiber) * 2654435761u;
  ucontext_t& context = self.context;
  getcontext(&context);
  context.uc_stack.ss_sp = stack(fiber), context.uc_stack.ss_size = kStackBytes, context.uc_link = nullptr;
  makecontext(&context, enter, 0);
}

/// Memory of NaN for a block. It has exactly the size, so that the address sanitizer sees a byte too far; 0xff is NaN
/// in every format.
inline std::unique_ptr<std::byte[]> poisoned(int bytes) {
  const auto size = static_cast<std::size_t>(bytes);
  std::unique_ptr<std::byte[]> memory(new std::byte[size]);
  if (size) std::memset(memory.get(), 0xff, size);
  return memory;
}

inline void run_grid(Grid grid) {
  cluster.first = 0, cluster.count = grid.blocks, cluster.threads = grid.threads, cluster.running = 0;
  cluster.shared_bytes = grid.shared_bytes;
  if (grid.blocks < 1 || grid.blocks > kMostBlocks || grid.threads < 1 || grid.threads > kBlockThreads ||
      grid.shared_bytes > room().shared_bytes || grid.cluster < 1 || grid.cluster > room().cluster ||
      grid.blocks % grid.cluster != 0)
    stop("a launch that a GPU would refuse");
  std::vector<std::int64_t> clusters(static_cast<std::size_t>(grid.blocks / grid.cluster));
  std::iota(clusters.begin(), clusters.end(), 0);
  shuffle_order(clusters);
  come_to(meeting.launch);
  for (const std::int64_t index : clusters) {
    cluster.first = index * grid.cluster, cluster.met = grid.cluster == 1;
    cluster.shared.clear();
    for (int block = 0; block < grid.cluster; ++block) cluster.shared.push_back(poisoned(grid.shared_bytes));
    cluster.fibers.assign(static_cast<std::size_t>(grid.cluster * grid.threads), {});
    for (int fiber = 0; fiber < grid.cluster * grid.threads; ++fiber) prepare(fiber);
    run_cluster();
  }
  go_from(meeting.end);
}

}  // namespace shim

template <class Kernel> void launch(const Kernel& kernel, Grid grid, Stream) {
  static_assert(sizeof(Kernel) <= 4096, "the arguments of a kernel must fit 4 KB");
  static const bool idle = std::getenv("NORMKIT_SHIM_IDLE") != nullptr;
  const std::lock_guard<std::mutex> lock(shim::one_at_a_time);
  if (shim::records)
    shim::launches.push_back(
        {Kernel::kName, grid, Kernel::kBlocks, shim::in_flight_bytes(kernel), shim::question ? shim::question() : 0});
  if (idle) return;  // for who measures what comes before a launch
  const shim::Unwatched unwatched;
  shim::cluster.kernel = Kernel::kName, shim::cluster.argument = &kernel, shim::cluster.argument_bytes = sizeof(Kernel);
  shim::cluster.body = [](const void* k) { (*static_cast<const Kernel*>(k))(); };
  ++shim::launch_number;
  shim::run_grid(grid);
}

}  // namespace normkit::cuda
