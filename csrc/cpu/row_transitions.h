// The transition of each row, looked up in the tables at its timestep.
#pragma once

#include <vector>

#include "../ops/transition.h"
#include "tiles.h"

namespace dxmi::cpu {

// R is the type of the tables.
template <class R>
class RowTransitions {
 public:
  explicit RowTransitions(const TransitionInputs& a)
      : timestep_(a.timestep),
        sample_coef_(a.sample_coef.as<const R>()),
        output_coef_(a.output_coef.as<const R>()),
        log_std_(a.log_std.as<const R>()) {
    for (int64_t t = 0; t < a.steps; ++t) std_.push_back(dxmi::exp(log_std_[t]));
  }
  R log_std(int64_t row) const { return log_std_[timestep_[row]]; }
  R std(int64_t row) const { return std_[static_cast<size_t>(timestep_[row])]; }
  R inverse_std(int64_t row) const { return dxmi::exp(-log_std(row)); }

  void read(const Tile& tile, LaneTransitions<R>& lanes) const {
    lanes.one_row = tile.lanes == 1;
    set_lanes(tile, lanes.sample_coef, [&](int64_t row) { return sample_coef_[timestep_[row]]; });
    set_lanes(tile, lanes.output_coef, [&](int64_t row) { return output_coef_[timestep_[row]]; });
    set_lanes(tile, lanes.std, [&](int64_t row) { return std(row); });
  }

 private:
  Vector<const int64_t> timestep_;
  Vector<const R> sample_coef_, output_coef_, log_std_;
  std::vector<R> std_;
};

}  // namespace dxmi::cpu
