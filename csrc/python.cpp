// The module dxmi_ext._C. Importing it registers the ops; its attributes describe the build and the variant in use.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu/variants.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled half of dxmi_ext: importing it registers the torch ops.";
  dxmi::cpu::kernels();  // a bad DXMI_CPU_VARIANT is an error here, not in the middle of a run
  m.def("cpu_variants", [] {
    std::vector<std::string> names;
    for (const dxmi::cpu::Kernels* variant : dxmi::cpu::usable_kernels())
      names.emplace_back(variant->name);
    return names;
  });
  m.def("cpu_variant", [] { return std::string(dxmi::cpu::kernels().name); });
  m.attr("torch_headers") = DXMI_TORCH_VERSION;
  m.attr("compiler") = DXMI_COMPILER;
#ifdef DXMI_NVCC
  m.attr("nvcc") = DXMI_NVCC;
  m.attr("cuda_architectures") = DXMI_CUDA_ARCHITECTURES;
#endif
  m.attr("cuda_left_out") = DXMI_CUDA_LEFT_OUT;  // why there are no CUDA kernels, or empty
}
