// Checks of the inputs that sampler_step and transition_log_prob share.
#include "transition.h"

#include "checks.h"

namespace dxmi {

TransitionInputs check_transition(const Checks& check, const Tensor& sample,
                                  const Tensor& model_output, const Tensor& timestep,
                                  const Tensor& sample_coef, const Tensor& output_coef,
                                  const Tensor& log_std) {
  check.samples("sample", sample);
  check.same("model_output", model_output, "sample", sample);
  const int64_t rows = sample.size(0), dim = data_size(sample);
  if (dim == 0)  // results are means over D
    check.fail("sample", "must have at least one element per row, got shape ", to_text(sample));
  const ScalarType type = is_float64(sample) ? ScalarType::Double : ScalarType::Float;
  const int64_t steps = check.table("sample_coef", sample_coef, type);
  check.table("output_coef", output_coef, type, steps);
  check.table("log_std", log_std, type, steps);
  return {dtype_of(sample),
          rows,
          dim,
          steps,
          check.view("sample", sample),
          check.view("model_output", model_output),
          check.timesteps(timestep, rows, steps),
          floats(sample_coef),
          floats(output_coef),
          floats(log_std)};
}

}  // namespace dxmi
