// The table of CPU kernels that each instruction-set variant fills in. Kernels see contiguous operands in packs of
// sixteen lanes: neighbors of one row, or one element each of sixteen short rows (tiles.h). Callers deal
// with threads, memory layouts and the row of each lane.
#pragma once

#include <cstdint>

#include "../core/transition.h"
#include "../ops/operands.h"

namespace dxmi::cpu {

// Elements in a segment: its noise and operands stay in L1, and its sums are short enough for float32.
inline constexpr int64_t kSegment = 1024;

// Lanes of a pack. Sums run over 16 interleaved lanes whatever the width of a register, so that every variant adds
// in the same order.
inline constexpr int64_t kPack = 16;

// The transition of each lane's row. If all lanes belong to one row, only lane 0 is set.
template <class R>
struct alignas(64) LaneTransitions {
  bool one_row;
  R sample_coef[kPack], output_coef[kPack], std[kPack];
  R inverse_std[kPack];           // for transition_log_prob
  R grad_displacement_sq[kPack];  // for sampler_step_bwd: the gradient of sq_displacement times 2/D
  R grad_scale[kPack];  // for transition_log_prob_bwd: the gradient of log_prob over D std
};

// One running sum per lane.
template <class R>
using LaneSums = R[kPack];

// The noise of groups [first_group, first_group + groups) of `rows` consecutive rows.
struct NoiseBlock {
  NoiseKey key;
  int64_t first_sample;  // global index of the first row
  Vector<const int64_t> timestep;
  int64_t rows;
  int64_t first_group;
  int64_t groups;
};

// Memory that is read or written next, prefetched while noise is computed: `bytes` per group.
struct Prefetch {
  static constexpr int kMax = 5;
  const char* data[kMax];
  int count = 0;
  int64_t bytes = 0;
};

// Kernels over n elements of samples of type T.
template <class T>
struct SampleKernels {
  using R = ComputeType<T>;

  // out = z
  void (*normal)(int64_t n, const float* z, T* out);
  // sums = {z^2, (next - sample)^2}
  void (*sampler_step_fwd)(int64_t n, const LaneTransitions<R>& lanes, const T* sample,
                           const T* output, const float* z, T* next, LaneSums<R>* sums);
  // sums = {gradient of std}
  void (*sampler_step_bwd)(int64_t n, const LaneTransitions<R>& lanes, const T* sample,
                           const T* output, const float* z, const T* grad_next, T* grad_sample,
                           T* grad_output, LaneSums<R>* sums);
  // sums = {z^2}
  void (*transition_log_prob_fwd)(int64_t n, const LaneTransitions<R>& lanes, const T* next,
                                  const T* sample, const T* output, LaneSums<R>* sums);
  void (*transition_log_prob_bwd)(int64_t n, const LaneTransitions<R>& lanes, const T* next,
                                  const T* sample, const T* output, T* grad_next, T* grad_sample,
                                  T* grad_output, LaneSums<R>* sums);
};

struct Kernels {
  const char* name;
  // The normals of each row, row after row; z has room for a multiple of kPack groups.
  void (*noise_in_order)(const NoiseBlock& block, const Prefetch& prefetch, float* z);
  // The normals of up to kPack rows, side by side: element i of row l is z[kPack * i + l].
  void (*noise_across)(const NoiseBlock& block, float* z);
  SampleKernels<float> float32;
  SampleKernels<BFloat16> bfloat16;
  SampleKernels<Half> float16;
  SampleKernels<double> float64;

  template <class T>
  const SampleKernels<T>& of() const {
    if constexpr (std::is_same_v<T, float>)
      return float32;
    else if constexpr (std::is_same_v<T, BFloat16>)
      return bfloat16;
    else if constexpr (std::is_same_v<T, Half>)
      return float16;
    else
      return float64;
  }
};

}  // namespace dxmi::cpu
