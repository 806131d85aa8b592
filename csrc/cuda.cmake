# The CUDA library in plain calls of nvcc, with the flags of csrc/flags.json; included by CMakeLists.txt. Which nvcc,
# whose PyTorch headers and which architectures is asked of csrc/build_cuda.py, so that setup.py and CMake agree.

set(RAVEN_OPS "" CACHE STRING "only these of csrc/ops, separated by semicolons; empty: all")
if(Python_Interpreter_FOUND)
  execute_process(
    COMMAND ${Python_EXECUTABLE} csrc/build_cuda.py --describe
    WORKING_DIRECTORY ${CMAKE_SOURCE_DIR}
    OUTPUT_VARIABLE TOOLS
    ERROR_VARIABLE why
    RESULT_VARIABLE failed)
else()
  set(why "raven: found no Python, which says where nvcc and PyTorch's headers are")
  set(failed 1)
endif()
if(failed AND RAVEN_CUDA STREQUAL "AUTO")
  message(STATUS "The CUDA library is not built. ${why}")
  return()
elseif(failed)
  message(FATAL_ERROR "${why}")
endif()

string(JSON NVCC GET "${TOOLS}" nvcc)
string(JSON ARCHS GET "${TOOLS}" archs)
string(JSON VERSION GET "${TOOLS}" version)
string(JSON TARGET_VERSION GET "${FLAGS}" torch_target_version)
list_of(TORCH_INCLUDE "${TOOLS}" torch_include)
list_of(LIBRARY_DIRS "${TOOLS}" library_dirs)
list_of(NVCC_FLAGS "${FLAGS}" nvcc)
list_of(INCLUDE "${FLAGS}" include)
list_of(LINK "${FLAGS}" link)
list_of(TORCH_LIBRARIES "${FLAGS}" torch_libraries)
list_of(EXPORTS "${FLAGS}" exports)
separate_arguments(ARCHS)

set(COMPILE -std=c++${CMAKE_CXX_STANDARD} ${NVCC_FLAGS} -DTORCH_TARGET_VERSION=${TARGET_VERSION})
foreach(arch ${ARCHS})
  list(APPEND COMPILE -gencode=arch=compute_${arch},code=sm_${arch})
endforeach()
list(TRANSFORM INCLUDE PREPEND -I)
list(APPEND COMPILE ${INCLUDE})
set(SYSTEM_INCLUDE "")
foreach(folder ${TORCH_INCLUDE})
  list(APPEND SYSTEM_INCLUDE -isystem ${folder})
endforeach()

# Appends to OUTPUTS; more arguments of nvcc may follow.
function(nvcc_command outputs output source)
  add_custom_command(
    OUTPUT ${output}
    COMMAND ${NVCC} ${COMPILE} ${SYSTEM_INCLUDE} ${ARGN} -MD -MF ${output}.d -o ${output} ${source}
    DEPENDS ${source}
    DEPFILE ${output}.d
    WORKING_DIRECTORY ${CMAKE_SOURCE_DIR}
    COMMENT "nvcc ${source}"
    COMMAND_EXPAND_LISTS VERBATIM)
  set(${outputs} ${${outputs}} ${output} PARENT_SCOPE)
endfunction()

set(CUDA_DIR ${CMAKE_BINARY_DIR}/cuda)
file(MAKE_DIRECTORY ${CUDA_DIR})
if(NOT RAVEN_OPS)
  file(GLOB ops RELATIVE ${CMAKE_SOURCE_DIR}/csrc/ops CONFIGURE_DEPENDS csrc/ops/*.cu)
  list(TRANSFORM ops REPLACE "\\.cu$" "" OUTPUT_VARIABLE RAVEN_OPS_BUILT)
else()
  set(RAVEN_OPS_BUILT ${RAVEN_OPS})
endif()

# What raven.build_config() shows.
set(RAVEN_VERSION ${VERSION})
string(REPLACE ";" " " RAVEN_ARCHS "${ARCHS}")
string(REPLACE ";" " " RAVEN_FLAGS "${COMPILE}")
set(ops ${RAVEN_OPS_BUILT})
string(REPLACE ";" " " RAVEN_OPS "${ops}")
configure_file(csrc/build_info.cu.in ${CUDA_DIR}/build_info.cu @ONLY)

set(OBJECTS "")
foreach(op ${ops})
  nvcc_command(OBJECTS ${CUDA_DIR}/${op}.o csrc/ops/${op}.cu -c)
endforeach()
nvcc_command(OBJECTS ${CUDA_DIR}/build_info.o ${CUDA_DIR}/build_info.cu -c)
nvcc_command(OBJECTS ${CUDA_DIR}/compat.o csrc/compat.cpp -c)

# Only the names of PyTorch's libraries go into the library, so it is linked against empty ones that are called so.
set(SEARCH ${LIBRARY_DIRS} ${CUDA_DIR})
list(TRANSFORM SEARCH PREPEND -L)
string(REPLACE ";" "; " EXPORTS "${EXPORTS}")
file(CONFIGURE OUTPUT cuda/exports.map CONTENT "{ global: ${EXPORTS}; local: *; };\n")
set(LINK_TORCH "")
foreach(name ${TORCH_LIBRARIES})
  file(CONFIGURE OUTPUT cuda/${name}.cpp CONTENT "")
  add_library(${name}_stub SHARED ${CUDA_DIR}/${name}.cpp)
  set_target_properties(${name}_stub PROPERTIES OUTPUT_NAME ${name} LIBRARY_OUTPUT_DIRECTORY ${CUDA_DIR})
  list(APPEND LINK_TORCH -l${name})
  list(APPEND STUBS ${name}_stub)
endforeach()
add_custom_command(
  OUTPUT ${CUDA_DIR}/libraven_cuda.so
  COMMAND ${NVCC} ${LINK} -Xlinker=--version-script=${CUDA_DIR}/exports.map ${OBJECTS} ${SEARCH} ${LINK_TORCH} -o ${CUDA_DIR}/libraven_cuda.so
  DEPENDS ${OBJECTS} ${STUBS}
  WORKING_DIRECTORY ${CMAKE_SOURCE_DIR}
  COMMENT "nvcc libraven_cuda.so"
  COMMAND_EXPAND_LISTS VERBATIM)
add_custom_target(raven_cuda ALL DEPENDS ${CUDA_DIR}/libraven_cuda.so)

# PTX without optimisation is enough to see that a header is complete, and quick.
set(HEADER_PTX "")
foreach(header ${CUDA_HEADERS})
  string(MAKE_C_IDENTIFIER ${header} name)
  file(CONFIGURE OUTPUT cuda/headers/${name}.cu CONTENT "#include \"${header}\"\n#include \"${header}\"\n")
  nvcc_command(HEADER_PTX ${CUDA_DIR}/headers/${name}.ptx ${CUDA_DIR}/headers/${name}.cu -ptx -Xcicc=-O0)
endforeach()
add_custom_target(raven_cuda_headers ALL DEPENDS ${HEADER_PTX})
