// philox: the bare generator, for tests against its known answers. Maps rows of four counter words to rows of four
// outputs, on the CPU only.
#include "../core/philox.h"

#include "checks.h"
#include "registration.h"

namespace dxmi {
namespace {

Tensor philox(Tensor counters, int64_t key0, int64_t key1) {
  const Checks check("philox", "counters", counters);
  if (counters.dim() != 2 || counters.size(1) != 4 || counters.scalar_type() != ScalarType::Long ||
      !counters.is_contiguous())
    check.fail("counters", "must be contiguous int64 [N, 4], got ", to_text(counters.scalar_type()),
               " ", to_text(counters));
  Tensor result = torch::stable::empty_like(counters);
  const int64_t* in = static_cast<const int64_t*>(counters.data_ptr());
  int64_t* out = static_cast<int64_t*>(result.data_ptr());
  for (int64_t n = 0; n < counters.size(0); ++n, in += 4, out += 4) {
    uint32_t x[4];
    for (int i = 0; i < 4; ++i) x[i] = static_cast<uint32_t>(in[i]);
    philox4x32_10<ScalarLane>(x, static_cast<uint32_t>(key0), static_cast<uint32_t>(key1));
    for (int i = 0; i < 4; ++i) out[i] = x[i];
  }
  return result;
}

}  // namespace
}  // namespace dxmi

DXMI_SCHEMAS(m) { m.def("philox(Tensor counters, int key0, int key1) -> Tensor"); }
DXMI_IMPLEMENTATIONS(m) { m.impl("philox", TORCH_BOX(&dxmi::philox)); }
