// How the CPU goes about one task: every decision that changes speed and never the result.
#pragma once

#include <cstdint>

#include "backend.hpp"

namespace normkit {

struct Policy {
  int threads = 1;
  bool split = false;           // statistics are shared among threads
  Walk walk;
  std::int64_t sum_row = 0;     // doubles of a row of each thread that x + residual is formed in; 0: formed in y
  std::int64_t units = 1;       // fused_units()
  std::int64_t statistics = 1;  // entries of `solved`: statistics (runs) or outer indices (lanes)
  std::int64_t spans = 1;       // of each
};

/// Outputs that the caller has not passed yet may be absent from `t`: what workspace depends on is the same then.
Policy policy_for(const Task& t, int threads, const Isa& isa);

}  // namespace normkit
