// The table of CPU kernels that each instruction-set variant fills in. Kernels see contiguous operands in
// packs of sixteen lanes: neighbours of one row, or one element each of sixteen short rows. Layouts,
// threads and what row a lane belongs to are backend.cpp's business.
#pragma once

#include <cstdint>

#include "../core/transition.h"
#include "../problem.h"

namespace dxmi::cpu {

// Elements in a segment: its noise and operands stay in L1, and its sums are short enough for float32.
inline constexpr int64_t kSegment = 1024;

// Lanes of a pack. Sums run over 16 interleaved lanes whatever the width of a register, so that every
// variant adds in the same order.
inline constexpr int64_t kPack = 16;

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

// What the row of each lane brings along; where all lanes are of one row, only lane 0 is set.
template <class R>
struct alignas(64) Rows {
  bool one;
  R sample_coef[kPack], output_coef[kPack], std[kPack];
  R inverse_std[kPack];
  R grad
      [kPack];  // step_grad: of sq_displacement, times 2/D; log_prob_grad: of log_prob, over D std
};

// One running sum a lane.
template <class R>
using LaneSums = R[kPack];

// Groups [first_group, first_group + groups) of `rows` consecutive rows.
struct NoiseBlock {
  NoiseKey key;
  int64_t first_sample;  // global index of the first row
  Vector<const int64_t> timestep;
  int64_t rows;
  int64_t first_group;
  int64_t groups;
};

// Memory that is read or written next: asked for meanwhile. It lies `bytes` to a group of the noise.
struct Ahead {
  static constexpr int kMax = 5;
  const char* data[kMax];
  int count = 0;
  int64_t bytes = 0;
};

template <class T>
struct TypedKernels {
  using R = WideT<T>;

  // out = z
  void (*store)(int64_t n, const float* z, T* out);
  // sums = {z^2, (next - sample)^2}
  void (*step)(int64_t n, const Rows<R>& rows, const T* sample, const T* output, const float* z,
               T* next, LaneSums<R>* sums);
  // sums = {gradient of std}
  void (*step_grad)(int64_t n, const Rows<R>& rows, const T* sample, const T* output,
                    const float* z, const T* grad_next, T* grad_sample, T* grad_output,
                    LaneSums<R>* sums);
  // sums = {z^2}
  void (*log_prob)(int64_t n, const Rows<R>& rows, const T* next, const T* sample, const T* output,
                   LaneSums<R>* sums);
  void (*log_prob_grad)(int64_t n, const Rows<R>& rows, const T* next, const T* sample,
                        const T* output, T* grad_next, T* grad_sample, T* grad_output,
                        LaneSums<R>* sums);
};

struct Kernels {
  const char* name;
  // The normals of each row, one row behind the other; z has room for a multiple of kPack groups.
  void (*fill_in_order)(const NoiseBlock& block, const Ahead& ahead, float* z);
  // The normals of up to kPack rows, side by side: element i of row l is z[kPack * i + l].
  void (*fill_across)(const NoiseBlock& block, float* z);
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
