// energy_loss: the contrastive loss of an energy with its regularization, forward and backward.
#pragma once

#include "device.h"
#include "operands.h"

namespace dxmi {

struct EnergyLossInputs {
  bool is_float64;  // all vectors
  int64_t data_rows, sample_rows;
  AnyVector energy_data, energy_sample;  // [N], [M]
  double gamma;
};

struct EnergyLossGradients {
  AnyVector grad;                                  // a scalar
  AnyVector grad_energy_data, grad_energy_sample;  // [N], [M]
};

namespace loops {
void energy_loss_fwd(Device& device, const EnergyLossInputs& a, AnyVector loss);
void energy_loss_bwd(Device& device, const EnergyLossInputs& a, const EnergyLossGradients& g);
}  // namespace loops

}  // namespace dxmi
