// Calls on arrays of a GPU. The NumPy arrays that stand for them say how they lie: nobody on this side looks into them. What a
// call allocates, copies or fills is done by an object of _cuda.py.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>

#include "cuda.hpp"

namespace device {

namespace nb = nanobind;

struct Call {
  nb::handle arrays;  // of _cuda.py
  int device;
  std::uintptr_t stream;
};

/// The one that this thread is in, and how many there are in all threads: calls on the CPU, which are many and short, ask for
/// no more than that number. The interpreter lock guards it.
inline thread_local const Call* mine = nullptr;
inline int under_way = 0;
inline const Call* call() { return under_way ? mine : nullptr; }

/// function(*arguments), whose arrays are of a GPU.
inline nb::object run_call(nb::handle arrays, int device, std::uintptr_t stream, nb::handle function,
                           nb::typed<nb::tuple, nb::object, nb::ellipsis> arguments) {
  struct Current {
    const Call* before = mine;
    explicit Current(const Call* call) { mine = call, ++under_way; }
    Current(const Current&) = delete;
    Current& operator=(const Current&) = delete;
    ~Current() { mine = before, --under_way; }
  };
  const Call call{arrays, device, stream};
  const Current current(&call);
  return function(*arguments);
}

/// Out of the way of calls on the CPU, as are the other things that only calls on a GPU do.
template <class Job> [[gnu::noinline, gnu::cold]] void run_job(const Call& call, const Job& job) {
  namespace cuda = normkit::cuda;
  const nb::object workspace = call.arrays.attr("workspace")(cuda::workspace_bytes(job));
  try {
    cuda::run(job, reinterpret_cast<void*>(nb::cast<std::uintptr_t>(workspace)), reinterpret_cast<void*>(call.stream),
              call.device);
  } catch (const cuda::DeviceError& e) {
    if (cuda::available()) throw;
    throw cuda::DeviceError("this build of normkit has " + cuda::build() +
                            ", but there is no device, no driver or one that is older than that (" + e.what() + ")");
  }
}

}  // namespace device
