// energy_loss: schemas, checks and entries.
#include "energy_loss.h"

#include <tuple>

#include "checks.h"
#include "registration.h"

namespace dxmi {
namespace {

EnergyLossInputs check_inputs(const Checks& check, const Tensor& energy_data,
                              const Tensor& energy_sample, double gamma) {
  check.vector_type("energy_data", energy_data);
  const ScalarType type = energy_data.scalar_type();
  check.vector("energy_data", energy_data, type, "N");
  check.vector("energy_sample", energy_sample, type, "M");
  if (energy_data.size(0) == 0) check.fail("energy_data", "must not be empty, got shape [0]");
  if (energy_sample.size(0) == 0) check.fail("energy_sample", "must not be empty, got shape [0]");
  return {is_float64(energy_data), energy_data.size(0),   energy_sample.size(0),
          floats(energy_data),     floats(energy_sample), gamma};
}

Tensor energy_loss_fwd(Tensor energy_data, Tensor energy_sample, double gamma) {
  const Checks check("energy_loss", "energy_data", energy_data);
  const EnergyLossInputs inputs = check_inputs(check, energy_data, energy_sample, gamma);
  Tensor loss = new_scalar(energy_data);
  Device device(energy_data);
  loops::energy_loss_fwd(device, inputs, floats(loss));
  return loss;
}

std::tuple<Tensor, Tensor> energy_loss_bwd(Tensor grad, Tensor energy_data, Tensor energy_sample,
                                           double gamma) {
  const Checks check("energy_loss_bwd", "energy_data", energy_data);
  const EnergyLossInputs inputs = check_inputs(check, energy_data, energy_sample, gamma);
  check.device("grad", grad);
  check.dtype("grad", grad, energy_data.scalar_type(), "energy_data");
  if (grad.dim() != 0) check.fail("grad", "must be a scalar, got shape ", to_text(grad));
  Tensor grad_data = new_vector(energy_data, inputs.data_rows);
  Tensor grad_sample = new_vector(energy_data, inputs.sample_rows);
  Device device(energy_data);
  loops::energy_loss_bwd(device, inputs, {floats(grad), floats(grad_data), floats(grad_sample)});
  return {grad_data, grad_sample};
}

}  // namespace
}  // namespace dxmi

DXMI_SCHEMAS(m) {
  m.def("energy_loss_fwd(Tensor energy_data, Tensor energy_sample, float gamma) -> Tensor");
  m.def(
      "energy_loss_bwd(Tensor grad, Tensor energy_data, Tensor energy_sample, float gamma) "
      "-> (Tensor grad_energy_data, Tensor grad_energy_sample)");
}
DXMI_IMPLEMENTATIONS(m) {
  m.impl("energy_loss_fwd", TORCH_BOX(&dxmi::energy_loss_fwd));
  m.impl("energy_loss_bwd", TORCH_BOX(&dxmi::energy_loss_bwd));
}
