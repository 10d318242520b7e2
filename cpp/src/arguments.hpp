// What an argument is and what is wrong with it. Every check names the argument, says what it is, and what would be right.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "normkit/normkit.hpp"
#include "operands.hpp"

namespace normkit {

using Extents = std::array<std::int64_t, kMaxAxes>;

[[noreturn]] void type_error(const std::string& message);
[[noreturn]] void value_error(const std::string& message);

/// "(2, 3)", as Python writes a shape.
std::string tuple(std::span<const std::int64_t> values);

/// Throws where an array has more axes than the library takes.
void check_axes(const std::string& name, std::int64_t ndim);
/// An axis that x does not have, of which those from `least` on may be named.
[[noreturn]] void bad_axis(const std::string& name, std::int64_t axis, int least, int ndim);
/// Throws where so many channels do not form so many groups.
void check_groups(std::int64_t num_groups, std::int64_t channels, int ndim);
constexpr AxisMask all_axes(int ndim) { return ndim >= kMaxAxes ? ~AxisMask{0} : axis_bit(ndim) - 1; }

/// What the type of an array's elements is called.
inline std::string_view name_of(const Array& a) { return a.dtype == Dtype::other ? a.other_dtype : name_of(a.dtype); }
/// True where `a` has no elements.
bool is_empty(const Array& a);
bool same_strides(const Array& a, const Array& b);
/// True where `a` lies on its elements with these strides, which count elements; that of an axis with one index is not
/// compared.
bool has_strides(const Array& a, const Extents& strides);
/// Bytes of an element, also of a dtype that kernels do not read: the number in its name counts its bits; without one,
/// an element is taken to have one byte.
std::int64_t element_bytes(const Array& a);
/// True where the address of every element is a multiple of its size.
bool on_elements(const Array& a);
/// Throws where on_elements() is false and the array has elements. On a GPU a kernel that touches such an array fails,
/// and so does everything that comes after it.
void check_on_elements(const std::string& name, const Array& a);

// ---- where arrays lie --------------------------------------------------------------------------------------------

/// The addresses of a call's arrays; null where there is none.
using Addresses = std::array<std::byte*, kOperands>;

/// The bytes [first, last) that an array reaches over, counted from its address, and the bytes of one element.
struct Reach { std::int64_t first = 0, last = 0, element = 1; };

/// Judges where the arrays of a call lie, for calls that differ in nothing but addresses from one that has been judged
/// in full.
class Placement {
 public:
  Placement() = default;
  Placement(const Args& args, Op op);
  /// True where every array lies on its elements, and every array that is written lies apart from the others or is one
  /// that it may be. Where it is false, the call has to be judged in full.
  bool allows(const Addresses& at) const;

 private:
  std::array<Reach, kOperands> reach_;
  std::array<OperandMask, kOperands> same_;  // for each array that is written: those that it need not lie apart from
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
  /// The axes of one of them, or of its gradient.
  AxisMask of(int k) const {
    return k == kSlopes || k == kDslopes ? slope_axes : k == kBias || k == kDbias || k == kDdbias ? bias_axes : axes;
  }
};

/// The axis of x that axis `axis` of a parameter array lies along. The array varies along `axes` of x: it has these
/// axes alone, or `ndim` axes that broadcast against x.
int param_axis(AxisMask axes, int x_ndim, int ndim, int axis);

/// The axes that an absent weight is taken to vary along: the first form of the spec, or the normalized axes.
AxisMask axes_of_absent(const Spec& spec);

/// What an operand of this role has for each statistic, in words.
const char* per_statistic(Role role);

/// Judges all arrays and options, and throws for what is wrong. `wanted`: outputs that may be made, see plan(); `statistics`
/// are the extents of the statistics.
Params judge(const Args& args, const Spec& spec, Op op, OperandMask wanted, Dtype out_dtype,
             std::span<const std::int64_t> statistics);

/// Judges x, the numbers of the spec and whether it goes with x, which have to be right before the statistics have a
/// shape; and that every array is one.
void judge_x(const Args& args, const Spec& spec, Op op);

}  // namespace normkit
