// The functions of normkit.hpp, which pack nothing: a call whose arrays do not lie as the kernels want them is refused.
#include "normkit/normkit.hpp"

#include <algorithm>
#include <bit>
#include <cstring>
#include <string>
#include <vector>

#include "normkit/formula.hpp"
#include "plan.hpp"
#include "views.hpp"

namespace normkit {
namespace {

/// Throws for statistics or parameters that do not lie as the kernels count them: dense, their axes in the order in
/// which they lie in the memory of x.
[[noreturn]] void bad_order(const Array& a, const Temporary& t) {
  const std::string name = kOperandTable[t.operand].name;
  const std::span<const std::int64_t> shape(t.shape.data(), static_cast<std::size_t>(t.ndim));
  if (!std::equal(a.shape.begin(), a.shape.end(), shape.begin(), shape.end()))
    value_error(name + " has shape " + tuple(a.shape) + ", expected " + tuple(shape) + ": repeat it first");
  if (a.dtype != t.dtype) type_error(name + " has dtype " + name_of(a.dtype) + ", expected " + name_of(t.dtype));
  std::vector<std::int64_t> given, expected;
  for (int axis = 0; axis < a.ndim(); ++axis)
    given.push_back(a.stride(axis)), expected.push_back(t.strides[axis] * size_of(t.dtype));
  value_error(name + " has strides " + tuple(given) + ", expected " + tuple(expected) +
              ", aligned: dense, its axes in the order in which they lie in x");
}

[[noreturn]] void bad_layout(const Args& args, const Spec& spec, Op op, OperandMask wanted) {
  Args unmasked = args;
  unmasked.where = {};
  if (args.where.present && plan(unmasked, spec, op, wanted, true).temporaries.empty())
    value_error(
        "where has strides that do not go with those of x, expected one element for each of x: expand it first");
  for (const OperandRow& row : kOperandTable) {
    const Array& a = row.of(args);
    if (row.role == Role::like_x && a.present && (!same_strides(a, args.x) || !on_elements(a)))
      value_error(std::string(row.name) +
                  " has strides that do not go with those of x, expected the same: pack it first");
  }
  value_error("x has strides that the geometry cannot hold, expected dense arrays: pack them first");
}

/// Calls f with the address of each element of an array that has some, and its index along the axis `of`.
template <class F>
void for_each_element(const Array& a, int of, const F& f, int axis = 0, std::int64_t at = 0, std::int64_t index = 0) {
  if (axis == a.ndim()) return f(a.data + at, index);
  for (std::int64_t k = 0; k < a.shape[axis]; ++k)
    for_each_element(a, of, f, axis + 1, at + k * a.stride(axis), axis == of ? k : index);
}

/// An element of running statistics.
double running_at(const Array& a, std::int64_t k) {
  const Dtype seen = compute_dtype(a.dtype);
  double wide = 0;
  float narrow = 0;
  std::byte* const to = reinterpret_cast<std::byte*>(seen == Dtype::float64 ? static_cast<void*>(&wide) : &narrow);
  gather({a.dtype, seen, {{a.shape[0], a.stride(0)}}}, a.data, k, 1, to);
  return seen == Dtype::float64 ? wide : static_cast<double>(narrow);
}

/// Writes what a call gives of no elements: sums are 0, and statistics are those of an empty set, or those that run.
void write_of_nothing(const Args& args, const Spec& spec, Op op) {
  const bool runs = op == Op::forward && !spec.use_input_stats;
  // The axis of the channels, among those that are kept.
  const int channel = runs ? std::popcount(~spec.reduce_axes & all_axes(spec.channel_axis)) : -1;
  const auto statistic = [&](bool is_mean, std::int64_t k) {
    if (runs) return is_mean ? running_at(args.running_mean, k) : rstd_of(running_at(args.running_var, k), spec.eps);
    return is_mean ? 0 : rstd_of(Moments<double>{}, {spec.eps, spec.divides_by_norm});
  };
  for (const OperandRow& row : kOperandTable) {
    const Array& a = row.of(args);
    if (!contains(row.writes, op) || row.role == Role::running || !a.present || is_empty(a)) continue;
    for_each_element(a, channel, [&](std::byte* to, std::int64_t k) {
      const double wide = row.role == Role::statistic ? statistic(row.array == &Args::mean, k) : 0;
      const float narrow = static_cast<float>(wide);
      const bool is_wide = a.dtype == Dtype::float64;  // a half type is that of no statistic: 0
      std::memcpy(to, is_wide ? static_cast<const void*>(&wide) : &narrow, static_cast<std::size_t>(size_of(a.dtype)));
    });
  }
}

void call(const Args& args, const Spec& spec, Op op) {
  OperandMask wanted = 0;
  for (const OperandRow& row : kOperandTable) {
    if (contains(row.writes, op) && row.of(args).present) wanted |= operand_bit(static_cast<int>(&row - kOperandTable));
    const bool is_dparam = row.role == Role::param && contains(row.writes, Op::backward);
    if (is_dparam && row.of(args).present && is_backward(op) && !contains(row.writes, op))
      value_error(std::string(row.name) + " is given, expected None: phases have no such gradient");
  }
  if (args.sum.present && !args.residual.present)
    value_error("residual is None, expected an array like x: sum is x + residual");
  Plan p = plan(args, spec, op, wanted, true);
  if (p.writes(kSum) && !args.sum.present)
    value_error("sum is None, expected an array like x: there is no y of its dtype to hold x + residual");
  for (const Temporary& t : p.temporaries) {
    const Role role = kOperandTable[t.operand].role;
    if (role == Role::x || role == Role::like_x || role == Role::mask) bad_layout(args, spec, op, wanted);
  }
  if (!p.temporaries.empty()) bad_order(kOperandTable[p.temporaries[0].operand].of(args), p.temporaries[0]);
  if (!p.empty) return run(p.job);
  write_of_nothing(args, spec, op);
}

}  // namespace

void forward(const Args& args, const Spec& spec) { call(args, spec, Op::forward); }
void moments(const Args& args, const Spec& spec) { call(args, spec, Op::moments); }
void apply(const Args& args, const Spec& spec) { call(args, spec, Op::apply); }
void backward(const Args& args, const Spec& spec) { call(args, spec, Op::backward); }
void backward_sums(const Args& args, const Spec& spec) { call(args, spec, Op::backward_sums); }
void apply_backward(const Args& args, const Spec& spec) { call(args, spec, Op::apply_backward); }
void double_backward(const Args& args, const Spec& spec) { call(args, spec, Op::double_backward); }

}  // namespace normkit
