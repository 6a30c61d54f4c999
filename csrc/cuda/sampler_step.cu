// sampler_step on CUDA.
#include "../ops/sampler_step.h"

#include "row_transition.h"
#include "sample_units.h"
#include "table_sums.h"

namespace dxmi {
namespace cuda {

template <class T, bool kVector>
DXMI_KERNEL sampler_step_fwd_kernel(const __grid_constant__ SamplerStepInputs a,
                                    const __grid_constant__ SamplerStepResults r, RowLayout layout,
                                    SplitMemory<2, ComputeType<T>> memory) {
  using L = LaneOf<T>;
  using R = ComputeType<T>;
  constexpr int n = kUnit<T>;
  const RowSlice slice = slice_of(layout);
  const RowTransition<R> row = row_transition<R>(a, slice);
  const NoiseKey key = read_key(a.key);
  R noise_sq = 0, displacement_sq = 0;
  for (int place = slice.first; place < slice.count; place += slice.stride) {
    const int unit = unit_at<kVector>(layout, slice, place);
    R x[n], output[n], z[n];
    load<T, kVector>(a.sample, layout, slice, unit, x);
    load<T, kVector>(a.model_output, layout, slice, unit, output);
    noise<T, kVector>(key, layout, slice, unit, a.sample_offset, row.timestep, z);
    DXMI_UNROLL
    for (int i = 0; i < n; ++i)
      if (in_row<T, kVector>(layout, slice, unit, i))
        x[i] = step<L>(row.transition, x[i], output[i], z[i], noise_sq, displacement_sq);
    store<T, kVector>(r.next_sample, layout, slice, unit, x);
  }
  R sums[2] = {row_sum(layout, noise_sq), row_sum(layout, displacement_sq)};
  if (!complete_sums(layout, slice, sums, memory) || !slice.active || !leads(layout)) return;
  const R dim = static_cast<R>(layout.dim);
  r.log_prob.as<R>()[slice.row] = log_prob_row(sums[0], dim, row.log_std);
  r.sq_displacement.as<R>()[slice.row] = sums[1] / dim;
}

// grad_std: [rows, splits] sums of the gradient of std.
template <class T, bool kVector>
DXMI_KERNEL sampler_step_bwd_kernel(const __grid_constant__ SamplerStepInputs a,
                                    const __grid_constant__ SamplerStepGradients g,
                                    RowLayout layout, ComputeType<T>* grad_std) {
  using L = LaneOf<T>;
  using R = ComputeType<T>;
  constexpr int n = kUnit<T>;
  const RowSlice slice = slice_of(layout);
  const RowTransition<R> row = row_transition<R>(a, slice);
  const NoiseKey key = read_key(a.key);
  const bool has_sq = g.grad_sq_displacement.data != nullptr;
  const R grad_sq = has_sq && slice.active ? 2 * g.grad_sq_displacement.as<const R>()[slice.row] /
                                                 static_cast<R>(layout.dim)
                                           : R(0);
  const bool needs_noise = has_sq || g.grad_log_std.data != nullptr;
  R sum = 0;
  for (int place = slice.first; place < slice.count; place += slice.stride) {
    const int unit = unit_at<kVector>(layout, slice, place);
    R x[n], output[n], z[n] = {}, grad_next[n], grad_x[n], grad_output[n];
    load<T, kVector>(a.sample, layout, slice, unit, x);
    load<T, kVector>(a.model_output, layout, slice, unit, output);
    load_if_given<T, kVector>(g.grad_next_sample, layout, slice, unit, grad_next);
    if (needs_noise) noise<T, kVector>(key, layout, slice, unit, a.sample_offset, row.timestep, z);
    DXMI_UNROLL
    for (int i = 0; i < n; ++i)
      if (in_row<T, kVector>(layout, slice, unit, i))
        step_grad<L>(row.transition, x[i], output[i], z[i], grad_next[i], grad_sq, grad_x[i],
                     grad_output[i], sum);
    store_if_wanted<T, kVector>(g.grad_sample, layout, slice, unit, grad_x);
    store_if_wanted<T, kVector>(g.grad_model_output, layout, slice, unit, grad_output);
  }
  if (g.grad_log_std.data == nullptr) return;
  sum = row_sum(layout, sum);
  if (slice.active && leads(layout)) grad_std[split_index(layout, slice)] = sum;
}

template <class R>
DXMI_KERNEL sampler_step_log_std_kernel(SamplerStepInputs a, SamplerStepGradients g,
                                        const R* grad_std, int64_t splits, RowLayout layout,
                                        SplitMemory<1, R> memory) {
  const auto value = [&](int64_t n) {
    const R std = dxmi::exp(a.log_std.as<const R>()[a.timestep[n]]);
    const R grad_log_prob = g.grad_log_prob.data ? g.grad_log_prob.as<const R>()[n] : R(0);
    return step_grad_log_std_row(std, sum_of_splits(grad_std, n, splits), grad_log_prob);
  };
  sum_into_table<R>(g.grad_log_std, layout, a.timestep, value, memory);
}

}  // namespace cuda

namespace loops {

using namespace cuda;

void sampler_step_fwd(Device& device, const SamplerStepInputs& a, const SamplerStepResults& r) {
  const char* const op = "sampler_step";
  with_sample_type(a.dtype, [&](auto tag) {
    using T = decltype(tag);
    const RowGrid grid = row_grid<T>(a.rows, a.dim, {&a.sample, &a.model_output, &r.next_sample});
    launch(op, device,
           grid.vector ? sampler_step_fwd_kernel<T, true> : sampler_step_fwd_kernel<T, false>,
           grid.blocks, grid.threads, a, r, grid.layout,
           split_memory<2, ComputeType<T>>(op, device, grid.layout));
  });
}

void sampler_step_bwd(Device& device, const SamplerStepInputs& a, const SamplerStepGradients& g) {
  const char* const op = "sampler_step_bwd";
  with_sample_type(a.dtype, [&](auto tag) {
    using T = decltype(tag);
    using R = ComputeType<T>;
    const RowGrid grid = row_grid<T>(
        a.rows, a.dim,
        {&a.sample, &a.model_output, &g.grad_next_sample, &g.grad_sample, &g.grad_model_output});
    const int64_t splits = grid.layout.splits;
    R* const grad_std = g.grad_log_std.data ? device.workspace<R>(a.rows * splits) : nullptr;
    launch(op, device,
           grid.vector ? sampler_step_bwd_kernel<T, true> : sampler_step_bwd_kernel<T, false>,
           grid.blocks, grid.threads, a, g, grid.layout, grad_std);
    if (!g.grad_log_std.data) return;
    const RowGrid table = sums_grid(a.steps, a.rows);
    launch(op, device, sampler_step_log_std_kernel<R>, table.blocks, table.threads, a, g, grad_std,
           splits, table.layout, split_memory<1, R>(op, device, table.layout));
  });
}

}  // namespace loops
}  // namespace dxmi
