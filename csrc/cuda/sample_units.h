// Operations of kernels on the units of a row: read, write, draw noise. kVector: all tensors are dense and aligned,
// and their rows consist of whole units (row_layout.h).
#pragma once

#include "../core/normal.h"
#include "row_layout.h"

namespace dxmi::cuda {

// The unit at a place of a slice. In channels_last rows, neighboring threads process the channels of the same pixels,
// which are neighbors in memory.
template <bool kVector>
__device__ int unit_at(const RowLayout& layout, const RowSlice& slice, int place) {
  if (kVector || layout.channels == 1) return place;
  const uint32_t index = static_cast<uint32_t>(slice.begin) + place;
  const uint32_t channels = static_cast<uint32_t>(layout.channels);
  const uint32_t per_channel = static_cast<uint32_t>(layout.units) / channels;
  return static_cast<int>(index % channels * per_channel + index / channels -
                          static_cast<uint32_t>(slice.begin));
}

// Not inlined: its divisions, repeated eight times, would spill sums from registers.
__device__ __noinline__ inline int64_t strided_offset(const SampleView& view, int64_t i) {
  int64_t offset = 0;
  for (int d = view.dims - 1; d >= 0; --d) {
    offset += i % view.size[d] * view.stride[d];
    i /= view.size[d];
  }
  return offset;
}

// body(i, offset in the row) for each element i of a unit that is in the row.
template <int n, class Body>
__device__ void for_elements(const SampleView& view, const RowLayout& layout, int64_t first,
                             const Body& body) {
  const int innermost = view.dims - 1;
  if (view.dense || view.size[innermost] % n == 0) {  // the unit's elements are equally spaced
    const int64_t offset = view.dense ? first : strided_offset(view, first);
    const int64_t stride = view.dense ? 1 : view.stride[innermost];
    for (int i = 0; i < n && first + i < layout.dim; ++i) body(i, offset + i * stride);
  } else {
    for (int i = 0; i < n && first + i < layout.dim; ++i) body(i, strided_offset(view, first + i));
  }
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
    for (int i = 0; i < n; ++i) out[i] = 0;
    for_elements<n>(view, layout, (slice.begin + unit) * n,
                    [&](int i, int64_t offset) { out[i] = widen(row[offset]); });
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
    for_elements<n>(view, layout, (slice.begin + unit) * n,
                    [&](int i, int64_t offset) { narrow(values[i], row[offset]); });
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
