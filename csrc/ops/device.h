// The Device of this half of the extension. ops/ is compiled once for each half and linked to its loops: csrc/cpu,
// or csrc/cuda with DXMI_FOR_CUDA.
#pragma once

#ifdef DXMI_FOR_CUDA
#include "../cuda/device.h"
#else
#include "../cpu/device.h"
#endif
