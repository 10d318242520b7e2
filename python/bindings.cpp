// The module, and its functions that are no calls of the core: calls.cpp has these.
#include <nanobind/nanobind.h>
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
#include "cuda.hpp"
#include "function.hpp"
#include "memory.hpp"
#include "normkit/formula.hpp"
#include "options.hpp"
#include "output_cache.hpp"
#include "plan.hpp"
#include "xla.hpp"

namespace nb = nanobind;
using namespace nb::literals;
using arrays::as_array;
using normkit::Error;

namespace {

// ---- moments -----------------------------------------------------------------------------------------------------

constexpr int kNumbers = normkit::kMomentDoubles<double>;

/// Merges two arrays of moments, dense and of one shape, into a new one. `twofold`: their means are two numbers.
nb::object merge_moments(nb::handle a, nb::handle b, bool twofold) {
  const nb::object result = nb::handle(a).attr("copy")();
  const npy_intp n = PyArray_SIZE(as_array(a)) / kNumbers;
  normkit::merge_moments(static_cast<double*>(PyArray_DATA(as_array(result))),
                         static_cast<const double*>(PyArray_DATA(as_array(b))), n,
                         twofold ? normkit::Dtype::float64 : normkit::Dtype::float32);
  return result;
}

/// sqrt(var + eps) of each of an array of moments, or, where `inverse` is true, 1 / sqrt(var + eps).
nb::object deviation_of_moments(nb::handle moments, nb::handle eps, bool inverse) {
  const double value = options::number("eps", eps, "a number that is at least 0");
  if (!(value >= 0) || std::isinf(value))
    throw Error(Error::Kind::value,
                std::string("eps is ") + nb::repr(eps).c_str() + ", expected a finite number that is at least 0");
  PyArrayObject* from = as_array(moments);
  PyObject* result = PyArray_SimpleNew(PyArray_NDIM(from) - 1, PyArray_DIMS(from), NPY_DOUBLE);
  if (!result) throw nb::python_error();
  const double* m = static_cast<const double*>(PyArray_DATA(from));
  double* deviation = static_cast<double*>(PyArray_DATA(as_array(result)));
  for (npy_intp k = 0; k < PyArray_SIZE(from) / kNumbers; ++k, m += kNumbers)
    deviation[k] = inverse ? normkit::rstd_of(normkit::moments_at<double>(m), {value})
                           : std::sqrt(m[1] / (m[2] == 0 ? 1 : m[2]) + value);
  return nb::steal(result);
}

// ---- for tests ---------------------------------------------------------------------------------------------------

nb::object geometry(const std::vector<std::int64_t>& shape, const std::vector<std::int64_t>& strides,
                    const std::vector<std::int64_t>& reduce_axes, const std::vector<std::int64_t>& param_axes) {
  const auto mask = [](const std::vector<std::int64_t>& axes) {
    normkit::AxisMask bits = 0;
    for (const std::int64_t axis : axes) bits |= normkit::axis_bit(static_cast<int>(axis));
    return bits;
  };
  normkit::Layout layout;
  if (!normkit::canonicalise(shape, mask(reduce_axes), normkit::memory_order(shape, strides), layout) ||
      !normkit::place_params(shape, mask(param_axes), layout))
    return nb::none();
  std::optional<normkit::Strides> lying = normkit::strides_in(layout, shape, strides);
  for (int split = 1; !lying && normkit::split_lanes(shape, split, layout); ++split)
    lying = normkit::strides_in(layout, shape, strides);
  if (!lying || lying->run != 1) return nb::none();
  const normkit::Geometry& g = layout.geometry;
  nb::dict d;
  d["outer"] = g.outer, d["steps"] = g.steps, d["lanes"] = g.lanes, d["run"] = g.run;
  d["param_outer"] = g.params.outer, d["param_stride"] = g.params.stride, d["param_count"] = g.params.count;
  d["outer_stride"] = lying->outer, d["step_stride"] = lying->step, d["lane_stride"] = lying->lane;
  return d;
}

void refuse(const char* why) { normkit::type_error(why); }

/// A function whose Errors are those of Python. nanobind could translate them, but by copies of std::exception_ptr, for which g++ 11 and
/// later want a newer library than that beside glibc 2.28.
template <class Result, class... Arguments> auto raising(Result (*f)(Arguments...)) {
  return [f](Arguments... arguments) -> Result {
    try {
      return f(arguments...);
    } catch (const Error&) {
      function::set_error();
      throw nb::python_error();
    }
  };
}

}  // namespace

/// The function by whose name threadpoolctl knows the library.
extern "C" [[gnu::visibility("default")]] int normkit_num_threads() { return normkit::num_threads(); }

NB_MODULE(_core, m) {
  if (_import_array() < 0) throw nb::python_error();
  m.doc() = "The compiled half of normkit. Private: call the functions of normkit itself.";
  m.attr("version") = NORMKIT_VERSION;
  m.def("function", [type = function::new_type()](nb::handle python, const char* op, const char* kind, nb::dict fixed) {
    return calls::function(type, python, op, kind, fixed);
  }, "python"_a, "op"_a, "kind"_a, "fixed"_a);
  m.def("refuse", raising(&refuse), "why"_a);
  nb::list operands;
  for (const normkit::OperandRow& row : normkit::kOperandTable) operands.append(row.name);
  m.attr("operands") = nb::tuple(operands);
  m.attr("xla_handlers") = xla::handlers();
  m.def("is_number", &arrays::is_number, "value"_a.none());
  m.def("views", raising(&calls::views), "arrays"_a);
  m.def("forget_plans", &calls::forget_plans);
  m.def("merge_moments", &merge_moments, "a"_a, "b"_a, "twofold"_a);
  m.def("deviation_of_moments", raising(&deviation_of_moments), "moments"_a, "eps"_a.none(), "inverse"_a);
  m.def("to_dlpack", raising(&arrays::to_dlpack), "array"_a);
  m.def("geometry", &geometry, "shape"_a, "strides"_a, "reduce_axes"_a, "param_axes"_a);
  m.def("isa", &normkit::isa);
  m.def("isas", &normkit::isas);
  m.attr("cuda") = normkit::cuda::build();
  m.attr("no_cuda") = NORMKIT_NO_CUDA;  // why there is none
  m.def("cuda_available", &normkit::cuda::available);
  m.def("use_isa", &normkit::use_isa, "name"_a);
  m.def("num_threads", &normkit::num_threads);
  m.def("cache_limit", &output_cache::limit);
  m.def("set_cache_limit", &output_cache::set_limit, "bytes"_a);
  m.def("cache_held", &output_cache::held);
  m.def("set_num_threads", &normkit::set_num_threads, "n"_a);
  m.def("follow_threads_of", &memory::follow_threads_of, "variable"_a);
}
