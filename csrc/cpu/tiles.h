// Splits loops over samples into tiles for the kernels, and locates the operands of a tile. Tiles, and so results,
// do not depend on the number of threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "kernels.h"

namespace dxmi::cpu {

inline constexpr int64_t kElementsPerThread = 16384;  // fewer do not justify another thread

// Elements [start, start + n) of `rows` rows. Kernels find element i of row l at [lanes * i + l]. A tile is either
// a segment of one row, with lanes = 1, or kPack whole rows of less than kPack elements, each in its own
// lane: a single short row would leave most lanes idle.
struct Tile {
  int64_t row, rows;  // the first row and their number
  int64_t start, n;
  int64_t lanes;  // 1 or kPack
};

inline int64_t lanes_of(int64_t dim) { return dim < kPack ? kPack : 1; }

inline int64_t segments_of(int64_t dim) { return (dim + kSegment - 1) / kSegment; }

// Calls work(tile) in parallel for tiles that cover `rows` rows of `dim` elements. make_worker() returns a
// `work` with its own scratch memory, which one thread uses for its tiles.
template <class MakeWorker>
void for_tiles(int64_t rows, int64_t dim, const MakeWorker& make_worker) {
  const int64_t lanes = lanes_of(dim), segments = segments_of(dim);
  const int64_t grain =
      std::max<int64_t>(1, kElementsPerThread / (lanes * std::min(dim, kSegment)));
  torch::stable::parallel_for(
      0, (rows + lanes - 1) / lanes * segments, grain, [&](int64_t begin, int64_t end) {
        auto work = make_worker();
        for (int64_t i = begin; i < end; ++i) {
          const int64_t row = i / segments * lanes, start = i % segments * kSegment;
          work(Tile{row, std::min(lanes, rows - row), start, std::min(kSegment, dim - start),
                    lanes});
        }
      });
}

// f(call, first, count) for each kernel call with running sums of a tile: one for a segment; for short rows one per
// element, whose lanes belong to different rows.
template <class F>
void for_calls(const Tile& tile, const F& f) {
  if (tile.lanes == 1) return f(int64_t{0}, int64_t{0}, tile.n);
  for (int64_t i = 0; i < tile.n; ++i) f(i, i * kPack, kPack);
}

// values[l] = value(row of lane l); lanes beyond the last row repeat it.
template <class R, class Value>
void set_lanes(const Tile& tile, R (&values)[kPack], const Value& value) {
  for (int64_t l = 0; l < tile.lanes; ++l) values[l] = value(tile.row + std::min(l, tile.rows - 1));
}

// --- operands ----------------------------------------------------------------------------------------------

// f(pointer, stride, count, position) for each evenly strided run of the elements [start, start + n) of a row.
template <class T, class F>
void for_runs(const SampleView& view, int64_t row, int64_t start, int64_t n, const F& f) {
  T* const base = static_cast<T*>(view.data) + row * view.row_stride;
  if (view.dense) return f(base + start, int64_t{1}, n, int64_t{0});
  const int last = view.dims - 1;
  for (int64_t done = 0; done < n;) {
    int64_t rest = start + done;
    const int64_t inner = rest % view.size[last];
    T* p = base + inner * view.stride[last];
    rest /= view.size[last];
    for (int d = last - 1; d >= 0; --d) {
      p += (rest % view.size[d]) * view.stride[d];
      rest /= view.size[d];
    }
    const int64_t count = std::min(n - done, view.size[last] - inner);
    f(p, view.stride[last], count, done);
    done += count;
  }
}

// The same for all rows of a tile; `position` is where kernels find the run's first element.
template <class T, class F>
void for_runs(const SampleView& view, const Tile& tile, const F& f) {
  for (int64_t l = 0; l < tile.rows; ++l)
    for_runs<T>(view, tile.row + l, tile.start, tile.n,
                [&](T* p, int64_t stride, int64_t count, int64_t i) {
                  f(p, stride, count, tile.lanes * i + l);
                });
}

// A tile's elements in place if they have the layout that kernels need; else null.
template <class T>
T* in_place(const SampleView& view, const Tile& tile) {
  if (!view.data || !view.dense || tile.lanes != 1) return nullptr;
  return static_cast<T*>(view.data) + tile.row * view.row_stride + tile.start;
}

// An input's tiles: in place, or gathered into scratch.
template <class T>
struct Input {
  const SampleView& view;
  alignas(64) T scratch[kSegment] = {};

  explicit Input(const SampleView& v) : view(v) {}
  const T* at(const Tile& tile) {
    if (const T* p = in_place<const T>(view, tile)) return p;
    if (view.data)
      for_runs<const T>(view, tile, [&](const T* p, int64_t stride, int64_t count, int64_t i) {
        for (int64_t j = 0; j < count; ++j) scratch[i + tile.lanes * j] = p[j * stride];
      });
    return scratch;
  }
};

// An output's tiles: in place, or written to scratch and scattered by done().
template <class T>
struct Output {
  const SampleView& view;
  alignas(64) T scratch[kSegment];

  explicit Output(const SampleView& v) : view(v) {}
  T* at(const Tile& tile) {
    T* const p = in_place<T>(view, tile);
    return p ? p : scratch;
  }
  void done(const Tile& tile) const {
    if (!view.data || in_place<T>(view, tile)) return;
    for_runs<T>(view, tile, [&](T* p, int64_t stride, int64_t count, int64_t i) {
      for (int64_t j = 0; j < count; ++j) p[j * stride] = scratch[i + tile.lanes * j];
    });
  }
};

}  // namespace dxmi::cpu
