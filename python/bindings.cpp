// The module: what is not a call of the core, which forward.cpp and backward.cpp have.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#define NORMKIT_IMPORTS_NUMPY
#include "arrays.hpp"
#include "calls.hpp"
#include "device.hpp"
#include "function.hpp"
#include "normkit/formula.hpp"
#include "options.hpp"
#include "output_cache.hpp"
#include "plan.hpp"

namespace nb = nanobind;
using namespace nb::literals;
using arrays::as_array;
using arrays::view;
using arrays::View;
using normkit::Dtype;
using normkit::Error;

namespace {

// ---- moments -----------------------------------------------------------------------------------------------------

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
  const double value = options::number("eps", eps, "a number that is at least 0");
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

/// A NumPy array that stands for memory of a GPU: where it lies, how, and `root`, whose it is.
nb::object stand_in(nb::handle root, std::uintptr_t pointer, nb::handle shape, nb::handle strides, nb::handle dtype,
                    bool writable) {
  npy_intp dims[NPY_MAXDIMS], steps[NPY_MAXDIMS];
  const int ndim = static_cast<int>(nb::len(shape));
  if (ndim > NPY_MAXDIMS) throw Error(Error::Kind::value, "an array has more axes than NumPy counts");
  for (int axis = 0; axis < ndim; ++axis) {
    dims[axis] = nb::cast<npy_intp>(shape[axis]);
    steps[axis] = nb::cast<npy_intp>(strides[axis]);
  }
  if (pointer == 0) pointer = alignof(std::max_align_t);  // of an empty array; for none at all NumPy would allocate
  PyArray_Descr* descr = reinterpret_cast<PyArray_Descr*>(nb::borrow(dtype).release().ptr());
  PyObject* array = PyArray_NewFromDescr(&PyArray_Type, descr, ndim, dims, steps, reinterpret_cast<void*>(pointer),
                                         writable ? NPY_ARRAY_WRITEABLE : 0, nullptr);
  if (!array) throw nb::python_error();
  nb::object result = nb::steal(array);
  if (PyArray_SetBaseObject(as_array(result), nb::borrow(root).release().ptr()) < 0) throw nb::python_error();
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
  for (int kind = 0; kind <= options::kLayerRms; ++kind) m.attr(options::kKindNames[kind]) = kind;
  const nb::object function_type = function::new_type();
  calls::add_forward(m, function_type);
  calls::add_backward(m, function_type);
  m.def("merge_moments", &merge_moments, "a"_a, "b"_a);
  m.def("deviation_of_moments", &deviation_of_moments, "triples"_a, "eps"_a.none(), "inverse"_a);
  m.def("from_capsule", &from_capsule, "name"_a, "capsule"_a);
  m.def("to_dlpack", &to_dlpack, "array"_a);
  m.def("stand_in", &stand_in, "root"_a, "pointer"_a, "shape"_a, "strides"_a, "dtype"_a, "writable"_a);
  m.def("geometry", &geometry, "shape"_a, "strides"_a, "reduce_axes"_a, "param_axes"_a);
  m.def("isa", &normkit::isa);
  m.def("isas", &normkit::isas);
  m.attr("cuda") = normkit::cuda::build();
  m.attr("no_cuda") = NORMKIT_NO_CUDA;  // why there is none
  m.def("cuda_available", &normkit::cuda::available);
  m.def("on_device", &device::run_call, "arrays"_a, "device"_a, "stream"_a, "function"_a, "arguments"_a);
  m.def("use_isa", &normkit::use_isa, "name"_a);
  m.def("num_threads", &normkit::num_threads);
  m.def("cache_limit", &output_cache::limit);
  m.def("set_cache_limit", &output_cache::set_limit, "bytes"_a);
  m.def("cache_held", &output_cache::held);
  m.def("set_num_threads", &normkit::set_num_threads, "n"_a);
}
