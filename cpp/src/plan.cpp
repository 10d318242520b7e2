#include "plan.hpp"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "arguments.hpp"

namespace normkit {
namespace {

/// Dense strides over the axes in `axes`, in the order of `order`.
Extents dense_strides(std::span<const std::int64_t> shape, AxisMask axes, const AxisOrder& order) {
  Extents strides;
  for (std::size_t axis = 0; axis < shape.size(); ++axis) strides[axis] = 0;
  std::int64_t next = 1;
  for (int at = order.count - 1; at >= 0; --at)
    if (axes & axis_bit(order.axis[at])) strides[order.axis[at]] = next, next *= shape[order.axis[at]];
  return strides;
}

/// What weight, bias and their gradients share: the axes that they vary along.
struct Params {
  AxisMask axes = 0, bias_axes = 0;  // they differ in axes of extent 1 at most, else `expand`
  bool expand = false;  // weight and bias vary along different axes
};

Params judge_params(const Array& x, const Array& weight, const Array& bias, const Spec& spec) {
  Params params;
  if (weight.present) {
    check_param_dtype("weight", weight, x.dtype);
    params.axes = match_params("weight", weight, x.shape, spec);
  }
  if (bias.present) {
    check_param_dtype("bias", bias, x.dtype);
    params.bias_axes = match_params("bias", bias, x.shape, spec);
    if (!weight.present) params.axes = params.bias_axes;
    AxisMask differ = params.bias_axes ^ params.axes;
    for (int a = 0; a < x.ndim(); ++a)
      if (x.shape[a] == 1) differ &= ~axis_bit(a);
    params.expand = differ != 0;
  }
  return params;
}

bool params_in_order(const Array& weight, const Array& bias, const Shapes& shapes) {
  return (!weight.present || has_strides(weight, shapes.param_strides)) &&
         (!bias.present || has_strides(bias, shapes.bias_strides));
}

/// The strides of a parameter array that lies as the kernels count.
void put_param_strides(const Array& x, const Array& a, const Spec& spec, AxisMask axes, const AxisOrder& order,
                       Extents& out) {
  const Extents strides = dense_strides(x.shape, axes, order);
  for (int axis = 0; axis < a.ndim(); ++axis)
    out[axis] = a.shape[axis] == 1 ? 1 : strides[param_axis(spec, axes, x.ndim(), a.ndim(), axis)];
}

void describe_params(const Array& x, const Array& like, const Spec& spec, AxisMask axes, const AxisOrder& order,
                     Shapes& shapes) {
  if (like.present) {
    shapes.param_ndim = like.ndim();
    std::copy(like.shape.begin(), like.shape.end(), shapes.param_shape.begin());
    return put_param_strides(x, like, spec, axes, order, shapes.param_strides);
  }
  const Extents strides = dense_strides(x.shape, axes, order);
  for (int axis = 0; axis < x.ndim(); ++axis)
    if (axes & axis_bit(axis)) {
      shapes.param_shape[shapes.param_ndim] = x.shape[axis];
      shapes.param_strides[shapes.param_ndim++] = x.shape[axis] == 1 ? 1 : strides[axis];
    }
}

// ---- the whole call ----------------------------------------------------------------------------------------------

/// x as statistics see it: where channels form groups, their axis is two, groups and channels of a group.
struct Blocks {
  Extents shape;
  int ndim;
  AxisMask reduce_axes;
  int axis;                 // the one that is split; -1: none
  std::int64_t group_size;  // channels of a group

  Blocks(const Array& x, const Spec& spec)
      : ndim(x.ndim()),
        reduce_axes(spec.reduce_axes),
        axis(spec.num_groups > 0 ? spec.channel_axis : -1),
        group_size(1) {
    std::copy(x.shape.begin(), x.shape.end(), shape.begin());
    if (axis < 0) return;
    group_size = x.shape[axis] / spec.num_groups;
    for (int a = ndim++; a > axis + 1; --a) shape[a] = shape[a - 1];
    shape[axis] = spec.num_groups, shape[axis + 1] = group_size;
    reduce_axes = split(spec.reduce_axes) | axis_bit(axis + 1);
  }
  std::span<const std::int64_t> extents() const { return {shape.data(), static_cast<std::size_t>(ndim)}; }
  /// A set of axes of x as axes of the blocks.
  AxisMask split(AxisMask axes) const {
    if (axis < 0) return axes;
    const AxisMask below = axis_bit(axis) - 1, both = axis_bit(axis) | axis_bit(axis + 1);
    return (axes & below) | (axes & axis_bit(axis) ? both : 0) | ((axes & ~below & ~axis_bit(axis)) << 1);
  }
  /// Strides of x likewise. Copies as many as there are: whole Extents would cost more than a small call.
  void split(const Extents& strides, Extents& out) const {
    for (int a = 0; a < ndim; ++a) out[a] = strides[axis >= 0 && a > axis ? a - 1 : a];
    if (axis >= 0) out[axis] = strides[axis] * group_size;
  }
};

/// Shapes of outputs and statistics, and whether x has elements at all.
AxisOrder describe(const Array& x, const Blocks& blocks, Shapes& shapes) {
  Extents strides;
  element_strides(x, strides);
  for (int axis = 0; axis < x.ndim(); ++axis) shapes.empty = shapes.empty || x.shape[axis] == 0;
  const AxisOrder order = memory_order(x.shape, std::span(strides.data(), x.shape.size()));
  const AxisMask all = ~AxisMask{0};
  shapes.out_strides = dense_strides(x.shape, all, order);
  for (int axis = 0; axis < x.ndim(); ++axis)
    if (x.shape[axis] == 1) shapes.out_strides[axis] = 1;
  Extents block_strides;
  blocks.split(strides, block_strides);
  const AxisOrder block_order =
      blocks.axis < 0
          ? order
          : memory_order(blocks.extents(), std::span(block_strides.data(), static_cast<std::size_t>(blocks.ndim)));
  const Extents kept = dense_strides(blocks.extents(), ~blocks.reduce_axes, block_order);
  for (int axis = 0; axis < blocks.ndim; ++axis) {
    if (blocks.reduce_axes & axis_bit(axis)) continue;
    shapes.stat_shape[shapes.stat_ndim] = blocks.shape[axis];
    shapes.stat_strides[shapes.stat_ndim++] = blocks.shape[axis] == 1 ? 1 : kept[axis];
  }
  return order;
}

void check_statistic(const char* name, const Array& a, Shapes& shapes, bool wanted) {
  if (!wanted) return;
  if (!a.present) value_error(std::string(name) + " is None, expected an array: one element per statistic");
  check_wide_dtype(name, a);
  check_shape(name, a, shapes.statistics(), ": one element per statistic");
  shapes.repack_stats = shapes.repack_stats || !has_strides(a, shapes.stat_strides);
}

Operand operand_of(const Array& a, const Strides& strides) { return {a.data, a.dtype, strides}; }

bool narrow_pieces(const Geometry& g) { return g.params.stride > 1 && g.params.stride < 8 && g.run > g.params.stride; }

/// True where a mask lies along the columns as they lie, or has one element for all of them.
bool mask_fits_columns(Strides& s, const Geometry& g) {
  if (g.run == 1) s.run = s.lane;
  return s.run == 0 ? s.lane == 0 : s.run == 1 && s.lane == g.run;
}

/// Chooses the traversal; false where neither serves these parameters.
bool choose_traversal(Task& t, int operands, const Layout& layout) {
  const Geometry& g = t.geometry;
  // Short runs leave vectors half empty: reduce across steps instead, where neighbouring columns are contiguous.
  constexpr std::int64_t kShortRun = 64;
  bool lanes = g.steps > 1 && g.run < kShortRun && g.lanes > 1;
  for (int k = 0; k < operands; ++k) lanes = lanes && layout.strides[k].lane == g.run;
  t.traversal = lanes ? Traversal::lanes : Traversal::runs;
  if (lanes && t.where.data && !mask_fits_columns(t.where.strides, g)) return false;
  if (lanes) return constant_in_column(g) || (g.params.stride == 1 && g.params.count % g.columns() == 0);
  return !narrow_pieces(g);
}

/// Where gradients of the parameters are summed; none fits: false.
bool choose_kind(Task& t) {
  const Geometry& g = t.geometry;
  const bool lanes = t.traversal == Traversal::lanes, linear = g.params.stride == 1 && g.params.count > 1;
  if (lanes && constant_in_column(g)) t.kind = ParamKind::column;
  else if (!lanes && constant_in_statistic(g)) t.kind = ParamKind::statistic;
  else if (linear && g.parameters() == g.size()) t.kind = ParamKind::element;
  else if (!lanes && linear && g.steps == 1 && g.params.count == g.run) t.kind = ParamKind::row;
  else if (!lanes && !linear && g.steps == 1 && g.run % g.params.stride == 0) t.kind = ParamKind::piece;
  else return false;
  return true;
}

/// The strides of all operands, in elements, ready for canonicalise().
struct Operands {
  const Blocks& blocks;
  std::array<Extents, kMaxOperands> strides;
  std::array<std::span<const std::int64_t>, kMaxOperands> view;
  std::size_t count = 0;
  int mask = -1;

  explicit Operands(const Blocks& b) : blocks(b) {}
  /// Where `a` is absent, it will have the strides `otherwise`. Returns its index.
  std::size_t add(const Array& a, const Extents& otherwise) {
    Extents elements;
    if (a.present) element_strides(a, elements);
    return put(a.present ? elements : otherwise);
  }
  /// A mask, broadcast against x.
  void add_mask(const Array& where, const Array& x) {
    if (!where.present) return;
    Extents elements;
    const int shift = x.ndim() - where.ndim();
    for (int axis = 0; axis < x.ndim(); ++axis) {
      const bool varies = axis >= shift && where.shape[axis - shift] != 1;
      elements[axis] = varies ? where.stride(axis - shift) : 0;
    }
    mask = static_cast<int>(put(elements));
  }
  std::optional<Layout> canonicalised(AxisMask param_axes) const {
    return canonicalise(blocks.extents(), blocks.reduce_axes, blocks.split(param_axes), {view.data(), count}, mask);
  }

 private:
  std::size_t put(const Extents& elements) {
    blocks.split(elements, strides[count]);
    view[count] = std::span(strides[count].data(), static_cast<std::size_t>(blocks.ndim));
    return count++;
  }
};

/// The strides of a mask among those of a layout.
Operand mask_of(const Array& where, const Operands& operands, const Layout& layout) {
  return operands.mask < 0 ? Operand{} : operand_of(where, layout.strides[static_cast<std::size_t>(operands.mask)]);
}

/// The whole call of forward but for the geometry: what the arrays are and how they may lie over each other.
void check_forward(const ForwardArgs& args, Phase phase, bool keep_sum, Shapes& shapes) {
  const Array &x = args.x, &y = args.y;
  const Dtype like_x = is_floating(x.dtype) ? x.dtype : Dtype::float32;
  shapes.x_dtype = x.dtype;
  shapes.out_dtype = args.y_dtype == Dtype::other ? like_x : args.y_dtype;
  shapes.fits = (shapes.out_dtype == like_x || shapes.out_dtype == compute_dtype(x.dtype));
  shapes.wants_sum = args.residual.present && (keep_sum || shapes.out_dtype != x.dtype || phase == Phase::reduce);
  for (const auto& [name, a] : {std::pair{"mean", &args.mean}, std::pair{"rstd", &args.rstd}})
    if (a->present) check_shape(name, *a, shapes.statistics(), ": one element per statistic");
  if (phase == Phase::reduce && args.moments.present) check_triples("moments", args.moments, shapes.statistics());
  if (args.sum.present) check_like_x("sum", args.sum, x);
  if (!y.present) return;
  check_shape("out", y, x.shape, ", the shape of x");
  check_same_dtype("out", y, shapes.out_dtype, "");
  check_writable("out", y);
  check_apart("out", y, "x", x, true, args.y_is_apart);
  const std::pair<const char*, const Array*> others[] = {
      {"weight", &args.weight},           {"bias", &args.bias},   {"running_mean", &args.running_mean},
      {"running_var", &args.running_var}, {"where", &args.where}, {"residual", &args.residual}};
  for (const auto& [name, a] : others) check_apart("out", y, name, *a, false, false);
  if (phase != Phase::apply) return;
  check_apart("out", y, "mean", args.mean, false, false);
  check_apart("out", y, "rstd", args.rstd, false, false);
}

/// The same of backward.
void check_backward(const BackwardArgs& args, const Spec& spec, Phase phase, Shapes& shapes) {
  check_statistic("mean", args.mean, shapes, spec.centered);
  check_statistic("rstd", args.rstd, shapes, true);
  if (phase == Phase::apply) {
    check_triples("sums", args.sums, shapes.statistics());
    check_counts(args.count, shapes.statistics());
  }
  if (!args.dx.present) return;
  check_shape("out", args.dx, args.x.shape, ", the shape of x");
  check_same_dtype("out", args.dx, args.x.dtype, "");
  check_writable("out", args.dx);
  const std::pair<const char*, const Array*> others[] = {
      {"x", &args.x},       {"dy", &args.dy},      {"weight", &args.weight}, {"bias", &args.bias},
      {"mean", &args.mean}, {"rstd", &args.rstd},  {"where", &args.where},   {"dresidual", &args.dresidual},
      {"sums", &args.sums}, {"count", &args.count}};
  for (int k = 0; k < 10; ++k)
    check_apart("out", args.dx, others[k].first, *others[k].second, k < 2, k < 2 && args.dx_is_apart);
}

/// What both directions hand on from the spec.
void put_spec(Task& t, const Spec& spec, Phase phase) {
  t.phase = phase, t.centered = spec.centered, t.eps = spec.eps, t.activation = spec.activation;
  t.frozen = !spec.use_input_stats;
}

Param param_of(const Array& a, double offset) { return {a.data, a.dtype, offset}; }

Given given_of(const Array& mean, const Array& rstd, const Geometry& g) {
  return {mean.data, rstd.data, mean.dtype, rstd.dtype, 1, g.statistics(), false};
}

Running running_of(const ForwardArgs& args, const Spec& spec, const AxisOrder& order) {
  const Array &mean = args.running_mean, &var = args.running_var;
  const std::int64_t count = args.x.shape[spec.channel_axis];
  const Extents kept = dense_strides(args.x.shape, ~spec.reduce_axes, order);
  return {mean.data,
          var.data,
          mean.dtype,
          var.dtype,
          mean.stride(0),
          var.stride(0),
          count == 1 ? 1 : kept[spec.channel_axis],
          count,
          spec.momentum};
}

bool statistics_in_order(const Array& mean, const Array& rstd, const Shapes& shapes) {
  return (!mean.present || has_strides(mean, shapes.stat_strides)) &&
         (!rstd.present || has_strides(rstd, shapes.stat_strides));
}

/// Puts the arrays of forward into one geometry; false where none holds them.
bool place_forward(Task& t, const ForwardArgs& args, AxisMask param_axes, const Blocks& blocks, const Shapes& shapes) {
  const Array& x = args.x;
  Operands operands(blocks);
  operands.add(x, shapes.out_strides);
  operands.add(args.y, shapes.out_strides);
  const bool has_sum = args.residual.present && (args.sum.present || shapes.wants_sum);
  const std::size_t residual = args.residual.present ? operands.add(args.residual, shapes.out_strides) : 0;
  const std::size_t sum = has_sum ? operands.add(args.sum, shapes.out_strides) : 0;
  const int dense = static_cast<int>(operands.count);
  if (!t.frozen) operands.add_mask(args.where, x);
  const std::optional<Layout> layout = operands.canonicalised(param_axes);
  // A residual that lies otherwise would change the geometry, and with it the order in which the sum is summed.
  if (!layout || (residual && !same_strides(args.residual, x))) return false;

  t.geometry = layout->geometry;
  t.x = operand_of(x, layout->strides[0]);
  t.y = operand_of(args.y, layout->strides[1]);
  t.y.dtype = shapes.out_dtype;
  t.where = mask_of(args.where, operands, *layout);
  if (residual) {  // x is then what becomes of the two, see point()
    t.source = t.x;
    t.residual = operand_of(args.residual, layout->strides[residual]);
    t.x = sum ? operand_of(args.sum, layout->strides[sum]) : t.y;
    t.x.dtype = x.dtype;
  }
  return choose_traversal(t, dense, *layout);
}

/// The same of backward.
bool place_backward(Task& t, const BackwardArgs& args, AxisMask param_axes, const Blocks& blocks,
                    const Shapes& shapes) {
  Operands operands(blocks);
  operands.add(args.x, shapes.out_strides);
  operands.add(args.dy, shapes.out_strides);
  operands.add(args.dx, shapes.out_strides);
  const std::size_t residual = args.dresidual.present ? operands.add(args.dresidual, shapes.out_strides) : 0;
  const int dense = static_cast<int>(operands.count);
  if (!t.frozen) operands.add_mask(args.where, args.x);
  const std::optional<Layout> layout = operands.canonicalised(param_axes);
  if (!layout) return false;

  t.geometry = layout->geometry;
  t.x = operand_of(args.x, layout->strides[0]);
  t.dy = operand_of(args.dy, layout->strides[1]);
  t.dx = operand_of(args.dx, layout->strides[2]);
  t.dx.dtype = args.x.dtype;
  if (residual) t.residual = operand_of(args.dresidual, layout->strides[residual]);
  t.where = mask_of(args.where, operands, *layout);
  return choose_traversal(t, dense, *layout);
}

std::byte* data_of(const Array& a) { return a.present ? a.data : nullptr; }

ForwardData data_of(const ForwardArgs& a) {
  return {data_of(a.x),           data_of(a.y),        data_of(a.weight), data_of(a.bias),  data_of(a.running_mean),
          data_of(a.running_var), data_of(a.residual), data_of(a.sum),    data_of(a.where), data_of(a.mean),
          data_of(a.rstd),        data_of(a.moments)};
}

BackwardData data_of(const BackwardArgs& a) {
  return {data_of(a.dy),     data_of(a.x),       data_of(a.dx),    data_of(a.mean),      data_of(a.rstd),
          data_of(a.weight), data_of(a.bias),    data_of(a.where), data_of(a.dresidual), data_of(a.sums),
          data_of(a.count),  data_of(a.dweight), data_of(a.dbias)};
}

}  // namespace

ForwardPlan plan_forward(const ForwardArgs& args, const Spec& spec, Phase phase, bool keep_sum) {
  ForwardPlan plan;
  Shapes& shapes = plan.shapes;
  const Array& x = args.x;
  check_data_dtype("x", x, true);
  check_spec(spec, x);
  const Params params = judge_params(x, args.weight, args.bias, spec);
  if (phase == Phase::both) check_running(args.running_mean, args.running_var, x, spec);
  check_residual(args);
  check_where(args.where, x);
  const Blocks blocks(x, spec);
  const AxisOrder order = describe(x, blocks, shapes);
  if (phase == Phase::apply) {
    check_statistic("mean", args.mean, shapes, spec.centered);
    check_statistic("rstd", args.rstd, shapes, true);
  }
  check_forward(args, phase, keep_sum, shapes);
  if (shapes.empty) {
    shapes.fits = true;
    return plan;
  }
  describe_params(x, args.weight, spec, params.axes, order, shapes);
  if (args.bias.present) put_param_strides(x, args.bias, spec, params.bias_axes, order, shapes.bias_strides);
  shapes.fits = shapes.fits && on_elements(x) && (!args.y.present || on_elements(args.y)) && !params.expand &&
                (!args.residual.present || on_elements(args.residual)) && (!args.sum.present || on_elements(args.sum));
  if (!shapes.fits) return plan;

  Task& t = plan.job.task;
  put_spec(t, spec, phase);
  shapes.fits = place_forward(t, args, params.axes, blocks, shapes);
  if (!shapes.fits) return plan;
  shapes.repack_params = !params_in_order(args.weight, args.bias, shapes);
  shapes.repack_stats = !statistics_in_order(args.mean, args.rstd, shapes);
  t.weight = param_of(args.weight, spec.weight_offset), t.bias = param_of(args.bias, 0);
  if (phase == Phase::apply) t.given = given_of(args.mean, args.rstd, t.geometry);
  if (phase == Phase::both && args.running_mean.present) plan.job.running = running_of(args, spec, order);
  point(plan.job, data_of(args));
  return plan;
}

void point(ForwardJob& job, const ForwardData& data) {
  Task& t = job.task;
  t.x.data = data.x, t.y.data = data.y;
  if (data.residual) {  // the sum is written where x will be read: into `sum`, or into y itself
    t.source.data = data.x, t.residual.data = data.residual;
    t.x.data = data.sum ? data.sum : data.y;
  }
  t.weight.data = data.weight, t.bias.data = data.bias;
  t.where.data = t.frozen ? nullptr : data.where;
  if (t.phase == Phase::both) job.running.mean = data.running_mean, job.running.var = data.running_var;
  if (t.phase == Phase::apply) t.given.mean = t.centered ? data.mean : nullptr, t.given.scale = data.rstd;
  else t.mean = data.mean, t.rstd = data.rstd;
  if (t.phase == Phase::reduce) t.moments = reinterpret_cast<double*>(data.moments);
  job.threads = num_threads();
}

BackwardPlan plan_backward(const BackwardArgs& args, const Spec& spec, BackwardNeed need, Phase phase) {
  BackwardPlan plan;
  plan.need = need;
  Shapes& shapes = plan.shapes;
  const Array& x = args.x;
  shapes.x_dtype = x.dtype;
  shapes.param_dtype = args.weight.present ? args.weight.dtype : compute_dtype(x.dtype);
  check_data_dtype("x", x, false);
  check_spec(spec, x);
  check_same_dtype("dy", args.dy, x.dtype, ", the dtype of x");
  check_shape("dy", args.dy, x.shape, ", the shape of x");
  check_like_x("dresidual", args.dresidual, x);
  check_where(args.where, x);
  // Without an activation the bias has no part in the gradient.
  const Array bias = spec.activation.kind == ActivationKind::none ? Array{} : args.bias;
  Params params = judge_params(x, args.weight, args.bias, spec);
  params.expand = params.expand && bias.present;
  const Blocks blocks(x, spec);
  const AxisOrder order = describe(x, blocks, shapes);
  check_backward(args, spec, phase, shapes);
  // Without weights, gradients belong to what weights would be: the first form, or the normalized axes.
  const bool wants_params = need.dweight || need.dbias;
  if (!args.weight.present && (wants_params || !bias.present)) {
    params.axes = spec.param_forms ? spec.param_axes[0] : spec.reduce_axes;
    params.expand = bias.present && params.bias_axes != params.axes;
  }
  describe_params(x, args.weight, spec, params.axes, order, shapes);
  if (args.bias.present) put_param_strides(x, args.bias, spec, params.bias_axes, order, shapes.bias_strides);
  if (shapes.empty) return plan;

  shapes.fits = on_elements(x) && on_elements(args.dy) && (!args.dx.present || on_elements(args.dx)) &&
                (!args.dresidual.present || on_elements(args.dresidual)) && !params.expand;
  if (!shapes.fits) return plan;
  Task& t = plan.job.task;
  put_spec(t, spec, phase);
  const AxisMask param_axes = wants_params || args.weight.present || bias.present ? params.axes : 0;
  shapes.fits = place_backward(t, args, param_axes, blocks, shapes) && (!wants_params || choose_kind(t));
  if (!shapes.fits) return plan;
  shapes.repack_params = !params_in_order(args.weight, bias, shapes);
  t.weight = param_of(args.weight, spec.weight_offset), t.bias = param_of(bias, 0);
  t.given = given_of(args.mean, args.rstd, t.geometry);
  plan.job.dweight.dtype = args.dweight.present ? args.dweight.dtype : shapes.param_dtype;
  plan.job.dbias.dtype = args.dbias.present ? args.dbias.dtype : shapes.param_dtype;
  point(plan.job, data_of(args));
  return plan;
}

void point(BackwardJob& job, const BackwardData& data) {
  Task& t = job.task;
  t.x.data = data.x, t.dy.data = data.dy, t.dx.data = data.dx, t.residual.data = data.dresidual;
  t.where.data = t.frozen ? nullptr : data.where;
  t.weight.data = data.weight, t.bias.data = t.activation.kind == ActivationKind::none ? nullptr : data.bias;
  t.given.mean = t.centered ? data.mean : nullptr, t.given.scale = data.rstd;
  t.sums = reinterpret_cast<double*>(data.sums), t.counts = reinterpret_cast<const double*>(data.count);
  job.dweight.data = data.dweight, job.dbias.data = data.dbias;
  job.threads = num_threads();
}

}  // namespace normkit
