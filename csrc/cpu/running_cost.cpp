// running_cost on the CPU.
#include "../ops/running_cost.h"

#include "../core/costs.h"
#include "for_rows.h"
#include "sums.h"

namespace dxmi::loops {

using namespace cpu;

namespace {

template <class R>
CostWeights<R> weights_of(const RunningCostInputs& a) {
  return {R(a.tau_entropy), R(a.tau_velocity), a.steps - a.skip_last};
}

}  // namespace

void running_cost_fwd(Device&, const RunningCostInputs& a, AnyVector sq_displacement,
                      AnyVector cost) {
  with_vector_type(a.is_float64, [&](auto tag) {
    using R = decltype(tag);
    const CostWeights<R> weights = weights_of<R>(a);
    const Vector<const R> sq = sq_displacement.as<const R>(), log_std = a.log_std.as<const R>();
    const Vector<const R> velocity_var = a.velocity_var.as<const R>();
    const Vector<R> out = cost.as<R>();
    for_rows(a.rows, [&](int64_t n) {
      const int64_t t = a.timestep[n];
      out[n] = running_cost(weights, t, sq[n], log_std[t], velocity_var[t]);
    });
  });
}

void running_cost_bwd(Device&, const RunningCostInputs& a, const RunningCostGradients& g) {
  with_vector_type(a.is_float64, [&](auto tag) {
    using R = decltype(tag);
    const CostWeights<R> weights = weights_of<R>(a);
    const Vector<const R> velocity_var = a.velocity_var.as<const R>(), grad = g.grad.as<const R>();
    const auto gradients = [&](int64_t n, R& grad_sq, R& grad_log_std) {
      const int64_t t = a.timestep[n];
      running_cost_grad(weights, t, velocity_var[t], grad[n], grad_sq, grad_log_std);
    };
    R ignored;
    if (g.grad_sq_displacement.data) {
      const Vector<R> out = g.grad_sq_displacement.as<R>();
      for (int64_t n = 0; n < a.rows; ++n) gradients(n, out[n], ignored);
    }
    if (g.grad_log_std.data)
      sum_into_table<R>(g.grad_log_std, a.steps, a.rows, a.timestep, [&](int64_t n) {
        R grad_log_std;
        gradients(n, ignored, grad_log_std);
        return static_cast<double>(grad_log_std);
      });
  });
}

}  // namespace dxmi::loops
