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
  PyObject* out = PyArray_NewFromDescr(&PyArray_Type, descr, ndim, dims, c_order || dense == 0 ? nullptr : bytes,
                                       nullptr, 0, nullptr);
  if (!out) throw nb::python_error();
  return nb::steal(out);
}

/// A copy of `source` with the strides that the plan asks for.
void repack(nb::object& owner, nb::handle source, View& v, int ndim, const std::int64_t* strides) {
  owner = allocate(v.array.dtype, v, source, ndim, v.array.shape.data(), strides);
  if (PyArray_CopyInto(as_array(owner), as_array(source)) < 0) throw nb::python_error();
  View fresh;
  view(owner, fresh);
  v = std::move(fresh);
  v.array.other_dtype = v.name;
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

/// The statistics of no members: mean and variance 0.
void fill_empty(nb::handle mean, nb::handle rstd, double eps) {
  const double value = eps > 0 ? 1 / std::sqrt(eps) : 0;
  if (mean.is_valid()) mean.attr("fill")(0.0);
  rstd.attr("fill")(value);
}

nb::object forward(int kind, nb::handle axes, nb::handle x, nb::handle weight, nb::handle bias, nb::handle eps,
                   nb::handle running_mean, nb::handle running_var, bool use_input_stats, nb::handle momentum,
                   nb::handle out, nb::handle out_dtype, bool return_stats) {
  View xv, wv, bv, mv, vv, yv;
  if (x.is_none() || !view(x, xv) || !view(weight, wv) || !view(bias, bv) || !view(running_mean, mv) ||
      !view(running_var, vv) || !view(out, yv) || !(out_dtype.is_none() || PyUnicode_Check(out_dtype.ptr())))
    return nb::borrow(Py_NotImplemented);
  Spec spec = spec_of(kind, axes, xv.array);
  spec.eps = eps_of(eps, kind, xv.array.dtype);
  spec.use_input_stats = use_input_stats;
  if (momentum.is_none())
    throw Error(Error::Kind::value, "momentum is None, expected a number from 0 to 1: keep the count yourself");
  spec.momentum = number("momentum", momentum, "a number from 0 to 1");
  normkit::ForwardArgs args;
  args.x = xv.array, args.y = yv.array, args.weight = wv.array, args.bias = bv.array;
  args.running_mean = mv.array, args.running_var = vv.array, args.y_dtype = dtype_named(out_dtype);
  args.y_is_apart = known_apart(out, yv, x, xv);
  normkit::ForwardPlan plan = normkit::plan_forward(args, spec);
  if (!plan.shapes.fits) return nb::borrow(Py_NotImplemented);
  nb::object weight_owner, bias_owner;
  if (plan.shapes.repack_params) {
    if (wv.array.present) repack(weight_owner, weight, wv, wv.array.ndim(), plan.shapes.param_strides.data());
    if (bv.array.present) repack(bias_owner, bias, bv, bv.array.ndim(), plan.shapes.param_strides.data());
    args.weight = wv.array, args.bias = bv.array;
    plan = normkit::plan_forward(args, spec);
  }
  const Shapes& shapes = plan.shapes;
  nb::object y = out.is_none() ? allocate(shapes.out_dtype, xv, x, xv.array.ndim(), xv.array.shape.data(),
                                          shapes.out_strides.data())
                               : nb::borrow(out);
  plan.job.task.y.data = static_cast<std::byte*>(PyArray_DATA(as_array(y)));
  nb::object mean, rstd;
  if (return_stats) {
    const Dtype dtype = normkit::compute_dtype(xv.array.dtype);
    const auto statistic = [&] {
      return allocate(dtype, View{}, {}, shapes.stat_ndim, shapes.stat_shape.data(), shapes.stat_strides.data());
    };
    if (spec.centered) mean = statistic();
    rstd = statistic();
    if (mean.is_valid()) plan.job.task.mean = static_cast<std::byte*>(PyArray_DATA(as_array(mean)));
    plan.job.task.rstd = static_cast<std::byte*>(PyArray_DATA(as_array(rstd)));
    if (shapes.empty) fill_empty(mean, rstd, spec.eps);
  }
  if (!shapes.empty) run_job(plan.job);
  if (!return_stats) return y;
  return spec.centered ? nb::make_tuple(y, mean, rstd) : nb::make_tuple(y, rstd);
}

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

nb::object backward(int kind, nb::handle axes, nb::handle dy, nb::handle x, nb::handle mean, nb::handle rstd,
                    nb::handle weight, bool use_input_stats, nb::handle need, nb::handle out) {
  View dyv, xv, mv, rv, wv, dxv;
  if (dy.is_none() || x.is_none() || !view(dy, dyv) || !view(x, xv) || !view(mean, mv) || !view(rstd, rv) ||
      !view(weight, wv) || !view(out, dxv))
    return nb::borrow(Py_NotImplemented);
  Spec spec = spec_of(kind, axes, xv.array);
  spec.use_input_stats = use_input_stats;
  const normkit::BackwardNeed wanted = need_of(need);
  normkit::BackwardArgs args;
  args.dy = dyv.array, args.x = xv.array, args.mean = mv.array, args.rstd = rv.array, args.weight = wv.array;
  if (!spec.centered) args.mean = {};
  args.dx = dxv.array;
  const bool touches =
      dxv.array.present && (normkit::may_overlap(dxv.array, xv.array) || normkit::may_overlap(dxv.array, dyv.array));
  args.dx_is_apart = touches && (!normkit::may_overlap(dxv.array, xv.array) || known_apart(out, dxv, x, xv)) &&
                     (!normkit::may_overlap(dxv.array, dyv.array) || known_apart(out, dxv, dy, dyv));
  normkit::BackwardPlan plan = normkit::plan_backward(args, spec, wanted);
  if (!plan.shapes.fits) return nb::borrow(Py_NotImplemented);
  nb::object owners[3];
  if (plan.shapes.repack_params || plan.shapes.repack_stats) {
    const Shapes& s = plan.shapes;
    if (wv.array.present) repack(owners[0], weight, wv, wv.array.ndim(), s.param_strides.data());
    if (args.mean.present) repack(owners[1], mean, mv, mv.array.ndim(), s.stat_strides.data());
    repack(owners[2], rstd, rv, rv.array.ndim(), s.stat_strides.data());
    args.weight = wv.array, args.rstd = rv.array;
    if (args.mean.present) args.mean = mv.array;
    plan = normkit::plan_backward(args, spec, wanted);
  }
  const Shapes& shapes = plan.shapes;
  nb::object dx = nb::none(), gradients[2] = {nb::none(), nb::none()};
  if (wanted.dx) {
    dx = out.is_none()
             ? allocate(xv.array.dtype, xv, x, xv.array.ndim(), xv.array.shape.data(), shapes.out_strides.data())
             : nb::borrow(out);
    plan.job.task.dx.data = static_cast<std::byte*>(PyArray_DATA(as_array(dx)));
  } else {
    plan.job.task.dx.data = nullptr;
  }
  const Dtype dtype = wv.array.present ? wv.array.dtype : normkit::compute_dtype(xv.array.dtype);
  normkit::ParamGradient* jobs[2] = {&plan.job.dweight, &plan.job.dbias};
  for (int k = 0; k < 2; ++k) {
    if (!(k == 0 ? wanted.dweight : wanted.dbias)) continue;
    gradients[k] =
        allocate(dtype, wv, weight, shapes.param_ndim, shapes.param_shape.data(), shapes.param_strides.data());
    *jobs[k] = {static_cast<std::byte*>(PyArray_DATA(as_array(gradients[k]))), dtype};
    if (shapes.empty) gradients[k].attr("fill")(0);
  }
  if (!shapes.empty) run_job(plan.job);
  return nb::make_tuple(dx, gradients[0], gradients[1]);
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
        "out"_a.none(), "out_dtype"_a.none(), "return_stats"_a);
  m.def("backward", &backward, "kind"_a, "axes"_a.none(), "dy"_a.none(), "x"_a.none(), "mean"_a.none(), "rstd"_a.none(),
        "weight"_a.none(), "use_input_stats"_a, "need"_a.none(), "out"_a.none());
  m.def("from_capsule", &from_capsule, "name"_a, "capsule"_a);
  m.def("to_dlpack", &to_dlpack, "array"_a);
  m.def("geometry", &geometry, "shape"_a, "strides"_a, "reduce_axes"_a, "param_axes"_a);
  m.def("isa", &normkit::isa);
  m.def("isas", &normkit::isas);
  m.def("use_isa", &normkit::use_isa, "name"_a);
  m.def("num_threads", &normkit::num_threads);
  m.def("set_num_threads", &normkit::set_num_threads, "n"_a);
}
