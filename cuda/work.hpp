// What a kernel is told, and the kernels of one storage type as a table: the counterpart of Isa.
#pragma once

#include "cpu.hpp"
#include "device.cuh"
#include "tiling.hpp"

namespace normkit::cuda {

/// A task, cut into tiles. A unit is what is summed for itself: a statistic, or where gradients of parameters are summed, what
/// shares one of them: a piece of its run (runs) or a column (lanes; there always).
struct Work {
  Task task;
  Tiling runs;
  LanesTiling lanes;
  std::int64_t units = 1;     // in a statistic
  std::int64_t unit_run = 1;  // elements of a unit's run
  bool constant = true;       // all elements of a unit share one weight
  double* partials = nullptr;  // of each unit and tile: moments, or what Reduced holds
  double* solved = nullptr;    // backward, of each statistic: mean, rstd, b and c, one array each
  ParamGradient dweight, dbias;  // ParamKind::element

  constexpr std::int64_t tiles() const { return task.traversal == Traversal::lanes ? lanes.tiles : runs.tiles; }
};

/// True where y is x_hat * weight + bias with constant parameters, and every element is a member: kernels that know take a
/// third fewer registers.
constexpr bool is_plain(const Work& w) {
  return w.constant && w.task.activation.kind == ActivationKind::none && !w.task.where.data && !w.task.residual.data;
}

/// The same work, where the compiler sees that it is plain.
constexpr Work made_plain(Work w) {
  w.constant = true, w.task.activation.kind = ActivationKind::none;
  w.task.where.data = nullptr, w.task.residual.data = nullptr;
  return w;
}

/// Each enqueues one kernel.
struct Kernels {
  void (*forward)(const Work&, Stream);  // runs: statistics are given, or found where a tile holds all of one; then y
  void (*sums)(const Work&, Stream);  // moments of every unit of every tile
  void (*lanes_sums)(const Work&, Stream);
  void (*lanes_apply)(const Work&, Stream);
  void (*backward_sums)(const Work&, Stream);
  void (*backward_apply)(const Work&, Stream);
  void (*lanes_backward_sums)(const Work&, Stream);
  void (*lanes_backward_apply)(const Work&, Stream);
  void (*row_gradients)(const Work&, Stream);
};

/// More blocks than this are never launched: kernels walk on from tile to tile.
inline constexpr std::int64_t kMaxBlocks = std::int64_t{1} << 30;

constexpr std::int64_t blocks_for(std::int64_t items, std::int64_t per_block) {
  const std::int64_t blocks = ceil_div(items, per_block);
  return blocks < kMaxBlocks ? blocks : kMaxBlocks;
}

}  // namespace normkit::cuda
