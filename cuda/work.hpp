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
  std::int64_t units_per_parameter = 1;  // where it is
  bool forms_x = false;  // from a sum, or from integers, which become floats when they are read
  bool elementwise = false;  // backward: gradients of parameters of which every element has its own
  bool reads_whole = true;  // rows of all that is read, and of what is written, begin with whole vectors
  bool writes_whole = true;
  bool summed = true;    // backward: somebody needs the sums
  double* partials = nullptr;  // of each unit and tile: moments, or what Reduced holds
  double* solved = nullptr;  // of each statistic: mean and rstd, in backward then b and c, one array each; may be null
  ParamGradient dweight, dbias;  // ParamKind::element

  constexpr Grid grid() const { return policy.grid(task.geometry, stage); }
};

/// True where nothing is special: constant parameters, every element a member, and no more arrays than x, dy and what is made of
/// them. Kernels that know have half the code.
constexpr bool is_plain(const Work& w) {
  const Task& t = w.task;
  return w.constant && t.activation.kind == ActivationKind::none && !t.where.data && !t.residual.data && !w.forms_x &&
         !w.elementwise;
}

/// The same work, where the compiler sees that it is plain.
constexpr Work made_plain(Work w) {
  w.constant = true, w.forms_x = w.elementwise = false, w.task.activation.kind = ActivationKind::none;
  w.task.where.data = w.task.residual.data = nullptr;
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
