// What the entries hand to a backend: plain structs over checked memory, without torch.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define DXMI_HOST_DEVICE __host__ __device__
#else
#define DXMI_HOST_DEVICE
#endif

namespace dxmi {

enum class Dtype { kFloat32, kBFloat16, kFloat16, kFloat64 };

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// The compiler's own float16, for conversions on the CPU. GCC 12 knows _Float16 in C++ on x86 alone.
#if !defined(__CUDACC__)
#ifdef __aarch64__
using NativeHalf = __fp16;
#else
using NativeHalf = _Float16;
#endif
#endif

// body(T{}) for the sample type T that a dtype stands for.
template <class Body>
void with_dtype(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::kFloat32: return body(float{});
    case Dtype::kBFloat16: return body(BFloat16{});
    case Dtype::kFloat16: return body(Half{});
    case Dtype::kFloat64: return body(double{});
  }
}

// body(R{}) for row results of float64 or float32.
template <class Body>
void with_rows(bool wide, const Body& body) {
  wide ? body(double{}) : body(float{});
}

// One value a row, or one a timestep; `stride` is in elements and may be 0.
template <class T>
struct Vector {
  T* data;
  int64_t stride;
  DXMI_HOST_DEVICE T& operator[](int64_t i) const { return data[i * stride]; }
};

// A Vector of float or double: which one, the samples' dtype says.
struct AnyVector {
  void* data;
  int64_t stride;
  template <class R>
  DXMI_HOST_DEVICE Vector<R> as() const {
    return {static_cast<R*>(data), stride};
  }
};

// A sample-shaped tensor [N, *]: element i of a row counts in logical row-major order over the data
// dimensions, whose neighbours are merged where the memory allows.
struct View {
  static constexpr int kMaxDims = 12;
  void* data = nullptr;  // null: an absent input reads as zeros, an unwanted output is dropped
  int64_t row_stride = 0;
  int dims = 0;
  bool dense = true;  // element i lies at offset i
  int64_t size[kMaxDims] = {};
  int64_t stride[kMaxDims] = {};
};

struct NormalProblem {
  Dtype dtype;
  int64_t rows, dim;
  Vector<const int64_t> key;
  int64_t timestep, sample_offset;
  View out;
};

// The inputs that sampler_step and transition_log_prob share, forward and backward.
struct TransitionProblem {
  Dtype dtype;
  int64_t rows, dim, steps;
  View sample, output;
  Vector<const int64_t> timestep;
  AnyVector sample_coef, output_coef, log_std;
};

struct StepProblem : TransitionProblem {
  Vector<const int64_t> key;
  int64_t sample_offset;
};

struct StepResult {
  View next;
  AnyVector log_prob, sq_displacement;
};

struct StepGradients {
  View grad_next;                                 // may be absent
  AnyVector grad_log_prob, grad_sq_displacement;  // data may be null
  View grad_sample, grad_output;                  // may be unwanted
  AnyVector grad_log_std;                         // [T]; data may be null
};

struct LogProbProblem : TransitionProblem {
  View next;
};

struct LogProbGradients {
  AnyVector grad_log_prob;
  View grad_next, grad_sample, grad_output;  // may be unwanted
  AnyVector grad_log_std;                    // [T]; data may be null
};

// running_cost and td_target; rows are float64 if `wide`.
struct CostProblem {
  bool wide;
  int64_t rows, steps;
  Vector<const int64_t> timestep;
  AnyVector sq_displacement, log_std, velocity_var;
  double tau_entropy, tau_velocity;
  int64_t skip_last;
};

struct CostGradients {
  AnyVector grad;                                // [N]
  AnyVector grad_sq_displacement, grad_log_std;  // [N], [T]; data may be null
};

struct EnergyProblem {
  bool wide;
  int64_t data_rows, sample_rows;
  AnyVector energy_data, energy_sample;
  double gamma;
};

struct VelocityProblem {
  bool wide;
  int64_t steps, rows;
  AnyVector velocity_var;  // [T], in place
  void* sq_displacement;   // [T, B]
  int64_t step_stride, row_stride;
  double decay;
};

}  // namespace dxmi
