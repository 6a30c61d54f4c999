// The device of a call in the CUDA half, its stream and the kernels' temporary memory. Torch-free: device.cpp
// implements it with torch, and the tests' emulator without.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace torch::stable {
class Tensor;
}

namespace dxmi {

// Created for one call, on the device of its tensors. Nothing synchronizes with the device; invalid values that
// only the device can see give NaN rows.
class Device {
 public:
#ifdef DXMI_EMULATE
  static constexpr bool kIsCuda = false;  // the emulator's memory is the host's
#else
  static constexpr bool kIsCuda = true;
#endif
  static constexpr bool kReadsValues = false;

  explicit Device(const torch::stable::Tensor& lead);
  ~Device();

  void* stream() const { return stream_; }  // a cudaStream_t

  // Device memory that lives as long as this call's work on the stream.
  template <class T>
  T* workspace(int64_t count) {
    return static_cast<T*>(allocate(static_cast<size_t>(count) * sizeof(T)));
  }

 private:
  void* allocate(size_t bytes);

  struct Torch;  // device guard, workspaces
  std::unique_ptr<Torch> torch_;
  void* stream_;
};

}  // namespace dxmi
