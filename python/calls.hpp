// Calls of the core from Python: the one path of both directions and their phases.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <memory>

#include "function.hpp"

namespace calls {

namespace nb = nanobind;

/// What a function with this name in `function` does: "forward", "moments", ...; of a kind of options.hpp. `fixed`: options that it
/// does not have, and their values.
nb::object function(nb::handle type, nb::handle python, const char* op, const char* kind, nb::dict fixed);

/// Arrays of one library and device, by name, as those that Python code computes with: of NumPy, or of a GPU. And what makes
/// arrays of that library of them.
nb::object views(nb::kwargs arrays);

/// Calls that are like earlier ones are planned anew from here on.
void forget_plans();

}  // namespace calls
