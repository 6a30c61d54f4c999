// transition_log_prob: schemas, checks and entries.
#include "transition_log_prob.h"

#include <tuple>

#include "checks.h"
#include "registration.h"

namespace dxmi {
namespace {

TransitionLogProbInputs check_inputs(const Checks& check, const Tensor& next_sample,
                                     const Tensor& sample, const Tensor& model_output,
                                     const Tensor& timestep, const Tensor& sample_coef,
                                     const Tensor& output_coef, const Tensor& log_std) {
  const TransitionInputs transition =
      check_transition(check, sample, model_output, timestep, sample_coef, output_coef, log_std);
  check.same("next_sample", next_sample, "sample", sample);
  return {transition, check.view("next_sample", next_sample)};
}

Tensor transition_log_prob_fwd(Tensor next_sample, Tensor sample, Tensor model_output,
                               Tensor timestep, Tensor sample_coef, Tensor output_coef,
                               Tensor log_std) {
  const Checks check("transition_log_prob", "sample", sample);
  const TransitionLogProbInputs inputs = check_inputs(check, next_sample, sample, model_output,
                                                      timestep, sample_coef, output_coef, log_std);
  Tensor log_prob = new_vector(log_std, inputs.rows);
  Device device(sample);
  loops::transition_log_prob_fwd(device, inputs, floats(log_prob));
  return log_prob;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> transition_log_prob_bwd(
    Tensor grad_log_prob, Tensor next_sample, Tensor sample, Tensor model_output, Tensor timestep,
    Tensor sample_coef, Tensor output_coef, Tensor log_std, bool want_next, bool want_sample,
    bool want_output, bool want_log_std) {
  const Checks check("transition_log_prob_bwd", "sample", sample);
  const TransitionLogProbInputs inputs = check_inputs(check, next_sample, sample, model_output,
                                                      timestep, sample_coef, output_coef, log_std);
  check.vector("grad_log_prob", grad_log_prob, log_std.scalar_type(), inputs.rows, "N");
  Tensor grad_next = new_sample_gradient(next_sample, want_next);
  Tensor grad_sample = new_sample_gradient(sample, want_sample);
  Tensor grad_output = new_sample_gradient(model_output, want_output);
  Tensor grad_log_std = new_vector_gradient(log_std, want_log_std);
  TransitionLogProbGradients gradients{};
  gradients.grad_log_prob = floats(grad_log_prob);
  if (want_next) gradients.grad_next_sample = check.view("grad_next_sample", grad_next);
  if (want_sample) gradients.grad_sample = check.view("grad_sample", grad_sample);
  if (want_output) gradients.grad_model_output = check.view("grad_model_output", grad_output);
  if (want_log_std) gradients.grad_log_std = floats(grad_log_std);
  Device device(sample);
  loops::transition_log_prob_bwd(device, inputs, gradients);
  return {grad_next, grad_sample, grad_output, grad_log_std};
}

}  // namespace
}  // namespace dxmi

DXMI_SCHEMAS(m) {
  m.def(
      "transition_log_prob_fwd(Tensor next_sample, Tensor sample, Tensor model_output, "
      "Tensor timestep, Tensor sample_coef, Tensor output_coef, Tensor log_std) -> Tensor");
  m.def(
      "transition_log_prob_bwd(Tensor grad_log_prob, Tensor next_sample, Tensor sample, "
      "Tensor model_output, Tensor timestep, Tensor sample_coef, Tensor output_coef, "
      "Tensor log_std, bool want_next, bool want_sample, bool want_output, bool want_log_std) "
      "-> (Tensor grad_next_sample, Tensor grad_sample, Tensor grad_model_output, "
      "Tensor grad_log_std)");
}
DXMI_IMPLEMENTATIONS(m) {
  m.impl("transition_log_prob_fwd", TORCH_BOX(&dxmi::transition_log_prob_fwd));
  m.impl("transition_log_prob_bwd", TORCH_BOX(&dxmi::transition_log_prob_bwd));
}
