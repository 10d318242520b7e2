#include "options.hpp"

#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

namespace options {

using normkit::Error;
using normkit::Spec;

namespace {

std::int64_t integer(const char* name, nb::handle h) {
  const nb::object index = nb::steal(PyNumber_Index(h.ptr()));
  if (!index.is_valid()) {
    PyErr_Clear();
    throw Error(Error::Kind::type, std::string(name) + " is " + nb::repr(h).c_str() + ", expected an integer");
  }
  const long long value = PyLong_AsLongLong(index.ptr());
  if (value == -1 && PyErr_Occurred()) throw nb::python_error();
  return value;
}

std::vector<std::int64_t> integers(const char* name, nb::handle h) {
  if (!PyTuple_Check(h.ptr()) && !PyList_Check(h.ptr())) return {integer(name, h)};
  std::vector<std::int64_t> values;
  for (nb::handle item : nb::borrow<nb::iterable>(h)) values.push_back(integer(name, item));
  return values;
}

constexpr const char* kActivationNames[] = {"none",      "relu", "leaky_relu", "silu", "gelu",
                                            "gelu_tanh", "elu",  "sigmoid",    "tanh"};

[[noreturn]] void bad_activation(nb::handle h, Error::Kind kind) {
  std::string names;
  for (const char* name : kActivationNames) names += std::string(names.empty() ? "" : ", ") + "'" + name + "'";
  throw Error(kind, std::string("activation is ") + nb::repr(h).c_str() + ", expected None" + names.substr(6) +
                        ", or a pair such as ('leaky_relu', 0.01) or ('elu', 1.0)");
}

/// None, a name, or a pair of a name and its parameter.
normkit::Activation activation_of(nb::handle h) {
  using normkit::ActivationKind;
  if (h.is_none()) return {};
  const bool pair = (PyTuple_Check(h.ptr()) || PyList_Check(h.ptr())) && nb::len(h) == 2;
  const nb::object name = pair ? nb::object(h[0]) : nb::borrow(h);
  if (!PyUnicode_Check(name.ptr())) bad_activation(h, Error::Kind::type);
  const std::string text = nb::str(name).c_str();
  for (int kind = 1; kind <= static_cast<int>(ActivationKind::tanh); ++kind) {
    if (text != kActivationNames[kind]) continue;
    normkit::Activation a{static_cast<ActivationKind>(kind)};
    const bool leaky = a.kind == ActivationKind::leaky_relu, elu = a.kind == ActivationKind::elu;
    a.parameter = leaky ? 0.01 : elu ? 1.0 : 0.0;
    if (!pair) return a;
    const std::string given = std::string("activation is ") + nb::repr(h).c_str();
    if (!leaky && !elu)
      throw Error(Error::Kind::value, given + ", expected '" + text + "': only leaky_relu and elu have a parameter");
    const nb::object parameter = h[1];
    a.parameter = PyFloat_AsDouble(parameter.ptr());
    if (a.parameter == -1.0 && PyErr_Occurred()) {
      PyErr_Clear();
      throw Error(Error::Kind::type, given + ", expected a number as its parameter");
    }
    if (!std::isfinite(a.parameter)) throw Error(Error::Kind::value, given + ", expected a finite parameter");
    return a;
  }
  bad_activation(h, Error::Kind::value);
}

}  // namespace

double number(const char* name, nb::handle h, const char* expected) {
  const double value = PyFloat_AsDouble(h.ptr());
  if (value == -1.0 && PyErr_Occurred()) {
    PyErr_Clear();
    throw Error(Error::Kind::type, std::string(name) + " is " + nb::repr(h).c_str() + ", expected " + expected);
  }
  return value;
}

Spec spec_of(int kind, nb::handle axes, nb::handle num_groups, const normkit::Array& x) {
  const int ndim = x.ndim();
  switch (kind) {
    case kInstance: return normkit::instance_spec(ndim, integer("channel_axis", axes));
    case kBatch: return normkit::batch_spec(ndim, integer("channel_axis", axes));
    case kGroup: return normkit::group_spec(x.shape, integer("num_groups", num_groups), integer("channel_axis", axes));
    case kLayer:
    case kLayerRms: return normkit::layer_spec(ndim, integers("axis", axes), is_centered(kind));
    default: return normkit::normalize_spec(ndim, integers("axis", axes), is_centered(kind));
  }
}

Spec spec_of(int kind, nb::handle axes, const normkit::Array& x) {
  return kind == kGroup ? spec_of(kind, axes[0], axes[1], x) : spec_of(kind, axes, {}, x);
}

double eps_of(nb::handle eps, int kind, Dtype x) {
  if (eps.is_none() && kind == kLayerRms)
    return x == Dtype::float64 ? std::numeric_limits<double>::epsilon()
                               : static_cast<double>(std::numeric_limits<float>::epsilon());
  return number("eps", eps, "a number that is at least 0");
}

void put_epilogue(Spec& spec, nb::handle activation, nb::handle weight_offset) {
  spec.activation = activation_of(activation);
  spec.weight_offset = number("weight_offset", weight_offset, "a finite number");
}

bool names_dtype(nb::handle h) { return h.is_none() || PyUnicode_Check(h.ptr()); }

Dtype dtype_named(nb::handle h) {
  if (h.is_none()) return Dtype::other;
  const std::string name = nb::str(h).c_str();
  for (const Dtype dtype : {Dtype::float32, Dtype::float64, Dtype::float16, Dtype::bfloat16})
    if (name == normkit::name_of(dtype)) return dtype;
  throw Error(Error::Kind::type, "out_dtype is " + name + ", expected float32, float64, float16 or bfloat16");
}

}  // namespace options
