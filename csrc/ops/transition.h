// The inputs that sampler_step and transition_log_prob share, forward and backward, and their checks.
#pragma once

#include "operands.h"

namespace torch::stable {
class Tensor;
}

namespace dxmi {

class Checks;

struct TransitionInputs {
  Dtype dtype;
  int64_t rows, dim, steps;
  SampleView sample, model_output;
  Vector<const int64_t> timestep;
  AnyVector sample_coef, output_coef, log_std;  // tables [T]
};

TransitionInputs check_transition(const Checks& check, const torch::stable::Tensor& sample,
                                  const torch::stable::Tensor& model_output,
                                  const torch::stable::Tensor& timestep,
                                  const torch::stable::Tensor& sample_coef,
                                  const torch::stable::Tensor& output_coef,
                                  const torch::stable::Tensor& log_std);

}  // namespace dxmi
