// Views of NumPy arrays in, one planned call, NumPy arrays out. Judgement is plan.cpp's; what does not fit the fast path
// (other libraries, arrays to be packed) is answered with NotImplemented and handled by _arrays.py.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#define NPY_NO_DEPRECATED_API NPY_2_0_API_VERSION
#define NPY_TARGET_VERSION NPY_2_0_API_VERSION
#include <numpy/arrayobject.h>

#include <cmath>
#include <limits>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "normkit/formula.hpp"
#include "output_cache.hpp"
#include "plan.hpp"

namespace nb = nanobind;
using namespace nb::literals;
using normkit::Array;
using normkit::Dtype;
using normkit::Error;
using normkit::Shapes;
using normkit::Spec;

namespace {

// ---- views -------------------------------------------------------------------------------------------------------

PyArrayObject* as_array(nb::handle h) { return reinterpret_cast<PyArrayObject*>(h.ptr()); }

Dtype dtype_of(PyArray_Descr* descr, std::string& name) {
  switch (descr->type_num) {
    case NPY_FLOAT: return Dtype::float32;
    case NPY_DOUBLE: return Dtype::float64;
    case NPY_HALF: return Dtype::float16;
    case NPY_UBYTE: return Dtype::uint8;
    case NPY_BYTE: return Dtype::int8;
    case NPY_USHORT: return Dtype::uint16;
    case NPY_SHORT: return Dtype::int16;
    case NPY_BOOL: return Dtype::boolean;
    default: break;
  }
  static int bfloat16 = -1;  // ml_dtypes registers its type anew in each process
  if (descr->type_num == bfloat16) return Dtype::bfloat16;
  name = nb::str(nb::handle(reinterpret_cast<PyObject*>(descr))).c_str();
  // The second is from_capsule()'s: two bytes that NumPy moves and never looks into.
  if (name == "bfloat16") bfloat16 = descr->type_num;
  return name == "bfloat16" || name == "[('bfloat16', '<u2')]" ? Dtype::bfloat16 : Dtype::other;
}

/// A view and what it keeps alive.
struct View {
  Array array;
  std::string name;
};

const std::int64_t* extents(const npy_intp* p) { return reinterpret_cast<const std::int64_t*>(p); }

/// True where `h` is None or exactly a NumPy array; subclasses and other libraries take the slow path.
bool view(nb::handle h, View& v) {
  if (h.is_none()) return true;
  if (!PyArray_CheckExact(h.ptr())) return false;
  PyArrayObject* a = as_array(h);
  const std::size_t ndim = static_cast<std::size_t>(PyArray_NDIM(a));
  v.array = {
      static_cast<std::byte*>(PyArray_DATA(a)), dtype_of(PyArray_DESCR(a), v.name),  true, !PyArray_ISWRITEABLE(a),
      {extents(PyArray_DIMS(a)), ndim},         {extents(PyArray_STRIDES(a)), ndim}, {}};
  if (!PyArray_ISNOTSWAPPED(a)) {
    v.array.dtype = Dtype::other;
    v.name = nb::str(nb::handle(reinterpret_cast<PyObject*>(PyArray_DESCR(a)))).c_str();
  }
  v.array.other_dtype = v.name;
  return true;
}

int type_number(Dtype dtype) {
  switch (dtype) {
    case Dtype::float64: return NPY_DOUBLE;
    case Dtype::float16: return NPY_HALF;
    default: return NPY_FLOAT;
  }
}

/// While it lives, NumPy takes the memory of large arrays from the cache of outputs.
class CachedMemory {
 public:
  explicit CachedMemory(npy_intp bytes) {
    if (static_cast<std::size_t>(bytes) < output_cache::kLeastBytes || output_cache::limit() == 0) return;
    static PyObject* const capsule = PyCapsule_New(output_cache::handler(), "mem_handler", nullptr);
    before_ = PyDataMem_SetHandler(capsule);
    if (!before_) throw nb::python_error();
  }
  CachedMemory(const CachedMemory&) = delete;
  CachedMemory& operator=(const CachedMemory&) = delete;
  ~CachedMemory() {
    if (before_) Py_XDECREF(PyDataMem_SetHandler(before_)), Py_DECREF(before_);
  }

 private:
  PyObject* before_ = nullptr;
};

/// A new array of the type of `like` where the dtypes agree, dense with these strides.
nb::object allocate(Dtype dtype, const View& like, nb::handle like_object, int ndim, const std::int64_t* shape,
                    const std::int64_t* strides) {
  PyArray_Descr* descr;
  if (like.array.present && like.array.dtype == dtype) {
    descr = PyArray_DESCR(as_array(like_object));
    Py_INCREF(reinterpret_cast<PyObject*>(descr));
  } else {
    descr = PyArray_DescrFromType(type_number(dtype));
  }
  npy_intp dims[NPY_MAXDIMS], bytes[NPY_MAXDIMS];
  bool c_order = true;
  npy_intp dense = normkit::size_of(dtype);
  for (int axis = ndim - 1; axis >= 0; --axis) {
    dims[axis] = static_cast<npy_intp>(shape[axis]);
    bytes[axis] = static_cast<npy_intp>(strides[axis]) * normkit::size_of(dtype);
    if (dims[axis] != 1) c_order = c_order && bytes[axis] == dense;
    dense *= dims[axis];
  }
  PyObject* out = nullptr;
  {
    const CachedMemory cached(dense);
    out = PyArray_NewFromDescr(&PyArray_Type, descr, ndim, dims, c_order || dense == 0 ? nullptr : bytes, nullptr, 0,
                               nullptr);
  }
  if (!out) throw nb::python_error();
  return nb::steal(out);
}

/// A copy of `source` with the strides that the plan asks for.
void repack(nb::object& owner, nb::handle source, View& v, int ndim, const std::int64_t* strides) {
  if (!v.array.present) return;
  owner = allocate(v.array.dtype, v, source, ndim, v.array.shape.data(), strides);
  if (PyArray_CopyInto(as_array(owner), as_array(source)) < 0) throw nb::python_error();
  View fresh;
  view(owner, fresh);
  v = std::move(fresh);
  v.array.other_dtype = v.name;
}

/// An array of any real dtype in float64; others stay, to be refused.
nb::object as_doubles(nb::handle source, View& v) {
  if (!v.array.present || v.array.dtype == Dtype::float64) return nb::borrow(source);
  const int type = PyArray_TYPE(as_array(source));
  if (!PyTypeNum_ISINTEGER(type) && !PyTypeNum_ISFLOAT(type)) return nb::borrow(source);
  PyObject* cast = PyArray_CastToType(as_array(source), PyArray_DescrFromType(NPY_DOUBLE), 0);
  if (!cast) throw nb::python_error();
  View fresh;
  view(cast, fresh);
  v = std::move(fresh);
  v.array.other_dtype = v.name;
  return nb::steal(cast);
}

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

Spec spec_of(int kind, nb::handle axes, const Array& x) {
  const int ndim = x.ndim();
  switch (kind) {
    case kInstance: return normkit::instance_spec(ndim, integer("channel_axis", axes));
    case kBatch: return normkit::batch_spec(ndim, integer("channel_axis", axes));
    case kGroup: return normkit::group_spec(x.shape, integer("num_groups", axes[1]), integer("channel_axis", axes[0]));
    case kLayer:
    case kLayerRms: return normkit::layer_spec(ndim, integers("axis", axes), kind == kLayer);
    default: return normkit::normalize_spec(ndim, integers("axis", axes), kind == kNormalize);
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

/// Where memory of `out` and of an input interleaves, NumPy can tell whether they share an element.
bool known_apart(nb::handle out, const View& out_view, nb::handle other, const View& other_view) {
  if (!out_view.array.present || out_view.array.dtype == Dtype::other || other_view.array.dtype == Dtype::other)
    return false;
  if (!normkit::may_overlap(out_view.array, other_view.array)) return false;
  return !nb::cast<bool>(nb::module_::import_("normkit._arrays").attr("share_memory")(out, other));
}

/// True where all of these are None or plain NumPy arrays; `v` gets their views.
template <std::size_t kArrays> bool view_all(const nb::handle (&h)[kArrays], View (&v)[kArrays]) {
  for (std::size_t k = 0; k < kArrays; ++k)
    if (!view(h[k], v[k])) return false;
  return true;
}

std::byte* data_of(nb::handle array) {
  return array.is_valid() ? static_cast<std::byte*>(PyArray_DATA(as_array(array))) : nullptr;
}

/// A new array, filled with zeros where x is empty and no kernel will.
nb::object filled(nb::object array, const Shapes& shapes) {
  if (shapes.empty) array.attr("fill")(0);
  return array;
}

nb::object new_statistic(Dtype dtype, const Shapes& shapes) {
  return filled(allocate(dtype, View{}, {}, shapes.stat_ndim, shapes.stat_shape.data(), shapes.stat_strides.data()),
                shapes);
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
  return filled(allocate(Dtype::float64, View{}, {}, t.ndim, t.shape.data(), t.strides.data()), shapes);
}

nb::object new_like_x(Dtype dtype, const View& xv, nb::handle x, const Shapes& shapes) {
  return allocate(dtype, xv, x, xv.array.ndim(), xv.array.shape.data(), shapes.out_strides.data());
}

// ---- forward -----------------------------------------------------------------------------------------------------

/// The arrays of a call of forward and its plan.
struct ForwardCall {
  View v[8];  // x, weight, bias, running_mean, running_var, out, residual, where
  View sum_view;
  Spec spec;
  normkit::ForwardArgs args;
  nb::object owners[2], sum;

  const View& x() const { return v[0]; }
  void put_args() {
    args.x = v[0].array, args.weight = v[1].array, args.bias = v[2].array, args.running_mean = v[3].array;
    args.running_var = v[4].array, args.y = v[5].array, args.residual = v[6].array, args.where = v[7].array;
    args.sum = sum_view.array;
  }
  normkit::ForwardPlan planned(nb::handle x_, nb::handle weight, nb::handle bias, bool return_residual) {
    put_args();
    normkit::ForwardPlan plan = normkit::plan_forward(args, spec);  // some kilobytes: returned in place, never copied
    const Shapes& s = plan.shapes;
    const bool sums = return_residual || s.wants_sum;
    if (!s.fits || (!sums && !s.repack_params)) return plan;
    if (sums) {
      sum = new_like_x(x().array.dtype, x(), x_, s);
      view(sum, sum_view);
    }
    if (s.repack_params) {
      repack(owners[0], weight, v[1], v[1].array.ndim(), s.param_strides.data());
      repack(owners[1], bias, v[2], v[2].array.ndim(), s.bias_strides.data());
    }
    put_args();
    plan = normkit::plan_forward(args, spec);
    return plan;
  }
};

nb::object forward(int kind, nb::handle axes, nb::handle x, nb::handle weight, nb::handle bias, nb::handle eps,
                   nb::handle running_mean, nb::handle running_var, bool use_input_stats, nb::handle momentum,
                   nb::handle out, nb::handle out_dtype, bool return_stats, nb::handle where, nb::handle residual,
                   bool return_residual, nb::handle activation, nb::handle weight_offset) {
  ForwardCall call;
  if (x.is_none() || !view_all({x, weight, bias, running_mean, running_var, out, residual, where}, call.v) ||
      !(out_dtype.is_none() || PyUnicode_Check(out_dtype.ptr())))
    return nb::borrow(Py_NotImplemented);
  Spec& spec = call.spec;
  const Dtype dtype = call.x().array.dtype;
  spec = spec_of(kind, axes, call.x().array);
  spec.eps = eps_of(eps, kind, dtype), spec.use_input_stats = use_input_stats;
  if (momentum.is_none())
    throw Error(Error::Kind::value, "momentum is None, expected a number from 0 to 1: keep the count yourself");
  spec.momentum = number("momentum", momentum, "a number from 0 to 1");
  put_epilogue(spec, activation, weight_offset);
  if (return_residual && residual.is_none())
    throw Error(Error::Kind::value, "residual is None, expected an array like x: return_residual is True");
  call.args.y_dtype = dtype_named(out_dtype), call.args.y_is_apart = known_apart(out, call.v[5], x, call.x());
  normkit::ForwardPlan plan = call.planned(x, weight, bias, return_residual);
  if (!plan.shapes.fits) return nb::borrow(Py_NotImplemented);

  const Shapes& shapes = plan.shapes;
  normkit::Task& task = plan.job.task;
  const nb::object y = out.is_none() ? new_like_x(shapes.out_dtype, call.x(), x, shapes) : nb::borrow(out);
  task.y.data = data_of(y);
  if (!residual.is_none() && !call.sum.is_valid()) task.x.data = task.y.data;
  nb::object mean, rstd;
  if (return_stats) {
    if (spec.centered) mean = new_statistic(normkit::compute_dtype(dtype), shapes);
    rstd = new_statistic(normkit::compute_dtype(dtype), shapes);
    task.mean = data_of(mean), task.rstd = data_of(rstd);
  }
  if (!shapes.empty) run_job(plan.job);
  if (!return_stats && !return_residual) return y;
  nb::list results;
  results.append(y);
  for (const nb::object& extra : {mean, rstd})
    if (extra.is_valid()) results.append(extra);
  if (return_residual) results.append(call.sum);
  return nb::tuple(results);
}

nb::object moments(int kind, nb::handle axes, nb::handle x, nb::handle where) {
  View v[2];
  auto& [xv, kv] = v;
  if (x.is_none() || !view_all({x, where}, v)) return nb::borrow(Py_NotImplemented);
  const Spec spec = spec_of(kind, axes, xv.array);
  normkit::ForwardArgs args;
  args.x = xv.array, args.where = kv.array;
  normkit::ForwardPlan plan = normkit::plan_forward(args, spec, normkit::Phase::reduce);
  if (!plan.shapes.fits) return nb::borrow(Py_NotImplemented);
  nb::object result = new_triples(plan.shapes);
  plan.job.task.moments = reinterpret_cast<double*>(data_of(result));
  if (!plan.shapes.empty) run_job(plan.job);
  return result;
}

nb::object apply(int kind, nb::handle axes, nb::handle x, nb::handle mean, nb::handle rstd, nb::handle weight,
                 nb::handle bias, nb::handle out, nb::handle out_dtype, nb::handle activation,
                 nb::handle weight_offset) {
  View v[6];
  auto& [xv, mv, rv, wv, bv, yv] = v;
  if (x.is_none() || !view_all({x, mean, rstd, weight, bias, out}, v) ||
      !(out_dtype.is_none() || PyUnicode_Check(out_dtype.ptr())))
    return nb::borrow(Py_NotImplemented);
  Spec spec = spec_of(kind, axes, xv.array);
  spec.use_input_stats = false;
  put_epilogue(spec, activation, weight_offset);
  normkit::ForwardArgs args;
  args.x = xv.array, args.y = yv.array, args.weight = wv.array, args.bias = bv.array;
  args.mean = mv.array, args.rstd = rv.array;
  args.y_dtype = dtype_named(out_dtype), args.y_is_apart = known_apart(out, yv, x, xv);
  normkit::ForwardPlan plan = normkit::plan_forward(args, spec, normkit::Phase::apply);
  if (!plan.shapes.fits) return nb::borrow(Py_NotImplemented);
  nb::object owners[4];
  if (plan.shapes.repack_params || plan.shapes.repack_stats) {
    const Shapes& s = plan.shapes;
    repack(owners[0], weight, wv, wv.array.ndim(), s.param_strides.data());
    repack(owners[1], bias, bv, bv.array.ndim(), s.bias_strides.data());
    repack(owners[2], mean, mv, mv.array.ndim(), s.stat_strides.data());
    repack(owners[3], rstd, rv, rv.array.ndim(), s.stat_strides.data());
    args.weight = wv.array, args.bias = bv.array, args.mean = mv.array, args.rstd = rv.array;
    plan = normkit::plan_forward(args, spec, normkit::Phase::apply);
  }
  nb::object y = out.is_none() ? new_like_x(plan.shapes.out_dtype, xv, x, plan.shapes) : nb::borrow(out);
  plan.job.task.y.data = data_of(y);
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
  nb::object owners[6];

  /// Where `out` interleaves with an input, NumPy is asked.
  void find_apart(nb::handle out_array, nb::handle x_array, nb::handle dy_array) {
    const bool near_x = out.array.present && normkit::may_overlap(out.array, x.array);
    const bool near_dy = out.array.present && normkit::may_overlap(out.array, dy.array);
    args.dx_is_apart = (near_x || near_dy) && (!near_x || known_apart(out_array, out, x_array, x)) &&
                       (!near_dy || known_apart(out_array, out, dy_array, dy));
  }
  void put_args() {
    args.dy = dy.array, args.x = x.array, args.rstd = rstd.array, args.weight = weight.array, args.bias = bias.array;
    args.mean = spec.centered ? mean.array : Array{};
    args.where = where.array, args.dresidual = dresidual.array, args.dx = out.array;
    args.sums = sums.array, args.count = count.array;
  }
  normkit::BackwardPlan planned(nb::handle mean_, nb::handle rstd_, nb::handle weight_, nb::handle bias_,
                                nb::handle sums_ = {}, nb::handle count_ = {}) {
    put_args();
    normkit::BackwardPlan plan = normkit::plan_backward(args, spec, need, phase);
    const Shapes& s = plan.shapes;
    if (!s.fits || (phase != normkit::Phase::apply && !s.repack_params && !s.repack_stats)) return plan;
    repack(owners[0], weight_, weight, weight.array.ndim(), s.param_strides.data());
    repack(owners[1], bias_, bias, bias.array.ndim(), s.bias_strides.data());
    if (spec.centered) repack(owners[2], mean_, mean, mean.array.ndim(), s.stat_strides.data());
    repack(owners[3], rstd_, rstd, rstd.array.ndim(), s.stat_strides.data());
    repack(owners[4], sums_, sums, sums.array.ndim(), Triples(s).strides.data());
    repack(owners[5], count_, count, count.array.ndim(), s.stat_strides.data());
    put_args();
    plan = normkit::plan_backward(args, spec, need, phase);
    return plan;
  }
  nb::object dx(normkit::BackwardPlan& plan, nb::handle out_array, nb::handle x_array) {
    nb::object result =
        out_array.is_none() ? new_like_x(x.array.dtype, x, x_array, plan.shapes) : nb::borrow(out_array);
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
  call.find_apart(out, x, dy);
  normkit::BackwardPlan plan = call.planned(mean, rstd, weight, bias);
  if (!plan.shapes.fits) return nb::borrow(Py_NotImplemented);
  const Shapes& shapes = plan.shapes;
  nb::object gradients[2] = {nb::none(), nb::none()};
  const nb::object dx = call.need.dx ? call.dx(plan, out, x) : nb::none();
  if (!call.need.dx) plan.job.task.dx.data = nullptr;
  const View& like = call.weight;
  const Dtype dtype = like.array.present ? like.array.dtype : normkit::compute_dtype(call.x.array.dtype);
  normkit::ParamGradient* jobs[2] = {&plan.job.dweight, &plan.job.dbias};
  for (int k = 0; k < 2; ++k) {
    if (!(k == 0 ? call.need.dweight : call.need.dbias)) continue;
    gradients[k] =
        filled(allocate(dtype, like, weight, shapes.param_ndim, shapes.param_shape.data(), shapes.param_strides.data()),
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
  normkit::BackwardPlan plan = call.planned(mean, rstd, weight, bias);
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
  const nb::object counts = as_doubles(count, call.count);
  call.spec = spec_of(kind, axes, call.x.array);
  put_epilogue(call.spec, activation, weight_offset);
  call.need = {true, false, false}, call.phase = normkit::Phase::apply;
  call.find_apart(out, x, dy);
  normkit::BackwardPlan plan = call.planned(mean, rstd, weight, bias, sums, counts);
  if (!plan.shapes.fits) return nb::borrow(Py_NotImplemented);
  const nb::object dx = call.dx(plan, out, x);
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
    } catch (const Error& e) {
      if (e.kind == Error::Kind::axis) {
        const nb::object type = nb::module_::import_("numpy.exceptions").attr("AxisError");
        PyErr_SetString(type.ptr(), e.what());
      } else {
        PyErr_SetString(e.kind == Error::Kind::type ? PyExc_TypeError : PyExc_ValueError, e.what());
      }
    }
  }, nullptr);
  m.attr("version") = NORMKIT_VERSION;
  for (int kind = kNormalize; kind <= kLayerRms; ++kind) m.attr(kKindNames[kind]) = kind;
  m.def("forward", &forward, "kind"_a, "axes"_a.none(), "x"_a.none(), "weight"_a.none(), "bias"_a.none(),
        "eps"_a.none(), "running_mean"_a.none(), "running_var"_a.none(), "use_input_stats"_a, "momentum"_a.none(),
        "out"_a.none(), "out_dtype"_a.none(), "return_stats"_a, "where"_a.none(), "residual"_a.none(),
        "return_residual"_a, "activation"_a.none(), "weight_offset"_a.none());
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
