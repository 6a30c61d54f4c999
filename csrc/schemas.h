// The schemas of all ops. Functional unless the name ends in `_`; the public functions, their autograd and
// their documentation are in dxmi_ext/ops.py.
#pragma once

#include <torch/csrc/stable/library.h>

namespace dxmi {

inline void define_schemas(torch::stable::detail::StableLibrary& m) {
  m.def("normal_(Tensor(a!) out, Tensor key, int timestep, int sample_offset) -> ()");
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
  m.def(
      "transition_log_prob_fwd(Tensor next_sample, Tensor sample, Tensor model_output, "
      "Tensor timestep, Tensor sample_coef, Tensor output_coef, Tensor log_std) -> Tensor");
  m.def(
      "transition_log_prob_bwd(Tensor grad_log_prob, Tensor next_sample, Tensor sample, "
      "Tensor model_output, Tensor timestep, Tensor sample_coef, Tensor output_coef, "
      "Tensor log_std, bool want_next, bool want_sample, bool want_output, bool want_log_std) "
      "-> (Tensor grad_next_sample, Tensor grad_sample, Tensor grad_model_output, "
      "Tensor grad_log_std)");
  m.def(
      "running_cost_fwd(Tensor sq_displacement, Tensor timestep, Tensor log_std, "
      "Tensor velocity_var, float tau_entropy, float tau_velocity, int skip_last) -> Tensor");
  m.def(
      "running_cost_bwd(Tensor grad, Tensor timestep, Tensor log_std, Tensor velocity_var, "
      "float tau_entropy, float tau_velocity, int skip_last, bool want_sq_displacement, "
      "bool want_log_std) -> (Tensor grad_sq_displacement, Tensor grad_log_std)");
  m.def(
      "td_target(Tensor next_value, Tensor sq_displacement, Tensor timestep, Tensor log_std, "
      "Tensor velocity_var, Tensor time_cost, float tau_entropy, float tau_velocity, "
      "int skip_last) -> Tensor");
  m.def("energy_loss_fwd(Tensor energy_data, Tensor energy_sample, float gamma) -> Tensor");
  m.def(
      "energy_loss_bwd(Tensor grad, Tensor energy_data, Tensor energy_sample, float gamma) "
      "-> (Tensor grad_energy_data, Tensor grad_energy_sample)");
  m.def("update_velocity_var_(Tensor(a!) velocity_var, Tensor sq_displacement, float decay) -> ()");
}

}  // namespace dxmi
