// How a normalization lies in memory: outer, steps, lanes, run. Whoever reads this file has read the design.
//
//     offset    = ((outer * STEPS + step) * LANES + lane) * RUN + i
//     statistic = outer * LANES + lane                    members = STEPS * RUN
//     parameter = outer * params.outer + (offset / params.stride) % params.count
//
// `offset` counts elements in the order of memory, as if the array were dense. Where each extent really lies is in
// Strides, one per array. A statistic is taken over `steps` and `run`; `outer` and `lanes` tell statistics apart, so
// that kept and reduced extents alternate. For example, by images, channels, groups and positions:
//
//                                           outer  steps  lanes    run     params.stride  params.count
//     instance norm, (N, C, H, W)               1      1    N C    H W               H W             C
//     instance norm, channels last              N    H W      C      1                 1             C
//     group norm, channels last                 N    H W      G  C / G                 1             C
//     batch norm, (N, C, H, W)                  1      N      C    H W               H W             C
//     layer norm of N rows of M elements        1      1      N      M                 1             M
//
// This file is for the host only.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <span>

namespace normkit {

/// The most axes of an array, and a set of axes: bit a stands for axis a.
inline constexpr int kMaxAxes = 64;
using AxisMask = std::uint64_t;

constexpr AxisMask axis_bit(int axis) { return AxisMask{1} << axis; }

/// Says which element of weight and bias belongs to an element of x, by the formula for `parameter` at the top of this
/// file. Where there are no weights it is {0, 1, 1}, which takes every element of x to parameter 0.
struct ParamMap { std::int64_t outer = 0, stride = 1, count = 1; };

/// offset / stride % count of offsets that lie `each` apart, one after another, without a division for each of them: `each` divides
/// the stride, or count is 1.
class CyclicIndex {
 public:
  [[gnu::always_inline]] constexpr CyclicIndex(std::int64_t offset, std::int64_t stride, std::int64_t count,
                                               std::int64_t each = 1)
      : stride_(stride), count_(count), each_(each), index_(offset / stride % count), left_(stride - offset % stride) {}

  constexpr std::int64_t operator*() const { return index_; }
  /// Offsets from here on, this one among them, that have this index.
  constexpr std::int64_t same() const { return count_ == 1 ? INT64_MAX : (left_ + each_ - 1) / each_; }
  [[gnu::always_inline]] constexpr void skip(std::int64_t offsets) {
    left_ -= (offsets - 1) * each_;
    next();
  }
  [[gnu::always_inline]] constexpr void next() {
    left_ -= each_;
    if (left_ > 0) return;
    left_ = stride_;
    if (++index_ == count_) index_ = 0;
  }

 private:
  std::int64_t stride_, count_, each_, index_, left_;
};

/// The four extents of a normalization, and where its parameters lie.
struct Geometry {
  std::int64_t outer = 1, steps = 1, lanes = 1, run = 1;
  ParamMap params;

  constexpr std::int64_t members() const { return steps * run; }
  constexpr std::int64_t statistics() const { return outer * lanes; }
  constexpr std::int64_t columns() const { return lanes * run; }
  constexpr std::int64_t size() const { return statistics() * members(); }
  [[gnu::always_inline]] constexpr std::int64_t offset(std::int64_t o, std::int64_t step, std::int64_t lane,
                                                       std::int64_t i) const {
    return ((o * steps + step) * lanes + lane) * run + i;
  }
  [[gnu::always_inline]] constexpr std::int64_t parameter(std::int64_t o, std::int64_t at) const {
    return o * params.outer + (at / params.stride) % params.count;
  }
  /// How many parameters there are.
  constexpr std::int64_t parameters() const { return params.outer ? params.outer * outer : params.count; }
};

/// Where one array really lies: the number of elements from one index to the next along each extent. Along the run that
/// is 1, or 0 where one element of a mask stands for the whole run.
struct Strides { std::int64_t outer = 0, step = 0, lane = 0, run = 1; };

/// Axes from the slowest to the fastest in memory. Extents of 1 have no place there and are left out.
struct AxisOrder {
  std::array<int, kMaxAxes> axis;  // only the first `count` entries are set
  int count = 0;
};

/// The order of the axes of an array with these strides; ties keep their logical order.
AxisOrder memory_order(std::span<const std::int64_t> shape, std::span<const std::int64_t> strides);

/// The geometry of a call, and where in it each axis has its place.
struct Layout {
  Geometry geometry;
  AxisOrder order;
  std::array<std::int8_t, kMaxAxes> place;  // of each axis of `order`: 0 run, 1 lanes, 2 steps, 3 outer
};

/// Finds the geometry of a dense array whose axes lie in this order. Extents of 1 are dropped, and neighboring axes that
/// are both kept or both reduced merge; the axes that remain must fit the pattern kept, reduced, kept, reduced. False
/// where they alternate too often: with the reduced axes as the fastest ones any array fits.
///
/// shape         extents of x, none of them 0
/// reduce_axes   the axes that a statistic is taken over
bool canonicalise(std::span<const std::int64_t> shape, AxisMask reduce_axes, const AxisOrder& order, Layout& layout);

/// Has the `split` slowest axes be `outer`; false where they are no kept axes, or not all that are slower than the lanes.
/// Statistics and parameters keep their numbers.
bool split_lanes(std::span<const std::int64_t> shape, int split, Layout& layout);

/// Puts parameters that vary along `param_axes` into the geometry, which is as if there were none before; false where it
/// cannot hold them, as they vary along axes that are not neighbors. Parameters that vary along all axes always fit.
/// If they vary along the slowest kept axes too, but not along the next ones, these axes become `outer`.
bool place_params(std::span<const std::int64_t> shape, AxisMask param_axes, Layout& layout);

/// The strides of an array in the geometry, from those of its axes in elements; empty where axes that share a place do
/// not lie as one. The kernels want a run without gaps besides.
std::optional<Strides> strides_in(const Layout& layout, std::span<const std::int64_t> shape,
                                  std::span<const std::int64_t> strides);

}  // namespace normkit
