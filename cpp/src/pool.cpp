#include "pool.hpp"

#include <atomic>
#include <cstdio>
#include <fstream>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#endif
#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace normkit {
namespace {

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

/// Tries before a thread that waits for another gives its processor away: a few microseconds, about what a wake costs.
constexpr int kSpins = 256;

using Body = void (*)(void*, std::int64_t, int);

class Pool {
 public:
  void run(std::uint32_t tasks, int threads, Body body, void* context) {
    start_workers(threads - 1);
    body_.store(body, std::memory_order_relaxed);
    context_.store(context, std::memory_order_relaxed);
    tasks_.store(tasks, std::memory_order_relaxed);
    active_.store(threads - 1, std::memory_order_relaxed);
    done_.store(0, std::memory_order_relaxed);
    // A new generation makes claims of the last call fail, and its release shows the fields above to who reads it.
    const std::uint64_t generation = (claim_.load(std::memory_order_relaxed) >> 32) + 1;
    claim_.store(generation << 32 | tasks, std::memory_order_release);
    claim_.notify_all();
    std::uint32_t mine = 0;
    while (take(0)) ++mine;
    const std::uint32_t others = tasks - mine;
    for (int spin = 0; done_.load(std::memory_order_acquire) != others; ++spin)
      spin < kSpins ? relax() : std::this_thread::yield();
  }

  /// Set while a call uses the threads: one call can at a time, and any other works alone.
  std::atomic_flag busy = ATOMIC_FLAG_INIT;

  /// Ends all threads, and returns when they are gone. The caller holds `busy`.
  void stop() {
    stopping_.store(true, std::memory_order_relaxed);
    claim_.store(((claim_.load(std::memory_order_relaxed) >> 32) + 1) << 32, std::memory_order_release);
    claim_.notify_all();
    for (std::thread& worker : workers_) worker.join();
    workers_.clear();
    stopping_.store(false, std::memory_order_relaxed);
  }

 private:
  /// Starts threads until there are `wanted`. Where the system gives no more, the caller takes every task that is left.
  void start_workers(int wanted) {
    try {
      for (int count = static_cast<int>(workers_.size()); count < wanted; ++count)
        workers_.emplace_back([this, count] { work(count); });
    } catch (const std::system_error&) {
    }
  }

  /// Claims one task of the current call and runs it. A claim holds the generation and how many tasks are left, so it
  /// succeeds only while the fields read before it are those of the same call.
  bool take(int slot) {
    std::uint64_t seen = claim_.load(std::memory_order_acquire);
    while (static_cast<std::uint32_t>(seen) > 0) {
      const Body body = body_.load(std::memory_order_relaxed);
      void* const context = context_.load(std::memory_order_relaxed);
      const std::uint32_t tasks = tasks_.load(std::memory_order_relaxed);
      if (slot > active_.load(std::memory_order_relaxed)) return false;
      if (!claim_.compare_exchange_weak(seen, seen - 1, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
      body(context, tasks - static_cast<std::uint32_t>(seen), slot);
      if (slot > 0) done_.fetch_add(1, std::memory_order_release);
      return true;
    }
    return false;
  }

  void work(int index) {
    for (;;) {
      const std::uint64_t seen = claim_.load(std::memory_order_acquire);
      if (stopping_.load(std::memory_order_relaxed)) return;
      while (take(index + 1)) {
      }
      int spin = 0;
      while (spin < kSpins && claim_.load(std::memory_order_relaxed) >> 32 == seen >> 32) relax(), ++spin;
      if (spin < kSpins) continue;
      // Sleeps until a new call: a claim of the same generation only counts down.
      for (std::uint64_t now = claim_.load(std::memory_order_acquire); now >> 32 == seen >> 32;
           now = claim_.load(std::memory_order_acquire))
        claim_.wait(now, std::memory_order_acquire);
    }
  }

  std::atomic<std::uint64_t> claim_{0};  // generation << 32 | tasks left
  std::atomic<Body> body_{nullptr};
  std::atomic<void*> context_{nullptr};
  std::atomic<std::uint32_t> tasks_{0};
  std::atomic<int> active_{0};
  std::atomic<std::uint32_t> done_{0};
  std::atomic<bool> stopping_{false};
  std::vector<std::thread> workers_;
};

/// The pool of this process. It is never destroyed: workers may outlive static destructors.
Pool& pool() {
  static Pool* const all = new Pool;
  return *all;
}

#if !defined(_WIN32)
void before_fork() {
  while (pool().busy.test_and_set(std::memory_order_acquire)) std::this_thread::yield();
  pool().stop();
}
void after_fork() { pool().busy.clear(std::memory_order_release); }

[[maybe_unused]] const int registered = pthread_atfork(before_fork, after_fork, after_fork);
#endif

/// CPUs that the cgroup of this process pays for; 0 where there is no quota.
int quota_cpus() {
  std::ifstream unified("/sys/fs/cgroup/cpu.max");
  std::string quota;
  double period = 0;
  if (unified >> quota >> period && quota != "max" && period > 0)
    return static_cast<int>(std::stod(quota) / period + 0.999);
  std::ifstream quota_file("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"), period_file("/sys/fs/cgroup/cpu/cpu.cfs_period_us");
  double legacy = 0;
  if (quota_file >> legacy && period_file >> period && legacy > 0 && period > 0)
    return static_cast<int>(legacy / period + 0.999);
  return 0;
}

}  // namespace

int usable_cpus() {
  int cpus = static_cast<int>(std::thread::hardware_concurrency());
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) cpus = CPU_COUNT(&set);
#endif
  const int quota = quota_cpus();
  if (quota > 0 && quota < cpus) cpus = quota;
  return cpus < 1 ? 1 : cpus;
}

void parallel_for(std::int64_t tasks, int threads, void (*body)(void*, std::int64_t, int), void* context) {
  if (threads > tasks) threads = static_cast<int>(tasks);
  if (threads > 1 && tasks <= INT32_MAX) {
    Pool& shared = pool();
    if (!shared.busy.test_and_set(std::memory_order_acquire)) {
      shared.run(static_cast<std::uint32_t>(tasks), threads, body, context);
      shared.busy.clear(std::memory_order_release);
      return;
    }
  }
  for (std::int64_t task = 0; task < tasks; ++task) body(context, task, 0);
}

}  // namespace normkit
