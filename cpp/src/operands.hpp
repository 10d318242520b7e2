// The arrays that calls work on, as one table. Checks, strides, addresses, plans and messages are loops over its rows; an array
// option is a row here, the signatures that have it, and the kernels that use it.
#pragma once

#include <cstdint>
#include <type_traits>

#include "backend.hpp"
#include "normkit/normkit.hpp"

namespace normkit {

/// What a call does: a direction, as a whole or one of its two phases; or the gradient of a backward.
enum class Op : std::uint8_t { forward, moments, apply, backward, backward_sums, apply_backward, double_backward };

constexpr bool is_backward(Op op) { return op >= Op::backward; }
constexpr Phase phase_of(Op op) { return static_cast<Phase>(static_cast<int>(op) % 3); }

/// A set of operations, one bit each.
using Ops = std::uint8_t;
template <class... Op> constexpr Ops ops(Op... of) { return static_cast<Ops>((0 | ... | (1 << static_cast<int>(of)))); }
constexpr bool contains(Ops set, Op op) { return set >> static_cast<int>(op) & 1; }

inline constexpr Ops kForward = ops(Op::forward, Op::moments, Op::apply);
inline constexpr Ops kBackward = ops(Op::backward, Op::backward_sums, Op::apply_backward);
inline constexpr Ops kDouble = ops(Op::double_backward);
inline constexpr Ops kGiven = ops(Op::apply) | kBackward | kDouble;  // statistics are given
/// What these calls are for is `out`.
inline constexpr Ops kOutputs = ops(Op::forward, Op::apply, Op::apply_backward) | kDouble;

enum OperandIndex : std::uint8_t {
  // clang-format off
  kX, kDy, kWeight, kBias, kSlopes, kRunningMean, kRunningVar, kResidual, kDresidual, kWhere, kDdx, kDdweight, kDdbias, kMean,
  kRstd, kMeanLow, kSums, kCount, kOut, kSum, kMoments, kDweight, kDbias, kDslopes, kDdy, kOperands
  // clang-format on
};

using OperandMask = std::uint32_t;
constexpr OperandMask operand_bit(int operand) { return OperandMask{1} << operand; }

/// What an operand is to x. Its shape, its dtype and how it lies follow from that.
enum class Role : std::uint8_t {
  x,
  like_x,  // the shape of x
  param,  // weight, bias, slopes and their gradients
  running,  // one element for each channel, read and written
  mask,  // broadcasts against x
  statistic,  // one element for each statistic; read, one may stand for all
  count,  // one element of float64 for each statistic: its members
  sums,  // three elements of float64 for each statistic
  moments,  // four
};

/// Elements that an operand has for each statistic along an axis of its own, which is its last; 0: it has no such axis.
constexpr int numbers_of(Role role) { return role == Role::sums ? 3 : role == Role::moments ? 4 : 0; }
/// True where there is something for each statistic.
constexpr bool is_of_statistics(Role role) { return role >= Role::statistic; }

struct OperandRow {
  const char* name;
  Array Args::* array;
  Role role;
  Ops reads, writes;
  Ops needs = 0;  // calls in which it must be there
  OperandMask may_be = 0;  // written elementwise, it may be one of these itself; it lies apart from all others

  const Array& of(const Args& args) const { return args.*array; }
  Array& of(Args& args) const { return args.*array; }
  constexpr bool is_used(Op op) const { return contains(reads, op) || contains(writes, op); }
};

inline constexpr OperandRow kOperandTable[] = {
    // clang-format off
    {"x", &Args::x, Role::x, kForward | kBackward | kDouble, 0, kForward | kBackward | kDouble},
    {"dy", &Args::dy, Role::like_x, kBackward | kDouble, 0, kBackward | kDouble},
    {"weight", &Args::weight, Role::param, ops(Op::forward, Op::apply) | kBackward | kDouble, 0},
    {"bias", &Args::bias, Role::param, ops(Op::forward, Op::apply) | kBackward | kDouble, 0},
    {"slopes", &Args::slopes, Role::param, ops(Op::forward, Op::apply) | kBackward | kDouble, 0},  // kDouble refuses it
    {"running_mean", &Args::running_mean, Role::running, ops(Op::forward), ops(Op::forward)},
    {"running_var", &Args::running_var, Role::running, ops(Op::forward), ops(Op::forward)},
    {"residual", &Args::residual, Role::like_x, ops(Op::forward, Op::moments), 0},
    {"dresidual", &Args::dresidual, Role::like_x, ops(Op::backward, Op::apply_backward), 0},
    {"where", &Args::where, Role::mask, kForward | kBackward | kDouble, 0},
    {"ddx", &Args::ddx, Role::like_x, kDouble, 0},
    {"ddweight", &Args::ddweight, Role::param, kDouble, 0},
    {"ddbias", &Args::ddbias, Role::param, kDouble, 0},
    {"mean", &Args::mean, Role::statistic, kGiven, ops(Op::forward, Op::moments), kGiven},  // needed where it is read
    {"rstd", &Args::rstd, Role::statistic, kGiven, ops(Op::forward, Op::moments), kGiven},
    {"mean_low", &Args::mean_low, Role::statistic, ops(Op::apply), 0},
    {"sums", &Args::sums, Role::sums, ops(Op::apply_backward), ops(Op::backward_sums),
     ops(Op::apply_backward, Op::backward_sums)},
    {"count", &Args::count, Role::count, ops(Op::apply_backward), 0, ops(Op::apply_backward)},
    {"out", &Args::out, Role::like_x, 0, kOutputs | ops(Op::backward), kOutputs, operand_bit(kX) | operand_bit(kDy)},
    {"sum", &Args::sum, Role::like_x, 0, ops(Op::forward, Op::moments), 0, operand_bit(kX) | operand_bit(kResidual)},
    {"moments", &Args::moments, Role::moments, 0, ops(Op::moments), ops(Op::moments)},
    {"dweight", &Args::dweight, Role::param, 0, ops(Op::backward) | kDouble},
    {"dbias", &Args::dbias, Role::param, 0, ops(Op::backward) | kDouble},
    {"dslopes", &Args::dslopes, Role::param, 0, ops(Op::backward)},
    {"d_dy", &Args::d_dy, Role::like_x, 0, kDouble, kDouble},
    // clang-format on
};
static_assert(std::size(kOperandTable) == kOperands);

}  // namespace normkit
