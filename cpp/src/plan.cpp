#include "plan.hpp"

#include <algorithm>
#include <bit>
#include <deque>
#include <optional>
#include <utility>

#include "policy.hpp"

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

/// The order in which a call walks its arrays: that of dense arrays of one shape. It follows from x alone, and with it the
/// order of all sums. It is the order of x in memory, or, where the geometry cannot hold that, its kept axes are the
/// slowest and its reduced axes the fastest.
struct Walked {
  AxisOrder memory;  // of the axes of x, as they lie in memory
  Extents strides;   // of a dense array, in elements
  AxisOrder order;   // of the axes of x
  Layout layout;     // of the axes of the blocks
  bool is_memory_order = true;

  Walked(const Array& x, const Spec& spec, const Blocks& blocks) {
    Extents own;
    for (int axis = 0; axis < x.ndim(); ++axis) own[axis] = x.stride(axis) / size_of(x.dtype);
    order = memory = memory_order(x.shape, std::span(own.data(), x.shape.size()));
    if (holds(x, blocks)) return;
    is_memory_order = false;
    order.count = 0;
    const AxisMask channel = spec.num_groups > 0 ? axis_bit(spec.channel_axis) : 0;
    for (const bool reduced : {false, true})
      for (int axis = 0; axis < x.ndim(); ++axis)
        if (static_cast<bool>(spec.reduce_axes & ~channel & axis_bit(axis)) == reduced && x.shape[axis] != 1)
          order.axis[order.count++] = axis;
    holds(x, blocks);
  }

 private:
  bool holds(const Array& x, const Blocks& blocks) {
    strides = dense_strides(x.shape, ~AxisMask{0}, order);
    Extents of_blocks;
    blocks.split(strides, of_blocks);
    return canonicalise(blocks.extents(), blocks.reduce_axes,
                        memory_order(blocks.extents(), std::span(of_blocks.data(), blocks.extents().size())), layout);
  }
};

/// How the arrays lie that a call makes, and those that are given for each statistic.
struct Shapes {
  Dtype x_dtype;
  Dense out;                       // y or dx: the memory order of x
  Dense statistics;                // mean and rstd
  std::array<Dense, 3> gradients;  // dweight, dbias and dslopes

  Shapes(const Array& x, Dtype out_dtype, const Blocks& blocks, const Walked& walked)
      : x_dtype(x.dtype), out{out_dtype, x.ndim(), {}, dense_strides(x.shape, ~AxisMask{0}, walked.memory)} {
    for (int axis = 0; axis < x.ndim(); ++axis) {
      out.shape[axis] = x.shape[axis];
      if (x.shape[axis] == 1) out.strides[axis] = 1;
    }
    statistics.dtype = compute_dtype(x.dtype);
    const Extents kept = dense_strides(blocks.extents(), ~blocks.reduce_axes, walked.layout.order);
    for (int axis = 0; axis < blocks.ndim; ++axis) {
      if (blocks.reduce_axes & axis_bit(axis)) continue;
      statistics.shape[statistics.ndim] = blocks.shape[axis];
      statistics.strides[statistics.ndim++] = blocks.shape[axis] == 1 ? 1 : kept[axis];
    }
  }
  Dense& gradient(OperandIndex k) { return gradients[k - kDweight]; }
  const Dense& gradient(OperandIndex k) const { return gradients[k - kDweight]; }
  Dense of(OperandIndex k) const {
    const Role role = kOperandTable[k].role;
    if (k == kOut) return out;
    if (role == Role::param) return gradient(k);
    if (role == Role::like_x) return {x_dtype, out.ndim, out.shape, out.strides};
    Dense each = statistics;
    if (const int numbers = numbers_of(role)) {
      for (int axis = 0; axis < each.ndim; ++axis) each.strides[axis] *= numbers;
      each.dtype = Dtype::float64, each.shape[each.ndim] = numbers, each.strides[each.ndim++] = 1;
    }
    return each;
  }
};

/// Strides in C order.
Extents c_strides(std::span<const std::int64_t> shape) {
  Extents strides;
  std::int64_t next = 1;
  for (std::size_t axis = shape.size(); axis-- > 0; next *= shape[axis]) strides[axis] = next;
  return strides;
}

/// Strides in elements as strides in bytes.
Extents in_bytes(Extents strides, int ndim, Dtype dtype) {
  for (int axis = 0; axis < ndim; ++axis) strides[axis] *= size_of(dtype);
  return strides;
}

Extents byte_strides(const Array& a) {
  Extents bytes;
  for (int axis = 0; axis < a.ndim(); ++axis) bytes[axis] = a.stride(axis);
  return bytes;
}
Extents byte_strides(const Dense& a) { return in_bytes(a.strides, a.ndim, a.dtype); }

/// The strides of a parameter array of this shape that lies as the kernels count.
Extents param_strides(const Array& x, std::span<const std::int64_t> shape, AxisMask axes, const AxisOrder& order) {
  const Extents strides = dense_strides(x.shape, axes, order);
  const int ndim = static_cast<int>(shape.size());
  Extents found;
  for (int axis = 0; axis < ndim; ++axis)
    found[axis] = shape[axis] == 1 ? 1 : strides[param_axis(axes, x.ndim(), ndim, axis)];
  return found;
}

/// Describes the gradient of a parameter that varies along `axes`: it is like `a`, or, where `a` is absent, has the
/// extents of these axes.
void describe_param(const Array& x, const Array& a, AxisMask axes, const AxisOrder& order, Dense& gradient) {
  gradient.dtype = a.present ? a.dtype : compute_dtype(x.dtype), gradient.ndim = a.ndim();
  std::copy(a.shape.begin(), a.shape.end(), gradient.shape.begin());
  for (int axis = 0; !a.present && axis < x.ndim(); ++axis)
    if (axes & axis_bit(axis)) gradient.shape[gradient.ndim++] = x.shape[axis];
  gradient.strides = param_strides(x, gradient.extents(), axes, order);
}

/// The dtype of an array like x, also of one that is yet to be made.
Dtype dtype_of(const Args& args, OperandIndex k, const Shapes& shapes) {
  const Array& a = kOperandTable[k].of(args);
  return a.present ? a.dtype : k == kOut ? shapes.out.dtype : shapes.x_dtype;
}

/// The dtype as which kernels see an operand, for an x of dtype `x`.
Dtype seen_dtype(OperandIndex k, Dtype dtype, Dtype x) {
  if (k == kX) return read_dtype(x);
  if (k == kOut && dtype != x) return compute_dtype(x);
  return dtype;
}

// ---- what kernels are told ---------------------------------------------------------------------------------------

bool narrow_pieces(const Geometry& g) { return g.params.stride > 1 && g.params.stride < 8 && g.run > g.params.stride; }

/// True where a mask lies along the columns as x does, or has one element for all columns of a step.
bool mask_fits_columns(Strides& s, const Geometry& g) {
  if (g.run == 1) s.run = s.lane;
  return s.run == 0 ? s.lane == 0 : s.run == 1 && s.lane == g.run;
}

/// Chooses the traversal. Short runs leave vectors half empty: reduce across steps instead, where neighbouring columns
/// are contiguous.
Traversal traversal_of(const Geometry& g) {
  constexpr std::int64_t kShortRun = 64;
  return g.steps > 1 && g.run < kShortRun && g.lanes > 1 ? Traversal::lanes : Traversal::runs;
}

/// True where the kernels of a traversal take parameters that lie so.
bool takes_params(const Geometry& g, Traversal traversal) {
  if (traversal == Traversal::runs) return !narrow_pieces(g);
  return constant_in_column(g) || (g.params.stride == 1 && g.params.count % g.columns() == 0);
}

/// True where the kernels take an array that lies so.
bool takes(const Task& t, Strides& s, bool is_mask) {
  const Geometry& g = t.geometry;
  if (t.traversal == Traversal::runs) return s.run == 1 || (is_mask && s.run == 0);
  return is_mask ? mask_fits_columns(s, g) : s.run == 1 && s.lane == g.run;
}

/// True where steps of a few columns lie apart, so that a walk along memory would begin anew with each. On the CPU they are gathered
/// instead: three channels of four take 0.06 of the time.
bool has_short_steps(const Task& t, const Strides& s) {
  constexpr std::int64_t kShortStep = 64;
  const Geometry& g = t.geometry;
  return t.traversal == Traversal::lanes && g.steps > 1 && g.columns() < kShortStep && s.step != g.columns();
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

/// The strides in bytes of a parameter array that varies along `axes` of x, as it is seen in the shape of x: 0 where it
/// repeats itself.
Extents repeated(int x_ndim, AxisMask axes, std::span<const std::int64_t> shape, const Extents& bytes) {
  Extents seen;
  for (int axis = 0; axis < x_ndim; ++axis) seen[axis] = 0;
  const int ndim = static_cast<int>(shape.size());
  for (int axis = 0; axis < ndim; ++axis)
    if (shape[axis] != 1) seen[param_axis(axes, x_ndim, ndim, axis)] = bytes[axis];
  return seen;
}

/// A call as the kernels are to see it: the arrays that the caller passed, or temporaries in the place of some.
struct Seen {
  Args args;
  Spec spec;
  Params params;
  std::vector<Temporary> temporaries = {};
  std::deque<Extents> kept = {};  // shapes, and strides in bytes, of the temporaries: `args` looks into it

  /// Puts a temporary that lies with `strides`, in elements, in the place of an operand that is seen with strides
  /// `seen`, in bytes. An operand that lies so already stays.
  void put(OperandIndex k, Dtype dtype, std::span<const std::int64_t> shape, const Extents& strides,
           const Extents& seen) {
    Array& a = kOperandTable[k].of(args);
    if (a.present && a.dtype == dtype && a.shape.size() == shape.size() && has_strides(a, strides) &&
        std::equal(shape.begin(), shape.end(), a.shape.begin()))
      return;
    const int ndim = static_cast<int>(shape.size());
    Extents& extents = kept.emplace_back();
    std::copy(shape.begin(), shape.end(), extents.begin());
    temporaries.push_back({{dtype, ndim, extents, strides}, k, seen});
    const Extents& bytes = kept.emplace_back(in_bytes(strides, ndim, dtype));
    a = {nullptr, dtype, true, false, {extents.data(), shape.size()}, {bytes.data(), shape.size()}, {}};
  }
};

bool bias_counts(const Seen& s, Op op) {
  return s.args.bias.present &&
         (!is_backward(op) || s.spec.activation.kind != ActivationKind::none || s.args.ddbias.present);
}

/// The strides of an array over the axes of x, in bytes: of one that is there, as it broadcasts against x, or of one that
/// is to be made.
Extents strides_over_x(const Args& args, OperandIndex k, const Shapes& shapes) {
  const Array& a = kOperandTable[k].of(args);
  const int ndim = args.x.ndim(), shift = ndim - a.ndim();
  if (!a.present) return in_bytes(shapes.out.strides, ndim, dtype_of(args, k, shapes));
  Extents bytes;
  for (int axis = 0; axis < ndim; ++axis) {
    const bool varies = axis >= shift && a.shape[axis - shift] == args.x.shape[axis];
    bytes[axis] = varies ? a.stride(axis - shift) : 0;
  }
  return bytes;
}

Strides dense_strides(const Geometry& g) { return {g.steps * g.columns(), g.columns(), g.run, 1}; }

/// Puts the arrays that have the shape of x, and the mask, into the geometry, in which the traversal is chosen. An array
/// that the kernels do not take as it is gets a view.
void place(Plan& p, const Seen& seen, const Shapes& shapes, const Blocks& blocks, const Layout& layout) {
  const Args& args = seen.args;
  Task& t = p.job.task;
  const Geometry& g = t.geometry;
  std::array<int, kOperands> view_of;
  view_of.fill(-1);
  t.geometry = layout.geometry, p.job.views.clear(), p.gathered = 0;
  const auto operand = [&](OperandIndex k) -> Operand {
    const Array& a = kOperandTable[k].of(args);
    const Dtype dtype = dtype_of(args, k, shapes), seen_as = seen_dtype(k, dtype, args.x.dtype);
    Extents bytes, elements;
    blocks.split(strides_over_x(args, k, shapes), bytes);
    for (int axis = 0; axis < blocks.ndim; ++axis) elements[axis] = bytes[axis] / size_of(dtype);
    std::optional<Strides> lying = strides_in(layout, blocks.extents(), elements);
    const bool lies = lying && (!a.present || on_elements(a)) && takes(t, *lying, k == kWhere) &&
                      !(p.on_cpu && k != kWhere && has_short_steps(t, *lying));
    if (lies && seen_as == dtype) return {nullptr, dtype, *lying};
    if (!a.present && !p.writes(k)) return {nullptr, seen_as, dense_strides(g)};
    if (view_of[k] < 0) {
      view_of[k] = static_cast<int>(p.job.views.size());
      p.job.views.push_back(view_along(layout.order, blocks.extents(), bytes, dtype, seen_as));
      p.gathered |= operand_bit(k);
    }
    return {nullptr, seen_as, dense_strides(g), view_of[k]};
  };
  t.x = operand(kX);
  if (is_backward(p.op)) {
    t.dy = operand(kDy), t.dx = operand(kOut);
    if (args.dresidual.present) t.residual = operand(kDresidual);
    if (args.ddx.present) t.ddx = operand(kDdx);
    if (t.twice) t.d_dy = operand(kDdy);
  } else {
    t.y = operand(kOut);
    if (args.residual.present) {  // t.x is then the sum, see point()
      t.source = t.x, t.residual = operand(kResidual);
      t.x = operand(p.writes(kSum) ? kSum : kOut);
    }
  }
  if (args.where.present && (!t.frozen || is_backward(p.op))) t.where = operand(kWhere);
}

/// Has statistics and parameters lie in the order in which the kernels count them, which is dense.
void put_in_order(Seen& seen, Op op, const AxisOrder& order, const Shapes& shapes) {
  const Args& args = seen.args;
  for (int operand = 0; operand < kOperands; ++operand) {
    const OperandIndex k = static_cast<OperandIndex>(operand);
    const OperandRow& row = kOperandTable[k];
    const Array& a = row.of(args);
    if (!a.present || !row.is_used(op)) continue;
    Extents strides;
    if (row.role == Role::param) {
      const bool is_of_slopes = k == kSlopes || k == kDslopes;
      if ((k == kBias && !bias_counts(seen, op)) || (is_of_slopes && seen.params.slopes_repeat)) continue;
      strides = param_strides(args.x, a.shape, seen.params.of(k), order);
    } else if (is_of_statistics(row.role)) {
      if ((k == kMean || k == kMeanLow) && !seen.spec.centered) continue;
      strides = shapes.of(k).strides;
    } else {
      continue;
    }
    Extents bytes;
    for (int axis = 0; axis < shapes.statistics.ndim; ++axis) bytes[axis] = 0;  // a number
    for (int axis = 0; axis < a.ndim(); ++axis) bytes[axis] = a.stride(axis);
    const bool is_one_for_all = a.ndim() == 0 && row.role != Role::param;
    seen.put(k, row.role == Role::count ? Dtype::float64 : a.dtype,
             is_one_for_all ? shapes.statistics.extents() : a.shape, strides, bytes);
  }
}

/// Slopes that lack axes of weight, and their gradient, have elements for those too.
void repeat_slopes(Seen& seen, const Plan& p, Shapes& shapes, const AxisOrder& order) {
  const Array &x = seen.args.x, slopes = seen.args.slopes;
  Dense lying;
  describe_param(x, {}, seen.params.axes, order, lying);
  const auto put = [&](OperandIndex k, Dtype dtype, const Extents& bytes) {
    const Extents all = repeated(x.ndim(), seen.params.slope_axes, slopes.shape, bytes);
    Extents along;
    for (int axis = 0, next = 0; axis < x.ndim(); ++axis)
      if (seen.params.axes & axis_bit(axis)) along[next++] = all[axis];
    seen.put(k, dtype, lying.extents(), lying.strides, along);
  };
  put(kSlopes, slopes.dtype, byte_strides(slopes));
  Dense& dslopes = shapes.gradient(kDslopes);
  dslopes.strides = c_strides(dslopes.extents());
  if (p.writes(kDslopes)) put(kDslopes, compute_dtype(x.dtype), byte_strides(dslopes));
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

/// Makes the job that does the call on the arrays as they are seen; false where the kernels do not take the parameters.
bool schedule(Plan& p, Seen& seen, Shapes& shapes, const Blocks& blocks, const Walked& walked) {
  const Args& args = seen.args;
  const Spec& spec = seen.spec;
  const bool backward = is_backward(p.op), has_slopes = args.slopes.present;
  const bool wants_params = p.writes(kDweight) || p.writes(kDbias) || p.writes(kDslopes);
  const AxisOrder& order = walked.order;
  Dense &dweight = shapes.gradient(kDweight), &dbias = shapes.gradient(kDbias), &dslopes = shapes.gradient(kDslopes);
  if (backward) {
    describe_param(args.x, args.weight, seen.params.axes, order, dweight);
    describe_param(args.x, args.bias.present ? args.bias : args.weight, seen.params.bias_axes, order, dbias);
    if (has_slopes) describe_param(args.x, args.slopes, seen.params.slope_axes, order, dslopes);
    dbias.dtype = dweight.dtype;
  }
  p.job = Job{};
  Task& t = p.job.task;
  t.denominator = {spec.eps, spec.divides_by_norm}, t.activation = spec.activation;
  t.frozen = !spec.use_input_stats || p.op == Op::apply;
  if (p.empty) return true;
  if ((seen.params.differ && bias_counts(seen, p.op)) || (has_slopes && seen.params.slopes_stray)) return false;

  p.job.is_backward = backward, t.twice = p.op == Op::double_backward;
  t.phase = phase_of(p.op), t.centered = spec.centered;
  // Whether there are parameters, and whether their gradients are wanted, changes neither the traversal nor the order of
  // sums: bits depend neither on `need` nor on whether the phases are one call.
  Layout layout = walked.layout;
  if (!place_params(blocks.extents(), blocks.split(seen.params.axes), layout)) return false;
  t.geometry = layout.geometry, t.traversal = traversal_of(t.geometry);
  if (!takes_params(t.geometry, t.traversal) || (backward && !choose_kind(t))) return false;
  place(p, seen, shapes, blocks, layout);
  // Kept axes that do not lie as one may lie as two. Rows whose gradients are summed together are counted in `outer`.
  for (int split = 1; p.gathered && t.kind != ParamKind::row; ++split) {
    Layout other = layout;
    const bool splits = other.geometry.outer == 1 && split_lanes(blocks.extents(), split, other);
    place(p, seen, shapes, blocks, splits ? other : layout);
    if (!splits) break;
  }
  if (!wants_params) t.kind = ParamKind::none;
  t.weight.dtype = args.weight.dtype, t.weight.offset = spec.weight_offset, t.bias.dtype = args.bias.dtype,
  t.slopes.dtype = args.slopes.dtype, t.ddweight.dtype = args.ddweight.dtype, t.ddbias.dtype = args.ddbias.dtype;
  if (backward || p.op == Op::apply)
    t.given = {nullptr, nullptr, args.mean.dtype,    args.rstd.dtype, 1, t.geometry.statistics(),
               false,   nullptr, args.mean_low.dtype};
  if (p.op == Op::forward && args.running_mean.present) p.job.running = running_of(args, spec, order);
  put_in_order(seen, p.op, order, shapes);
  if (has_slopes && seen.params.slopes_repeat) repeat_slopes(seen, p, shapes, order);
  p.job.dweight.dtype = args.dweight.present ? args.dweight.dtype : dweight.dtype;
  p.job.dbias.dtype = args.dbias.present ? args.dbias.dtype : dbias.dtype;
  p.job.dslopes.dtype = args.dslopes.present ? args.dslopes.dtype : dslopes.dtype;
  return true;
}

// ---- what kernels cannot take as it lies -------------------------------------------------------------------------

/// Has arrays be packed: dense, in the order in which they are walked, and as kernels see them.
void pack(Seen& seen, OperandMask packed, const Shapes& own, const Extents& strides) {
  const Array x = seen.args.x;
  for (OperandMask left = packed; left; left &= left - 1) {
    const OperandIndex k = static_cast<OperandIndex>(std::countr_zero(left));
    const Dtype dtype = seen_dtype(k, dtype_of(seen.args, k, own), x.dtype);
    seen.put(k, dtype, x.shape, strides, strides_over_x(seen.args, k, own));
  }
}

/// The axes along which parameters vary, and the kept ones that are slower. Repeated along these, parameters are still constant where they
/// were, so that a sample has the bits that it has alone, where nothing may have to be repeated.
AxisMask axes_varying(const Params& params, const Spec& spec, const AxisOrder& order) {
  const AxisMask varying = params.axes | params.bias_axes | params.slope_axes;
  AxisMask axes = 0, slower = 0;
  for (int at = 0; at < order.count; ++at) {
    const AxisMask axis = axis_bit(order.axis[at]);
    if (varying & axis) axes |= slower | axis;
    if (!(spec.reduce_axes & axis)) slower |= axis;
  }
  return axes;
}

/// The axes along which parameters have to be repeated that kernels do not take even so: those from the slowest one
/// along which they vary to the fastest, and at least those of a run or of the columns.
AxisMask axes_to_repeat(const Params& params, const Blocks& blocks, const Walked& walked) {
  const Layout& l = walked.layout;
  const int slowest = traversal_of(l.geometry) == Traversal::lanes ? 1 : 0;  // the places of columns, or of a run
  AxisMask inner = 0;
  for (int at = 0; at < l.order.count; ++at)
    if (l.place[at] <= slowest) inner |= axis_bit(l.order.axis[at]);
  AxisMask axes = 0;
  const AxisMask varying = params.axes | params.bias_axes | params.slope_axes;
  for (int at = 0; at < walked.order.count; ++at) {
    const AxisMask axis = axis_bit(walked.order.axis[at]);
    if (axes || ((varying & axis) != 0) || (blocks.split(axis) & inner)) axes |= axis;
  }
  return axes;
}

/// Weight, bias, slopes and their gradients have an element for each index along `axes`. A weight that is not there but
/// has a gradient is 1.
void repeat_params(Seen& seen, const Plan& p, const Shapes& own, AxisMask axes, const AxisOrder& order) {
  const Args given = seen.args;
  const Params params = seen.params;
  const int ndim = given.x.ndim();
  Extents extents;
  for (int axis = 0; axis < ndim; ++axis) extents[axis] = axes & axis_bit(axis) ? given.x.shape[axis] : 1;
  const std::span<const std::int64_t> repeated_shape(extents.data(), static_cast<std::size_t>(ndim));
  const Extents strides = dense_strides(given.x.shape, axes, order);
  const auto put = [&](OperandIndex k, const Array& like, std::span<const std::int64_t> shape, const Extents& bytes) {
    const bool wide = p.op == Op::double_backward || (like.present && like.dtype == Dtype::float64);
    const Dtype dtype = wide ? Dtype::float64 : compute_dtype(given.x.dtype);
    seen.put(k, dtype, repeated_shape, strides, repeated(ndim, params.of(k), shape, bytes));
  };
  const bool wants_params = p.writes(kDweight) || p.writes(kDbias) || p.writes(kDslopes);
  for (const OperandIndex k : {kWeight, kBias, kSlopes, kDdweight, kDdbias}) {
    const Array& a = kOperandTable[k].of(given);
    if (a.present || (k == kWeight && wants_params)) put(k, a, a.shape, byte_strides(a));
  }
  if (!given.weight.present) seen.spec.weight_offset = 0;
  for (const OperandIndex k : {kDweight, kDbias, kDslopes}) {
    const Dense& mine = own.gradient(k);
    if (p.writes(k)) put(k, k == kDslopes ? given.slopes : given.weight, mine.extents(), byte_strides(mine));
  }
  seen.params = {axes, axes, axes, given.x};
}

/// Has the gradients of parameters come out in C order, in which they are among `own`.
void put_gradients_in_order(Seen& seen, const Plan& p, const Shapes& own, Shapes& shapes) {
  for (const OperandIndex k : {kDweight, kDbias, kDslopes}) {
    Dense& gradient = shapes.gradient(k);
    const Extents lying = gradient.strides;
    gradient = own.gradient(k);
    bool lies = true;
    for (int axis = 0; axis < gradient.ndim; ++axis)
      lies = lies && (gradient.shape[axis] == 1 || lying[axis] == gradient.strides[axis]);
    if (p.writes(k) && !lies && !kOperandTable[k].of(seen.args).present)
      seen.put(k, gradient.dtype, gradient.extents(), lying, byte_strides(gradient));
  }
}

/// Has dy added up into dbias, beside the kernels: there is no activation, so that dbias is a sum of dy, and it is
/// taken over other axes than dweight.
void add_up_dy(Seen& seen, Shapes& shapes) {
  const Array& x = seen.args.x;
  Dense& dbias = shapes.gradient(kDbias);
  dbias.strides = c_strides(dbias.extents());
  const Extents bytes = repeated(x.ndim(), seen.params.bias_axes, dbias.extents(), byte_strides(dbias));
  seen.temporaries.push_back({{x.dtype, x.ndim(), shapes.out.shape, {}}, kDbias, bytes});
}

}  // namespace

Plan plan(const Args& args, const Spec& spec, Op op, OperandMask wanted, bool on_cpu) {
  Plan p;
  p.op = op, p.on_cpu = on_cpu, p.wanted = p.makes = wanted;
  const Array& x = args.x;
  judge_x(args, spec, op);
  p.empty = is_empty(x);
  const Dtype like_x = is_floating(x.dtype) ? x.dtype : Dtype::float32;
  const Dtype said =
      !args.out.present || is_floating(x.dtype) || !is_floating(args.out.dtype) ? like_x : args.out.dtype;
  const Dtype out_dtype = is_backward(op) ? like_x : args.out_dtype == Dtype::other ? said : args.out_dtype;
  if (args.residual.present && (out_dtype != x.dtype || op == Op::moments)) p.makes |= operand_bit(kSum);
  const Blocks blocks(x, spec);
  const Walked walked(x, spec, blocks);
  Shapes shapes(x, out_dtype, blocks, walked);
  Params params = judge(args, spec, op, wanted, out_dtype, shapes.statistics.extents());
  Seen seen = Seen{args, spec, params};
  if (is_backward(op) && !args.weight.present) {  // whatever is wanted, lest the bits of dx depend on it
    const AxisMask absent = axes_of_absent(spec);
    seen.params = params = {absent, args.bias.present ? params.bias_axes : absent,
                            args.slopes.present ? params.slope_axes : absent, x};
  }
  const bool adds_up_dy = p.writes(kDbias) && params.differ && !bias_counts(seen, op);
  if (adds_up_dy) p.makes &= ~operand_bit(kDbias);
  const bool suit = schedule(p, seen, shapes, blocks, walked);
  Shapes own = shapes;
  for (Dense& gradient : own.gradients) gradient.strides = c_strides(gradient.extents());
  const auto attempt = [&](AxisMask repeated, OperandMask packed) {
    seen = Seen{args, spec, params};
    if (repeated) repeat_params(seen, p, own, repeated, walked.order);
    pack(seen, packed, own, walked.strides);
    return schedule(p, seen, shapes, blocks, walked);
  };
  AxisMask repeats = 0;
  if (!suit && !attempt(repeats = axes_varying(params, spec, walked.order), 0) &&
      !attempt(repeats = axes_to_repeat(params, blocks, walked), 0))
    attempt(repeats = ~AxisMask{0}, 0);
  if (p.gathered && !(on_cpu && takes_views() && can_gather(p.job.task))) attempt(repeats, p.gathered);
  if (repeats || !walked.is_memory_order) put_gradients_in_order(seen, p, own, shapes);
  if (adds_up_dy) seen.params = params, add_up_dy(seen, shapes);
  p.temporaries = std::move(seen.temporaries);
  OperandMask packed = 0;
  for (const Temporary& t : p.temporaries) packed |= operand_bit(t.operand);
  for (OperandMask left = p.wanted | (p.makes & ~packed); left; left &= left - 1) {
    const OperandIndex k = static_cast<OperandIndex>(std::countr_zero(left));
    p.outputs.emplace_back(k, shapes.of(k));
  }
  if (p.temporaries.empty() && !p.empty) {
    Addresses at{};
    for (int k = 0; k < kOperands; ++k)
      if (kOperandTable[k].of(args).present) at[k] = kOperandTable[k].of(args).data;
    point(p.job, op, at);
  }
  return p;
}

void point(Job& job, Op op, const Addresses& at) {
  Task& t = job.task;
  t.x.data = at[kX];
  t.weight.data = at[kWeight], t.slopes.data = at[kSlopes];
  t.where.data = t.frozen && !is_backward(op) ? nullptr : at[kWhere];
  if (is_backward(op)) {
    t.dy.data = at[kDy], t.dx.data = at[kOut], t.residual.data = at[kDresidual];
    t.bias.data = t.activation.kind == ActivationKind::none ? nullptr : at[kBias];
    t.sums = reinterpret_cast<double*>(at[kSums]), t.counts = reinterpret_cast<const double*>(at[kCount]);
    t.ddx.data = at[kDdx], t.d_dy.data = at[kDdy], t.ddweight.data = at[kDdweight], t.ddbias.data = at[kDdbias];
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
  if (is_backward(op) || op == Op::apply) {
    t.given.scale = at[kRstd];
    if (t.centered) t.given.mean = at[kMean], t.given.mean_low = at[kMeanLow];
  } else {
    t.mean = at[kMean], t.rstd = at[kRstd];
  }
  job.threads = num_threads();
}

}  // namespace normkit
