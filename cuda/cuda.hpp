// Runs a validated task on a GPU: the counterpart of cpu.hpp, over the same jobs. absent.cpp has the same functions in a build
// without CUDA.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>

#include "cpu.hpp"

namespace normkit::cuda {

/// What the driver reports. Calls that fail in it throw this; arrays may be half written then.
struct DeviceError : std::runtime_error { using std::runtime_error::runtime_error; };

/// What this build has: "CUDA 13.0", say, "shim", or "" for nothing.
std::string build();

/// True where there is a driver and a device that this build can use. Never throws.
bool available();

/// Bytes of workspace that a run wants, and the run: kernels are enqueued on `stream` (a cudaStream_t) of `device`, and nothing
/// is waited for, allocated or copied. All memory of the job is of that device; `workspace` is aligned to 16 bytes, and in use
/// until the stream has come to what is enqueued here.
std::size_t workspace_bytes(const Job& job);
void run(const Job& job, void* workspace, void* stream, int device);

}  // namespace normkit::cuda
