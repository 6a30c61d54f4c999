// Registration of an op with torch. The CPU half defines the schemas; the CUDA half adds its implementations; the
// tests' emulator does both, in its own namespace.
//
//   DXMI_SCHEMAS(m) { m.def("name(Tensor x) -> Tensor"); }
//   DXMI_IMPLEMENTATIONS(m) { m.impl("name", TORCH_BOX(&dxmi::name)); }
#pragma once

#include <torch/csrc/stable/library.h>

#if defined(DXMI_EMULATE)
#define DXMI_SCHEMAS(m) STABLE_TORCH_LIBRARY_FRAGMENT(dxmi_emulated, m)
#define DXMI_IMPLEMENTATIONS(m) STABLE_TORCH_LIBRARY_IMPL(dxmi_emulated, CPU, m)
#elif defined(DXMI_FOR_CUDA)
#define DXMI_SCHEMAS(m) \
  [[maybe_unused]] static void schemas(torch::stable::detail::StableLibrary& m)
#define DXMI_IMPLEMENTATIONS(m) STABLE_TORCH_LIBRARY_IMPL(dxmi_ext, CUDA, m)
#else
#define DXMI_SCHEMAS(m) STABLE_TORCH_LIBRARY_FRAGMENT(dxmi_ext, m)
#define DXMI_IMPLEMENTATIONS(m) STABLE_TORCH_LIBRARY_IMPL(dxmi_ext, CPU, m)
#endif
