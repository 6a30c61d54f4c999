// Kernels over row results [N] and tables [T]. R is float or double.
#pragma once

#include "../core/costs.h"
#include "device.h"

namespace dxmi::cuda {

// Values the host could not check: no cost is better than a wrong one. A debug build stops at them.
template <class R>
__device__ bool valid(const CostProblem& p, int64_t timestep) {
  const bool in_range = timestep >= 0 && timestep < p.steps;
  assert(in_range && "dxmi_ext: timestep must be in 0..T-1");
  const bool valid = in_range && (timestep >= p.steps - p.skip_last ||
                                  p.velocity_var.as<const R>()[timestep] > R(0));
  assert(valid && "dxmi_ext: velocity_var must be positive");
  return valid;
}

template <class R>
__device__ CostWeights<R> weights_of(const CostProblem& p) {
  return {static_cast<R>(p.tau_entropy), static_cast<R>(p.tau_velocity), p.steps - p.skip_last};
}

template <class R>
__device__ R cost_of_row(const CostProblem& p, int64_t n) {
  const int64_t t = p.timestep[n];
  if (!valid<R>(p, t)) return static_cast<R>(NAN);
  return running_cost(weights_of<R>(p), t, p.sq_displacement.as<const R>()[n],
                      p.log_std.as<const R>()[t], p.velocity_var.as<const R>()[t]);
}

__device__ inline int64_t thread_of_grid() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}

template <class R>
DXMI_KERNEL running_cost_kernel(CostProblem p, AnyVector cost) {
  const int64_t n = thread_of_grid();
  if (n < p.rows) cost.as<R>()[n] = cost_of_row<R>(p, n);
}

template <class R>
DXMI_KERNEL td_target_kernel(CostProblem p, AnyVector next_value, AnyVector time_cost,
                             AnyVector target) {
  const int64_t n = thread_of_grid();
  if (n >= p.rows) return;
  const R cost = cost_of_row<R>(p, n);  // NaN where the timestep is no index
  const R time = cost == cost ? time_cost.as<const R>()[p.timestep[n]] : cost;
  target.as<R>()[n] = next_value.as<const R>()[n] + cost + time;
}

template <class R>
__device__ void cost_grad_of_row(const CostProblem& p, const AnyVector& grad, int64_t n, R& grad_sq,
                                 R& grad_log_std) {
  const int64_t t = p.timestep[n];
  if (valid<R>(p, t))
    running_cost_grad(weights_of<R>(p), t, p.velocity_var.as<const R>()[t], grad.as<const R>()[n],
                      grad_sq, grad_log_std);
  else
    grad_sq = grad_log_std = static_cast<R>(NAN);
}

template <class R>
DXMI_KERNEL running_cost_grad_kernel(CostProblem p, CostGradients g) {
  const int64_t n = thread_of_grid();
  if (n >= p.rows) return;
  R ignored;
  cost_grad_of_row(p, g.grad, n, g.grad_sq_displacement.as<R>()[n], ignored);
}

// table[t] = sum of value(row) over the rows at timestep t: one block a timestep, in a fixed order. A row at no
// timestep of the table makes all of it NaN: its results are NaN, and so is the gradient of anything they enter.
template <class R, class Value>
__device__ void sum_into_table(const AnyVector& table, int64_t steps, int64_t rows,
                               const Vector<const int64_t>& timestep, const Value& value) {
  const int64_t t = blockIdx.x;
  R sum = 0;
  for (int64_t n = threadIdx.x; n < rows; n += blockDim.x) {
    const int64_t at = timestep[n];
    if (at == t)
      sum += value(n);
    else if (at < 0 || at >= steps)
      sum = static_cast<R>(NAN);
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) table.as<R>()[t] = sum;
}

template <class R>
DXMI_KERNEL running_cost_table_kernel(CostProblem p, CostGradients g) {
  sum_into_table<R>(g.grad_log_std, p.steps, p.rows, p.timestep, [&](int64_t n) {
    R ignored, grad_log_std;
    cost_grad_of_row(p, g.grad, n, ignored, grad_log_std);
    return grad_log_std;
  });
}

template <class R>
__device__ R sum_of_splits(const R* partial, int64_t row, int64_t splits) {
  R sum = 0;
  for (int64_t s = 0; s < splits; ++s) sum += partial[row * splits + s];
  return sum;
}

template <class R>
DXMI_KERNEL step_table_kernel(StepProblem p, StepGradients g, const R* grad_std, int64_t splits) {
  sum_into_table<R>(g.grad_log_std, p.steps, p.rows, p.timestep, [&](int64_t n) {
    const R std = dxmi::exp(p.log_std.as<const R>()[p.timestep[n]]);
    const R grad_log_prob = g.grad_log_prob.data ? g.grad_log_prob.as<const R>()[n] : R(0);
    return step_grad_log_std_row(std, sum_of_splits(grad_std, n, splits), grad_log_prob);
  });
}

template <class R>
DXMI_KERNEL log_prob_table_kernel(LogProbProblem p, LogProbGradients g, const R* noise_sq,
                                  int64_t splits) {
  sum_into_table<R>(g.grad_log_std, p.steps, p.rows, p.timestep, [&](int64_t n) {
    return log_prob_grad_log_std_row(sum_of_splits(noise_sq, n, splits), static_cast<R>(p.dim),
                                     g.grad_log_prob.as<const R>()[n]);
  });
}

// One block: energies are a batch's.
template <class R>
DXMI_KERNEL energy_loss_kernel(EnergyProblem p, AnyVector loss) {
  const R gamma = static_cast<R>(p.gamma);
  R data = 0, sample = 0;
  for (int64_t n = threadIdx.x; n < p.data_rows; n += blockDim.x)
    data += energy_term(p.energy_data.as<const R>()[n], R(1), gamma);
  for (int64_t n = threadIdx.x; n < p.sample_rows; n += blockDim.x)
    sample += energy_term(p.energy_sample.as<const R>()[n], R(-1), gamma);
  data = block_sum(data);
  sample = block_sum(sample);
  if (threadIdx.x == 0)
    *loss.as<R>().data =
        data / static_cast<R>(p.data_rows) + sample / static_cast<R>(p.sample_rows);
}

template <class R>
DXMI_KERNEL energy_loss_grad_kernel(EnergyProblem p, AnyVector grad, AnyVector grad_data,
                                    AnyVector grad_sample) {
  const int64_t n = thread_of_grid();
  const R scale = *grad.as<const R>().data, gamma = static_cast<R>(p.gamma);
  if (n < p.data_rows)
    grad_data.as<R>()[n] = scale / static_cast<R>(p.data_rows) *
                           energy_term_grad(p.energy_data.as<const R>()[n], R(1), gamma);
  if (n < p.sample_rows)
    grad_sample.as<R>()[n] = scale / static_cast<R>(p.sample_rows) *
                             energy_term_grad(p.energy_sample.as<const R>()[n], R(-1), gamma);
}

// One block a timestep.
template <class R>
DXMI_KERNEL update_velocity_var_kernel(VelocityProblem p) {
  const int64_t t = blockIdx.x;
  const R* const sq = static_cast<const R*>(p.sq_displacement) + t * p.step_stride;
  R sum = 0;
  for (int64_t n = threadIdx.x; n < p.rows; n += blockDim.x) sum += sq[n * p.row_stride];
  sum = block_sum(sum);
  if (threadIdx.x == 0) {
    R& velocity_var = p.velocity_var.as<R>()[t];
    velocity_var =
        update_velocity_var(velocity_var, sum / static_cast<R>(p.rows), static_cast<R>(p.decay));
  }
}

}  // namespace dxmi::cuda
