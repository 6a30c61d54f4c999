// The noise of tiles.
#pragma once

#include <algorithm>

#include "tiles.h"
#include "variants.h"

namespace dxmi::cpu {

// The normals of a tile and of as many whole rows after it as scratch holds.
class Noise {
 public:
  Noise(Vector<const int64_t> key, int64_t sample_offset, Vector<const int64_t> timestep,
        int64_t rows)
      : key_(noise_key(key[0], key[1])),
        sample_offset_(sample_offset),
        timestep_(timestep),
        rows_(rows) {}

  // `operands` of the same elements are prefetched meanwhile, because the hardware prefetcher does not follow them
  // from one segment to the next.
  template <class T, class... Operands>
  const float* at(const Tile& tile, const Operands&... operands) {
    const int64_t groups = (tile.n + 3) / 4;
    if (first_ <= tile.row && tile.row < end_ && tile.start == 0)
      return z_ + 4 * groups * (tile.row - first_);
    const bool whole = tile.lanes == 1 && tile.start == 0;
    first_ = tile.row;
    end_ = first_ + (whole ? std::min(kSegment / (4 * groups), rows_ - first_) : 0);
    const NoiseBlock block{key_,
                           sample_offset_ + first_,
                           {timestep_.data + first_ * timestep_.stride, timestep_.stride},
                           whole ? end_ - first_ : tile.rows,
                           tile.start / 4,
                           groups};
    if (tile.lanes > 1) {
      kernels().noise_across(block, z_);
    } else {
      Prefetch prefetch{{}, 0, 4 * sizeof(T)};
      for (const SampleView* view : {&operands.view...})
        if (const T* p = in_place<const T>(*view, tile))
          prefetch.data[prefetch.count++] = reinterpret_cast<const char*>(p);
      kernels().noise_in_order(block, prefetch, z_);
    }
    return z_;
  }

  // For kernels whose result does not depend on the noise.
  const float* zeros() {
    std::fill_n(z_, kSegment, 0.0f);
    return z_;
  }

 private:
  NoiseKey key_;
  int64_t sample_offset_;
  Vector<const int64_t> timestep_;
  int64_t rows_;
  int64_t first_ = 0, end_ = 0;  // the rows whose noise is available
  alignas(64) float z_[kSegment];
};

}  // namespace dxmi::cpu
