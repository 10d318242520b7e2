#include "library.hpp"

#include <array>
#include <string>
#include <utility>

namespace library {
namespace {

/// A string that lookups of attributes take as it is.
class Name {
 public:
  explicit Name(const char* name) : name_(PyUnicode_InternFromString(name)) {}
  nb::object of(nb::handle object) const {
    PyObject* const found = PyObject_GetAttr(object.ptr(), name_);
    if (!found) throw nb::python_error();
    return nb::steal(found);
  }
  nb::object call(nb::handle object) const { return of(object)(); }

 private:
  PyObject* name_;
};

std::int64_t number(nb::handle h) {
  const long long value = PyLong_AsLongLong(h.ptr());
  if (value == -1 && PyErr_Occurred()) throw nb::python_error();
  return value;
}

std::byte* pointer(nb::handle h) { return reinterpret_cast<std::byte*>(static_cast<std::uintptr_t>(number(h))); }

}  // namespace

struct Library {
  virtual ~Library() = default;
  virtual bool read(nb::handle array, recent::Key& key, Array& into) const = 0;
  virtual std::byte* data_of(nb::handle array) const = 0;

 protected:
  const Name shape_{"shape"}, dtype_{"dtype"};
};

namespace {

/// Extents, then strides, in whatever units the library has.
bool add_layout(recent::Key& key, nb::handle shape, nb::handle strides) {
  const Py_ssize_t ndim = PyTuple_Size(shape.ptr());
  if (ndim < 0 || PyTuple_Size(strides.ptr()) != ndim) throw nb::python_error();
  if (ndim > recent::Key::kMostAxes) return false;
  key.put(ndim);
  for (nb::handle tuple : {shape, strides})
    for (Py_ssize_t axis = 0; axis < ndim; ++axis) key.put(number(PyTuple_GetItem(tuple.ptr(), axis)));
  return true;
}

struct CuPy final : Library {
  const Name data_{"data"}, pointer_{"ptr"}, device_{"device_id"}, strides_{"strides"};
  bool read(nb::handle array, recent::Key& key, Array& into) const override {
    const nb::object data = data_.of(array);
    into.data = pointer(pointer_.of(data)), into.device = number(device_.of(data)), into.dtype = dtype_.of(array);
    key.add(into.dtype);
    return add_layout(key, shape_.of(array), strides_.of(array));
  }
  std::byte* data_of(nb::handle array) const override { return pointer(pointer_.of(data_.of(array))); }
};

struct Torch final : Library {
  const Name is_cuda_{"is_cuda"}, requires_grad_{"requires_grad"}, is_neg_{"is_neg"}, pointer_{"data_ptr"},
      device_{"get_device"}, strides_{"stride"};
  bool read(nb::handle array, recent::Key& key, Array& into) const override {
    const nb::handle yes(Py_True), no(Py_False);
    if (!is_cuda_.of(array).is(yes) || !requires_grad_.of(array).is(no) || !is_neg_.call(array).is(no)) return false;
    into.data = pointer(pointer_.call(array)), into.device = number(device_.call(array)), into.dtype = dtype_.of(array);
    key.add(into.dtype);
    return add_layout(key, shape_.of(array), strides_.call(array));
  }
  std::byte* data_of(nb::handle array) const override { return pointer(pointer_.call(array)); }
};

/// By the type of its arrays, of which the last few are remembered; null for others.
const Library* library_of(nb::handle array) {
  static const CuPy cupy;
  static const Torch torch;
  static std::array<std::pair<PyTypeObject*, const Library*>, 4> known = {};
  static std::size_t turn = 0;
  PyTypeObject* const type = Py_TYPE(array.ptr());
  for (const auto& [seen, library] : known)
    if (seen == type) return library;
  const std::string name = nb::str(nb::module_::import_("normkit._memory").attr("library_of")(array)).c_str();
  const Library* const library = name == "cupy"    ? static_cast<const Library*>(&cupy)
                                 : name == "torch" ? &torch
                                                   : nullptr;
  if (library) {
    auto& place = known[turn++ % known.size()];
    const nb::object before = nb::steal(reinterpret_cast<PyObject*>(place.first));
    Py_INCREF(reinterpret_cast<PyObject*>(type)), place = {type, library};
  }
  return library;
}

}  // namespace

bool read(nb::handle array, recent::Key& key, Array& into) {
  const Library* const library = library_of(array);
  into.library = library;
  return library && library->read(array, key, into);
}

std::byte* data_of(nb::handle array) { return library_of(array)->data_of(array); }

}  // namespace library
