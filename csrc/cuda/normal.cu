// normal_ on CUDA.
#include "../ops/normal.h"

#include "sample_units.h"

namespace dxmi {
namespace cuda {

template <class T, bool kVector>
DXMI_KERNEL normal_kernel(const __grid_constant__ NormalArguments a, RowLayout layout) {
  const RowSlice slice = slice_of(layout);
  const NoiseKey key = read_key(a.key);
  for (int unit = slice.first; unit < slice.count; unit += slice.stride) {
    ComputeType<T> z[kUnit<T>];
    noise<T, kVector>(key, layout, slice, unit, a.sample_offset, a.timestep, z);
    store<T, kVector>(a.out, layout, slice, unit, z);
  }
}

}  // namespace cuda

void loops::normal_(Device& device, const NormalArguments& a) {
  using namespace cuda;
  if (a.dim == 0) return;
  with_sample_type(a.dtype, [&](auto tag) {
    using T = decltype(tag);
    const RowGrid grid = row_grid<T>(a.rows, a.dim, {&a.out});
    launch("normal", device, grid.vector ? normal_kernel<T, true> : normal_kernel<T, false>,
           grid.blocks, grid.threads, a, grid.layout);
  });
}

}  // namespace dxmi
