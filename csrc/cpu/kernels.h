// The table of CPU kernels that each instruction-set variant fills in. Kernels see one contiguous
// segment of one row at a time; layouts, threads and rows are backend.cpp's business.
#pragma once

#include <cstdint>

#include "../core/transition.h"
#include "../problem.h"

namespace dxmi::cpu {

// Elements in a segment: its noise and operands stay in L1, and its sums are short enough for float32.
inline constexpr int64_t kSegment = 1024;

// The type of tables and row results for samples of type T, and of the arithmetic.
template <class T>
struct Wide {
  using type = float;
};
template <>
struct Wide<double> {
  using type = double;
};
template <class T>
using WideT = typename Wide<T>::type;

// Groups [first_group, first_group + groups) of `rows` consecutive rows, in that order.
struct NoiseBlock {
  NoiseKey key;
  int64_t first_sample;  // global index of the first row
  Vector<const int64_t> timestep;
  int64_t rows;
  int64_t first_group;
  int64_t groups;
};

template <class T>
struct TypedKernels {
  using R = WideT<T>;

  // out = z
  void (*store)(int64_t n, const float* z, T* out);
  // sums = {z^2, (next - sample)^2}
  void (*step)(int64_t n, const Transition<R>& p, const T* sample, const T* output, const float* z,
               T* next, double sums[2]);
  // grad_std = sum of the gradient of std
  void (*step_grad)(int64_t n, const Transition<R>& p, R grad_displacement_sq, const T* sample,
                    const T* output, const float* z, const T* grad_next, T* grad_sample,
                    T* grad_output, double* grad_std);
  // noise_sq = sum of z^2
  void (*log_prob)(int64_t n, const Transition<R>& p, R inverse_std, const T* next, const T* sample,
                   const T* output, double* noise_sq);
  void (*log_prob_grad)(int64_t n, const Transition<R>& p, R inverse_std, R scale, const T* next,
                        const T* sample, const T* output, T* grad_next, T* grad_sample,
                        T* grad_output, double* noise_sq);
};

struct Kernels {
  const char* name;
  // Writes rows * groups * 4 normals to z.
  void (*fill_normals)(const NoiseBlock& block, float* z);
  TypedKernels<float> float32;
  TypedKernels<BFloat16> bfloat16;
  TypedKernels<Half> float16;
  TypedKernels<double> float64;

  template <class T>
  const TypedKernels<T>& of() const;
};

template <>
inline const TypedKernels<float>& Kernels::of() const {
  return float32;
}
template <>
inline const TypedKernels<BFloat16>& Kernels::of() const {
  return bfloat16;
}
template <>
inline const TypedKernels<Half>& Kernels::of() const {
  return float16;
}
template <>
inline const TypedKernels<double>& Kernels::of() const {
  return float64;
}

}  // namespace dxmi::cpu
