// The entry of every op: checks, allocates the results, calls the backend. A template over the
// backend, so that the CPU and CUDA halves share one set of checks. A gradient that is not wanted is
// returned as an empty tensor.
#pragma once

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "checks.h"

namespace dxmi {

template <class Backend>
struct Entries {
  using OptionalTensor = std::optional<Tensor>;

  static void normal_(Tensor out, Tensor key, int64_t timestep, int64_t sample_offset) {
    const Checks check("normal", "key", key, Backend::kCuda);
    check.samples("out", out);
    if (timestep < 0 || timestep >= (int64_t{1} << 32))
      check.fail("timestep", "must be in 0..2**32 - 1, got ", timestep);
    const int64_t dim = Checks::data_dim(out);
    check.noise_range("shape", out.size(0), dim, sample_offset);
    Backend(key).normal({dtype_of(out.scalar_type()), out.size(0), dim, check.key(key), timestep,
                         sample_offset, check.view("out", out)});
  }

  static std::tuple<Tensor, Tensor, Tensor> sampler_step_fwd(Tensor sample, Tensor model_output,
                                                             Tensor timestep, Tensor sample_coef,
                                                             Tensor output_coef, Tensor log_std,
                                                             Tensor key, int64_t sample_offset) {
    const Checks check("sampler_step", "sample", sample, Backend::kCuda);
    const StepProblem problem = step_problem(check, sample, model_output, timestep, sample_coef,
                                             output_coef, log_std, key, sample_offset);
    Tensor next = torch::stable::empty_like(sample);
    Tensor log_prob = rows(log_std, problem.rows), sq_displacement = rows(log_std, problem.rows);
    Backend(sample).sampler_step(problem,
                                 {check.view("next_sample", next), Checks::values(log_prob),
                                  Checks::values(sq_displacement)});
    return {next, log_prob, sq_displacement};
  }

  static std::tuple<Tensor, Tensor, Tensor> sampler_step_bwd(
      OptionalTensor grad_next_sample, OptionalTensor grad_log_prob,
      OptionalTensor grad_sq_displacement, Tensor sample, Tensor model_output, Tensor timestep,
      Tensor sample_coef, Tensor output_coef, Tensor log_std, Tensor key, int64_t sample_offset,
      bool want_sample, bool want_output, bool want_log_std) {
    const Checks check("sampler_step_bwd", "sample", sample, Backend::kCuda);
    const StepProblem problem = step_problem(check, sample, model_output, timestep, sample_coef,
                                             output_coef, log_std, key, sample_offset);
    StepGradients gradients{};
    if (grad_next_sample) {
      check.same("grad_next_sample", *grad_next_sample, "sample", sample);
      gradients.grad_next = check.view("grad_next_sample", *grad_next_sample);
    }
    const ScalarType type = log_std.scalar_type();
    if (grad_log_prob) {
      check.vector("grad_log_prob", *grad_log_prob, type, problem.rows, "N");
      gradients.grad_log_prob = Checks::values(*grad_log_prob);
    }
    if (grad_sq_displacement) {
      check.vector("grad_sq_displacement", *grad_sq_displacement, type, problem.rows, "N");
      gradients.grad_sq_displacement = Checks::values(*grad_sq_displacement);
    }
    Tensor grad_sample = like_or_empty(sample, want_sample);
    Tensor grad_output = like_or_empty(model_output, want_output);
    Tensor grad_log_std = table_or_empty(log_std, want_log_std);
    if (want_sample) gradients.grad_sample = check.view("grad_sample", grad_sample);
    if (want_output) gradients.grad_output = check.view("grad_model_output", grad_output);
    if (want_log_std) gradients.grad_log_std = Checks::values(grad_log_std);
    Backend(sample).sampler_step_grad(problem, gradients);
    return {grad_sample, grad_output, grad_log_std};
  }

  static Tensor transition_log_prob_fwd(Tensor next_sample, Tensor sample, Tensor model_output,
                                        Tensor timestep, Tensor sample_coef, Tensor output_coef,
                                        Tensor log_std) {
    const Checks check("transition_log_prob", "sample", sample, Backend::kCuda);
    const LogProbProblem problem = log_prob_problem(check, next_sample, sample, model_output,
                                                    timestep, sample_coef, output_coef, log_std);
    Tensor log_prob = rows(log_std, problem.rows);
    Backend(sample).transition_log_prob(problem, Checks::values(log_prob));
    return log_prob;
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> transition_log_prob_bwd(
      Tensor grad_log_prob, Tensor next_sample, Tensor sample, Tensor model_output, Tensor timestep,
      Tensor sample_coef, Tensor output_coef, Tensor log_std, bool want_next, bool want_sample,
      bool want_output, bool want_log_std) {
    const Checks check("transition_log_prob_bwd", "sample", sample, Backend::kCuda);
    const LogProbProblem problem = log_prob_problem(check, next_sample, sample, model_output,
                                                    timestep, sample_coef, output_coef, log_std);
    check.vector("grad_log_prob", grad_log_prob, log_std.scalar_type(), problem.rows, "N");
    Tensor grad_next = like_or_empty(next_sample, want_next);
    Tensor grad_sample = like_or_empty(sample, want_sample);
    Tensor grad_output = like_or_empty(model_output, want_output);
    Tensor grad_log_std = table_or_empty(log_std, want_log_std);
    LogProbGradients gradients{};
    gradients.grad_log_prob = Checks::values(grad_log_prob);
    if (want_next) gradients.grad_next = check.view("grad_next_sample", grad_next);
    if (want_sample) gradients.grad_sample = check.view("grad_sample", grad_sample);
    if (want_output) gradients.grad_output = check.view("grad_model_output", grad_output);
    if (want_log_std) gradients.grad_log_std = Checks::values(grad_log_std);
    Backend(sample).transition_log_prob_grad(problem, gradients);
    return {grad_next, grad_sample, grad_output, grad_log_std};
  }

  static Tensor running_cost_fwd(Tensor sq_displacement, Tensor timestep, Tensor log_std,
                                 Tensor velocity_var, double tau_entropy, double tau_velocity,
                                 int64_t skip_last) {
    const Checks check("running_cost", "sq_displacement", sq_displacement, Backend::kCuda);
    const CostProblem problem =
        cost_problem(check, "sq_displacement", sq_displacement, timestep, log_std, velocity_var,
                     tau_entropy, tau_velocity, skip_last);
    Tensor cost = rows(sq_displacement, problem.rows);
    Backend(sq_displacement).running_cost(problem, Checks::values(cost));
    return cost;
  }

  static std::tuple<Tensor, Tensor> running_cost_bwd(Tensor grad, Tensor timestep, Tensor log_std,
                                                     Tensor velocity_var, double tau_entropy,
                                                     double tau_velocity, int64_t skip_last,
                                                     bool want_sq_displacement, bool want_log_std) {
    const Checks check("running_cost_bwd", "grad", grad, Backend::kCuda);
    const CostProblem problem = cost_problem(check, "grad", grad, timestep, log_std, velocity_var,
                                             tau_entropy, tau_velocity, skip_last);
    Tensor grad_sq = table_or_empty(grad, want_sq_displacement);
    Tensor grad_log_std = table_or_empty(log_std, want_log_std);
    CostGradients gradients{Checks::values(grad), {}, {}};
    if (want_sq_displacement) gradients.grad_sq_displacement = Checks::values(grad_sq);
    if (want_log_std) gradients.grad_log_std = Checks::values(grad_log_std);
    Backend(grad).running_cost_grad(problem, gradients);
    return {grad_sq, grad_log_std};
  }

  static Tensor td_target(Tensor next_value, Tensor sq_displacement, Tensor timestep,
                          Tensor log_std, Tensor velocity_var, Tensor time_cost, double tau_entropy,
                          double tau_velocity, int64_t skip_last) {
    const Checks check("td_target", "sq_displacement", sq_displacement, Backend::kCuda);
    const CostProblem problem =
        cost_problem(check, "sq_displacement", sq_displacement, timestep, log_std, velocity_var,
                     tau_entropy, tau_velocity, skip_last);
    check.vector("next_value", next_value, sq_displacement.scalar_type(), problem.rows, "N");
    check.table("time_cost", time_cost, sq_displacement.scalar_type(), problem.steps);
    Tensor target = rows(sq_displacement, problem.rows);
    Backend(sq_displacement)
        .td_target(problem, Checks::values(next_value), Checks::values(time_cost),
                   Checks::values(target));
    return target;
  }

  static Tensor energy_loss_fwd(Tensor energy_data, Tensor energy_sample, double gamma) {
    const Checks check("energy_loss", "energy_data", energy_data, Backend::kCuda);
    const EnergyProblem problem = energy_problem(check, energy_data, energy_sample, gamma);
    Tensor loss = empty(energy_data, {});
    Backend(energy_data).energy_loss(problem, Checks::values(loss));
    return loss;
  }

  static std::tuple<Tensor, Tensor> energy_loss_bwd(Tensor grad, Tensor energy_data,
                                                    Tensor energy_sample, double gamma) {
    const Checks check("energy_loss_bwd", "energy_data", energy_data, Backend::kCuda);
    const EnergyProblem problem = energy_problem(check, energy_data, energy_sample, gamma);
    check.device("grad", grad);
    check.dtype("grad", grad, energy_data.scalar_type(), "energy_data");
    if (grad.dim() != 0) check.fail("grad", "must be a scalar, got shape ", to_text(grad));
    Tensor grad_data = rows(energy_data, problem.data_rows);
    Tensor grad_sample = rows(energy_data, problem.sample_rows);
    Backend(energy_data)
        .energy_loss_grad(problem, Checks::values(grad), Checks::values(grad_data),
                          Checks::values(grad_sample));
    return {grad_data, grad_sample};
  }

  static void update_velocity_var_(Tensor velocity_var, Tensor sq_displacement, double decay) {
    const Checks check("update_velocity_var_", "velocity_var", velocity_var, Backend::kCuda);
    check.rows_type("velocity_var", velocity_var);
    const ScalarType type = velocity_var.scalar_type();
    const int64_t steps = check.table("velocity_var", velocity_var, type);
    check.device("sq_displacement", sq_displacement);
    check.dtype("sq_displacement", sq_displacement, type, "velocity_var");
    if (sq_displacement.dim() != 2 || sq_displacement.size(0) != steps)
      check.fail("sq_displacement", "must have shape [", steps, ", B], got ",
                 to_text(sq_displacement));
    if (sq_displacement.size(1) == 0)
      check.fail("sq_displacement", "has no rows to take a mean over: shape ",
                 to_text(sq_displacement));
    if (!(decay >= 0 && decay <= 1)) check.fail("decay", "must be in [0, 1], got ", decay);
    check.writable("velocity_var", velocity_var);
    // Means are taken of what sq_displacement held before, also where it is a view of the same memory.
    if (Checks::overlap(velocity_var, sq_displacement))
      sq_displacement = torch::stable::clone(sq_displacement);
    Backend(velocity_var)
        .update_velocity_var({type == ScalarType::Double, steps, sq_displacement.size(1),
                              Checks::values(velocity_var), sq_displacement.data_ptr(),
                              sq_displacement.stride(0), sq_displacement.stride(1), decay});
  }

 private:
  static Tensor empty(const Tensor& like, std::vector<int64_t> shape) {
    return torch::stable::new_empty(like, shape);
  }
  static Tensor rows(const Tensor& like, int64_t count) { return empty(like, {count}); }
  static Tensor like_or_empty(const Tensor& t, bool wanted) {
    return wanted ? torch::stable::empty_like(t) : empty(t, {0});
  }
  static Tensor table_or_empty(const Tensor& t, bool wanted) {
    return empty(t, {wanted ? t.size(0) : 0});
  }

  static TransitionProblem transition_problem(const Checks& check, const Tensor& sample,
                                              const Tensor& model_output, const Tensor& timestep,
                                              const Tensor& sample_coef, const Tensor& output_coef,
                                              const Tensor& log_std) {
    check.samples("sample", sample);
    check.same("model_output", model_output, "sample", sample);
    const int64_t dim = check.dim_of_mean("sample", sample), count = sample.size(0);
    check.vector("timestep", timestep, ScalarType::Long, count, "N");
    const ScalarType wide =
        sample.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    const int64_t steps = check.table("sample_coef", sample_coef, wide);
    check.table("output_coef", output_coef, wide, steps);
    check.table("log_std", log_std, wide, steps);
    const Vector<const int64_t> t = Checks::ints(timestep);
    if constexpr (Backend::kReadsValues) check.timestep_values(t, count, steps);
    return {dtype_of(sample.scalar_type()),
            count,
            dim,
            steps,
            check.view("sample", sample),
            check.view("model_output", model_output),
            t,
            Checks::values(sample_coef),
            Checks::values(output_coef),
            Checks::values(log_std)};
  }

  static StepProblem step_problem(const Checks& check, const Tensor& sample,
                                  const Tensor& model_output, const Tensor& timestep,
                                  const Tensor& sample_coef, const Tensor& output_coef,
                                  const Tensor& log_std, const Tensor& key, int64_t sample_offset) {
    const TransitionProblem transition = transition_problem(check, sample, model_output, timestep,
                                                            sample_coef, output_coef, log_std);
    check.noise_range("sample", transition.rows, transition.dim, sample_offset);
    return {transition, check.key(key), sample_offset};
  }

  static LogProbProblem log_prob_problem(const Checks& check, const Tensor& next_sample,
                                         const Tensor& sample, const Tensor& model_output,
                                         const Tensor& timestep, const Tensor& sample_coef,
                                         const Tensor& output_coef, const Tensor& log_std) {
    const TransitionProblem transition = transition_problem(check, sample, model_output, timestep,
                                                            sample_coef, output_coef, log_std);
    check.same("next_sample", next_sample, "sample", sample);
    return {transition, check.view("next_sample", next_sample)};
  }

  static CostProblem cost_problem(const Checks& check, const char* rows_name,
                                  const Tensor& row_values, const Tensor& timestep,
                                  const Tensor& log_std, const Tensor& velocity_var,
                                  double tau_entropy, double tau_velocity, int64_t skip_last) {
    check.rows_type(rows_name, row_values);
    const ScalarType type = row_values.scalar_type();
    check.vector(rows_name, row_values, type, -1, "N");
    const int64_t count = row_values.size(0);
    check.vector("timestep", timestep, ScalarType::Long, count, "N");
    const int64_t steps = check.table("log_std", log_std, type);
    check.table("velocity_var", velocity_var, type, steps);
    const CostProblem problem{type == ScalarType::Double,
                              count,
                              steps,
                              Checks::ints(timestep),
                              Checks::values(row_values),
                              Checks::values(log_std),
                              Checks::values(velocity_var),
                              tau_entropy,
                              tau_velocity,
                              check.skip_last(skip_last, steps)};
    if constexpr (Backend::kReadsValues) {
      check.timestep_values(problem.timestep, count, steps);
      if (problem.wide)
        check.positive_values("velocity_var", problem.velocity_var.template as<double>(),
                              steps - skip_last);
      else
        check.positive_values("velocity_var", problem.velocity_var.template as<float>(),
                              steps - skip_last);
    }
    return problem;
  }

  static EnergyProblem energy_problem(const Checks& check, const Tensor& energy_data,
                                      const Tensor& energy_sample, double gamma) {
    check.rows_type("energy_data", energy_data);
    const ScalarType type = energy_data.scalar_type();
    check.vector("energy_data", energy_data, type, -1, "N");
    check.vector("energy_sample", energy_sample, type, -1, "M");
    if (energy_data.size(0) == 0) check.fail("energy_data", "is empty: its mean is not defined");
    if (energy_sample.size(0) == 0)
      check.fail("energy_sample", "is empty: its mean is not defined");
    return {type == ScalarType::Double,  energy_data.size(0),           energy_sample.size(0),
            Checks::values(energy_data), Checks::values(energy_sample), gamma};
  }
};

template <class Backend>
void register_entries(torch::stable::detail::StableLibrary& m) {
  using E = Entries<Backend>;
  m.impl("normal_", TORCH_BOX(&E::normal_));
  m.impl("sampler_step_fwd", TORCH_BOX(&E::sampler_step_fwd));
  m.impl("sampler_step_bwd", TORCH_BOX(&E::sampler_step_bwd));
  m.impl("transition_log_prob_fwd", TORCH_BOX(&E::transition_log_prob_fwd));
  m.impl("transition_log_prob_bwd", TORCH_BOX(&E::transition_log_prob_bwd));
  m.impl("running_cost_fwd", TORCH_BOX(&E::running_cost_fwd));
  m.impl("running_cost_bwd", TORCH_BOX(&E::running_cost_bwd));
  m.impl("td_target", TORCH_BOX(&E::td_target));
  m.impl("energy_loss_fwd", TORCH_BOX(&E::energy_loss_fwd));
  m.impl("energy_loss_bwd", TORCH_BOX(&E::energy_loss_bwd));
  m.impl("update_velocity_var_", TORCH_BOX(&E::update_velocity_var_));
}

}  // namespace dxmi
