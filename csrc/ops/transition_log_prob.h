// transition_log_prob: the log-probability of given transitions, forward and backward.
#pragma once

#include "device.h"
#include "transition.h"

namespace dxmi {

struct TransitionLogProbInputs : TransitionInputs {
  SampleView next_sample;
};

struct TransitionLogProbGradients {
  AnyVector grad_log_prob;                                      // [N]
  SampleView grad_next_sample, grad_sample, grad_model_output;  // may be unwanted
  AnyVector grad_log_std;                                       // [T]; may be unwanted
};

namespace loops {
void transition_log_prob_fwd(Device& device, const TransitionLogProbInputs& a, AnyVector log_prob);
void transition_log_prob_bwd(Device& device, const TransitionLogProbInputs& a,
                             const TransitionLogProbGradients& g);
}  // namespace loops

}  // namespace dxmi
