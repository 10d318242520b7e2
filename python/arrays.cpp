#include "arrays.hpp"

#include <utility>

#include "device.hpp"
#include "output_cache.hpp"

namespace arrays {

using normkit::Shapes;

namespace {

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

const std::int64_t* extents(const npy_intp* p) { return reinterpret_cast<const std::int64_t*>(p); }

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

nb::object tuple_of(const npy_intp* numbers, int count) {
  const nb::object tuple = nb::steal(PyTuple_New(count));
  for (int k = 0; k < count; ++k) PyTuple_SetItem(tuple.ptr(), k, PyLong_FromLongLong(numbers[k]));
  return tuple;
}

/// Takes the reference to `descr`.
[[gnu::noinline, gnu::cold]] nb::object allocate_on(const device::Call& call, PyArray_Descr* descr, int ndim,
                                                    const npy_intp* shape, const npy_intp* strides) {
  const nb::object type = nb::steal(reinterpret_cast<PyObject*>(descr));
  const char* const name = call.direct ? "allocate" : "empty";
  return call.arrays.attr(name)(tuple_of(shape, ndim), type, tuple_of(strides, ndim));
}

/// Where nothing stands for arrays: their libraries have dtypes of their own.
PyArray_Descr* descr_on(const device::Call& call, Dtype dtype) {
  if (dtype != Dtype::bfloat16) return PyArray_DescrFromType(type_number(dtype));
  return reinterpret_cast<PyArray_Descr*>(call.arrays.attr("dtype_named")("bfloat16").release().ptr());
}

/// A new array, dense with these strides; of the type of `like`, where given, which has this dtype.
nb::object allocate(Dtype dtype, nb::handle like, int ndim, const std::int64_t* shape, const std::int64_t* strides) {
  PyArray_Descr* descr;
  const device::Call* const call = device::call();
  if (call && call->direct) {
    descr = descr_on(*call, dtype);
  } else if (like.is_valid()) {
    descr = PyArray_DESCR(as_array(like));
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
  if (call) return allocate_on(*call, descr, ndim, dims, bytes);
  PyObject* out = nullptr;
  {
    const CachedMemory cached(dense);
    out = PyArray_NewFromDescr(&PyArray_Type, descr, ndim, dims, c_order || dense == 0 ? nullptr : bytes, nullptr, 0,
                               nullptr);
  }
  if (!out) throw nb::python_error();
  return nb::steal(out);
}

nb::object filled(nb::object array, const Shapes& shapes) {
  if (!shapes.empty) return array;
  if (const device::Call* call = device::call()) call->arrays.attr("put")(array, 0);
  else array.attr("fill")(0);
  return array;
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

void replace(View& v, nb::object copy) {
  View fresh;
  view(copy, fresh);
  fresh.copy = std::move(copy);
  v = std::move(fresh);
  v.array.other_dtype = v.other_dtype;
}

}  // namespace

bool view(nb::handle h, View& v) {
  if (h.is_none()) return true;
  if (!PyArray_CheckExact(h.ptr())) return false;
  PyArrayObject* a = as_array(h);
  const std::size_t ndim = static_cast<std::size_t>(PyArray_NDIM(a));
  v.object = h;
  v.array = {data_of(h),
             dtype_of(PyArray_DESCR(a), v.other_dtype),
             true,
             !PyArray_ISWRITEABLE(a),
             {extents(PyArray_DIMS(a)), ndim},
             {extents(PyArray_STRIDES(a)), ndim},
             {}};
  if (!PyArray_ISNOTSWAPPED(a)) {
    v.array.dtype = Dtype::other;
    v.other_dtype = nb::str(nb::handle(descr_of(h))).c_str();
  }
  v.array.other_dtype = v.other_dtype;
  return true;
}

nb::object new_like_x(Dtype dtype, nb::handle x, const Shapes& shapes) {
  if (const device::Call* call = device::call(); call && call->direct) {
    const nb::object extents = x.attr("shape");
    normkit::Extents shape;
    for (Py_ssize_t axis = 0; axis < PyTuple_Size(extents.ptr()); ++axis)
      shape[axis] = nb::cast<std::int64_t>(extents[axis]);
    return allocate(dtype, {}, static_cast<int>(PyTuple_Size(extents.ptr())), shape.data(), shapes.out_strides.data());
  }
  PyArrayObject* a = as_array(x);
  return allocate(dtype, dtype == shapes.x_dtype ? x : nb::handle(), PyArray_NDIM(a), extents(PyArray_DIMS(a)),
                  shapes.out_strides.data());
}

nb::object new_statistic(Dtype dtype, const Shapes& s) {
  return filled(allocate(dtype, {}, s.stat_ndim, s.stat_shape.data(), s.stat_strides.data()), s);
}

nb::object new_triples(const Shapes& shapes) {
  const Triples t(shapes);
  return filled(allocate(Dtype::float64, {}, t.ndim, t.shape.data(), t.strides.data()), shapes);
}

nb::object new_gradient(nb::handle weight, const Shapes& s) {
  return filled(allocate(s.param_dtype, weight, s.param_ndim, s.param_shape.data(), s.param_strides.data()), s);
}

void repack(View& v, const std::int64_t* strides) {
  if (!v.array.present) return;
  nb::object copy = allocate(v.array.dtype, v.object, v.array.ndim(), v.array.shape.data(), strides);
  if (const device::Call* call = device::call()) call->arrays.attr("copy")(copy, v.object);
  else if (PyArray_CopyInto(as_array(copy), as_array(v.object)) < 0) throw nb::python_error();
  replace(v, std::move(copy));
}

void repack_triples(View& v, const Shapes& shapes) { repack(v, Triples(shapes).strides.data()); }

void widen(View& v) {
  if (!v.array.present || v.array.dtype == Dtype::float64) return;
  const int type = PyArray_TYPE(as_array(v.object));
  if (!PyTypeNum_ISINTEGER(type) && !PyTypeNum_ISFLOAT(type)) return;
  if (const device::Call* call = device::call()) {
    std::int64_t strides[NPY_MAXDIMS], dense = 1;
    for (int axis = v.array.ndim() - 1; axis >= 0; --axis) strides[axis] = dense, dense *= v.array.shape[axis];
    nb::object wide = allocate(Dtype::float64, {}, v.array.ndim(), v.array.shape.data(), strides);
    call->arrays.attr("copy")(wide, v.object);
    return replace(v, std::move(wide));
  }
  PyObject* cast = PyArray_CastToType(as_array(v.object), PyArray_DescrFromType(NPY_DOUBLE), 0);
  if (!cast) throw nb::python_error();
  replace(v, nb::steal(cast));
}

bool known_apart(const View& out, const View& other) {
  if (!out.array.present || out.array.dtype == Dtype::other || other.array.dtype == Dtype::other) return false;
  if (!normkit::may_overlap(out.array, other.array)) return false;
  return !nb::cast<bool>(nb::module_::import_("normkit._arrays").attr("share_memory")(out.object, other.object));
}

}  // namespace arrays
