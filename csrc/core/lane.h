// The scalar lane and the interface of lane policies. Torch-free, host and device.
//
// The math of core/ is written once, over a lane policy L:
//   L::F, L::U, L::I               float32, uint32 and int32 values (one each, or a vector of them)
//   L::of(x)                       the scalar x in every lane; a lane is returned unchanged
//   L::fma(a, b, c)                a * b + c, rounded once
//   L::sqrt(a)                     correctly rounded, for 0 and a in [2^-90, 2^90]
//   L::to_float(u), L::to_float(i) nearest float32
//   L::bits(f), L::from_bits(u)    bit casts
//   L::mul_wide(u, m, hi, lo)      the 64-bit product of u and a scalar m
// A policy for float64 values needs F, of and fma only. Arithmetic and bit operators are those of C++.
// Nothing else is used, so a lane gives the same bits on every processor, provided that it is compiled
// without fast-math and without contraction of a * b + c: every fused operation is explicit.
#pragma once

#include <math.h>

#include <cstdint>

#ifdef __CUDACC__
#define DXMI_CORE static __host__ __device__ __forceinline__
#else
// Internal linkage: the CPU half compiles these headers once per instruction set, and the linker
// must not merge the copies.
#define DXMI_CORE static inline __attribute__((always_inline))
#endif

namespace dxmi {

struct ScalarLane {
  using F = float;
  using U = uint32_t;
  using I = int32_t;

  DXMI_CORE F of(float x) { return x; }

#ifdef __CUDA_ARCH__
  DXMI_CORE F fma(F a, F b, F c) { return __fmaf_rn(a, b, c); }
  // The result of __fsqrt_rn in this range, without its branch for other values.
  DXMI_CORE F sqrt(F a) {
    F inverse;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(fmaxf(a, 0x1p-90f)));
    const F root = a * inverse;
    return fma(fma(-root, root, a), 0.5f * inverse, root);
  }
  DXMI_CORE F to_float(U u) { return __uint2float_rn(u); }
  DXMI_CORE F to_float(I i) { return __int2float_rn(i); }
  DXMI_CORE U bits(F f) { return __float_as_uint(f); }
  DXMI_CORE F from_bits(U u) { return __uint_as_float(u); }
  DXMI_CORE void mul_wide(U a, uint32_t m, U& hi, U& lo) {
    hi = __umulhi(a, m);
    lo = a * m;
  }
#else
  DXMI_CORE F fma(F a, F b, F c) { return __builtin_fmaf(a, b, c); }
  DXMI_CORE F sqrt(F a) { return __builtin_sqrtf(a); }
  DXMI_CORE F to_float(U u) { return static_cast<F>(u); }
  DXMI_CORE F to_float(I i) { return static_cast<F>(i); }
  DXMI_CORE U bits(F f) {
    U u;
    __builtin_memcpy(&u, &f, sizeof u);
    return u;
  }
  DXMI_CORE F from_bits(U u) {
    F f;
    __builtin_memcpy(&f, &u, sizeof f);
    return f;
  }
  DXMI_CORE void mul_wide(U a, uint32_t m, U& hi, U& lo) {
    const uint64_t product = static_cast<uint64_t>(a) * m;
    hi = static_cast<U>(product >> 32);
    lo = static_cast<U>(product);
  }
#endif
};

// One float64 value: float64 samples are computed in float64 throughout, except for their noise.
struct ScalarLane64 {
  using F = double;

  DXMI_CORE F of(double x) { return x; }

#ifdef __CUDA_ARCH__
  DXMI_CORE F fma(F a, F b, F c) { return __fma_rn(a, b, c); }
#else
  DXMI_CORE F fma(F a, F b, F c) { return __builtin_fma(a, b, c); }
#endif
};

}  // namespace dxmi
