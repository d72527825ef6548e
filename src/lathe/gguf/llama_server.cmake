# llama-server, llama-batched-bench and llama-quantize on top of the libllama, libggml and libmtmd that llama-cpp-python has installed.
#
# In the place of the CMakeLists.txt at the top of llama.cpp's source, which would compile these libraries once more.
# LIBRARIES is the folder that they are in. What is left out: the web pages, HTTPS, and everything that starts programs.
cmake_minimum_required(VERSION 3.21...3.28)
project(llama.cpp C CXX)

set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
set(CMAKE_BUILD_RPATH ${LIBRARIES})
set(BUILD_SHARED_LIBS OFF)
set(LLAMA_BUILD_COMMON ON)
set(LLAMA_BUILD_UI OFF)
set(LLAMA_USE_PREBUILT_UI OFF)
set(LLAMA_OPENSSL OFF)
set(LLAMA_SUBPROCESS OFF)

# What the top of llama.cpp's source asks Git, which would answer of the repository around it.
set(LLAMA_BUILD_NUMBER 0)
set(LLAMA_BUILD_COMMIT ${VERSION})
set(BUILD_COMPILER "${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}")
set(BUILD_TARGET "${CMAKE_SYSTEM_NAME} ${CMAKE_SYSTEM_PROCESSOR}")

find_package(Threads REQUIRED)
include(${PROJECT_SOURCE_DIR}/cmake/common.cmake)
include(${PROJECT_SOURCE_DIR}/cmake/license.cmake)

function(add_installed_library name)
    find_library(${name}_FILE ${name} PATHS ${LIBRARIES} NO_DEFAULT_PATH REQUIRED)
    add_library(${name} SHARED IMPORTED GLOBAL)
    set_target_properties(${name} PROPERTIES IMPORTED_LOCATION ${${name}_FILE})
    target_include_directories(${name} INTERFACE ${ARGN})
endfunction()

add_installed_library(ggml-base ${PROJECT_SOURCE_DIR}/ggml/include)
add_installed_library(ggml ${PROJECT_SOURCE_DIR}/ggml/include)
add_installed_library(llama ${PROJECT_SOURCE_DIR}/include)
add_installed_library(mtmd ${PROJECT_SOURCE_DIR}/tools/mtmd)
target_compile_definitions(ggml INTERFACE GGML_SHARED GGML_BACKEND_SHARED)
target_compile_definitions(llama INTERFACE LLAMA_SHARED)
target_link_libraries(ggml INTERFACE ggml-base)
target_link_libraries(llama INTERFACE ggml)
target_link_libraries(mtmd INTERFACE llama)

add_subdirectory(vendor)
add_subdirectory(common)
add_subdirectory(tools/batched-bench)
add_subdirectory(tools/quantize)
add_subdirectory(tools/ui)
add_subdirectory(tools/server)
