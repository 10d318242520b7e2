#include "normkit/geometry.hpp"

namespace normkit {
namespace {

constexpr std::int64_t magnitude(std::int64_t v) { return v < 0 ? -v : v; }

/// A maximal set of neighboring axes, all kept or all reduced, that every array walks with one stride.
struct Group {
  bool reduced;
  std::int64_t extent;
  std::array<std::int64_t, kMaxOperands> stride;
};

struct Groups {
  std::array<Group, kMaxAxes> group;  // the first `count` of them: clearing all would cost more than a small call
  int count = 0;
};

/// Merges neighboring axes that are both kept or both reduced, but never across `split`, the number of slowest axes
/// that are to be `outer`.
Groups merge_axes(std::span<const std::int64_t> shape, AxisMask reduce_axes, const AxisOrder& order, int split,
                  std::span<const std::span<const std::int64_t>> operands) {
  Groups groups;
  for (int at = 0; at < order.count; ++at) {
    const int axis = order.axis[at];
    const bool reduced = (reduce_axes & axis_bit(axis)) != 0;
    const std::int64_t extent = shape[axis];
    bool joins = groups.count > 0 && at != split && groups.group[groups.count - 1].reduced == reduced;
    for (std::size_t k = 0; joins && k < operands.size(); ++k)
      joins = groups.group[groups.count - 1].stride[k] == operands[k][axis] * extent;
    if (!joins) groups.group[groups.count++] = {.reduced = reduced, .extent = 1, .stride = {}};
    Group& group = groups.group[groups.count - 1];
    group.extent *= extent;
    for (std::size_t k = 0; k < operands.size(); ++k) group.stride[k] = operands[k][axis];
  }
  return groups;
}

/// The map of parameters along `param_axes`, ignoring the first `split` axes; empty unless these axes are neighbors.
std::optional<ParamMap> map_params(std::span<const std::int64_t> shape, AxisMask param_axes, const AxisOrder& order,
                                   int split) {
  ParamMap map;
  enum { inside, among, outside } place = inside;
  for (int at = order.count - 1; at >= split; --at) {
    const bool varies = (param_axes & axis_bit(order.axis[at])) != 0;
    if (varies && place == outside) return std::nullopt;
    if (varies) place = among;
    if (!varies && place == among) place = outside;
    if (place == inside) map.stride *= shape[order.axis[at]];
    if (place == among) map.count *= shape[order.axis[at]];
  }
  if (map.count == 1) map.stride = 1;
  return map;
}

/// Puts the groups into run, lanes, steps, outer, the fastest first.
std::optional<Layout> place_groups(const Groups& groups, std::size_t operands, int mask) {
  Layout layout;
  Geometry& g = layout.geometry;
  int slot = 0;
  for (int at = groups.count - 1; at >= 0; --at, ++slot) {
    const Group& group = groups.group[at];
    slot += (slot % 2 == 0) != group.reduced;  // run and steps are reduced, lanes and outer kept
    if (slot > 3) return std::nullopt;
    (slot == 0 ? g.run : slot == 1 ? g.lanes : slot == 2 ? g.steps : g.outer) = group.extent;
    for (std::size_t k = 0; k < operands; ++k) {
      Strides& s = layout.strides[k];
      const bool repeats = static_cast<int>(k) == mask && group.stride[k] == 0;
      if (slot == 0 && group.stride[k] != 1 && !repeats) return std::nullopt;
      if (slot == 0) s.run = group.stride[k];
      if (slot > 0) (slot == 1 ? s.lane : slot == 2 ? s.step : s.outer) = group.stride[k];
    }
  }
  // Single elements far apart in a long sum would waste a cache line each: packed is faster.
  if (g.run == 1 && g.steps > 1 && g.lanes > 1)
    for (std::size_t k = 0; k < operands; ++k)
      if (layout.strides[k].lane != 1 && static_cast<int>(k) != mask) return std::nullopt;
  return layout;
}

}  // namespace

AxisOrder memory_order(std::span<const std::int64_t> shape, std::span<const std::int64_t> strides) {
  AxisOrder order;
  for (int axis = 0; axis < static_cast<int>(shape.size()); ++axis) {
    if (shape[axis] == 1) continue;
    int at = order.count++;
    for (; at > 0 && magnitude(strides[order.axis[at - 1]]) < magnitude(strides[axis]); --at)
      order.axis[at] = order.axis[at - 1];
    order.axis[at] = axis;
  }
  return order;
}

std::optional<Layout> canonicalise(std::span<const std::int64_t> shape, AxisMask reduce_axes, AxisMask param_axes,
                                   std::span<const std::span<const std::int64_t>> operands, int mask) {
  const AxisOrder order = memory_order(shape, operands[0]);
  // Parameters that vary along the slowest kept axes too, but not along the next ones, get those axes as `outer`.
  int kept = 0;
  while (kept < order.count && (reduce_axes & axis_bit(order.axis[kept])) == 0) ++kept;
  for (int split = 0; split <= kept; ++split) {
    if (split > 0 && (param_axes & axis_bit(order.axis[split - 1])) == 0) break;
    std::optional<ParamMap> map = map_params(shape, param_axes, order, split);
    if (!map) continue;
    std::optional<Layout> layout =
        place_groups(merge_axes(shape, reduce_axes, order, split, operands), operands.size(), mask);
    if (!layout) return std::nullopt;
    if (split > 0) {
      std::int64_t outer = 1;
      for (int at = 0; at < split; ++at) outer *= shape[order.axis[at]];
      if (layout->geometry.outer != outer) continue;
      map->outer = map->count;
    }
    layout->geometry.params = *map;
    return layout;
  }
  return std::nullopt;
}

}  // namespace normkit
