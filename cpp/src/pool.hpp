// The claim pool: threads that take tasks from a call as they come free.
//
// The caller takes tasks too, and at the end waits only for workers that hold one. A pool that is busy (another thread's
// call, or a call from within a task) lets the caller do all of its tasks itself. fork() waits for a call that uses the
// pool and ends its threads first, so that no lock of theirs is held in the child; both processes start them anew.
#pragma once

#include <cstdint>

namespace normkit {

/// Threads that this process may use: the CPUs of its affinity mask, less where a cgroup quota allows less.
int usable_cpus();

/// Runs body(context, task, slot) for each task, on up to `threads` threads; `slot` < threads tells them apart.
/// Returns when all are done. Bodies must not throw.
void parallel_for(std::int64_t tasks, int threads, void (*body)(void*, std::int64_t task, int slot), void* context);

template <class F> void parallel_for(std::int64_t tasks, int threads, F&& f) {
  parallel_for(tasks, threads,
               [](void* context, std::int64_t task, int slot) { (*static_cast<F*>(context))(task, slot); }, &f);
}

}  // namespace normkit
