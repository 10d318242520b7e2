// How the CPU goes about one task: every decision that changes speed and never the result.
#pragma once

#include <cstdint>

#include "backend.hpp"

namespace normkit {

struct Policy {
  int threads = 1;
  bool split = false;           // statistics are shared among threads
  bool by_spans = false;        // each thread does its own units span by span
  Walk walk;
  std::int64_t sum_row = 0;     // doubles of the row in which each thread forms x + residual; 0: it is formed in y
  std::int64_t units = 1;       // fused_units()
  std::int64_t statistics = 1;  // entries of `solved`: statistics (runs) or outer indices (lanes)
  std::int64_t spans = 1;       // spans of each statistic or outer index
  bool gathers_chunks = false;  // chunks of a statistic are gathered as it is read, two statistics in turn
  std::int64_t block = 1;       // else: units, or spans, that are gathered together
  std::int64_t buffer = 0;      // bytes of the buffers of a thread into which blocks are gathered
};

/// True where an array of the task has a view.
bool gathers(const Task& t);
/// True where the parts of arrays that have to be in buffers together are small enough for that.
bool can_gather(const Task& t);
/// The arrays of a task that may have views.
inline constexpr Operand Task::* kViewed[] = {&Task::x,      &Task::y,        &Task::dy,  &Task::dx,  &Task::where,
                                              &Task::source, &Task::residual, &Task::ddx, &Task::d_dy};
/// Bytes of one array's part of a buffer.
constexpr std::int64_t buffer_bytes(std::int64_t elements, Dtype dtype) {
  return ceil_div(elements * size_of(dtype), 64) * 64;
}
/// The first statistic (runs) or outer index (lanes) of a unit.
constexpr std::int64_t first_of_unit(const Task& t, std::int64_t unit) {
  if (t.kind != ParamKind::row) return unit;
  return unit / row_groups(t.geometry) * t.geometry.lanes + unit % row_groups(t.geometry) * kRowGroup;
}

/// The policy for one task.
Policy policy_for(const Task& t, int threads, const Isa& isa);

}  // namespace normkit
