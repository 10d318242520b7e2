// A kernel, and what the kernels of the library include: nvcc is tried on them.
#include "device.cuh"

__global__ void nothing() {}
