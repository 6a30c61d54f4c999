// The instruction-set variants of the CPU kernels.
#pragma once

#include <vector>

#include "kernels.h"

namespace dxmi::cpu {

// The variants that this processor runs, fastest first.
std::vector<const Kernels*> usable_kernels();

// The one in use: the fastest, or what the environment variable DXMI_CPU_VARIANT names. Throws
// std::runtime_error if it names none that runs here.
const Kernels& kernels();

}  // namespace dxmi::cpu
