// Calls of the core by XLA, which runs what JAX has traced: no Python takes part.
#pragma once

#include <nanobind/nanobind.h>

#include "plan.hpp"

namespace xla {

namespace nb = nanobind;

/// A call as numbers, which a handler reads, and the arrays that it wants in the place of operands: what has to be packed,
/// as in the plan of a GPU. `args`, of which the shapes and dtypes count alone, are dense.
///
/// Returns ([number, ...], [(operand, dtype, shape, strides, seen_strides), ...]).
nb::object description(normkit::Args args, const normkit::Spec& spec, normkit::Op op, normkit::OperandMask wanted);

/// The handlers of the CPU and of CUDA, as capsules that jax.ffi.register_ffi_target takes.
///
/// A handler has one attribute: the numbers of a description; how many arguments there are; the operands that arguments
/// and then results stand for. Running statistics are arguments and results in one memory.
nb::object handlers();

}  // namespace xla
