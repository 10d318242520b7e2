// Tables of the storage types that a test does not compile.
#include "work.hpp"

namespace normkit::cuda {

extern const Kernels kernels_float64, kernels_float16, kernels_bfloat16, kernels_uint8, kernels_int8, kernels_uint16,
    kernels_int16;
const Kernels kernels_float64{}, kernels_float16{}, kernels_bfloat16{}, kernels_uint8{}, kernels_int8{},
    kernels_uint16{}, kernels_int16{};

}  // namespace normkit::cuda
