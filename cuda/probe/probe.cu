// What the kernels include, and a kernel.
#include "device.cuh"

__global__ void nothing() {}
