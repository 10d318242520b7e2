#include "function.hpp"

#include <structmember.h>

#include <cstddef>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>

#include "normkit/normkit.hpp"

namespace function {
namespace {

/// How the arguments of a function are laid out.
struct Arguments {
  nb::object name[kMaxSlots];  // interned, so that a name in a call is as a rule the same object
  int slot[kMaxSlots];
  int count = 0, positional = 0;
  PyObject* value[kMaxSlots] = {};  // by slot; null: has to be passed
  int slots = 0;
  nb::list held;  // the values: a list counts its references as the interpreter does
};

using Call = PyObject* (*)(PyObject* self, PyObject* const* args, std::size_t flagged_count, PyObject* names);

struct Function {
  PyObject ob_base;
  Call call;
  PyObject *function, *dict, *weak_references;
  Arguments* arguments;
  ShortWay* way;
};

Function* as_function(PyObject* self) { return reinterpret_cast<Function*>(self); }

/// Puts the arguments of a call into slots; false where that is not so simple, which includes all that is wrong.
bool place(const Arguments& a, PyObject* const* args, Py_ssize_t count, PyObject* names, PyObject** values) {
  if (count > a.positional) return false;
  for (int slot = 0; slot < a.slots; ++slot) values[slot] = a.value[slot];
  for (Py_ssize_t k = 0; k < count; ++k) values[a.slot[k]] = args[k];
  const Py_ssize_t named = names ? PyTuple_Size(names) : 0;
  for (Py_ssize_t k = 0; k < named; ++k) {
    PyObject* const name = PyTuple_GetItem(names, k);
    Py_ssize_t at = count;
    while (at < a.count && a.name[at].ptr() != name) ++at;
    if (at == a.count) return false;
    values[a.slot[at]] = args[count + k];
  }
  for (int slot = 0; slot < a.slots; ++slot)
    if (!values[slot]) return false;
  return true;
}

/// The long way.
PyObject* call_itself(PyObject* function, PyObject* const* args, Py_ssize_t count, PyObject* names) {
  const nb::object positional = nb::steal(PyTuple_New(count)), by_name = nb::steal(PyDict_New());
  if (!positional.is_valid() || !by_name.is_valid()) return nullptr;
  for (Py_ssize_t k = 0; k < count; ++k) PyTuple_SetItem(positional.ptr(), k, Py_NewRef(args[k]));
  const Py_ssize_t named = names ? PyTuple_Size(names) : 0;
  for (Py_ssize_t k = 0; k < named; ++k)
    if (PyDict_SetItem(by_name.ptr(), PyTuple_GetItem(names, k), args[count + k]) < 0) return nullptr;
  return PyObject_Call(function, positional.ptr(), by_name.ptr());
}

PyObject* call(PyObject* self, PyObject* const* args, std::size_t flagged_count, PyObject* names) {
  Function* f = as_function(self);
  PyObject* values[kMaxSlots];
  try {
    if (place(*f->arguments, args, NB_VECTORCALL_NARGS(flagged_count), names, values)) {
      nb::object result = f->way->call(values);
      if (result.ptr() != Py_NotImplemented) return result.release().ptr();
    }
  } catch (...) {
    set_error();
    return nullptr;
  }
  return call_itself(f->function, args, NB_VECTORCALL_NARGS(flagged_count), names);
}

// ---- the type ----------------------------------------------------------------------------------------------------

PyObject* call_by_dict(PyObject* self, PyObject* args, PyObject* names) {
  return PyObject_Call(as_function(self)->function, args, names);
}

int traverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  Py_VISIT(as_function(self)->function);
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
  Py_CLEAR(f->function);
  delete f->arguments;
  delete f->way;
  PyTypeObject* type = Py_TYPE(self);
  PyObject_GC_Del(self);
  Py_DECREF(type);
}

/// As a function does: an attribute of a class becomes a method.
PyObject* bind(PyObject* self, PyObject* instance, PyObject*) {
  if (!instance || instance == Py_None) return Py_NewRef(self);
  const nb::object types = nb::steal(PyImport_ImportModule("types"));
  if (!types.is_valid()) return nullptr;
  return PyObject_CallMethod(types.ptr(), "MethodType", "OO", self, instance);
}

PyObject* represent(PyObject* self) { return PyObject_Repr(as_function(self)->function); }

/// Pickled as what it is called where it is defined.
PyObject* reduce(PyObject* self, PyObject*) { return PyObject_GetAttrString(self, "__qualname__"); }

PyMethodDef methods[] = {{"__reduce__", reduce, METH_NOARGS, nullptr}, {}};
PyMemberDef members[] = {
    {"__vectorcalloffset__", T_PYSSIZET, offsetof(Function, call), READONLY, nullptr},
    {"__dictoffset__", T_PYSSIZET, offsetof(Function, dict), READONLY, nullptr},
    {"__weaklistoffset__", T_PYSSIZET, offsetof(Function, weak_references), READONLY, nullptr},
    {},
};
PyGetSetDef attributes[] = {{"__dict__", PyObject_GenericGetDict, PyObject_GenericSetDict, nullptr, nullptr}, {}};

/// Py_TPFLAGS_HAVE_VECTORCALL, which the limited API of Python 3.11 has but does not name.
constexpr unsigned long kHasVectorcall = 1UL << 11;

// ---- what a function takes ---------------------------------------------------------------------------------------

void read_signature(nb::handle function, std::span<const Parameter> parameters, Arguments& a) {
  const nb::object code = function.attr("__code__"), names = code.attr("co_varnames");
  const nb::object defaults = function.attr("__defaults__"), by_name = function.attr("__kwdefaults__");
  a.positional = nb::cast<int>(code.attr("co_argcount"));
  a.count = a.positional + nb::cast<int>(code.attr("co_kwonlyargcount"));
  const auto put = [&](int slot, nb::handle value) {
    if (PyList_Append(a.held.ptr(), value.ptr()) < 0) throw nb::python_error();
    a.value[slot] = value.ptr();
  };
  for (const Parameter& p : parameters) {
    if (p.slot >= a.slots) a.slots = p.slot + 1;
    if (!a.value[p.slot] && p.value) put(p.slot, p.value);
  }
  const int given = defaults.is_none() ? 0 : static_cast<int>(nb::len(defaults));
  for (int k = 0; k < a.count; ++k) {
    a.name[k] = names[k];
    const char* name = nb::borrow<nb::str>(a.name[k]).c_str();
    std::size_t at = 0;
    while (at < parameters.size() && std::strcmp(parameters[at].name, name) != 0) ++at;
    if (at == parameters.size()) throw std::invalid_argument(std::string("no slot for the parameter ") + name);
    a.slot[k] = parameters[at].slot;
    a.value[a.slot[k]] = nullptr;
    if (k < a.positional && k >= a.positional - given) put(a.slot[k], defaults[k - (a.positional - given)]);
    PyObject* const value = by_name.is_none() ? nullptr : PyDict_GetItem(by_name.ptr(), a.name[k].ptr());
    if (k >= a.positional && value) put(a.slot[k], value);
  }
}

}  // namespace

nb::object new_type() {
  PyType_Slot slots[] = {{Py_tp_call, reinterpret_cast<void*>(call_by_dict)},
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

nb::object with_short_way(nb::handle type, nb::handle function, std::span<const Parameter> parameters,
                          std::unique_ptr<ShortWay> way) {
  auto arguments = std::make_unique<Arguments>();
  read_signature(function, parameters, *arguments);
  PyObject* self = PyType_GenericAlloc(reinterpret_cast<PyTypeObject*>(type.ptr()), 0);
  if (!self) throw nb::python_error();
  Function* f = as_function(self);
  f->call = call;
  f->function = Py_NewRef(function.ptr());
  f->arguments = arguments.release();
  f->way = way.release();
  const nb::object made = nb::steal(self);
  return nb::module_::import_("functools").attr("update_wrapper")(made, function);
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
