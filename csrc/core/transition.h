// The sampler's Gaussian transition x' = a x + b out + s z, its log-probability and displacement, and
// their gradients, element by element. Torch-free, host and device.
//
// The caller sums over the D elements of a row, and so fixes the order; the *_row functions turn the
// sums into the row's results.
#pragma once

#include "normal.h"

namespace dxmi {

// The row's coefficients at its timestep. R is the type of the tables: float or double.
template <class R>
struct Transition {
  R sample_coef;
  R output_coef;
  R std;
};

// std is computed in the table's precision; -inf means std = 0, a deterministic step.
template <class R>
DXMI_CORE Transition<R> transition_at(R sample_coef, R output_coef, R log_std) {
  return {sample_coef, output_coef, exp(log_std)};
}

template <class L, class R>
DXMI_CORE typename L::F transition_mean(const Transition<R>& p, typename L::F sample,
                                        typename L::F output) {
  return L::fma(L::of(p.sample_coef), sample, p.output_coef * output);
}

// One element of the step; `noise_sq` and `displacement_sq` accumulate z^2 and (x' - x)^2.
template <class L, class R>
DXMI_CORE typename L::F step(const Transition<R>& p, typename L::F sample, typename L::F output,
                             typename L::F z, typename L::F& noise_sq,
                             typename L::F& displacement_sq) {
  using F = typename L::F;
  const F next = L::fma(L::of(p.std), z, transition_mean<L>(p, sample, output));
  const F displacement = next - sample;
  noise_sq = L::fma(z, z, noise_sq);
  displacement_sq = L::fma(displacement, displacement, displacement_sq);
  return next;
}

// One element of the step's gradient (z is constant). `grad_displacement_sq` is the gradient of the row's
// mean squared displacement times 2/D; `grad_std` accumulates the gradient of std.
template <class L, class R>
DXMI_CORE void step_grad(const Transition<R>& p, typename L::F sample, typename L::F output,
                         typename L::F z, typename L::F grad_next, R grad_displacement_sq,
                         typename L::F& grad_sample, typename L::F& grad_output,
                         typename L::F& grad_std) {
  using F = typename L::F;
  const F next = L::fma(L::of(p.std), z, transition_mean<L>(p, sample, output));
  const F grad_displacement = grad_displacement_sq * (next - sample);
  const F grad = grad_next + grad_displacement;
  grad_sample = L::fma(L::of(p.sample_coef), grad, -grad_displacement);
  grad_output = p.output_coef * grad;
  grad_std = L::fma(grad, z, grad_std);
}

// The z that would have led from `sample` to `next`. inverse_std is 1 / p.std.
template <class L, class R>
DXMI_CORE typename L::F standardized(const Transition<R>& p, R inverse_std, typename L::F next,
                                     typename L::F sample, typename L::F output) {
  return (next - transition_mean<L>(p, sample, output)) * inverse_std;
}

// One element of the gradient of a given transition's log-probability. `scale` is the row's gradient
// over (D std).
template <class L, class R>
DXMI_CORE void log_prob_grad(const Transition<R>& p, typename L::F z, R scale,
                             typename L::F& grad_next, typename L::F& grad_sample,
                             typename L::F& grad_output) {
  const typename L::F pull = scale * z;
  grad_next = -pull;
  grad_sample = p.sample_coef * pull;
  grad_output = p.output_coef * pull;
}

// Mean over D of the log-density, from the row's sum of z^2.
template <class R>
DXMI_CORE R log_prob_row(R noise_sq_sum, R dim, R log_std) {
  const R half_log_two_pi = R(0.91893853320467274178);
  return R(-0.5) * (noise_sq_sum / dim) - log_std - half_log_two_pi;
}

// d/d log_std of the step's three outputs: std dx'/dstd through the samples, -1 through log_prob.
template <class R>
DXMI_CORE R step_grad_log_std_row(R std, R grad_std_sum, R grad_log_prob) {
  // A deterministic row has gradient 0, not 0 times infinity.
  return (std == R(0) ? R(0) : std * grad_std_sum) - grad_log_prob;
}

// d/d log_std of a given transition's log-probability.
template <class R>
DXMI_CORE R log_prob_grad_log_std_row(R noise_sq_sum, R dim, R grad_log_prob) {
  return grad_log_prob * (noise_sq_sum / dim - R(1));
}

}  // namespace dxmi
