// What the emulator has in place of csrc/cuda/device.cpp. The CUDA half, compiled for the emulator, is the ops
// torch.ops.dxmi_emulated.*: they take CPU tensors and run csrc/cuda on them.
#include <torch/csrc/stable/library.h>

#include <memory>
#include <vector>

#include "cuda/device.h"
#include "emulator.h"

namespace dxmi {

struct Device::Torch {
  std::vector<std::unique_ptr<char[]>> workspaces;
};

Device::Device(const torch::stable::Tensor&) : torch_(new Torch), stream_(nullptr) {}
Device::~Device() = default;

void* Device::allocate(size_t bytes) {
  if (bytes == 0) return nullptr;  // as torch has it
  torch_->workspaces.emplace_back(
      new char[bytes]);  // of just this size, so that a sanitizer sees its ends
  return torch_->workspaces.back().get();
}

}  // namespace dxmi

namespace {
void fail_next_launch() { emulated_error = 1; }
}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dxmi_emulated, m) { m.def("fail_next_launch() -> ()"); }
STABLE_TORCH_LIBRARY_IMPL(dxmi_emulated, CompositeExplicitAutograd, m) {
  m.impl("fail_next_launch", TORCH_BOX(&fail_next_launch));
}
