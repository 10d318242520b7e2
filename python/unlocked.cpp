// Compiled without exceptions, so that cleanup handlers are those of C: unwinding the stack through C++ ends the process where the
// module has another unwinder than the C library, such as a static one.
#include "unlocked.hpp"

#if !defined(_WIN32)
#include <pthread.h>
#include <unistd.h>
#endif

namespace unlocked {

#if defined(_WIN32)
void take_lock(PyThreadState* state) { PyEval_RestoreThread(state); }
#else
namespace {

void wait_for_the_end(void*) {
  for (;;) pause();
}

}  // namespace

void take_lock(PyThreadState* state) {
  pthread_cleanup_push(wait_for_the_end, nullptr);
  PyEval_RestoreThread(state);
  pthread_cleanup_pop(0);
}
#endif

}  // namespace unlocked
