#include "function.hpp"

#include <structmember.h>

#include <cstddef>
#include <new>
#include <string>
#include <utility>

namespace function {
namespace {

using Call = PyObject* (*)(PyObject* self, PyObject* const* args, std::size_t flagged_count, PyObject* names);

struct Function {
  PyObject ob_base;
  Call call;
  PyObject *python, *dict, *weak_references;
  Arguments* arguments;
  Body* body;
};

Function* as_function(PyObject* self) { return reinterpret_cast<Function*>(self); }

PyObject* call_python(PyObject* callable, PyObject* const* args, Py_ssize_t count, PyObject* names) {
  const nb::object positional = nb::steal(PyTuple_New(count)), by_name = nb::steal(PyDict_New());
  if (!positional.is_valid() || !by_name.is_valid()) return nullptr;
  for (Py_ssize_t k = 0; k < count; ++k) PyTuple_SetItem(positional.ptr(), k, Py_NewRef(args[k]));
  const Py_ssize_t named = names ? PyTuple_Size(names) : 0;
  for (Py_ssize_t k = 0; k < named; ++k)
    if (PyDict_SetItem(by_name.ptr(), PyTuple_GetItem(names, k), args[count + k]) < 0) return nullptr;
  return PyObject_Call(callable, positional.ptr(), by_name.ptr());
}

/// Refuses a call whose arguments are wrong: the function in Python is called, and raises what is wrong with them.
PyObject* refuse(PyObject* python, PyObject* const* args, Py_ssize_t count, PyObject* names) {
  const nb::object nothing = nb::steal(call_python(python, args, count, names));
  if (nothing.is_valid()) PyErr_SetString(PyExc_TypeError, "the arguments are not those of the signature");
  return nullptr;
}

using Method = nb::object (Body::*)(PyObject** values);

template <Method method = &Body::call>
PyObject* call(PyObject* self, PyObject* const* args, std::size_t flagged_count, PyObject* names) {
  Function* f = as_function(self);
  const Py_ssize_t count = NB_VECTORCALL_NARGS(flagged_count);
  PyObject* values[Arguments::kMostSlots];
  try {
    try {
      if (f->arguments->place(args, count, names, values)) return (f->body->*method)(values).release().ptr();
    } catch (const ForModule& e) {
      const nb::object name = nb::handle(f->python).attr("__name__");
      const nb::object same = nb::getattr(nb::module_::import_(e.module), name, nb::none());
      if (same.is_none()) throw;
      return call_python(same.ptr(), args, count, names);
    }
  } catch (...) {
    set_error();
    return nullptr;
  }
  return refuse(f->python, args, count, names);
}

// ---- the type ----------------------------------------------------------------------------------------------------

template <Method method = &Body::call>
PyObject* call_by_dict(PyObject* self, PyObject* args, PyObject* options) {
  std::vector<PyObject*> all;
  for (Py_ssize_t k = 0; k < PyTuple_Size(args); ++k) all.push_back(PyTuple_GetItem(args, k));
  const nb::object names = options ? nb::steal(PySequence_Tuple(options)) : nb::object();
  for (Py_ssize_t k = 0; names.is_valid() && k < PyTuple_Size(names.ptr()); ++k)
    all.push_back(PyDict_GetItem(options, PyTuple_GetItem(names.ptr(), k)));
  return call<method>(self, all.data(), static_cast<std::size_t>(PyTuple_Size(args)), names.ptr());
}

int traverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  Py_VISIT(as_function(self)->python);
  Py_VISIT(as_function(self)->dict);
  return 0;
}

int clear(PyObject* self) {
  Py_CLEAR(as_function(self)->dict);
  return 0;
}

void destroy(PyObject* self) {
  PyObject_GC_UnTrack(self);
  Function* f = as_function(self);
  if (f->weak_references) PyObject_ClearWeakRefs(self);
  Py_CLEAR(f->dict);
  Py_CLEAR(f->python);
  delete f->arguments;
  delete f->body;
  PyTypeObject* type = Py_TYPE(self);
  PyObject_GC_Del(self);
  Py_DECREF(type);
}

/// Binds to an instance, as functions do: one that is an attribute of a class becomes a method.
PyObject* bind(PyObject* self, PyObject* instance, PyObject*) {
  if (!instance || instance == Py_None) return Py_NewRef(self);
  const nb::object types = nb::steal(PyImport_ImportModule("types"));
  if (!types.is_valid()) return nullptr;
  return PyObject_CallMethod(types.ptr(), "MethodType", "OO", self, instance);
}

PyObject* represent(PyObject* self) { return PyObject_Repr(as_function(self)->python); }

/// Has a function pickled by its name in the module that defines it.
PyObject* reduce(PyObject* self, PyObject*) { return PyObject_GetAttrString(self, "__qualname__"); }

PyMethodDef methods[] = {
    {"__reduce__", reduce, METH_NOARGS, nullptr},
    {"_description", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call_by_dict<&Body::describe>)),
     METH_VARARGS | METH_KEYWORDS, nullptr},
    {}};
PyMemberDef members[] = {
    {"__vectorcalloffset__", T_PYSSIZET, offsetof(Function, call), READONLY, nullptr},
    {"__dictoffset__", T_PYSSIZET, offsetof(Function, dict), READONLY, nullptr},
    {"__weaklistoffset__", T_PYSSIZET, offsetof(Function, weak_references), READONLY, nullptr},
    {},
};
/// What isinstance() is told: tools that know functions by that find in these what they look for, see _compiled.py.
PyObject* shown_class(PyObject* self, void*) {
  return Py_NewRef(reinterpret_cast<PyObject*>(Py_TYPE(as_function(self)->python)));
}

PyGetSetDef attributes[] = {{"__dict__", PyObject_GenericGetDict, PyObject_GenericSetDict, nullptr, nullptr},
                            {"__class__", shown_class, nullptr, nullptr, nullptr},
                            {}};

/// Py_TPFLAGS_HAVE_VECTORCALL, which the limited API of Python 3.11 has but does not name.
constexpr unsigned long kHasVectorcall = 1UL << 11;

}  // namespace

// ---- arguments ---------------------------------------------------------------------------------------------------

void Arguments::set(int slot, nb::handle value) {
  if (PyList_Append(held_.ptr(), value.ptr()) < 0) throw nb::python_error();
  value_[slot] = value.ptr();
}

void Arguments::read_signature(nb::handle function, const std::function<int(const char*)>& slot_of) {
  const nb::object code = function.attr("__code__"), names = code.attr("co_varnames");
  const nb::object defaults = function.attr("__defaults__"), by_name = function.attr("__kwdefaults__");
  positional_ = nb::cast<int>(code.attr("co_argcount"));
  const int count = positional_ + nb::cast<int>(code.attr("co_kwonlyargcount"));
  const int given = defaults.is_none() ? 0 : static_cast<int>(nb::len(defaults));
  for (int k = 0; k < count; ++k) {
    names_.push_back(names[k]);
    slot_.push_back(slot_of(nb::borrow<nb::str>(names_[k]).c_str()));
    value_[slot_[k]] = nullptr;
    if (k < positional_ && k >= positional_ - given) set(slot_[k], defaults[k - (positional_ - given)]);
    PyObject* const value = by_name.is_none() ? nullptr : PyDict_GetItem(by_name.ptr(), names_[k].ptr());
    if (k >= positional_ && value) set(slot_[k], value);
    if (!value_[slot_[k]]) required_.push_back(slot_[k]);
  }
}

bool Arguments::place(PyObject* const* args, Py_ssize_t count, PyObject* names, PyObject** values) const {
  if (count > positional_) return false;
  for (int slot = 0; slot < slots_; ++slot) values[slot] = value_[slot];
  for (Py_ssize_t k = 0; k < count; ++k) values[slot_[k]] = args[k];
  const Py_ssize_t named = names ? PyTuple_Size(names) : 0;
  const std::size_t most = names_.size();
  for (Py_ssize_t k = 0; k < named; ++k) {
    PyObject* const name = PyTuple_GetItem(names, k);
    std::size_t at = static_cast<std::size_t>(count);
    while (at < most && names_[at].ptr() != name) ++at;
    if (at == most)  // equal, but not interned
      for (at = count; at < most && PyUnicode_Compare(names_[at].ptr(), name) != 0;) ++at;
    if (at == most) return false;
    values[slot_[at]] = args[count + k];
  }
  for (const int slot : required_)
    if (!values[slot]) return false;
  return true;
}

// ---- functions ---------------------------------------------------------------------------------------------------

nb::object new_type() {
  PyType_Slot slots[] = {{Py_tp_call, reinterpret_cast<void*>(call_by_dict<>)},
                         {Py_tp_traverse, reinterpret_cast<void*>(traverse)},
                         {Py_tp_clear, reinterpret_cast<void*>(clear)},
                         {Py_tp_dealloc, reinterpret_cast<void*>(destroy)},
                         {Py_tp_descr_get, reinterpret_cast<void*>(bind)},
                         {Py_tp_repr, reinterpret_cast<void*>(represent)},
                         {Py_tp_methods, methods},
                         {Py_tp_members, members},
                         {Py_tp_getset, attributes},
                         {}};
  PyType_Spec spec{"normkit._core.function", sizeof(Function), 0,
                   static_cast<unsigned>(Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | kHasVectorcall), slots};
  PyObject* type = PyType_FromSpec(&spec);
  if (!type) throw nb::python_error();
  return nb::steal(type);
}

nb::object make(nb::handle type, nb::handle python, Arguments arguments, std::unique_ptr<Body> body) {
  PyObject* self = PyType_GenericAlloc(reinterpret_cast<PyTypeObject*>(type.ptr()), 0);
  if (!self) throw nb::python_error();
  const nb::object made = nb::steal(self);
  Function* f = as_function(self);
  f->call = call<>;
  f->python = Py_NewRef(python.ptr());
  f->arguments = new Arguments(std::move(arguments));
  f->body = body.release();
  return nb::module_::import_("functools").attr("update_wrapper")(made, python);
}

void set_error() {
  try {
    throw;
  } catch (nb::python_error& e) {
    e.restore();
  } catch (const normkit::Error& e) {
    if (e.kind == normkit::Error::Kind::axis) {
      const nb::object axis_error = nb::module_::import_("numpy.exceptions").attr("AxisError");
      PyErr_SetString(axis_error.ptr(), e.what());
    } else {
      PyErr_SetString(e.kind == normkit::Error::Kind::type ? PyExc_TypeError : PyExc_ValueError, e.what());
    }
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& e) {
    PyErr_SetString(PyExc_RuntimeError, e.what());
  }
}

}  // namespace function
