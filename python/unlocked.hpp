// Work without the interpreter lock.
#pragma once

#include <Python.h>

namespace unlocked {

/// Takes the lock back. Where the interpreter has ended meanwhile, Python 3.11 to 3.13 end the thread instead, past objects that
/// want the lock. Here such a thread waits for the process to end, as Python has it do from 3.14 on.
void take_lock(PyThreadState* state);

/// Calls work() without the lock, so that other Python threads get to run meanwhile.
template <class Work> void run(Work work) {
  PyThreadState* const state = PyEval_SaveThread();
  try {
    work();
  } catch (...) {
    take_lock(state);
    throw;
  }
  take_lock(state);
}

}  // namespace unlocked
