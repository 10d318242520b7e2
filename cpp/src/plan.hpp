// From what the caller passed to what a backend runs. The only place that judges input and throws for it.
#pragma once

#include <array>
#include <cstdint>
#include <span>

#include "cpu.hpp"
#include "normkit/normkit.hpp"

namespace normkit {

using Extents = std::array<std::int64_t, kMaxAxes>;

/// How the arrays of a call must lie in memory. Strides in elements, dense.
struct Shapes {
  Dtype out_dtype = Dtype::float32;
  Extents out_strides;    // y or dx, where the caller did not pass one: the memory order of x
  Extents stat_shape, stat_strides;
  int stat_ndim = 0;
  Extents param_shape, param_strides;  // dweight, dbias; weight where `repack_params`
  Extents bias_strides;                // bias where `repack_params`: it may have more axes, of extent 1
  int param_ndim = 0;
  bool empty = false;          // x has no elements: nothing to run
  bool repack_params = false;  // weight or bias must be copied into param_strides first
  bool repack_stats = false;   // mean or rstd must be copied into stat_strides first
  bool wants_sum = false;      // x + residual needs an array of its own
  bool fits = true;            // false: the geometry cannot hold the arrays, pack x (and dy) and expand parameters
};

/// Arrays of `args` that are absent but wanted are described by `shapes` and put into the job afterwards.
struct ForwardPlan {
  ForwardJob job;
  Shapes shapes;
};
struct BackwardPlan {
  BackwardJob job;
  Shapes shapes;
};

struct BackwardNeed { bool dx = true, dweight = true, dbias = true; };

ForwardPlan plan_forward(const ForwardArgs& args, const Spec& spec, Phase phase = Phase::both);
BackwardPlan plan_backward(const BackwardArgs& args, const Spec& spec, BackwardNeed need, Phase phase = Phase::both);

/// True where the memory between the first and the last byte of both overlaps, and they are not one and the same view.
bool may_overlap(const Array& a, const Array& b);

}  // namespace normkit
