// The instruction-set variants of the CPU kernels.
#pragma once

#include <vector>

#include "kernels.h"

namespace dxmi::cpu {

// The variants that this processor supports, fastest first.
std::vector<const Kernels*> usable_kernels();

// The variant in use: the fastest, or the one in the environment variable DXMI_CPU_VARIANT. Throws
// std::runtime_error if that is unknown or not supported here.
const Kernels& kernels();

}  // namespace dxmi::cpu
