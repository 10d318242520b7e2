#include "arguments.hpp"

#include <algorithm>
#include <cmath>
#include <sstream>
#include <utility>
#include <vector>

namespace normkit {

void fail(Error::Kind kind, const std::string& message) { throw Error(kind, message); }
void type_error(const std::string& message) { fail(Error::Kind::type, message); }
void value_error(const std::string& message) { fail(Error::Kind::value, message); }

// ---- words -------------------------------------------------------------------------------------------------------

std::string tuple(std::span<const std::int64_t> values) {
  std::ostringstream text;
  text << '(';
  for (std::size_t k = 0; k < values.size(); ++k) text << (k ? ", " : "") << values[k];
  text << (values.size() == 1 ? ",)" : ")");
  return text.str();
}

namespace {

/// "a", "a or b", "a, b or c".
std::string alternatives(const std::vector<std::string>& words) {
  std::string text;
  for (std::size_t k = 0; k < words.size(); ++k)
    text += (k == 0 ? "" : k + 1 == words.size() ? " or " : ", ") + words[k];
  return text;
}

std::string number(double v) {
  if (std::isnan(v)) return "nan";
  if (std::isinf(v)) return v < 0 ? "-inf" : "inf";
  std::ostringstream text;
  text << v;
  return text.str().find_first_of(".e") == std::string::npos ? text.str() + ".0" : text.str();
}

std::vector<std::int64_t> extents_of(std::span<const std::int64_t> shape, AxisMask axes) {
  std::vector<std::int64_t> extents;
  for (std::size_t a = 0; a < shape.size(); ++a)
    if (axes & axis_bit(static_cast<int>(a))) extents.push_back(shape[a]);
  return extents;
}

}  // namespace

// ---- one array ---------------------------------------------------------------------------------------------------

namespace {

std::string dtype_name(const Array& a) {
  return a.dtype == Dtype::other ? std::string(a.other_dtype) : name_of(a.dtype);
}

[[noreturn]] void bad_dtype(const char* name, const Array& a, const std::string& expected) {
  const std::string given = dtype_name(a);
  const bool swapped = !given.empty() && (given[0] == '>' || given[0] == '<');
  type_error(std::string(name) + " has dtype " + given + ", expected " + (swapped ? "native byte order" : expected));
}

}  // namespace

void check_data_dtype(const char* name, const Array& a, bool integers) {
  if (a.dtype >= Dtype::boolean || !(integers || is_floating(a.dtype)))
    bad_dtype(name, a,
              integers ? "float32, float64, float16, bfloat16, uint8, int8, uint16 or int16"
                       : "float32, float64, float16 or bfloat16");
}

void check_same_dtype(const char* name, const Array& a, Dtype expected, const char* because) {
  if (a.dtype != expected) bad_dtype(name, a, std::string(name_of(expected)) + because);
}

void check_wide_dtype(const char* name, const Array& a) {
  if (a.dtype != Dtype::float32 && a.dtype != Dtype::float64) bad_dtype(name, a, "float32 or float64");
}

void check_param_dtype(const char* name, const Array& a, Dtype x) {
  const bool narrow = x == Dtype::float16 || x == Dtype::bfloat16;
  if (a.dtype == Dtype::float32 || a.dtype == Dtype::float64 || (narrow && a.dtype == x)) return;
  bad_dtype(name, a,
            narrow ? std::string("float32, float64 or ") + name_of(x) + ", the dtype of x" : "float32 or float64");
}

namespace {

bool equal(std::span<const std::int64_t> a, std::span<const std::int64_t> b) {
  return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin());
}

}  // namespace

void check_shape(const char* name, const Array& a, std::span<const std::int64_t> expected, const char* because) {
  if (!equal(a.shape, expected))
    value_error(std::string(name) + " has shape " + tuple(a.shape) + ", expected " + tuple(expected) + because);
}

void check_writable(const char* name, const Array& a) {
  if (a.read_only) value_error(std::string(name) + " is read-only, expected a writable array");
  for (const std::int64_t extent : a.shape)
    if (extent == 0) return;
  for (int axis = 0; axis < a.ndim(); ++axis)
    if (a.shape[axis] > 1 && a.stride(axis) == 0)
      value_error(std::string(name) + " has elements that share memory, expected distinct ones");
}

namespace {

Reach reach_of(const Array& a) {
  Reach r{0, size_of(a.dtype), size_of(a.dtype)};
  for (int axis = 0; axis < a.ndim(); ++axis) {
    if (a.shape[axis] == 0) return {0, 0, r.element};
    const std::int64_t reach = a.stride(axis) * (a.shape[axis] - 1);
    (reach < 0 ? r.first : r.last) += reach;
  }
  return r;
}

bool overlap(const std::byte* a, const Reach& p, const std::byte* b, const Reach& q) {
  return a + p.first < b + q.last && b + q.first < a + p.last;
}

}  // namespace

bool same_strides(const Array& a, const Array& b) {
  for (int axis = 0; axis < a.ndim(); ++axis)
    if (a.shape[axis] > 1 && a.stride(axis) != b.stride(axis)) return false;
  return true;
}

namespace {

bool same_view(const Array& a, const Array& b) {
  return a.data == b.data && a.dtype == b.dtype && equal(a.shape, b.shape) && same_strides(a, b);
}

bool bounds_overlap(const Array& a, const Array& b) {
  const Reach p = reach_of(a), q = reach_of(b);
  return p.first != p.last && q.first != q.last && overlap(a.data, p, b.data, q);
}

}  // namespace

void check_apart(const char* name, const Array& out, const char* other_name, const Array& other, bool may_be_same,
                 bool known_apart) {
  if (!other.present || other.dtype == Dtype::other || known_apart || !bounds_overlap(out, other)) return;
  if (may_be_same && same_view(out, other)) return;
  value_error(std::string(name) + " overlaps " + other_name + ", expected " +
              (may_be_same ? std::string(other_name) + " itself or memory apart" : "memory apart"));
}

bool on_elements(const Array& a) {
  const std::int64_t size = size_of(a.dtype);
  bool aligned = reinterpret_cast<std::uintptr_t>(a.data) % static_cast<std::uintptr_t>(size) == 0;
  for (int axis = 0; axis < a.ndim(); ++axis) aligned = aligned && (a.shape[axis] < 2 || a.stride(axis) % size == 0);
  return aligned;
}

void element_strides(const Array& a, Extents& out) {
  for (int axis = 0; axis < a.ndim(); ++axis) out[axis] = a.stride(axis) / size_of(a.dtype);
}

bool has_strides(const Array& a, const Extents& strides) {
  for (int axis = 0; axis < a.ndim(); ++axis)
    if (a.shape[axis] > 1 && a.stride(axis) != strides[axis] * size_of(a.dtype)) return false;
  return reinterpret_cast<std::uintptr_t>(a.data) % static_cast<std::uintptr_t>(size_of(a.dtype)) == 0;
}

Placement::Placement(std::span<const Array> arrays, int out, std::uint32_t same)
    : count_(static_cast<int>(arrays.size())), out_(out) {
  const Array& y = arrays[out];
  for (int k = 0; k < count_; ++k) {
    reach_[k] = reach_of(arrays[k]);
    const bool alike = y.present && y.dtype == arrays[k].dtype && equal(y.shape, arrays[k].shape);
    if (alike && same_strides(y, arrays[k])) same_ |= same & (1U << k);
  }
}

bool Placement::allows(const std::byte* const* data) const {
  for (int k = 0; k < count_; ++k) {
    if (!data[k]) continue;
    if (reinterpret_cast<std::uintptr_t>(data[k]) & static_cast<std::uintptr_t>(reach_[k].element - 1)) return false;
    if (!data[out_] || k == out_ || !overlap(data[out_], reach_[out_], data[k], reach_[k])) continue;
    if (!(same_ >> k & 1) || data[k] != data[out_]) return false;
  }
  return true;
}

bool may_overlap(const Array& a, const Array& b) { return !same_view(a, b) && bounds_overlap(a, b); }

// ---- parameters --------------------------------------------------------------------------------------------------

namespace {

bool has_extents(std::span<const std::int64_t> shape, std::span<const std::int64_t> x, AxisMask axes) {
  std::size_t seen = 0;
  for (std::size_t a = 0; a < x.size(); ++a)
    if (axes & axis_bit(static_cast<int>(a))) {
      if (seen == shape.size() || shape[seen] != x[a]) return false;
      ++seen;
    }
  return seen == shape.size();
}

/// The axes of x that an array varies along which broadcasts against it.
AxisMask broadcast_axes(const char* name, const Array& a, std::span<const std::int64_t> x) {
  AxisMask axes = 0;
  const int shift = static_cast<int>(x.size()) - a.ndim();
  for (int axis = 0; axis < a.ndim(); ++axis) {
    if (shift < 0 || (a.shape[axis] != 1 && a.shape[axis] != x[shift + axis]))
      value_error(std::string(name) + " has shape " + tuple(a.shape) +
                  ", expected a shape that broadcasts against x: " + tuple(x));
    if (a.shape[axis] != 1) axes |= axis_bit(shift + axis);
  }
  return axes;
}

}  // namespace

AxisMask match_params(const char* name, const Array& a, std::span<const std::int64_t> x, const Spec& spec) {
  if (spec.param_forms == 0) return broadcast_axes(name, a, x);
  for (int form = 0; form < spec.param_forms; ++form)
    if (has_extents(a.shape, x, spec.param_axes[form])) return spec.param_axes[form];
  std::vector<std::string> expected;
  for (int form = 0; form < spec.param_forms; ++form) {
    const std::string text = tuple(extents_of(x, spec.param_axes[form]));
    if (expected.empty() || expected.back() != text) expected.push_back(text);
  }
  value_error(std::string(name) + " has shape " + tuple(a.shape) + ", expected " + alternatives(expected) + ": " +
              spec.param_meaning);
}

int param_axis(const Spec& spec, AxisMask axes, int x_ndim, int ndim, int axis) {
  if (spec.param_forms == 0) return x_ndim - ndim + axis;
  for (int a = 0, seen = 0; a < x_ndim; ++a)
    if ((axes & axis_bit(a)) && seen++ == axis) return a;
  return 0;
}

// ---- options and companions --------------------------------------------------------------------------------------

void check_spec(const Spec& spec, const Array& x) {
  if (spec.reduce_axes == 0 && spec.num_groups == 0)
    value_error("x has shape " + tuple(x.shape) + ", expected at least 3 axes: images, channels and space");
  if (!(spec.eps >= 0) || std::isinf(spec.eps))
    value_error("eps is " + number(spec.eps) + ", expected a finite number that is at least 0");
  if (!(spec.momentum >= 0 && spec.momentum <= 1))
    value_error("momentum is " + number(spec.momentum) + ", expected a number from 0 to 1");
  if (!std::isfinite(spec.weight_offset))
    value_error("weight_offset is " + number(spec.weight_offset) + ", expected a finite number");
  if (!std::isfinite(spec.activation.parameter))
    value_error("activation has parameter " + number(spec.activation.parameter) + ", expected a finite number");
}

void check_where(const Array& where, const Array& x) {
  if (!where.present) return;
  if (where.dtype != Dtype::boolean) bad_dtype("where", where, "bool");
  broadcast_axes("where", where, x.shape);
}

void check_like_x(const char* name, const Array& a, const Array& x) {
  if (!a.present) return;
  check_shape(name, a, x.shape, ", the shape of x");
  check_same_dtype(name, a, x.dtype, ", the dtype of x");
}

void check_residual(const ForwardArgs& args) {
  if (!args.residual.present) return;
  if (!is_floating(args.x.dtype))
    bad_dtype("x", args.x, "float32, float64, float16 or bfloat16 with a residual to add");
  check_like_x("residual", args.residual, args.x);
}

void check_counts(const Array& a, std::span<const std::int64_t> statistics) {
  if (!a.present) value_error("count is None, expected an array: one element per statistic");
  check_same_dtype("count", a, Dtype::float64, "");
  check_shape("count", a, statistics, ": one element per statistic");
}

void check_triples(const char* name, const Array& a, std::span<const std::int64_t> statistics) {
  if (!a.present) value_error(std::string(name) + " is None, expected an array: three numbers per statistic");
  check_same_dtype(name, a, Dtype::float64, "");
  std::vector<std::int64_t> expected(statistics.begin(), statistics.end());
  expected.push_back(3);
  check_shape(name, a, expected, ": three numbers per statistic");
}

void check_running(const Array& mean, const Array& var, const Array& x, const Spec& spec) {
  if (mean.present != var.present)
    value_error(mean.present ? "running_var is None, expected an array like running_mean"
                             : "running_mean is None, expected an array like running_var");
  if (!mean.present) {
    if (!spec.use_input_stats)
      value_error(std::string(spec.frozen_by) + " is False, expected running_mean and running_var to normalize with");
    return;
  }
  const std::int64_t channels[] = {x.shape[spec.channel_axis]};
  for (const auto& [name, a] : {std::pair{"running_mean", &mean}, std::pair{"running_var", &var}}) {
    check_wide_dtype(name, *a);
    check_shape(name, *a, channels, ": one element per channel of x");
    if (spec.use_input_stats) check_writable(name, *a);
  }
  std::int64_t members = 1;
  for (int axis = 0; axis < x.ndim(); ++axis)
    if (spec.reduce_axes & axis_bit(axis)) members *= x.shape[axis];
  if (spec.use_input_stats && members == 1)
    value_error("x has 1 member per statistic, expected at least 2: running_var takes an unbiased variance");
}

}  // namespace normkit
