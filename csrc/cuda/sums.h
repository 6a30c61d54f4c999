// Sums over the threads of a team or a block, in an order that depends on the shape alone.
#pragma once

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
  __shared__ R warp_sums[kThreads / kWarp];
  value = team_sum(value, kWarp);
  __syncthreads();  // the previous call's readers are done
  if (threadIdx.x % kWarp == 0) warp_sums[threadIdx.x / kWarp] = value;
  __syncthreads();
  const unsigned warps = blockDim.x / kWarp;
  R sum = 0;
  for (unsigned w = 0; w < warps; ++w) sum += warp_sums[w];
  return sum;
}

}  // namespace dxmi::cuda
