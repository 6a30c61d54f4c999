// Launches of the CUDA half: how rows are laid over threads, and which kernel runs.
#include "backend.h"

#include <algorithm>
#include <initializer_list>

#include "rows.h"
#include "samples.h"

namespace dxmi {
namespace {

using namespace cuda;

constexpr int kThreads = 256;         // of a block of short rows or row results
constexpr int64_t kUnitsOfTeam = 8;   // of each thread of a team, at most
constexpr int64_t kUnitsOfBlock = 4;  // of each thread of a block, before its row is split

int64_t blocks_for(int64_t count, int64_t per_block) { return (count + per_block - 1) / per_block; }

template <class T>
bool aligned(const View& view) {
  return view.data == nullptr || (view.dense && reinterpret_cast<uintptr_t>(view.data) % 16 == 0 &&
                                  view.row_stride * static_cast<int64_t>(sizeof(T)) % 16 == 0);
}

// The layout of rows over threads, and the grid that goes with it.
struct Grid {
  Plan plan;
  int64_t blocks;
  int threads;
  bool vector;  // chooses the kernel
};

template <class T>
Grid grid_for(int64_t rows, int64_t dim, std::initializer_list<const View*> views) {
  Plan plan{};
  plan.rows = rows;
  plan.dim = dim;
  plan.units = blocks_for(dim, kUnit<T>);
  plan.splits = 1;
  const bool vector =
      dim % kUnit<T> == 0 &&
      std::all_of(views.begin(), views.end(), [](const View* v) { return aligned<T>(*v); });
  if (plan.units <= kWarp * kUnitsOfTeam) {
    plan.team = 1;
    while (plan.team < kWarp && plan.team < plan.units) plan.team *= 2;
    return {plan, blocks_for(rows * plan.team, kThreads), kThreads, vector};
  }
  const int threads =
      static_cast<int>(std::min<int64_t>(kMaxThreads, blocks_for(plan.units, kWarp) * kWarp));
  plan.units_per_split = threads * kUnitsOfBlock;
  plan.splits = blocks_for(plan.units, plan.units_per_split);
  return {plan, rows * plan.splits, threads, vector};
}

}  // namespace

void CudaBackend::normal(const NormalProblem& p) {
  if (p.dim == 0) return;
  with_dtype(p.dtype, [&](auto tag) {
    using T = decltype(tag);
    const Grid grid = grid_for<T>(p.rows, p.dim, {&p.out});
    launch("normal", grid.vector ? normal_kernel<T, true> : normal_kernel<T, false>, grid.blocks,
           grid.threads, stream_, p, grid.plan);
  });
}

void CudaBackend::sampler_step(const StepProblem& p, const StepResult& result) {
  with_dtype(p.dtype, [&](auto tag) {
    using T = decltype(tag);
    using R = WideT<T>;
    const Grid grid = grid_for<T>(p.rows, p.dim, {&p.sample, &p.output, &result.next});
    R* partial = nullptr;
    unsigned* arrived = nullptr;
    if (grid.plan.splits > 1) split_workspace(p.rows, 2 * grid.plan.splits, partial, arrived);
    launch("sampler_step", grid.vector ? step_kernel<T, true> : step_kernel<T, false>, grid.blocks,
           grid.threads, stream_, p, result, grid.plan, partial, arrived);
  });
}

void CudaBackend::sampler_step_grad(const StepProblem& p, const StepGradients& g) {
  const char* const op = "sampler_step_bwd";
  with_dtype(p.dtype, [&](auto tag) {
    using T = decltype(tag);
    using R = WideT<T>;
    const Grid grid = grid_for<T>(
        p.rows, p.dim, {&p.sample, &p.output, &g.grad_next, &g.grad_sample, &g.grad_output});
    const int64_t splits = grid.plan.splits;
    R* const grad_std =
        g.grad_log_std.data ? static_cast<R*>(workspace(p.rows * splits * sizeof(R))) : nullptr;
    launch(op, grid.vector ? step_grad_kernel<T, true> : step_grad_kernel<T, false>, grid.blocks,
           grid.threads, stream_, p, g, grid.plan, grad_std);
    if (g.grad_log_std.data)
      launch(op, step_table_kernel<R>, p.steps, kMaxThreads, stream_, p, g, grad_std, splits);
  });
}

void CudaBackend::transition_log_prob(const LogProbProblem& p, AnyVector log_prob) {
  with_dtype(p.dtype, [&](auto tag) {
    using T = decltype(tag);
    using R = WideT<T>;
    const Grid grid = grid_for<T>(p.rows, p.dim, {&p.next, &p.sample, &p.output});
    R* partial = nullptr;
    unsigned* arrived = nullptr;
    if (grid.plan.splits > 1) split_workspace(p.rows, grid.plan.splits, partial, arrived);
    launch("transition_log_prob",
           grid.vector ? log_prob_kernel<T, true> : log_prob_kernel<T, false>, grid.blocks,
           grid.threads, stream_, p, log_prob, grid.plan, partial, arrived);
  });
}

void CudaBackend::transition_log_prob_grad(const LogProbProblem& p, const LogProbGradients& g) {
  const char* const op = "transition_log_prob_bwd";
  with_dtype(p.dtype, [&](auto tag) {
    using T = decltype(tag);
    using R = WideT<T>;
    const Grid grid =
        grid_for<T>(p.rows, p.dim,
                    {&p.next, &p.sample, &p.output, &g.grad_next, &g.grad_sample, &g.grad_output});
    const int64_t splits = grid.plan.splits;
    R* const noise_sq =
        g.grad_log_std.data ? static_cast<R*>(workspace(p.rows * splits * sizeof(R))) : nullptr;
    launch(op, grid.vector ? log_prob_grad_kernel<T, true> : log_prob_grad_kernel<T, false>,
           grid.blocks, grid.threads, stream_, p, g, grid.plan, noise_sq);
    if (g.grad_log_std.data)
      launch(op, log_prob_table_kernel<R>, p.steps, kMaxThreads, stream_, p, g, noise_sq, splits);
  });
}

void CudaBackend::running_cost(const CostProblem& p, AnyVector cost) {
  with_rows(p.wide, [&](auto tag) {
    using R = decltype(tag);
    launch("running_cost", running_cost_kernel<R>, blocks_for(p.rows, kThreads), kThreads, stream_,
           p, cost);
  });
}

void CudaBackend::running_cost_grad(const CostProblem& p, const CostGradients& g) {
  const char* const op = "running_cost_bwd";
  with_rows(p.wide, [&](auto tag) {
    using R = decltype(tag);
    if (g.grad_sq_displacement.data)
      launch(op, running_cost_grad_kernel<R>, blocks_for(p.rows, kThreads), kThreads, stream_, p,
             g);
    if (g.grad_log_std.data)
      launch(op, running_cost_table_kernel<R>, p.steps, kMaxThreads, stream_, p, g);
  });
}

void CudaBackend::td_target(const CostProblem& p, AnyVector next_value, AnyVector time_cost,
                            AnyVector target) {
  with_rows(p.wide, [&](auto tag) {
    using R = decltype(tag);
    launch("td_target", td_target_kernel<R>, blocks_for(p.rows, kThreads), kThreads, stream_, p,
           next_value, time_cost, target);
  });
}

void CudaBackend::energy_loss(const EnergyProblem& p, AnyVector loss) {
  with_rows(p.wide, [&](auto tag) {
    using R = decltype(tag);
    launch("energy_loss", energy_loss_kernel<R>, 1, kMaxThreads, stream_, p, loss);
  });
}

void CudaBackend::energy_loss_grad(const EnergyProblem& p, AnyVector grad, AnyVector grad_data,
                                   AnyVector grad_sample) {
  with_rows(p.wide, [&](auto tag) {
    using R = decltype(tag);
    const int64_t blocks = blocks_for(std::max(p.data_rows, p.sample_rows), kThreads);
    launch("energy_loss_bwd", energy_loss_grad_kernel<R>, blocks, kThreads, stream_, p, grad,
           grad_data, grad_sample);
  });
}

void CudaBackend::update_velocity_var(const VelocityProblem& p) {
  with_rows(p.wide, [&](auto tag) {
    using R = decltype(tag);
    launch("update_velocity_var_", update_velocity_var_kernel<R>, p.steps, kMaxThreads, stream_, p);
  });
}

template <class R>
void CudaBackend::split_workspace(int64_t rows, int64_t partials, R*& partial, unsigned*& arrived) {
  if (rows == 0) return;  // nothing is launched, and there is no memory to fill
  partial = static_cast<R*>(workspace(rows * partials * sizeof(R)));
  arrived = static_cast<unsigned*>(workspace(rows * sizeof(unsigned)));
  check(cudaMemsetAsync(arrived, 0, rows * sizeof(unsigned), static_cast<cudaStream_t>(stream_)),
        "workspace");
}

}  // namespace dxmi
