// energy_loss on CUDA.
#include "../ops/energy_loss.h"

#include <algorithm>

#include "../core/costs.h"
#include "row_layout.h"

namespace dxmi {
namespace cuda {

template <class R>
DXMI_KERNEL energy_loss_fwd_kernel(EnergyLossInputs a, AnyVector loss, RowLayout layout,
                                   SplitMemory<2, R> memory) {
  const RowSlice slice = slice_of(layout);
  const R gamma = static_cast<R>(a.gamma);
  R data = 0, sample = 0;
  for (int i = slice.first; i < slice.count; i += slice.stride) {
    const int64_t n = slice.begin + i;
    if (n < a.data_rows) data += energy_term(a.energy_data.as<const R>()[n], R(1), gamma);
    if (n < a.sample_rows) sample += energy_term(a.energy_sample.as<const R>()[n], R(-1), gamma);
  }
  R sums[2] = {block_sum(data), block_sum(sample)};
  if (complete_sums(layout, slice, sums, memory) && threadIdx.x == 0)
    loss.as<R>()[0] =
        sums[0] / static_cast<R>(a.data_rows) + sums[1] / static_cast<R>(a.sample_rows);
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
  const char* const op = "energy_loss";
  with_vector_type(a.is_float64, [&](auto tag) {
    using R = decltype(tag);
    const RowGrid grid = sums_grid(1, std::max(a.data_rows, a.sample_rows));
    launch(op, device, energy_loss_fwd_kernel<R>, grid.blocks, grid.threads, a, loss, grid.layout,
           split_memory<2, R>(op, device, grid.layout));
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
