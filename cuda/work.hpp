// What a kernel is told, and the kernels of one storage type as a table: the counterpart of Isa.
#pragma once

#include "cpu.hpp"
#include "device.cuh"

namespace normkit::cuda {

/// Numbers that follow from the policy of the runs traversal in one stage, so that no thread has to divide.
struct Shape {
  std::int64_t parts = 1, all = 1;  // tiles of one statistic, and of all statistics
  bool shares = false;  // a team has several tiles of a statistic
  int groups = 1, held = 1, held_tiles = 1, head = 0;  // what Policy's functions of these names return
  int steps = 1, columns = 1;  // the rows of a tile that is all of its unit, and the vectors of each row

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

/// All that a kernel is told: a task, the policy for it, and which part of it this launch is.
struct Work {
  Task task;
  Policy policy;
  Stage stage = Stage::all;
  Shape shape;  // the numbers for `stage`
  bool constant = true;  // all elements of a unit share one weight
  std::int64_t units_per_parameter = 1;  // units that share one weight, where `constant` is true
  bool forms_x = false;  // x is formed from a sum, or from integers, which become floats when they are read
  bool elementwise = false;  // backward: every element has parameters of its own, whose gradients are wanted
  bool reads_whole = true;  // rows of x and dy begin with whole vectors
  bool writes_whole = true;  // rows of y and dx begin with whole vectors
  bool all_whole = false;  // rows also end with whole vectors; parameters change between these, or at each element
  bool params_whole = false;  // all_whole, and parameters, one for each element, lie in whole vectors too
  bool only_whole = false;  // the compiler knows all_whole
  bool summed = true;    // backward: somebody needs the sums
  double* partials = nullptr;  // for each unit and tile: moments, or what Reduced holds
  double* solved =
      nullptr;  // for each statistic: mean and rstd, in backward b and c, of float64 mean_low; one array each; may be null
  ParamGradient dweight, dbias;  // ParamKind::element

  constexpr Grid grid() const { return policy.grid(task.geometry, stage); }
};

/// What kernels are compiled for. A kernel for less than `anything` has half the code and registers; in the runs
/// traversal it has nothing but whole vectors and, forward, may have an activation that is_kink().
enum class Special : std::uint8_t {
  anything,
  along,  // weights that change along the only run of a statistic, and nothing else: layer norm; forward, group norm too
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

/// A copy of the work in which the compiler sees what follows from kSpecial, and drops the code for anything else.
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
/// known_as() for the runs traversal, where less than `anything` means whole vectors as well.
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
  /// The Room that `device`, which is the current one, gives the kernel of the direction and traversal.
  Room (*room)(const Work&, int device);
};

}  // namespace normkit::cuda
