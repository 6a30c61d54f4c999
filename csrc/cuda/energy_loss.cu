// energy_loss on CUDA.
#include "../ops/energy_loss.h"

#include <algorithm>

#include "../core/costs.h"
#include "launch.h"
#include "sums.h"

namespace dxmi {
namespace cuda {

// One block: there are only as many energies as rows in a batch.
template <class R>
DXMI_KERNEL energy_loss_fwd_kernel(EnergyLossInputs a, AnyVector loss) {
  const R gamma = static_cast<R>(a.gamma);
  R data = 0, sample = 0;
  for (int64_t n = threadIdx.x; n < a.data_rows; n += blockDim.x)
    data += energy_term(a.energy_data.as<const R>()[n], R(1), gamma);
  for (int64_t n = threadIdx.x; n < a.sample_rows; n += blockDim.x)
    sample += energy_term(a.energy_sample.as<const R>()[n], R(-1), gamma);
  data = block_sum(data);
  sample = block_sum(sample);
  if (threadIdx.x == 0)
    loss.as<R>()[0] = data / static_cast<R>(a.data_rows) + sample / static_cast<R>(a.sample_rows);
}

template <class R>
DXMI_KERNEL energy_loss_bwd_kernel(EnergyLossInputs a, EnergyLossGradients g) {
  const int64_t n = thread_of_grid();
  const R scale = g.grad.as<const R>()[0], gamma = static_cast<R>(a.gamma);
  if (n < a.data_rows)
    g.grad_energy_data.as<R>()[n] = scale / static_cast<R>(a.data_rows) *
                                    energy_term_grad(a.energy_data.as<const R>()[n], R(1), gamma);
  if (n < a.sample_rows)
    g.grad_energy_sample.as<R>()[n] =
        scale / static_cast<R>(a.sample_rows) *
        energy_term_grad(a.energy_sample.as<const R>()[n], R(-1), gamma);
}

}  // namespace cuda

namespace loops {

using namespace cuda;

void energy_loss_fwd(Device& device, const EnergyLossInputs& a, AnyVector loss) {
  with_vector_type(a.is_float64, [&](auto tag) {
    using R = decltype(tag);
    launch("energy_loss", device, energy_loss_fwd_kernel<R>, 1, kMaxThreads, a, loss);
  });
}

void energy_loss_bwd(Device& device, const EnergyLossInputs& a, const EnergyLossGradients& g) {
  with_vector_type(a.is_float64, [&](auto tag) {
    using R = decltype(tag);
    const int64_t blocks = blocks_for(std::max(a.data_rows, a.sample_rows), kThreads);
    launch("energy_loss_bwd", device, energy_loss_bwd_kernel<R>, blocks, kThreads, a, g);
  });
}

}  // namespace loops
}  // namespace dxmi
