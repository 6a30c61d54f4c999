// Checks of the tensors that Python passes to an op. Every message names the op, the argument, the requirement and
// the value.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

#include "tensors.h"

namespace dxmi {

std::string to_text(const Tensor& t);  // its shape
std::string to_text(ScalarType type);

// The checks of one call. `lead` is the argument whose device the others must share.
class Checks {
 public:
  Checks(const char* op, const char* lead_name, const Tensor& lead);

  template <class... Parts>
  [[noreturn]] void fail(const char* argument, const Parts&... parts) const {
    std::ostringstream text;
    text << "dxmi_ext.ops." << op_ << ": " << argument << " ";
    ((text << parts), ...);
    throw std::runtime_error(text.str());
  }

  void device(const char* name, const Tensor& t) const;
  void dtype(const char* name, const Tensor& t, ScalarType want, const char* like = nullptr) const;
  // float32 or float64.
  void vector_type(const char* name, const Tensor& t) const;

  // A sample-shaped tensor [N, *] of a sample dtype.
  void samples(const char* name, const Tensor& t) const;
  // The device, dtype and shape of `other`.
  void same(const char* name, const Tensor& t, const char* other_name, const Tensor& other) const;
  // [length], where the length is that of the dimension `meaning`.
  void vector(const char* name, const Tensor& t, ScalarType type, int64_t length,
              const char* meaning) const;
  // A vector of any length.
  void vector(const char* name, const Tensor& t, ScalarType type, const char* meaning) const;
  // A table over timesteps, [T] with T > 0, for a given T or any, which is returned.
  void table(const char* name, const Tensor& t, ScalarType type, int64_t steps) const;
  int64_t table(const char* name, const Tensor& t, ScalarType type) const;

  // int64 [N]. The values are checked if the host can read them.
  Vector<const int64_t> timesteps(const Tensor& t, int64_t rows, int64_t steps) const;
  Vector<const int64_t> key(const Tensor& t) const;
  // The noise format counts rows and groups of four elements in 32 bits; beyond that, noise would repeat.
  void noise_range(const char* name, int64_t rows, int64_t dim, int64_t sample_offset) const;

  // The memory layout of a sample-shaped tensor; adjacent dimensions are merged.
  SampleView view(const char* name, const Tensor& t) const;

 private:
  void defined(const char* name, const Tensor& t) const;

  const char* op_;
  const char* lead_name_;
  const Tensor& lead_;
  int32_t device_index_;  // of lead
};

}  // namespace dxmi
