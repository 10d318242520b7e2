#include "plan.hpp"

#include <algorithm>
#include <deque>
#include <optional>
#include <tuple>
#include <utility>

namespace normkit {
namespace {

// ---- how arrays lie ----------------------------------------------------------------------------------------------

/// Dense strides over the axes in `axes`, in the order of `order`.
Extents dense_strides(std::span<const std::int64_t> shape, AxisMask axes, const AxisOrder& order) {
  Extents strides;
  for (std::size_t axis = 0; axis < shape.size(); ++axis) strides[axis] = 0;
  std::int64_t next = 1;
  for (int at = order.count - 1; at >= 0; --at)
    if (axes & axis_bit(order.axis[at])) strides[order.axis[at]] = next, next *= shape[order.axis[at]];
  return strides;
}

/// x as statistics see it: where channels form groups, the axis of channels is two axes, groups and channels of a
/// group.
struct Blocks {
  Extents shape;
  int ndim;
  AxisMask reduce_axes;
  int axis;                 // the axis of x that is split in two; -1: none
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
  /// The strides of the blocks, from strides of x. Only as many as there are axes are copied: whole Extents would cost
  /// more than a small call.
  void split(const Extents& strides, Extents& out) const {
    for (int a = 0; a < ndim; ++a) out[a] = strides[axis >= 0 && a > axis ? a - 1 : a];
    if (axis >= 0) out[axis] = strides[axis] * group_size;
  }
};

/// Fills in the shapes of outputs and statistics, and whether x has elements at all. Returns the memory order of x.
AxisOrder describe(const Array& x, const Blocks& blocks, Shapes& shapes) {
  Extents strides;
  element_strides(x, strides);
  const AxisOrder order = memory_order(x.shape, std::span(strides.data(), x.shape.size()));
  shapes.out_strides = dense_strides(x.shape, ~AxisMask{0}, order);
  shapes.ndim = x.ndim(), shapes.empty = false;
  for (int axis = 0; axis < x.ndim(); ++axis) {
    shapes.empty = shapes.empty || x.shape[axis] == 0;
    shapes.x_shape[axis] = x.shape[axis];
    if (x.shape[axis] == 1) shapes.out_strides[axis] = 1;
  }
  Extents block_strides;
  blocks.split(strides, block_strides);
  const AxisOrder block_order =
      blocks.axis < 0
          ? order
          : memory_order(blocks.extents(), std::span(block_strides.data(), static_cast<std::size_t>(blocks.ndim)));
  const Extents kept = dense_strides(blocks.extents(), ~blocks.reduce_axes, block_order);
  shapes.stat_ndim = 0;
  for (int axis = 0; axis < blocks.ndim; ++axis) {
    if (blocks.reduce_axes & axis_bit(axis)) continue;
    shapes.stat_shape[shapes.stat_ndim] = blocks.shape[axis];
    shapes.stat_strides[shapes.stat_ndim++] = blocks.shape[axis] == 1 ? 1 : kept[axis];
  }
  return order;
}

/// Strides in C order.
Extents c_strides(std::span<const std::int64_t> shape) {
  Extents strides;
  std::int64_t next = 1;
  for (std::size_t axis = shape.size(); axis-- > 0; next *= shape[axis]) strides[axis] = next;
  return strides;
}

/// The strides of a parameter array that lies as the kernels count.
void put_param_strides(const Array& x, const Array& a, AxisMask axes, const AxisOrder& order, Extents& out) {
  const Extents strides = dense_strides(x.shape, axes, order);
  for (int axis = 0; axis < a.ndim(); ++axis)
    out[axis] = a.shape[axis] == 1 ? 1 : strides[param_axis(axes, x.ndim(), a.ndim(), axis)];
}

/// Describes the gradient of a parameter that varies along `axes`: it is like `a`, or, where `a` is absent, has the
/// extents of these axes.
void describe_param(const Array& x, const Array& a, AxisMask axes, const AxisOrder& order, Shapes::Param& gradient) {
  gradient.ndim = a.ndim(), gradient.dtype = a.present ? a.dtype : compute_dtype(x.dtype);
  if (a.present) {
    std::copy(a.shape.begin(), a.shape.end(), gradient.shape.begin());
    return put_param_strides(x, a, axes, order, gradient.strides);
  }
  const Extents strides = dense_strides(x.shape, axes, order);
  for (int axis = 0; axis < x.ndim(); ++axis)
    if (axes & axis_bit(axis)) {
      gradient.shape[gradient.ndim] = x.shape[axis];
      gradient.strides[gradient.ndim++] = x.shape[axis] == 1 ? 1 : strides[axis];
    }
}

/// True where kernels can write y as `out`, for an x of dtype `x`.
bool fits(Dtype out, Dtype x) { return out == compute_dtype(x) || (out == x && is_floating(x)); }

// ---- what kernels are told ---------------------------------------------------------------------------------------

bool narrow_pieces(const Geometry& g) { return g.params.stride > 1 && g.params.stride < 8 && g.run > g.params.stride; }

/// True where a mask lies along the columns as x does, or has one element for all columns of a step.
bool mask_fits_columns(Strides& s, const Geometry& g) {
  if (g.run == 1) s.run = s.lane;
  return s.run == 0 ? s.lane == 0 : s.run == 1 && s.lane == g.run;
}

/// Chooses the traversal; false where neither serves these parameters.
bool choose_traversal(Task& t, int operands, const Layout& layout, bool masked) {
  const Geometry& g = t.geometry;
  // Short runs leave vectors half empty: reduce across steps instead, where neighbouring columns are contiguous.
  constexpr std::int64_t kShortRun = 64;
  bool lanes = g.steps > 1 && g.run < kShortRun && g.lanes > 1;
  for (int k = 0; k < operands; ++k) lanes = lanes && layout.strides[k].lane == g.run;
  t.traversal = lanes ? Traversal::lanes : Traversal::runs;
  if (lanes && masked && !mask_fits_columns(t.where.strides, g)) return false;
  if (lanes) return constant_in_column(g) || (g.params.stride == 1 && g.params.count % g.columns() == 0);
  return !narrow_pieces(g);
}

/// Chooses where gradients of the parameters are summed; false where no kind fits.
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
  /// Adds an array, which will have the strides `otherwise` where it is absent. Returns its index.
  std::size_t add(const Array& a, const Extents& otherwise) {
    Extents elements;
    if (a.present) element_strides(a, elements);
    return put(a.present ? elements : otherwise);
  }
  /// Adds a mask as it broadcasts against x, if there is one.
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

/// The strides in bytes of an array that is seen in the shape of x: 0 along axes of x where it repeats itself. `of`
/// maps the axes of the array to axes of x.
template <class AxisOf>
Extents repeated(int x_ndim, std::span<const std::int64_t> shape, const Extents& bytes, AxisOf of) {
  Extents seen;
  for (int axis = 0; axis < x_ndim; ++axis) seen[axis] = 0;
  for (std::size_t axis = 0; axis < shape.size(); ++axis)
    if (shape[axis] != 1) seen[of(static_cast<int>(axis))] = bytes[axis];
  return seen;
}

/// A call as the kernels are to see it: the arrays that the caller passed, or temporaries in the place of some.
struct Seen {
  Args args;
  Spec spec;
  Params params;
  std::vector<Temporary> temporaries = {};
  std::deque<Extents> kept = {};  // strides in bytes of the temporaries: `args` looks into it
  std::deque<Shapes::Param> described = {};  // and their shapes

  /// Puts a temporary that lies with `strides`, in elements, in the place of an operand that is seen with strides
  /// `seen`, in bytes. An operand that lies so already stays.
  void put(OperandIndex k, Dtype dtype, std::span<const std::int64_t> shape, const Extents& strides,
           const Extents& seen) {
    Array& a = args.*kOperandTable[k].array;
    if (a.present && a.dtype == dtype && a.shape.size() == shape.size() && has_strides(a, strides) &&
        std::equal(shape.begin(), shape.end(), a.shape.begin()))
      return;
    Temporary& t = temporaries.emplace_back(Temporary{k, dtype, static_cast<int>(shape.size()), {}, strides, seen});
    std::copy(shape.begin(), shape.end(), t.shape.begin());
    Extents& bytes = kept.emplace_back();
    for (std::size_t axis = 0; axis < shape.size(); ++axis) bytes[axis] = strides[axis] * size_of(dtype);
    a = {nullptr, dtype, true, false, shape, {bytes.data(), shape.size()}, {}};
  }
  void put_like_x(OperandIndex k, Dtype dtype, const Extents& strides, const Extents& otherwise) {
    const Array& a = args.*kOperandTable[k].array;
    Extents seen;
    for (int axis = 0; axis < args.x.ndim(); ++axis)
      seen[axis] = a.present ? a.stride(axis) : otherwise[axis] * size_of(dtype);
    put(k, dtype, args.x.shape, strides, seen);
  }
};

bool bias_counts(const Seen& s, Op op) {
  return s.args.bias.present && (!is_backward(op) || s.spec.activation.kind != ActivationKind::none);
}

/// The arrays that have the shape of x, the first of which decides the order of the axes; an absent one will have the
/// memory order of x.
constexpr OperandIndex kForwardArrays[] = {kX, kOut, kResidual, kSum}, kBackwardArrays[] = {kX, kDy, kOut, kDresidual};
std::span<const OperandIndex, 4> arrays_like_x(Op op) { return is_backward(op) ? kBackwardArrays : kForwardArrays; }

/// Puts the arrays into one geometry; false where no geometry holds them.
bool place(Plan& p, const Seen& seen, AxisMask param_axes, const Blocks& blocks) {
  const Args& args = seen.args;
  const Shapes& shapes = p.shapes;
  Task& t = p.job.task;
  Operands operands(blocks);
  std::array<std::size_t, kOperands> at;
  for (const OperandIndex k : arrays_like_x(p.op)) {
    const Array& a = args.*kOperandTable[k].array;
    if (a.present && !on_elements(a)) return false;
    if (a.present || k == kOut || (k == kSum && p.writes(kSum))) at[k] = operands.add(a, shapes.out_strides);
  }
  const int dense = static_cast<int>(operands.count);
  if (!t.frozen) operands.add_mask(args.where, args.x);
  const std::optional<Layout> layout = operands.canonicalised(param_axes);
  // A residual that lies otherwise would change the geometry, and with it the order in which the sum is summed.
  if (!layout || (args.residual.present && !same_strides(args.residual, args.x))) return false;

  const auto operand = [&](OperandIndex k, Dtype dtype) { return Operand{nullptr, dtype, layout->strides[at[k]]}; };
  const Dtype dtype = args.x.dtype;
  t.geometry = layout->geometry;
  t.x = operand(kX, dtype);
  if (is_backward(p.op)) {
    t.dy = operand(kDy, dtype), t.dx = operand(kOut, dtype);
    if (args.dresidual.present) t.residual = operand(kDresidual, dtype);
  } else {
    t.y = operand(kOut, args.out.present ? args.out.dtype : shapes.out_dtype);
    if (args.residual.present) {  // t.x is then the sum, see point()
      t.source = t.x, t.residual = operand(kResidual, dtype);
      t.x = operand(p.writes(kSum) ? kSum : kOut, dtype);
    }
  }
  if (operands.mask >= 0) t.where = {nullptr, Dtype::boolean, layout->strides[static_cast<std::size_t>(operands.mask)]};
  return choose_traversal(t, dense, *layout, operands.mask >= 0);
}

/// Has statistics and parameters lie in the order in which the kernels count them, which is dense.
void put_in_order(Seen& seen, Op op, const AxisOrder& order, const Shapes& shapes) {
  const Args& args = seen.args;
  for (int k = 0; k < kOperands; ++k) {
    const OperandRow& row = kOperandTable[k];
    const Array& a = args.*row.array;
    if (!a.present || !(contains(row.reads, op) || contains(row.writes, op))) continue;
    Extents strides;
    if (row.role == Role::param) {
      const bool is_of_slopes = k == kSlopes || k == kDslopes;
      if ((k == kBias && !bias_counts(seen, op)) || (is_of_slopes && seen.params.slopes_repeat)) continue;
      const AxisMask axes = is_of_slopes                ? seen.params.slope_axes
                            : k == kBias || k == kDbias ? seen.params.bias_axes
                                                        : seen.params.axes;
      put_param_strides(args.x, a, axes, order, strides);
    } else if (row.role == Role::triples) {
      for (int axis = 0; axis < shapes.stat_ndim; ++axis) strides[axis] = 3 * shapes.stat_strides[axis];
      strides[shapes.stat_ndim] = 1;
    } else if (row.role == Role::statistic || row.role == Role::count) {
      if (k == kMean && !seen.spec.centered) continue;
      strides = shapes.stat_strides;
    } else {
      continue;
    }
    Extents bytes;
    for (int axis = 0; axis < shapes.stat_ndim; ++axis) bytes[axis] = 0;  // a number
    for (int axis = 0; axis < a.ndim(); ++axis) bytes[axis] = a.stride(axis);
    const bool is_one_for_all = a.ndim() == 0 && row.role != Role::param;
    seen.put(static_cast<OperandIndex>(k), row.role == Role::count ? Dtype::float64 : a.dtype,
             is_one_for_all ? shapes.statistics() : a.shape, strides, bytes);
  }
}

/// Slopes that lack axes of weight, and their gradient, have elements for those too.
void repeat_slopes(Seen& seen, Plan& p, const AxisOrder& order) {
  const Array &x = seen.args.x, slopes = seen.args.slopes;
  Shapes::Param& lying = seen.described.emplace_back();
  describe_param(x, {}, seen.params.axes, order, lying);
  const auto put = [&](OperandIndex k, Dtype dtype, auto bytes_of) {
    const auto of = [&](int axis) { return param_axis(seen.params.slope_axes, x.ndim(), slopes.ndim(), axis); };
    Extents bytes, along;
    for (int axis = 0; axis < slopes.ndim(); ++axis) bytes[axis] = bytes_of(axis);
    const Extents all = repeated(x.ndim(), slopes.shape, bytes, of);
    for (int axis = 0, next = 0; axis < x.ndim(); ++axis)
      if (seen.params.axes & axis_bit(axis)) along[next++] = all[axis];
    seen.put(k, dtype, lying.extents(), lying.strides, along);
  };
  put(kSlopes, slopes.dtype, [&](int axis) { return slopes.stride(axis); });
  Shapes::Param& dslopes = p.shapes.dslopes;
  dslopes.strides = c_strides(dslopes.extents());
  if (p.writes(kDslopes))
    put(kDslopes, compute_dtype(x.dtype), [&](int axis) { return dslopes.strides[axis] * size_of(dslopes.dtype); });
}

Running running_of(const Args& args, const Spec& spec, const AxisOrder& order) {
  const Array &mean = args.running_mean, &var = args.running_var;
  const std::int64_t count = args.x.shape[spec.channel_axis];
  const Extents kept = dense_strides(args.x.shape, ~spec.reduce_axes, order);
  return {nullptr,
          nullptr,
          mean.dtype,
          var.dtype,
          mean.stride(0),
          var.stride(0),
          count == 1 ? 1 : kept[spec.channel_axis],
          count,
          spec.momentum};
}

/// Makes the job that does the call on the arrays as they are seen; false where kernels cannot do it.
bool schedule(Plan& p, Seen& seen) {
  const Args& args = seen.args;
  const Spec& spec = seen.spec;
  const bool backward = is_backward(p.op), has_slopes = args.slopes.present;
  const bool wants_params = p.writes(kDweight) || p.writes(kDbias) || p.writes(kDslopes);
  Shapes& shapes = p.shapes;
  const Blocks blocks(args.x, spec);
  const AxisOrder order = describe(args.x, blocks, shapes);
  describe_param(args.x, args.weight, seen.params.axes, order, shapes.dweight);
  describe_param(args.x, args.bias.present ? args.bias : args.weight, seen.params.bias_axes, order, shapes.dbias);
  if (has_slopes) describe_param(args.x, args.slopes, seen.params.slope_axes, order, shapes.dslopes);
  shapes.dbias.dtype = shapes.dweight.dtype;
  if (shapes.empty) return true;
  const bool expand = (seen.params.differ && bias_counts(seen, p.op)) || (has_slopes && seen.params.slopes_stray);
  if (expand || !fits(args.out.present ? args.out.dtype : shapes.out_dtype, shapes.x_dtype)) return false;

  p.job = Job{};
  Task& t = p.job.task;
  p.job.is_backward = backward;
  t.phase = phase_of(p.op), t.centered = spec.centered, t.activation = spec.activation;
  t.denominator = {spec.eps, spec.divides_by_norm};
  t.frozen = !spec.use_input_stats || p.op == Op::apply;
  // Parameters and their gradients shape the geometry, and with it the order of sums, also where there are none or none are
  // wanted: bits depend neither on `need` nor on whether the phases are one call.
  if (!place(p, seen, seen.params.axes, blocks) || (backward && !choose_kind(t))) return false;
  if (!wants_params) t.kind = ParamKind::none;
  t.weight.dtype = args.weight.dtype, t.weight.offset = spec.weight_offset, t.bias.dtype = args.bias.dtype,
  t.slopes.dtype = args.slopes.dtype;
  if (backward || p.op == Op::apply)
    t.given = {nullptr, nullptr, args.mean.dtype, args.rstd.dtype, 1, t.geometry.statistics(), false};
  if (p.op == Op::forward && args.running_mean.present) p.job.running = running_of(args, spec, order);
  put_in_order(seen, p.op, order, shapes);
  if (has_slopes && seen.params.slopes_repeat) repeat_slopes(seen, p, order);
  p.job.dweight.dtype = args.dweight.present ? args.dweight.dtype : shapes.dweight.dtype;
  p.job.dbias.dtype = args.dbias.present ? args.dbias.dtype : shapes.dbias.dtype;
  p.job.dslopes.dtype = args.dslopes.present ? args.dslopes.dtype : shapes.dslopes.dtype;
  return true;
}

// ---- what kernels cannot take as it lies -------------------------------------------------------------------------

/// Strides of a dense array whose kept axes are the slowest and whose normalized axes are the fastest. Such arrays
/// always fit, whatever the parameters, once these are repeated for every element.
Extents packed_strides(const Array& x, const Spec& spec) {
  AxisOrder order;
  const AxisMask channel = spec.num_groups > 0 ? axis_bit(spec.channel_axis) : 0;
  for (const bool reduced : {false, true})
    for (int axis = 0; axis < x.ndim(); ++axis)
      if (static_cast<bool>(spec.reduce_axes & ~channel & axis_bit(axis)) == reduced && x.shape[axis] != 1)
        order.axis[order.count++] = axis;
  return dense_strides(x.shape, ~AxisMask{0}, order);
}

/// Has every array that has the shape of x lie with `strides`.
void pack(Seen& seen, const Plan& p, const Shapes& own, const Extents& strides) {
  const Dtype x = read_dtype(seen.args.x.dtype);
  for (const OperandIndex k : {kResidual, kDresidual, kDy})
    if ((seen.args.*kOperandTable[k].array).present) seen.put_like_x(k, x, strides, own.out_strides);
  const Dtype out = fits(own.out_dtype, x) ? own.out_dtype : compute_dtype(x);
  const bool elsewhere = !std::equal(strides.begin(), strides.begin() + own.ndim, own.out_strides.begin());
  if (seen.args.out.present || (p.writes(kOut) && (elsewhere || out != own.out_dtype)))
    seen.put_like_x(kOut, out, strides, own.out_strides);
  if (p.writes(kSum) && (elsewhere || seen.args.sum.present)) seen.put_like_x(kSum, x, strides, own.out_strides);
  seen.put_like_x(kX, x, strides, own.out_strides);
}

void put_mask(Seen& seen, const Extents& strides) {
  const Array where = seen.args.where;
  Extents bytes;
  for (int axis = 0; axis < where.ndim(); ++axis) bytes[axis] = where.stride(axis);
  const int shift = seen.args.x.ndim() - where.ndim();
  const auto of = [&](int axis) { return shift + axis; };
  seen.put(kWhere, Dtype::boolean, seen.args.x.shape, strides, repeated(seen.args.x.ndim(), where.shape, bytes, of));
}

/// Weight, bias, slopes and their gradients have an element for each of x. A weight that is not there but has a gradient is 1.
void repeat_params(Seen& seen, const Plan& p, const Shapes& own, const Extents& strides) {
  const Args given = seen.args;
  const Params params = seen.params;
  const int ndim = given.x.ndim();
  const auto put = [&](OperandIndex k, const Array& like, AxisMask axes, std::span<const std::int64_t> shape,
                       const Extents& bytes) {
    const Dtype dtype = like.present && like.dtype == Dtype::float64 ? like.dtype : compute_dtype(given.x.dtype);
    const auto of = [&](int axis) { return param_axis(axes, ndim, static_cast<int>(shape.size()), axis); };
    seen.put(k, dtype, given.x.shape, strides, repeated(ndim, shape, bytes, of));
  };
  for (const auto& [k, a, axes] :
       {std::tuple{kWeight, &given.weight, params.axes}, std::tuple{kBias, &given.bias, params.bias_axes},
        std::tuple{kSlopes, &given.slopes, params.slope_axes}}) {
    Extents bytes;
    for (int axis = 0; axis < a->ndim(); ++axis) bytes[axis] = a->stride(axis);
    if (a->present || (k == kWeight && (p.writes(kDweight) || p.writes(kDbias) || p.writes(kDslopes))))
      put(k, *a, axes, a->shape, bytes);
  }
  if (!given.weight.present) seen.spec.weight_offset = 0;
  for (const auto& [k, like, axes] :
       {std::tuple{kDweight, &given.weight, params.axes}, std::tuple{kDbias, &given.weight, params.bias_axes},
        std::tuple{kDslopes, &given.slopes, params.slope_axes}}) {
    const Shapes::Param& mine = own.of(k);
    Extents bytes = c_strides(mine.extents());
    for (int axis = 0; axis < mine.ndim; ++axis) bytes[axis] *= size_of(mine.dtype);
    if (p.writes(k)) put(k, *like, axes, mine.extents(), bytes);
  }
  seen.params = {~AxisMask{0}, ~AxisMask{0}, ~AxisMask{0}, given.x};
}

/// Has the gradients of parameters come out in C order.
void put_gradients_in_order(Seen& seen, Plan& p, const Shapes& own) {
  for (const auto& [k, mine, gradient] :
       {std::tuple{kDweight, &own.dweight, &p.shapes.dweight}, std::tuple{kDbias, &own.dbias, &p.shapes.dbias},
        std::tuple{kDslopes, &own.dslopes, &p.shapes.dslopes}}) {
    const Extents lying = gradient->strides;
    gradient->ndim = mine->ndim, gradient->shape = mine->shape, gradient->dtype = mine->dtype;
    gradient->strides = c_strides(mine->extents());
    bool lies = true;
    Extents bytes;
    for (int axis = 0; axis < mine->ndim; ++axis) {
      lies = lies && (mine->shape[axis] == 1 || lying[axis] == gradient->strides[axis]);
      bytes[axis] = gradient->strides[axis] * size_of(mine->dtype);
    }
    if (p.writes(k) && !lies && !(seen.args.*kOperandTable[k].array).present)
      seen.put(k, mine->dtype, mine->extents(), lying, bytes);
  }
}

/// Has dy added up into dbias, beside the kernels: there is no activation, so that dbias is a sum of dy, and it is
/// taken over other axes than dweight.
void add_up_dy(Seen& seen, Plan& p) {
  const Array& x = seen.args.x;
  Shapes::Param& dbias = p.shapes.dbias;
  dbias.strides = c_strides(dbias.extents());
  Extents bytes;
  for (int axis = 0; axis < dbias.ndim; ++axis) bytes[axis] = dbias.strides[axis] * size_of(dbias.dtype);
  Temporary& t = seen.temporaries.emplace_back(Temporary{kDbias, x.dtype, x.ndim(), {}, {}, {}});
  t.shape = p.shapes.x_shape;
  t.seen_strides = repeated(x.ndim(), dbias.extents(), bytes,
                            [&](int axis) { return param_axis(seen.params.bias_axes, x.ndim(), dbias.ndim, axis); });
}

}  // namespace

Plan plan(const Args& args, const Spec& spec, Op op, OperandMask wanted) {
  Plan p;
  p.op = op, p.wanted = p.makes = wanted;
  Shapes& shapes = p.shapes;
  const Array& x = args.x;
  judge_x(x, spec, op);
  const Dtype like_x = is_floating(x.dtype) ? x.dtype : Dtype::float32;
  shapes.x_dtype = x.dtype;
  const Dtype said =
      !args.out.present || is_floating(x.dtype) || !is_floating(args.out.dtype) ? like_x : args.out.dtype;
  shapes.out_dtype = is_backward(op) ? like_x : args.out_dtype == Dtype::other ? said : args.out_dtype;
  if (args.residual.present && (shapes.out_dtype != x.dtype || op == Op::moments)) p.makes |= operand_bit(kSum);
  describe(x, Blocks(x, spec), shapes);
  Params params = judge(args, spec, op, shapes.out_dtype, shapes.statistics());
  Seen seen = Seen{args, spec, params};
  if (is_backward(op) && !args.weight.present) {  // whatever is wanted, lest the bits of dx depend on it
    const AxisMask absent = axes_of_absent(spec);
    seen.params = params = {absent, args.bias.present ? params.bias_axes : absent,
                            args.slopes.present ? params.slope_axes : absent, x};
  }
  const bool adds_up_dy = p.writes(kDbias) && params.differ && !bias_counts(seen, op);
  if (adds_up_dy) p.makes &= ~operand_bit(kDbias);
  if (x.dtype != read_dtype(x.dtype)) seen.put_like_x(kX, read_dtype(x.dtype), shapes.out_strides, shapes.out_strides);
  if (!schedule(p, seen)) {
    const Shapes own = shapes;
    bool done = false;
    if (args.residual.present && fits(own.out_dtype, x.dtype)) {
      // The arrays are packed in the order of x, so that the sum is summed as it would be without a residual.
      seen = Seen{args, spec, params};
      pack(seen, p, own, own.out_strides);
      done = schedule(p, seen);
    }
    for (const bool repeated : {false, true}) {
      if (done) break;
      seen = Seen{args, spec, params};
      const Extents strides = packed_strides(x, spec);
      pack(seen, p, own, strides);
      if (args.where.present && spec.use_input_stats) put_mask(seen, strides);
      if (repeated) repeat_params(seen, p, own, strides);
      done = schedule(p, seen);
      if (done) put_gradients_in_order(seen, p, own);
    }
    shapes.out_strides = own.out_strides;
  }
  if (adds_up_dy) seen.params = params, add_up_dy(seen, p);
  p.temporaries = std::move(seen.temporaries);
  if (p.temporaries.empty() && !shapes.empty) {
    Addresses at{};
    for (int k = 0; k < kOperands; ++k)
      if ((args.*kOperandTable[k].array).present) at[k] = (args.*kOperandTable[k].array).data;
    point(p.job, op, at);
  }
  return p;
}

void point(Job& job, Op op, const Addresses& at) {
  Task& t = job.task;
  t.x.data = at[kX];
  t.weight.data = at[kWeight], t.slopes.data = at[kSlopes];
  t.where.data = t.frozen ? nullptr : at[kWhere];
  if (is_backward(op)) {
    t.dy.data = at[kDy], t.dx.data = at[kOut], t.residual.data = at[kDresidual];
    t.bias.data = t.activation.kind == ActivationKind::none ? nullptr : at[kBias];
    t.sums = reinterpret_cast<double*>(at[kSums]), t.counts = reinterpret_cast<const double*>(at[kCount]);
    job.dweight.data = at[kDweight], job.dbias.data = at[kDbias], job.dslopes.data = at[kDslopes];
  } else {
    t.y.data = at[kOut], t.bias.data = at[kBias];
    if (at[kResidual]) {  // the sum is written where x will be read: into `sum`, or into y itself
      t.source.data = at[kX], t.residual.data = at[kResidual];
      t.x.data = at[kSum] ? at[kSum] : at[kOut];
    }
    if (op == Op::forward) job.running.mean = at[kRunningMean], job.running.var = at[kRunningVar];
    if (op == Op::moments) t.moments = reinterpret_cast<double*>(at[kMoments]);
  }
  if (is_backward(op) || op == Op::apply) t.given.mean = t.centered ? at[kMean] : nullptr, t.given.scale = at[kRstd];
  else t.mean = at[kMean], t.rstd = at[kRstd];
  job.threads = num_threads();
}

}  // namespace normkit
