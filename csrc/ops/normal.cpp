// normal_: schema, checks and entry.
#include "normal.h"

#include "checks.h"
#include "registration.h"

namespace dxmi {
namespace {

void normal_(Tensor out, Tensor key, int64_t timestep, int64_t sample_offset) {
  const Checks check("normal", "key", key);
  check.samples("out", out);
  if (timestep < 0 || timestep >= (int64_t{1} << 32))
    check.fail("timestep", "must be in 0..2**32 - 1, got ", timestep);
  const int64_t rows = out.size(0), dim = data_size(out);
  check.noise_range("shape", rows, dim, sample_offset);
  Device device(key);
  loops::normal_(device, {dtype_of(out), rows, dim, check.key(key), timestep, sample_offset,
                          check.view("out", out)});
}

}  // namespace
}  // namespace dxmi

DXMI_SCHEMAS(m) {
  m.def("normal_(Tensor(a!) out, Tensor key, int timestep, int sample_offset) -> ()");
}
DXMI_IMPLEMENTATIONS(m) { m.impl("normal_", TORCH_BOX(&dxmi::normal_)); }
