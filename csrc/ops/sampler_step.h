// sampler_step: a step of the sampler with its log-probability and squared displacement, forward and backward.
#pragma once

#include "device.h"
#include "transition.h"

namespace dxmi {

struct SamplerStepInputs : TransitionInputs {
  Vector<const int64_t> key;
  int64_t sample_offset;
};

struct SamplerStepResults {
  SampleView next_sample;
  AnyVector log_prob, sq_displacement;  // [N]
};

struct SamplerStepGradients {
  SampleView grad_next_sample;                    // may be absent
  AnyVector grad_log_prob, grad_sq_displacement;  // [N]; may be absent
  SampleView grad_sample, grad_model_output;      // may be unwanted
  AnyVector grad_log_std;                         // [T]; may be unwanted
};

namespace loops {
void sampler_step_fwd(Device& device, const SamplerStepInputs& a, const SamplerStepResults& r);
void sampler_step_bwd(Device& device, const SamplerStepInputs& a, const SamplerStepGradients& g);
}  // namespace loops

}  // namespace dxmi
