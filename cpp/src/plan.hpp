// From what the caller passed to what a backend runs. The judging of single arguments is arguments.hpp's.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "arguments.hpp"
#include "cpu.hpp"
#include "normkit/normkit.hpp"

namespace normkit {

/// How the arrays of a call must lie in memory. Strides in elements, dense.
struct Shapes {
  Dtype x_dtype = Dtype::float32, out_dtype = Dtype::float32, param_dtype = Dtype::float32;
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

  std::span<const std::int64_t> statistics() const { return {stat_shape.data(), static_cast<std::size_t>(stat_ndim)}; }
};

/// Where the arrays of a call of forward are.
struct ForwardData {
  std::byte *x = nullptr, *y = nullptr, *weight = nullptr, *bias = nullptr, *running_mean = nullptr,
            *running_var = nullptr, *residual = nullptr, *sum = nullptr, *where = nullptr, *mean = nullptr,
            *rstd = nullptr, *moments = nullptr;
};

/// Arrays of `args` that are absent but wanted are described by `shapes`; point() puts them into the job. All but the
/// addresses in the job is a function of what the arrays are, and the same wherever they are.
struct ForwardPlan {
  ForwardJob job;
  Shapes shapes;
};

/// The same of backward.
struct BackwardData {
  std::byte *dy = nullptr, *x = nullptr, *dx = nullptr, *mean = nullptr, *rstd = nullptr, *weight = nullptr,
            *bias = nullptr, *where = nullptr, *dresidual = nullptr, *sums = nullptr, *count = nullptr,
            *dweight = nullptr, *dbias = nullptr;
};
struct BackwardNeed { bool dx = true, dweight = true, dbias = true; };
struct BackwardPlan {
  BackwardJob job;
  Shapes shapes;
  BackwardNeed need;
};

/// `keep_sum`: x + residual gets an array of its own.
ForwardPlan plan_forward(const ForwardArgs& args, const Spec& spec, Phase phase = Phase::both, bool keep_sum = false);
void point(ForwardJob& job, const ForwardData& data);
BackwardPlan plan_backward(const BackwardArgs& args, const Spec& spec, BackwardNeed need, Phase phase = Phase::both);
void point(BackwardJob& job, const BackwardData& data);

}  // namespace normkit
