#include "arguments.hpp"

#include <algorithm>
#include <bit>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <iterator>
#include <limits>
#include <vector>

namespace normkit {

void type_error(const std::string& message) { throw Error(Error::Kind::type, message); }
void value_error(const std::string& message) { throw Error(Error::Kind::value, message); }

// ---- words -------------------------------------------------------------------------------------------------------

std::string tuple(std::span<const std::int64_t> values) {
  std::string text = "(";
  for (std::size_t k = 0; k < values.size(); ++k) text += (k ? ", " : "") + std::to_string(values[k]);
  return text + (values.size() == 1 ? ",)" : ")");
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
  char digits[32];
  std::snprintf(digits, sizeof digits, "%g", v);
  const std::string text = digits;
  return text.find_first_of(".e") == std::string::npos ? text + ".0" : text;
}

std::vector<std::int64_t> extents_of(std::span<const std::int64_t> shape, AxisMask axes) {
  std::vector<std::int64_t> extents;
  for (std::size_t a = 0; a < shape.size(); ++a)
    if (axes & axis_bit(static_cast<int>(a))) extents.push_back(shape[a]);
  return extents;
}

bool equal(std::span<const std::int64_t> a, std::span<const std::int64_t> b) {
  return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin());
}

// ---- one array ---------------------------------------------------------------------------------------------------

[[noreturn]] void bad_dtype(const std::string& name, const Array& a, const std::string& expected) {
  const std::string given(name_of(a));
  const bool swapped = (given.starts_with('>') || given.starts_with('<')) && given.find_first_of("fiu") == 1;
  type_error(name + " has dtype " + given + ", expected " + (swapped ? "native byte order" : expected));
}

/// True where `a` has a floating type or integers, also where kernels do not read the type.
bool is_real(const Array& a) {
  const std::string_view name = name_of(a);
  const bool swapped = name.starts_with('>') && name.find_first_of("fiu") == 1;
  return swapped || name.starts_with("float") || name.starts_with("int") || name.starts_with("uint");
}

void check_dtype(const std::string& name, const Array& a, Dtype expected, const char* because) {
  if (a.dtype != expected) bad_dtype(name, a, std::string(name_of(expected)) + because);
}

void check_floating(const std::string& name, const Array& a) {
  if (!is_floating(a.dtype)) bad_dtype(name, a, "float32, float64, float16 or bfloat16");
}

/// Throws where the dtype of `a` is neither float32 nor float64, nor `narrow`, if that is a half type.
void check_wide_dtype(const std::string& name, const Array& a, Dtype narrow = Dtype::other) {
  const bool has_narrow = narrow == Dtype::float16 || narrow == Dtype::bfloat16;
  if (a.dtype == Dtype::float32 || a.dtype == Dtype::float64 || (has_narrow && a.dtype == narrow)) return;
  bad_dtype(
      name, a,
      has_narrow ? std::string("float32, float64 or ") + name_of(narrow) + ", the dtype of x" : "float32 or float64");
}

void check_shape(const std::string& name, const Array& a, std::span<const std::int64_t> expected, const char* because) {
  if (!equal(a.shape, expected))
    value_error(name + " has shape " + tuple(a.shape) + ", expected " + tuple(expected) + because);
}

/// True where each axis, from the fastest on, steps over all that the faster ones reach, so that no two elements share
/// memory. Slices, transposes and diagonals of a dense array lie so. Windows over it do not; of what else as_strided()
/// makes, some is refused that has distinct elements: to find out is to solve an integer program.
bool are_distinct(const Array& a) {
  Extents strides;
  for (int axis = 0; axis < a.ndim(); ++axis) strides[axis] = a.stride(axis);
  const AxisOrder order = memory_order(a.shape, std::span(strides.data(), a.shape.size()));
  std::int64_t reach = element_bytes(a);
  for (int at = order.count - 1; at >= 0; --at) {
    const std::int64_t step = std::abs(strides[order.axis[at]]);
    if (step < reach) return false;
    reach += step * (a.shape[order.axis[at]] - 1);
  }
  return true;
}

void check_writable(const std::string& name, const Array& a) {
  if (a.read_only) value_error(name + " is read-only, expected a writable array");
  if (!is_empty(a) && !are_distinct(a)) value_error(name + " has elements that share memory, expected distinct ones");
}

/// Throws for what no array can be, whatever the call. Callers of C++ make views of anything.
void check_array(const std::string& name, const Array& a) {
  check_axes(name, a.ndim());
  if (!a.strides.empty() && a.strides.size() != a.shape.size())
    value_error(name + " has strides " + tuple(a.strides) + ", expected " + std::to_string(a.ndim()) +
                ": one for each axis");
  for (const std::int64_t extent : a.shape)
    if (extent < 0) value_error(name + " has shape " + tuple(a.shape) + ", expected extents that are at least 0");
  if (!a.data && !is_empty(a)) value_error(name + " has no memory, expected an array that holds its elements");
}

}  // namespace

void check_axes(const std::string& name, std::int64_t ndim) {
  if (ndim < 0 || ndim > kMaxAxes)
    value_error(name + " has " + std::to_string(ndim) + " axes, expected at most " + std::to_string(kMaxAxes));
}

void bad_axis(const std::string& name, std::int64_t axis, int least, int ndim) {
  const std::string given = name + " is " + std::to_string(axis) + ", expected ";
  const std::string range = std::to_string(least) + " to " + std::to_string(ndim - 1);
  throw Error(Error::Kind::axis, given + (ndim == 0 ? "no axis" : range) + ": x has " + std::to_string(ndim) +
                                     (ndim == 1 ? " axis" : " axes"));
}

void check_groups(std::int64_t num_groups, std::int64_t channels, int ndim) {
  if (ndim == kMaxAxes) value_error("x has 64 axes, expected at most 63: groups are an axis more");
  if (num_groups < 1 || channels % num_groups != 0)
    value_error("num_groups is " + std::to_string(num_groups) + ", expected a divisor of " + std::to_string(channels) +
                ", the channels of x");
}

bool is_empty(const Array& a) { return std::find(a.shape.begin(), a.shape.end(), 0) != a.shape.end(); }

bool same_strides(const Array& a, const Array& b) {
  for (int axis = 0; axis < a.ndim(); ++axis)
    if (a.shape[axis] > 1 && a.stride(axis) != b.stride(axis)) return false;
  return true;
}

std::int64_t element_bytes(const Array& a) {
  if (a.dtype != Dtype::other) return size_of(a.dtype);
  const std::size_t digits = std::min(a.other_dtype.find_first_of("0123456789"), a.other_dtype.size());
  int bits = 0;
  std::from_chars(a.other_dtype.data() + digits, a.other_dtype.data() + a.other_dtype.size(), bits);
  return std::max(bits / 8, 1);
}

namespace {

bool begins_on(const Array& a, std::int64_t bytes) {
  return reinterpret_cast<std::uintptr_t>(a.data) % static_cast<std::uintptr_t>(bytes) == 0;
}

bool steps_by(const Array& a, std::int64_t bytes) {
  bool whole = true;
  for (int axis = 0; axis < a.ndim(); ++axis) whole = whole && (a.shape[axis] < 2 || a.stride(axis) % bytes == 0);
  return whole;
}

}  // namespace

bool on_elements(const Array& a) {
  const std::int64_t size = element_bytes(a);
  return begins_on(a, size) && steps_by(a, size);
}

void check_on_elements(const std::string& name, const Array& a) {
  if (on_elements(a) || is_empty(a)) return;
  const std::int64_t size = element_bytes(a);
  const std::string dtype(name_of(a));
  char address[2 * sizeof a.data + 1] = {};
  std::to_chars(std::begin(address), std::end(address), reinterpret_cast<std::uintptr_t>(a.data), 16);
  if (!begins_on(a, size))
    value_error(name + " is at address 0x" + address + ", expected a multiple of " + std::to_string(size) +
                ": a GPU has " + dtype + " nowhere else");
  value_error(name + " has strides " + tuple(a.strides) + " in bytes, expected multiples of " + std::to_string(size) +
              ": a GPU has " + dtype + " nowhere else");
}

bool has_strides(const Array& a, const Extents& strides) {
  for (int axis = 0; axis < a.ndim(); ++axis)
    if (a.shape[axis] > 1 && a.stride(axis) != strides[axis] * size_of(a.dtype)) return false;
  return reinterpret_cast<std::uintptr_t>(a.data) % static_cast<std::uintptr_t>(size_of(a.dtype)) == 0;
}

// ---- where arrays lie --------------------------------------------------------------------------------------------

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

bool lie_alike(const Array& a, const Array& b) {
  return a.dtype == b.dtype && equal(a.shape, b.shape) && same_strides(a, b);
}

/// True where a call that writes `written` must not find it over `other`. Running statistics are written when all else has been
/// read.
bool must_lie_apart(int written, int other, Op op) {
  const OperandRow &w = kOperandTable[written], &o = kOperandTable[other];
  if (other == written || !contains(w.writes, op)) return false;
  if (contains(o.writes, op)) return other < written;  // each pair once
  return contains(o.reads, op) && w.role != Role::running;
}

/// A row of the table, with the name that callers know it by.
OperandRow row_of(int operand, const Spec& spec) {
  OperandRow row = kOperandTable[operand];
  if (operand == kRstd && spec.divides_by_norm) row.name = "rnorm";
  return row;
}

void check_apart(const Args& args, const Spec& spec, Op op, int written, int other) {
  const OperandRow w = row_of(written, spec), o = row_of(other, spec);
  const Array &a = w.of(args), &b = o.of(args);
  if (!must_lie_apart(written, other, op) || !b.present || a.dtype == Dtype::other || b.dtype == Dtype::other) return;
  const Reach p = reach_of(a), q = reach_of(b);
  if (p.first == p.last || q.first == q.last || !overlap(a.data, p, b.data, q)) return;
  const bool may_be = w.may_be & operand_bit(other);
  if ((may_be && a.data == b.data && lie_alike(a, b)) || (args.share_elements && !args.share_elements(a, b))) return;
  value_error(std::string(w.name) + " overlaps " + o.name + ", expected " +
              (may_be ? std::string(o.name) + " itself or memory apart" : "memory apart"));
}

}  // namespace

Placement::Placement(const Args& args, Op op) {
  for (int k = 0; k < kOperands; ++k) {
    const Array& a = kOperandTable[k].of(args);
    if (!a.present) continue;
    present_ |= operand_bit(k), reach_[k] = reach_of(a), same_[k] = 0;
    if (!contains(kOperandTable[k].writes, op)) continue;
    written_ |= operand_bit(k);
    for (int other = 0; other < kOperands; ++other) {
      const Array& b = kOperandTable[other].of(args);
      const bool may_be = kOperandTable[k].may_be & operand_bit(other);
      if (!must_lie_apart(k, other, op) || (may_be && b.present && lie_alike(a, b))) same_[k] |= operand_bit(other);
    }
  }
}

bool Placement::allows(const Addresses& at) const {
  for (OperandMask left = present_; left; left &= left - 1) {
    const int k = std::countr_zero(left);
    if (reinterpret_cast<std::uintptr_t>(at[k]) & static_cast<std::uintptr_t>(reach_[k].element - 1)) return false;
  }
  for (OperandMask written = written_; written; written &= written - 1) {
    const int k = std::countr_zero(written);
    for (OperandMask left = present_ & ~operand_bit(k); left; left &= left - 1) {
      const int other = std::countr_zero(left);
      if (!overlap(at[k], reach_[k], at[other], reach_[other])) continue;
      if (!(same_[k] & operand_bit(other)) || (kOperandTable[k].may_be & operand_bit(other) && at[k] != at[other]))
        return false;
    }
  }
  return true;
}

// ---- parameters --------------------------------------------------------------------------------------------------

namespace {

/// The axes of x along which an array varies that broadcasts against x.
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

/// True where an array has the extents of x along `axes`, and broadcasts along the others by ones.
bool lies_along(const Array& a, std::span<const std::int64_t> x, AxisMask axes) {
  const int shift = static_cast<int>(x.size()) - a.ndim();
  int found = 0;
  for (int axis = 0; axis < a.ndim(); ++axis) {
    const bool is_one_of = shift >= 0 && axes & axis_bit(shift + axis);
    if (shift < 0 || a.shape[axis] != (is_one_of ? x[shift + axis] : 1)) return false;
    found += is_one_of;
  }
  return found == std::popcount(axes);
}

/// The axes of x that weight, bias or slopes vary along: the shape is their extents, or these among ones. `one_for_all`: one element
/// may stand for all.
AxisMask match_params(const char* name, const Array& a, std::span<const std::int64_t> x, const Spec& spec,
                      bool one_for_all) {
  if (spec.param_forms == 0) return broadcast_axes(name, a, x);
  if (one_for_all && lies_along(a, x, 0)) return 0;
  std::vector<std::string> expected;
  for (int form = 0; form < spec.param_forms; ++form) {
    const std::vector<std::int64_t> extents = extents_of(x, spec.param_axes[form]);
    if (equal(a.shape, extents) || lies_along(a, x, spec.param_axes[form])) return spec.param_axes[form];
    if (expected.empty() || expected.back() != tuple(extents)) expected.push_back(tuple(extents));
  }
  value_error(std::string(name) + " has shape " + tuple(a.shape) + ", expected " + alternatives(expected) + ": " +
              spec.param_meaning + (one_for_all ? ", or one for all" : ""));
}

Params judge_params(const Args& args, const Spec& spec) {
  const Array& x = args.x;
  AxisMask axes[3] = {};
  for (const int k : {kWeight, kBias, kSlopes}) {
    const OperandRow& row = kOperandTable[k];
    const Array& a = row.of(args);
    if (!a.present) continue;
    check_wide_dtype(row.name, a, x.dtype);
    axes[k - kWeight] = match_params(row.name, a, x.shape, spec, k == kSlopes);
  }
  const AxisMask any = axes[args.weight.present ? 0 : args.bias.present ? 1 : 2];
  return {any, args.bias.present ? axes[1] : any, args.slopes.present ? axes[2] : any, x};
}

}  // namespace

Params::Params(AxisMask weight, AxisMask bias, AxisMask slopes, const Array& x)
    : axes(weight), bias_axes(bias), slope_axes(slopes) {
  AxisMask many = 0;
  for (int a = 0; a < x.ndim(); ++a)
    if (x.shape[a] != 1) many |= axis_bit(a);
  differ = many & (weight ^ bias), slopes_repeat = many & weight & ~slopes, slopes_stray = many & slopes & ~weight;
}

AxisMask axes_of_absent(const Spec& spec) { return spec.param_forms ? spec.param_axes[0] : spec.reduce_axes; }

const char* per_statistic(Role role) {
  const int numbers = numbers_of(role);
  return numbers == 3   ? "three numbers per statistic"
         : numbers == 4 ? "four numbers per statistic"
                        : "one element per statistic";
}

int param_axis(AxisMask axes, int x_ndim, int ndim, int axis) {
  if (std::popcount(axes) != ndim) return x_ndim - ndim + axis;
  for (int a = 0, seen = 0; a < x_ndim; ++a)
    if ((axes & axis_bit(a)) && seen++ == axis) return a;
  return 0;
}

// ---- the whole call ----------------------------------------------------------------------------------------------

namespace {

[[noreturn]] void is_missing(const OperandRow& row) {
  const bool is_like_x = row.role == Role::like_x;
  value_error(std::string(row.name) + " is None, expected an array" +
              (is_like_x ? std::string(" like x") : std::string(": ") + per_statistic(row.role)));
}

/// Throws where the axes of the spec are none of x, or not what they should be of it.
void check_axes_of(const Args& args, const Spec& spec, Op op) {
  const Array& x = args.x;
  if (spec.param_forms < 0 || spec.param_forms > static_cast<int>(spec.param_axes.size()))
    value_error("param_forms is " + std::to_string(spec.param_forms) + ", expected 0 to 3");
  for (int form = -1; form < spec.param_forms; ++form) {
    const AxisMask beyond = (form < 0 ? spec.reduce_axes : spec.param_axes[form]) & ~all_axes(x.ndim());
    if (beyond)
      bad_axis(form < 0 ? "an axis of reduce_axes" : "an axis of param_axes", std::countr_zero(beyond), 0, x.ndim());
  }
  const bool has_running = op == Op::forward && args.running_mean.present;
  if (spec.num_groups <= 0 && !has_running) return;
  if (spec.channel_axis < 0 || spec.channel_axis >= x.ndim()) bad_axis("channel_axis", spec.channel_axis, 0, x.ndim());
  if (spec.reduce_axes & axis_bit(spec.channel_axis))
    value_error("channel_axis is " + std::to_string(spec.channel_axis) +
                ", expected an axis that is not in reduce_axes");
  if (spec.num_groups <= 0) return;
  check_groups(spec.num_groups, x.shape[spec.channel_axis], x.ndim());
  if (has_running) value_error("running_mean is given, expected None: groups of channels have no running statistics");
}

void check_running(const Args& args, const Spec& spec) {
  const Array &mean = args.running_mean, &var = args.running_var, &x = args.x;
  if (mean.present != var.present)
    value_error(mean.present ? "running_var is None, expected an array like running_mean"
                             : "running_mean is None, expected an array like running_var");
  if (!mean.present && !spec.use_input_stats)
    value_error(std::string(spec.frozen_by) + " is False, expected running_mean and running_var to normalize with");
  if (!mean.present) return;
  const std::int64_t channels[] = {x.shape[spec.channel_axis]};
  for (const int k : {kRunningMean, kRunningVar}) {
    const OperandRow& row = kOperandTable[k];
    check_floating(row.name, row.of(args));
    check_shape(row.name, row.of(args), channels, ": one element per channel of x");
    if (spec.use_input_stats) check_writable(row.name, row.of(args));
  }
  std::int64_t members = 1;
  for (int axis = 0; axis < x.ndim(); ++axis)
    if (spec.reduce_axes & axis_bit(axis)) members *= x.shape[axis];
  if (spec.use_input_stats && members == 1)
    value_error("x has 1 member per statistic, expected at least 2: running_var takes an unbiased variance");
}

/// Throws where an operand that is there has not the shape or the dtype that its role asks for.
void check(const OperandRow& row, const Args& args, const Spec& spec, Op op, Dtype out_dtype,
           std::span<const std::int64_t> statistics) {
  const Array &a = row.of(args), &x = args.x;
  const bool written = contains(row.writes, op);
  switch (row.role) {
    case Role::like_x:
      check_shape(row.name, a, x.shape, ", the shape of x");
      if (row.array == &Args::out) check_dtype(row.name, a, out_dtype, "");
      else check_dtype(row.name, a, x.dtype, ", the dtype of x");
      break;
    case Role::mask:
      if (a.dtype != Dtype::boolean) bad_dtype(row.name, a, "bool");
      broadcast_axes(row.name, a, x.shape);
      break;
    case Role::statistic:
      if (written) check_dtype(row.name, a, compute_dtype(x.dtype), "");
      else check_wide_dtype(row.name, a);
      if (written || a.ndim() > 0) check_shape(row.name, a, statistics, ": one element per statistic");
      break;
    case Role::count:
      if (!is_real(a)) bad_dtype(row.name, a, "float64");
      if (a.ndim() > 0) check_shape(row.name, a, statistics, ": one element per statistic");
      break;
    case Role::sums:
    case Role::moments: {
      check_dtype(row.name, a, Dtype::float64, "");
      std::vector<std::int64_t> expected(statistics.begin(), statistics.end());
      expected.push_back(numbers_of(row.role));
      check_shape(row.name, a, expected, std::string(": ").append(per_statistic(row.role)).c_str());
      break;
    }
    case Role::param: {
      const bool is_second = row.array == &Args::ddweight || row.array == &Args::ddbias;
      if (!written && !is_second) break;  // judged with the axes that they vary along
      is_second ? check_wide_dtype(row.name, a, x.dtype) : check_floating(row.name, a);
      const bool is_of_bias = (row.array == &Args::dbias || row.array == &Args::ddbias) && args.bias.present,
                 is_of_slopes = row.array == &Args::dslopes;
      const Array& like = is_of_slopes ? args.slopes : is_of_bias ? args.bias : args.weight;
      const std::vector<std::int64_t> absent = extents_of(x.shape, axes_of_absent(spec));
      check_shape(row.name, a, like.present ? like.shape : absent,
                  is_of_slopes   ? ", the shape of slopes"
                  : is_of_bias   ? ": the shape of bias"
                  : like.present ? ": the shape of weight"
                                 : ": the shape of dweight");
      break;
    }
    default: break;
  }
}

}  // namespace

void judge_x(const Args& args, const Spec& spec, Op op) {
  const Array& x = args.x;
  if (!x.present) value_error("x is None, expected an array");
  for (const OperandRow& row : kOperandTable)
    if (row.of(args).present && row.is_used(op)) check_array(row.name, row.of(args));
  if (x.dtype == Dtype::other || (is_backward(op) && !is_floating(x.dtype)))
    bad_dtype("x", x,
              is_backward(op) ? "float32, float64, float16 or bfloat16"
                              : "float32, float64, float16, bfloat16, bool or an integer of 8 to 64 bits");
  if (args.out_dtype != Dtype::other && !is_floating(args.out_dtype))
    type_error(std::string("out_dtype is ") + name_of(args.out_dtype) +
               ", expected float32, float64, float16 or bfloat16");
  check_axes_of(args, spec, op);
  if (spec.reduce_axes == 0 && spec.num_groups == 0)
    value_error("x has shape " + tuple(x.shape) + ", expected at least 3 axes: images, channels and space");
  if (!(spec.eps >= 0) || std::isinf(spec.eps))
    value_error("eps is " + number(spec.eps) + ", expected a finite number that is at least 0");
  const double least = compute_dtype(x.dtype) == Dtype::float64 ? std::numeric_limits<double>::min()
                                                                : double{std::numeric_limits<float>::min()};
  if (spec.divides_by_norm && spec.eps > 0 && spec.eps < least)
    value_error("eps is " + number(spec.eps) + ", expected 0 or at least " + number(least) +
                ": 1 / eps is to be finite");
  if (!(spec.momentum >= 0 && spec.momentum <= 1))
    value_error("momentum is " + number(spec.momentum) + ", expected a number from 0 to 1");
  if (!std::isfinite(spec.weight_offset))
    value_error("weight_offset is " + number(spec.weight_offset) + ", expected a finite number");
  if (spec.activation.kind == ActivationKind::negative_part)
    value_error("activation is negative_part, expected another: there is nothing that it makes of x");
  if (!std::isfinite(spec.activation.parameter))
    value_error("activation has parameter " + number(spec.activation.parameter) + ", expected a finite number");
}

Params judge(const Args& args, const Spec& spec, Op op, OperandMask wanted, Dtype out_dtype,
             std::span<const std::int64_t> statistics) {
  const bool has_slopes = spec.activation.kind == ActivationKind::prelu;
  if (op == Op::double_backward && has_slopes)
    value_error("activation is prelu, expected another: what slopes would be given is not computed");
  if (has_slopes && !args.slopes.present)
    value_error("slopes is None, expected an array: the slope of prelu below zero for each parameter, or one for all");
  for (const int k : {kSlopes, kDslopes})
    if (!has_slopes && kOperandTable[k].of(args).present)
      value_error(std::string(kOperandTable[k].name) + " is given, expected None: the activation is not prelu");
  if (op == Op::double_backward && !args.ddx.present && !args.ddweight.present && !args.ddbias.present)
    value_error("ddx, ddweight and ddbias are None, expected an array for at least one of them");
  if (op == Op::double_backward && args.dbias.present && spec.activation.kind == ActivationKind::none)
    value_error("dbias is given, expected None: without an activation nothing depends on bias");
  const Params params = judge_params(args, spec);
  if (op == Op::forward) check_running(args, spec);
  if (args.residual.present && !is_floating(args.x.dtype))
    bad_dtype("x", args.x, "float32, float64, float16 or bfloat16 with a residual to add");
  for (int k = 0; k < kOperands; ++k) {
    const OperandRow row = row_of(k, spec);
    const bool read = contains(row.reads, op), is_mean = k == kMean || k == kMeanLow;
    const bool is_there = row.of(args).present || wanted & operand_bit(k);
    if (!is_there && contains(row.needs, op) && (spec.centered || !is_mean)) is_missing(row);
    if (!row.of(args).present || !row.is_used(op)) continue;
    if (!is_mean || spec.centered || !read) check(row, args, spec, op, out_dtype, statistics);
  }
  for (int k = 0; k < kOperands; ++k) {
    const OperandRow& row = kOperandTable[k];
    if (!row.of(args).present || !contains(row.writes, op)) continue;
    if (row.role == Role::running && !spec.use_input_stats) continue;
    if (row.role != Role::running) check_writable(row.name, row.of(args));
    for (int other = 0; other < kOperands; ++other) check_apart(args, spec, op, k, other);
  }
  return params;
}

}  // namespace normkit
