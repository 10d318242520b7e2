#include "arrays.hpp"

#include <algorithm>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "output_cache.hpp"

namespace arrays {

using normkit::check_axes;
using normkit::Error;
using normkit::type_error;
using normkit::value_error;

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
  nb::object call(nb::handle object) const {  // which makes no bound method
    PyObject* const found = PyObject_CallMethodObjArgs(object.ptr(), name_, nullptr);
    if (!found) throw nb::python_error();
    return nb::steal(found);
  }

 private:
  PyObject* name_;
};

// ---- dtypes ------------------------------------------------------------------------------------------------------

int type_number(Dtype dtype) {
  constexpr int kNumbers[] = {NPY_FLOAT, NPY_DOUBLE, NPY_HALF,   -1,        NPY_UINT8,  NPY_UINT16, NPY_INT16,
                              NPY_INT8,  NPY_INT32,  NPY_UINT32, NPY_INT64, NPY_UINT64, NPY_BOOL};
  return kNumbers[static_cast<int>(dtype)];
}

constexpr const char* kBits = "[('bfloat16', '<u2')]";

Dtype dtype_of(PyArray_Descr* descr, std::string& name) {
  for (int k = 0; k < static_cast<int>(Dtype::other); ++k)
    if (type_number(static_cast<Dtype>(k)) == descr->type_num) return static_cast<Dtype>(k);
  if (PyTypeNum_ISINTEGER(descr->type_num)) {  // C has several of one width
    const bool wide = PyDataType_ELSIZE(descr) == 8, is_signed = PyTypeNum_ISSIGNED(descr->type_num);
    return is_signed ? (wide ? Dtype::int64 : Dtype::int32) : (wide ? Dtype::uint64 : Dtype::uint32);
  }
  static int bfloat16 = -1;  // ml_dtypes registers its type anew in each process
  if (descr->type_num == bfloat16) return Dtype::bfloat16;
  name = nb::str(nb::handle(reinterpret_cast<PyObject*>(descr))).c_str();
  if (name == "bfloat16") bfloat16 = descr->type_num;
  return name == "bfloat16" || name == kBits ? Dtype::bfloat16 : Dtype::other;
}

/// The dtype with a name. A name that the core does not know is put into `other`.
Dtype dtype_named(std::string name, std::string& other) {
  for (int k = 0; k < static_cast<int>(Dtype::other); ++k)
    if (name == normkit::name_of(static_cast<Dtype>(k))) return static_cast<Dtype>(k);
  other = std::move(name);
  return Dtype::other;
}

/// Of what the core makes: real numbers.
nb::dlpack::dtype dlpack_dtype(Dtype dtype) {
  return {static_cast<std::uint8_t>(dtype == Dtype::bfloat16 ? 4 : 2),
          static_cast<std::uint8_t>(8 * normkit::size_of(dtype)), 1};
}

const std::int64_t* extents(const npy_intp* p) { return reinterpret_cast<const std::int64_t*>(p); }

/// Has NumPy take the memory of a large array from the cache of outputs, as long as it lives.
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

/// Fills in the array of a view, whose strides count `unit` bytes: one that is too long for a number is INT64_MIN.
void fill(View& v, void* data, Dtype dtype, bool read_only, std::int64_t ndim, std::int64_t unit,
          const std::int64_t* shape, const std::int64_t* strides) {
  for (std::int64_t axis = 0; axis < ndim; ++axis) {
    v.shape[axis] = shape[axis];
    if (__builtin_mul_overflow(strides[axis], unit, &v.strides[axis])) v.strides[axis] = INT64_MIN;
  }
  const std::size_t axes = static_cast<std::size_t>(ndim);
  std::byte* const bytes = static_cast<std::byte*>(data);
  v.array = {bytes, dtype, true, read_only, {v.shape.data(), axes}, {v.strides.data(), axes}, v.other_dtype};
}

/// True where memory can have such extents and strides.
bool is_in_reach(const Array& a) {
  std::int64_t reach = 0;
  for (int axis = 0; axis < a.ndim(); ++axis) {
    const std::int64_t extent = a.shape[static_cast<std::size_t>(axis)], stride = a.stride(axis);
    std::int64_t far = 0;
    if (extent < 0 || stride == INT64_MIN ||
        __builtin_mul_overflow(stride < 0 ? -stride : stride, extent < 2 ? 0 : extent - 1, &far) ||
        __builtin_add_overflow(reach, far, &reach) || reach >= INT64_MAX / 16)
      return false;
  }
  return true;
}

}  // namespace

nb::object tuple_of(const std::int64_t* numbers, int count, std::int64_t unit) {
  const nb::object tuple = nb::steal(PyTuple_New(count));
  for (int k = 0; k < count; ++k) PyTuple_SetItem(tuple.ptr(), k, PyLong_FromLongLong(numbers[k] * unit));
  return tuple;
}

nb::object numpy_dtype(Dtype dtype) {
  if (dtype != Dtype::bfloat16)
    return nb::steal(reinterpret_cast<PyObject*>(PyArray_DescrFromType(type_number(dtype))));
  static PyObject* const bfloat16 = python_module("normkit._memory").attr("bfloat16_dtype")().release().ptr();
  return nb::borrow(bfloat16);
}

// ---- libraries ---------------------------------------------------------------------------------------------------

namespace {

/// What a versioned capsule of DLPack 1 holds, which nanobind does not tell.
struct Versioned {
  std::uint32_t major = 1, minor = 0;
  void* manager = nullptr;
  void (*deleter)(Versioned*) = nullptr;
  std::uint64_t flags = 0;
  nb::dlpack::dltensor tensor;
};

}  // namespace

struct Exchange {
  std::uint32_t major, minor;
  const void* older;
  void *allocate, *versioned_of;
  int (*object_of)(Versioned* stolen, void** object);
  int (*tensor_of)(void* object, nb::dlpack::dltensor* borrowed);
};

namespace {

/// The table in a capsule; null where that is none of this version.
const Exchange* exchange_of(nb::handle capsule) {
  const char* const name = "dlpack_exchange_api";
  if (!PyCapsule_IsValid(capsule.ptr(), name)) return nullptr;
  const auto* api = static_cast<const Exchange*>(PyCapsule_GetPointer(capsule.ptr(), name));
  return api->major == 1 && api->tensor_of ? api : nullptr;
}

}  // namespace

const Library& library_of_type(nb::handle type) {
  struct Known {
    nb::object type;  // alive, else another could come to have its address
    Library library;
  };
  static std::vector<std::unique_ptr<Known>>& known = *new std::vector<std::unique_ptr<Known>>;
  for (const std::unique_ptr<Known>& k : known)
    if (k->type.is(type)) return k->library;
  const nb::tuple found = nb::cast<nb::tuple>(python_module("normkit._memory").attr("library_of_type")(type));
  Library library{nb::cast<nb::str>(found[0]).c_str(), Library::Kind::other, nb::cast<bool>(found[1]),
                  exchange_of(found[2])};
  for (const auto& [name, kind] : {std::pair{"numpy", Library::Kind::numpy}, std::pair{"cupy", Library::Kind::cupy},
                                   std::pair{"torch", Library::Kind::torch}})
    if (library.name == name) library.kind = kind;
  constexpr std::size_t kMost = 64;
  if (known.size() == kMost) known.erase(known.begin());
  known.push_back(std::make_unique<Known>(Known{nb::borrow(type), std::move(library)}));
  return known.back()->library;
}

// ---- NumPy -------------------------------------------------------------------------------------------------------

bool view_numpy(nb::handle h, View& v) {
  if (!PyArray_Check(h.ptr())) return false;
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
    v.other_dtype = nb::str(nb::handle(reinterpret_cast<PyObject*>(PyArray_DESCR(a)))).c_str();
  }
  v.array.other_dtype = v.other_dtype;
  return true;
}

bool is_number(nb::handle value) {
  PyObject* const v = value.ptr();
  if (PyFloat_Check(v) || PyLong_Check(v) || PyArray_IsScalar(v, Bool) || PyArray_IsScalar(v, Floating)) return true;
  return PyArray_IsScalar(v, Integer) && !PyArray_IsScalar(v, Timedelta);
}

namespace {

/// True where elements lie in C order: where an axis has one, its stride says nothing.
bool has_c_order(const normkit::Dense& lying) {
  std::int64_t dense = 1;
  for (int axis = lying.ndim - 1; axis >= 0; dense *= lying.shape[axis--])
    if (lying.shape[axis] != 1 && lying.strides[axis] != dense) return false;
  return true;
}

}  // namespace

nb::object new_numpy(const normkit::Dense& lying) {
  PyArray_Descr* const descr = reinterpret_cast<PyArray_Descr*>(numpy_dtype(lying.dtype).release().ptr());
  npy_intp dims[NPY_MAXDIMS], bytes[NPY_MAXDIMS];
  npy_intp dense = normkit::size_of(lying.dtype);
  for (int axis = lying.ndim - 1; axis >= 0; --axis) {
    dims[axis] = static_cast<npy_intp>(lying.shape[axis]);
    bytes[axis] = static_cast<npy_intp>(lying.strides[axis]) * normkit::size_of(lying.dtype);
    dense *= dims[axis];
  }
  PyObject* out = nullptr;
  {
    const CachedMemory cached(dense);
    out = PyArray_NewFromDescr(&PyArray_Type, descr, lying.ndim, dims,
                               dense == 0 || has_c_order(lying) ? nullptr : bytes, nullptr, 0, nullptr);
  }
  if (!out) throw nb::python_error();
  return nb::steal(out);
}

nb::object numpy_over(void* data, nb::handle dtype, int ndim, const std::int64_t* shape, const std::int64_t* strides,
                      bool writable, nb::handle base) {
  npy_intp dims[NPY_MAXDIMS], steps[NPY_MAXDIMS];
  for (int axis = 0; axis < ndim; ++axis) dims[axis] = shape[axis], steps[axis] = strides[axis];
  if (!data) data = dims;  // of an empty array; for none at all NumPy would allocate
  PyObject* array = PyArray_NewFromDescr(&PyArray_Type, reinterpret_cast<PyArray_Descr*>(Py_NewRef(dtype.ptr())), ndim,
                                         dims, steps, data, writable ? NPY_ARRAY_WRITEABLE : 0, nullptr);
  if (!array) throw nb::python_error();
  nb::object result = nb::steal(array);
  if (base.is_valid() && PyArray_SetBaseObject(as_array(result), Py_NewRef(base.ptr())) < 0) throw nb::python_error();
  return result;
}

nb::object as_numpy(const View& v) {
  if (PyArray_CheckExact(v.object.ptr())) return nb::borrow(v.object);
  nb::object base = nb::borrow(v.object);
  if (v.imported.is_valid()) {
    using Held = nb::ndarray<nb::ro>;
    base = nb::capsule(new Held(v.imported), [](void* held) noexcept { delete static_cast<Held*>(held); });
  }
  const nb::object dtype = PyArray_Check(v.object.ptr())
                               ? nb::borrow(reinterpret_cast<PyObject*>(PyArray_DESCR(as_array(v.object))))
                           : v.array.dtype == Dtype::other ? python_module("numpy").attr("dtype")(v.other_dtype.c_str())
                                                           : numpy_dtype(v.array.dtype);
  return numpy_over(v.array.data, dtype, v.array.ndim(), v.array.shape.data(), v.array.strides.data(),
                    !v.array.read_only, base);
}

nb::object to_dlpack(nb::handle array) {
  View v;
  view_numpy(array, v);
  std::size_t shape[NPY_MAXDIMS];
  std::int64_t strides[NPY_MAXDIMS];
  for (int axis = 0; axis < v.array.ndim(); ++axis) {
    shape[axis] = static_cast<std::size_t>(v.array.shape[axis]);
    strides[axis] = v.array.stride(axis) / normkit::size_of(v.array.dtype);
  }
  const nb::dlpack::dtype dtype = dlpack_dtype(v.array.dtype);
  return nb::cast(nb::ndarray<nb::array_api>(v.array.data, static_cast<std::size_t>(v.array.ndim()), shape,
                                             nb::borrow(array), strides, dtype, nb::device::cpu::value));
}

// ---- DLPack ------------------------------------------------------------------------------------------------------

namespace {

/// The name of a dtype; empty where it is none of NumPy's and not bfloat16.
std::string word_of(nb::dlpack::dtype type) {
  static const char* const kinds[] = {"int", "uint", "float", "", "bfloat", "complex", "bool"};  // by type code
  const bool known = type.code < std::size(kinds) && *kinds[type.code] && type.bits % 8 == 0 && type.lanes == 1 &&
                     (type.code != 4 || type.bits == 16) && (type.code != 6 || type.bits == 8);
  return known ? kinds[type.code] + (type.code == 6 ? "" : std::to_string(type.bits)) : "";
}

Dtype dtype_of(nb::dlpack::dtype type) {
  if (type == nb::dlpack::dtype{2, 32, 1}) return Dtype::float32;
  std::string other;
  return dtype_named(word_of(type), other);
}

nb::object capsule_of(nb::handle array, nb::handle stream) {
  const nb::object method = array.attr("__dlpack__");
  nb::dict options;
  if (stream.is_valid()) options["stream"] = stream;
  nb::dict versioned = nb::cast<nb::dict>(options.attr("copy")());
  versioned["max_version"] = nb::make_tuple(1, 1);
  try {
    return method(**versioned);
  } catch (nb::python_error& e) {
    if (!e.matches(PyExc_TypeError)) throw;
  }
  return method(**options);  // a producer older than DLPack 1
}

}  // namespace

void import_dlpack(const char* name, nb::handle array, nb::handle stream, View& v) {
  const std::string named(name);
  const nb::object capsule = capsule_of(array, stream);
  const char* const versioned = "dltensor_versioned";
  const Versioned* const head = PyCapsule_IsValid(capsule.ptr(), versioned)
                                    ? static_cast<const Versioned*>(PyCapsule_GetPointer(capsule.ptr(), versioned))
                                    : nullptr;
  if (head && head->major > 1)
    type_error(named + " speaks DLPack " + std::to_string(head->major) + ", expected DLPack 1");
  const bool read_only = head && head->flags & 1;
  if (!nb::try_cast(capsule, v.imported))
    value_error(named + " exports what cannot be read, expected a new capsule of DLPack with at most " +
                std::to_string(normkit::kMaxAxes) + " axes");
  const nb::ndarray<nb::ro>& a = v.imported;
  const std::int64_t ndim = static_cast<std::int64_t>(a.ndim());
  check_axes(name, ndim);
  const nb::dlpack::dtype type = a.dtype();
  const std::int64_t bytes = type.bits / 8;
  const std::string word = word_of(type);
  if (word.empty())
    type_error(named + " has a DLPack type with code " + std::to_string(type.code) + " and " +
               std::to_string(type.bits) + " bits, expected float32, float64, float16 or bfloat16");
  v.object = array;
  const Dtype dtype = dtype_named(word, v.other_dtype);
  void* const data = const_cast<void*>(static_cast<const void*>(a.data()));
  fill(v, data, dtype, read_only, ndim, bytes, a.shape_ptr(), a.stride_ptr());
  if (!is_in_reach(v.array))
    value_error(named + " has shape " + normkit::tuple(v.array.shape) +
                ", expected extents and strides that memory can have");
  if (!data && !is_empty(v.array)) value_error(named + " has no memory, expected an array that holds its elements");
}

// ---- tensors on the CPU, without calls of Python ---------------------------------------------------------------------

namespace {

/// Memory of a tensor: extents and strides lie behind this, and then the elements, at a line of memory. Who frees it may
/// not hold the interpreter lock.
struct Owned {
  Versioned versioned;
  bool is_cached;

  static void free(Versioned* v) {
    const Owned* const owned = static_cast<Owned*>(v->manager);
    output_cache::give_back(v->manager, owned->is_cached);
  }
};

}  // namespace

bool may_have_tangents(const Library& library) {
  if (library.kind != Library::Kind::torch) return false;
  static const Name level("_current_level");
  static nb::handle forward_ad;
  if (!forward_ad.is_valid()) {
    const nb::object autograd = nb::getattr(python_module("torch"), "autograd", nb::none());
    nb::object found = nb::getattr(autograd, "forward_ad", nb::none());
    if (found.is_none()) return false;  // of what only looks like PyTorch
    forward_ad = found.release();
  }
  return nb::cast<int>(level.of(forward_ad)) >= 0;
}

bool records_gradients(const Library& library) {
  if (library.kind != Library::Kind::torch) return false;
  static const nb::handle is_grad_enabled =
      nb::getattr(python_module("torch"), "is_grad_enabled", nb::none()).release();
  return is_grad_enabled.is_none() ||
         is_grad_enabled().is(nb::handle(Py_True));  // None of what only looks like PyTorch
}

bool is_plain(nb::handle tensor, bool records) {
  static const Name requires_grad("requires_grad"), is_neg("is_neg");
  const nb::handle no(Py_False);
  return is_neg.call(tensor).is(no) && (!records || requires_grad.of(tensor).is(no));
}

bool view_tensor(nb::handle tensor, const Exchange* exchange, View& v) {
  if (!exchange) return false;
  nb::dlpack::dltensor t;
  if (exchange->tensor_of(tensor.ptr(), &t) != 0) {
    PyErr_Clear();
    return false;
  }
  const Dtype dtype = dtype_of(t.dtype);
  if (t.device.device_type != nb::device::cpu::value || dtype == Dtype::other || t.ndim > normkit::kMaxAxes)
    return false;
  fill(v, static_cast<std::byte*>(t.data) + t.byte_offset, dtype, false, t.ndim, normkit::size_of(dtype), t.shape,
       t.strides);
  if ((!t.data && !is_empty(v.array)) || !is_in_reach(v.array)) return false;
  v.object = tensor;
  return true;
}

std::byte* tensor_data(nb::handle tensor, const Exchange& exchange) {
  nb::dlpack::dltensor t;
  if (exchange.tensor_of(tensor.ptr(), &t) != 0) throw nb::python_error();
  return static_cast<std::byte*>(t.data) + t.byte_offset;
}

nb::object new_tensor(const normkit::Dense& lying, const Exchange& exchange) {
  constexpr std::size_t kLine = 64;
  const auto shape = lying.extents();
  const std::size_t head = sizeof(Owned) + 2 * shape.size() * sizeof(std::int64_t);
  std::int64_t size = normkit::size_of(lying.dtype);
  bool can_be = true;
  for (const std::int64_t extent : shape) can_be = can_be && !__builtin_mul_overflow(size, extent, &size);
  const output_cache::Memory memory =
      can_be ? output_cache::take(head + kLine + static_cast<std::size_t>(size)) : output_cache::Memory{};
  if (!memory.data) {
    new_numpy(lying);  // which says in words what there is no room for
    throw std::bad_alloc();
  }
  Owned* const owned = new (memory.data) Owned{{}, memory.is_cached};
  std::int64_t* const extents = reinterpret_cast<std::int64_t*>(owned + 1);
  std::copy_n(lying.strides.data(), shape.size(), std::copy(shape.begin(), shape.end(), extents));
  if (std::int64_t* const strides = extents + lying.ndim;
      has_c_order(lying))  // by every stride, as others make an array
    for (std::int64_t axis = lying.ndim - 1, dense = 1; axis >= 0; dense *= extents[axis--]) strides[axis] = dense;
  const std::uintptr_t elements = (reinterpret_cast<std::uintptr_t>(owned) + head + kLine - 1) / kLine * kLine;
  owned->versioned.manager = owned, owned->versioned.deleter = Owned::free;
  owned->versioned.tensor = {reinterpret_cast<void*>(elements),
                             {nb::device::cpu::value, 0},
                             lying.ndim,
                             dlpack_dtype(lying.dtype),
                             extents,
                             extents + lying.ndim,
                             0};
  void* tensor = nullptr;
  if (exchange.object_of(&owned->versioned, &tensor) != 0) throw nb::python_error();
  return nb::steal(static_cast<PyObject*>(tensor));
}

// ---- GPUs --------------------------------------------------------------------------------------------------------

namespace {

std::int64_t number(nb::handle h) {
  const long long value = PyLong_AsLongLong(h.ptr());
  if (value == -1 && PyErr_Occurred()) throw nb::python_error();
  return value;
}

}  // namespace

std::byte* device_data(nb::handle array, const Library& library) {
  static const Name data("data"), pointer("ptr"), data_ptr("data_ptr");
  const nb::object at = library.kind == Library::Kind::cupy ? pointer.of(data.of(array)) : data_ptr.call(array);
  return reinterpret_cast<std::byte*>(static_cast<std::uintptr_t>(number(at)));
}

void read_device(nb::handle array, const Library& library, OnDevice& into) {
  static const Name data("data"), device_id("device_id"), strides("strides"), get_device("get_device"),
      stride("stride"), shape("shape"), dtype("dtype");
  const bool cupy = library.kind == Library::Kind::cupy;
  into.data = device_data(array, library);
  into.device = number(cupy ? device_id.of(data.of(array)) : get_device.call(array));
  into.dtype = dtype.of(array), into.shape = shape.of(array);
  into.strides = cupy ? strides.of(array) : stride.call(array);
}

bool read_if_plain(nb::handle array, const Library& library, bool records, OnDevice& into) {
  if (library.kind == Library::Kind::torch) {
    static const Name is_cuda("is_cuda");
    if (!is_cuda.of(array).is(nb::handle(Py_True)) || !is_plain(array, records)) return false;
  } else if (library.kind != Library::Kind::cupy) {
    return false;
  }
  read_device(array, library, into);
  return true;
}

void view_device(const char* name, nb::handle array, const Library& library, View& v) {
  OnDevice found;
  read_device(array, library, found);
  const bool cupy = library.kind == Library::Kind::cupy;
  Dtype dtype;
  if (cupy) {
    dtype = dtype_of(reinterpret_cast<PyArray_Descr*>(found.dtype.ptr()), v.other_dtype);
  } else {
    const std::string word = nb::str(found.dtype).c_str();
    dtype = dtype_named(word.substr(word.rfind('.') + 1), v.other_dtype);
  }
  v.array.dtype = dtype, v.array.other_dtype = v.other_dtype;
  const std::int64_t unit = cupy ? 1 : normkit::element_bytes(v.array);
  const std::int64_t ndim = static_cast<std::int64_t>(nb::len(found.shape));
  check_axes(name, ndim);
  for (int axis = 0; axis < ndim; ++axis)
    v.shape[axis] = number(found.shape[axis]), v.strides[axis] = number(found.strides[axis]);
  v.object = array;
  fill(v, found.data, dtype, false, ndim, unit, v.shape.data(), v.strides.data());
}

}  // namespace arrays
