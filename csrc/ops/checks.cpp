// The conditions and error messages of checks.h.
#include "checks.h"

#include "device.h"

namespace dxmi {
namespace {

std::string device_text(const Tensor& t) {
  if (t.is_cpu()) return "the CPU";
  if (t.is_cuda()) return "CUDA device " + std::to_string(t.get_device_index());
  return "another kind of device";
}

bool on_device_of_this_half(const Tensor& t) { return Device::kIsCuda ? t.is_cuda() : t.is_cpu(); }

}  // namespace

std::string to_text(const Tensor& t) {
  std::ostringstream text;
  text << "[";
  for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.size(i);
  text << "]";
  return text.str();
}

std::string to_text(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Long: return "int64";
    case ScalarType::Int: return "int32";
    case ScalarType::Short: return "int16";
    case ScalarType::Char: return "int8";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Bool: return "bool";
    case ScalarType::ComplexFloat: return "complex64";
    case ScalarType::ComplexDouble: return "complex128";
    default: return "torch dtype number " + std::to_string(static_cast<int>(type));
  }
}

Checks::Checks(const char* op, const char* lead_name, const Tensor& lead)
    : op_(op), lead_name_(lead_name), lead_(lead) {
  defined(lead_name, lead);
  device_index_ = lead.get_device_index();
  if (!on_device_of_this_half(lead))
    fail(lead_name, "must be on ", Device::kIsCuda ? "a CUDA device" : "the CPU",
         " like the other arguments, got ", device_text(lead));
}

void Checks::defined(const char* name, const Tensor& t) const {
  if (!t.defined()) fail(name, "must be a tensor, got None");
}

void Checks::device(const char* name, const Tensor& t) const {
  defined(name, t);
  if (!on_device_of_this_half(t) || t.get_device_index() != device_index_)
    fail(name, "must be on ", device_text(lead_), " like ", lead_name_, ", got ", device_text(t));
}

void Checks::dtype(const char* name, const Tensor& t, ScalarType want, const char* like) const {
  if (t.scalar_type() != want)
    fail(name, "must be ", to_text(want), like ? std::string(" like ") + like : std::string(),
         ", got ", to_text(t.scalar_type()));
}

void Checks::vector_type(const char* name, const Tensor& t) const {
  const ScalarType type = t.scalar_type();
  if (type != ScalarType::Float && type != ScalarType::Double)
    fail(name, "must be float32 or float64, got ", to_text(type));
}

void Checks::samples(const char* name, const Tensor& t) const {
  device(name, t);
  switch (t.scalar_type()) {
    case ScalarType::Float:
    case ScalarType::BFloat16:
    case ScalarType::Half:
    case ScalarType::Double: break;
    default:
      fail(name, "must be float32, bfloat16, float16 or float64, got ", to_text(t.scalar_type()));
  }
  if (t.dim() < 1) fail(name, "must have shape [N, *], got a scalar");
}

void Checks::same(const char* name, const Tensor& t, const char* other_name,
                  const Tensor& other) const {
  device(name, t);
  dtype(name, t, other.scalar_type(), other_name);
  bool equal = t.dim() == other.dim();
  for (int64_t i = 0; equal && i < t.dim(); ++i) equal = t.size(i) == other.size(i);
  if (!equal)
    fail(name, "must have the shape of ", other_name, ", ", to_text(other), ", got ", to_text(t));
}

void Checks::vector(const char* name, const Tensor& t, ScalarType type, int64_t length,
                    const char* meaning) const {
  device(name, t);
  dtype(name, t, type);
  if (t.dim() != 1 || t.size(0) != length)
    fail(name, "must have shape [", length, "] (", meaning, "), got ", to_text(t));
}

void Checks::vector(const char* name, const Tensor& t, ScalarType type, const char* meaning) const {
  device(name, t);
  dtype(name, t, type);
  if (t.dim() != 1) fail(name, "must have shape [", meaning, "], got ", to_text(t));
}

void Checks::table(const char* name, const Tensor& t, ScalarType type, int64_t steps) const {
  vector(name, t, type, steps, "T");
}

int64_t Checks::table(const char* name, const Tensor& t, ScalarType type) const {
  vector(name, t, type, "T");
  if (t.size(0) == 0) fail(name, "must have at least one timestep, got shape [0]");
  return t.size(0);
}

Vector<const int64_t> Checks::timesteps(const Tensor& t, int64_t rows, int64_t steps) const {
  vector("timestep", t, ScalarType::Long, rows, "N");
  const Vector<const int64_t> timestep = ints(t);
  if constexpr (Device::kReadsValues)
    for (int64_t n = 0; n < rows; ++n)
      if (timestep[n] < 0 || timestep[n] >= steps)
        fail("timestep", "must be in 0..", steps - 1, ", got ", timestep[n], " in row ", n);
  return timestep;
}

Vector<const int64_t> Checks::key(const Tensor& t) const {
  vector("key", t, ScalarType::Long, 2, "seed and draw, from noise_key");
  return ints(t);
}

void Checks::noise_range(const char* name, int64_t rows, int64_t dim, int64_t sample_offset) const {
  constexpr int64_t range = int64_t{1} << 32;
  if (sample_offset < 0 || sample_offset > range - rows)
    fail("sample_offset", "must be in 0..2**32 - N with N = ", rows, ", got ", sample_offset);
  if (dim > 4 * range) fail(name, "must have at most 2**34 elements per row, got ", dim);
}

SampleView Checks::view(const char* name, const Tensor& t) const {
  SampleView v;
  v.data = t.data_ptr();
  v.row_stride = t.stride(0);
  int64_t sizes[SampleView::kMaxDims], strides[SampleView::kMaxDims];  // innermost first
  int dims = 0;
  for (int64_t i = t.dim() - 1; i > 0; --i) {
    const int64_t size = t.size(i), stride = t.stride(i);
    if (size == 1) continue;
    if (dims > 0 && stride == strides[dims - 1] * sizes[dims - 1]) {
      sizes[dims - 1] *= size;
      continue;
    }
    if (dims == SampleView::kMaxDims)
      fail(name, "must have at most ", SampleView::kMaxDims,
           " data dimensions that do not merge in memory, got more; make it contiguous");
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

}  // namespace dxmi
