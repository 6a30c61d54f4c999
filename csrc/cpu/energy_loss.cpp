// energy_loss on the CPU.
#include "../ops/energy_loss.h"

#include "../core/costs.h"

namespace dxmi::loops {

void energy_loss_fwd(Device&, const EnergyLossInputs& a, AnyVector loss) {
  with_vector_type(a.is_float64, [&](auto tag) {
    using R = decltype(tag);
    const auto mean = [&](AnyVector energies, int64_t count, double sign) {
      const Vector<const R> e = energies.as<const R>();
      double sum = 0;
      for (int64_t n = 0; n < count; ++n)
        sum += energy_term(static_cast<double>(e[n]), sign, a.gamma);
      return sum / static_cast<double>(count);
    };
    loss.as<R>()[0] = static_cast<R>(mean(a.energy_data, a.data_rows, 1.0) +
                                     mean(a.energy_sample, a.sample_rows, -1.0));
  });
}

void energy_loss_bwd(Device&, const EnergyLossInputs& a, const EnergyLossGradients& g) {
  with_vector_type(a.is_float64, [&](auto tag) {
    using R = decltype(tag);
    const double scale = g.grad.as<const R>()[0];
    const auto fill = [&](AnyVector energies, AnyVector gradients, int64_t count, double sign) {
      const Vector<const R> e = energies.as<const R>();
      const Vector<R> out = gradients.as<R>();
      for (int64_t n = 0; n < count; ++n)
        out[n] = static_cast<R>(scale / static_cast<double>(count) *
                                energy_term_grad(static_cast<double>(e[n]), sign, a.gamma));
    };
    fill(a.energy_data, g.grad_energy_data, a.data_rows, 1.0);
    fill(a.energy_sample, g.grad_energy_sample, a.sample_rows, -1.0);
  });
}

}  // namespace dxmi::loops
