// transition_log_prob on CUDA.
#include "../ops/transition_log_prob.h"

#include "row_transition.h"
#include "sample_units.h"
#include "table_sums.h"

namespace dxmi {
namespace cuda {

template <class T, bool kVector>
DXMI_KERNEL transition_log_prob_fwd_kernel(const __grid_constant__ TransitionLogProbInputs a,
                                           AnyVector log_prob, RowLayout layout,
                                           SplitMemory<1, ComputeType<T>> memory) {
  using L = LaneOf<T>;
  using R = ComputeType<T>;
  constexpr int n = kUnit<T>;
  const RowSlice slice = slice_of(layout);
  const RowTransition<R> row = row_transition<R>(a, slice);
  const R inverse_std = dxmi::exp(-row.log_std);
  R sum = 0;
  for (int place = slice.first; place < slice.count; place += slice.stride) {
    const int unit = unit_at<kVector>(layout, slice, place);
    R next[n], x[n], output[n];
    load<T, kVector>(a.next_sample, layout, slice, unit, next);
    load<T, kVector>(a.sample, layout, slice, unit, x);
    load<T, kVector>(a.model_output, layout, slice, unit, output);
    DXMI_UNROLL
    for (int i = 0; i < n; ++i) {
      const R z = standardized<L>(row.transition, inverse_std, next[i], x[i], output[i]);
      if (in_row<T, kVector>(layout, slice, unit, i)) sum = L::fma(z, z, sum);
    }
  }
  R sums[1] = {row_sum(layout, sum)};
  if (!complete_sums(layout, slice, sums, memory) || !slice.active || !leads(layout)) return;
  log_prob.as<R>()[slice.row] = log_prob_row(sums[0], static_cast<R>(layout.dim), row.log_std);
}

// noise_sq: [rows, splits] sums of z^2.
template <class T, bool kVector>
DXMI_KERNEL transition_log_prob_bwd_kernel(const __grid_constant__ TransitionLogProbInputs a,
                                           const __grid_constant__ TransitionLogProbGradients g,
                                           RowLayout layout, ComputeType<T>* noise_sq) {
  using L = LaneOf<T>;
  using R = ComputeType<T>;
  constexpr int n = kUnit<T>;
  const RowSlice slice = slice_of(layout);
  const RowTransition<R> row = row_transition<R>(a, slice);
  const R inverse_std = dxmi::exp(-row.log_std);
  const R grad = slice.active ? g.grad_log_prob.as<const R>()[slice.row] : R(0);
  const R scale = grad * inverse_std / static_cast<R>(layout.dim);
  R sum = 0;
  for (int place = slice.first; place < slice.count; place += slice.stride) {
    const int unit = unit_at<kVector>(layout, slice, place);
    R next[n], x[n], output[n];
    load<T, kVector>(a.next_sample, layout, slice, unit, next);
    load<T, kVector>(a.sample, layout, slice, unit, x);
    load<T, kVector>(a.model_output, layout, slice, unit, output);
    DXMI_UNROLL
    for (int i = 0; i < n; ++i) {
      const R z = standardized<L>(row.transition, inverse_std, next[i], x[i], output[i]);
      if (in_row<T, kVector>(layout, slice, unit, i)) sum = L::fma(z, z, sum);
      log_prob_grad<L>(row.transition, z, scale, next[i], x[i], output[i]);
    }
    store_if_wanted<T, kVector>(g.grad_next_sample, layout, slice, unit, next);
    store_if_wanted<T, kVector>(g.grad_sample, layout, slice, unit, x);
    store_if_wanted<T, kVector>(g.grad_model_output, layout, slice, unit, output);
  }
  if (g.grad_log_std.data == nullptr) return;
  sum = row_sum(layout, sum);
  if (slice.active && leads(layout)) noise_sq[split_index(layout, slice)] = sum;
}

template <class R>
DXMI_KERNEL transition_log_prob_log_std_kernel(TransitionLogProbInputs a,
                                               TransitionLogProbGradients g, const R* noise_sq,
                                               int64_t splits, RowLayout layout,
                                               SplitMemory<1, R> memory) {
  const auto value = [&](int64_t n) {
    return log_prob_grad_log_std_row(sum_of_splits(noise_sq, n, splits), static_cast<R>(a.dim),
                                     g.grad_log_prob.as<const R>()[n]);
  };
  sum_into_table<R>(g.grad_log_std, layout, a.timestep, value, memory);
}

}  // namespace cuda

namespace loops {

using namespace cuda;

void transition_log_prob_fwd(Device& device, const TransitionLogProbInputs& a, AnyVector log_prob) {
  const char* const op = "transition_log_prob";
  with_sample_type(a.dtype, [&](auto tag) {
    using T = decltype(tag);
    const RowGrid grid = row_grid<T>(a.rows, a.dim, {&a.next_sample, &a.sample, &a.model_output});
    launch(op, device,
           grid.vector ? transition_log_prob_fwd_kernel<T, true>
                       : transition_log_prob_fwd_kernel<T, false>,
           grid.blocks, grid.threads, a, log_prob, grid.layout,
           split_memory<1, ComputeType<T>>(op, device, grid.layout));
  });
}

void transition_log_prob_bwd(Device& device, const TransitionLogProbInputs& a,
                             const TransitionLogProbGradients& g) {
  const char* const op = "transition_log_prob_bwd";
  with_sample_type(a.dtype, [&](auto tag) {
    using T = decltype(tag);
    using R = ComputeType<T>;
    const RowGrid grid = row_grid<T>(a.rows, a.dim,
                                     {&a.next_sample, &a.sample, &a.model_output,
                                      &g.grad_next_sample, &g.grad_sample, &g.grad_model_output});
    const int64_t splits = grid.layout.splits;
    R* const noise_sq = g.grad_log_std.data ? device.workspace<R>(a.rows * splits) : nullptr;
    launch(op, device,
           grid.vector ? transition_log_prob_bwd_kernel<T, true>
                       : transition_log_prob_bwd_kernel<T, false>,
           grid.blocks, grid.threads, a, g, grid.layout, noise_sq);
    if (!g.grad_log_std.data) return;
    const RowGrid table = sums_grid(a.steps, a.rows);
    launch(op, device, transition_log_prob_log_std_kernel<R>, table.blocks, table.threads, a, g,
           noise_sq, splits, table.layout, split_memory<1, R>(op, device, table.layout));
  });
}

}  // namespace loops
}  // namespace dxmi
