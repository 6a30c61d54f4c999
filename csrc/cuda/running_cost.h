// The running cost of a row, for running_cost and td_target.
#pragma once

#include <cassert>

#include "../core/costs.h"
#include "../ops/running_cost.h"
#include "launch.h"

namespace dxmi::cuda {

// Values that the host could not check give NaN instead of a wrong cost; a debug build asserts.
template <class R>
__device__ bool valid(const RunningCostInputs& a, int64_t timestep) {
  const bool in_range = timestep >= 0 && timestep < a.steps;
  assert(in_range && "dxmi_ext: timestep must be in 0..T-1");
  const bool has_cost = in_range && timestep < a.steps - a.skip_last;
  const bool divides = !has_cost || a.velocity_var.as<const R>()[timestep] > R(0);
  assert(divides && "dxmi_ext: velocity_var must be > 0");
  return in_range && divides;
}

template <class R>
__device__ CostWeights<R> weights_of(const RunningCostInputs& a) {
  return {static_cast<R>(a.tau_entropy), static_cast<R>(a.tau_velocity), a.steps - a.skip_last};
}

// NaN if a value is invalid.
template <class R>
__device__ R cost_of_row(const RunningCostInputs& a, const AnyVector& sq_displacement, int64_t n) {
  const int64_t t = a.timestep[n];
  if (!valid<R>(a, t)) return static_cast<R>(NAN);
  return running_cost(weights_of<R>(a), t, sq_displacement.as<const R>()[n],
                      a.log_std.as<const R>()[t], a.velocity_var.as<const R>()[t]);
}

}  // namespace dxmi::cuda
