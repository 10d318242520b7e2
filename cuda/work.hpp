// What a kernel is told, and the kernels of one storage type as a table: the counterpart of Isa.
#pragma once

#include "cpu.hpp"
#include "device.cuh"

namespace normkit::cuda {

/// What the policy of the runs traversal comes to in one stage, so that no thread has to divide.
struct Shape {
  std::int64_t parts = 1, all = 1;  // tiles of a statistic, and of all
  bool shares = false;  // a team has several of a statistic's
  int groups = 1, held = 1, held_tiles = 1, head = 0;  // as Policy's functions of these names say
  int steps = 1, columns = 1;  // of a tile that is all of its unit: its rows, and the vectors of each

  constexpr static Shape of(const Policy& p, const Geometry& g, Stage stage) {
    Shape s;
    if (p.traversal == Traversal::lanes) return s;
    s.parts = p.parts(), s.all = g.statistics() * s.parts, s.shares = p.shares(stage);
    s.groups = p.groups(stage), s.held = p.held(), s.held_tiles = p.held_tiles(stage), s.head = p.head(stage);
    if (p.runs.tiles > 1) return s;
    s.steps = static_cast<int>(g.steps);
    s.columns = static_cast<int>(ceil_div(p.unit_run, vector_for(p.element_bytes)));
    return s;
  }
};

/// A task, how it is gone about, and which part of it one launch is.
struct Work {
  Task task;
  Policy policy;
  Stage stage = Stage::all;
  Shape shape;  // of that stage
  bool constant = true;  // all elements of a unit share one weight
  std::int64_t units_per_parameter = 1;  // where it is
  bool forms_x = false;  // from a sum, or from integers, which become floats when they are read
  bool elementwise = false;  // backward: gradients of parameters of which every element has its own
  bool reads_whole = true;  // rows of x and dy, and of what is written, begin with whole vectors
  bool writes_whole = true;
  bool all_whole = false;  // so they end, and parameters change between them, or from element to element
  bool params_whole = false;  // and there are whole vectors of them, one for each element
  bool only_whole = false;  // the compiler knows all_whole
  bool summed = true;    // backward: somebody needs the sums
  double* partials = nullptr;  // of each unit and tile: moments, or what Reduced holds
  double* solved = nullptr;  // of each statistic: mean and rstd, in backward then b and c, one array each; may be null
  ParamGradient dweight, dbias;  // ParamKind::element

  constexpr Grid grid() const { return policy.grid(task.geometry, stage); }
};

/// What kernels are compiled for, of which those that know more have half the code and registers. In the runs traversal these have
/// nothing but whole vectors; forward, they may have an activation that is_kink().
enum class Special : std::uint8_t {
  anything,
  along,  // weights that change along a statistic's only run, and nothing else: layer norm; forward, group norm too
  none,  // constant parameters, every element a member, no more arrays than x, dy and what is made of them, and no activation
};

/// Activations that cost no more than a comparison.
constexpr bool is_kink(ActivationKind kind) {
  return kind == ActivationKind::relu || kind == ActivationKind::leaky_relu;
}

constexpr Special special_of(const Work& w) {
  const Task& t = w.task;
  const bool runs_forward = t.traversal == Traversal::runs && w.policy.direction == Direction::forward;
  const bool active = t.activation.kind != ActivationKind::none && !(runs_forward && is_kink(t.activation.kind));
  if (active || t.where.data || t.residual.data || w.forms_x || w.elementwise) return Special::anything;
  if (t.traversal == Traversal::lanes) return w.constant ? Special::none : Special::anything;
  if (!w.all_whole) return Special::anything;
  if (w.constant) return Special::none;
  const Geometry& g = t.geometry;
  const bool wide =
      (t.weight.data && t.weight.dtype == Dtype::float64) || (t.bias.data && t.bias.dtype == Dtype::float64);
  const bool along = w.params_whole ? g.params.count == g.run && !wide : w.policy.direction == Direction::forward;
  return g.steps == 1 && g.outer == 1 && along ? Special::along : Special::anything;
}

/// The same work, where the compiler sees what it is.
template <Special kSpecial> constexpr Work known_as(Work w) {
  w.only_whole = false;
  if constexpr (kSpecial == Special::anything) return w;
  w.constant = kSpecial == Special::none;
  if (kSpecial == Special::along) {
    w.task.geometry.steps = w.task.geometry.outer = 1, w.policy.units = 1, w.policy.runs.rows = 1;
  } else {
    w.policy.collects = false;
  }
  w.forms_x = w.elementwise = false, w.task.activation.kind = ActivationKind::none;
  w.task.where.data = w.task.residual.data = nullptr;
  return w;
}
/// The same of the runs traversal.
template <Special kSpecial> constexpr Work known_runs(const Work& given) {
  Work w = known_as<kSpecial>(given);
  w.only_whole = kSpecial != Special::anything;
  if (w.only_whole) w.reads_whole = w.writes_whole = w.all_whole = true;
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
