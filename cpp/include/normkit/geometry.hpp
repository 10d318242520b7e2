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

/// The four extents of a normalization, and where its parameters lie.
struct Geometry {
  std::int64_t outer = 1, steps = 1, lanes = 1, run = 1;
  ParamMap params;

  constexpr std::int64_t members() const { return steps * run; }
  constexpr std::int64_t statistics() const { return outer * lanes; }
  constexpr std::int64_t columns() const { return lanes * run; }
  constexpr std::int64_t size() const { return statistics() * members(); }
  constexpr std::int64_t offset(std::int64_t o, std::int64_t step, std::int64_t lane, std::int64_t i) const {
    return ((o * steps + step) * lanes + lane) * run + i;
  }
  constexpr std::int64_t parameter(std::int64_t o, std::int64_t at) const {
    return o * params.outer + (at / params.stride) % params.count;
  }
  /// How many parameters there are.
  constexpr std::int64_t parameters() const { return params.outer ? params.outer * outer : params.count; }
};

/// Where one array really lies: the number of elements from one index to the next along each extent. Along the run that
/// is 1, or 0 where one element of a mask stands for the whole run.
struct Strides { std::int64_t outer = 0, step = 0, lane = 0, run = 1; };

/// The arrays that one walk visits together: x, two more of its kind, a residual and a mask at most.
inline constexpr int kMaxOperands = 6;

/// The geometry of a call, with the strides of its arrays in the order in which canonicalise() was given them.
struct Layout {
  Geometry geometry;
  std::array<Strides, kMaxOperands> strides{};
};

/// Axes from the slowest to the fastest in memory. Extents of 1 have no place there and are left out.
struct AxisOrder {
  std::array<int, kMaxAxes> axis;  // only the first `count` entries are set
  int count = 0;
};

/// The order of the axes of an array with these strides; ties keep their logical order.
AxisOrder memory_order(std::span<const std::int64_t> shape, std::span<const std::int64_t> strides);

/// Finds the geometry of a call. It sorts the axes by stride, drops extents of 1 and merges neighboring axes that are
/// both kept or both reduced; the axes that remain must fit the pattern kept, reduced, kept, reduced.
///
/// shape         extents of x, none of them 0
/// reduce_axes   the axes that a statistic is taken over
/// param_axes    the axes that the parameters vary along; 0 for none
/// operands      strides of each array in elements, at most kMaxOperands arrays; the first one decides the axes' order
/// mask          the index of the operand that may repeat itself along the run; -1 for none
///
/// The result is empty where the geometry cannot hold the arrays (a run with gaps, kept and reduced axes that alternate
/// too often, parameters along axes that are not neighbors): the caller then packs them into dense arrays whose reduced
/// axes are the fastest. Such arrays always fit, whatever the parameters, once these are expanded to all kept axes or
/// to all axes.
std::optional<Layout> canonicalise(std::span<const std::int64_t> shape, AxisMask reduce_axes, AxisMask param_axes,
                                   std::span<const std::span<const std::int64_t>> operands, int mask = -1);

}  // namespace normkit
