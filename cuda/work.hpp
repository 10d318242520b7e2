// What a kernel is told, and the kernels of one storage type as a table: the counterpart of Isa.
#pragma once

#include "cpu.hpp"
#include "device.cuh"

namespace normkit::cuda {

/// A task, how it is gone about, and which part of it one launch is.
struct Work {
  Task task;
  Policy policy;
  Stage stage = Stage::all;
  bool constant = true;  // all elements of a unit share one weight
  bool forms_x = false;  // forward: from a sum, or from integers, which become floats when they are read
  bool summed = true;    // backward: somebody needs the sums
  double* partials = nullptr;  // of each unit and tile: moments, or what Reduced holds
  double* solved = nullptr;  // of each statistic: mean and rstd, in backward then b and c, one array each; may be null
  ParamGradient dweight, dbias;  // ParamKind::element

  constexpr Grid grid() const { return policy.grid(task.geometry, stage); }
  /// Blocks of a cluster.
  constexpr int cluster() const { return stage == Stage::all ? policy.team.blocks : 1; }
};

/// True where y is x_hat * weight + bias with constant parameters, and every element is a member: kernels that know take a
/// third fewer registers.
constexpr bool is_plain(const Work& w) {
  return w.constant && w.task.activation.kind == ActivationKind::none && !w.task.where.data && !w.forms_x;
}

/// The same work, where the compiler sees that it is plain.
constexpr Work made_plain(Work w) {
  w.constant = true, w.forms_x = false, w.task.activation.kind = ActivationKind::none;
  w.task.where.data = nullptr;
  return w;
}

struct Kernels {
  /// Enqueues the kernel of the direction and traversal, for the stage that the work is of.
  void (*run)(const Work&, Stream);
  void (*row_gradients)(const Work&, Stream);
  /// True where the device has what the teams of the policy want: clusters, or more shared memory than every GPU gives.
  bool (*has_team)(const Work&, int device);
};

}  // namespace normkit::cuda
