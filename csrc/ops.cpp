// The schemas of all ops, and their CPU registrations. Functional unless the name ends in `_`; the
// public functions, their autograd and their documentation are in dxmi_ext/ops.py.
#include <torch/csrc/stable/library.h>

#include "core/philox.h"
#include "cpu/backend.h"
#include "entries.h"

namespace dxmi {
namespace {

// The bare generator, for its known-answer test: rows of four counter words to rows of four outputs.
Tensor philox(Tensor counters, int64_t key0, int64_t key1) {
  const Checks check("philox", "counters", counters, false);
  if (counters.dim() != 2 || counters.size(1) != 4 || counters.scalar_type() != ScalarType::Long ||
      !counters.is_contiguous())
    check.fail("counters", "must be contiguous int64 [N, 4], got ", to_text(counters.scalar_type()),
               " ", to_text(counters));
  Tensor result = torch::stable::empty_like(counters);
  const int64_t* in = static_cast<const int64_t*>(counters.data_ptr());
  int64_t* out = static_cast<int64_t*>(result.data_ptr());
  for (int64_t n = 0; n < counters.size(0); ++n, in += 4, out += 4) {
    uint32_t x[4];
    for (int i = 0; i < 4; ++i) x[i] = static_cast<uint32_t>(in[i]);
    philox4x32_10<ScalarLane>(x[0], x[1], x[2], x[3], static_cast<uint32_t>(key0),
                              static_cast<uint32_t>(key1));
    for (int i = 0; i < 4; ++i) out[i] = x[i];
  }
  return result;
}

}  // namespace
}  // namespace dxmi

STABLE_TORCH_LIBRARY(dxmi_ext, m) {
  m.def("philox(Tensor counters, int key0, int key1) -> Tensor");
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

STABLE_TORCH_LIBRARY_IMPL(dxmi_ext, CPU, m) {
  using Cpu = dxmi::Entries<dxmi::CpuBackend>;
  m.impl("philox", TORCH_BOX(&dxmi::philox));
  m.impl("normal_", TORCH_BOX(&Cpu::normal_));
  m.impl("sampler_step_fwd", TORCH_BOX(&Cpu::sampler_step_fwd));
  m.impl("sampler_step_bwd", TORCH_BOX(&Cpu::sampler_step_bwd));
  m.impl("transition_log_prob_fwd", TORCH_BOX(&Cpu::transition_log_prob_fwd));
  m.impl("transition_log_prob_bwd", TORCH_BOX(&Cpu::transition_log_prob_bwd));
  m.impl("running_cost_fwd", TORCH_BOX(&Cpu::running_cost_fwd));
  m.impl("running_cost_bwd", TORCH_BOX(&Cpu::running_cost_bwd));
  m.impl("td_target", TORCH_BOX(&Cpu::td_target));
  m.impl("energy_loss_fwd", TORCH_BOX(&Cpu::energy_loss_fwd));
  m.impl("energy_loss_bwd", TORCH_BOX(&Cpu::energy_loss_bwd));
  m.impl("update_velocity_var_", TORCH_BOX(&Cpu::update_velocity_var_));
}
