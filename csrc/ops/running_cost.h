// running_cost: the velocity cost minus the entropy bound of each row, forward and backward.
#pragma once

#include "device.h"
#include "operands.h"

namespace torch::stable {
class Tensor;
}

namespace dxmi {

class Checks;

struct RunningCostInputs {
  bool is_float64;  // all vectors
  int64_t rows, steps;
  Vector<const int64_t> timestep;
  AnyVector log_std, velocity_var;  // tables [T]
  double tau_entropy, tau_velocity;
  int64_t skip_last;
};

struct RunningCostGradients {
  AnyVector grad;                  // [N]
  AnyVector grad_sq_displacement;  // [N]; may be unwanted
  AnyVector grad_log_std;          // [T]; may be unwanted
};

// Also the inputs of td_target. All vectors have the dtype of `lead`, which is [N].
RunningCostInputs check_running_cost(const Checks& check, const char* lead_name,
                                     const torch::stable::Tensor& lead,
                                     const torch::stable::Tensor& timestep,
                                     const torch::stable::Tensor& log_std,
                                     const torch::stable::Tensor& velocity_var, double tau_entropy,
                                     double tau_velocity, int64_t skip_last);

namespace loops {
void running_cost_fwd(Device& device, const RunningCostInputs& a, AnyVector sq_displacement,
                      AnyVector cost);
void running_cost_bwd(Device& device, const RunningCostInputs& a, const RunningCostGradients& g);
}  // namespace loops

}  // namespace dxmi
