// The options that calls of functional.py and phases.py take beside arrays, as a table, and what they mean.
#pragma once

#include <nanobind/nanobind.h>

#include "operands.hpp"

namespace options {

namespace nb = nanobind;
using normkit::Dtype;

/// The values of a call by slot: first its arrays, see operands.hpp, then these.
enum Slot {
  // clang-format off
  kEps = normkit::kOperands, kMomentum, kWeightOffset, kAxes, kNumGroups, kActivation, kOutDtype, kNeed,
  kUseInputStats, kReturnStats, kReturnResidual, kCenter, kSlots
  // clang-format on
};

/// How a call is told from others by the value of an option: by the number that it is, as an object, or as True or
/// False.
enum class Type { number, object, flag };

struct Row {
  const char* name;
  Slot slot;
  Type type;
};

inline constexpr Row kTable[] = {
    {"eps", kEps, Type::number},
    {"momentum", kMomentum, Type::number},
    {"weight_offset", kWeightOffset, Type::number},
    {"axis", kAxes, Type::number},
    {"channel_axis", kAxes, Type::number},
    {"num_groups", kNumGroups, Type::number},
    {"activation", kActivation, Type::object},
    {"out_dtype", kOutDtype, Type::object},
    {"need", kNeed, Type::object},
    {"use_input_stats", kUseInputStats, Type::flag},
    {"training", kUseInputStats, Type::flag},
    {"return_stats", kReturnStats, Type::flag},
    {"return_residual", kReturnResidual, Type::flag},
    {"center", kCenter, Type::flag},
    {"rnorm", static_cast<Slot>(normkit::kRstd), Type::object},
};

/// The kinds of normalization, by which a Spec is made. functional.py names them so too.
enum Kind { kNormalize, kInstance, kGroup, kBatch, kLayer, kL2 };
inline constexpr const char* kKindNames[] = {"normalize", "instance", "group", "batch", "layer", "l2"};

/// ("prelu", slopes) becomes its name and an array of the call, which is returned: `values` borrow it.
nb::object take_slopes(PyObject** values);

/// The Spec of a call on x, from all options in `values`.
normkit::Spec spec_of(Kind kind, normkit::Op op, PyObject* const* values, const normkit::Array& x);

/// The operands that a call is asked to write, by its options.
normkit::OperandMask wanted_of(normkit::Op op, PyObject* const* values);

/// `expected` says in messages what `h` should have been.
double number(const char* name, nb::handle h, const char* expected);

/// The dtype that `h` stands for: a name, or a dtype of any library. None gives Dtype::other.
Dtype dtype_named(nb::handle h);

}  // namespace options
