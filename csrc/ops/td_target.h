// td_target: the regression target of a value network, next_value + running_cost + time_cost[t].
#pragma once

#include "running_cost.h"

namespace dxmi {

struct TdTargetInputs : RunningCostInputs {
  AnyVector next_value, sq_displacement;  // [N]
  AnyVector time_cost;                    // [T]
};

namespace loops {
void td_target(Device& device, const TdTargetInputs& a, AnyVector target);
}

}  // namespace dxmi
