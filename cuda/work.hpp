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
  bool reads_whole = true;  // rows of x and dy, and of what is written, begin with whole vectors
  bool writes_whole = true;
  bool all_whole = false;  // so do those of all else, and rows end with whole ones
  bool summed = true;    // backward: somebody needs the sums
  double* partials = nullptr;  // of each unit and tile: moments, or what Reduced holds
  double* solved = nullptr;  // of each statistic: mean and rstd, in backward then b and c, one array each; may be null
  ParamGradient dweight, dbias;  // ParamKind::element

  constexpr Grid grid() const { return policy.grid(task.geometry, stage); }
};

/// What kernels are compiled for, of which those that know more have half the code and registers:
enum class Special : std::uint8_t {
  anything,
  along,  // weights that change from element to element of the only run, nothing but whole vectors, and nothing else: layer norm
  none,  // constant parameters, every element a member, and no more arrays than x, dy and what is made of them
};

constexpr Special special_of(const Work& w) {
  const Task& t = w.task;
  if (t.activation.kind != ActivationKind::none || t.where.data || t.residual.data || w.forms_x || w.elementwise)
    return Special::anything;
  if (w.constant) return Special::none;
  return t.traversal == Traversal::runs && t.geometry.steps == 1 && t.geometry.outer == 1 && w.all_whole
             ? Special::along
             : Special::anything;
}

/// The same work, where the compiler sees what it is.
template <Special kSpecial> constexpr Work known_as(Work w) {
  if constexpr (kSpecial == Special::anything) return w;
  w.constant = kSpecial == Special::none;
  if (kSpecial == Special::along) {
    w.task.geometry.params.stride = w.task.geometry.steps = w.task.geometry.outer = 1, w.policy.units = 1,
    w.policy.runs.rows = 1;
    w.reads_whole = w.writes_whole = w.all_whole = true;
  } else {
    w.all_whole = w.policy.collects = false;
  }
  w.forms_x = w.elementwise = false, w.task.activation.kind = ActivationKind::none;
  w.task.where.data = w.task.residual.data = nullptr;
  return w;
}

struct Kernels {
  /// Enqueues the kernel of the direction and traversal, for the stage that the work is of.
  void (*run)(const Work&, Stream);
  void (*row_gradients)(const Work&, Stream);
  /// What the device, which is the current one, gives the kernel of the direction and traversal.
  Room (*room)(const Work&, int device);
};

}  // namespace normkit::cuda
