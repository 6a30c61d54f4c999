// td_target on the CPU.
#include "../ops/td_target.h"

#include "for_rows.h"

namespace dxmi::loops {

using namespace cpu;

void td_target(Device& device, const TdTargetInputs& a, AnyVector target) {
  running_cost_fwd(device, a, a.sq_displacement, target);
  with_vector_type(a.is_float64, [&](auto tag) {
    using R = decltype(tag);
    const Vector<const R> value = a.next_value.as<const R>(), time = a.time_cost.as<const R>();
    const Vector<R> out = target.as<R>();
    for_rows(a.rows, [&](int64_t n) { out[n] = value[n] + out[n] + time[a.timestep[n]]; });
  });
}

}  // namespace dxmi::loops
