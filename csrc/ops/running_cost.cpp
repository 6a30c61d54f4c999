// running_cost: schemas, checks and entries.
#include "running_cost.h"

#include <tuple>

#include "checks.h"
#include "registration.h"

namespace dxmi {

RunningCostInputs check_running_cost(const Checks& check, const char* lead_name, const Tensor& lead,
                                     const Tensor& timestep, const Tensor& log_std,
                                     const Tensor& velocity_var, double tau_entropy,
                                     double tau_velocity, int64_t skip_last) {
  check.vector_type(lead_name, lead);
  const ScalarType type = lead.scalar_type();
  check.vector(lead_name, lead, type, "N");
  const int64_t rows = lead.size(0), steps = check.table("log_std", log_std, type);
  check.table("velocity_var", velocity_var, type, steps);
  if (skip_last < 0 || skip_last > steps)
    check.fail("skip_last", "must be in 0..", steps, " (T), got ", skip_last);
  const RunningCostInputs inputs{is_float64(lead),
                                 rows,
                                 steps,
                                 check.timesteps(timestep, rows, steps),
                                 floats(log_std),
                                 floats(velocity_var),
                                 tau_entropy,
                                 tau_velocity,
                                 skip_last};
  if constexpr (Device::kReadsValues)
    with_vector_type(inputs.is_float64, [&](auto tag) {
      const auto variance = inputs.velocity_var.as<const decltype(tag)>();
      for (int64_t t = 0; t < steps - skip_last; ++t)
        if (!(variance[t] > 0))
          check.fail("velocity_var", "must be > 0, got ", variance[t], " at timestep ", t);
    });
  return inputs;
}

namespace {

Tensor running_cost_fwd(Tensor sq_displacement, Tensor timestep, Tensor log_std,
                        Tensor velocity_var, double tau_entropy, double tau_velocity,
                        int64_t skip_last) {
  const Checks check("running_cost", "sq_displacement", sq_displacement);
  const RunningCostInputs inputs =
      check_running_cost(check, "sq_displacement", sq_displacement, timestep, log_std, velocity_var,
                         tau_entropy, tau_velocity, skip_last);
  Tensor cost = new_vector(sq_displacement, inputs.rows);
  Device device(sq_displacement);
  loops::running_cost_fwd(device, inputs, floats(sq_displacement), floats(cost));
  return cost;
}

std::tuple<Tensor, Tensor> running_cost_bwd(Tensor grad, Tensor timestep, Tensor log_std,
                                            Tensor velocity_var, double tau_entropy,
                                            double tau_velocity, int64_t skip_last,
                                            bool want_sq_displacement, bool want_log_std) {
  const Checks check("running_cost_bwd", "grad", grad);
  const RunningCostInputs inputs = check_running_cost(
      check, "grad", grad, timestep, log_std, velocity_var, tau_entropy, tau_velocity, skip_last);
  Tensor grad_sq_displacement = new_vector_gradient(grad, want_sq_displacement);
  Tensor grad_log_std = new_vector_gradient(log_std, want_log_std);
  RunningCostGradients gradients{floats(grad), {}, {}};
  if (want_sq_displacement) gradients.grad_sq_displacement = floats(grad_sq_displacement);
  if (want_log_std) gradients.grad_log_std = floats(grad_log_std);
  Device device(grad);
  loops::running_cost_bwd(device, inputs, gradients);
  return {grad_sq_displacement, grad_log_std};
}

}  // namespace
}  // namespace dxmi

DXMI_SCHEMAS(m) {
  m.def(
      "running_cost_fwd(Tensor sq_displacement, Tensor timestep, Tensor log_std, "
      "Tensor velocity_var, float tau_entropy, float tau_velocity, int skip_last) -> Tensor");
  m.def(
      "running_cost_bwd(Tensor grad, Tensor timestep, Tensor log_std, Tensor velocity_var, "
      "float tau_entropy, float tau_velocity, int skip_last, bool want_sq_displacement, "
      "bool want_log_std) -> (Tensor grad_sq_displacement, Tensor grad_log_std)");
}
DXMI_IMPLEMENTATIONS(m) {
  m.impl("running_cost_fwd", TORCH_BOX(&dxmi::running_cost_fwd));
  m.impl("running_cost_bwd", TORCH_BOX(&dxmi::running_cost_bwd));
}
