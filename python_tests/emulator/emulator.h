// Runs CUDA kernels on a CPU, for tests: every thread of a block is a fiber, blocks run one after another.
// A fiber runs until it meets a barrier or a shuffle, then the next one does; so threads see each other's
// writes only where the kernel synchronizes. Under AddressSanitizer, accesses are checked like any other.
// Stands in for <cuda_runtime.h> when csrc/cuda is compiled by a C++ compiler with DXMI_EMULATE.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#include "ops/operands.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __grid_constant__
#define __device__
#define __noinline__
#define __shared__ static  // blocks run one at a time, so a static is shared by one block's threads
#define __launch_bounds__(threads, blocks)

using cudaError_t = int;
using cudaStream_t = void*;
inline constexpr cudaError_t cudaSuccess = 0;
inline const char* cudaGetErrorString(cudaError_t) { return "emulated"; }
inline cudaError_t emulated_error = cudaSuccess;  // set by a test: the next launch fails
inline cudaError_t cudaGetLastError() { return std::exchange(emulated_error, cudaSuccess); }
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  if (p == nullptr) return 1;
  std::memset(p, value, bytes);
  return cudaSuccess;
}

struct EmulatedIndex {
  unsigned x;
};
inline EmulatedIndex threadIdx, blockIdx, blockDim;

class EmulatedBlock {
 public:
  static EmulatedBlock& current() {
    static EmulatedBlock block;
    return block;
  }

  void run(unsigned index, unsigned threads, const std::function<void()>& kernel) {
    kernel_ = &kernel;
    blockIdx.x = index;
    blockDim.x = threads;
    warps_.assign(threads / kWarp, Warp{});
    phase_ = waiting_ = 0;
    live_ = threads;
    while (fibers_.size() < threads) fibers_.push_back(std::make_unique<Fiber>());
    for (unsigned t = 0; t < threads; ++t) prepare(*fibers_[t]);
    while (live_ > 0) {
      bool progress = false;
      for (unsigned t = 0; t < threads; ++t)
        if (ready(t)) {
          resume(t);
          progress = true;
        }
      if (!progress)
        throw std::runtime_error("emulator: not all threads reach a barrier or shuffle");
    }
  }

  void barrier() {
    fibers_[threadIdx.x]->phase = phase_ + 1;
    ++waiting_;
    release();
    yield();
  }

  // All threads of the warp must take part.
  template <class T>
  T exchange(T value, unsigned partner) {
    const unsigned lane = threadIdx.x % kWarp;
    Warp& warp = warps_[threadIdx.x / kWarp];
    // Two slots: a thread may be one shuffle ahead of another, never two.
    auto& slot = warp.values[fibers_[threadIdx.x]->shuffles++ % 2];
    std::memcpy(slot[lane], &value, sizeof value);
    ++warp.arrived;
    yield();
    std::memcpy(&value, slot[partner], sizeof value);
    return value;
  }

 private:
  static constexpr unsigned kWarp = 32;
  static constexpr size_t kStack = 128 * 1024;

  struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[kStack]};
    bool done;
    unsigned phase, shuffles;  // the barrier and the shuffles that it has come to
    void* fake_stack;
  };
  struct Warp {
    unsigned arrived = 0;
    char values[2][kWarp][8];
  };

  bool ready(unsigned t) const {
    const Fiber& fiber = *fibers_[t];
    return !fiber.done && fiber.phase <= phase_ &&
           warps_[t / kWarp].arrived >= fiber.shuffles * kWarp;
  }

  // Opens the barrier once every thread that has not returned waits at it.
  void release() {
    if (waiting_ > 0 && waiting_ == live_) {
      ++phase_;
      waiting_ = 0;
    }
  }

  void prepare(Fiber& fiber) {
    fiber.done = false;
    fiber.phase = fiber.shuffles = 0;
    fiber.fake_stack = nullptr;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, entry, 0);
  }

  static void entry() {
    EmulatedBlock& block = current();
    block.arrive(nullptr);
    (*block.kernel_)();
    block.fibers_[threadIdx.x]->done = true;
    --block.live_;
    block.release();
    block.leave(nullptr);
  }

  void resume(unsigned t) {
    threadIdx.x = t;
    Fiber& fiber = *fibers_[t];
    void* fake_stack = nullptr;
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(&fake_stack, fiber.stack.get(), kStack);
#endif
    swapcontext(&scheduler_, &fiber.context);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
    (void)fake_stack;
  }

  void yield() {
    Fiber& fiber = *fibers_[threadIdx.x];
    leave(&fiber.fake_stack);
    arrive(fiber.fake_stack);
  }

  // From a fiber to the scheduler; no fake stack to save means that the fiber ends.
  void leave(void** fake_stack) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(fake_stack, scheduler_stack_, scheduler_stack_size_);
#endif
    (void)fake_stack;
    swapcontext(&fibers_[threadIdx.x]->context, &scheduler_);
  }

  // In a fiber that the scheduler has just switched to.
  void arrive(void* fake_stack) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fake_stack, &scheduler_stack_, &scheduler_stack_size_);
#endif
    (void)fake_stack;
  }

  const std::function<void()>* kernel_ = nullptr;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Warp> warps_;
  ucontext_t scheduler_;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_size_ = 0;
  unsigned phase_ = 0, waiting_ = 0, live_ = 0;
};

inline void emulate(int64_t blocks, int threads, const std::function<void()>& kernel) {
  if (threads % 32 != 0 || threads <= 0 || threads > 1024)
    throw std::runtime_error("emulator: a block needs 1 to 32 whole warps");
  for (int64_t block = 0; block < blocks; ++block)
    EmulatedBlock::current().run(static_cast<unsigned>(block), static_cast<unsigned>(threads),
                                 kernel);
}

inline void __syncthreads() { EmulatedBlock::current().barrier(); }
inline void __threadfence() {}
template <class T>
T __shfl_xor_sync(unsigned /*mask*/, T value, int offset) {
  return EmulatedBlock::current().exchange(value,
                                           (threadIdx.x % 32) ^ static_cast<unsigned>(offset));
}
inline unsigned atomicAdd(unsigned* p, unsigned value) {
  const unsigned before = *p;
  *p += value;
  return before;
}

inline uint16_t float_to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (x != x) return 0x7FFF;
  return static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);  // nearest even
}
inline float half_to_float(uint16_t bits) {
  dxmi::NativeHalf half;
  std::memcpy(&half, &bits, sizeof half);
  return static_cast<float>(half);
}
inline uint16_t float_to_half(float x) {
  const auto half = static_cast<dxmi::NativeHalf>(x);
  uint16_t bits;
  std::memcpy(&bits, &half, sizeof bits);
  return bits;
}
