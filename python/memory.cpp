#include "memory.hpp"

#include "unlocked.hpp"

namespace memory {

using arrays::python_module;
using arrays::tuple_of;

namespace {

/// Elements of x from which on other Python threads get to run during a call: letting go of the lock and taking it back
/// costs as much as some thousands of elements.
constexpr std::int64_t kReleaseElements = 16384;

nb::handle threads_of_context;  // never let go of: calls may come until the process ends

}  // namespace

const Memory& of_numpy() {
  static const Memory numpy;
  return numpy;
}

void follow_threads_of(nb::object variable) {
  if (!threads_of_context.is_valid()) threads_of_context = variable.release();
}

void Memory::run(Job& job) const {
  if (threads_of_context.is_valid())
    if (const nb::object threads = threads_of_context.attr("get")(); !threads.is_none())
      job.threads = nb::cast<int>(threads);
  if (job.task.geometry.size() < kReleaseElements) return normkit::run(job);
  unlocked::run([&] { normkit::run(job); });
}

nb::object Memory::python() const {
  static PyObject* const numpy = nb::object(python_module("normkit._memory").attr("NUMPY")).release().ptr();
  return nb::borrow(numpy);
}

// ---- another library on the CPU ----------------------------------------------------------------------------------

Other::Other(nb::handle first) : arrays_(python_module("normkit._memory").attr("memory_of")(first)) {}

// ---- a GPU -------------------------------------------------------------------------------------------------------

Device::Device(nb::handle first, const Library& library, std::int64_t device)
    : device_(static_cast<int>(device)),
      arrays_(python_module("normkit._cuda").attr("entered")(first, device)),
      stream_(nb::cast<std::uintptr_t>(arrays_.attr("stream"))),
      maker_(library.kind == Library::Kind::other ? arrays::library_of_type(arrays_.attr("maker")) : library) {}

Device::~Device() {
  try {
    arrays_.attr("__exit__")(nb::none(), nb::none(), nb::none());
  } catch (nb::python_error& e) {
    e.discard_as_unraisable("normkit: putting back the current device");
  }
}

nb::object Device::empty(const Dense& lying) const {
  const nb::object steps = tuple_of(lying.strides.data(), lying.ndim, normkit::size_of(lying.dtype));
  return arrays_.attr("empty")(tuple_of(lying.shape.data(), lying.ndim), normkit::name_of(lying.dtype), steps);
}

nb::object Device::seen(nb::handle array, const Extents& shape, const Extents& strides, int ndim) const {
  return arrays_.attr("seen")(array, tuple_of(shape.data(), ndim), tuple_of(strides.data(), ndim));
}

nb::object Device::of_view(const View& v) const {
  if (!v.imported.is_valid()) return nb::borrow(v.held.is_valid() ? nb::handle(v.held) : v.object);
  const int ndim = v.array.ndim();
  const std::string dtype(normkit::name_of(v.array));
  return arrays_.attr("over")(v.object, reinterpret_cast<std::uintptr_t>(v.array.data),
                              tuple_of(v.array.shape.data(), ndim), dtype.c_str(),
                              tuple_of(v.array.strides.data(), ndim));
}

nb::object Device::handed_over(nb::object array) const {
  return maker_.kind == Library::Kind::cupy ? arrays_.attr("hand_over")(array) : array;
}

nb::object Device::dlpack_stream() const {
  return nb::int_(stream_ ? stream_ : 1);
}  // DLPack's name for the default one

void Device::run(Job& job) const {
  namespace cuda = normkit::cuda;
  std::uintptr_t workspace = 0;
  if (const std::size_t bytes = cuda::workspace_bytes(job))
    workspace = nb::cast<std::uintptr_t>(arrays_.attr("workspace")(bytes));
  try {
    // A launch may wait for a host function of the stream, and that for the lock.
    unlocked::run(
        [&] { cuda::run(job, reinterpret_cast<void*>(workspace), reinterpret_cast<void*>(stream_), device_); });
  } catch (const cuda::DeviceError& e) {
    if (cuda::available()) throw;
    throw cuda::DeviceError("this build of normkit has " + cuda::build() +
                            ", but there is no device, no driver or one that is older than that (" + e.what() + ")");
  }
}

}  // namespace memory
