// Views of NumPy arrays in, one planned call, NumPy arrays out. Judgement is plan.cpp's; what does not fit the fast path
// (other libraries, arrays to be packed) is answered with NotImplemented and handled by _arrays.py.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <limits>
#include <memory>
#include <new>
#include <string>
#include <utility>
#include <vector>

#define NORMKIT_IMPORTS_NUMPY
#include "arrays.hpp"
#include "function.hpp"
#include "normkit/formula.hpp"
#include "output_cache.hpp"
#include "plan.hpp"
#include "recent.hpp"

namespace nb = nanobind;
using namespace nb::literals;
using arrays::allocate;
using arrays::as_array;
using arrays::data_of;
using arrays::known_apart;
using arrays::repack;
using arrays::view;
using arrays::View;
using normkit::Array;
using normkit::Dtype;
using normkit::Error;
using normkit::Shapes;
using normkit::Spec;

namespace {

// ---- arguments ---------------------------------------------------------------------------------------------------

double number(const char* name, nb::handle h, const char* expected) {
  const double value = PyFloat_AsDouble(h.ptr());
  if (value == -1.0 && PyErr_Occurred()) {
    PyErr_Clear();
    throw Error(Error::Kind::type, std::string(name) + " is " + nb::repr(h).c_str() + ", expected " + expected);
  }
  return value;
}

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

/// What is normalized; `axes` holds the axes, the channel axis, or (channel axis, groups). functional.py has the same names.
enum Kind { kNormalize, kNormalizeRms, kInstance, kGroup, kBatch, kLayer, kLayerRms };
constexpr const char* kKindNames[] = {"NORMALIZE", "NORMALIZE_RMS", "INSTANCE", "GROUP", "BATCH", "LAYER", "LAYER_RMS"};

bool is_centered(int kind) { return kind != kNormalizeRms && kind != kLayerRms; }

Spec spec_of(int kind, nb::handle axes, const Array& x) {
  const int ndim = x.ndim();
  switch (kind) {
    case kInstance: return normkit::instance_spec(ndim, integer("channel_axis", axes));
    case kBatch: return normkit::batch_spec(ndim, integer("channel_axis", axes));
    case kGroup: return normkit::group_spec(x.shape, integer("num_groups", axes[1]), integer("channel_axis", axes[0]));
    case kLayer:
    case kLayerRms: return normkit::layer_spec(ndim, integers("axis", axes), is_centered(kind));
    default: return normkit::normalize_spec(ndim, integers("axis", axes), is_centered(kind));
  }
}

/// The eps of RMS norm, where the caller leaves it open, is the distance from 1 to the next number of the compute type.
double eps_of(nb::handle eps, int kind, Dtype x) {
  if (eps.is_none() && kind == kLayerRms)
    return x == Dtype::float64 ? std::numeric_limits<double>::epsilon()
                               : static_cast<double>(std::numeric_limits<float>::epsilon());
  return number("eps", eps, "a number that is at least 0");
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

/// The options that every function but moments() has.
void put_epilogue(Spec& spec, nb::handle activation, nb::handle weight_offset) {
  spec.activation = activation_of(activation);
  spec.weight_offset = number("weight_offset", weight_offset, "a finite number");
}

Dtype dtype_named(nb::handle h) {
  if (h.is_none()) return Dtype::other;
  const std::string name = nb::str(h).c_str();
  for (const Dtype dtype : {Dtype::float32, Dtype::float64, Dtype::float16, Dtype::bfloat16})
    if (name == normkit::name_of(dtype)) return dtype;
  throw Error(Error::Kind::type, "out_dtype is " + name + ", expected float32, float64, float16 or bfloat16");
}

// ---- running -----------------------------------------------------------------------------------------------------

/// Scratch of a call: on the stack where it is small, since most calls on small arrays want none or little.
class Workspace {
 public:
  explicit Workspace(std::size_t doubles) {
    if (doubles > kOnStack) heap_.reset(static_cast<double*>(::operator new[](doubles * sizeof(double), kLine)));
  }
  double* data() { return heap_ ? heap_.get() : stack_; }

 private:
  static constexpr std::size_t kOnStack = 512;
  static constexpr std::align_val_t kLine{64};
  struct Delete {
    void operator()(double* p) const { ::operator delete[](p, kLine); }
  };
  alignas(64) double stack_[kOnStack];
  std::unique_ptr<double[], Delete> heap_;
};

/// Elements from which other Python threads get to run meanwhile: letting go of the lock and taking it back costs as much as
/// some thousands of elements.
constexpr std::int64_t kReleaseElements = 16384;

template <class Job> void run_job(Job& job) {
  Workspace workspace(workspace_doubles(job));
  if (job.task.geometry.size() < kReleaseElements) return run(job, workspace.data());
  const nb::gil_scoped_release unlocked;
  run(job, workspace.data());
}

/// A new array, filled with zeros where x is empty and no kernel will.
nb::object filled(nb::object array, const Shapes& shapes) {
  if (shapes.empty) array.attr("fill")(0);
  return array;
}

nb::object new_statistic(Dtype dtype, const Shapes& shapes) {
  return filled(allocate(dtype, {}, shapes.stat_ndim, shapes.stat_shape.data(), shapes.stat_strides.data()), shapes);
}

/// The extents and strides of three numbers for each statistic.
struct Triples {
  normkit::Extents shape, strides;
  int ndim;
  explicit Triples(const Shapes& s) : ndim(s.stat_ndim + 1) {
    for (int axis = 0; axis < s.stat_ndim; ++axis)
      shape[axis] = s.stat_shape[axis], strides[axis] = 3 * s.stat_strides[axis];
    shape[s.stat_ndim] = 3, strides[s.stat_ndim] = 1;
  }
};

nb::object new_triples(const Shapes& shapes) {
  const Triples t(shapes);
  return filled(allocate(Dtype::float64, {}, t.ndim, t.shape.data(), t.strides.data()), shapes);
}

/// `x_dtype` is that of x.
nb::object new_like_x(Dtype dtype, nb::handle x, Dtype x_dtype, const Shapes& shapes) {
  PyArrayObject* a = as_array(x);
  return allocate(dtype, dtype == x_dtype ? x : nb::handle(), PyArray_NDIM(a), arrays::extents(PyArray_DIMS(a)),
                  shapes.out_strides.data());
}

// ---- forward -----------------------------------------------------------------------------------------------------

/// What forward is called with, as it comes from Python.
struct ForwardCall {
  int kind;
  nb::handle axes, x, weight, bias, eps, running_mean, running_var;
  bool use_input_stats;
  nb::handle momentum, out, out_dtype;
  bool return_stats;
  nb::handle where, residual;
  bool return_residual;
  nb::handle activation, weight_offset;
};

/// The arrays of forward, or of one of its phases, and their plan.
struct ForwardViews {
  View x, weight, bias, running_mean, running_var, out, residual, where, mean, rstd;
  Spec spec;
  Dtype out_dtype = Dtype::other;

  normkit::ForwardPlan planned(normkit::Phase phase, bool keep_sum = false) {
    const bool apart = known_apart(out, x);
    normkit::ForwardPlan plan = normkit::plan_forward(args(apart), spec, phase, keep_sum);
    const Shapes& s = plan.shapes;
    if (!s.fits || !(s.repack_params || s.repack_stats))
      return plan;  // some kilobytes: returned in place, never copied
    repack(weight, s.param_strides.data());
    repack(bias, s.bias_strides.data());
    repack(mean, s.stat_strides.data());
    repack(rstd, s.stat_strides.data());
    plan = normkit::plan_forward(args(apart), spec, phase, keep_sum);
    return plan;
  }
  normkit::ForwardData data() const {
    normkit::ForwardData d;
    d.x = x.array.data, d.y = out.array.data, d.weight = weight.array.data, d.bias = bias.array.data;
    d.running_mean = running_mean.array.data, d.running_var = running_var.array.data;
    d.residual = residual.array.data, d.where = where.array.data, d.mean = mean.array.data, d.rstd = rstd.array.data;
    return d;
  }
  normkit::ForwardArgs args(bool y_is_apart = false) const {
    normkit::ForwardArgs a;
    a.x = x.array, a.y = out.array, a.weight = weight.array, a.bias = bias.array;
    a.running_mean = running_mean.array, a.running_var = running_var.array;
    a.residual = residual.array, a.where = where.array, a.mean = mean.array, a.rstd = rstd.array;
    a.y_dtype = out_dtype, a.y_is_apart = y_is_apart;
    return a;
  }
};

/// Runs what is planned, and makes the arrays that are still missing.
nb::object run_forward(const ForwardCall& call, normkit::ForwardJob& job, const Shapes& shapes, Dtype x_dtype,
                       normkit::ForwardData data) {
  const nb::object y =
      call.out.is_none() ? new_like_x(shapes.out_dtype, call.x, x_dtype, shapes) : nb::borrow(call.out);
  nb::object mean, rstd, sum;
  if (call.return_stats) {
    if (is_centered(call.kind)) mean = new_statistic(normkit::compute_dtype(x_dtype), shapes);
    rstd = new_statistic(normkit::compute_dtype(x_dtype), shapes);
  }
  if (shapes.wants_sum) sum = new_like_x(x_dtype, call.x, x_dtype, shapes);
  data.y = data_of(y), data.mean = data_of(mean), data.rstd = data_of(rstd), data.sum = data_of(sum);
  normkit::point(job, data);
  if (!shapes.empty) run_job(job);
  if (!call.return_stats && !call.return_residual) return y;
  const nb::object* const results[] = {&y, &mean, &rstd, &sum};
  const bool wanted[] = {true, mean.is_valid(), rstd.is_valid(), call.return_residual};
  nb::object tuple = nb::steal(PyTuple_New(wanted[0] + wanted[1] + wanted[2] + wanted[3]));
  if (!tuple.is_valid()) throw nb::python_error();
  Py_ssize_t at = 0;
  for (int k = 0; k < 4; ++k)
    if (wanted[k]) PyTuple_SetItem(tuple.ptr(), at++, Py_NewRef(results[k]->ptr()));
  return tuple;
}

/// A plan of forward that serves every call with the same key whose arrays may lie where they do.
struct ForwardRepeat {
  normkit::ForwardPlan plan;
  Dtype x_dtype;
  normkit::Placement placement;
};

/// `keep`, where given, is called with what a like call can take over.
template <class Keep> nb::object forward(const ForwardCall& call, Keep keep) {
  ForwardViews v;
  if (call.x.is_none() || !view(call.x, v.x) || !view(call.weight, v.weight) || !view(call.bias, v.bias) ||
      !view(call.running_mean, v.running_mean) || !view(call.running_var, v.running_var) || !view(call.out, v.out) ||
      !view(call.residual, v.residual) || !view(call.where, v.where) ||
      !(call.out_dtype.is_none() || PyUnicode_Check(call.out_dtype.ptr())))
    return nb::borrow(Py_NotImplemented);
  const Dtype x_dtype = v.x.array.dtype;
  v.spec = spec_of(call.kind, call.axes, v.x.array);
  v.spec.eps = eps_of(call.eps, call.kind, x_dtype), v.spec.use_input_stats = call.use_input_stats;
  if (call.momentum.is_none())
    throw Error(Error::Kind::value, "momentum is None, expected a number from 0 to 1: keep the count yourself");
  v.spec.momentum = number("momentum", call.momentum, "a number from 0 to 1");
  put_epilogue(v.spec, call.activation, call.weight_offset);
  if (call.return_residual && call.residual.is_none())
    throw Error(Error::Kind::value, "residual is None, expected an array like x: return_residual is True");
  v.out_dtype = dtype_named(call.out_dtype);
  normkit::ForwardPlan plan = v.planned(normkit::Phase::both, call.return_residual);
  if (!plan.shapes.fits) return nb::borrow(Py_NotImplemented);
  keep(plan, v);
  return run_forward(call, plan.job, plan.shapes, x_dtype, v.data());
}

nb::object forward_once(int kind, nb::handle axes, nb::handle x, nb::handle weight, nb::handle bias, nb::handle eps,
                        nb::handle running_mean, nb::handle running_var, bool use_input_stats, nb::handle momentum,
                        nb::handle out, nb::handle out_dtype, bool return_stats, nb::handle where, nb::handle residual,
                        bool return_residual, nb::handle activation, nb::handle weight_offset) {
  return forward({kind, axes, x, weight, bias, eps, running_mean, running_var, use_input_stats, momentum, out,
                  out_dtype, return_stats, where, residual, return_residual, activation, weight_offset},
                 [](const normkit::ForwardPlan&, const ForwardViews&) {});
}

// ---- forward, again ----------------------------------------------------------------------------------------------

/// The parameters of forward by the names that functional.py has for them: arrays, numbers, then what is told by identity.
enum Slot {
  kX,
  kWeight,
  kBias,
  kRunningMean,
  kRunningVar,
  kOut,
  kResidual,
  kWhere,
  kArrays,
  kEps = kArrays,
  kMomentum,
  kWeightOffset,
  kAxes,
  kGroups,
  kNumbers,
  kActivation = kNumbers,
  kOutDtype,
  kUseInputStats,
  kReturnStats,
  kReturnResidual,
  kCenter,
  kSlots
};

/// The short way of one function to forward().
class ForwardWay : public function::ShortWay {
 public:
  explicit ForwardWay(int kind) : kind_(kind) {}

  nb::object call(PyObject* const* values) override {
    for (const int flag : {kUseInputStats, kReturnStats, kReturnResidual, kCenter})
      if (!PyBool_Check(values[flag])) return nb::borrow(Py_NotImplemented);
    const auto at = [&](Slot slot) { return nb::handle(values[slot]); };
    const int kind = kind_ == kNormalize && values[kCenter] == Py_False ? kNormalizeRms : kind_;
    ForwardCall call{kind,
                     at(kAxes),
                     at(kX),
                     at(kWeight),
                     at(kBias),
                     at(kEps),
                     at(kRunningMean),
                     at(kRunningVar),
                     values[kUseInputStats] == Py_True,
                     at(kMomentum),
                     at(kOut),
                     at(kOutDtype),
                     values[kReturnStats] == Py_True,
                     at(kWhere),
                     at(kResidual),
                     values[kReturnResidual] == Py_True,
                     at(kActivation),
                     at(kWeightOffset)};
    recent::Key key;
    for (int slot = 0; slot < kArrays; ++slot)
      if (!key.add_array(values[slot])) return first_time(call, values, nullptr);
    for (int slot = kArrays; slot < kNumbers; ++slot) key.add_number(values[slot]);
    for (int slot = kNumbers; slot < kSlots; ++slot) key.add(values[slot]);
    if (const std::shared_ptr<const ForwardRepeat> repeat = recent_.find(key)) {
      normkit::ForwardData data;
      data.x = data_at(values[kX]), data.y = data_at(values[kOut]), data.weight = data_at(values[kWeight]);
      data.bias = data_at(values[kBias]), data.running_mean = data_at(values[kRunningMean]);
      data.running_var = data_at(values[kRunningVar]), data.residual = data_at(values[kResidual]);
      data.where = data_at(values[kWhere]);
      if (repeat->placement.allows(data)) {
        normkit::ForwardJob job = repeat->plan.job;  // its own: another call may come before this one has run
        return run_forward(call, job, repeat->plan.shapes, repeat->x_dtype, data);
      }
    }
    return first_time(call, values, &key);
  }

 private:
  static std::byte* data_at(nb::handle array) { return array.is_none() ? nullptr : data_of(array); }

  nb::object first_time(ForwardCall& call, PyObject* const* values, const recent::Key* key) {
    nb::object axes;
    if (kind_ == kGroup) axes = nb::make_tuple(call.axes, nb::handle(values[kGroups])), call.axes = axes;
    return forward(call, [&](const normkit::ForwardPlan& plan, const ForwardViews& v) {
      if (!key || plan.shapes.empty || v.weight.copy.is_valid() || v.bias.copy.is_valid()) return;
      std::vector<nb::object> held;
      for (int slot = 0; slot < kArrays; ++slot)
        if (values[slot] != Py_None) held.push_back(nb::borrow(arrays::descr_of(values[slot])));
      for (int slot = kArrays; slot < kSlots; ++slot) {
        if (!recent::immutable(values[slot])) return;
        held.push_back(nb::borrow(values[slot]));
      }
      recent_.keep(*key, std::move(held), {plan, v.x.array.dtype, normkit::Placement(v.args())});
    });
  }

  int kind_;
  recent::Recent<ForwardRepeat> recent_;
};

/// `python` with a short way to forward().
nb::object forward_function(nb::handle type, int kind, nb::handle python) {
  const nb::object zero = nb::float_(0.0);
  PyObject *const none = Py_None, *const yes = Py_True, *const no = Py_False;
  const function::Parameter parameters[] = {{"x", kX, nullptr},
                                            {"weight", kWeight, none},
                                            {"bias", kBias, none},
                                            {"running_mean", kRunningMean, none},
                                            {"running_var", kRunningVar, none},
                                            {"out", kOut, none},
                                            {"residual", kResidual, none},
                                            {"where", kWhere, none},
                                            {"eps", kEps, nullptr},
                                            {"momentum", kMomentum, zero.ptr()},
                                            {"weight_offset", kWeightOffset, zero.ptr()},
                                            {"axis", kAxes, nullptr},
                                            {"channel_axis", kAxes, nullptr},
                                            {"num_groups", kGroups, none},
                                            {"activation", kActivation, none},
                                            {"out_dtype", kOutDtype, none},
                                            {"use_input_stats", kUseInputStats, yes},
                                            {"training", kUseInputStats, yes},
                                            {"return_stats", kReturnStats, no},
                                            {"return_residual", kReturnResidual, no},
                                            {"center", kCenter, yes}};
  return function::with_short_way(type, python, parameters, std::make_unique<ForwardWay>(kind));
}

// ---- the phases of forward ---------------------------------------------------------------------------------------

nb::object moments(int kind, nb::handle axes, nb::handle x, nb::handle where) {
  ForwardViews v;
  if (x.is_none() || !view(x, v.x) || !view(where, v.where)) return nb::borrow(Py_NotImplemented);
  v.spec = spec_of(kind, axes, v.x.array);
  normkit::ForwardPlan plan = v.planned(normkit::Phase::reduce);
  if (!plan.shapes.fits) return nb::borrow(Py_NotImplemented);
  const nb::object result = new_triples(plan.shapes);
  normkit::ForwardData data = v.data();
  data.moments = data_of(result);
  normkit::point(plan.job, data);
  if (!plan.shapes.empty) run_job(plan.job);
  return result;
}

nb::object apply(int kind, nb::handle axes, nb::handle x, nb::handle mean, nb::handle rstd, nb::handle weight,
                 nb::handle bias, nb::handle out, nb::handle out_dtype, nb::handle activation,
                 nb::handle weight_offset) {
  ForwardViews v;
  if (x.is_none() || !view(x, v.x) || !view(mean, v.mean) || !view(rstd, v.rstd) || !view(weight, v.weight) ||
      !view(bias, v.bias) || !view(out, v.out) || !(out_dtype.is_none() || PyUnicode_Check(out_dtype.ptr())))
    return nb::borrow(Py_NotImplemented);
  v.spec = spec_of(kind, axes, v.x.array);
  v.spec.use_input_stats = false;
  put_epilogue(v.spec, activation, weight_offset);
  v.out_dtype = dtype_named(out_dtype);
  normkit::ForwardPlan plan = v.planned(normkit::Phase::apply);
  if (!plan.shapes.fits) return nb::borrow(Py_NotImplemented);
  nb::object y = out.is_none() ? new_like_x(plan.shapes.out_dtype, x, v.x.array.dtype, plan.shapes) : nb::borrow(out);
  normkit::ForwardData data = v.data();
  data.y = data_of(y);
  normkit::point(plan.job, data);
  if (!plan.shapes.empty) run_job(plan.job);
  return y;
}

// ---- backward ----------------------------------------------------------------------------------------------------

normkit::BackwardNeed need_of(nb::handle need) {
  normkit::BackwardNeed n{false, false, false};
  for (nb::handle item : nb::borrow<nb::iterable>(need)) {
    const std::string name = PyUnicode_Check(item.ptr()) ? nb::str(item).c_str() : "";
    bool* known = name == "dx" ? &n.dx : name == "dweight" ? &n.dweight : name == "dbias" ? &n.dbias : nullptr;
    if (!known)
      throw Error(Error::Kind::value, std::string("need has ") + nb::repr(item).c_str() +
                                          ", expected names from ('dx', 'dweight', 'dbias')");
    *known = true;
  }
  return n;
}

/// The arrays of a call of backward, whichever phase it is, and its plan.
struct BackwardCall {
  View dy, x, mean, rstd, weight, bias, where, dresidual, out, sums, count;
  Spec spec;
  normkit::BackwardNeed need;
  normkit::Phase phase = normkit::Phase::both;
  normkit::BackwardArgs args;

  /// Where `out` interleaves with an input, NumPy is asked.
  void find_apart() {
    const bool near_x = out.array.present && normkit::may_overlap(out.array, x.array);
    const bool near_dy = out.array.present && normkit::may_overlap(out.array, dy.array);
    args.dx_is_apart = (near_x || near_dy) && (!near_x || known_apart(out, x)) && (!near_dy || known_apart(out, dy));
  }
  void put_args() {
    args.dy = dy.array, args.x = x.array, args.rstd = rstd.array, args.weight = weight.array, args.bias = bias.array;
    args.mean = spec.centered ? mean.array : Array{};
    args.where = where.array, args.dresidual = dresidual.array, args.dx = out.array;
    args.sums = sums.array, args.count = count.array;
  }
  normkit::BackwardPlan planned() {
    put_args();
    normkit::BackwardPlan plan = normkit::plan_backward(args, spec, need, phase);
    const Shapes& s = plan.shapes;
    if (!s.fits || (phase != normkit::Phase::apply && !s.repack_params && !s.repack_stats)) return plan;
    repack(weight, s.param_strides.data());
    repack(bias, s.bias_strides.data());
    if (spec.centered) repack(mean, s.stat_strides.data());
    repack(rstd, s.stat_strides.data());
    repack(sums, Triples(s).strides.data());
    repack(count, s.stat_strides.data());
    put_args();
    plan = normkit::plan_backward(args, spec, need, phase);
    return plan;
  }
  nb::object dx(normkit::BackwardPlan& plan) {
    nb::object result =
        out.array.present ? nb::borrow(out.object) : new_like_x(x.array.dtype, x.object, x.array.dtype, plan.shapes);
    plan.job.task.dx.data = data_of(result);
    return result;
  }
};

nb::object backward(int kind, nb::handle axes, nb::handle dy, nb::handle x, nb::handle mean, nb::handle rstd,
                    nb::handle weight, bool use_input_stats, nb::handle need, nb::handle out, nb::handle where,
                    nb::handle bias, nb::handle activation, nb::handle weight_offset, nb::handle dresidual) {
  BackwardCall call;
  if (dy.is_none() || x.is_none() || !view(dy, call.dy) || !view(x, call.x) || !view(mean, call.mean) ||
      !view(rstd, call.rstd) || !view(weight, call.weight) || !view(out, call.out) || !view(where, call.where) ||
      !view(bias, call.bias) || !view(dresidual, call.dresidual))
    return nb::borrow(Py_NotImplemented);
  call.spec = spec_of(kind, axes, call.x.array);
  call.spec.use_input_stats = use_input_stats;
  put_epilogue(call.spec, activation, weight_offset);
  call.need = need_of(need);
  call.find_apart();
  normkit::BackwardPlan plan = call.planned();
  if (!plan.shapes.fits) return nb::borrow(Py_NotImplemented);
  const Shapes& shapes = plan.shapes;
  nb::object gradients[2] = {nb::none(), nb::none()};
  const nb::object dx = call.need.dx ? call.dx(plan) : nb::none();
  if (!call.need.dx) plan.job.task.dx.data = nullptr;
  const View& like = call.weight;
  const Dtype dtype = like.array.present ? like.array.dtype : normkit::compute_dtype(call.x.array.dtype);
  normkit::ParamGradient* jobs[2] = {&plan.job.dweight, &plan.job.dbias};
  for (int k = 0; k < 2; ++k) {
    if (!(k == 0 ? call.need.dweight : call.need.dbias)) continue;
    gradients[k] =
        filled(allocate(dtype, like.object, shapes.param_ndim, shapes.param_shape.data(), shapes.param_strides.data()),
               shapes);
    *jobs[k] = {data_of(gradients[k]), dtype};
  }
  if (!plan.shapes.empty) run_job(plan.job);
  return nb::make_tuple(dx, gradients[0], gradients[1]);
}

nb::object backward_sums(int kind, nb::handle axes, nb::handle dy, nb::handle x, nb::handle mean, nb::handle rstd,
                         nb::handle weight, nb::handle where, nb::handle bias, nb::handle activation,
                         nb::handle weight_offset) {
  BackwardCall call;
  if (dy.is_none() || x.is_none() || !view(dy, call.dy) || !view(x, call.x) || !view(mean, call.mean) ||
      !view(rstd, call.rstd) || !view(weight, call.weight) || !view(where, call.where) || !view(bias, call.bias))
    return nb::borrow(Py_NotImplemented);
  call.spec = spec_of(kind, axes, call.x.array);
  put_epilogue(call.spec, activation, weight_offset);
  call.need = {false, false, false}, call.phase = normkit::Phase::reduce;
  normkit::BackwardPlan plan = call.planned();
  if (!plan.shapes.fits) return nb::borrow(Py_NotImplemented);
  nb::object sums = new_triples(plan.shapes);
  plan.job.task.sums = reinterpret_cast<double*>(data_of(sums));
  if (!plan.shapes.empty) run_job(plan.job);
  return sums;
}

nb::object apply_backward(int kind, nb::handle axes, nb::handle dy, nb::handle x, nb::handle mean, nb::handle rstd,
                          nb::handle sums, nb::handle count, nb::handle weight, nb::handle out, nb::handle where,
                          nb::handle bias, nb::handle activation, nb::handle weight_offset, nb::handle dresidual) {
  BackwardCall call;
  if (dy.is_none() || x.is_none() || !view(dy, call.dy) || !view(x, call.x) || !view(mean, call.mean) ||
      !view(rstd, call.rstd) || !view(weight, call.weight) || !view(out, call.out) || !view(where, call.where) ||
      !view(bias, call.bias) || !view(dresidual, call.dresidual) || !view(sums, call.sums) || !view(count, call.count))
    return nb::borrow(Py_NotImplemented);
  arrays::widen(call.count);
  call.spec = spec_of(kind, axes, call.x.array);
  put_epilogue(call.spec, activation, weight_offset);
  call.need = {true, false, false}, call.phase = normkit::Phase::apply;
  call.find_apart();
  normkit::BackwardPlan plan = call.planned();
  if (!plan.shapes.fits) return nb::borrow(Py_NotImplemented);
  const nb::object dx = call.dx(plan);
  if (!plan.shapes.empty) run_job(plan.job);
  return dx;
}

/// Merges two arrays of triples, dense and of one shape, into a new one.
nb::object merge_moments(nb::handle a, nb::handle b) {
  const nb::object result = nb::handle(a).attr("copy")();
  const npy_intp triples = PyArray_SIZE(as_array(a)) / 3;
  normkit::merge_moments(static_cast<double*>(PyArray_DATA(as_array(result))),
                         static_cast<const double*>(PyArray_DATA(as_array(b))), triples);
  return result;
}

/// 1 / sqrt(var + eps) of triples, or sqrt(var + eps).
nb::object deviation_of_moments(nb::handle triples, nb::handle eps, bool inverse) {
  const double value = number("eps", eps, "a number that is at least 0");
  if (!(value >= 0) || std::isinf(value))
    throw Error(Error::Kind::value,
                std::string("eps is ") + nb::repr(eps).c_str() + ", expected a finite number that is at least 0");
  PyArrayObject* from = as_array(triples);
  PyObject* result = PyArray_SimpleNew(PyArray_NDIM(from) - 1, PyArray_DIMS(from), NPY_DOUBLE);
  if (!result) throw nb::python_error();
  const double* m = static_cast<const double*>(PyArray_DATA(from));
  double* deviation = static_cast<double*>(PyArray_DATA(as_array(result)));
  for (npy_intp k = 0; k < PyArray_SIZE(from) / 3; ++k, m += 3)
    deviation[k] = inverse ? normkit::rstd_of(normkit::Moments{m[0], m[1], m[2]}, value)
                           : std::sqrt(m[1] / (m[2] == 0 ? 1 : m[2]) + value);
  return nb::steal(result);
}

// ---- DLPack ------------------------------------------------------------------------------------------------------

/// The layout that DLPack 1.x gives to what a capsule holds, under either name.
struct Versioned {
  std::uint32_t major, minor;
  void* manager;
  void (*deleter)(Versioned*);
  std::uint64_t flags;
  nb::dlpack::dltensor tensor;
};

/// A CPU tensor of a DLPack capsule as a NumPy array that keeps the capsule alive.
nb::object from_capsule(const char* name, nb::handle capsule) {
  const bool versioned = PyCapsule_IsValid(capsule.ptr(), "dltensor_versioned") != 0;
  void* held = PyCapsule_GetPointer(capsule.ptr(), versioned ? "dltensor_versioned" : "dltensor");
  if (!held) throw nb::python_error();
  if (versioned && static_cast<Versioned*>(held)->major > 1)
    throw Error(Error::Kind::type, std::string(name) + " speaks DLPack " +
                                       std::to_string(static_cast<Versioned*>(held)->major) + ", expected DLPack 1");
  const nb::dlpack::dltensor& t =
      versioned ? static_cast<Versioned*>(held)->tensor : *static_cast<nb::dlpack::dltensor*>(held);
  const int bytes = t.dtype.bits / 8;
  const bool bfloat = t.dtype.code == 4 && t.dtype.bits == 16;
  static const char* const kinds[] = {"i", "u", "f", "", "", "c", "b"};  // by DLPack type code
  const bool known = t.dtype.code < 7 && *kinds[t.dtype.code] && bytes * 8 == t.dtype.bits;
  if (t.dtype.lanes != 1 || (!bfloat && !known))
    throw Error(Error::Kind::type, std::string(name) + " has a DLPack type with code " + std::to_string(t.dtype.code) +
                                       " and " + std::to_string(t.dtype.bits) +
                                       " bits, expected float32, float64, float16 or bfloat16");
  const nb::object numpy = nb::module_::import_("numpy");
  nb::object dtype;
  if (bfloat) {
    nb::list fields;
    fields.append(nb::make_tuple("bfloat16", "<u2"));
    dtype = numpy.attr("dtype")(fields);
  } else {
    dtype = numpy.attr("dtype")(kinds[t.dtype.code] + std::to_string(bytes));
  }
  npy_intp dims[NPY_MAXDIMS], strides[NPY_MAXDIMS];
  npy_intp dense = bytes;
  for (int axis = t.ndim - 1; axis >= 0; --axis) {
    dims[axis] = t.shape[axis];
    strides[axis] = t.strides ? t.strides[axis] * bytes : dense;
    dense *= dims[axis];
  }
  PyArray_Descr* descr = reinterpret_cast<PyArray_Descr*>(dtype.release().ptr());
  const bool writable = !versioned || (static_cast<Versioned*>(held)->flags & 1) == 0;
  PyObject* array =
      PyArray_NewFromDescr(&PyArray_Type, descr, t.ndim, dims, strides, static_cast<char*>(t.data) + t.byte_offset,
                           writable ? NPY_ARRAY_WRITEABLE : 0, nullptr);
  if (!array) throw nb::python_error();
  nb::object result = nb::steal(array);
  if (PyArray_SetBaseObject(as_array(result), nb::borrow(capsule).release().ptr()) < 0) throw nb::python_error();
  return result;
}

/// A NumPy array as something that other libraries import, whatever its dtype.
nb::object to_dlpack(nb::handle array) {
  View v;
  view(array, v);
  std::size_t shape[NPY_MAXDIMS];
  std::int64_t strides[NPY_MAXDIMS];
  for (int axis = 0; axis < v.array.ndim(); ++axis) {
    shape[axis] = static_cast<std::size_t>(v.array.shape[axis]);
    strides[axis] = v.array.stride(axis) / normkit::size_of(v.array.dtype);
  }
  const bool bfloat = v.array.dtype == Dtype::bfloat16;
  const nb::dlpack::dtype dtype{static_cast<std::uint8_t>(bfloat ? 4 : 2),
                                static_cast<std::uint8_t>(8 * normkit::size_of(v.array.dtype)), 1};
  return nb::cast(nb::ndarray<nb::array_api>(v.array.data, static_cast<std::size_t>(v.array.ndim()), shape,
                                             nb::borrow(array), strides, dtype, nb::device::cpu::value));
}

// ---- for tests ---------------------------------------------------------------------------------------------------

nb::object geometry(const std::vector<std::int64_t>& shape, const std::vector<std::int64_t>& strides,
                    const std::vector<std::int64_t>& reduce_axes, const std::vector<std::int64_t>& param_axes) {
  const auto mask = [](const std::vector<std::int64_t>& axes) {
    normkit::AxisMask bits = 0;
    for (const std::int64_t axis : axes) bits |= normkit::axis_bit(static_cast<int>(axis));
    return bits;
  };
  const std::span<const std::int64_t> operands[] = {strides};
  const auto layout = normkit::canonicalise(shape, mask(reduce_axes), mask(param_axes), operands);
  if (!layout) return nb::none();
  const normkit::Geometry& g = layout->geometry;
  nb::dict d;
  d["outer"] = g.outer, d["steps"] = g.steps, d["lanes"] = g.lanes, d["run"] = g.run;
  d["param_outer"] = g.params.outer, d["param_stride"] = g.params.stride, d["param_count"] = g.params.count;
  d["outer_stride"] = layout->strides[0].outer, d["step_stride"] = layout->strides[0].step;
  d["lane_stride"] = layout->strides[0].lane;
  return d;
}

}  // namespace

NB_MODULE(_core, m) {
  if (_import_array() < 0) throw nb::python_error();
  m.doc() = "The compiled half of normkit. Private: call the functions of normkit itself.";
  nb::register_exception_translator([](const std::exception_ptr& p, void*) {
    try {
      std::rethrow_exception(p);
    } catch (const Error&) {
      function::set_error();
    }
  }, nullptr);
  m.attr("version") = NORMKIT_VERSION;
  for (int kind = kNormalize; kind <= kLayerRms; ++kind) m.attr(kKindNames[kind]) = kind;
  m.def("forward", &forward_once, "kind"_a, "axes"_a.none(), "x"_a.none(), "weight"_a.none(), "bias"_a.none(),
        "eps"_a.none(), "running_mean"_a.none(), "running_var"_a.none(), "use_input_stats"_a, "momentum"_a.none(),
        "out"_a.none(), "out_dtype"_a.none(), "return_stats"_a, "where"_a.none(), "residual"_a.none(),
        "return_residual"_a, "activation"_a.none(), "weight_offset"_a.none());
  m.def("forward_function", [type = function::new_type()](int kind, nb::handle python) {
    return forward_function(type, kind, python);
  }, "kind"_a, "function"_a, nb::sig("def forward_function(kind: int, function: typing.Any) -> typing.Any"));
  m.def("moments", &moments, "kind"_a, "axes"_a.none(), "x"_a.none(), "where"_a.none());
  m.def("apply", &apply, "kind"_a, "axes"_a.none(), "x"_a.none(), "mean"_a.none(), "rstd"_a.none(), "weight"_a.none(),
        "bias"_a.none(), "out"_a.none(), "out_dtype"_a.none(), "activation"_a.none(), "weight_offset"_a.none());
  m.def("backward", &backward, "kind"_a, "axes"_a.none(), "dy"_a.none(), "x"_a.none(), "mean"_a.none(), "rstd"_a.none(),
        "weight"_a.none(), "use_input_stats"_a, "need"_a.none(), "out"_a.none(), "where"_a.none(), "bias"_a.none(),
        "activation"_a.none(), "weight_offset"_a.none(), "dresidual"_a.none());
  m.def("backward_sums", &backward_sums, "kind"_a, "axes"_a.none(), "dy"_a.none(), "x"_a.none(), "mean"_a.none(),
        "rstd"_a.none(), "weight"_a.none(), "where"_a.none(), "bias"_a.none(), "activation"_a.none(),
        "weight_offset"_a.none());
  m.def("apply_backward", &apply_backward, "kind"_a, "axes"_a.none(), "dy"_a.none(), "x"_a.none(), "mean"_a.none(),
        "rstd"_a.none(), "sums"_a.none(), "count"_a.none(), "weight"_a.none(), "out"_a.none(), "where"_a.none(),
        "bias"_a.none(), "activation"_a.none(), "weight_offset"_a.none(), "dresidual"_a.none());
  m.def("merge_moments", &merge_moments, "a"_a, "b"_a);
  m.def("deviation_of_moments", &deviation_of_moments, "triples"_a, "eps"_a.none(), "inverse"_a);
  m.def("from_capsule", &from_capsule, "name"_a, "capsule"_a);
  m.def("to_dlpack", &to_dlpack, "array"_a);
  m.def("geometry", &geometry, "shape"_a, "strides"_a, "reduce_axes"_a, "param_axes"_a);
  m.def("isa", &normkit::isa);
  m.def("isas", &normkit::isas);
  m.def("use_isa", &normkit::use_isa, "name"_a);
  m.def("num_threads", &normkit::num_threads);
  m.def("cache_limit", &output_cache::limit);
  m.def("set_cache_limit", &output_cache::set_limit, "bytes"_a);
  m.def("cache_held", &output_cache::held);
  m.def("set_num_threads", &normkit::set_num_threads, "n"_a);
}
