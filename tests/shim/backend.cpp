// The functions of cpu.hpp and of normkit.hpp's control, with the kernels of cuda/ behind them: linked in place of cpu.cpp, it
// makes every test of the CPU one of the CUDA kernels.
#include <cstring>
#include <memory>
#include <new>

#include "cuda.hpp"
#include "device.cuh"
#include "normkit/formula.hpp"
#include "normkit/normkit.hpp"

namespace normkit {

/// The workspace of a GPU holds anything, here NaN.
void run(Job& job) {
  constexpr std::align_val_t kAligned{64};
  const std::size_t bytes = cuda::workspace_bytes(job);
  const auto let_go = [](std::byte* p) { ::operator delete[](p, kAligned); };
  const std::unique_ptr<std::byte[], decltype(let_go)> memory(
      static_cast<std::byte*>(::operator new[](bytes, kAligned)), let_go);
  std::memset(memory.get(), 0xff, bytes);
  cuda::shim::workspace = {memory.get(), memory.get() + bytes};
  cuda::run(job, memory.get(), nullptr, 0);
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
