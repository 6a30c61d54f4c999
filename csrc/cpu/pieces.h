// How the CPU half cuts samples into pieces for its kernels: rows, segments and lanes, the noise and the sums
// that go with them. Included by backend.cpp only.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "backend.h"

namespace dxmi::cpu {
namespace {

constexpr int64_t kElementsPerThread = 16384;  // less is not worth waking a thread for

// Visits the elements [start, start + n) of a row: f(pointer, stride, count, position) for each run.
template <class T, class F>
void for_runs(const View& view, int64_t row, int64_t start, int64_t n, const F& f) {
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

// Elements [start, start + n) of `rows` rows, as kernels see them: element i of row l lies at
// [lanes * i + l]. One row, lanes = 1, has a segment of it; short rows, of less than kPack elements, go
// together, each in a lane of its own, since alone they would leave most lanes idle.
struct Piece {
  int64_t row, rows;  // the first one; how many
  int64_t start, n;
  int64_t lanes;  // 1 or kPack
};

// f(part, first, count) for each part of a piece that has running sums of its own: a row's segment, or one
// element of each short row.
template <class F>
void for_parts(const Piece& piece, const F& f) {
  if (piece.lanes == 1) return f(int64_t{0}, int64_t{0}, piece.n);
  for (int64_t i = 0; i < piece.n; ++i) f(i, i * kPack, kPack);
}

int64_t lanes_of(int64_t dim) { return dim < kPack ? kPack : 1; }

int64_t segments_of(int64_t dim) { return (dim + kSegment - 1) / kSegment; }

// Calls work(piece) in parallel for pieces that cover `rows` rows of `dim` elements. make_worker() is
// called once a thread and piece of work, and owns the scratch.
template <class MakeWorker>
void for_pieces(int64_t rows, int64_t dim, const MakeWorker& make_worker) {
  const int64_t lanes = lanes_of(dim), segments = segments_of(dim);
  const int64_t grain =
      std::max<int64_t>(1, kElementsPerThread / (lanes * std::min(dim, kSegment)));
  torch::stable::parallel_for(
      0, (rows + lanes - 1) / lanes * segments, grain, [&](int64_t begin, int64_t end) {
        auto work = make_worker();
        for (int64_t i = begin; i < end; ++i) {
          const int64_t row = i / segments * lanes, start = i % segments * kSegment;
          work(Piece{row, std::min(lanes, rows - row), start, std::min(kSegment, dim - start),
                     lanes});
        }
      });
}

// f(pointer, stride, count, position) for each run of a piece's elements: where it lies in the tensor,
// and its first element's place in what the kernels see.
template <class T, class F>
void for_runs(const View& view, const Piece& piece, const F& f) {
  for (int64_t l = 0; l < piece.rows; ++l)
    for_runs<T>(view, piece.row + l, piece.start, piece.n,
                [&](T* p, int64_t stride, int64_t count, int64_t i) {
                  f(p, stride, count, piece.lanes * i + l);
                });
}

template <class T>
T* in_place(const View& view, const Piece& piece) {
  if (!view.data || !view.dense || piece.lanes != 1) return nullptr;
  return static_cast<T*>(view.data) + piece.row * view.row_stride + piece.start;
}

// A piece of an input: in place where it lies as kernels want it, else gathered into scratch.
template <class T>
struct Input {
  const View& view;
  alignas(64) T scratch[kSegment] = {};

  explicit Input(const View& v) : view(v) {}
  const T* at(const Piece& piece) {
    if (const T* p = in_place<const T>(view, piece)) return p;
    if (view.data)
      for_runs<const T>(view, piece, [&](const T* p, int64_t stride, int64_t count, int64_t i) {
        for (int64_t j = 0; j < count; ++j) scratch[i + piece.lanes * j] = p[j * stride];
      });
    return scratch;
  }
};

// A piece of an output: in place likewise, else written to scratch and scattered by done().
template <class T>
struct Output {
  const View& view;
  alignas(64) T scratch[kSegment];

  explicit Output(const View& v) : view(v) {}
  T* at(const Piece& piece) {
    T* const p = in_place<T>(view, piece);
    return p ? p : scratch;
  }
  void done(const Piece& piece) const {
    if (!view.data || in_place<T>(view, piece)) return;
    for_runs<T>(view, piece, [&](T* p, int64_t stride, int64_t count, int64_t i) {
      for (int64_t j = 0; j < count; ++j) p[j * stride] = scratch[i + piece.lanes * j];
    });
  }
};

// The normals of a piece, and of as many whole rows behind it as scratch holds.
class Noise {
 public:
  Noise(const NoiseKey& key, int64_t sample_offset, Vector<const int64_t> timestep, int64_t rows)
      : key_(key), sample_offset_(sample_offset), timestep_(timestep), rows_(rows) {}

  // `operands` of the same elements are prefetched meanwhile: the processor does not foresee them from
  // one segment to the next.
  template <class T, class... Operands>
  const float* at(const Piece& piece, const Operands&... operands) {
    const int64_t groups = (piece.n + 3) / 4;
    if (first_ <= piece.row && piece.row < end_ && piece.start == 0)
      return z_ + 4 * groups * (piece.row - first_);
    const bool whole = piece.lanes == 1 && piece.start == 0;
    first_ = piece.row;
    end_ = first_ + (whole ? std::min(kSegment / (4 * groups), rows_ - first_) : 0);
    const NoiseBlock block{key_,
                           sample_offset_ + first_,
                           {timestep_.data + first_ * timestep_.stride, timestep_.stride},
                           whole ? end_ - first_ : piece.rows,
                           piece.start / 4,
                           groups};
    if (piece.lanes > 1) {
      kernels().fill_across(block, z_);
    } else {
      Ahead ahead{{}, 0, 4 * sizeof(T)};
      for (const View* view : {&operands.view...})
        if (const T* p = in_place<const T>(*view, piece))
          ahead.data[ahead.count++] = reinterpret_cast<const char*>(p);
      kernels().fill_in_order(block, ahead, z_);
    }
    return z_;
  }
  const float* zeros() {
    std::fill_n(z_, kSegment, 0.0f);
    return z_;
  }

 private:
  NoiseKey key_;
  int64_t sample_offset_;
  Vector<const int64_t> timestep_;
  int64_t rows_;
  int64_t first_ = 0, end_ = 0;  // the rows whose noise is there
  alignas(64) float z_[kSegment];
};

// lanes[l] = value(row of lane l); idle lanes follow the last.
template <class R, class Value>
void set_lanes(const Piece& piece, R (&lanes)[kPack], const Value& value) {
  for (int64_t l = 0; l < piece.lanes; ++l)
    lanes[l] = value(piece.row + std::min(l, piece.rows - 1));
}

// Adds up `count` <= kPack values in a fixed tree, for each of `lanes` lanes: value i of lane l is
// values[stride * i + l]. Leaves the sums in sums[0].
template <int lanes, class R>
void add_tree(const R* values, int64_t stride, int64_t count, double (&sums)[kPack][lanes]) {
  for (int64_t i = 0; i < count; ++i)
    for (int l = 0; l < lanes; ++l) sums[i][l] = values[stride * i + l];
  for (int64_t half = kPack / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i + half < count; ++i)
      for (int l = 0; l < lanes; ++l) sums[i][l] += sums[i + half][l];
    count = std::min(count, half);
  }
}

// The K sums of each row. Segments add up in order.
template <int K>
class RowSums {
 public:
  RowSums(int64_t rows, int64_t dim)
      : segments_(segments_of(dim)), values_(static_cast<size_t>(rows * segments_ * K)) {}

  // Takes the running sums of a piece's parts.
  template <class R>
  void put(const Piece& piece, const LaneSums<R> (*parts)[K]) {
    for (int k = 0; k < K; ++k) {
      if (piece.lanes == 1) {
        double sums[kPack][1];
        add_tree(parts[0][k], 1, kPack, sums);
        at(piece.row, piece.start / kSegment, k) = sums[0][0];
      } else {
        double sums[kPack][kPack];
        add_tree(parts[0][k], K * kPack, piece.n, sums);
        for (int64_t l = 0; l < piece.rows; ++l) at(piece.row + l, 0, k) = sums[0][l];
      }
    }
  }
  double total(int64_t row, int k) {
    double sum = 0;
    for (int64_t s = 0; s < segments_; ++s) sum += at(row, s, k);
    return sum;
  }

 private:
  double& at(int64_t row, int64_t segment, int k) {
    return values_[static_cast<size_t>((row * segments_ + segment) * K + k)];
  }

  int64_t segments_;
  std::vector<double> values_;
};

// The rows' transitions, from tables of type R.
template <class R>
class Tables {
 public:
  explicit Tables(const TransitionProblem& p)
      : timestep_(p.timestep),
        sample_coef_(p.sample_coef.as<const R>()),
        output_coef_(p.output_coef.as<const R>()),
        log_std_(p.log_std.as<const R>()) {
    for (int64_t t = 0; t < p.steps; ++t) std_.push_back(dxmi::exp(log_std_[t]));
  }
  R log_std(int64_t row) const { return log_std_[timestep_[row]]; }
  R std(int64_t row) const { return std_[static_cast<size_t>(timestep_[row])]; }
  R inverse_std(int64_t row) const { return dxmi::exp(-log_std(row)); }

  void read(const Piece& piece, Rows<R>& rows) const {
    rows.one = piece.lanes == 1;
    set_lanes(piece, rows.sample_coef, [&](int64_t row) { return sample_coef_[timestep_[row]]; });
    set_lanes(piece, rows.output_coef, [&](int64_t row) { return output_coef_[timestep_[row]]; });
    set_lanes(piece, rows.std, [&](int64_t row) { return std(row); });
  }

 private:
  Vector<const int64_t> timestep_;
  Vector<const R> sample_coef_, output_coef_, log_std_;
  std::vector<R> std_;
};

// Sums one value a row into its timestep's entry, in row order.
template <class R, class Value>
void scatter_to_table(AnyVector table, int64_t steps, int64_t rows,
                      const Vector<const int64_t>& timestep, const Value& value) {
  std::vector<double> sums(static_cast<size_t>(steps));
  for (int64_t n = 0; n < rows; ++n) sums[static_cast<size_t>(timestep[n])] += value(n);
  const Vector<R> out = table.as<R>();
  for (int64_t t = 0; t < steps; ++t) out[t] = static_cast<R>(sums[static_cast<size_t>(t)]);
}

}  // namespace
}  // namespace dxmi::cpu
