// The CUDA half's entries and kernels, compiled for the emulator: the ops torch.ops.dxmi_emulated.* take CPU
// tensors and run csrc/cuda on them.
#include "cuda/backend.h"
#include "cuda/device.h"
#include "entries.h"
#include "schemas.h"

#include <memory>
#include <vector>

namespace dxmi {

struct CudaBackend::Torch {
  std::vector<std::unique_ptr<char[]>> workspaces;
};

CudaBackend::CudaBackend(const Tensor&) : torch_(new Torch), stream_(nullptr) {}
CudaBackend::~CudaBackend() = default;

void* CudaBackend::workspace(size_t bytes) {
  if (bytes == 0) return nullptr;  // as torch has it
  torch_->workspaces.emplace_back(
      new char[bytes]);  // of just this size, so that a sanitizer sees its ends
  return torch_->workspaces.back().get();
}

}  // namespace dxmi

namespace {
void fail_next_launch() { emulated_error = 1; }
}  // namespace

STABLE_TORCH_LIBRARY(dxmi_emulated, m) {
  dxmi::define_schemas(m);
  m.def("fail_next_launch() -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(dxmi_emulated, CPU, m) { dxmi::register_entries<dxmi::CudaBackend>(m); }
STABLE_TORCH_LIBRARY_IMPL(dxmi_emulated, CompositeExplicitAutograd, m) {
  m.impl("fail_next_launch", TORCH_BOX(&fail_next_launch));
}
