// Makes of what the caller passed the plan that a backend runs. arguments.hpp judges the single arguments.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "arguments.hpp"
#include "cpu.hpp"
#include "normkit/normkit.hpp"
#include "operands.hpp"

namespace normkit {

/// A dense array that is to be made. Strides are in elements.
struct Dense {
  Dtype dtype = Dtype::float32;
  int ndim = 0;
  Extents shape, strides;

  std::span<const std::int64_t> extents() const { return {shape.data(), static_cast<std::size_t>(ndim)}; }
};

/// An array that the kernels work on in the place of an operand which does not lie as they want it. Its elements are copied from
/// the operand before, or into it afterwards, each rounded once; along axes where the operand repeats itself they are
/// added up. A temporary of a dbias that the kernels do not write stands for dy, which is added up into dbias.
struct Temporary : Dense {
  OperandIndex operand;
  /// Strides of the operand as it is seen in this shape, in bytes, 0 where it repeats itself; also of one that is yet
  /// to be made.
  Extents seen_strides;
};

/// How a call is done. point() puts the addresses of all arrays into the job. Everything else in a plan follows from what the arrays are, and is the same wherever they lie.
struct Plan {
  Op op = Op::forward;
  bool on_cpu = true;
  bool empty = false;  // x has no elements: nothing to run
  Job job;
  OperandMask wanted = 0;  // what the caller wants, of the operands that `op` can write
  OperandMask makes = 0;  // what the kernels write: `wanted` and, where x + residual needs one, an array for it
  OperandMask gathered = 0;  // operands that have a view
  std::vector<std::pair<OperandIndex, Dense>> outputs;  // as they are made where the caller passes none
  std::vector<Temporary> temporaries;

  bool writes(OperandIndex k) const { return makes & operand_bit(k); }
};

/// Judges a call and says how it is done, whatever the layout of its arrays. Throws Error for what is wrong with the
/// call. `wanted`: what the caller wants, of the operands that `op` can write. `on_cpu`: parts of arrays that do not lie as
/// kernels want them may be gathered as the job is done; a GPU wants them packed whole.
Plan plan(const Args& args, const Spec& spec, Op op, OperandMask wanted, bool on_cpu);
/// Puts the addresses of a call's arrays into its job, and the number of threads.
void point(Job& job, Op op, const Addresses& at);

}  // namespace normkit
