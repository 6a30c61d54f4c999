// All that csrc/cpu uses of torch, for builds without it.
#pragma once

#include <cstdint>

namespace torch::stable {

template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t /*grain*/, const F& f) {
  if (begin < end) f(begin, end);
}

}  // namespace torch::stable
