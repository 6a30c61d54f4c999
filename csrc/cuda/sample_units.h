// Operations of kernels on the units of a row: read, write, draw noise. kVector: all tensors are dense and aligned,
// and their rows consist of whole units (row_layout.h).
#pragma once

#include "../core/normal.h"
#include "row_layout.h"

namespace dxmi::cuda {

// Not inlined: its divisions, repeated eight times, would spill sums from registers.
__device__ __noinline__ inline int64_t offset_of(const SampleView& view, int64_t i) {
  if (view.dense) return i;
  int64_t offset = 0;
  for (int d = view.dims - 1; d >= 0; --d) {
    offset += i % view.size[d] * view.stride[d];
    i /= view.size[d];
  }
  return offset;
}

// Unit `unit` of the slice, widened; zeros beyond the row's end.
template <class T, bool kVector>
__device__ void load(const SampleView& view, const RowLayout& layout, const RowSlice& slice,
                     int unit, ComputeType<T> out[kUnit<T>]) {
  constexpr int n = kUnit<T>;
  const T* const row = static_cast<const T*>(view.data) + slice.row * view.row_stride;
  if constexpr (kVector) {
    Unit<T> values = reinterpret_cast<const Unit<T>*>(row + slice.begin * n)[unit];
    widen(values, out);
  } else {
    const int64_t first = (slice.begin + unit) * n;
    for (int i = 0; i < n; ++i)
      out[i] = first + i < layout.dim ? widen(row[offset_of(view, first + i)]) : ComputeType<T>(0);
  }
}

// An absent tensor reads as zeros.
template <class T, bool kVector>
__device__ void load_if_given(const SampleView& view, const RowLayout& layout,
                              const RowSlice& slice, int unit, ComputeType<T> out[kUnit<T>]) {
  if (view.data != nullptr)
    load<T, kVector>(view, layout, slice, unit, out);
  else
    for (int i = 0; i < kUnit<T>; ++i) out[i] = 0;
}

template <class T, bool kVector>
__device__ void store(const SampleView& view, const RowLayout& layout, const RowSlice& slice,
                      int unit, const ComputeType<T> values[kUnit<T>]) {
  constexpr int n = kUnit<T>;
  T* const row = static_cast<T*>(view.data) + slice.row * view.row_stride;
  if constexpr (kVector) {
    Unit<T> out;
    narrow(values, out);
    reinterpret_cast<Unit<T>*>(row + slice.begin * n)[unit] = out;
  } else {
    const int64_t first = (slice.begin + unit) * n;
    for (int i = 0; i < n && first + i < layout.dim; ++i)
      narrow(values[i], row[offset_of(view, first + i)]);
  }
}

template <class T, bool kVector>
__device__ void store_if_wanted(const SampleView& view, const RowLayout& layout,
                                const RowSlice& slice, int unit,
                                const ComputeType<T> values[kUnit<T>]) {
  if (view.data != nullptr) store<T, kVector>(view, layout, slice, unit, values);
}

// Whether element i of a unit is in the row. Elements beyond its end must not enter sums: an infinite coefficient
// turns zeros into NaN.
template <class T, bool kVector>
__device__ bool in_row(const RowLayout& layout, const RowSlice& slice, int unit, int i) {
  return kVector || (slice.begin + unit) * kUnit<T> + i < layout.dim;
}

__device__ inline NoiseKey read_key(const Vector<const int64_t>& key) {
  return noise_key(key[0], key[1]);
}

// The normals of a unit; zeros beyond the row's end, so that sums ignore them.
template <class T, bool kVector>
__device__ void noise(const NoiseKey& key, const RowLayout& layout, const RowSlice& slice, int unit,
                      int64_t sample_offset, int64_t timestep, ComputeType<T> z[kUnit<T>]) {
  constexpr int n = kUnit<T>;
  const uint32_t sample = static_cast<uint32_t>(sample_offset + slice.row);
  const uint32_t first = static_cast<uint32_t>(slice.begin * (n / 4)) + unit * (n / 4);
  DXMI_UNROLL
  for (int group = 0; group < n / 4; ++group) {
    uint32_t words[4];
    float normals[4];
    noise_words<ScalarLane>(key, first + group, sample, static_cast<uint32_t>(timestep), words);
    box_muller<ScalarLane>(words, normals);
    DXMI_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int e = 4 * group + i;
      z[e] = in_row<T, kVector>(layout, slice, unit, e) ? normals[i] : 0.0f;
    }
  }
}

}  // namespace dxmi::cuda
