// The description of an op's tensors for its loops: element types and memory layouts. Torch-free, so that kernels
// compile without torch.
#pragma once

#include <cstdint>
#include <type_traits>

#ifdef __CUDACC__
#define DXMI_HOST_DEVICE __host__ __device__
#else
#define DXMI_HOST_DEVICE
#endif

namespace dxmi {

// --- element types -----------------------------------------------------------------------------------------

enum class Dtype { kFloat32, kBFloat16, kFloat16, kFloat64 };

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// The compiler's own float16, for conversions on the CPU. GCC 12 supports _Float16 in C++ on x86 only.
#if !defined(__CUDACC__)
#ifdef __aarch64__
using NativeHalf = __fp16;
#else
using NativeHalf = _Float16;
#endif
#endif

// The type in which samples of type T are computed; also that of their tables and of results with one value per row.
template <class T>
using ComputeType = std::conditional_t<std::is_same_v<T, double>, double, float>;

// body(T{}) for the sample type T that a dtype stands for.
template <class Body>
void with_sample_type(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::kFloat32: return body(float{});
    case Dtype::kBFloat16: return body(BFloat16{});
    case Dtype::kFloat16: return body(Half{});
    case Dtype::kFloat64: return body(double{});
  }
}

// body(R{}) for ops without samples, whose vectors are float64 or float32.
template <class Body>
void with_vector_type(bool is_float64, const Body& body) {
  is_float64 ? body(double{}) : body(float{});
}

// --- memory ------------------------------------------------------------------------------------------------

// One value per row or per timestep; `stride` is in elements and may be 0.
template <class T>
struct Vector {
  T* data;
  int64_t stride;
  DXMI_HOST_DEVICE T& operator[](int64_t i) const { return data[i * stride]; }
};

// A Vector of float or double; the op's dtype says which. Null data: an absent input or an
// unwanted result.
struct AnyVector {
  void* data;
  int64_t stride;
  template <class R>
  DXMI_HOST_DEVICE Vector<R> as() const {
    return {static_cast<R*>(data), stride};
  }
};

// A sample-shaped tensor [N, *]: element i of a row counts in logical row-major order over the data dimensions;
// adjacent dimensions are merged if the layout allows it.
struct SampleView {
  static constexpr int kMaxDims = 12;
  void* data = nullptr;  // null: an absent input reads as zeros, an unwanted output is dropped
  int64_t row_stride = 0;
  int dims = 0;
  bool dense = true;  // element i lies at offset i
  int64_t size[kMaxDims] = {};
  int64_t stride[kMaxDims] = {};
};

}  // namespace dxmi
