// transition_log_prob on the CPU.
#include "../ops/transition_log_prob.h"

#include "row_transitions.h"
#include "sums.h"
#include "variants.h"

namespace dxmi::loops {

using namespace cpu;

void transition_log_prob_fwd(Device&, const TransitionLogProbInputs& a, AnyVector log_prob) {
  with_sample_type(a.dtype, [&](auto tag) {
    using T = decltype(tag);
    using R = ComputeType<T>;
    const RowTransitions<R> transitions(a);
    RowSums<1> noise_sq(a.rows, a.dim);
    for_tiles(a.rows, a.dim, [&] {
      return [&, next = Input<T>(a.next_sample), sample = Input<T>(a.sample),
              output = Input<T>(a.model_output)](const Tile& tile) mutable {
        const T* const y = next.at(tile);
        const T* const x = sample.at(tile);
        const T* const o = output.at(tile);
        LaneTransitions<R> lanes;
        transitions.read(tile, lanes);
        set_lanes(tile, lanes.inverse_std,
                  [&](int64_t row) { return transitions.inverse_std(row); });
        LaneSums<R> calls[kPack][1];
        for_calls(tile, [&](int64_t call, int64_t i, int64_t n) {
          kernels().of<T>().transition_log_prob_fwd(n, lanes, y + i, x + i, o + i, calls[call]);
        });
        noise_sq.put(tile, calls);
      };
    });
    const Vector<R> out = log_prob.as<R>();
    const double dim = static_cast<double>(a.dim);
    for (int64_t row = 0; row < a.rows; ++row) {
      const double log_std = transitions.log_std(row);
      out[row] = static_cast<R>(log_prob_row(noise_sq.total(row), dim, log_std));
    }
  });
}

void transition_log_prob_bwd(Device&, const TransitionLogProbInputs& a,
                             const TransitionLogProbGradients& g) {
  with_sample_type(a.dtype, [&](auto tag) {
    using T = decltype(tag);
    using R = ComputeType<T>;
    const RowTransitions<R> transitions(a);
    const double dim = static_cast<double>(a.dim);
    const Vector<const R> grad = g.grad_log_prob.as<const R>();
    RowSums<1> noise_sq(a.rows, a.dim);
    for_tiles(a.rows, a.dim, [&] {
      return [&, next = Input<T>(a.next_sample), sample = Input<T>(a.sample),
              output = Input<T>(a.model_output), grad_next = Output<T>(g.grad_next_sample),
              grad_sample = Output<T>(g.grad_sample),
              grad_output = Output<T>(g.grad_model_output)](const Tile& tile) mutable {
        const T* const y = next.at(tile);
        const T* const x = sample.at(tile);
        const T* const o = output.at(tile);
        T* const gy = grad_next.at(tile);
        T* const gx = grad_sample.at(tile);
        T* const go = grad_output.at(tile);
        LaneTransitions<R> lanes;
        transitions.read(tile, lanes);
        set_lanes(tile, lanes.inverse_std,
                  [&](int64_t row) { return transitions.inverse_std(row); });
        set_lanes(tile, lanes.grad_scale, [&](int64_t row) {
          return static_cast<R>(static_cast<double>(grad[row]) * transitions.inverse_std(row) /
                                dim);
        });
        LaneSums<R> calls[kPack][1];
        for_calls(tile, [&](int64_t call, int64_t i, int64_t n) {
          kernels().of<T>().transition_log_prob_bwd(n, lanes, y + i, x + i, o + i, gy + i, gx + i,
                                                    go + i, calls[call]);
        });
        grad_next.done(tile);
        grad_sample.done(tile);
        grad_output.done(tile);
        noise_sq.put(tile, calls);
      };
    });
    if (g.grad_log_std.data)
      sum_into_table<R>(g.grad_log_std, a.steps, a.rows, a.timestep, [&](int64_t row) {
        return log_prob_grad_log_std_row(noise_sq.total(row), dim, static_cast<double>(grad[row]));
      });
  });
}

}  // namespace dxmi::loops
