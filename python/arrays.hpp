// NumPy arrays as the core sees them, and new ones.
#pragma once

#include <nanobind/nanobind.h>

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
inline PyObject* descr_of(nb::handle array) { return reinterpret_cast<PyObject*>(PyArray_DESCR(as_array(array))); }
inline std::byte* data_of(nb::handle array) {
  return array.is_valid() ? static_cast<std::byte*>(PyArray_DATA(as_array(array))) : nullptr;
}

/// A view of an array that somebody else keeps alive, or of `copy`.
struct View {
  Array array;
  nb::handle object;
  nb::object copy;
  std::string other_dtype;
};

/// True where `h` is None or exactly a NumPy array; subclasses and other libraries take the slow path.
bool view(nb::handle h, View& v);

/// One like x, of this dtype.
nb::object new_like_x(Dtype dtype, nb::handle x, const normkit::Shapes& shapes);
/// One with an element for each statistic, or three of float64. Filled with zeros where x is empty and no kernel will.
nb::object new_statistic(Dtype dtype, const normkit::Shapes& shapes);
nb::object new_triples(const normkit::Shapes& shapes);
/// One like weight, or like the weight that is not there.
nb::object new_gradient(nb::handle weight, const normkit::Shapes& shapes);

/// Replaces an array, where there is one, by a copy with these strides.
void repack(View& v, const std::int64_t* strides);

/// The same of triples.
void repack_triples(View& v, const normkit::Shapes& shapes);

/// Replaces an array of any real dtype by one of float64; others stay, to be refused.
void widen(View& v);

/// Where memory of `out` and of an input interleaves, NumPy can tell whether they share an element.
bool known_apart(const View& out, const View& other);

}  // namespace arrays
