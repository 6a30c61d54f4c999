// The CUDA half: one function an op, over checked device memory, on torch's current stream.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <memory>

#include "../problem.h"

namespace dxmi {

// Made for one call, on the device of its tensors. Nothing waits for the device; values that only the
// device could check give NaN rows.
class CudaBackend {
 public:
#ifdef DXMI_EMULATE
  static constexpr bool kCuda = false;  // the emulator's memory is the host's
#else
  static constexpr bool kCuda = true;
#endif
  static constexpr bool kReadsValues = false;

  explicit CudaBackend(const torch::stable::Tensor& lead);
  ~CudaBackend();

  void normal(const NormalProblem& p);
  void sampler_step(const StepProblem& p, const StepResult& result);
  void sampler_step_grad(const StepProblem& p, const StepGradients& gradients);
  void transition_log_prob(const LogProbProblem& p, AnyVector log_prob);
  void transition_log_prob_grad(const LogProbProblem& p, const LogProbGradients& gradients);
  void running_cost(const CostProblem& p, AnyVector cost);
  void running_cost_grad(const CostProblem& p, const CostGradients& gradients);
  void td_target(const CostProblem& p, AnyVector next_value, AnyVector time_cost, AnyVector target);
  void energy_loss(const EnergyProblem& p, AnyVector loss);
  void energy_loss_grad(const EnergyProblem& p, AnyVector grad, AnyVector grad_data,
                        AnyVector grad_sample);
  void update_velocity_var(const VelocityProblem& p);

 private:
  // Device memory that lives as long as this call's work on the stream.
  void* workspace(size_t bytes);
  // Of rows that are split over blocks: sums of the splits, and zeroed counters.
  template <class R>
  void split_workspace(int64_t rows, int64_t partials, R*& partial, unsigned*& arrived);

  struct Torch;  // what only torch knows: device guard, stream, workspaces; in ops.cpp
  std::unique_ptr<Torch> torch_;
  void* stream_;  // a cudaStream_t
};

}  // namespace dxmi
