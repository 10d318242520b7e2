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

struct Row {
  const char* name;
  Slot slot;
  bool is_flag = false;  // True or False
};

inline constexpr Row kTable[] = {
    {"eps", kEps},
    {"momentum", kMomentum},
    {"weight_offset", kWeightOffset},
    {"axis", kAxes},
    {"channel_axis", kAxes},
    {"num_groups", kNumGroups},
    {"activation", kActivation},
    {"out_dtype", kOutDtype},
    {"need", kNeed},
    {"use_input_stats", kUseInputStats, true},
    {"training", kUseInputStats, true},
    {"return_stats", kReturnStats, true},
    {"return_residual", kReturnResidual, true},
    {"center", kCenter, true},
    {"rnorm", static_cast<Slot>(normkit::kRstd)},
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
