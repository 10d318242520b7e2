// How the CPU goes about one task: every decision that changes speed and never the result.
#pragma once

#include <cstdint>

#include "backend.hpp"

namespace normkit {

struct Policy {
  int threads = 1;
  bool split = false;           // statistics are shared among threads
  Walk walk;
  std::int64_t sum_row = 0;     // doubles of the row in which each thread forms x + residual; 0: it is formed in y
  std::int64_t units = 1;       // fused_units()
  std::int64_t statistics = 1;  // entries of `solved`: statistics (runs) or outer indices (lanes)
  std::int64_t spans = 1;       // spans of each statistic or outer index
};

/// The policy for one task. Outputs may still be absent from `t`, where the caller has not passed them: what the
/// workspace depends on is the same then.
Policy policy_for(const Task& t, int threads, const Isa& isa);

}  // namespace normkit
