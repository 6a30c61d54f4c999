// The assignment of rows to threads: a short row is processed by a team of threads of one warp, a longer one by a
// block, the longest by several blocks.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "sample_types.h"
#include "sums.h"

namespace dxmi::cuda {

struct RowLayout {
  int64_t rows, dim;
  int64_t units;   // per row, kUnit elements each; the last may be partial
  int team;        // threads per short row, a power of two; 0: rows have their own blocks
  int64_t splits;  // blocks per long row
  int64_t units_per_split;
  int64_t channels;  // of channels_last rows, see unit_at; otherwise 1
};

// --- on the host -------------------------------------------------------------------------------------------

// A layout and its grid.
struct RowGrid {
  RowLayout layout;
  int64_t blocks;
  int threads;
  bool vector;  // whether rows are read and written in whole units
};

// Whether the rows of a tensor, which may be absent, can be read and written in whole units.
template <class T>
bool has_whole_units(const SampleView& view, int64_t dim) {
  const int64_t row_bytes = view.row_stride * static_cast<int64_t>(sizeof(T));
  return view.data == nullptr || (view.dense && dim % kUnit<T> == 0 && row_bytes % 16 == 0 &&
                                  reinterpret_cast<uintptr_t>(view.data) % 16 == 0);
}

// The number of channels of a row whose channels are neighbors in memory and consist of whole units; otherwise 1.
template <class T>
int64_t channels_of(const SampleView& view) {
  const bool last = view.data != nullptr && !view.dense && view.dims == 2 && view.stride[0] == 1 &&
                    view.size[1] % kUnit<T> == 0 && view.size[1] <= INT32_MAX / view.size[0];
  return last ? view.size[0] : 1;
}

template <class T>
RowGrid row_grid(int64_t rows, int64_t dim, std::initializer_list<const SampleView*> views) {
  constexpr int64_t units_of_team = 8;   // maximum per thread of a team
  constexpr int64_t units_of_block = 4;  // per thread of a block, above which its row is split
  RowLayout layout{};
  layout.rows = rows;
  layout.dim = dim;
  layout.units = blocks_for(dim, kUnit<T>);
  layout.splits = 1;
  layout.channels = 1;
  for (const SampleView* view : views)
    layout.channels = std::max(layout.channels, channels_of<T>(*view));
  const bool vector = std::all_of(views.begin(), views.end(), [&](const SampleView* view) {
    return has_whole_units<T>(*view, dim);
  });
  if (layout.units <= kWarp * units_of_team) {
    layout.team = 1;
    while (layout.team < kWarp && layout.team < layout.units) layout.team *= 2;
    return {layout, blocks_for(rows * layout.team, kThreads), kThreads, vector};
  }
  const int threads =
      static_cast<int>(std::min<int64_t>(kThreads, blocks_for(layout.units, kWarp) * kWarp));
  layout.units_per_split = threads * units_of_block;
  layout.splits = blocks_for(layout.units, layout.units_per_split);
  return {layout, rows * layout.splits, threads, vector};
}

// The layout of `count` sums over the same `items`, which take the places of rows and units.
inline RowGrid sums_grid(int64_t count, int64_t items) {
  constexpr int64_t items_of_block = 16 * kThreads;
  RowLayout layout{};
  layout.rows = count;
  layout.units = items;
  layout.units_per_split = items_of_block;
  layout.splits = std::max<int64_t>(1, blocks_for(items, items_of_block));
  return {layout, count * layout.splits, kThreads, false};
}

// Memory for complete_sums if rows are split over blocks: K sums per split, and the number of splits that have
// arrived. Null if rows are not split.
template <int K, class R>
struct SplitMemory {
  R* sums = nullptr;            // [rows, splits, K]
  unsigned* arrived = nullptr;  // [rows]
};

template <int K, class R>
SplitMemory<K, R> split_memory(const char* op, Device& device, const RowLayout& layout) {
  if (layout.splits == 1 || layout.rows == 0) return {};
  const SplitMemory<K, R> memory{device.workspace<R>(layout.rows * layout.splits * K),
                                 device.workspace<unsigned>(layout.rows)};
  check_cuda(cudaMemsetAsync(memory.arrived, 0, layout.rows * sizeof(unsigned),
                             static_cast<cudaStream_t>(device.stream())),
             op);
  return memory;
}

// --- on the device -----------------------------------------------------------------------------------------

// The units of a row that a team or block processes, and those of this thread. They are few, so loops count in
// 32 bits.
struct RowSlice {
  int64_t row;
  int64_t begin;             // the slice's first unit
  int first, count, stride;  // units begin + first, begin + first + stride .. below begin + count
  bool active;               // the row exists
};

__device__ inline RowSlice slice_of(const RowLayout& layout) {
  if (layout.team > 0) {
    const int64_t row = thread_of_grid() / layout.team;
    const bool active = row < layout.rows;
    const int first = static_cast<int>(threadIdx.x) & (layout.team - 1);
    return {row, 0, first, active ? static_cast<int>(layout.units) : 0, layout.team, active};
  }
  const int64_t row = blockIdx.x / layout.splits;
  const int64_t begin = (blockIdx.x - row * layout.splits) * layout.units_per_split;
  const int64_t left = layout.units - begin;
  const int count = static_cast<int>(left < layout.units_per_split ? left : layout.units_per_split);
  return {row, begin, static_cast<int>(threadIdx.x), count, static_cast<int>(blockDim.x), true};
}

// Whether this thread writes the sum of its team or block.
__device__ inline bool leads(const RowLayout& layout) {
  return threadIdx.x % (layout.team > 0 ? layout.team : kThreads) == 0;
}

// The index of the team's or block's sum in an array [rows, splits].
__device__ inline int64_t split_index(const RowLayout& layout, const RowSlice& slice) {
  return layout.team > 0 ? slice.row : blockIdx.x;
}

template <class R>
__device__ R row_sum(const RowLayout& layout, R value) {
  return layout.team > 0 ? team_sum(value, layout.team) : block_sum(value);
}

// Completes the K sums of a split row: every block stores its own, and the last to arrive adds them in an order that
// does not depend on which block is last. True in that block, and if rows are not split.
template <int K, class R>
__device__ bool complete_sums(const RowLayout& layout, const RowSlice& slice, R (&sums)[K],
                              const SplitMemory<K, R>& memory) {
  if (layout.splits == 1) return true;
  __shared__ bool last;
  if (threadIdx.x == 0) {
    for (int k = 0; k < K; ++k) memory.sums[static_cast<int64_t>(blockIdx.x) * K + k] = sums[k];
    __threadfence();
    last = atomicAdd(memory.arrived + slice.row, 1u) + 1 == layout.splits;
  }
  __syncthreads();
  if (!last) return false;
  __threadfence();
  const volatile R* const all =
      memory.sums + slice.row * layout.splits * K;  // not from a stale cache
  R mine[K] = {};
  for (int64_t s = threadIdx.x; s < layout.splits; s += blockDim.x)
    for (int k = 0; k < K; ++k) mine[k] += all[s * K + k];
  for (int k = 0; k < K; ++k) sums[k] = block_sum(mine[k]);
  return true;
}

// The sum over a row's splits in an array [rows, splits], in order.
template <class R>
__device__ R sum_of_splits(const R* sums, int64_t row, int64_t splits) {
  R sum = 0;
  for (int64_t s = 0; s < splits; ++s) sum += sums[row * splits + s];
  return sum;
}

}  // namespace dxmi::cuda
