// What an argument is and what is wrong with it. Every check names the argument, says what it is, and what would be right.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "normkit/normkit.hpp"
#include "operands.hpp"

namespace normkit {

using Extents = std::array<std::int64_t, kMaxAxes>;

[[noreturn]] void type_error(const std::string& message);
[[noreturn]] void value_error(const std::string& message);

/// "(2, 3)", as Python writes a shape.
std::string tuple(std::span<const std::int64_t> values);

/// Strides in elements.
void element_strides(const Array& a, Extents& out);
bool same_strides(const Array& a, const Array& b);
/// `strides` count elements. True too where an axis has one index, whatever its stride.
bool has_strides(const Array& a, const Extents& strides);
/// Bytes of an element, also of a dtype that kernels do not read: its name has its bits, or it is taken to have one byte.
std::int64_t element_bytes(const Array& a);
/// True where every element lies where one of its size may.
bool on_elements(const Array& a);
/// Throws where that is false: for a GPU, on which whatever touches such an array fails, and all that comes after it.
void check_on_elements(const std::string& name, const Array& a);

// ---- where arrays lie --------------------------------------------------------------------------------------------

/// The addresses of a call's arrays; null where there is none.
using Addresses = std::array<std::byte*, kOperands>;

/// The bytes that an array reaches over, seen from its address, and those of an element.
struct Reach { std::int64_t first = 0, last = 0, element = 1; };

/// What was judged of the addresses of a call's arrays, for like calls whose arrays lie elsewhere.
class Placement {
 public:
  Placement() = default;
  Placement(const Args& args, Op op);
  /// True where all arrays that there are lie on their elements, and those that are written apart from the others or on one that
  /// they may be. Where it is false, they have to be judged.
  bool allows(const Addresses& at) const;

 private:
  std::array<Reach, kOperands> reach_;
  std::array<OperandMask, kOperands> same_;  // for each that is written: those that it may be itself, lying alike
  OperandMask present_ = 0, written_ = 0;
};

// ---- the whole call ----------------------------------------------------------------------------------------------

/// The axes of x that weight, bias and slopes vary along, and their gradients. One that is not there varies along those of another.
struct Params {
  AxisMask axes = 0, bias_axes = 0, slope_axes = 0;
  // In axes that x has more than one index of:
  bool differ = false;  // weight and bias
  bool slopes_repeat = false, slopes_stray = false;  // slopes lack axes of weight, or have others

  Params() = default;
  Params(AxisMask weight, AxisMask bias, AxisMask slopes, const Array& x);
};

/// The axis of x that axis `axis` of a parameter array of `ndim` axes lies along, which varies along `axes`: it has those alone,
/// or broadcasts.
int param_axis(AxisMask axes, int x_ndim, int ndim, int axis);

/// The axes of a weight that is not there: the first form, or the normalized ones.
AxisMask axes_of_absent(const Spec& spec);

/// Judges all arrays and options, and throws for what is wrong. `statistics` are the extents of the statistics.
Params judge(const Args& args, const Spec& spec, Op op, Dtype out_dtype, std::span<const std::int64_t> statistics);

/// Of x and the spec alone: what has to be right before the statistics have a shape.
void judge_x(const Array& x, const Spec& spec, Op op);

}  // namespace normkit
