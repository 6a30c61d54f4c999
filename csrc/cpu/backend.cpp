// Rows, segments and threads of the CPU half. A row is cut into segments of fixed length whose sums are
// added in order, so results do not depend on the number of threads.
#include "backend.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "../core/costs.h"

namespace dxmi {
namespace {

using namespace cpu;
using torch::stable::parallel_for;

constexpr int64_t kElementsPerThread = 16384;  // less is not worth waking a thread for
constexpr int64_t kRowsPerThread = 16384;

int64_t groups_of(int64_t elements) { return (elements + 3) / 4; }

NoiseKey read_key(const Vector<const int64_t>& key) { return noise_key(key[0], key[1]); }

// Visits the elements [start, start + n) of a row: f(pointer, stride, count, position) for each run.
template <class T, class F>
void for_runs(const View& view, int64_t row, int64_t start, int64_t n, const F& f) {
  T* const base = static_cast<T*>(view.data) + row * view.row_stride;
  if (view.dims == 0) return f(base, int64_t{1}, n, int64_t{0});
  const int last = view.dims - 1;
  for (int64_t done = 0; done < n;) {
    int64_t rest = start + done;
    const int64_t inner = rest % view.size[last];
    T* p = base + inner * view.stride[last];
    rest /= view.size[last];
    for (int d = last - 1; d >= 0; --d) {
      p += (rest % view.size[d]) * view.stride[d];
      rest /= view.size[d];
    }
    const int64_t count = std::min(n - done, view.size[last] - inner);
    f(p, view.stride[last], count, done);
    done += count;
  }
}

// A segment of an input: in place where it is dense, else gathered into scratch.
template <class T>
struct Input {
  const View& view;
  alignas(64) T scratch[kSegment];

  explicit Input(const View& v) : view(v) {
    if (!v.data) std::fill_n(scratch, kSegment, T{});
  }
  const T* at(int64_t row, int64_t start, int64_t n) {
    if (!view.data) return scratch;
    if (view.dense) return static_cast<const T*>(view.data) + row * view.row_stride + start;
    for_runs<const T>(view, row, start, n,
                      [&](const T* p, int64_t stride, int64_t count, int64_t i) {
                        for (int64_t j = 0; j < count; ++j) scratch[i + j] = p[j * stride];
                      });
    return scratch;
  }
};

// A segment of an output: in place where it is dense, else written to scratch and scattered by done().
template <class T>
struct Output {
  const View& view;
  alignas(64) T scratch[kSegment];

  explicit Output(const View& v) : view(v) {}
  T* at(int64_t row, int64_t start) {
    if (!view.data || !view.dense) return scratch;
    return static_cast<T*>(view.data) + row * view.row_stride + start;
  }
  void done(int64_t row, int64_t start, int64_t n) const {
    if (!view.data || view.dense) return;
    for_runs<T>(view, row, start, n, [&](T* p, int64_t stride, int64_t count, int64_t i) {
      for (int64_t j = 0; j < count; ++j) p[j * stride] = scratch[i + j];
    });
  }
};

// Normals of a few short rows, or of one segment of a long one.
class Noise {
 public:
  Noise(const NoiseKey& key, int64_t sample_offset, Vector<const int64_t> timestep)
      : key_(key), sample_offset_(sample_offset), timestep_(timestep) {}

  void fill(int64_t first_row, int64_t rows, int64_t start, int64_t n) {
    first_row_ = first_row;
    groups_ = groups_of(n);
    const Vector<const int64_t> timestep{timestep_.data + first_row * timestep_.stride,
                                         timestep_.stride};
    kernels().fill_normals({key_, sample_offset_ + first_row, timestep, rows, start / 4, groups_},
                           z_);
  }
  void zero() { std::fill_n(z_, kSegment, 0.0f); }
  const float* row(int64_t row) const { return z_ + 4 * groups_ * (row - first_row_); }

 private:
  NoiseKey key_;
  int64_t sample_offset_;
  Vector<const int64_t> timestep_;
  int64_t first_row_ = 0, groups_ = 0;
  alignas(64) float z_[kSegment];
};

int64_t segments_of(int64_t dim) { return std::max<int64_t>(1, (dim + kSegment - 1) / kSegment); }

// Calls work(first_row, rows, start, n) in parallel for pieces that cover `rows` rows of `dim` elements:
// several whole short rows, or one segment of one long row. make_worker() is called once a thread and
// piece of work, and owns the scratch.
template <class MakeWorker>
void for_pieces(int64_t rows, int64_t dim, const MakeWorker& make_worker) {
  const int64_t segments = segments_of(dim);
  if (segments > 1) {
    parallel_for(0, rows * segments, kElementsPerThread / kSegment,
                 [&](int64_t begin, int64_t end) {
                   auto work = make_worker();
                   for (int64_t i = begin; i < end; ++i) {
                     const int64_t start = i % segments * kSegment;
                     work(i / segments, int64_t{1}, start, std::min(kSegment, dim - start));
                   }
                 });
  } else {
    const int64_t block = std::max<int64_t>(1, kSegment / std::max<int64_t>(4, 4 * groups_of(dim)));
    const int64_t blocks = (rows + block - 1) / block;
    const int64_t grain = std::max<int64_t>(1, kElementsPerThread / (4 * groups_of(dim) * block));
    parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
      auto work = make_worker();
      for (int64_t i = begin; i < end; ++i)
        work(i * block, std::min(block, rows - i * block), int64_t{0}, dim);
    });
  }
}

// The K sums of each segment of each row, added up in order.
template <int K>
class RowSums {
 public:
  RowSums(int64_t rows, int64_t dim)
      : segments_(segments_of(dim)), values_(static_cast<size_t>(rows * segments_ * K)) {}
  double* segment(int64_t row, int64_t start) {
    return &values_[static_cast<size_t>((row * segments_ + start / kSegment) * K)];
  }
  double total(int64_t row, int k) const {
    double sum = 0;
    for (int64_t s = 0; s < segments_; ++s)
      sum += values_[static_cast<size_t>((row * segments_ + s) * K + k)];
    return sum;
  }

 private:
  int64_t segments_;
  std::vector<double> values_;
};

// The row's transition, from tables of type R.
template <class R>
struct Tables {
  Vector<const int64_t> timestep;
  Vector<const R> sample_coef, output_coef, log_std;

  explicit Tables(const TransitionProblem& p)
      : timestep(p.timestep),
        sample_coef(p.sample_coef.as<const R>()),
        output_coef(p.output_coef.as<const R>()),
        log_std(p.log_std.as<const R>()) {}
  Transition<R> at(int64_t row) const {
    const int64_t t = timestep[row];
    return transition_at(sample_coef[t], output_coef[t], log_std[t]);
  }
  R inverse_std(int64_t row) const { return dxmi::exp(-log_std[timestep[row]]); }
};

// Sums one value a row into its timestep's entry, in row order.
template <class R, class Value>
void scatter_to_table(AnyVector table, int64_t steps, int64_t rows,
                      const Vector<const int64_t>& timestep, const Value& value) {
  std::vector<double> sums(static_cast<size_t>(steps));
  for (int64_t n = 0; n < rows; ++n) sums[static_cast<size_t>(timestep[n])] += value(n);
  const Vector<R> out = table.as<R>();
  for (int64_t t = 0; t < steps; ++t) out[t] = static_cast<R>(sums[static_cast<size_t>(t)]);
}

}  // namespace

void CpuBackend::normal(const NormalProblem& p) {
  const NoiseKey key = read_key(p.key);
  with_dtype(p.dtype, [&](auto tag) {
    using T = decltype(tag);
    if (p.dim == 0) return;
    for_pieces(p.rows, p.dim, [&] {
      return [&, noise = Noise(key, p.sample_offset, {&p.timestep, 0}), out = Output<T>(p.out)](
                 int64_t first_row, int64_t rows, int64_t start, int64_t n) mutable {
        noise.fill(first_row, rows, start, n);
        for (int64_t row = first_row; row < first_row + rows; ++row) {
          kernels().of<T>().store(n, noise.row(row), out.at(row, start));
          out.done(row, start, n);
        }
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
      return [&, noise = Noise(key, p.sample_offset, p.timestep), sample = Input<T>(p.sample),
              output = Input<T>(p.output), next = Output<T>(result.next)](
                 int64_t first_row, int64_t rows, int64_t start, int64_t n) mutable {
        noise.fill(first_row, rows, start, n);
        for (int64_t row = first_row; row < first_row + rows; ++row) {
          kernels().of<T>().step(n, tables.at(row), sample.at(row, start, n),
                                 output.at(row, start, n), noise.row(row), next.at(row, start),
                                 sums.segment(row, start));
          next.done(row, start, n);
        }
      };
    });
    const Vector<R> log_prob = result.log_prob.as<R>();
    const Vector<R> sq_displacement = result.sq_displacement.as<R>();
    const double dim = static_cast<double>(p.dim);
    for (int64_t row = 0; row < p.rows; ++row) {
      const double log_std = tables.log_std[p.timestep[row]];
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
    RowSums<1> grad_std(p.rows, p.dim);
    for_pieces(p.rows, p.dim, [&] {
      return [&, noise = Noise(key, p.sample_offset, p.timestep), sample = Input<T>(p.sample),
              output = Input<T>(p.output), grad_next = Input<T>(g.grad_next),
              grad_sample = Output<T>(g.grad_sample), grad_output = Output<T>(g.grad_output)](
                 int64_t first_row, int64_t rows, int64_t start, int64_t n) mutable {
        if (needs_noise)
          noise.fill(first_row, rows, start, n);
        else
          noise.zero();
        for (int64_t row = first_row; row < first_row + rows; ++row) {
          const R grad_displacement_sq =
              grad_sq.data ? static_cast<R>(2.0 * grad_sq[row] / static_cast<double>(p.dim)) : R(0);
          kernels().of<T>().step_grad(
              n, tables.at(row), grad_displacement_sq, sample.at(row, start, n),
              output.at(row, start, n), noise.row(row), grad_next.at(row, start, n),
              grad_sample.at(row, start), grad_output.at(row, start), grad_std.segment(row, start));
          grad_sample.done(row, start, n);
          grad_output.done(row, start, n);
        }
      };
    });
    if (g.grad_log_std.data)
      scatter_to_table<R>(g.grad_log_std, p.steps, p.rows, p.timestep, [&](int64_t row) {
        const double std = tables.at(row).std;
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
      return [&, next = Input<T>(p.next), sample = Input<T>(p.sample), output = Input<T>(p.output)](
                 int64_t first_row, int64_t rows, int64_t start, int64_t n) mutable {
        for (int64_t row = first_row; row < first_row + rows; ++row)
          kernels().of<T>().log_prob(n, tables.at(row), tables.inverse_std(row),
                                     next.at(row, start, n), sample.at(row, start, n),
                                     output.at(row, start, n), sums.segment(row, start));
      };
    });
    const Vector<R> out = log_prob.as<R>();
    for (int64_t row = 0; row < p.rows; ++row) {
      const double log_std = tables.log_std[p.timestep[row]];
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
              grad_output = Output<T>(g.grad_output)](int64_t first_row, int64_t rows,
                                                      int64_t start, int64_t n) mutable {
        for (int64_t row = first_row; row < first_row + rows; ++row) {
          const R inverse_std = tables.inverse_std(row);
          const R scale = static_cast<R>(static_cast<double>(grad[row]) * inverse_std / dim);
          kernels().of<T>().log_prob_grad(
              n, tables.at(row), inverse_std, scale, next.at(row, start, n),
              sample.at(row, start, n), output.at(row, start, n), grad_next.at(row, start),
              grad_sample.at(row, start), grad_output.at(row, start), sums.segment(row, start));
          grad_next.done(row, start, n);
          grad_sample.done(row, start, n);
          grad_output.done(row, start, n);
        }
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
