// All that kernels know of the machine: threads, barriers, shuffles, shared memory, conversions, launches. Nothing else in
// this folder names an intrinsic, so a second implementation of this file (tests/shim) runs the same kernels on a CPU.
//
// A kernel is a function object: its members are the arguments, and every thread calls its operator(). It has a kName, for
// errors, and kBlocks.
#pragma once

#include <cstddef>
#include <cstdint>

#include "normkit/dtype.hpp"
#include "normkit/formula.hpp"

#if defined(NORMKIT_SHIM)
#include "shim.hpp"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#define NORMKIT_DEVICE __device__ __forceinline__
#define NORMKIT_UNROLL _Pragma("unroll")
#define NORMKIT_ROLL _Pragma("unroll 1")

namespace normkit::cuda {

using Stream = cudaStream_t;

NORMKIT_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
NORMKIT_DEVICE int block_threads() { return static_cast<int>(blockDim.x); }
NORMKIT_DEVICE std::int64_t block_index() { return blockIdx.x; }
NORMKIT_DEVICE std::int64_t block_count() { return gridDim.x; }

/// Waits for all threads of the block; none of them may have left.
NORMKIT_DEVICE void sync_block() { __syncthreads(); }

/// `v` of thread `lane` of this warp. All of `members`, a mask of the lanes that take part, call it together.
template <class T> NORMKIT_DEVICE T shuffle(T v, int lane, unsigned members) {
  static_assert(sizeof(T) % 4 == 0);
  int word[sizeof(T) / 4];
  __builtin_memcpy(word, &v, sizeof(T));
  NORMKIT_UNROLL
  for (int& w : word) w = __shfl_sync(members, w, lane);
  __builtin_memcpy(&v, word, sizeof(T));
  return v;
}

/// The block's shared memory: what its launch asked for, aligned to 16 bytes, with anything in it.
NORMKIT_DEVICE std::byte* shared_memory() {
  extern __shared__ int4 memory[];
  return reinterpret_cast<std::byte*>(memory);
}

NORMKIT_DEVICE float widen(Half v) { return __half2float(__ushort_as_half(v.bits)); }
NORMKIT_DEVICE float widen(Bfloat v) { return __bfloat162float(__ushort_as_bfloat16(v.bits)); }
NORMKIT_DEVICE Half narrow(const Half*, float v) { return {__half_as_ushort(__float2half_rn(v))}; }
NORMKIT_DEVICE Bfloat narrow(const Bfloat*, float v) { return {__bfloat16_as_ushort(__float2bfloat16_rn(v))}; }

/// Blocks and threads of one launch, and the bytes of shared memory that a block has.
struct Grid {
  std::int64_t blocks = 1;
  int threads = 256;
  int shared_bytes = 0;
};

/// Throws DeviceError where `status` is not success: what was done, and the shape of the launch if it was one.
void check(cudaError_t status, const char* what, Grid grid = {});

/// A device is the current one as long as this lives; then the one that was before.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    changed_ = device != before_;
    if (changed_) check(cudaSetDevice(device), "cudaSetDevice");
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  ~DeviceGuard() {
    if (changed_) static_cast<void>(cudaSetDevice(before_));
  }

 private:
  int before_ = 0;
  bool changed_ = false;
};

#define NORMKIT_STRING(name) #name
#define NORMKIT_VALUE_OF(name) NORMKIT_STRING(name)
inline constexpr const char* kBuild =
    "CUDA " NORMKIT_VALUE_OF(__CUDACC_VER_MAJOR__) "." NORMKIT_VALUE_OF(__CUDACC_VER_MINOR__);

inline bool has_device() {
  int devices = 0;
  return cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0;
}

/// Kernel::kBlocks blocks of 256 threads fit the registers of a multiprocessor; for one more, registers would spill.
template <class Kernel>
__global__ void __launch_bounds__(256, Kernel::kBlocks) entry(const __grid_constant__ Kernel kernel) {
  kernel();
}

template <class Kernel> void launch(const Kernel& kernel, Grid grid, Stream stream) {
  void* arguments[] = {const_cast<Kernel*>(&kernel)};
  const dim3 blocks(static_cast<unsigned>(grid.blocks)), threads(static_cast<unsigned>(grid.threads));
  const auto bytes = static_cast<std::size_t>(grid.shared_bytes);
  check(cudaLaunchKernel(reinterpret_cast<const void*>(&entry<Kernel>), blocks, threads, arguments, bytes, stream),
        Kernel::kName, grid);
}

}  // namespace normkit::cuda

#endif
