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
  int overflow = 0;
  const long long value = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
  if (overflow)
    throw Error(Error::Kind::value, std::string(name) + " is " + nb::repr(h).c_str() + ", expected one of 64 bits");
  return value;
}

/// The axes that `h` stands for: one axis, several in anything that can be iterated over, or None, which stands for all
/// axes.
std::vector<std::int64_t> axes_of(nb::handle h, int ndim) {
  std::vector<std::int64_t> axes;
  for (int axis = 0; h.is_none() && axis < ndim; ++axis) axes.push_back(axis);
  if (h.is_none()) return axes;
  const nb::object index = nb::steal(PyNumber_Index(h.ptr()));
  PyErr_Clear();  // no iterator is asked for while an error is pending
  const nb::object items = nb::steal(PyObject_GetIter(h.ptr()));
  PyErr_Clear();
  if (index.is_valid() || !items.is_valid() || PyUnicode_Check(h.ptr()) || PyBytes_Check(h.ptr()))
    return {integer("axis", h)};
  for (nb::handle item : nb::borrow<nb::iterable>(items)) axes.push_back(integer("axis", item));
  return axes;
}

constexpr const char* kActivationNames[] = {"none",    "relu", "leaky_relu", "silu",      "gelu", "gelu_tanh", "elu",
                                            "sigmoid", "tanh", "relu6",      "hardswish", "mish", "softplus"};

[[noreturn]] void bad_activation(nb::handle h, Error::Kind kind) {
  std::string names;
  for (const char* name : kActivationNames) names += std::string(names.empty() ? "" : ", ") + "'" + name + "'";
  throw Error(kind, std::string("activation is ") + nb::repr(h).c_str() + ", expected None" + names.substr(6) +
                        ", or a pair such as ('leaky_relu', 0.01), ('elu', 1.0) or ('prelu', slopes)");
}

/// None, a name, or a pair of a name and its parameter.
normkit::Activation activation_of(nb::handle h) {
  using normkit::ActivationKind;
  if (h.is_none()) return {};
  const bool pair = (PyTuple_Check(h.ptr()) || PyList_Check(h.ptr())) && nb::len(h) == 2;
  const nb::object name = pair ? nb::object(h[0]) : nb::borrow(h);
  if (!PyUnicode_Check(name.ptr())) bad_activation(h, Error::Kind::type);
  const std::string text = nb::str(name).c_str();
  if (!pair && text == "prelu") return {ActivationKind::prelu};
  for (int kind = 1; kind < static_cast<int>(std::size(kActivationNames)); ++kind) {
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

namespace {

double eps_of(nb::handle eps, Kind kind, bool centered, Dtype x) {
  if (eps.is_none() && kind == kLayer && !centered)  // the distance from 1 to the next number of the compute type
    return x == Dtype::float64 ? std::numeric_limits<double>::epsilon()
                               : static_cast<double>(std::numeric_limits<float>::epsilon());
  return number("eps", eps, "a number that is at least 0");
}

Spec spec_of_axes(Kind kind, PyObject* const* values, const normkit::Array& x, bool centered) {
  const nb::handle axes = values[kAxes];
  switch (kind) {
    case kInstance: return normkit::instance_spec(x.ndim(), integer("channel_axis", axes));
    case kBatch: return normkit::batch_spec(x.ndim(), integer("channel_axis", axes));
    case kGroup:
      return normkit::group_spec(x.shape, integer("num_groups", values[kNumGroups]), integer("channel_axis", axes));
    case kLayer: return normkit::layer_spec(x.ndim(), axes_of(axes, x.ndim()), centered);
    case kL2: return normkit::l2_spec(x.ndim(), axes_of(axes, x.ndim()));
    default: return normkit::normalize_spec(x.ndim(), axes_of(axes, x.ndim()), centered);
  }
}

}  // namespace

nb::object take_slopes(PyObject** values) {
  static PyObject* const name = PyUnicode_InternFromString("prelu");  // the same object in every key of a call
  const nb::handle pair = values[kActivation];
  const bool is_tuple = PyTuple_Check(pair.ptr());
  if ((!is_tuple && !PyList_Check(pair.ptr())) || PyObject_Size(pair.ptr()) != 2) return {};
  const nb::object first = nb::steal(PySequence_GetItem(pair.ptr(), 0));
  if (!first.is_valid() || !PyUnicode_Check(first.ptr()) || PyUnicode_Compare(first.ptr(), name) != 0) return {};
  nb::object slopes = nb::steal(PySequence_GetItem(pair.ptr(), 1));
  values[kActivation] = name, values[normkit::kSlopes] = slopes.ptr();
  return slopes;
}

Spec spec_of(Kind kind, normkit::Op op, PyObject* const* values, const normkit::Array& x) {
  const bool centered = values[kCenter] == Py_True;
  Spec spec = spec_of_axes(kind, values, x, centered);
  spec.use_input_stats = values[kUseInputStats] == Py_True;
  if (op == normkit::Op::forward || kind == kL2) spec.eps = eps_of(values[kEps], kind, centered, x.dtype);
  if (op == normkit::Op::forward) {
    if (values[kMomentum] == Py_None)
      throw Error(Error::Kind::value, "momentum is None, expected a number from 0 to 1: keep the count yourself");
    spec.momentum = number("momentum", values[kMomentum], "a number from 0 to 1");
  }
  spec.activation = activation_of(values[kActivation]);
  if (spec.activation.kind == normkit::ActivationKind::prelu && values[normkit::kSlopes] == Py_None)
    throw Error(Error::Kind::type, "slopes is None, expected an array or a number: activation is ('prelu', slopes)");
  spec.weight_offset = number("weight_offset", values[kWeightOffset], "a finite number");
  return spec;
}

normkit::OperandMask wanted_of(normkit::Op op, PyObject* const* values) {
  using namespace normkit;
  const auto bit = [](bool wanted, OperandIndex k) { return wanted ? operand_bit(k) : 0; };
  const bool stats = values[kReturnStats] == Py_True, residual = values[kReturnResidual] == Py_True;
  switch (op) {
    case Op::forward:
      if (residual && values[kResidual] == Py_None)
        throw Error(Error::Kind::value, "residual is None, expected an array like x: return_residual is True");
      return operand_bit(kOut) | bit(stats && values[kCenter] == Py_True, kMean) | bit(stats, kRstd) |
             bit(residual, kSum);
    case Op::moments: return operand_bit(kMoments);
    case Op::backward_sums: return operand_bit(kSums);
    case Op::double_backward:
      return operand_bit(kOut) | operand_bit(kDdy) | bit(values[kWeight] != Py_None, kDweight) |
             bit(values[kBias] != Py_None && values[kActivation] != Py_None, kDbias);
    case Op::backward: break;
    default: return operand_bit(kOut);
  }
  OperandMask wanted = 0;
  const nb::handle need = values[kNeed];
  const std::string names = "('dx', 'dweight', 'dbias', 'dslopes')";
  if (PyUnicode_Check(need.ptr()) || !nb::isinstance<nb::iterable>(need))
    throw Error(Error::Kind::type,
                std::string("need is ") + nb::repr(need).c_str() + ", expected a tuple of names from " + names);
  for (nb::handle item : nb::borrow<nb::iterable>(need)) {
    const std::string name = PyUnicode_Check(item.ptr()) ? nb::str(item).c_str() : "";
    const OperandMask named = bit(name == "dx", kOut) | bit(name == "dweight", kDweight) |
                              bit(name == "dbias", kDbias) | bit(name == "dslopes", kDslopes);
    if (!named)
      throw Error(Error::Kind::value,
                  std::string("need has ") + nb::repr(item).c_str() + ", expected names from " + names);
    if (named == operand_bit(kDslopes) && values[kSlopes] == Py_None)
      throw Error(Error::Kind::value, "need has 'dslopes', expected it with ('prelu', slopes) as activation alone");
    wanted |= named;
  }
  return wanted;
}

Dtype dtype_named(nb::handle h) {
  if (h.is_none()) return Dtype::other;
  nb::object named = PyUnicode_Check(h.ptr()) ? nb::borrow(h) : nb::object(nb::getattr(h, "name", nb::handle()));
  if (!named.is_valid() || !PyUnicode_Check(named.ptr())) named = nb::getattr(h, "__name__", nb::str(h));
  std::string name = nb::str(named).c_str();
  if (!PyUnicode_Check(h.ptr())) name = name.substr(name.rfind('.') + 1);
  const auto known = [](const std::string& word) {
    for (const Dtype dtype : {Dtype::float32, Dtype::float64, Dtype::float16, Dtype::bfloat16})
      if (word == normkit::name_of(dtype)) return dtype;
    return Dtype::other;
  };
  if (const Dtype dtype = known(name); dtype != Dtype::other) return dtype;
  try {  // what NumPy calls a dtype beside: float, "f4"
    const nb::object spelled = nb::module_::import_("numpy").attr("dtype")(h).attr("name");
    if (const Dtype dtype = known(nb::str(spelled).c_str()); dtype != Dtype::other) return dtype;
  } catch (nb::python_error&) {
  }
  throw Error(Error::Kind::type, "out_dtype is " + name + ", expected float32, float64, float16 or bfloat16");
}

}  // namespace options
