// Who makes and copies arrays for a call: NumPy, NumPy for another library of the CPU, the core itself for tensors by a known
// plan, or the library of arrays on a GPU.
#pragma once

#include <nanobind/nanobind.h>

#include <cstddef>
#include <cstdint>
#include <string>

#include "arrays.hpp"
#include "cuda.hpp"

namespace memory {

namespace nb = nanobind;
using arrays::Library;
using arrays::View;
using normkit::Dense;
using normkit::Dtype;
using normkit::Extents;
using normkit::Job;

/// The memory of a call on arrays of NumPy.
class Memory {
 public:
  virtual ~Memory() = default;
  /// A new array that lies so.
  virtual nb::object empty(const Dense& lying) const { return arrays::new_numpy(lying); }
  /// The address of an array that empty() made, or of an output that the caller passed.
  virtual std::byte* data_of(nb::handle array) const { return arrays::data_of(array); }
  /// The array in another shape and with other strides, in bytes.
  virtual nb::object seen(nb::handle array, const Extents& shape, const Extents& strides, int ndim) const {
    const nb::handle dtype(reinterpret_cast<PyObject*>(PyArray_DESCR(arrays::as_array(array))));
    return arrays::numpy_over(arrays::data_of(array), dtype, ndim, shape.data(), strides.data(), true, array);
  }
  /// The array of a view, as seen() and copy() take it.
  virtual nb::object of_view(const View& v) const { return arrays::as_numpy(v); }
  virtual void run(Job& job) const;
  /// What the caller gets for an array that empty() made.
  virtual nb::object handed_over(nb::object array) const { return array; }
  /// The object of Python that stands for the memory.
  virtual nb::object python() const;

  /// into[...] = from, each element rounded once; the elements along `axes` are added up first.
  void copy(nb::handle into, nb::handle from, nb::handle axes) const { python().attr("copy")(into, from, axes); }
};

const Memory& of_numpy();

/// Has calls on the CPU use as many threads as this context variable says, where its value is not None. Only the first
/// call of this function counts.
void follow_threads_of(nb::object variable);

/// The memory of a call on arrays of another library on the CPU: of NumPy, and the library's when it is handed over.
class Other final : public Memory {
 public:
  explicit Other(nb::handle first);
  nb::object handed_over(nb::object array) const override { return arrays_.attr("hand_over")(array); }
  nb::object python() const override { return arrays_; }

 private:
  nb::object arrays_;
};

/// The memory of a call on tensors whose plan is known: nothing is copied, so there are only outputs.
class Tensors final : public Memory {
 public:
  explicit Tensors(const arrays::Exchange& exchange) : exchange_(exchange) {}
  nb::object empty(const Dense& lying) const override { return arrays::new_tensor(lying, exchange_); }
  std::byte* data_of(nb::handle array) const override { return arrays::tensor_data(array, exchange_); }

 private:
  const arrays::Exchange& exchange_;
};

/// The memory of a call on arrays of a GPU, by an object of _cuda.py. The device is the current one as long as this
/// lives.
class Device final : public Memory {
 public:
  Device(nb::handle first, const Library& library, std::int64_t device);
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;
  ~Device() override;
  nb::object empty(const Dense& lying) const override;
  std::byte* data_of(nb::handle array) const override { return arrays::device_data(array, maker_); }
  nb::object seen(nb::handle array, const Extents& shape, const Extents& strides, int ndim) const override;
  nb::object of_view(const View& v) const override;
  void run(Job& job) const override;
  nb::object handed_over(nb::object array) const override;
  nb::object python() const override { return arrays_; }
  nb::object dlpack_stream() const;

 private:
  int device_;
  nb::object arrays_;
  std::uintptr_t stream_;
  const Library& maker_;  // the library that makes outputs
};

}  // namespace memory
