// All that kernels use of CUDA: thread indices, barriers, shuffles, vector accesses, launches. Under
// DXMI_EMULATE the test's emulator stands in for the toolkit, so that the same files run on a CPU.
#pragma once

#ifdef DXMI_EMULATE
#include "emulator.h"
#define DXMI_UNROLL
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define DXMI_UNROLL _Pragma("unroll")
#endif

#include <cassert>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "../core/transition.h"
#include "../problem.h"

namespace dxmi::cuda {

inline constexpr int kWarp = 32;
inline constexpr int kMaxThreads = 512;  // of a block; leaves 128 registers to each

inline void check(cudaError_t error, const char* op) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("dxmi_ext.ops.") + op +
                             ": CUDA: " + cudaGetErrorString(error));
}

// A kernel takes structs with Views as `const __grid_constant__`: to hand one on by reference to a function that
// is not inlined, it would copy the whole of it into local memory.
#define DXMI_KERNEL __global__ void __launch_bounds__(dxmi::cuda::kMaxThreads, 1)

// Launches a kernel and reports what the launch itself gets wrong; nothing waits for it to run.
template <class... Parameters, class... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), int64_t blocks, int threads,
            [[maybe_unused]] void* stream, const Arguments&... arguments) {
  if (blocks == 0) return;
#ifdef DXMI_EMULATE
  emulate(blocks, threads, [&] { kernel(arguments...); });
#else
  const unsigned grid = static_cast<unsigned>(blocks);
  // clang-format off: it takes the brackets for templates
  kernel<<<grid, threads, 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
  // clang-format on
#endif
  check(cudaGetLastError(), op);
}

// --- sample types ----------------------------------------------------------------------------------------

// The lane policy of samples of type T: the type of their tables, row results and arithmetic.
template <class T>
struct Lane {
  using type = ScalarLane;
};
template <>
struct Lane<double> {
  using type = ScalarLane64;
};
template <class T>
using LaneOf = typename Lane<T>::type;
template <class T>
using WideT = typename LaneOf<T>::F;

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(BFloat16 x) { return ScalarLane::from_bits(uint32_t{x.bits} << 16); }
__device__ inline void narrow(float x, float& out) { out = x; }
__device__ inline void narrow(double x, double& out) { out = x; }
#ifdef DXMI_EMULATE
inline float widen(Half x) { return half_to_float(x.bits); }
inline void narrow(float x, BFloat16& out) { out.bits = float_to_bfloat16(x); }
inline void narrow(float x, Half& out) { out.bits = float_to_half(x); }
#else
__device__ inline float widen(Half x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ inline void narrow(float x, BFloat16& out) {
  out.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
}
__device__ inline void narrow(float x, Half& out) {
  out.bits = __half_as_ushort(__float2half_rn(x));
}
#endif

// The elements that a thread takes at a time: whole noise groups, in accesses of 16 bytes.
template <class T>
inline constexpr int kUnit = sizeof(T) < 4 ? 8 : 4;

template <class T>
struct alignas(16) Unit {
  T values[kUnit<T>];
};

template <class T>
__device__ void widen(const Unit<T>& unit, WideT<T> out[kUnit<T>]) {
  DXMI_UNROLL
  for (int i = 0; i < kUnit<T>; ++i) out[i] = widen(unit.values[i]);
}

template <class T>
__device__ void narrow(const WideT<T> values[kUnit<T>], Unit<T>& out) {
  DXMI_UNROLL
  for (int i = 0; i < kUnit<T>; ++i) narrow(values[i], out.values[i]);
}

// --- reductions --------------------------------------------------------------------------------------------

// The sum over aligned groups of `team` neighbouring threads of a warp, in a fixed tree; all get it.
template <class R>
__device__ inline R team_sum(R value, int team) {
  for (int offset = team / 2; offset > 0; offset /= 2)
    value += __shfl_xor_sync(0xFFFFFFFFu, value, offset);
  return value;
}

// The sum over the block in a fixed tree; every thread must call it, and all get the sum.
template <class R>
__device__ inline R block_sum(R value) {
  __shared__ R warp_sums[kMaxThreads / kWarp];
  value = team_sum(value, kWarp);
  __syncthreads();  // the previous call's readers are done
  if (threadIdx.x % kWarp == 0) warp_sums[threadIdx.x / kWarp] = value;
  __syncthreads();
  const unsigned warps = blockDim.x / kWarp;
  R sum = 0;
  for (unsigned w = 0; w < warps; ++w) sum += warp_sums[w];
  return sum;
}

}  // namespace dxmi::cuda
