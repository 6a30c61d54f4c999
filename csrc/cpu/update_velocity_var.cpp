// update_velocity_var_ on the CPU.
#include "../ops/update_velocity_var.h"

#include "../core/costs.h"

namespace dxmi::loops {

void update_velocity_var_(Device&, const UpdateVelocityVarArguments& a) {
  with_vector_type(a.is_float64, [&](auto tag) {
    using R = decltype(tag);
    const R* const sq = static_cast<const R*>(a.sq_displacement);
    const Vector<R> velocity_var = a.velocity_var.as<R>();
    for (int64_t t = 0; t < a.steps; ++t) {
      double sum = 0;
      for (int64_t n = 0; n < a.rows; ++n) sum += sq[t * a.step_stride + n * a.row_stride];
      velocity_var[t] = static_cast<R>(
          update_velocity_var<double>(velocity_var[t], sum / static_cast<double>(a.rows), a.decay));
    }
  });
}

}  // namespace dxmi::loops
