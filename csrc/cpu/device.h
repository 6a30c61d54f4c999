// The device of the CPU half. Nothing about it varies from call to call: loops run on torch's thread pool.
#pragma once

namespace dxmi {

struct Device {
  static constexpr bool kIsCuda = false;
  static constexpr bool kReadsValues = true;  // the host can read, and so check, what tensors hold

  Device() = default;
  template <class Tensor>
  explicit Device(const Tensor&) {}
};

}  // namespace dxmi
