// The one place where tensors from Python are checked. Every message names the op, the argument, what
// it got and what it wants. Header-only: the CPU and CUDA halves share it.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "problem.h"

namespace dxmi {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string to_text(const Tensor& t) {
  std::ostringstream text;
  text << "[";
  for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.size(i);
  text << "]";
  return text.str();
}

inline std::string to_text(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Long: return "int64";
    case ScalarType::Int: return "int32";
    case ScalarType::Bool: return "bool";
    default: return "torch dtype number " + std::to_string(static_cast<int>(type));
  }
}

inline std::string device_text(const Tensor& t) {
  if (t.is_cpu()) return "the CPU";
  if (t.is_cuda()) return "CUDA device " + std::to_string(t.get_device_index());
  return "another kind of device";
}

inline bool is_row_type(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Double;
}

inline Dtype dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    case ScalarType::Half: return Dtype::kFloat16;
    case ScalarType::Double: return Dtype::kFloat64;
    default: return Dtype::kFloat32;
  }
}

// The checks of one call: `lead` is the argument whose device the others must share.
class Checks {
 public:
  Checks(const char* op, const char* lead_name, const Tensor& lead, bool on_cuda)
      : op_(op), lead_name_(lead_name), lead_(lead) {
    defined(lead_name, lead);
    if (on_cuda ? !lead.is_cuda() : !lead.is_cpu())
      fail(lead_name, std::string("must be on ") + (on_cuda ? "a CUDA device" : "the CPU") +
                          " like the other arguments, got " + device_text(lead));
  }

  template <class... Parts>
  [[noreturn]] void fail(const char* argument, const Parts&... parts) const {
    std::ostringstream text;
    text << "dxmi_ext.ops." << op_ << ": " << argument << " ";
    ((text << parts), ...);
    throw std::runtime_error(text.str());
  }

  void device(const char* name, const Tensor& t) const {
    defined(name, t);
    if (t.is_cpu() != lead_.is_cpu() || t.get_device_index() != lead_.get_device_index())
      fail(name, "must be on ", device_text(lead_), " like ", lead_name_, ", got ", device_text(t));
  }

  void dtype(const char* name, const Tensor& t, ScalarType want, const char* other) const {
    if (t.scalar_type() != want)
      fail(name, "must be ", to_text(want), other ? std::string(" like ") + other : std::string(),
           ", got ", to_text(t.scalar_type()));
  }

  // A sample-shaped tensor [N, *] of a sample dtype.
  void samples(const char* name, const Tensor& t) const {
    device(name, t);
    const ScalarType type = t.scalar_type();
    if (!is_row_type(type) && type != ScalarType::BFloat16 && type != ScalarType::Half)
      fail(name, "must be float32, bfloat16, float16 or float64, got ", to_text(type));
    if (t.dim() < 1) fail(name, "must have a batch dimension, shape [N, *], got a scalar");
  }

  // Rows have a mean over D, so D may not be 0.
  int64_t dim_of_mean(const char* name, const Tensor& t) const {
    const int64_t dim = data_dim(t);
    if (dim == 0) fail(name, "has no elements to take a row's mean over: shape ", to_text(t));
    return dim;
  }

  void same(const char* name, const Tensor& t, const char* other_name, const Tensor& other) const {
    device(name, t);
    dtype(name, t, other.scalar_type(), other_name);
    bool equal = t.dim() == other.dim();
    for (int64_t i = 0; equal && i < t.dim(); ++i) equal = t.size(i) == other.size(i);
    if (!equal)
      fail(name, "must have the shape of ", other_name, ", ", to_text(other), ", got ", to_text(t));
  }

  // A vector with `length` values; a negative length accepts any.
  void vector(const char* name, const Tensor& t, ScalarType type, int64_t length,
              const char* meaning) const {
    device(name, t);
    dtype(name, t, type, nullptr);
    if (t.dim() != 1 || (length >= 0 && t.size(0) != length)) {
      std::ostringstream want;
      if (length >= 0) want << length;
      fail(name, "must have shape [", length >= 0 ? want.str() : std::string(meaning), "]",
           length >= 0 ? std::string(" (") + meaning + ")" : std::string(), ", got ", to_text(t));
    }
  }

  // A table over timesteps [T]; T is taken from the first one.
  int64_t table(const char* name, const Tensor& t, ScalarType type, int64_t steps = -1) const {
    vector(name, t, type, steps, "T");
    if (t.size(0) == 0) fail(name, "must have at least one timestep, got shape [0]");
    return t.size(0);
  }

  void rows_type(const char* name, const Tensor& t) const {
    if (!is_row_type(t.scalar_type()))
      fail(name, "must be float32 or float64, got ", to_text(t.scalar_type()));
  }

  Vector<const int64_t> key(const Tensor& t) const {
    vector("key", t, ScalarType::Long, 2, "seed and draw, from noise_key");
    return ints(t);
  }

  // The noise format has 32 bits for a row and for a group of four elements; beyond, noise would repeat.
  void noise_range(const char* name, int64_t rows, int64_t dim, int64_t sample_offset) const {
    constexpr int64_t range = int64_t{1} << 32;
    if (sample_offset < 0 || sample_offset > range - rows)
      fail("sample_offset", "must be in 0..2**32 - N, of N = ", rows, " rows, got ", sample_offset);
    if (dim > 4 * range) fail(name, "must have at most 2**34 elements a row, got ", dim);
  }

  int64_t skip_last(int64_t value, int64_t steps) const {
    if (value < 0 || value > steps) fail("skip_last", "must be in 0..", steps, " (T), got ", value);
    return value;
  }

  // Values of the timesteps; only for memory the host can read.
  void timestep_values(const Vector<const int64_t>& timestep, int64_t rows, int64_t steps) const {
    for (int64_t n = 0; n < rows; ++n)
      if (timestep[n] < 0 || timestep[n] >= steps)
        fail("timestep", "must be in 0..", steps - 1, ", got ", timestep[n], " in row ", n);
  }

  template <class R>
  void positive_values(const char* name, const Vector<R>& table, int64_t count) const {
    for (int64_t t = 0; t < count; ++t)
      if (!(table[t] > 0)) fail(name, "must be positive, got ", table[t], " at timestep ", t);
  }

  // A vector that is written to: its elements must not be one and the same.
  void writable(const char* name, const Tensor& t) const {
    if (t.size(0) > 1 && t.stride(0) == 0)
      fail(name, "must not be expanded, since it is written to: give a clone of it");
  }

  // Whether two tensors lie between the same addresses. Strides are never negative.
  static bool overlap(const Tensor& a, const Tensor& b) {
    const auto begin = [](const Tensor& t) { return static_cast<const char*>(t.data_ptr()); };
    const auto end = [&](const Tensor& t) {
      int64_t last = 0;
      for (int64_t i = 0; i < t.dim(); ++i) last += (t.size(i) - 1) * t.stride(i);
      return begin(t) + (last + 1) * static_cast<int64_t>(t.element_size());
    };
    return begin(a) < end(b) && begin(b) < end(a);
  }

  // The element layout of a sample-shaped tensor; adjacent dimensions are merged.
  View view(const char* name, const Tensor& t) const {
    View v;
    v.data = t.data_ptr();
    v.row_stride = t.stride(0);
    int64_t sizes[View::kMaxDims], strides[View::kMaxDims];  // innermost first
    int dims = 0;
    for (int64_t i = t.dim() - 1; i > 0; --i) {
      const int64_t size = t.size(i), stride = t.stride(i);
      if (size == 1) continue;
      if (dims > 0 && stride == strides[dims - 1] * sizes[dims - 1]) {
        sizes[dims - 1] *= size;
        continue;
      }
      if (dims == View::kMaxDims)
        fail(name, "has more than ", View::kMaxDims,
             " data dimensions that do not merge; make it "
             "contiguous");
      sizes[dims] = size;
      strides[dims++] = stride;
    }
    v.dims = dims;
    v.dense = dims == 0 || (dims == 1 && strides[0] == 1);
    for (int i = 0; i < dims; ++i) {
      v.size[i] = sizes[dims - 1 - i];
      v.stride[i] = strides[dims - 1 - i];
    }
    return v;
  }

  static int64_t data_dim(const Tensor& t) {
    int64_t dim = 1;
    for (int64_t i = 1; i < t.dim(); ++i) dim *= t.size(i);
    return dim;
  }

  static Vector<const int64_t> ints(const Tensor& t) {
    return {static_cast<const int64_t*>(t.data_ptr()), t.stride(0)};
  }

  static AnyVector values(const Tensor& t) {
    return {t.data_ptr(), t.dim() == 0 ? 0 : t.stride(0)};
  }

 private:
  void defined(const char* name, const Tensor& t) const {
    if (!t.defined()) fail(name, "must be a tensor, got None");
  }

  const char* op_;
  const char* lead_name_;
  const Tensor& lead_;
};

}  // namespace dxmi
