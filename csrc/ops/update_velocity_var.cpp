// update_velocity_var_: schema, checks and entry.
#include "update_velocity_var.h"

#include "checks.h"
#include "registration.h"

namespace dxmi {
namespace {

// Whether the address ranges of two tensors overlap. Strides are never negative.
bool overlap(const Tensor& a, const Tensor& b) {
  const auto begin = [](const Tensor& t) { return static_cast<const char*>(t.data_ptr()); };
  const auto end = [&](const Tensor& t) {
    int64_t last = 0;
    for (int64_t i = 0; i < t.dim(); ++i) last += (t.size(i) - 1) * t.stride(i);
    return begin(t) + (last + 1) * static_cast<int64_t>(t.element_size());
  };
  return begin(a) < end(b) && begin(b) < end(a);
}

void update_velocity_var_(Tensor velocity_var, Tensor sq_displacement, double decay) {
  const Checks check("update_velocity_var_", "velocity_var", velocity_var);
  check.vector_type("velocity_var", velocity_var);
  const ScalarType type = velocity_var.scalar_type();
  const int64_t steps = check.table("velocity_var", velocity_var, type);
  if (steps > 1 && velocity_var.stride(0) == 0)
    check.fail("velocity_var",
               "must not be expanded, since it is written in place, got stride 0; pass a clone");
  check.device("sq_displacement", sq_displacement);
  check.dtype("sq_displacement", sq_displacement, type, "velocity_var");
  if (sq_displacement.dim() != 2 || sq_displacement.size(0) != steps ||
      sq_displacement.size(1) == 0)
    check.fail("sq_displacement", "must have shape [", steps, ", B] with B > 0, got ",
               to_text(sq_displacement));
  if (!(decay >= 0 && decay <= 1)) check.fail("decay", "must be in [0, 1], got ", decay);
  // The means are those of sq_displacement before the update, even if it is a view of the same memory.
  if (overlap(velocity_var, sq_displacement))
    sq_displacement = torch::stable::clone(sq_displacement);
  Device device(velocity_var);
  loops::update_velocity_var_(
      device,
      {is_float64(velocity_var), steps, sq_displacement.size(1), floats(velocity_var),
       sq_displacement.data_ptr(), sq_displacement.stride(0), sq_displacement.stride(1), decay});
}

}  // namespace
}  // namespace dxmi

DXMI_SCHEMAS(m) {
  m.def("update_velocity_var_(Tensor(a!) velocity_var, Tensor sq_displacement, float decay) -> ()");
}
DXMI_IMPLEMENTATIONS(m) { m.impl("update_velocity_var_", TORCH_BOX(&dxmi::update_velocity_var_)); }
