// running_cost on CUDA.
#include "running_cost.h"

#include "table_sums.h"

namespace dxmi {
namespace cuda {

template <class R>
DXMI_KERNEL running_cost_fwd_kernel(RunningCostInputs a, AnyVector sq_displacement,
                                    AnyVector cost) {
  const int64_t n = thread_of_grid();
  if (n < a.rows) cost.as<R>()[n] = cost_of_row<R>(a, sq_displacement, n);
}

template <class R>
__device__ void cost_grad_of_row(const RunningCostInputs& a, const AnyVector& grad, int64_t n,
                                 R& grad_sq, R& grad_log_std) {
  const int64_t t = a.timestep[n];
  if (valid<R>(a, t))
    running_cost_grad(weights_of<R>(a), t, a.velocity_var.as<const R>()[t], grad.as<const R>()[n],
                      grad_sq, grad_log_std);
  else
    grad_sq = grad_log_std = static_cast<R>(NAN);
}

template <class R>
DXMI_KERNEL running_cost_bwd_kernel(RunningCostInputs a, RunningCostGradients g) {
  const int64_t n = thread_of_grid();
  if (n >= a.rows) return;
  R ignored;
  cost_grad_of_row(a, g.grad, n, g.grad_sq_displacement.as<R>()[n], ignored);
}

template <class R>
DXMI_KERNEL running_cost_log_std_kernel(RunningCostInputs a, RunningCostGradients g,
                                        RowLayout layout, SplitMemory<1, R> memory) {
  const auto value = [&](int64_t n) {
    R ignored, grad_log_std;
    cost_grad_of_row(a, g.grad, n, ignored, grad_log_std);
    return grad_log_std;
  };
  sum_into_table<R>(g.grad_log_std, layout, a.timestep, value, memory);
}

}  // namespace cuda

namespace loops {

using namespace cuda;

void running_cost_fwd(Device& device, const RunningCostInputs& a, AnyVector sq_displacement,
                      AnyVector cost) {
  with_vector_type(a.is_float64, [&](auto tag) {
    using R = decltype(tag);
    launch("running_cost", device, running_cost_fwd_kernel<R>, blocks_for(a.rows, kThreads),
           kThreads, a, sq_displacement, cost);
  });
}

void running_cost_bwd(Device& device, const RunningCostInputs& a, const RunningCostGradients& g) {
  const char* const op = "running_cost_bwd";
  with_vector_type(a.is_float64, [&](auto tag) {
    using R = decltype(tag);
    if (g.grad_sq_displacement.data)
      launch(op, device, running_cost_bwd_kernel<R>, blocks_for(a.rows, kThreads), kThreads, a, g);
    if (!g.grad_log_std.data) return;
    const RowGrid table = sums_grid(a.steps, a.rows);
    launch(op, device, running_cost_log_std_kernel<R>, table.blocks, table.threads, a, g,
           table.layout, split_memory<1, R>(op, device, table.layout));
  });
}

}  // namespace loops
}  // namespace dxmi
