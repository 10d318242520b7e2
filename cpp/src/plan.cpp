#include "plan.hpp"

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <memory>
#include <new>
#include <sstream>

#include "normkit/formula.hpp"

namespace normkit {
namespace {

[[noreturn]] void fail(Error::Kind kind, const std::string& message) { throw Error(kind, message); }
[[noreturn]] void type_error(const std::string& message) { fail(Error::Kind::type, message); }
[[noreturn]] void value_error(const std::string& message) { fail(Error::Kind::value, message); }

// ---- words -------------------------------------------------------------------------------------------------------

std::string tuple(std::span<const std::int64_t> values) {
  std::ostringstream text;
  text << '(';
  for (std::size_t k = 0; k < values.size(); ++k) text << (k ? ", " : "") << values[k];
  text << (values.size() == 1 ? ",)" : ")");
  return text.str();
}

/// "a", "a or b", "a, b or c".
std::string alternatives(const std::vector<std::string>& words) {
  std::string text;
  for (std::size_t k = 0; k < words.size(); ++k)
    text += (k == 0 ? "" : k + 1 == words.size() ? " or " : ", ") + words[k];
  return text;
}

std::string number(double v) {
  if (std::isnan(v)) return "nan";
  if (std::isinf(v)) return v < 0 ? "-inf" : "inf";
  std::ostringstream text;
  text << v;
  return text.str().find_first_of(".e") == std::string::npos ? text.str() + ".0" : text.str();
}

std::vector<std::int64_t> extents_of(std::span<const std::int64_t> shape, AxisMask axes) {
  std::vector<std::int64_t> extents;
  for (std::size_t a = 0; a < shape.size(); ++a)
    if (axes & axis_bit(static_cast<int>(a))) extents.push_back(shape[a]);
  return extents;
}

// ---- one array ---------------------------------------------------------------------------------------------------

std::string dtype_name(const Array& a) {
  return a.dtype == Dtype::other ? std::string(a.other_dtype) : name_of(a.dtype);
}

[[noreturn]] void bad_dtype(const char* name, const Array& a, const std::string& expected) {
  const std::string given = dtype_name(a);
  const bool swapped = !given.empty() && (given[0] == '>' || given[0] == '<');
  type_error(std::string(name) + " has dtype " + given + ", expected " + (swapped ? "native byte order" : expected));
}

void check_data_dtype(const char* name, const Array& a, bool integers) {
  if (a.dtype >= Dtype::boolean || !(integers || is_floating(a.dtype)))
    bad_dtype(name, a,
              integers ? "float32, float64, float16, bfloat16, uint8, int8, uint16 or int16"
                       : "float32, float64, float16 or bfloat16");
}

void check_same_dtype(const char* name, const Array& a, Dtype expected, const char* because) {
  if (a.dtype != expected) bad_dtype(name, a, std::string(name_of(expected)) + because);
}

void check_wide_dtype(const char* name, const Array& a) {
  if (a.dtype != Dtype::float32 && a.dtype != Dtype::float64) bad_dtype(name, a, "float32 or float64");
}

void check_param_dtype(const char* name, const Array& a, Dtype x) {
  const bool narrow = x == Dtype::float16 || x == Dtype::bfloat16;
  if (a.dtype == Dtype::float32 || a.dtype == Dtype::float64 || (narrow && a.dtype == x)) return;
  bad_dtype(name, a,
            narrow ? std::string("float32, float64 or ") + name_of(x) + ", the dtype of x" : "float32 or float64");
}

bool equal(std::span<const std::int64_t> a, std::span<const std::int64_t> b) {
  return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin());
}

void check_shape(const char* name, const Array& a, std::span<const std::int64_t> expected, const char* because) {
  if (!equal(a.shape, expected))
    value_error(std::string(name) + " has shape " + tuple(a.shape) + ", expected " + tuple(expected) + because);
}

void check_writable(const char* name, const Array& a) {
  if (a.read_only) value_error(std::string(name) + " is read-only, expected a writable array");
  for (const std::int64_t extent : a.shape)
    if (extent == 0) return;
  for (int axis = 0; axis < a.ndim(); ++axis)
    if (a.shape[axis] > 1 && a.stride(axis) == 0)
      value_error(std::string(name) + " has elements that share memory, expected distinct ones");
}

Reach reach_of(const Array& a) {
  Reach r{0, size_of(a.dtype), size_of(a.dtype)};
  for (int axis = 0; axis < a.ndim(); ++axis) {
    if (a.shape[axis] == 0) return {0, 0, r.element};
    const std::int64_t reach = a.stride(axis) * (a.shape[axis] - 1);
    (reach < 0 ? r.first : r.last) += reach;
  }
  return r;
}

bool overlap(const std::byte* a, const Reach& p, const std::byte* b, const Reach& q) {
  return a + p.first < b + q.last && b + q.first < a + p.last;
}

bool same_strides(const Array& a, const Array& b) {
  for (int axis = 0; axis < a.ndim(); ++axis)
    if (a.shape[axis] > 1 && a.stride(axis) != b.stride(axis)) return false;
  return true;
}

bool same_view(const Array& a, const Array& b) {
  return a.data == b.data && a.dtype == b.dtype && equal(a.shape, b.shape) && same_strides(a, b);
}

bool bounds_overlap(const Array& a, const Array& b) {
  const Reach p = reach_of(a), q = reach_of(b);
  return p.first != p.last && q.first != q.last && overlap(a.data, p, b.data, q);
}

/// An output may be `data` itself, where that is elementwise safe, or lie apart from it.
void check_apart(const char* name, const Array& out, const char* other_name, const Array& other, bool may_be_same,
                 bool known_apart) {
  if (!other.present || other.dtype == Dtype::other || known_apart || !bounds_overlap(out, other)) return;
  if (may_be_same && same_view(out, other)) return;
  value_error(std::string(name) + " overlaps " + other_name + ", expected " +
              (may_be_same ? std::string(other_name) + " itself or memory apart" : "memory apart"));
}

bool on_elements(const Array& a) {
  const std::int64_t size = size_of(a.dtype);
  bool aligned = reinterpret_cast<std::uintptr_t>(a.data) % static_cast<std::uintptr_t>(size) == 0;
  for (int axis = 0; axis < a.ndim(); ++axis) aligned = aligned && (a.shape[axis] < 2 || a.stride(axis) % size == 0);
  return aligned;
}

/// Strides in elements.
void element_strides(const Array& a, Extents& out) {
  for (int axis = 0; axis < a.ndim(); ++axis) out[axis] = a.stride(axis) / size_of(a.dtype);
}

bool has_strides(const Array& a, const Extents& strides) {
  for (int axis = 0; axis < a.ndim(); ++axis)
    if (a.shape[axis] > 1 && a.stride(axis) != strides[axis] * size_of(a.dtype)) return false;
  return reinterpret_cast<std::uintptr_t>(a.data) % static_cast<std::uintptr_t>(size_of(a.dtype)) == 0;
}

// ---- parameters --------------------------------------------------------------------------------------------------

bool has_extents(std::span<const std::int64_t> shape, std::span<const std::int64_t> x, AxisMask axes) {
  std::size_t seen = 0;
  for (std::size_t a = 0; a < x.size(); ++a)
    if (axes & axis_bit(static_cast<int>(a))) {
      if (seen == shape.size() || shape[seen] != x[a]) return false;
      ++seen;
    }
  return seen == shape.size();
}

/// The axes of x that an array varies along which broadcasts against it.
AxisMask broadcast_axes(const char* name, const Array& a, std::span<const std::int64_t> x) {
  AxisMask axes = 0;
  const int shift = static_cast<int>(x.size()) - a.ndim();
  for (int axis = 0; axis < a.ndim(); ++axis) {
    if (shift < 0 || (a.shape[axis] != 1 && a.shape[axis] != x[shift + axis]))
      value_error(std::string(name) + " has shape " + tuple(a.shape) +
                  ", expected a shape that broadcasts against x: " + tuple(x));
    if (a.shape[axis] != 1) axes |= axis_bit(shift + axis);
  }
  return axes;
}

/// The axes of x that weight or bias varies along; its shape is judged.
AxisMask match_params(const char* name, const Array& a, std::span<const std::int64_t> x, const Spec& spec) {
  if (spec.param_forms == 0) return broadcast_axes(name, a, x);
  for (int form = 0; form < spec.param_forms; ++form)
    if (has_extents(a.shape, x, spec.param_axes[form])) return spec.param_axes[form];
  std::vector<std::string> expected;
  for (int form = 0; form < spec.param_forms; ++form) {
    const std::string text = tuple(extents_of(x, spec.param_axes[form]));
    if (expected.empty() || expected.back() != text) expected.push_back(text);
  }
  value_error(std::string(name) + " has shape " + tuple(a.shape) + ", expected " + alternatives(expected) + ": " +
              spec.param_meaning);
}

/// The axis of x that axis `axis` of a parameter array of `ndim` axes lies along.
int param_axis(const Spec& spec, AxisMask axes, int x_ndim, int ndim, int axis) {
  if (spec.param_forms == 0) return x_ndim - ndim + axis;
  for (int a = 0, seen = 0; a < x_ndim; ++a)
    if ((axes & axis_bit(a)) && seen++ == axis) return a;
  return 0;
}

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

void check_spec(const Spec& spec) {
  if (!(spec.eps >= 0) || std::isinf(spec.eps))
    value_error("eps is " + number(spec.eps) + ", expected a finite number that is at least 0");
  if (!(spec.momentum >= 0 && spec.momentum <= 1))
    value_error("momentum is " + number(spec.momentum) + ", expected a number from 0 to 1");
  if (!std::isfinite(spec.weight_offset))
    value_error("weight_offset is " + number(spec.weight_offset) + ", expected a finite number");
  if (!std::isfinite(spec.activation.parameter))
    value_error("activation has parameter " + number(spec.activation.parameter) + ", expected a finite number");
}

void check_where(const Array& where, const Array& x) {
  if (!where.present) return;
  if (where.dtype != Dtype::boolean) bad_dtype("where", where, "bool");
  broadcast_axes("where", where, x.shape);
}

/// A companion of x: the same shape and floating dtype.
void check_like_x(const char* name, const Array& a, const Array& x) {
  if (!a.present) return;
  check_shape(name, a, x.shape, ", the shape of x");
  check_same_dtype(name, a, x.dtype, ", the dtype of x");
}

void check_residual(const ForwardArgs& args) {
  if (!args.residual.present) return;
  if (!is_floating(args.x.dtype))
    bad_dtype("x", args.x, "float32, float64, float16 or bfloat16 with a residual to add");
  check_like_x("residual", args.residual, args.x);
}

/// The members of each statistic, of float64.
void check_counts(const Array& a, const Shapes& shapes) {
  if (!a.present) value_error("count is None, expected an array: one element per statistic");
  check_same_dtype("count", a, Dtype::float64, "");
  check_shape("count", a, {shapes.stat_shape.data(), static_cast<std::size_t>(shapes.stat_ndim)},
              ": one element per statistic");
}

/// `a`, of float64, has the kept axes of x and 3.
void check_triples(const char* name, const Array& a, const Shapes& shapes) {
  if (!a.present) value_error(std::string(name) + " is None, expected an array: three numbers per statistic");
  check_same_dtype(name, a, Dtype::float64, "");
  std::vector<std::int64_t> expected(shapes.stat_shape.begin(), shapes.stat_shape.begin() + shapes.stat_ndim);
  expected.push_back(3);
  check_shape(name, a, expected, ": three numbers per statistic");
}

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

std::span<const std::int64_t> stat_shape(const Shapes& shapes) {
  return {shapes.stat_shape.data(), static_cast<std::size_t>(shapes.stat_ndim)};
}

void check_statistic(const char* name, const Array& a, Shapes& shapes, bool wanted) {
  if (!wanted) return;
  if (!a.present) value_error(std::string(name) + " is None, expected an array: one element per statistic");
  check_wide_dtype(name, a);
  check_shape(name, a, stat_shape(shapes), ": one element per statistic");
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

void check_running(const Array& mean, const Array& var, const Array& x, const Spec& spec) {
  if (mean.present != var.present)
    value_error(mean.present ? "running_var is None, expected an array like running_mean"
                             : "running_mean is None, expected an array like running_var");
  if (!mean.present) {
    if (!spec.use_input_stats)
      value_error(std::string(spec.frozen_by) + " is False, expected running_mean and running_var to normalize with");
    return;
  }
  const std::int64_t channels[] = {x.shape[spec.channel_axis]};
  for (const auto& [name, a] : {std::pair{"running_mean", &mean}, std::pair{"running_var", &var}}) {
    check_wide_dtype(name, *a);
    check_shape(name, *a, channels, ": one element per channel of x");
    if (spec.use_input_stats) check_writable(name, *a);
  }
  std::int64_t members = 1;
  for (int axis = 0; axis < x.ndim(); ++axis)
    if (spec.reduce_axes & axis_bit(axis)) members *= x.shape[axis];
  if (spec.use_input_stats && members == 1)
    value_error("x has 1 member per statistic, expected at least 2: running_var takes an unbiased variance");
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

}  // namespace

Placement::Placement(std::span<const Array> arrays, int out, std::uint32_t same)
    : count_(static_cast<int>(arrays.size())), out_(out), same_(0) {
  const Array& y = arrays[out];
  for (int k = 0; k < count_; ++k) {
    reach_[k] = reach_of(arrays[k]);
    const bool alike = y.present && y.dtype == arrays[k].dtype && equal(y.shape, arrays[k].shape);
    if (alike && same_strides(y, arrays[k])) same_ |= same & (1U << k);
  }
}

bool Placement::allows(const std::byte* const* data) const {
  for (int k = 0; k < count_; ++k) {
    if (!data[k]) continue;
    if (reinterpret_cast<std::uintptr_t>(data[k]) & static_cast<std::uintptr_t>(reach_[k].element - 1)) return false;
    if (!data[out_] || k == out_ || !overlap(data[out_], reach_[out_], data[k], reach_[k])) continue;
    if (!(same_ >> k & 1) || data[k] != data[out_]) return false;
  }
  return true;
}

bool may_overlap(const Array& a, const Array& b) { return !same_view(a, b) && bounds_overlap(a, b); }

namespace {

/// The whole call of forward but for the geometry: what the arrays are and how they may lie over each other.
void check_forward(const ForwardArgs& args, Phase phase, bool keep_sum, Shapes& shapes) {
  const Array &x = args.x, &y = args.y;
  const Dtype like_x = is_floating(x.dtype) ? x.dtype : Dtype::float32;
  shapes.x_dtype = x.dtype;
  shapes.out_dtype = args.y_dtype == Dtype::other ? like_x : args.y_dtype;
  shapes.fits = (shapes.out_dtype == like_x || shapes.out_dtype == compute_dtype(x.dtype));
  shapes.wants_sum = args.residual.present && (keep_sum || shapes.out_dtype != x.dtype || phase == Phase::reduce);
  for (const auto& [name, a] : {std::pair{"mean", &args.mean}, std::pair{"rstd", &args.rstd}})
    if (a->present) check_shape(name, *a, stat_shape(shapes), ": one element per statistic");
  if (phase == Phase::reduce && args.moments.present) check_triples("moments", args.moments, shapes);
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
    check_triples("sums", args.sums, shapes);
    check_counts(args.count, shapes);
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

}  // namespace

ForwardPlan plan_forward(const ForwardArgs& args, const Spec& spec, Phase phase, bool keep_sum) {
  ForwardPlan plan;
  Shapes& shapes = plan.shapes;
  const Array& x = args.x;
  check_data_dtype("x", x, true);
  check_spec(spec);
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
  point(plan.job,
        {args.x.data, args.y.data, args.weight.data, args.bias.data, args.running_mean.data, args.running_var.data,
         args.residual.data, args.sum.data, args.where.data, args.mean.data, args.rstd.data, args.moments.data});
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
  check_spec(spec);
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
  point(plan.job,
        {args.dy.data, x.data, args.dx.data, args.mean.data, args.rstd.data, args.weight.data, args.bias.data,
         args.where.data, args.dresidual.data, args.sums.data, args.count.data, args.dweight.data, args.dbias.data});
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

// ---- specs -------------------------------------------------------------------------------------------------------

namespace {

int checked_axis(const char* name, std::int64_t axis, int ndim) {
  if (axis < -ndim || axis >= ndim)
    fail(Error::Kind::axis, std::string(name) + " is " + std::to_string(axis) + ", expected " + std::to_string(-ndim) +
                                " to " + std::to_string(ndim - 1) + ": x has " + std::to_string(ndim) +
                                (ndim == 1 ? " axis" : " axes"));
  return static_cast<int>(axis < 0 ? axis + ndim : axis);
}

AxisMask all_axes(int ndim) { return ndim >= kMaxAxes ? ~AxisMask{0} : axis_bit(ndim) - 1; }

}  // namespace

namespace {

int judged_channel_axis(int ndim, std::int64_t axis, bool may_be_first) {
  if (ndim < 2)
    value_error("x has " + std::to_string(ndim) + (ndim == 1 ? " axis" : " axes") +
                ", expected at least 2: images and channels");
  const int channel_axis = checked_axis("channel_axis", axis, ndim);
  if (channel_axis == 0 && !may_be_first)
    value_error("channel_axis is " + std::to_string(axis) + ", expected another: axis 0 of x counts images");
  return channel_axis;
}

AxisMask checked_axes(std::span<const std::int64_t> axes, int ndim) {
  AxisMask mask = 0;
  if (axes.empty()) value_error("axis is (), expected at least one axis");
  for (const std::int64_t given : axes) {
    const int axis = checked_axis("axis", given, ndim);
    if (mask & axis_bit(axis))
      value_error("axis has " + std::to_string(axis) + " more than once: " + tuple(axes) + ", expected distinct axes");
    mask |= axis_bit(axis);
  }
  return mask;
}

}  // namespace

Spec instance_spec(int ndim, std::int64_t channel_axis) {
  Spec spec;
  spec.channel_axis = judged_channel_axis(ndim, channel_axis, false);
  const AxisMask channel = axis_bit(spec.channel_axis), all = all_axes(ndim);
  spec.reduce_axes = all & ~(channel | axis_bit(0));
  spec.param_axes = {channel, channel | axis_bit(0), all};
  spec.param_forms = 3;
  return spec;
}

Spec group_spec(std::span<const std::int64_t> shape, std::int64_t num_groups, std::int64_t channel_axis) {
  Spec spec = instance_spec(static_cast<int>(shape.size()), channel_axis);
  const std::int64_t channels = shape[static_cast<std::size_t>(spec.channel_axis)];
  if (shape.size() == kMaxAxes) value_error("x has 64 axes, expected at most 63: groups are an axis more");
  if (num_groups < 1 || channels % num_groups != 0)
    value_error("num_groups is " + std::to_string(num_groups) + ", expected a divisor of " + std::to_string(channels) +
                ", the channels of x");
  spec.num_groups = num_groups;
  return spec;
}

Spec batch_spec(int ndim, std::int64_t channel_axis) {
  Spec spec;
  spec.channel_axis = judged_channel_axis(ndim, channel_axis, true);
  spec.reduce_axes = all_axes(ndim) & ~axis_bit(spec.channel_axis);
  spec.param_axes = {axis_bit(spec.channel_axis)};
  spec.param_forms = 1;
  spec.frozen_by = "training";
  return spec;
}

Spec layer_spec(int ndim, std::span<const std::int64_t> axes, bool centered) {
  Spec spec;
  spec.centered = centered;
  spec.reduce_axes = checked_axes(axes, ndim);
  spec.param_axes = {spec.reduce_axes};
  spec.param_forms = 1;
  spec.param_meaning = "the shape of the normalized axes of x";
  return spec;
}

Spec normalize_spec(int ndim, std::span<const std::int64_t> axes, bool centered) {
  Spec spec = layer_spec(ndim, axes, centered);
  spec.param_forms = 0;
  return spec;
}

// ---- for C++ callers ---------------------------------------------------------------------------------------------

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

}  // namespace

namespace {

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
    check_triples("sums", args.sums, shapes);
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
