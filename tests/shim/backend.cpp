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

void merge_moments(double* into, const double* from, std::int64_t n, Dtype x) {
  x == Dtype::float64 ? merge_all<double>(into, from, n) : merge_all<float>(into, from, n);
}

}  // namespace normkit
