# nvcc, the runtime it links, and the options of everything that it compiles: for the library, and for the probe.
set(CMAKE_CUDA_ARCHITECTURES ${NORMKIT_CUDA_ARCHITECTURES})
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)
if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)  # CMake 3.25 and older know no such nvcc
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
  set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION -std=c++20)
endif()
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
# A fused multiply-add happens where mul_add is written, as on the CPU. nvcc compiles for several GPUs side by side.
set(normkit_nvcc_options --fmad=false --expt-relaxed-constexpr --compress-mode=size --threads=0 -Xcompiler=-Wall)
