#include "normkit/geometry.hpp"

namespace normkit {
namespace {

constexpr std::int64_t magnitude(std::int64_t v) { return v < 0 ? -v : v; }

/// Places in a geometry, the fastest first: those that are even are reduced, the others kept.
enum Place : std::int8_t { kRun, kLanes, kSteps, kOuter };

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

bool canonicalise(std::span<const std::int64_t> shape, AxisMask reduce_axes, const AxisOrder& order, Layout& layout) {
  layout.geometry = {}, layout.order = order;
  Geometry& g = layout.geometry;
  int place = kRun;
  for (int at = order.count - 1; at >= 0; --at) {
    const int axis = order.axis[at];
    place += (place % 2 == 0) != ((reduce_axes & axis_bit(axis)) != 0);
    if (place > kOuter) return false;
    (place == kRun ? g.run : place == kLanes ? g.lanes : place == kSteps ? g.steps : g.outer) *= shape[axis];
    layout.place[at] = static_cast<std::int8_t>(place);
  }
  return true;
}

bool split_lanes(std::span<const std::int64_t> shape, int split, Layout& layout) {
  Geometry& g = layout.geometry;
  std::int64_t extent = 1;
  for (int at = 0; at < split; ++at) {
    if (at == layout.order.count || layout.place[at] % 2 == kRun) return false;
    extent *= shape[layout.order.axis[at]];
  }
  if (g.outer == extent) return true;
  if (g.outer != 1 || g.steps != 1) return false;
  g.outer = extent, g.lanes /= extent;
  for (int at = 0; at < split; ++at) layout.place[at] = kOuter;
  return true;
}

bool place_params(std::span<const std::int64_t> shape, AxisMask param_axes, Layout& layout) {
  for (int split = 0;; ++split) {
    std::optional<ParamMap> map = map_params(shape, param_axes, layout.order, split);
    if (map && (split == 0 || split_lanes(shape, split, layout))) {
      if (split > 0) map->outer = map->count;
      layout.geometry.params = *map;
      return true;
    }
    if (split == layout.order.count || (param_axes & axis_bit(layout.order.axis[split])) == 0) return false;
  }
}

std::optional<Strides> strides_in(const Layout& layout, std::span<const std::int64_t> shape,
                                  std::span<const std::int64_t> strides) {
  Strides s;
  std::int64_t* const of[] = {&s.run, &s.lane, &s.step, &s.outer};
  std::int64_t next[4];
  bool has[4] = {};
  for (int at = layout.order.count - 1; at >= 0; --at) {
    const int axis = layout.order.axis[at], place = layout.place[at];
    if (has[place] && strides[axis] != next[place]) return std::nullopt;
    if (!has[place]) *of[place] = strides[axis], has[place] = true;
    next[place] = strides[axis] * shape[axis];
  }
  return s;
}

}  // namespace normkit
