// CUDA registrations of the ops, and what the CUDA half needs of torch. The schemas are _C's.
#include "../entries.h"
#include "backend.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <vector>

namespace dxmi {

struct CudaBackend::Torch {
  torch::stable::accelerator::DeviceGuard guard;
  Tensor lead;
  std::vector<Tensor> workspaces;
};

CudaBackend::CudaBackend(const Tensor& lead)
    : torch_(
          new Torch{torch::stable::accelerator::DeviceGuard(lead.get_device_index()), lead, {}}) {
  // The stable Stream has its raw handle from torch 2.13 on; this shim has been there all along.
  if (aoti_torch_get_current_cuda_stream(lead.get_device_index(), &stream_) != 0)
    throw std::runtime_error("dxmi_ext: torch has no current CUDA stream");
}

CudaBackend::~CudaBackend() = default;

// torch's allocator hands memory that is given back here to later work of the same stream only.
void* CudaBackend::workspace(size_t bytes) {
  const std::vector<int64_t> size{static_cast<int64_t>((bytes + 7) / 8)};
  torch_->workspaces.push_back(torch::stable::new_empty(torch_->lead, size, ScalarType::Double));
  return torch_->workspaces.back().data_ptr();
}

}  // namespace dxmi

STABLE_TORCH_LIBRARY_IMPL(dxmi_ext, CUDA, m) { dxmi::register_entries<dxmi::CudaBackend>(m); }
