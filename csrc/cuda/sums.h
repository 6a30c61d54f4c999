// Sums over the threads of a team or a block, and over rows, in an order that depends on the shape alone.
#pragma once

#include "../ops/operands.h"
#include "launch.h"

namespace dxmi::cuda {

// The sum over aligned groups of `team` neighboring threads of a warp, in a fixed tree; all threads get it.
template <class R>
__device__ inline R team_sum(R value, int team) {
  for (int offset = team / 2; offset > 0; offset /= 2)
    value += __shfl_xor_sync(0xFFFFFFFFu, value, offset);
  return value;
}

// The sum over the block in a fixed tree; every thread must call it, and all get the sum.
template <class R>
__device__ inline R block_sum(R value) {
  __shared__ R warp_sums[kMaxThreads / kWarp];
  value = team_sum(value, kWarp);
  __syncthreads();  // the previous call's readers are done
  if (threadIdx.x % kWarp == 0) warp_sums[threadIdx.x / kWarp] = value;
  __syncthreads();
  const unsigned warps = blockDim.x / kWarp;
  R sum = 0;
  for (unsigned w = 0; w < warps; ++w) sum += warp_sums[w];
  return sum;
}

// table[t] = sum of value(row) over the rows at timestep t, with one block per timestep. A row whose timestep is
// outside the table makes all of it NaN, because the row's results are NaN and so are gradients through them.
template <class R, class Value>
__device__ void sum_into_table(const AnyVector& table, int64_t steps, int64_t rows,
                               const Vector<const int64_t>& timestep, const Value& value) {
  const int64_t t = blockIdx.x;
  R sum = 0;
  for (int64_t n = threadIdx.x; n < rows; n += blockDim.x) {
    const int64_t at = timestep[n];
    if (at == t)
      sum += value(n);
    else if (at < 0 || at >= steps)
      sum = static_cast<R>(NAN);
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) table.as<R>()[t] = sum;
}

}  // namespace dxmi::cuda
