// The functions of cpu.hpp and of normkit.hpp's control, with the kernels of cuda/ behind them: linked in place of cpu.cpp, it
// makes every test of the CPU one of the CUDA kernels.
#include <cstring>

#include "cuda.hpp"
#include "device.cuh"
#include "normkit/formula.hpp"
#include "normkit/normkit.hpp"

namespace normkit {

std::size_t workspace_doubles(const Job& job) { return cuda::workspace_bytes(job) / sizeof(double); }

/// The workspace of a GPU holds anything, here NaN.
void run(Job& job, double* workspace) {
  const std::size_t bytes = cuda::workspace_bytes(job);
  auto* const memory = reinterpret_cast<std::byte*>(workspace);
  std::memset(memory, 0xff, bytes);
  cuda::shim::workspace = {memory, memory + bytes};
  cuda::run(job, workspace, nullptr, 0);
}

bool takes_views() { return false; }

std::string isa() { return "shim"; }
std::vector<std::string> isas() { return {"shim"}; }
bool use_isa(const std::string& name) { return name == "shim"; }
int num_threads() { return 1; }
void set_num_threads(int) {}

void merge_moments(double* into, const double* from, std::int64_t n) {
  for (std::int64_t k = 0; k < n; ++k, into += 3, from += 3) {
    const Moments m = merge({into[0], into[1], into[2]}, {from[0], from[1], from[2]});
    into[0] = m.mean, into[1] = m.m2, into[2] = m.n;
  }
}

}  // namespace normkit
