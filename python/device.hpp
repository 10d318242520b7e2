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
  bool direct = false;  // nothing stands for arrays: they are those of their library
};

/// The one that this thread is in, and how many there are in all threads: calls on the CPU, which are many and short, ask for
/// no more than that number. The interpreter lock guards it.
inline thread_local const Call* mine = nullptr;
inline int under_way = 0;
inline const Call* call() { return under_way ? mine : nullptr; }

/// This thread is in `call` as long as it lives.
class Current {
 public:
  explicit Current(const Call* call) { mine = call, ++under_way; }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;
  ~Current() { mine = before_, --under_way; }

 private:
  const Call* before_ = mine;
};

/// function(*arguments), whose arrays are of a GPU.
inline nb::object run_call(nb::handle arrays, int device, std::uintptr_t stream, nb::handle function,
                           nb::typed<nb::tuple, nb::object, nb::ellipsis> arguments) {
  const Call call{arrays, device, stream};
  const Current current(&call);
  return function(*arguments);
}

/// The device of an array is the current one, and its library's memory is at hand, as long as this lives.
class Session {
 public:
  Session(nb::handle array, std::int64_t device)
      : device_(static_cast<int>(device)),
        arrays_(nb::module_::import_("normkit._cuda").attr("entered")(array, device)),
        stream_(nb::cast<std::uintptr_t>(arrays_.attr("stream"))) {}
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;
  ~Session() {
    try {
      arrays_.attr("__exit__")(nb::none(), nb::none(), nb::none());
    } catch (nb::python_error& e) {
      e.discard_as_unraisable("normkit: putting back the current device");
    }
  }

  nb::handle arrays() const { return arrays_; }
  Call call(bool direct) const { return {arrays_, device_, stream_, direct}; }

 private:
  int device_;
  nb::object arrays_;
  std::uintptr_t stream_;
};

/// Out of the way of calls on the CPU, as are the other things that only calls on a GPU do.
template <class Job> [[gnu::noinline, gnu::cold]] void run_job(const Call& call, const Job& job) {
  namespace cuda = normkit::cuda;
  std::uintptr_t workspace = 0;
  if (const std::size_t bytes = cuda::workspace_bytes(job))
    workspace = nb::cast<std::uintptr_t>(call.arrays.attr("workspace")(bytes));
  try {
    const nb::gil_scoped_release unlocked;  // a launch may wait for a host function of the stream, and that for the lock
    cuda::run(job, reinterpret_cast<void*>(workspace), reinterpret_cast<void*>(call.stream), call.device);
  } catch (const cuda::DeviceError& e) {
    if (cuda::available()) throw;
    throw cuda::DeviceError("this build of normkit has " + cuda::build() +
                            ", but there is no device, no driver or one that is older than that (" + e.what() + ")");
  }
}

}  // namespace device
