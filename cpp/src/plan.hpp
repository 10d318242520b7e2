// From what the caller passed to what a backend runs. The judging of single arguments is arguments.hpp's.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "arguments.hpp"
#include "cpu.hpp"
#include "normkit/normkit.hpp"
#include "operands.hpp"

namespace normkit {

/// How the arrays that a call makes lie in memory. Strides in elements, dense.
struct Shapes {
  Dtype x_dtype = Dtype::float32, out_dtype = Dtype::float32;
  Extents x_shape, out_strides;  // y or dx, and x + residual: the memory order of x
  int ndim = 0;
  Extents stat_shape, stat_strides;
  int stat_ndim = 0;
  struct Param {
    Extents shape, strides;
    int ndim = 0;
    Dtype dtype = Dtype::float32;

    std::span<const std::int64_t> extents() const { return {shape.data(), static_cast<std::size_t>(ndim)}; }
  } dweight, dbias, dslopes;
  bool empty = false;      // x has no elements: nothing to run

  const Param& of(OperandIndex gradient) const {
    return gradient == kDslopes ? dslopes : gradient == kDbias ? dbias : dweight;
  }
  std::span<const std::int64_t> statistics() const { return {stat_shape.data(), static_cast<std::size_t>(stat_ndim)}; }
};

/// An array that the kernels work on in the place of an operand which does not lie as they want it. Its elements are copied from
/// the operand before, or into it afterwards, each rounded once; along axes where the operand repeats itself they are added up. One
/// of a dbias that the plan does not write stands for dy.
struct Temporary {
  OperandIndex operand;
  Dtype dtype;
  int ndim;
  Extents shape, strides;  // dense, in elements
  Extents
      seen_strides;  // of the operand as it is seen in this shape, in elements, 0 where it repeats; of one to be made too
};

/// Arrays that are absent but wanted are described by `shapes`; point() puts all into the job. All but the addresses in the job is
/// a function of what the arrays are, and the same wherever they are.
struct Plan {
  Op op = Op::forward;
  Job job;
  Shapes shapes;
  OperandMask wanted = 0;  // of what it can write
  OperandMask makes = 0;  // that, and where it needs one an array of its own for x + residual
  std::vector<Temporary> temporaries;

  bool writes(OperandIndex k) const { return makes & operand_bit(k); }
};

/// Judges a call, and says how it is done: always, whatever the layout. Throws Error for what is wrong with it. `wanted`: of what
/// it can write.
Plan plan(const Args& args, const Spec& spec, Op op, OperandMask wanted);
void point(Job& job, Op op, const Addresses& at);

}  // namespace normkit
