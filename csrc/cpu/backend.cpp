// The ops of the CPU half: which kernel runs over the pieces, and what becomes of their sums. Pieces and the
// order of sums do not depend on the number of threads, so neither do results.
#include "backend.h"

#include "../core/costs.h"
#include "pieces.h"

namespace dxmi {
namespace {

using namespace cpu;
using torch::stable::parallel_for;

constexpr int64_t kRowsPerThread = 16384;

NoiseKey read_key(const Vector<const int64_t>& key) { return noise_key(key[0], key[1]); }

}  // namespace

void CpuBackend::normal(const NormalProblem& p) {
  const NoiseKey key = read_key(p.key);
  with_dtype(p.dtype, [&](auto tag) {
    using T = decltype(tag);
    if (p.dim == 0) return;
    for_pieces(p.rows, p.dim, [&] {
      return [noise = Noise(key, p.sample_offset, {&p.timestep, 0}, p.rows),
              out = Output<T>(p.out)](const Piece& piece) mutable {
        const float* z = noise.at<T>(piece, out);
        kernels().of<T>().store(piece.lanes * piece.n, z, out.at(piece));
        out.done(piece);
      };
    });
  });
}

void CpuBackend::sampler_step(const StepProblem& p, const StepResult& result) {
  const NoiseKey key = read_key(p.key);
  with_dtype(p.dtype, [&](auto tag) {
    using T = decltype(tag);
    using R = WideT<T>;
    const Tables<R> tables(p);
    RowSums<2> sums(p.rows, p.dim);
    for_pieces(p.rows, p.dim, [&] {
      return
          [&, noise = Noise(key, p.sample_offset, p.timestep, p.rows), sample = Input<T>(p.sample),
           output = Input<T>(p.output), next = Output<T>(result.next)](const Piece& piece) mutable {
            const float* const z = noise.at<T>(piece, sample, output, next);
            const T* const x = sample.at(piece);
            const T* const o = output.at(piece);
            T* const y = next.at(piece);
            Rows<R> rows;
            tables.read(piece, rows);
            LaneSums<R> part_sums[kPack][2];
            for_parts(piece, [&](int64_t part, int64_t i, int64_t n) {
              kernels().of<T>().step(n, rows, x + i, o + i, z + i, y + i, part_sums[part]);
            });
            next.done(piece);
            sums.put(piece, part_sums);
          };
    });
    const Vector<R> log_prob = result.log_prob.as<R>();
    const Vector<R> sq_displacement = result.sq_displacement.as<R>();
    const double dim = static_cast<double>(p.dim);
    for (int64_t row = 0; row < p.rows; ++row) {
      const double log_std = tables.log_std(row);
      log_prob[row] = static_cast<R>(log_prob_row(sums.total(row, 0), dim, log_std));
      sq_displacement[row] = static_cast<R>(sums.total(row, 1) / dim);
    }
  });
}

void CpuBackend::sampler_step_grad(const StepProblem& p, const StepGradients& g) {
  const NoiseKey key = read_key(p.key);
  with_dtype(p.dtype, [&](auto tag) {
    using T = decltype(tag);
    using R = WideT<T>;
    const Tables<R> tables(p);
    const Vector<const R> grad_log_prob = g.grad_log_prob.as<const R>();
    const Vector<const R> grad_sq = g.grad_sq_displacement.as<const R>();
    const bool needs_noise = g.grad_log_std.data || grad_sq.data;
    const double dim = static_cast<double>(p.dim);
    RowSums<1> grad_std(p.rows, p.dim);
    for_pieces(p.rows, p.dim, [&] {
      return [&, noise = Noise(key, p.sample_offset, p.timestep, p.rows),
              sample = Input<T>(p.sample), output = Input<T>(p.output),
              grad_next = Input<T>(g.grad_next), grad_sample = Output<T>(g.grad_sample),
              grad_output = Output<T>(g.grad_output)](const Piece& piece) mutable {
        const float* const z =
            needs_noise ? noise.at<T>(piece, sample, output, grad_next, grad_sample, grad_output)
                        : noise.zeros();
        const T* const x = sample.at(piece);
        const T* const o = output.at(piece);
        const T* const gy = grad_next.at(piece);
        T* const gx = grad_sample.at(piece);
        T* const go = grad_output.at(piece);
        Rows<R> rows;
        tables.read(piece, rows);
        set_lanes(piece, rows.grad, [&](int64_t row) {
          return grad_sq.data ? static_cast<R>(2.0 * grad_sq[row] / dim) : R(0);
        });
        LaneSums<R> part_sums[kPack][1];
        for_parts(piece, [&](int64_t part, int64_t i, int64_t n) {
          kernels().of<T>().step_grad(n, rows, x + i, o + i, z + i, gy + i, gx + i, go + i,
                                      part_sums[part]);
        });
        grad_sample.done(piece);
        grad_output.done(piece);
        grad_std.put(piece, part_sums);
      };
    });
    if (g.grad_log_std.data)
      scatter_to_table<R>(g.grad_log_std, p.steps, p.rows, p.timestep, [&](int64_t row) {
        const double std = tables.std(row);
        const double log_prob_part = grad_log_prob.data ? grad_log_prob[row] : R(0);
        return step_grad_log_std_row(std, grad_std.total(row, 0), log_prob_part);
      });
  });
}

void CpuBackend::transition_log_prob(const LogProbProblem& p, AnyVector log_prob) {
  with_dtype(p.dtype, [&](auto tag) {
    using T = decltype(tag);
    using R = WideT<T>;
    const Tables<R> tables(p);
    RowSums<1> sums(p.rows, p.dim);
    for_pieces(p.rows, p.dim, [&] {
      return [&, next = Input<T>(p.next), sample = Input<T>(p.sample),
              output = Input<T>(p.output)](const Piece& piece) mutable {
        const T* const y = next.at(piece);
        const T* const x = sample.at(piece);
        const T* const o = output.at(piece);
        Rows<R> rows;
        tables.read(piece, rows);
        set_lanes(piece, rows.inverse_std, [&](int64_t row) { return tables.inverse_std(row); });
        LaneSums<R> part_sums[kPack][1];
        for_parts(piece, [&](int64_t part, int64_t i, int64_t n) {
          kernels().of<T>().log_prob(n, rows, y + i, x + i, o + i, part_sums[part]);
        });
        sums.put(piece, part_sums);
      };
    });
    const Vector<R> out = log_prob.as<R>();
    for (int64_t row = 0; row < p.rows; ++row) {
      const double log_std = tables.log_std(row);
      out[row] =
          static_cast<R>(log_prob_row(sums.total(row, 0), static_cast<double>(p.dim), log_std));
    }
  });
}

void CpuBackend::transition_log_prob_grad(const LogProbProblem& p, const LogProbGradients& g) {
  with_dtype(p.dtype, [&](auto tag) {
    using T = decltype(tag);
    using R = WideT<T>;
    const Tables<R> tables(p);
    const double dim = static_cast<double>(p.dim);
    const Vector<const R> grad = g.grad_log_prob.as<const R>();
    RowSums<1> sums(p.rows, p.dim);
    for_pieces(p.rows, p.dim, [&] {
      return [&, next = Input<T>(p.next), sample = Input<T>(p.sample), output = Input<T>(p.output),
              grad_next = Output<T>(g.grad_next), grad_sample = Output<T>(g.grad_sample),
              grad_output = Output<T>(g.grad_output)](const Piece& piece) mutable {
        const T* const y = next.at(piece);
        const T* const x = sample.at(piece);
        const T* const o = output.at(piece);
        T* const gy = grad_next.at(piece);
        T* const gx = grad_sample.at(piece);
        T* const go = grad_output.at(piece);
        Rows<R> rows;
        tables.read(piece, rows);
        set_lanes(piece, rows.inverse_std, [&](int64_t row) { return tables.inverse_std(row); });
        set_lanes(piece, rows.grad, [&](int64_t row) {
          return static_cast<R>(static_cast<double>(grad[row]) * tables.inverse_std(row) / dim);
        });
        LaneSums<R> part_sums[kPack][1];
        for_parts(piece, [&](int64_t part, int64_t i, int64_t n) {
          kernels().of<T>().log_prob_grad(n, rows, y + i, x + i, o + i, gy + i, gx + i, go + i,
                                          part_sums[part]);
        });
        grad_next.done(piece);
        grad_sample.done(piece);
        grad_output.done(piece);
        sums.put(piece, part_sums);
      };
    });
    if (g.grad_log_std.data)
      scatter_to_table<R>(g.grad_log_std, p.steps, p.rows, p.timestep, [&](int64_t row) {
        return log_prob_grad_log_std_row(sums.total(row, 0), dim, static_cast<double>(grad[row]));
      });
  });
}

void CpuBackend::running_cost(const CostProblem& p, AnyVector cost) {
  with_rows(p.wide, [&](auto tag) {
    using R = decltype(tag);
    const CostWeights<R> weights{R(p.tau_entropy), R(p.tau_velocity), p.steps - p.skip_last};
    const Vector<const R> sq = p.sq_displacement.as<const R>(), log_std = p.log_std.as<const R>();
    const Vector<const R> velocity_var = p.velocity_var.as<const R>();
    const Vector<R> out = cost.as<R>();
    parallel_for(0, p.rows, kRowsPerThread, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        const int64_t t = p.timestep[n];
        out[n] = dxmi::running_cost(weights, t, sq[n], log_std[t], velocity_var[t]);
      }
    });
  });
}

void CpuBackend::running_cost_grad(const CostProblem& p, const CostGradients& g) {
  with_rows(p.wide, [&](auto tag) {
    using R = decltype(tag);
    const CostWeights<R> weights{R(p.tau_entropy), R(p.tau_velocity), p.steps - p.skip_last};
    const Vector<const R> velocity_var = p.velocity_var.as<const R>(), grad = g.grad.as<const R>();
    const auto gradients = [&](int64_t n, R& grad_sq, R& grad_log_std) {
      const int64_t t = p.timestep[n];
      dxmi::running_cost_grad(weights, t, velocity_var[t], grad[n], grad_sq, grad_log_std);
    };
    R ignored;
    if (g.grad_sq_displacement.data) {
      const Vector<R> out = g.grad_sq_displacement.as<R>();
      for (int64_t n = 0; n < p.rows; ++n) gradients(n, out[n], ignored);
    }
    if (g.grad_log_std.data)
      scatter_to_table<R>(g.grad_log_std, p.steps, p.rows, p.timestep, [&](int64_t n) {
        R grad_log_std;
        gradients(n, ignored, grad_log_std);
        return static_cast<double>(grad_log_std);
      });
  });
}

void CpuBackend::td_target(const CostProblem& p, AnyVector next_value, AnyVector time_cost,
                           AnyVector target) {
  with_rows(p.wide, [&](auto tag) {
    using R = decltype(tag);
    running_cost(p, target);
    const Vector<const R> value = next_value.as<const R>(), time = time_cost.as<const R>();
    const Vector<R> out = target.as<R>();
    parallel_for(0, p.rows, kRowsPerThread, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) out[n] = value[n] + out[n] + time[p.timestep[n]];
    });
  });
}

void CpuBackend::energy_loss(const EnergyProblem& p, AnyVector loss) {
  with_rows(p.wide, [&](auto tag) {
    using R = decltype(tag);
    const auto mean = [&](AnyVector energies, int64_t count, double sign) {
      const Vector<const R> e = energies.as<const R>();
      double sum = 0;
      for (int64_t n = 0; n < count; ++n)
        sum += energy_term(static_cast<double>(e[n]), sign, p.gamma);
      return sum / static_cast<double>(count);
    };
    *static_cast<R*>(loss.data) = static_cast<R>(mean(p.energy_data, p.data_rows, 1.0) +
                                                 mean(p.energy_sample, p.sample_rows, -1.0));
  });
}

void CpuBackend::energy_loss_grad(const EnergyProblem& p, AnyVector grad, AnyVector grad_data,
                                  AnyVector grad_sample) {
  with_rows(p.wide, [&](auto tag) {
    using R = decltype(tag);
    const double scale = *static_cast<const R*>(grad.data);
    const auto fill = [&](AnyVector energies, AnyVector gradients, int64_t count, double sign) {
      const Vector<const R> e = energies.as<const R>();
      const Vector<R> out = gradients.as<R>();
      for (int64_t n = 0; n < count; ++n)
        out[n] = static_cast<R>(scale / static_cast<double>(count) *
                                energy_term_grad(static_cast<double>(e[n]), sign, p.gamma));
    };
    fill(p.energy_data, grad_data, p.data_rows, 1.0);
    fill(p.energy_sample, grad_sample, p.sample_rows, -1.0);
  });
}

void CpuBackend::update_velocity_var(const VelocityProblem& p) {
  with_rows(p.wide, [&](auto tag) {
    using R = decltype(tag);
    const R* const sq = static_cast<const R*>(p.sq_displacement);
    const Vector<R> velocity_var = p.velocity_var.as<R>();
    for (int64_t t = 0; t < p.steps; ++t) {
      double sum = 0;
      for (int64_t n = 0; n < p.rows; ++n) sum += sq[t * p.step_stride + n * p.row_stride];
      velocity_var[t] = static_cast<R>(dxmi::update_velocity_var<double>(
          velocity_var[t], sum / static_cast<double>(p.rows), p.decay));
    }
  });
}

}  // namespace dxmi
