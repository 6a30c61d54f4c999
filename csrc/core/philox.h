// Philox4x32-10, the counter-based generator of Salmon et al., "Parallel random numbers: as easy as
// 1, 2, 3" (SC 2011), and the counter layout of this package's noise. Torch-free, host and device.
#pragma once

#include "lane.h"

namespace dxmi {

// The address of one draw of noise: the int64 pair (seed, draw) of the Python key, each reduced as
// specified by the noise format.
struct NoiseKey {
  uint32_t seed_low;
  uint32_t seed_high;
  uint32_t draw;
};

DXMI_CORE NoiseKey noise_key(int64_t seed, int64_t draw) {
  const uint64_t s = static_cast<uint64_t>(seed);
  return {static_cast<uint32_t>(s), static_cast<uint32_t>(s >> 32), static_cast<uint32_t>(draw)};
}

// Replaces the counter words x[0..3] by the generator's output for the key words (k0, k1). `ways`
// consecutive counters are processed together, because a single one would wait for its own products.
template <class L, int ways = 1>
DXMI_CORE void philox4x32_10(typename L::U* x, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < 4 * ways; i += 4) {
      typename L::U hi0, lo0, hi1, lo1;
      L::mul_wide(x[i], 0xD2511F53u, hi0, lo0);
      L::mul_wide(x[i + 2], 0xCD9E8D57u, hi1, lo1);
      x[i] = hi1 ^ x[i + 1] ^ k0;
      x[i + 1] = lo1;
      x[i + 2] = hi0 ^ x[i + 3] ^ k1;
      x[i + 3] = lo0;
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// The counter of elements 4 * group .. 4 * group + 3 of one row at one step. `sample` is the global row
// (sample_offset + n). This layout is part of the format of saved runs.
template <class L>
DXMI_CORE void noise_counter(const NoiseKey& key, typename L::U group, typename L::U sample,
                             typename L::U timestep, typename L::U words[4]) {
  words[0] = group;
  words[1] = sample;
  words[2] = timestep;
  words[3] = typename L::U{} + key.draw;
}

// The four words of that counter's elements.
template <class L>
DXMI_CORE void noise_words(const NoiseKey& key, typename L::U group, typename L::U sample,
                           typename L::U timestep, typename L::U words[4]) {
  noise_counter<L>(key, group, sample, timestep, words);
  philox4x32_10<L>(words, key.seed_low, key.seed_high);
}

}  // namespace dxmi
