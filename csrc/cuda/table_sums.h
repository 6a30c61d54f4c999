// Gradients of tables with a value for each timestep: sums over the rows at that timestep.
#pragma once

#include "row_layout.h"

namespace dxmi::cuda {

// table[t] = sum of value(row) over the rows at timestep t; the layout is sums_grid(steps, rows). A row whose timestep
// is outside the table makes all of it NaN, because the row's results are NaN and so are gradients through them.
template <class R, class Value>
__device__ void sum_into_table(const AnyVector& table, const RowLayout& layout,
                               const Vector<const int64_t>& timestep, const Value& value,
                               const SplitMemory<1, R>& memory) {
  const RowSlice slice = slice_of(layout);
  R sum = 0;
  for (int i = slice.first; i < slice.count; i += slice.stride) {
    const int64_t n = slice.begin + i, t = timestep[n];
    if (t == slice.row)
      sum += value(n);
    else if (t < 0 || t >= layout.rows)
      sum = static_cast<R>(NAN);
  }
  R sums[1] = {block_sum(sum)};
  if (complete_sums(layout, slice, sums, memory) && threadIdx.x == 0)
    table.as<R>()[slice.row] = sums[0];
}

}  // namespace dxmi::cuda
