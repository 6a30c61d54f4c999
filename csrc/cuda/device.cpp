// What the CUDA half needs from torch: the current stream and the allocator.
#include "device.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <stdexcept>
#include <vector>

namespace dxmi {

using torch::stable::Tensor;

struct Device::Torch {
  torch::stable::accelerator::DeviceGuard guard;
  Tensor lead;
  std::vector<Tensor> workspaces;
};

Device::Device(const Tensor& lead)
    : torch_(
          new Torch{torch::stable::accelerator::DeviceGuard(lead.get_device_index()), lead, {}}) {
  // The stable Stream exposes its raw handle since torch 2.13; this shim is older.
  if (aoti_torch_get_current_cuda_stream(lead.get_device_index(), &stream_) != 0)
    throw std::runtime_error("dxmi_ext: torch has no current CUDA stream");
}

Device::~Device() = default;

// torch's allocator reuses memory freed here for later work on the same stream only.
void* Device::allocate(size_t bytes) {
  const std::vector<int64_t> size{static_cast<int64_t>((bytes + 7) / 8)};
  torch_->workspaces.push_back(
      torch::stable::new_empty(torch_->lead, size, torch::headeronly::ScalarType::Double));
  return torch_->workspaces.back().data_ptr();
}

}  // namespace dxmi
