// Conversion of checked torch tensors to operands, and the tensors that ops return.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "operands.h"

namespace dxmi {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype dtype_of(const Tensor& samples) {
  switch (samples.scalar_type()) {
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    case ScalarType::Half: return Dtype::kFloat16;
    case ScalarType::Double: return Dtype::kFloat64;
    default: return Dtype::kFloat32;
  }
}

inline bool is_float64(const Tensor& t) { return t.scalar_type() == ScalarType::Double; }

// D, the product of the data dimensions.
inline int64_t data_size(const Tensor& samples) {
  int64_t size = 1;
  for (int64_t i = 1; i < samples.dim(); ++i) size *= samples.size(i);
  return size;
}

inline Vector<const int64_t> ints(const Tensor& t) {
  return {static_cast<const int64_t*>(t.data_ptr()), t.stride(0)};
}

// The operand of a vector or a scalar.
inline AnyVector floats(const Tensor& t) { return {t.data_ptr(), t.dim() == 0 ? 0 : t.stride(0)}; }

// --- the tensors that ops return ----------------------------------------------------------------------------

inline Tensor new_vector(const Tensor& like, int64_t length) {
  return torch::stable::new_empty(like, std::vector<int64_t>{length});
}

inline Tensor new_scalar(const Tensor& like) {
  return torch::stable::new_empty(like, std::vector<int64_t>{});
}

// A gradient that is not wanted is returned as an empty tensor.
inline Tensor new_sample_gradient(const Tensor& samples, bool wanted) {
  return wanted ? torch::stable::empty_like(samples) : new_vector(samples, 0);
}

inline Tensor new_vector_gradient(const Tensor& vector, bool wanted) {
  return new_vector(vector, wanted ? vector.size(0) : 0);
}

}  // namespace dxmi
