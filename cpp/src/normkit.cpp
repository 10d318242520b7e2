// The functions of normkit.hpp, which pack nothing: a call whose arrays do not lie as the kernels want them is refused.
#include "normkit/normkit.hpp"

#include <initializer_list>
#include <memory>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "arguments.hpp"
#include "plan.hpp"

namespace normkit {
namespace {

struct AlignedDelete {
  void operator()(double* p) const { ::operator delete[](p, std::align_val_t{64}); }
};

template <class Job> void run_with_workspace(Job& job) {
  const std::size_t doubles = workspace_doubles(job);
  const std::unique_ptr<double[], AlignedDelete> workspace(
      static_cast<double*>(::operator new[](doubles * sizeof(double) + 64, std::align_val_t{64})));
  run(job, workspace.get());
}

void require_fit(const Shapes& shapes, const Array& x,
                 std::initializer_list<std::pair<const char*, const Array*>> companions) {
  if (shapes.fits) return;
  for (const auto& [name, a] : companions)
    if (a->present && (!same_strides(*a, x) || !on_elements(*a)))
      value_error(std::string(name) + " has strides that do not go with those of x, expected the same: pack it first");
  value_error("x has strides that the geometry cannot hold, expected dense arrays: pack them first");
}

[[noreturn]] void bad_mask() {
  value_error("where has strides that do not go with those of x, expected one element for each of x: expand it first");
}

/// Statistics and parameters lie as the kernels count, dense in the order in which their axes lie in the memory of x.
void require_order(const char* name, const Array& a, const Extents& strides) {
  if (!a.present || has_strides(a, strides)) return;
  std::vector<std::int64_t> given, expected;
  for (int axis = 0; axis < a.ndim(); ++axis) {
    if (a.shape[axis] == 0) return;
    given.push_back(a.stride(axis)), expected.push_back(strides[axis] * size_of(a.dtype));
  }
  value_error(std::string(name) + " has strides " + tuple(given) + ", expected " + tuple(expected) +
              ", aligned: dense, its axes in the order in which they lie in x");
}

/// The same of an output, which is not `input` either.
void require_output(const char* name, const Array& a, const Extents& strides, const char* input_name,
                    const Array& input) {
  if (!a.present) return;
  check_writable(name, a);
  require_order(name, a, strides);
  check_apart(name, a, input_name, input, false, false);
}

/// Three numbers for each statistic.
Extents triple_strides(const Shapes& shapes) {
  Extents strides;
  for (int axis = 0; axis < shapes.stat_ndim; ++axis) strides[axis] = 3 * shapes.stat_strides[axis];
  strides[shapes.stat_ndim] = 1;
  return strides;
}

/// What is summed over no elements at all.
void zero(const Array& a) {
  if (!a.present) return;
  std::int64_t bytes = size_of(a.dtype);
  for (const std::int64_t extent : a.shape) bytes *= extent;
  for (std::int64_t k = 0; k < bytes; ++k) a.data[k] = std::byte{0};
}

void check_outputs(const ForwardArgs& args, const Spec& spec, Phase phase, const Shapes& shapes) {
  if (phase == Phase::apply) {
    if (spec.centered) require_order("mean", args.mean, shapes.stat_strides);
    require_order("rstd", args.rstd, shapes.stat_strides);
  } else {
    require_output("mean", args.mean, shapes.stat_strides, "x", args.x);
    require_output("rstd", args.rstd, shapes.stat_strides, "x", args.x);
  }
  if (phase == Phase::reduce) require_output("moments", args.moments, triple_strides(shapes), "x", args.x);
  if (shapes.wants_sum && !args.sum.present)
    value_error("sum is None, expected an array like x: there is no y of its dtype to hold x + residual");
  if (!args.sum.present) return;
  if (!args.residual.present) value_error("residual is None, expected an array like x: sum is x + residual");
  check_writable("sum", args.sum);
  check_apart("sum", args.sum, "x", args.x, true, false);
  check_apart("sum", args.sum, "residual", args.residual, true, false);
  if (args.y.present) check_apart("sum", args.sum, "out", args.y, false, false);
}

void run_forward(const ForwardArgs& args, Spec spec, Phase phase) {
  if (phase != Phase::reduce && !args.y.present) value_error("out is None, expected an array like x");
  if (phase == Phase::reduce && !args.moments.present)
    value_error("moments is None, expected an array: three numbers per statistic");
  if (phase == Phase::apply) spec.use_input_stats = false;
  else
    for (const auto& [name, a] : {std::pair{"mean", &args.mean}, std::pair{"rstd", &args.rstd}})
      if (a->present) check_same_dtype(name, *a, compute_dtype(args.x.dtype), "");
  ForwardPlan plan = plan_forward(args, spec, phase);
  const Shapes& shapes = plan.shapes;
  check_outputs(args, spec, phase, shapes);
  if (shapes.empty) {
    if (phase == Phase::apply) return;
    return zero(args.mean), zero(args.rstd), zero(args.moments);
  }
  if (!shapes.fits && args.where.present) {
    ForwardArgs unmasked = args;
    unmasked.where = {};
    if (plan_forward(unmasked, spec, phase).shapes.fits) bad_mask();
  }
  require_fit(shapes, args.x, {{"out", &args.y}, {"residual", &args.residual}, {"sum", &args.sum}});
  require_order("weight", args.weight, shapes.param_strides);
  require_order("bias", args.bias, shapes.bias_strides);
  run_with_workspace(plan.job);
}

void run_backward(const BackwardArgs& args, const Spec& spec, Phase phase) {
  const BackwardNeed need{args.dx.present, args.dweight.present, args.dbias.present};
  BackwardPlan plan = plan_backward(args, spec, need, phase);
  const Shapes& shapes = plan.shapes;
  const std::span<const std::int64_t> shape(shapes.param_shape.data(), static_cast<std::size_t>(shapes.param_ndim));
  for (const auto& [name, a] : {std::pair{"dweight", &args.dweight}, std::pair{"dbias", &args.dbias}}) {
    if (!a->present) continue;
    if (phase != Phase::both) value_error(std::string(name) + " is given, expected None: phases have no such gradient");
    check_data_dtype(name, *a, false);
    check_shape(name, *a, shape, ", the shape of weight");
    require_output(name, *a, shapes.param_strides, "x", args.x);
  }
  if (spec.centered) require_order("mean", args.mean, shapes.stat_strides);
  require_order("rstd", args.rstd, shapes.stat_strides);
  if (phase == Phase::reduce) {
    check_triples("sums", args.sums, shapes.statistics());
    require_output("sums", args.sums, triple_strides(shapes), "x", args.x);
    check_apart("sums", args.sums, "dy", args.dy, false, false);
  }
  if (phase == Phase::apply) {
    require_order("sums", args.sums, triple_strides(shapes));
    require_order("count", args.count, shapes.stat_strides);
  }
  if (shapes.empty) {
    if (phase == Phase::reduce) zero(args.sums);
    return zero(args.dweight), zero(args.dbias);
  }
  if (!shapes.fits && args.where.present) {
    BackwardArgs unmasked = args;
    unmasked.where = {};
    if (plan_backward(unmasked, spec, need, phase).shapes.fits) bad_mask();
  }
  require_fit(shapes, args.x, {{"dy", &args.dy}, {"out", &args.dx}, {"dresidual", &args.dresidual}});
  require_order("weight", args.weight, shapes.param_strides);
  if (spec.activation.kind != ActivationKind::none) require_order("bias", args.bias, shapes.bias_strides);
  run_with_workspace(plan.job);
}

}  // namespace

void forward(const ForwardArgs& args, const Spec& spec) { run_forward(args, spec, Phase::both); }
void moments(const ForwardArgs& args, const Spec& spec) { run_forward(args, spec, Phase::reduce); }
void apply(const ForwardArgs& args, const Spec& spec) { run_forward(args, spec, Phase::apply); }

void backward(const BackwardArgs& args, const Spec& spec) { run_backward(args, spec, Phase::both); }
void backward_sums(const BackwardArgs& args, const Spec& spec) { run_backward(args, spec, Phase::reduce); }
void apply_backward(const BackwardArgs& args, const Spec& spec) {
  if (!args.dx.present) value_error("out is None, expected an array like x");
  run_backward(args, spec, Phase::apply);
}

}  // namespace normkit
