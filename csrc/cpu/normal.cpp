// normal_ on the CPU.
#include "../ops/normal.h"

#include "noise.h"

namespace dxmi::loops {

using namespace cpu;

void normal_(Device&, const NormalArguments& a) {
  if (a.dim == 0) return;
  with_sample_type(a.dtype, [&](auto tag) {
    using T = decltype(tag);
    for_tiles(a.rows, a.dim, [&] {
      return [noise = Noise(a.key, a.sample_offset, {&a.timestep, 0}, a.rows),
              out = Output<T>(a.out)](const Tile& tile) mutable {
        const float* z = noise.at<T>(tile, out);
        kernels().of<T>().normal(tile.lanes * tile.n, z, out.at(tile));
        out.done(tile);
      };
    });
  });
}

}  // namespace dxmi::loops
