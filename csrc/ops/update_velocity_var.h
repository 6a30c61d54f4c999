// update_velocity_var_: moves each timestep's velocity variance toward its mean squared displacement, in place.
#pragma once

#include "device.h"
#include "operands.h"

namespace dxmi {

struct UpdateVelocityVarArguments {
  bool is_float64;
  int64_t steps, rows;
  AnyVector velocity_var;       // [T], in place
  const void* sq_displacement;  // [T, B]
  int64_t step_stride, row_stride;
  double decay;
};

namespace loops {
void update_velocity_var_(Device& device, const UpdateVelocityVarArguments& a);
}

}  // namespace dxmi
