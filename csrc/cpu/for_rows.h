// Loops over rows that have one value each.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>

namespace dxmi::cpu {

// f(n) in parallel for n in 0..rows - 1.
template <class F>
void for_rows(int64_t rows, const F& f) {
  constexpr int64_t rows_per_thread = 16384;  // fewer do not justify another thread
  torch::stable::parallel_for(0, rows, rows_per_thread, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) f(n);
  });
}

}  // namespace dxmi::cpu
