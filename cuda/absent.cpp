// The functions of cuda.hpp in a build without CUDA.
#include "cuda.hpp"

namespace normkit::cuda {
namespace {

[[noreturn]] void refuse() {
  throw DeviceError("this build of normkit has no CUDA (" NORMKIT_NO_CUDA
                    "): install it with NORMKIT_CUDA=on, or pypi for a compiler from PyPI, or pass NumPy arrays");
}

}  // namespace

std::string build() { return ""; }
bool available() { return false; }
std::size_t workspace_bytes(const Job&) { refuse(); }
void run(const Job&, void*, void*, int) { refuse(); }

}  // namespace normkit::cuda
