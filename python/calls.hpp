// Calls of the core from Python: the one path of both directions and their phases.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <memory>

#include "function.hpp"

namespace calls {

namespace nb = nanobind;

/// Makes a function whose signature is that of `python`. `op`: "forward", "moments", ..., which it does; `kind`: one of
/// options.hpp's kinds; `fixed`: options that the signature does not have, and their values.
nb::object function(nb::handle type, nb::handle python, const char* op, const char* kind, nb::dict fixed);

/// Takes arrays of one library and device, by name. Returns them as the arrays that Python code computes with, of NumPy
/// or of a GPU, and the object of _memory.py or _cuda.py that makes arrays of that library of such arrays.
nb::object views(nb::kwargs arrays);

/// Has every call from here on planned anew, also where it is like an earlier one.
void forget_plans();

}  // namespace calls
