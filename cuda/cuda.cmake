# The CUDA half: the objects normkit_cuda_objects, compiled by nvcc, or in their place absent.cpp.
#
#   NORMKIT_CUDA   auto: where nvcc is found    on: required    off: left out
#                  pypi: the compiler of the wheels cuda-toolkit[nvcc,...], which pyproject.toml installs for the build
#                  shim: the kernels run on the CPU, one fiber a thread, in place of those of the CPU: for tests alone
set(NORMKIT_CUDA auto CACHE STRING "auto, on, off, pypi or shim")
set(NORMKIT_CUDA_ARCHITECTURES "75-real;80;90-real;100-real;120" CACHE STRING "GPUs to compile for, as CMake spells them")
if(NOT NORMKIT_CUDA MATCHES "^(auto|on|off|pypi|shim)$")
  message(FATAL_ERROR "NORMKIT_CUDA is ${NORMKIT_CUDA}, expected auto, on, off, pypi or shim")
endif()

if(NORMKIT_CUDA STREQUAL "pypi")
  find_package(Python 3.11 COMPONENTS Interpreter REQUIRED)
  execute_process(COMMAND "${Python_EXECUTABLE}" -c
"import pathlib, nvidia
found = sorted(nvcc for root in nvidia.__path__ for nvcc in pathlib.Path(root).glob('cu*/bin/nvcc'))
print(found[-1] if found else '')"
                  OUTPUT_STRIP_TRAILING_WHITESPACE OUTPUT_VARIABLE nvcc ERROR_QUIET)
  if(NOT nvcc)
    message(FATAL_ERROR "NORMKIT_CUDA is pypi, but no wheel has nvcc: pip install 'cuda-toolkit[nvcc,cudart,cccl,crt,nvvm]'")
  endif()
  set(CMAKE_CUDA_COMPILER ${nvcc})
  cmake_path(GET nvcc PARENT_PATH bin)
  cmake_path(GET bin PARENT_PATH CUDAToolkit_ROOT)
  # FindCUDAToolkit insists on a libcudart.so, which wheels have by its full name alone; what is linked is the static one.
  file(GLOB cudart ${CUDAToolkit_ROOT}/lib/libcudart.so.*)
  set(CUDA_CUDART ${cudart} CACHE FILEPATH "libcudart.so")
endif()

set(normkit_cuda FALSE)
if(NORMKIT_CUDA MATCHES "on|pypi")
  set(normkit_cuda TRUE)
elseif(NORMKIT_CUDA STREQUAL "auto")
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    set(normkit_cuda TRUE)
  else()
    message(STATUS "normkit: no nvcc, so this build has no CUDA (NORMKIT_CUDA=pypi takes it from PyPI)")
  endif()
endif()

# Adds an object library of one source to `objects`; the rest are its options.
function(normkit_add_kernels objects target source)
  add_library(${target} OBJECT ${CMAKE_CURRENT_SOURCE_DIR}/cuda/${source})
  target_include_directories(${target} PRIVATE ${CMAKE_CURRENT_SOURCE_DIR}/cuda ${CMAKE_CURRENT_SOURCE_DIR}/cpp/include
                                               ${CMAKE_CURRENT_SOURCE_DIR}/cpp/src)
  target_compile_options(${target} PRIVATE ${ARGN})
  set(${objects} ${${objects}} $<TARGET_OBJECTS:${target}> PARENT_SCOPE)
endfunction()

set(normkit_cuda_objects "")
if(normkit_cuda)
  set(CMAKE_CUDA_ARCHITECTURES ${NORMKIT_CUDA_ARCHITECTURES})
  enable_language(CUDA)
  find_package(CUDAToolkit REQUIRED)
  set(CMAKE_CUDA_STANDARD 20)
  set(CMAKE_CUDA_STANDARD_REQUIRED ON)
  set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
  # As on the CPU, a fused multiply-add happens where mul_add is written. A kernel that spills is an error everywhere. The GPUs are
  # compiled for side by side.
  set(options --fmad=false --expt-relaxed-constexpr --compress-mode=size --threads=0 -Xcompiler=-Wall
    "SHELL:-Xptxas --warn-on-spills,--warn-on-local-memory-usage,--warning-as-error")
  normkit_add_kernels(normkit_cuda_objects normkit_cuda_launch launch.cu ${options})
  normkit_add_kernels(normkit_cuda_objects normkit_cuda_kernels kernels.cu ${options})
  message(STATUS "normkit: CUDA ${CMAKE_CUDA_COMPILER_VERSION} for ${NORMKIT_CUDA_ARCHITECTURES}")
elseif(NORMKIT_CUDA STREQUAL "shim")
  set_source_files_properties(cuda/launch.cu cuda/kernels.cu PROPERTIES LANGUAGE CXX)
  set(options -x c++ -O1 -ffp-contract=off -Wall -Wextra -DNORMKIT_SHIM -I${CMAKE_CURRENT_SOURCE_DIR}/tests/shim)
  normkit_add_kernels(normkit_cuda_objects normkit_cuda_launch launch.cu ${options})
  foreach(storage float32=float float64=double float16=Half bfloat16=Bfloat)
    string(REGEX MATCH "([a-z0-9]+)=(.*)" _ ${storage})
    normkit_add_kernels(normkit_cuda_objects normkit_cuda_${CMAKE_MATCH_1} kernels.cu ${options}
      -DNORMKIT_STORAGE_NAME=${CMAKE_MATCH_1} -DNORMKIT_STORAGE=${CMAKE_MATCH_2})
  endforeach()
else()
  add_library(normkit_cuda_absent OBJECT cuda/absent.cpp)
  target_link_libraries(normkit_cuda_absent PRIVATE normkit_flags)
  list(APPEND normkit_cuda_objects $<TARGET_OBJECTS:normkit_cuda_absent>)
endif()
