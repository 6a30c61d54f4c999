// update_velocity_var_ on CUDA.
#include "../ops/update_velocity_var.h"

#include "../core/costs.h"
#include "launch.h"
#include "sums.h"

namespace dxmi {
namespace cuda {

// One block per timestep.
template <class R>
DXMI_KERNEL update_velocity_var_kernel(UpdateVelocityVarArguments a) {
  const int64_t t = blockIdx.x;
  const R* const sq = static_cast<const R*>(a.sq_displacement) + t * a.step_stride;
  R sum = 0;
  for (int64_t n = threadIdx.x; n < a.rows; n += blockDim.x) sum += sq[n * a.row_stride];
  sum = block_sum(sum);
  if (threadIdx.x == 0) {
    R& velocity_var = a.velocity_var.as<R>()[t];
    velocity_var =
        update_velocity_var(velocity_var, sum / static_cast<R>(a.rows), static_cast<R>(a.decay));
  }
}

}  // namespace cuda

void loops::update_velocity_var_(Device& device, const UpdateVelocityVarArguments& a) {
  using namespace cuda;
  with_vector_type(a.is_float64, [&](auto tag) {
    using R = decltype(tag);
    launch("update_velocity_var_", device, update_velocity_var_kernel<R>, a.steps, kThreads, a);
  });
}

}  // namespace dxmi
