// normal_: fills a tensor with the standard normals z of one timestep.
#pragma once

#include "device.h"
#include "operands.h"

namespace dxmi {

struct NormalArguments {
  Dtype dtype;
  int64_t rows, dim;
  Vector<const int64_t> key;
  int64_t timestep, sample_offset;
  SampleView out;
};

namespace loops {
void normal_(Device& device, const NormalArguments& a);
}

}  // namespace dxmi
