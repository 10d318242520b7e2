#include <cstdint>
#include <span>
#include <string>

#include "arguments.hpp"

namespace normkit {
namespace {

int checked_axis(const char* name, std::int64_t axis, int ndim) {
  check_axes("x", ndim);
  if (axis < -ndim || axis >= ndim) bad_axis(name, axis, -ndim, ndim);
  return static_cast<int>(axis < 0 ? axis + ndim : axis);
}

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
  check_groups(num_groups, channels, static_cast<int>(shape.size()));
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

Spec l2_spec(int ndim, std::span<const std::int64_t> axes) {
  Spec spec = normalize_spec(ndim, axes, false);
  spec.divides_by_norm = true;
  spec.eps = 1e-12;
  return spec;
}

}  // namespace normkit
