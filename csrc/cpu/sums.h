// Sums over the elements of a row and over the rows at a timestep, in an order that depends on the shape alone.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

#include "tiles.h"

namespace dxmi::cpu {

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

// K sums of each row. Segments add up in order.
template <int K>
class RowSums {
 public:
  RowSums(int64_t rows, int64_t dim)
      : segments_(segments_of(dim)), values_(static_cast<size_t>(rows * segments_ * K)) {}

  // Adds the lanes' sums of each kernel call of a tile.
  template <class R>
  void put(const Tile& tile, const LaneSums<R> (*calls)[K]) {
    for (int k = 0; k < K; ++k) {
      if (tile.lanes == 1) {
        double sums[kPack][1];
        add_tree(calls[0][k], 1, kPack, sums);
        at(tile.row, tile.start / kSegment, k) = sums[0][0];
      } else {
        double sums[kPack][kPack];
        add_tree(calls[0][k], K * kPack, tile.n, sums);
        for (int64_t l = 0; l < tile.rows; ++l) at(tile.row + l, 0, k) = sums[0][l];
      }
    }
  }
  double total(int64_t row, int k = 0) {
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

// table[t] = sum of value(row) over the rows at timestep t, in order.
template <class R, class Value>
void sum_into_table(AnyVector table, int64_t steps, int64_t rows,
                    const Vector<const int64_t>& timestep, const Value& value) {
  std::vector<double> sums(static_cast<size_t>(steps));
  for (int64_t n = 0; n < rows; ++n) sums[static_cast<size_t>(timestep[n])] += value(n);
  const Vector<R> out = table.as<R>();
  for (int64_t t = 0; t < steps; ++t) out[t] = static_cast<R>(sums[static_cast<size_t>(t)]);
}

}  // namespace dxmi::cpu
