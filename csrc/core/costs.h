// Running cost, energy loss and AVR, row by row, with their gradients. Torch-free, host and device.
// R is float or double.
#pragma once

#include "lane.h"

namespace dxmi {

template <class R>
struct CostWeights {
  R entropy;      // tau_entropy
  R velocity;     // tau_velocity
  int64_t steps;  // timesteps at or beyond this one carry no cost: T - skip_last
};

// tau_velocity sq / (2 s_t^2) - tau_entropy log sigma_t (DxMI, Alg. 1; constants of the entropy dropped).
template <class R>
DXMI_CORE R running_cost(const CostWeights<R>& w, int64_t timestep, R sq_displacement, R log_std,
                         R velocity_var) {
  if (timestep >= w.steps) return R(0);
  return w.velocity * sq_displacement / (R(2) * velocity_var) - w.entropy * log_std;
}

template <class R>
DXMI_CORE void running_cost_grad(const CostWeights<R>& w, int64_t timestep, R velocity_var, R grad,
                                 R& grad_sq_displacement, R& grad_log_std) {
  const bool counts = timestep < w.steps;
  grad_sq_displacement = counts ? w.velocity * grad / (R(2) * velocity_var) : R(0);
  grad_log_std = counts ? -w.entropy * grad : R(0);
}

// One energy's part of mean Ed - mean Es + gamma (mean Ed^2 + mean Es^2), before the mean; sign is +1
// for data and -1 for samples.
template <class R>
DXMI_CORE R energy_term(R energy, R sign, R gamma) {
  return energy * (sign + gamma * energy);
}

template <class R>
DXMI_CORE R energy_term_grad(R energy, R sign, R gamma) {
  return sign + R(2) * gamma * energy;
}

// Adaptive velocity regularization (DxMI, Alg. 1, step 5).
template <class R>
DXMI_CORE R update_velocity_var(R velocity_var, R mean_sq_displacement, R decay) {
  return decay * velocity_var + (R(1) - decay) * mean_sq_displacement;
}

}  // namespace dxmi
