// td_target: schema, checks and entry.
#include "td_target.h"

#include "checks.h"
#include "registration.h"

namespace dxmi {
namespace {

Tensor td_target(Tensor next_value, Tensor sq_displacement, Tensor timestep, Tensor log_std,
                 Tensor velocity_var, Tensor time_cost, double tau_entropy, double tau_velocity,
                 int64_t skip_last) {
  const Checks check("td_target", "sq_displacement", sq_displacement);
  const RunningCostInputs cost =
      check_running_cost(check, "sq_displacement", sq_displacement, timestep, log_std, velocity_var,
                         tau_entropy, tau_velocity, skip_last);
  const ScalarType type = sq_displacement.scalar_type();
  check.vector("next_value", next_value, type, cost.rows, "N");
  check.table("time_cost", time_cost, type, cost.steps);
  Tensor target = new_vector(sq_displacement, cost.rows);
  Device device(sq_displacement);
  loops::td_target(device, {cost, floats(next_value), floats(sq_displacement), floats(time_cost)},
                   floats(target));
  return target;
}

}  // namespace
}  // namespace dxmi

DXMI_SCHEMAS(m) {
  m.def(
      "td_target(Tensor next_value, Tensor sq_displacement, Tensor timestep, Tensor log_std, "
      "Tensor velocity_var, Tensor time_cost, float tau_entropy, float tau_velocity, "
      "int skip_last) -> Tensor");
}
DXMI_IMPLEMENTATIONS(m) { m.impl("td_target", TORCH_BOX(&dxmi::td_target)); }
