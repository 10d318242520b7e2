// The last calls of a function and their plans: a call that differs from one of them in addresses alone is not planned
// again.
#pragma once

#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "arrays.hpp"

namespace recent {

namespace nb = nanobind;

/// All that a plan depends on but for addresses, as words: two calls with the same words have the same plan where a
/// Placement allows theirs.
class Key {
 public:
  static constexpr int kMostArrays = 12, kMostOptions = 24;  // one that is no flag counts as two
  static constexpr int kMostAxes = 8;

  void put(std::int64_t word) { words_[count_++] = word; }

  /// Adds None, or of a NumPy array its dtype, extents, strides, and whether it may be written. False for anything else,
  /// and for an array of more axes than a key has room for.
  bool add_array(nb::handle h) {
    if (h.is_none()) return put(0), true;
    if (!PyArray_CheckExact(h.ptr())) return false;
    PyArrayObject* a = arrays::as_array(h);
    const int ndim = PyArray_NDIM(a);
    if (ndim > kMostAxes) return false;
    put(reinterpret_cast<std::intptr_t>(PyArray_DESCR(a)));
    put(2 * ndim + (PyArray_ISWRITEABLE(a) ? 1 : 0));
    const npy_intp *dims = PyArray_DIMS(a), *strides = PyArray_STRIDES(a);
    for (int axis = 0; axis < ndim; ++axis) put(dims[axis]), put(strides[axis]);
    return true;
  }
  /// The same of an array that may be written.
  bool add_view(const normkit::Array& a) {
    if (a.ndim() > kMostAxes) return false;
    put(static_cast<std::int64_t>(a.dtype) + 1), put(a.ndim());
    for (int axis = 0; axis < a.ndim(); ++axis) {
      const std::size_t k = static_cast<std::size_t>(axis);
      put(a.shape[k]), put(a.strides[k]);
    }
    return true;
  }
  /// Adds extents, then strides, in whatever units. False where there are more axes than a key has room for.
  bool add_layout(nb::handle shape, nb::handle strides) {
    const Py_ssize_t ndim = PyTuple_Size(shape.ptr());
    if (ndim < 0 || PyTuple_Size(strides.ptr()) != ndim) throw nb::python_error();
    if (ndim > kMostAxes) return false;
    put(ndim);
    for (nb::handle tuple : {shape, strides})
      for (Py_ssize_t axis = 0; axis < ndim; ++axis) put(PyLong_AsLongLong(PyTuple_GetItem(tuple.ptr(), axis)));
    return true;
  }
  /// Adds a number by its value, and anything else by its address.
  void add_value(nb::handle h) {
    enum : std::int64_t { kObject, kFloat, kInteger };
    int overflows = 0;
    const long long integer = PyLong_CheckExact(h.ptr()) ? PyLong_AsLongLongAndOverflow(h.ptr(), &overflows) : 0;
    if (PyFloat_CheckExact(h.ptr())) put(kFloat), put(std::bit_cast<std::int64_t>(PyFloat_AsDouble(h.ptr())));
    else if (PyLong_CheckExact(h.ptr()) && !overflows) put(kInteger), put(integer);
    else put(kObject), add(h);
  }
  /// Adds an object by its address, which tells its value only where that never changes.
  void add(nb::handle h) { put(reinterpret_cast<std::intptr_t>(h.ptr())); }

  void copy_to(std::vector<std::int64_t>& words) const { words.assign(words_.begin(), words_.begin() + count_); }
  bool same(const std::vector<std::int64_t>& words) const {
    const std::size_t count = static_cast<std::size_t>(count_);
    return words.size() == count && std::memcmp(words_.data(), words.data(), count * sizeof(std::int64_t)) == 0;
  }
  /// A hash of the first words, most of which are of the first array: in a program shapes differ more often than options.
  std::size_t hash() const {
    std::uint64_t h = 0;
    for (int k = 0; k < count_ && k < kHashed; ++k) h = h * 31 + static_cast<std::uint64_t>(words_[k]);
    return static_cast<std::size_t>((h * 0x9E3779B97F4A7C15) >> 32);
  }

 private:
  static constexpr int kHashed = 10;
  std::array<std::int64_t, kMostArrays * (2 + 2 * kMostAxes) + kMostOptions> words_;
  int count_ = 0;
};

/// True of an object that is there for ever. From Python 3.12 on only extensions of the 3.11 ABI count its references.
inline bool is_single(nb::handle h) { return h.is_none() || PyBool_Check(h.ptr()); }

/// True of an object that never changes: None, a number, a string, or a tuple of such objects.
inline bool immutable(nb::handle h) {
  PyObject* const o = h.ptr();
  if (is_single(h) || PyFloat_CheckExact(o) || PyLong_CheckExact(o) || PyUnicode_CheckExact(o)) return true;
  if (!PyTuple_CheckExact(o)) return false;
  for (nb::handle item : nb::borrow<nb::tuple>(h))
    if (!immutable(item)) return false;
  return true;
}

/// A call that was planned.
struct Known {
  normkit::Plan plan;
  normkit::Placement placement;
  std::vector<std::int64_t> words;  // of its key
  std::vector<nb::object> held;     // which the key names: else another object could come to have the address of one
};

/// The last few calls: sets of places, of which the first array of a call chooses one. The interpreter lock guards it.
class Recent {
 public:
  /// The call with this key, or null. It is shared: while the caller works with it, another call may push it out.
  std::shared_ptr<const Known> find(const Key& key) const {
    for (const std::shared_ptr<Known>& known : sets_[key.hash() % kSets])
      if (known && key.same(known->words)) return known;
    return nullptr;
  }
  void keep(const Key& key, const normkit::Plan& plan, const normkit::Placement& placement,
            std::vector<nb::object> held) {
    std::shared_ptr<Known>& known = sets_[key.hash() % kSets][turn_++ % kPlaces];
    if (!known || known.use_count() > 1) known = std::make_shared<Known>();
    key.copy_to(known->words);
    known->plan = plan, known->placement = placement;
    known->held.swap(held);  // what was there dies last, since that may run anything
  }

 private:
  static constexpr std::size_t kSets = 16, kPlaces = 4;
  std::array<std::array<std::shared_ptr<Known>, kPlaces>, kSets> sets_;
  std::size_t turn_ = 0;
};

}  // namespace recent
