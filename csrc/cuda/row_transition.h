// The transition of a row, looked up in the tables at its timestep.
#pragma once

#include <cassert>

#include "../core/transition.h"
#include "../ops/transition.h"
#include "row_layout.h"

namespace dxmi::cuda {

template <class R>
struct RowTransition {
  Transition<R> transition;
  R log_std;
  int64_t timestep;
};

// A timestep outside 0..T-1 gives a row of NaN instead of a read beyond the tables; a debug build asserts.
template <class R>
__device__ RowTransition<R> row_transition(const TransitionInputs& a, const RowSlice& slice) {
  const int64_t t = slice.active ? a.timestep[slice.row] : 0;
  assert(t >= 0 && t < a.steps && "dxmi_ext: timestep must be in 0..T-1");
  if (t < 0 || t >= a.steps) {
    const R nan = static_cast<R>(NAN);
    return {{nan, nan, nan}, nan, t};
  }
  const R log_std = a.log_std.as<const R>()[t];
  return {transition_at(a.sample_coef.as<const R>()[t], a.output_coef.as<const R>()[t], log_std),
          log_std, t};
}

}  // namespace dxmi::cuda
