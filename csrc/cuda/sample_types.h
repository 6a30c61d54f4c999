// Sample types, and the units in which threads process the elements of a row.
#pragma once

#ifndef DXMI_EMULATE
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include "../core/lane.h"
#include "../ops/operands.h"
#include "launch.h"

namespace dxmi::cuda {

// The lane policy that computes samples of type T.
template <class T>
using LaneOf = std::conditional_t<std::is_same_v<T, double>, ScalarLane64, ScalarLane>;

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

// The elements that a thread processes at a time: whole noise groups, in accesses of 16 bytes.
template <class T>
inline constexpr int kUnit = sizeof(T) < 4 ? 8 : 4;

template <class T>
struct alignas(16) Unit {
  T values[kUnit<T>];
};

template <class T>
__device__ void widen(const Unit<T>& unit, ComputeType<T> out[kUnit<T>]) {
  DXMI_UNROLL
  for (int i = 0; i < kUnit<T>; ++i) out[i] = widen(unit.values[i]);
}

template <class T>
__device__ void narrow(const ComputeType<T> values[kUnit<T>], Unit<T>& out) {
  DXMI_UNROLL
  for (int i = 0; i < kUnit<T>; ++i) narrow(values[i], out.values[i]);
}

}  // namespace dxmi::cuda
