// Runs a validated Task on the CPU: instruction set, schedule, threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "backend.hpp"
#include "views.hpp"

namespace normkit {

/// Where gradients of parameters end up: element p of `data`, of any floating dtype.
struct ParamGradient {
  std::byte* data = nullptr;
  Dtype dtype = Dtype::float32;
};

/// Running statistics, one pair per channel; channel = (statistic / stride) % count.
struct Running {
  std::byte* mean = nullptr;
  std::byte* var = nullptr;
  Dtype mean_dtype = Dtype::float32, var_dtype = Dtype::float32;
  std::int64_t mean_stride = 0, var_stride = 0;  // bytes
  std::int64_t stride = 1, count = 1;
  double momentum = 0;
};

/// A validated call. `threads` is fixed when it is planned.
struct Job {
  Task task;
  bool is_backward = false;
  int threads = 1;
  Running running;
  ParamGradient dweight, dbias, dslopes;
  std::vector<View> views;  // of arrays that kernels do not take as they are; a GPU has none

  const View& view_of(const Operand& a) const { return views[static_cast<std::size_t>(a.view)]; }
};

/// Calls f with the jobs that one job is made of, in their order. The gradient of slopes, a sum of dy * min(z, 0), has a job of its
/// own: it is the dbias of an activation with this derivative. That job is the first, since dx may lie over x or dy.
template <class F> void for_each_job(Job& job, F f) {
  if (job.dslopes.data) {
    Job first = job;
    first.task.activation = {ActivationKind::negative_part}, first.task.slopes = {};
    first.task.dx = first.task.residual = {};
    first.dweight = first.dslopes = {}, first.dbias = job.dslopes;
    f(first);
    job.dslopes = {};
    if (!job.dweight.data && !job.dbias.data) job.task.kind = ParamKind::none;
  }
  f(job);
}

/// True where run() takes jobs whose arrays have views.
bool takes_views();

void run(Job& job);

}  // namespace normkit
