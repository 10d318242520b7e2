// All that kernels know of the machine: threads, barriers, shuffles, shared memory, clusters, conversions, launches. Nothing else in
// this folder names an intrinsic, so a second implementation of this file (tests/shim) runs the same kernels on a CPU.
//
// A kernel is a function object: its members are the arguments, and every thread calls its operator(). It has a kName, for
// errors, and kBlocks.
#pragma once

#include <cstddef>
#include <cstdint>

#include "normkit/dtype.hpp"
#include "normkit/formula.hpp"
#include "policy.hpp"

#if defined(NORMKIT_SHIM)
#include "shim.hpp"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <atomic>

#define NORMKIT_DEVICE __device__ __forceinline__
/// Marks a function that is called, not inlined: many places of a kernel ask for it, once or so for each thread.
#define NORMKIT_CALLED static __device__ __noinline__
#define NORMKIT_UNROLL _Pragma("unroll")
#define NORMKIT_ROLL _Pragma("unroll 1")
#define NORMKIT_UNROLL_BY(n) _Pragma(NORMKIT_STRING(unroll n))
#define NORMKIT_STRING(words) #words
/// Tests plant mistakes, to see that they would be found: in the shim, where this names one of them.
#define NORMKIT_PLANTED(mistake) false

namespace normkit::cuda {

using Stream = cudaStream_t;

NORMKIT_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
NORMKIT_DEVICE int block_threads() { return static_cast<int>(blockDim.x); }
NORMKIT_DEVICE std::int64_t block_index() { return blockIdx.x; }
NORMKIT_DEVICE std::int64_t block_count() { return gridDim.x; }

NORMKIT_DEVICE int log2_of(int power_of_two) { return 31 - __clz(power_of_two); }

/// Returns v in a way that hides its value from the compiler, which then computes anew what follows from v, and keeps
/// none of it in registers.
NORMKIT_DEVICE int computed_anew(int v) {
  asm volatile("" : "+r"(v));
  return v;
}

/// Waits for all threads of the block; none of them may have left.
NORMKIT_DEVICE void sync_block() { __syncthreads(); }
/// Waits for the lanes `members` of this warp, a mask; all of them come here.
NORMKIT_DEVICE void sync_warp(unsigned members) { __syncwarp(members); }

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

/// Stores 16 bytes at once, to an address of global memory that is a multiple of 16. An assignment would be taken
/// apart, and its words merged with the stores of the other branch, element by element.
NORMKIT_DEVICE void store_words(void* to, const std::uint32_t (&word)[4]) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(word[0]), "r"(word[1]), "r"(word[2]),
               "r"(word[3])
               : "memory");
}

/// Copies kBytes, 4, 8 or 16 and aligned to as many, from global to shared memory, past the registers and while the
/// thread goes on. The bytes are there for this thread when it has waited for their batch; end_batch() closes a batch
/// of copies, and wait_for_batches<n>() waits for all but the last n batches.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
template <int kBytes> NORMKIT_DEVICE void copy_aside(void* to, const void* from) {
  const auto shared = static_cast<unsigned>(__cvta_generic_to_shared(to));
  if constexpr (kBytes == 16)  // past the first-level cache too: nobody reads them twice
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(shared), "l"(from) : "memory");
  else asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared), "l"(from), "n"(kBytes) : "memory");
}
NORMKIT_DEVICE void end_batch() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kLast> NORMKIT_DEVICE void wait_for_batches() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLast) : "memory");
}
#else
template <int kBytes> NORMKIT_DEVICE void copy_aside(void* to, const void* from) {
  if constexpr (kBytes == 16) *static_cast<uint4*>(to) = *static_cast<const uint4*>(from);
  else if constexpr (kBytes == 8) *static_cast<uint2*>(to) = *static_cast<const uint2*>(from);
  else *static_cast<std::uint32_t*>(to) = *static_cast<const std::uint32_t*>(from);
}
NORMKIT_DEVICE void end_batch() {}
template <int> NORMKIT_DEVICE void wait_for_batches() {}
#endif

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
inline constexpr bool kHasClusters = true;
NORMKIT_DEVICE int cluster_rank() { return static_cast<int>(__clusterRelativeBlockRank()); }
/// The barrier of all threads of the cluster, in two halves: each thread says that it has come, then waits for all to have come.
/// What a thread has written before the first half, all threads read after the second.
NORMKIT_DEVICE void arrive_at_cluster() { __cluster_barrier_arrive(); }
/// The first half of that barrier for a thread that only says that it runs: nobody reads what it has written after the
/// barrier.
NORMKIT_DEVICE void announce_to_cluster() { __cluster_barrier_arrive_relaxed(); }
NORMKIT_DEVICE void wait_for_cluster() { __cluster_barrier_wait(); }
/// The shared memory of block `rank` of the cluster. That block must be known to have started, and not to have left.
NORMKIT_DEVICE std::byte* peer_memory(int rank) {
  return static_cast<std::byte*>(__cluster_map_shared_rank(shared_memory(), static_cast<unsigned>(rank)));
}
#else  // never launched in clusters
inline constexpr bool kHasClusters = false;
NORMKIT_DEVICE int cluster_rank() { return 0; }
NORMKIT_DEVICE void arrive_at_cluster() {}
NORMKIT_DEVICE void announce_to_cluster() {}
NORMKIT_DEVICE void wait_for_cluster() {}
NORMKIT_DEVICE std::byte* peer_memory(int) { return shared_memory(); }
#endif

NORMKIT_DEVICE float widen(Half v) { return __half2float(__ushort_as_half(v.bits)); }
NORMKIT_DEVICE float widen(Bfloat v) { return __bfloat162float(__ushort_as_bfloat16(v.bits)); }
NORMKIT_DEVICE Half narrow(const Half*, float v) { return {__half_as_ushort(__float2half_rn(v))}; }
NORMKIT_DEVICE Bfloat narrow(const Bfloat*, float v) { return {__bfloat16_as_ushort(__float2bfloat16_rn(v))}; }

/// Throws DeviceError where `status` is not success: it says what was done, and the shape of the launch if it was one.
void check(cudaError_t status, const char* what, Grid grid = {});

/// Lets kernels be loaded as long as it lives, even where the stream is being captured. The first launch of a kernel
/// loads it, and a capture refuses the calls that this takes, unless the thread has said that it knows what it does.
class LoadingGuard {
 public:
  LoadingGuard() { check(cudaThreadExchangeStreamCaptureMode(&mode_), "cudaThreadExchangeStreamCaptureMode"); }
  LoadingGuard(const LoadingGuard&) = delete;
  LoadingGuard& operator=(const LoadingGuard&) = delete;
  ~LoadingGuard() { static_cast<void>(cudaThreadExchangeStreamCaptureMode(&mode_)); }

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

/// Makes a device the current one as long as it lives, and then the one that was current before.
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
  LoadingGuard loading_;
  int before_ = 0;
  bool changed_ = false;
};

#define NORMKIT_VALUE_OF(name) NORMKIT_STRING(name)
inline constexpr const char* kBuild =
    "CUDA " NORMKIT_VALUE_OF(__CUDACC_VER_MAJOR__) "." NORMKIT_VALUE_OF(__CUDACC_VER_MINOR__);

inline bool has_device() {
  int devices = 0;
  return cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0;
}

/// How many blocks of 256 threads fit the registers of a multiprocessor: Kernel::kBlocks; for one more, registers would
/// spill. Code for GPUs before 9.0 takes more registers in places: kBlocksBefore90 is for these GPUs.
template <class Kernel> constexpr int resident_blocks() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  if constexpr (requires { Kernel::kBlocksBefore90; }) return Kernel::kBlocksBefore90;
#endif
  return Kernel::kBlocks;
}
template <class Kernel>
__global__ void __launch_bounds__(256, resident_blocks<Kernel>()) entry(const __grid_constant__ Kernel kernel) {
  kernel();
}

template <class Kernel> const void* symbol() { return reinterpret_cast<const void*>(&entry<Kernel>); }

/// A launch with one attribute: its cluster.
class Launch {
 public:
  Launch(Grid grid, Stream stream) {
    attribute_.id = cudaLaunchAttributeClusterDimension;
    attribute_.val.clusterDim = {static_cast<unsigned>(grid.cluster), 1, 1};
    config_.gridDim = dim3(static_cast<unsigned>(grid.blocks)),
    config_.blockDim = dim3(static_cast<unsigned>(grid.threads));
    config_.dynamicSmemBytes = static_cast<std::size_t>(grid.shared_bytes), config_.stream = stream;
    config_.attrs = &attribute_, config_.numAttrs = grid.cluster > 1;
  }
  Launch(const Launch&) = delete;
  Launch& operator=(const Launch&) = delete;
  const cudaLaunchConfig_t* config() const { return &config_; }

 private:
  cudaLaunchAttribute attribute_{};
  cudaLaunchConfig_t config_{};
};

template <class Kernel> void launch(const Kernel& kernel, Grid grid, Stream stream) {
  void* arguments[] = {const_cast<Kernel*>(&kernel)};
  if (grid.blocks > kMostBlocks) check(cudaErrorInvalidConfiguration, Kernel::kName, grid);
  check(cudaLaunchKernelExC(Launch(grid, stream).config(), symbol<Kernel>(), arguments), Kernel::kName, grid);
}

/// What the current device gives a kernel that asks for it. There are clusters as far as there is code for them: code for older
/// GPUs that was translated for a newer one has none. Clusters of more blocks than every GPU takes are used where three
/// quarters of the multiprocessors can be in such clusters at once.
template <class Kernel> Room ask_room(int device) {
  const void* const kernel = symbol<Kernel>();
  const auto succeeds = [](cudaError_t status) {
    if (status != cudaSuccess) static_cast<void>(cudaGetLastError());  // an answer, and no error of the next call
    return status == cudaSuccess;
  };
  Room room = kPlainRoom;
  int bytes = 0, processors = 0, clusters = 0;
  if (succeeds(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device)))
    room.processors = static_cast<std::int16_t>(processors);
  if (!succeeds(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device)) ||
      !succeeds(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)))
    return room;
  room.shared_bytes = bytes;
  cudaFuncAttributes attributes{};
  if (!succeeds(cudaFuncGetAttributes(&attributes, kernel)) || attributes.ptxVersion < 90) return room;
  const auto has = [&](int blocks, int at_least) {
    const Launch largest({blocks, kBlockThreads, bytes, blocks}, nullptr);
    return succeeds(cudaOccupancyMaxActiveClusters(&clusters, kernel, largest.config())) &&
           clusters * blocks >= at_least;
  };
  if (has(kPortableCluster, 1)) room.cluster = kPortableCluster;
  if (succeeds(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1)) &&
      has(kMostClusterBlocks, processors * 3 / 4))
    room.cluster = kMostClusterBlocks;
  return room;
}

/// The Room of a kernel on `device`, which is the current one. The driver is asked once for each kernel and device.
template <class Kernel> Room room_of(int device) {
  static std::atomic<Room> known[64];  // of no bytes: nothing is known yet
  static_assert(std::atomic<Room>::is_always_lock_free);
  if (device >= 64) return ask_room<Kernel>(device);
  Room room = known[device].load(std::memory_order_relaxed);
  if (room.shared_bytes == 0) known[device].store(room = ask_room<Kernel>(device), std::memory_order_relaxed);
  return room;
}

}  // namespace normkit::cuda

#endif
