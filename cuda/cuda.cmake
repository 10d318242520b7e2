# The CUDA half: the objects normkit_cuda_objects, compiled by nvcc, or in their place absent.cpp.
#
#   NORMKIT_CUDA   auto: where there is an nvcc that can compile them    on: required    off: left out
#                  pypi: the compiler of the wheels cuda-toolkit[nvcc,...], which pyproject.toml installs for the build
#                  shim: the kernels run on the CPU, one fiber a thread, in place of those of the CPU: for tests alone
set(NORMKIT_CUDA auto CACHE STRING "auto, on, off, pypi or shim")
# One of them with code that drivers translate for GPUs that are not among these: the oldest that most of those can take. A second
# such, for those to come, would be 0.33 MB of the wheel, which has 4.96 of the 5 MB that are allowed.
set(NORMKIT_CUDA_ARCHITECTURES "75-real;80;90-real;100-real;120-real" CACHE STRING "GPUs to compile for, as CMake spells them")
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

# Sets normkit_no_cuda to what speaks against CUDA, or to nothing. nvcc may be too old, or refuse the C++ compiler: it is tried
# with all options and architectures.
function(normkit_try_nvcc)
  set(normkit_no_cuda "" PARENT_SCOPE)
  if(NORMKIT_NVCC_WORKS AND EXISTS "${CMAKE_CUDA_COMPILER}")
    return()
  elseif(NORMKIT_NVCC_WORKS)  # it is gone since
    unset(CMAKE_CUDA_COMPILER CACHE)
    file(REMOVE ${CMAKE_PLATFORM_INFO_DIR}/CMakeCUDACompiler.cmake)
  endif()
  set(folder ${CMAKE_CURRENT_BINARY_DIR}/normkit_probe)
  set(settings -DCMAKE_MAKE_PROGRAM=${CMAKE_MAKE_PROGRAM})
  foreach(name CMAKE_CXX_COMPILER CMAKE_CUDA_COMPILER CMAKE_CUDA_HOST_COMPILER CMAKE_CUDA_FLAGS CUDAToolkit_ROOT
               NORMKIT_CUDA_ARCHITECTURES)
    if(DEFINED ${name})
      string(REPLACE ";" "\\;" value "${${name}}")
      list(APPEND settings "-D${name}=${value}")
    endif()
  endforeach()
  file(REMOVE_RECURSE ${folder})
  message(CHECK_START "normkit: trying nvcc")
  execute_process(COMMAND ${CMAKE_COMMAND} -S ${CMAKE_CURRENT_SOURCE_DIR}/cuda/probe -B ${folder} -G ${CMAKE_GENERATOR} ${settings}
                  RESULT_VARIABLE failed OUTPUT_VARIABLE output ERROR_VARIABLE output)
  if(NOT failed)
    execute_process(COMMAND ${CMAKE_COMMAND} --build ${folder}
                    RESULT_VARIABLE failed OUTPUT_VARIABLE output ERROR_VARIABLE output)
  endif()
  if(NOT failed)
    message(CHECK_PASS "it works")
    set(NORMKIT_NVCC_WORKS TRUE CACHE INTERNAL "")
    return()
  endif()
  message(CHECK_FAIL "no")
  set(reason "nvcc failed")
  # The reason is the last of these that is found: a sentence of CMake, then what compilers say.
  foreach(words IN ITEMS "CMake Error[^\n]*\n +(([^.]|[.][^\n])*)" "error: ([^\n]*)" "#error -- ([^!]*![^!.]*)"
                         "nvcc fatal *: ([^\n]*)")
    if(output MATCHES "${words}")
      set(reason "nvcc failed: ${CMAKE_MATCH_1}")
    endif()
  endforeach()
  if(output MATCHES "No CMAKE_CUDA_COMPILER could be found|Failed to find nvcc")
    set(reason "there was no nvcc")
  endif()
  string(REGEX REPLACE "[\\\"$\n ]+" " " reason "${reason}")
  string(SUBSTRING "${reason}" 0 200 reason)
  set(normkit_no_cuda "${reason}" PARENT_SCOPE)
  file(WRITE ${folder}/output.txt "${output}")
endfunction()

set(normkit_no_cuda "")
if(NORMKIT_CUDA STREQUAL "auto")
  normkit_try_nvcc()
elseif(NORMKIT_CUDA STREQUAL "off")
  set(normkit_no_cuda "NORMKIT_CUDA was off")
endif()
set(normkit_cuda FALSE)
if(normkit_no_cuda STREQUAL "" AND NOT NORMKIT_CUDA STREQUAL "shim")
  set(normkit_cuda TRUE)
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
  include(${CMAKE_CURRENT_LIST_DIR}/nvcc.cmake)
  if(NORMKIT_WERROR)  # for another nvcc the kernels may be slower, no more
    list(APPEND normkit_nvcc_options
      "SHELL:-Xptxas --warn-on-spills,--warn-on-local-memory-usage,--warning-as-error")
  endif()
  normkit_add_kernels(normkit_cuda_objects normkit_cuda_launch launch.cu ${normkit_nvcc_options})
  normkit_add_kernels(normkit_cuda_objects normkit_cuda_kernels kernels.cu ${normkit_nvcc_options})
  message(STATUS "normkit: CUDA ${CMAKE_CUDA_COMPILER_VERSION} for ${NORMKIT_CUDA_ARCHITECTURES}")
elseif(NORMKIT_CUDA STREQUAL "shim")
  set_source_files_properties(cuda/launch.cu cuda/kernels.cu PROPERTIES LANGUAGE CXX)
  # The kernels are compiled as for two sanitizers, in whose places are tests/shim/count.cpp, which counts bytes, and
  # aligned.cpp, which stops at an address that no GPU reads.
  set(options -x c++ -O1 -ffp-contract=off -Wall -Wextra -DNORMKIT_SHIM -I${CMAKE_CURRENT_SOURCE_DIR}/tests/shim
    -DNORMKIT_SHIM_COUNTS -fsanitize=thread -fsanitize=alignment -fno-sanitize-recover=alignment)
  normkit_add_kernels(normkit_cuda_objects normkit_cuda_launch launch.cu ${options})
  foreach(storage float32=float float64=double float16=Half bfloat16=Bfloat)
    string(REGEX MATCH "([a-z0-9]+)=(.*)" _ ${storage})
    normkit_add_kernels(normkit_cuda_objects normkit_cuda_${CMAKE_MATCH_1} kernels.cu ${options}
      -DNORMKIT_STORAGE_NAME=${CMAKE_MATCH_1} -DNORMKIT_STORAGE=${CMAKE_MATCH_2})
  endforeach()
else()
  message(STATUS "normkit: this build has no CUDA: ${normkit_no_cuda}")
  add_library(normkit_cuda_absent OBJECT cuda/absent.cpp)
  target_link_libraries(normkit_cuda_absent PRIVATE normkit_flags)
  target_compile_definitions(normkit_cuda_absent PRIVATE "NORMKIT_NO_CUDA=\"${normkit_no_cuda}\"")
  list(APPEND normkit_cuda_objects $<TARGET_OBJECTS:normkit_cuda_absent>)
endif()
