// Makes of a job a sequence of kernels on a stream: workspace, tilings, order.
#include "cuda.hpp"

#include "double_backward.cuh"
#include "work.hpp"

namespace normkit::cuda {

extern const Kernels kernels_float32, kernels_float64, kernels_float16, kernels_bfloat16;

#if !defined(NORMKIT_SHIM)
void check(cudaError_t status, const char* what, Grid grid) {
  if (status == cudaSuccess) return;
  throw DeviceError(std::string("CUDA: ") + cudaGetErrorString(status) + " (" + what + ", " +
                    std::to_string(grid.blocks) + " blocks of " + std::to_string(grid.threads) + " threads, " +
                    std::to_string(grid.shared_bytes) + " bytes of shared memory, clusters of " +
                    std::to_string(grid.cluster) + ")");
}
#endif

std::string build() { return kBuild; }
bool available() { return has_device(); }

namespace {

/// The type that elements have in a kernel: integers become floats when they are read.
Dtype held_dtype(Dtype dtype) { return is_floating(dtype) ? dtype : Dtype::float32; }

const Kernels& kernels_for(Dtype dtype) {
  switch (held_dtype(dtype)) {
    case Dtype::float64: return kernels_float64;
    case Dtype::float16: return kernels_float16;
    case Dtype::bfloat16: return kernels_bfloat16;
    default: return kernels_float32;
  }
}

/// Launches Kernel<S> for the compute type S of x, its members being `arguments`.
template <template <class> class Kernel, class... Arguments>
void launch_for(const Task& t, Grid grid, Stream stream, const Arguments&... arguments) {
  if (compute_dtype(t.x.dtype) == Dtype::float64) launch(Kernel<double>{arguments...}, grid, stream);
  else launch(Kernel<float>{arguments...}, grid, stream);
}

/// Carves a workspace into arrays. With a null workspace it only counts.
struct Carver {
  double* memory;
  std::size_t used = 0;
  double* take(std::int64_t doubles) {
    double* const at = memory ? memory + used : nullptr;
    used += (static_cast<std::size_t>(doubles) + 1) / 2 * 2;  // whole vectors
    return at;
  }
};

std::byte* bytes(double* p) { return reinterpret_cast<std::byte*>(p); }

/// The Given that reads statistics from two arrays of doubles.
Given given_by(double* mean, double* scale, std::int64_t stride, std::int64_t count, bool is_variance) {
  return {bytes(mean), bytes(scale), Dtype::float64, Dtype::float64, stride, count, is_variance};
}

/// True where every row of an array, if there is one, begins with a whole vector.
bool begins_whole(const Operand& a, const Work& work) {
  if (!a.data) return true;
  const Geometry& g = work.task.geometry;
  const Strides& s = a.strides;
  std::int64_t apart = work.policy.units > 1 ? work.policy.unit_run : 0;
  if (g.outer > 1) apart |= s.outer;
  if (g.steps > 1) apart |= s.step;
  if (g.lanes > 1) apart |= s.lane;
  return reinterpret_cast<std::uintptr_t>(a.data) % kVectorBytes == 0 && apart * size_of(a.dtype) % kVectorBytes == 0;
}

bool is_whole(const Param& p) { return reinterpret_cast<std::uintptr_t>(p.data) % kVectorBytes == 0; }

/// The work of one task, as far as it does not depend on its direction. `pieces`: parameters change within a run, as in
/// policy_for().
Work work_for(const Task& t, Direction direction, bool pieces) {
  const Geometry& g = t.geometry;
  Work work;
  work.task = t;
  work.policy = policy_for(g, t.traversal, size_of(held_dtype(t.x.dtype)), direction, pieces);
  work.forms_x = t.residual.data || !is_floating(t.x.dtype);
  if (t.traversal == Traversal::lanes) work.constant = constant_in_column(g);
  else work.constant = pieces || constant_in_statistic(g);
  if (work.constant && g.params.count > 1) work.units_per_parameter = g.params.stride / work.policy.unit_run;
  work.elementwise = direction == Direction::backward && t.kind == ParamKind::element;
  work.reads_whole = begins_whole(t.x, work) && begins_whole(t.dy, work);
  work.writes_whole = begins_whole(t.y, work) && begins_whole(t.dx, work);
  const int vector = vector_for(size_of(held_dtype(t.x.dtype)));
  const bool whole = work.reads_whole && work.writes_whole;
  work.params_whole = whole && g.params.stride == 1 && g.run % vector == 0 && g.params.count % vector == 0 &&
                      is_whole(t.weight) && is_whole(t.bias);
  work.all_whole =
      work.params_whole || (whole && t.traversal == Traversal::runs && work.policy.unit_run % vector == 0 &&
                            (work.constant || g.params.stride % vector == 0));
  return work;
}

/// True where a mean is two numbers.
bool has_low(const Task& t) { return compute_dtype(t.x.dtype) == Dtype::float64; }

/// Doubles of the partial results of all tiles.
std::int64_t partial_doubles(const Work& work) {
  const bool forward = work.policy.direction == Direction::forward;
  const std::int64_t each = forward && !has_low(work.task) ? 3 : 4;
  return each * work.task.geometry.statistics() * work.policy.units * work.policy.tiles();
}

// ---- forward -----------------------------------------------------------------------------------------------------

struct ForwardSpace {
  double* running = nullptr;  // running statistics that are not dense, as doubles
  double* moments = nullptr;  // of each statistic, for the update of running statistics
};

/// True where tiles meet in the workspace, or may have to: whether the device has teams is not known yet.
bool is_split(const Work& work) { return !work.task.frozen && !is_alone(work.policy, work.task.geometry); }

bool is_dense(const Running& r) {
  return r.mean_stride == size_of(r.mean_dtype) && r.var_stride == size_of(r.var_dtype);
}

ForwardSpace carve_forward(Carver& carver, const Job& job, Work& work) {
  ForwardSpace space;
  const std::int64_t statistics = work.task.geometry.statistics();
  if (is_split(work)) {
    work.partials = carver.take(partial_doubles(work));
    work.solved = carver.take((has_low(work.task) ? 3 : 2) * statistics);
  }
  if (!job.running.mean) return space;
  if (work.task.frozen && !is_dense(job.running)) space.running = carver.take(2 * job.running.count);
  if (!work.task.frozen && !work.task.moments) space.moments = carver.take(kMomentDoubles<double> * statistics);
  return space;
}

/// Has a task read its statistics from running statistics.
void use_running(Task& t, const Running& r, double* dense, Stream stream) {
  if (dense) {
    launch(ReadRunning{r, dense}, grid_for_items(r.count, 1), stream);
    t.given = given_by(dense, dense + r.count, r.stride, r.count, true);
  } else {
    t.given = {r.mean, r.var, r.mean_dtype, r.var_dtype, r.stride, r.count, true};
  }
  if (t.mean || t.rstd) launch_for<CopyGiven>(t, grid_for_items(t.geometry.statistics(), 1), stream, t);
}

/// Enqueues forward: statistics and y in one launch by teams, else in three launches: moments of all tiles, statistics,
/// y.
void run_forward(const Kernels& kernels, Work& work, int device, Stream stream) {
  Task& t = work.task;
  const std::int64_t statistics = t.geometry.statistics();
  if (t.frozen) {
    work.stage = Stage::rest;
    return kernels.run(work, stream);
  }
  if (work.solved) t.given = given_by(work.solved, work.solved + statistics, 1, statistics, false);
  if (work.solved && has_low(t)) t.given.mean_low = bytes(work.solved + 2 * statistics);
  settle(work.policy, t.geometry, kernels.room(work, device), false);
  if (work.policy.team.exists()) return kernels.run(work, stream);
  work.stage = Stage::sums;
  kernels.run(work, stream);
  launch_for<ForwardFinish>(t, grid_for_statistics(work), stream, work);
  if (t.phase == Phase::reduce) return;
  work.stage = Stage::rest;
  t.residual = {}, work.forms_x = !is_floating(t.x.dtype);  // the sum lies in x by now
  kernels.run(work, stream);
}

// ---- backward ----------------------------------------------------------------------------------------------------

bool has_own_sums(ParamKind kind) {
  return kind == ParamKind::statistic || kind == ParamKind::piece || kind == ParamKind::column;
}

/// True where anybody needs the sums of a statistic: a frozen statistic has no part in dx.
bool needs_sums(const Task& t) {
  const bool follows = t.dx.data || t.kind == ParamKind::row || t.kind == ParamKind::element;
  return t.phase != Phase::apply && (has_own_sums(t.kind) || t.phase == Phase::reduce || (!t.frozen && follows));
}

/// True where the parameters are constant over pieces of a run. It follows from the geometry, whatever gradients are
/// wanted: the bits of dx must not depend on these.
bool has_pieces(const Task& t) {
  const Geometry& g = t.geometry;
  return t.traversal == Traversal::runs && !constant_in_statistic(g) && g.params.stride > 1 && g.steps == 1 &&
         g.run % g.params.stride == 0;
}

/// Doubles that the sums of all row groups take, where nobody joins the blocks of a group.
std::int64_t row_doubles(const Work& work) {
  const Task& t = work.task;
  const std::int64_t sums = work.policy.row_blocks(t.geometry) * 2 * t.geometry.run;
  return compute_dtype(t.x.dtype) == Dtype::float64 ? sums : ceil_div(sums, 2);
}

void carve_backward(Carver& carver, Work& work) {
  Task& t = work.task;
  const std::int64_t statistics = t.geometry.statistics();
  work.summed = needs_sums(t);
  const bool kept = work.summed && is_alone(work.policy, t.geometry) && t.kind != ParamKind::row;
  if (work.summed && !kept) work.partials = carver.take(partial_doubles(work));
  if (!kept) work.solved = carver.take((has_low(t) ? 5 : 4) * statistics);
  if (t.kind == ParamKind::row) t.dparams = carver.take(row_doubles(work));
  else if (dparam_units(t.geometry, t.kind)) t.dparams = carver.take(2 * dparam_units(t.geometry, t.kind));
}

/// Enqueues backward: sums, dx and the sums of rows that share parameters in one launch by teams, else in three or four
/// launches: sums of all tiles, statistics, the sums of rows, for which x and dy must be as they were, then dx, which
/// may lie over x or dy.
void run_backward(const Kernels& kernels, Work& work, int device, Stream stream) {
  const Task& t = work.task;
  const bool by_rows = t.kind == ParamKind::row && t.phase != Phase::reduce;
  const bool solves_alone = t.traversal == Traversal::runs && !work.summed;
  if (work.summed) settle(work.policy, t.geometry, kernels.room(work, device), by_rows);
  if (work.policy.team.exists() && by_rows == work.policy.collects) {
    work.solved = nullptr;  // nobody reads it
    return kernels.run(work, stream);
  }
  work.stage = Stage::sums;
  if (work.summed) kernels.run(work, stream);
  if (by_rows || !solves_alone) launch_for<BackwardFinish>(t, grid_for_statistics(work), stream, work);
  if (t.phase == Phase::reduce) return;
  if (by_rows) kernels.row_gradients(work, stream);
  work.stage = Stage::rest;
  if (t.dx.data || t.kind == ParamKind::element) kernels.run(work, stream);
}

/// The units that share a parameter; within an outer index where outer indices have parameters of their own.
Share share_of(const Geometry& g, ParamKind kind, std::int64_t units) {
  const ParamMap& p = g.params;
  Share share{1, p.count, 1};
  const std::int64_t slice = g.steps * g.columns();  // elements of an outer index
  const bool by_outer = g.steps > 1 && p.stride % slice == 0;
  if (kind == ParamKind::statistic) share.inner = by_outer ? p.stride / slice * g.lanes : p.stride / g.run;
  if (kind == ParamKind::column) share.inner = by_outer ? p.stride / slice * g.columns() : p.stride;
  if (p.count == 1) share.inner = units;
  share.repeats = units / (share.count * share.inner);
  return share;
}

/// dweight and dbias from the sums of rows.
template <class S> void total_rows(const Job& job, const Work& work, Stream stream) {
  const Geometry& g = work.task.geometry;
  const RowGroups& rows = work.policy.rows;
  const RowTotals<S> totals{reinterpret_cast<const S*>(work.task.dparams), rows.count,  g.run,    g.parameters(),
                            work.policy.joins_rows ? 1 : rows.blocks,      job.dweight, job.dbias};
  launch(totals, totals.grid(), stream);
}

void total_gradients(const Job& job, const Work& work, Stream stream) {
  const Task& t = work.task;
  const Geometry& g = t.geometry;
  if (t.kind == ParamKind::row)
    return compute_dtype(t.x.dtype) == Dtype::float64 ? total_rows<double>(job, work, stream)
                                                      : total_rows<float>(job, work, stream);
  const std::int64_t units = dparam_units(g, t.kind) / (g.params.outer ? g.outer : 1);
  const Share share = share_of(g, t.kind, units);
  launch(Totals{t.dparams, share, g.parameters(), units, job.dweight, job.dbias}, grid_for_items(g.parameters(), kWarp),
         stream);
}

// ---- the gradient of a backward ----------------------------------------------------------------------------------

SecondWork carve_second(Carver& carver, const Job& job) {
  SecondWork work{job.task, nullptr, nullptr, job.dweight, job.dbias};
  work.partials = carver.take(work.numbers() * work.partial_count());
  const std::int64_t each = sizeof(SecondKnown) / sizeof(double);
  work.solved = reinterpret_cast<SecondKnown*>(carver.take(each * job.task.geometry.statistics()));
  return work;
}

void run_second(const SecondWork& work, Stream stream) {
  const Geometry& g = work.task.geometry;
  const auto pass = [&](SecondPass::Part part) {
    const SecondPass kernel{work, part};
    launch(kernel, kernel.grid(), stream);
  };
  pass(SecondPass::Part::sums);
  Grid statistics = grid_for_items(g.statistics(), kWarp);
  statistics.shared_bytes = kGroupBytes;
  launch(SecondFinish{work}, statistics, stream);
  pass(SecondPass::Part::results);
  if (work.dweight.data || work.dbias.data) pass(SecondPass::Part::params);
}

Work work_for(const Job& job) {
  const Direction direction = job.is_backward ? Direction::backward : Direction::forward;
  return work_for(job.task, direction, job.is_backward && has_pieces(job.task));
}

/// Runs one of the jobs that for_each_job() makes.
void run_one(const Job& job, void* workspace, int device, Stream stream) {
  if (job.task.twice) {
    Carver carver{static_cast<double*>(workspace)};
    return run_second(carve_second(carver, job), stream);
  }
  if (job.is_backward && job.task.phase == Phase::both && !job.task.dx.data && !job.dweight.data && !job.dbias.data)
    return;
  Work work = work_for(job);
  Task& t = work.task;
  Carver carver{static_cast<double*>(workspace)};
  if (job.is_backward) {
    carve_backward(carver, work);
    if (t.kind == ParamKind::element) work.dweight = job.dweight, work.dbias = job.dbias;
    run_backward(kernels_for(t.x.dtype), work, device, stream);
    if (t.phase != Phase::reduce && t.dparams) total_gradients(job, work, stream);
    return;
  }
  const ForwardSpace space = carve_forward(carver, job, work);
  if (t.frozen && job.running.mean) use_running(t, job.running, space.running, stream);
  if (space.moments) t.moments = space.moments;
  run_forward(kernels_for(t.x.dtype), work, device, stream);
  if (job.running.mean && !t.frozen)
    launch(UpdateRunning{t.moments, t.geometry.statistics(), job.running}, grid_for_items(job.running.count, kWarp),
           stream);
}

}  // namespace

std::size_t workspace_bytes(const Job& job) {
  Job copy = job;
  std::size_t most = 0;
  for_each_job(copy, [&](const Job& one) {
    Carver carver{nullptr};
    if (one.task.twice) {
      carve_second(carver, one);
    } else {
      Work work = work_for(one);
      if (one.is_backward) carve_backward(carver, work);
      else carve_forward(carver, one, work);
    }
    if (carver.used > most) most = carver.used;
  });
  return most * sizeof(double);
}

void run(const Job& job, void* workspace, void* stream, int device) {
  const DeviceGuard guard(device);
  Job copy = job;
  for_each_job(copy, [&](const Job& one) { run_one(one, workspace, device, static_cast<Stream>(stream)); });
}

}  // namespace normkit::cuda
