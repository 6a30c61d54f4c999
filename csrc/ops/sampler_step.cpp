// sampler_step: schemas, checks and entries.
#include "sampler_step.h"

#include <optional>
#include <tuple>

#include "checks.h"
#include "registration.h"

namespace dxmi {
namespace {

SamplerStepInputs check_inputs(const Checks& check, const Tensor& sample,
                               const Tensor& model_output, const Tensor& timestep,
                               const Tensor& sample_coef, const Tensor& output_coef,
                               const Tensor& log_std, const Tensor& key, int64_t sample_offset) {
  const TransitionInputs transition =
      check_transition(check, sample, model_output, timestep, sample_coef, output_coef, log_std);
  check.noise_range("sample", transition.rows, transition.dim, sample_offset);
  return {transition, check.key(key), sample_offset};
}

std::tuple<Tensor, Tensor, Tensor> sampler_step_fwd(Tensor sample, Tensor model_output,
                                                    Tensor timestep, Tensor sample_coef,
                                                    Tensor output_coef, Tensor log_std, Tensor key,
                                                    int64_t sample_offset) {
  const Checks check("sampler_step", "sample", sample);
  const SamplerStepInputs inputs = check_inputs(check, sample, model_output, timestep, sample_coef,
                                                output_coef, log_std, key, sample_offset);
  Tensor next_sample = torch::stable::empty_like(sample);
  Tensor log_prob = new_vector(log_std, inputs.rows);
  Tensor sq_displacement = new_vector(log_std, inputs.rows);
  Device device(sample);
  loops::sampler_step_fwd(
      device, inputs,
      {check.view("next_sample", next_sample), floats(log_prob), floats(sq_displacement)});
  return {next_sample, log_prob, sq_displacement};
}

std::tuple<Tensor, Tensor, Tensor> sampler_step_bwd(
    std::optional<Tensor> grad_next_sample, std::optional<Tensor> grad_log_prob,
    std::optional<Tensor> grad_sq_displacement, Tensor sample, Tensor model_output, Tensor timestep,
    Tensor sample_coef, Tensor output_coef, Tensor log_std, Tensor key, int64_t sample_offset,
    bool want_sample, bool want_output, bool want_log_std) {
  const Checks check("sampler_step_bwd", "sample", sample);
  const SamplerStepInputs inputs = check_inputs(check, sample, model_output, timestep, sample_coef,
                                                output_coef, log_std, key, sample_offset);
  SamplerStepGradients gradients{};
  if (grad_next_sample) {
    check.same("grad_next_sample", *grad_next_sample, "sample", sample);
    gradients.grad_next_sample = check.view("grad_next_sample", *grad_next_sample);
  }
  const ScalarType type = log_std.scalar_type();
  if (grad_log_prob) {
    check.vector("grad_log_prob", *grad_log_prob, type, inputs.rows, "N");
    gradients.grad_log_prob = floats(*grad_log_prob);
  }
  if (grad_sq_displacement) {
    check.vector("grad_sq_displacement", *grad_sq_displacement, type, inputs.rows, "N");
    gradients.grad_sq_displacement = floats(*grad_sq_displacement);
  }
  Tensor grad_sample = new_sample_gradient(sample, want_sample);
  Tensor grad_output = new_sample_gradient(model_output, want_output);
  Tensor grad_log_std = new_vector_gradient(log_std, want_log_std);
  if (want_sample) gradients.grad_sample = check.view("grad_sample", grad_sample);
  if (want_output) gradients.grad_model_output = check.view("grad_model_output", grad_output);
  if (want_log_std) gradients.grad_log_std = floats(grad_log_std);
  Device device(sample);
  loops::sampler_step_bwd(device, inputs, gradients);
  return {grad_sample, grad_output, grad_log_std};
}

}  // namespace
}  // namespace dxmi

DXMI_SCHEMAS(m) {
  m.def(
      "sampler_step_fwd(Tensor sample, Tensor model_output, Tensor timestep, Tensor sample_coef, "
      "Tensor output_coef, Tensor log_std, Tensor key, int sample_offset) "
      "-> (Tensor next_sample, Tensor log_prob, Tensor sq_displacement)");
  m.def(
      "sampler_step_bwd(Tensor? grad_next_sample, Tensor? grad_log_prob, "
      "Tensor? grad_sq_displacement, Tensor sample, Tensor model_output, Tensor timestep, "
      "Tensor sample_coef, Tensor output_coef, Tensor log_std, Tensor key, int sample_offset, "
      "bool want_sample, bool want_output, bool want_log_std) "
      "-> (Tensor grad_sample, Tensor grad_model_output, Tensor grad_log_std)");
}
DXMI_IMPLEMENTATIONS(m) {
  m.impl("sampler_step_fwd", TORCH_BOX(&dxmi::sampler_step_fwd));
  m.impl("sampler_step_bwd", TORCH_BOX(&dxmi::sampler_step_bwd));
}
