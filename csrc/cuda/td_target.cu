// td_target on CUDA.
#include "../ops/td_target.h"

#include "running_cost.h"

namespace dxmi {
namespace cuda {

template <class R>
DXMI_KERNEL td_target_kernel(TdTargetInputs a, AnyVector target) {
  const int64_t n = thread_of_grid();
  if (n >= a.rows) return;
  const int64_t t = a.timestep[n];
  const R time = t >= 0 && t < a.steps ? a.time_cost.as<const R>()[t] : static_cast<R>(NAN);
  target.as<R>()[n] =
      a.next_value.as<const R>()[n] + cost_of_row<R>(a, a.sq_displacement, n) + time;
}

}  // namespace cuda

void loops::td_target(Device& device, const TdTargetInputs& a, AnyVector target) {
  using namespace cuda;
  with_vector_type(a.is_float64, [&](auto tag) {
    using R = decltype(tag);
    launch("td_target", device, td_target_kernel<R>, blocks_for(a.rows, kThreads), kThreads, a,
           target);
  });
}

}  // namespace dxmi
