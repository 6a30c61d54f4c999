// The device of a call in the CUDA half, its stream and the memory that kernels need meanwhile. Without torch:
// device.cpp has what only torch knows, and the tests' emulator its own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace torch::stable {
class Tensor;
}

namespace dxmi {

// Made for one call, on the device of its tensors. Nothing waits for the device; values that only the device could
// check give NaN rows.
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
