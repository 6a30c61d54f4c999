// The CPU half: one function an op, over checked memory. Runs on torch's own thread pool.
#pragma once

#include <vector>

#include "kernels.h"

namespace dxmi {

struct CpuBackend {
  static constexpr bool kCuda = false;
  static constexpr bool kReadsValues = true;  // of timesteps and velocities, to check them

  template <class Tensor>
  explicit CpuBackend(const Tensor& /*lead*/) {}

  static void normal(const NormalProblem& p);
  static void sampler_step(const StepProblem& p, const StepResult& result);
  static void sampler_step_grad(const StepProblem& p, const StepGradients& gradients);
  static void transition_log_prob(const LogProbProblem& p, AnyVector log_prob);
  static void transition_log_prob_grad(const LogProbProblem& p, const LogProbGradients& gradients);
  static void running_cost(const CostProblem& p, AnyVector cost);
  static void running_cost_grad(const CostProblem& p, const CostGradients& gradients);
  static void td_target(const CostProblem& p, AnyVector next_value, AnyVector time_cost,
                        AnyVector target);
  static void energy_loss(const EnergyProblem& p, AnyVector loss);
  static void energy_loss_grad(const EnergyProblem& p, AnyVector grad, AnyVector grad_data,
                               AnyVector grad_sample);
  static void update_velocity_var(const VelocityProblem& p);
};

namespace cpu {

// The variants that this processor runs, fastest first.
std::vector<const Kernels*> usable_kernels();
// The one in use: the fastest, or what the environment variable DXMI_CPU_VARIANT names. Throws
// std::runtime_error if it names none that runs here.
const Kernels& kernels();

}  // namespace cpu
}  // namespace dxmi
