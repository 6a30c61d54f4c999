// Vector lane policies on GCC/Clang vector types, as wide as the instruction set this file is compiled
// for: AVX-512, AVX2 with FMA and F16C, or a generic build. Included by kernels.cpp only, which is
// compiled several times; so everything has internal linkage.
#pragma once

#include "kernels.h"

#if defined(__AVX2__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // in GCC's own AVX-512 headers (GCC bug 105593)
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace dxmi::cpu {
namespace {

#if defined(__AVX512F__)
inline constexpr int kWidth = 16;
#elif defined(__AVX2__)
inline constexpr int kWidth = 8;
#else
inline constexpr int kWidth = 4;
#endif

template <class V, class T>
DXMI_CORE V load_as(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

struct Simd {
  static constexpr int width = kWidth;
  typedef float F __attribute__((vector_size(4 * kWidth)));
  typedef uint32_t U __attribute__((vector_size(4 * kWidth)));
  typedef int32_t I __attribute__((vector_size(4 * kWidth)));
  typedef uint16_t U16 __attribute__((vector_size(2 * kWidth)));

  DXMI_CORE F of(float x) { return x - F{}; }  // exact for -0 too
  DXMI_CORE F of(F x) { return x; }
  DXMI_CORE U bits(F f) { return (U)f; }
  DXMI_CORE F from_bits(U u) { return (F)u; }
  DXMI_CORE F to_float(I i) { return __builtin_convertvector(i, F); }

  DXMI_CORE F load(const float* p) { return load_as<F>(p); }
  DXMI_CORE void store(float* p, F v) { __builtin_memcpy(p, &v, sizeof v); }

  // A bfloat16 is the high half of a float32, rounded to nearest even; NaN stays NaN.
  DXMI_CORE F load(const BFloat16* p) { return (F)(widen(load_as<U16>(p)) << 16); }
  DXMI_CORE void store(BFloat16* p, F v) {
    const U b = bits(v);
    const U16 out = high_halves(v != v ? b | 0x400000u : b + 0x7FFFu + ((b >> 16) & 1u));
    __builtin_memcpy(p, &out, sizeof out);
  }
#if defined(__AVX512F__)  // GCC would split the conversion in two
  DXMI_CORE U widen(U16 v) { return (U)_mm512_maskz_cvtepu16_epi32(0xFFFF, (__m256i)v); }
  DXMI_CORE U16 high_halves(U u) {
    typedef uint16_t Words __attribute__((vector_size(4 * kWidth)));
    const Words w = (Words)u;
    return __builtin_shufflevector(w, w, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  }
#else
  DXMI_CORE U widen(U16 v) { return __builtin_convertvector(v, U); }
  DXMI_CORE U16 high_halves(U u) { return __builtin_convertvector(u >> 16, U16); }
#endif

#if defined(__AVX512F__)
  DXMI_CORE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  DXMI_CORE F sqrt(F a) { return _mm512_sqrt_ps(a); }
  DXMI_CORE F to_float(U u) { return _mm512_cvtepu32_ps((__m512i)u); }
  DXMI_CORE F load(const Half* p) { return _mm512_cvtph_ps(load_as<__m256i>(p)); }
  DXMI_CORE void store(Half* p, F v) {
    const __m256i out = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __builtin_memcpy(p, &out, sizeof out);
  }
  DXMI_CORE void mul_wide(U a, uint32_t m, U& hi, U& lo) {
    const __m512i factor = _mm512_set1_epi32(static_cast<int>(m));
    const __m512i even = _mm512_mul_epu32((__m512i)a, factor);
    const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64((__m512i)a, 32), factor);
    hi = (U)_mm512_mask_shuffle_epi32(odd, 0x5555, even, _MM_PERM_DDBB);
    lo = (U)_mm512_mask_shuffle_epi32(even, 0xAAAA, odd, _MM_PERM_CCAA);
  }
  DXMI_CORE F unpack_low(F a, F b) { return _mm512_unpacklo_ps(a, b); }
  DXMI_CORE F unpack_high(F a, F b) { return _mm512_unpackhi_ps(a, b); }
  DXMI_CORE F low_pairs(F a, F b) { return (F)_mm512_unpacklo_pd((__m512d)a, (__m512d)b); }
  DXMI_CORE F high_pairs(F a, F b) { return (F)_mm512_unpackhi_pd((__m512d)a, (__m512d)b); }
#elif defined(__AVX2__)
  DXMI_CORE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  DXMI_CORE F sqrt(F a) { return _mm256_sqrt_ps(a); }
  DXMI_CORE F to_float(U u) {
    // Both halves are exact, so the fma rounds once.
    return fma(to_float((I)(u >> 16)), of(65536.0f), to_float((I)(u & 0xFFFFu)));
  }
  DXMI_CORE F load(const Half* p) { return _mm256_cvtph_ps(load_as<__m128i>(p)); }
  DXMI_CORE void store(Half* p, F v) {
    const __m128i out = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __builtin_memcpy(p, &out, sizeof out);
  }
  DXMI_CORE void mul_wide(U a, uint32_t m, U& hi, U& lo) {
    const __m256i factor = _mm256_set1_epi32(static_cast<int>(m));
    const __m256i even = _mm256_mul_epu32((__m256i)a, factor);
    const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)a, 32), factor);
    hi = (U)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
    lo = (U)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
  }
  DXMI_CORE F unpack_low(F a, F b) { return _mm256_unpacklo_ps(a, b); }
  DXMI_CORE F unpack_high(F a, F b) { return _mm256_unpackhi_ps(a, b); }
  DXMI_CORE F low_pairs(F a, F b) { return (F)_mm256_unpacklo_pd((__m256d)a, (__m256d)b); }
  DXMI_CORE F high_pairs(F a, F b) { return (F)_mm256_unpackhi_pd((__m256d)a, (__m256d)b); }
#else  // correctness on any processor, not speed
  typedef uint64_t U64 __attribute__((vector_size(8 * kWidth)));

  DXMI_CORE F fma(F a, F b, F c) {
    for (int i = 0; i < width; ++i) a[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return a;
  }
  DXMI_CORE F sqrt(F a) {
    for (int i = 0; i < width; ++i) a[i] = __builtin_sqrtf(a[i]);
    return a;
  }
  DXMI_CORE F to_float(U u) { return __builtin_convertvector(u, F); }
  DXMI_CORE F load(const Half* p) {
    F v;
    for (int i = 0; i < width; ++i) v[i] = static_cast<float>(load_as<NativeHalf>(p + i));
    return v;
  }
  DXMI_CORE void store(Half* p, F v) {
    for (int i = 0; i < width; ++i) {
      const NativeHalf half = static_cast<NativeHalf>(v[i]);
      __builtin_memcpy(p + i, &half, sizeof half);
    }
  }
  DXMI_CORE void mul_wide(U a, uint32_t m, U& hi, U& lo) {
    const U64 product = __builtin_convertvector(a, U64) * static_cast<uint64_t>(m);
    hi = __builtin_convertvector(product >> 32, U);
    lo = __builtin_convertvector(product, U);
  }
  DXMI_CORE F unpack_low(F a, F b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
  DXMI_CORE F unpack_high(F a, F b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); }
  DXMI_CORE F low_pairs(F a, F b) { return __builtin_shufflevector(a, b, 0, 1, 4, 5); }
  DXMI_CORE F high_pairs(F a, F b) { return __builtin_shufflevector(a, b, 2, 3, 6, 7); }
#endif

  // Lane p of a noise vector computes group lane_group(p) of its block. Unpack instructions work within
  // 128 bits; with this numbering, their results are in order.
  DXMI_CORE uint32_t lane_group(int p) { return (p % 4) * (width / 4) + p / 4; }

  // Writes lanes of z[0..3], the four normals of each lane's group, as 4 * width values in order.
  DXMI_CORE void store_groups(float* out, const F z[4]) {
    const F a = unpack_low(z[0], z[1]), b = unpack_high(z[0], z[1]);
    const F c = unpack_low(z[2], z[3]), d = unpack_high(z[2], z[3]);
    store(out, low_pairs(a, c));
    store(out + width, high_pairs(a, c));
    store(out + 2 * width, low_pairs(b, d));
    store(out + 3 * width, high_pairs(b, d));
  }
};

struct Simd64 {
  static constexpr int width = kWidth / 2;
  typedef double F __attribute__((vector_size(4 * kWidth)));
  typedef float F32 __attribute__((vector_size(2 * kWidth)));

  DXMI_CORE F of(double x) { return x - F{}; }
  DXMI_CORE F of(F x) { return x; }
  DXMI_CORE F load(const double* p) { return load_as<F>(p); }
  DXMI_CORE F load(const float* p) { return __builtin_convertvector(load_as<F32>(p), F); }
  DXMI_CORE void store(double* p, F v) { __builtin_memcpy(p, &v, sizeof v); }

#if defined(__AVX512F__)
  DXMI_CORE F fma(F a, F b, F c) { return _mm512_fmadd_pd(a, b, c); }
#elif defined(__AVX2__)
  DXMI_CORE F fma(F a, F b, F c) { return _mm256_fmadd_pd(a, b, c); }
#else
  DXMI_CORE F fma(F a, F b, F c) {
    for (int i = 0; i < width; ++i) a[i] = __builtin_fma(a[i], b[i], c[i]);
    return a;
  }
#endif
};

}  // namespace
}  // namespace dxmi::cpu
