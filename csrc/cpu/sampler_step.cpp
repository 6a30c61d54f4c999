// sampler_step on the CPU.
#include "../ops/sampler_step.h"

#include "noise.h"
#include "row_transitions.h"
#include "sums.h"

namespace dxmi::loops {

using namespace cpu;

void sampler_step_fwd(Device&, const SamplerStepInputs& a, const SamplerStepResults& r) {
  with_sample_type(a.dtype, [&](auto tag) {
    using T = decltype(tag);
    using R = ComputeType<T>;
    const RowTransitions<R> transitions(a);
    RowSums<2> sums(a.rows, a.dim);
    for_tiles(a.rows, a.dim, [&] {
      return [&, noise = Noise(a.key, a.sample_offset, a.timestep, a.rows),
              sample = Input<T>(a.sample), output = Input<T>(a.model_output),
              next = Output<T>(r.next_sample)](const Tile& tile) mutable {
        const float* const z = noise.at<T>(tile, sample, output, next);
        const T* const x = sample.at(tile);
        const T* const o = output.at(tile);
        T* const y = next.at(tile);
        LaneTransitions<R> lanes;
        transitions.read(tile, lanes);
        LaneSums<R> calls[kPack][2];
        for_calls(tile, [&](int64_t call, int64_t i, int64_t n) {
          kernels().of<T>().sampler_step_fwd(n, lanes, x + i, o + i, z + i, y + i, calls[call]);
        });
        next.done(tile);
        sums.put(tile, calls);
      };
    });
    const Vector<R> log_prob = r.log_prob.as<R>();
    const Vector<R> sq_displacement = r.sq_displacement.as<R>();
    const double dim = static_cast<double>(a.dim);
    for (int64_t row = 0; row < a.rows; ++row) {
      const double log_std = transitions.log_std(row);
      log_prob[row] = static_cast<R>(log_prob_row(sums.total(row, 0), dim, log_std));
      sq_displacement[row] = static_cast<R>(sums.total(row, 1) / dim);
    }
  });
}

void sampler_step_bwd(Device&, const SamplerStepInputs& a, const SamplerStepGradients& g) {
  with_sample_type(a.dtype, [&](auto tag) {
    using T = decltype(tag);
    using R = ComputeType<T>;
    const RowTransitions<R> transitions(a);
    const Vector<const R> grad_log_prob = g.grad_log_prob.as<const R>();
    const Vector<const R> grad_sq = g.grad_sq_displacement.as<const R>();
    const bool needs_noise = g.grad_log_std.data || grad_sq.data;
    const double dim = static_cast<double>(a.dim);
    RowSums<1> grad_std(a.rows, a.dim);
    for_tiles(a.rows, a.dim, [&] {
      return [&, noise = Noise(a.key, a.sample_offset, a.timestep, a.rows),
              sample = Input<T>(a.sample), output = Input<T>(a.model_output),
              grad_next = Input<T>(g.grad_next_sample), grad_sample = Output<T>(g.grad_sample),
              grad_output = Output<T>(g.grad_model_output)](const Tile& tile) mutable {
        const float* const z =
            needs_noise ? noise.at<T>(tile, sample, output, grad_next, grad_sample, grad_output)
                        : noise.zeros();
        const T* const x = sample.at(tile);
        const T* const o = output.at(tile);
        const T* const gy = grad_next.at(tile);
        T* const gx = grad_sample.at(tile);
        T* const go = grad_output.at(tile);
        LaneTransitions<R> lanes;
        transitions.read(tile, lanes);
        set_lanes(tile, lanes.grad_displacement_sq, [&](int64_t row) {
          return grad_sq.data ? static_cast<R>(2.0 * grad_sq[row] / dim) : R(0);
        });
        LaneSums<R> calls[kPack][1];
        for_calls(tile, [&](int64_t call, int64_t i, int64_t n) {
          kernels().of<T>().sampler_step_bwd(n, lanes, x + i, o + i, z + i, gy + i, gx + i, go + i,
                                             calls[call]);
        });
        grad_sample.done(tile);
        grad_output.done(tile);
        grad_std.put(tile, calls);
      };
    });
    if (g.grad_log_std.data)
      sum_into_table<R>(g.grad_log_std, a.steps, a.rows, a.timestep, [&](int64_t row) {
        const double std = transitions.std(row);
        const double through_log_prob = grad_log_prob.data ? grad_log_prob[row] : R(0);
        return step_grad_log_std_row(std, grad_std.total(row), through_log_prob);
      });
  });
}

}  // namespace dxmi::loops
