// Arrays as their libraries show them, and as the core sees them: of NumPy, of whatever speaks DLPack, and of a GPU.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#define NPY_NO_DEPRECATED_API NPY_2_0_API_VERSION
#define NPY_TARGET_VERSION NPY_2_0_API_VERSION
#define PY_ARRAY_UNIQUE_SYMBOL normkit_numpy
#ifndef NORMKIT_IMPORTS_NUMPY  // one file fills the table that all of them use
#define NO_IMPORT_ARRAY
#endif
#include <numpy/arrayobject.h>

#include <cstddef>
#include <cstdint>
#include <string>

#include "plan.hpp"

namespace arrays {

namespace nb = nanobind;
using normkit::Array;
using normkit::Dtype;

inline PyArrayObject* as_array(nb::handle h) { return reinterpret_cast<PyArrayObject*>(h.ptr()); }
inline std::byte* data_of(nb::handle array) { return static_cast<std::byte*>(PyArray_DATA(as_array(array))); }

inline nb::object python_module(const char* name) { return nb::module_::import_(name); }
/// A tuple of numbers, each times `unit`.
nb::object tuple_of(const std::int64_t* numbers, int count, std::int64_t unit = 1);

/// DLPack's table of functions, DLPackExchangeAPI, by which a library shows its arrays and takes memory without a call of
/// Python.
struct Exchange;

/// A library, known by the types of its arrays.
struct Library {
  enum class Kind { numpy, cupy, torch, other };
  std::string name;
  Kind kind;
  bool frozen;  // its arrays never change
  const Exchange* exchange;  // null but for PyTorch's own types: tensors of others may be more than memory
};

/// The library of arrays of a type. A subclass belongs to the library of its base: of the class which speaks DLPack.
const Library& library_of_type(nb::handle type);
inline const Library& library_of(nb::handle array) {
  return library_of_type(reinterpret_cast<PyObject*>(Py_TYPE(array.ptr())));
}

/// An array of a call, which somebody else keeps alive. A View is never moved or copied: its `array` looks into it.
struct View {
  Array array;
  nb::handle object;
  nb::object held;  // the object, or another with its values where its memory does not hold these
  nb::ndarray<nb::ro> imported;
  std::string other_dtype;
  normkit::Extents shape, strides;

  View() = default;
  View(const View&) = delete;
  View& operator=(const View&) = delete;
};

/// Fills in the view of an array of NumPy, and returns true; false for anything else.
bool view_numpy(nb::handle array, View& v);

/// Fills in the view of what an array exports by DLPack. `stream`, if any, is the stream that will work on it: the
/// producer sees to it that what is still to be written comes first.
void import_dlpack(const char* name, nb::handle array, nb::handle stream, View& v);

/// True where tensors of PyTorch may have tangents of derivatives in forward mode.
bool may_have_tangents(const Library& library);

/// True where calls with tensors of PyTorch that require grad are recorded.
bool records_gradients(const Library& library);

/// True of a tensor of PyTorch whose memory is its value, and which does not require grad where calls are recorded.
bool is_plain(nb::handle tensor, bool records);

/// Fills in the view of a tensor on the CPU by its library's table, and returns true. False where there is no table, and
/// where another way to read it is to say what is wrong with it.
bool view_tensor(nb::handle tensor, const Exchange* exchange, View& v);

/// A new tensor on the CPU that lies so.
nb::object new_tensor(const normkit::Dense& lying, const Exchange& exchange);
std::byte* tensor_data(nb::handle tensor, const Exchange& exchange);

/// What CuPy and PyTorch tell of an array on a GPU.
struct OnDevice {
  std::int64_t device;
  std::byte* data;
  nb::object dtype, shape, strides;  // strides in bytes, but in elements for PyTorch
};
void read_device(nb::handle array, const Library& library, OnDevice& into);
/// Reads an array of CuPy or PyTorch, and returns true. False for anything else, and for an array that its library does
/// not hand out as it is: a tensor that requires grad, say.
bool read_if_plain(nb::handle array, const Library& library, bool records, OnDevice& into);
void view_device(const char* name, nb::handle array, const Library& library, View& v);
std::byte* device_data(nb::handle array, const Library& library);

/// True for a real number of Python or NumPy, which stands for all elements of an array.
bool is_number(nb::handle value);

/// A new array of NumPy that lies so.
nb::object new_numpy(const normkit::Dense& lying);

/// A NumPy array over somebody's memory, which `base` keeps alive. Strides in bytes.
nb::object numpy_over(void* data, nb::handle dtype, int ndim, const std::int64_t* shape, const std::int64_t* strides,
                      bool writable, nb::handle base);

/// An array of NumPy over the memory of a view.
nb::object as_numpy(const View& v);

/// NumPy's object for a dtype. For bfloat16 it is that of ml_dtypes, or without ml_dtypes two bytes that NumPy moves
/// and never looks into.
nb::object numpy_dtype(Dtype dtype);

/// A NumPy array as something that other libraries import, whatever its dtype.
nb::object to_dlpack(nb::handle array);

}  // namespace arrays
