// The device of the CPU half. It is the same for every call: loops run on torch's thread pool.
#pragma once

namespace dxmi {

struct Device {
  static constexpr bool kIsCuda = false;
  static constexpr bool kReadsValues = true;  // the host can read and check the tensors' values

  Device() = default;
  template <class Tensor>
  explicit Device(const Tensor&) {}
};

}  // namespace dxmi
