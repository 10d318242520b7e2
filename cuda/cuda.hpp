// Runs a validated task on a GPU: the counterpart of cpu.hpp, over the same jobs. absent.cpp has the same functions in a build
// without CUDA.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>

#include "cpu.hpp"

namespace normkit::cuda {

/// An error that the driver reports. A call that fails in the driver throws it; its outputs may be half written then.
struct DeviceError : std::runtime_error { using std::runtime_error::runtime_error; };

/// Names what this build runs kernels with: "CUDA 13.0", say, or "shim"; "" where it has none.
std::string build();

/// True where there is a driver and a device that this build can use. Never throws.
bool available();

/// workspace_bytes() says how many bytes of workspace run() wants. run() enqueues kernels on `stream` (a cudaStream_t)
/// of `device`; it waits for nothing, allocates nothing and copies nothing. All memory of the job belongs to that
/// device; `workspace` is aligned to 16 bytes, and in use until the stream has done what is enqueued here.
std::size_t workspace_bytes(const Job& job);
void run(const Job& job, void* workspace, void* stream, int device);

}  // namespace normkit::cuda
