// Kernels and their launches. With DXMI_EMULATE the tests' emulator replaces the CUDA toolkit, so that the same
// files run on a CPU.
#pragma once

#ifdef DXMI_EMULATE
#include "emulator.h"
#define DXMI_UNROLL
#else
#include <cuda_runtime.h>
#define DXMI_UNROLL _Pragma("unroll")
#endif

#include <cstdint>
#include <stdexcept>
#include <string>

#include "device.h"

namespace dxmi::cuda {

inline constexpr int kWarp = 32;
inline constexpr int kThreads = 256;  // per block, at most
inline constexpr int64_t kMaxBlocks = 0x7FFFFFFF;

inline int64_t blocks_for(int64_t count, int64_t per_block) {
  return (count + per_block - 1) / per_block;
}

inline void check_cuda(cudaError_t error, const char* op) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("dxmi_ext.ops.") + op +
                             ": CUDA: " + cudaGetErrorString(error));
}

// Kernels take structs with SampleViews as `const __grid_constant__`. Otherwise, passing one by reference to a
// function that is not inlined would copy all of it to local memory.
// One block is the least that must fit on a multiprocessor: kernels of unaligned rows need up to 156 registers.
#define DXMI_KERNEL __global__ void __launch_bounds__(dxmi::cuda::kThreads, 1)

// Launches a kernel and reports errors of the launch itself, without waiting for the kernel.
template <class... Parameters, class... Arguments>
void launch(const char* op, [[maybe_unused]] const Device& device, void (*kernel)(Parameters...),
            int64_t blocks, int threads, const Arguments&... arguments) {
  if (blocks == 0) return;
  if (blocks > kMaxBlocks)
    throw std::runtime_error(std::string("dxmi_ext.ops.") + op + ": too many rows for a grid");
#ifdef DXMI_EMULATE
  emulate(blocks, threads, [&] { kernel(arguments...); });
#else
  const unsigned grid = static_cast<unsigned>(blocks);
  // clang-format off: it mistakes the brackets for templates
  kernel<<<grid, threads, 0, static_cast<cudaStream_t>(device.stream())>>>(arguments...);
  // clang-format on
#endif
  check_cuda(cudaGetLastError(), op);
}

// The index of this thread in the grid, for kernels with one thread per row.
__device__ inline int64_t thread_of_grid() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}

}  // namespace dxmi::cuda
