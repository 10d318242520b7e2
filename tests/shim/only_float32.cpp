// Tables of the storage types that a test does not compile.
#include "work.hpp"

namespace normkit::cuda {

extern const Kernels kernels_float64, kernels_float16, kernels_bfloat16;
const Kernels kernels_float64{}, kernels_float16{}, kernels_bfloat16{};

}  // namespace normkit::cuda
