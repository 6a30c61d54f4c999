// The CPU kernels, compiled once per instruction set: DXMI_VARIANT names the variant.
// The math is in core/; this file has the loops over packs of 16 elements.
#include "simd.h"

#include <tuple>
#include <type_traits>

namespace dxmi::cpu {
namespace {

template <class T>
using Policy = std::conditional_t<std::is_same_v<T, double>, Simd64, Simd>;

// Registers of a pack.
template <class L>
inline constexpr int kRegisters = kPack / L::width;

// One value per lane, in registers.
template <class L>
struct PackRegisters {
  typename L::F at[kRegisters<L>] = {};

  template <class R>
  void store(R* out) const {
    for (int r = 0; r < kRegisters<L>; ++r) L::store(out + r * L::width, at[r]);
  }
};

// Sets register r of running sums, in the first n lanes of the pack: lanes beyond a row's end keep theirs.
template <class L>
DXMI_CORE void set_sums(PackRegisters<L>& sums, int r, int64_t n, typename L::F value) {
  if (n < kPack) {
    typename L::F lane = {};
    for (int i = 0; i < L::width; ++i) lane[i] = static_cast<float>(r * L::width + i);
    value = lane < L::of(static_cast<float>(n)) ? value : sums.at[r];
  }
  sums.at[r] = value;
}

template <class L, class R>
DXMI_CORE PackRegisters<L> load_lanes(const LaneTransitions<R>& lanes, const R (&values)[kPack]) {
  PackRegisters<L> registers;
  for (int r = 0; r < kRegisters<L>; ++r)
    registers.at[r] = lanes.one_row ? L::of(values[0]) : L::load(values + r * L::width);
  return registers;
}

// The transitions of the lanes of each register.
template <class L, class R>
struct TransitionRegisters {
  Transition<typename L::F> at[kRegisters<L>];

  explicit TransitionRegisters(const LaneTransitions<R>& lanes) {
    const PackRegisters<L> sample_coef = load_lanes<L>(lanes, lanes.sample_coef);
    const PackRegisters<L> output_coef = load_lanes<L>(lanes, lanes.output_coef);
    const PackRegisters<L> std = load_lanes<L>(lanes, lanes.std);
    for (int r = 0; r < kRegisters<L>; ++r)
      at[r] = {sample_coef.at[r], output_coef.at[r], std.at[r]};
  }
};

// The tail of an operand, padded with zeros to a full pack.
template <class T>
struct TailPack {
  std::remove_const_t<T> values[kPack] = {};
  T* source;
  int64_t n;

  TailPack(T* p, int64_t count) : source(p), n(count) {
    __builtin_memcpy(values, p, n * sizeof(T));
  }
  void write_back() const {
    if constexpr (!std::is_const_v<T>) __builtin_memcpy(source, values, n * sizeof(T));
  }
};

// pack(16, operands + i ...) for i = 0, 16, 32 ..; the tail on copies, with its length. Results for the
// padding must not enter sums: an infinite coefficient turns zeros into NaN.
template <class Pack, class... T>
DXMI_CORE void for_packs(int64_t n, const Pack& pack, T*... operands) {
  int64_t i = 0;
  for (; i + kPack <= n; i += kPack) pack(kPack, (operands + i)...);
  if (i < n) {
    std::tuple<TailPack<T>...> tail{TailPack<T>(operands + i, n - i)...};
    std::apply([&](auto&... t) { pack(n - i, t.values...); }, tail);
    std::apply([](const auto&... t) { (t.write_back(), ...); }, tail);
  }
}

// body(offset, r) for each register r of a pack, unrolled so that sums stay in registers.
template <class L, class Body>
DXMI_CORE void for_registers(const Body& body) {
#pragma GCC unroll 16
  for (int r = 0; r < kRegisters<L>; ++r) body(r * L::width, r);
}

// The counters of a register's lanes: consecutive groups of consecutive rows, starting at (row,
// group), which is advanced past them.
DXMI_CORE void next_counters(const NoiseBlock& block, const Simd::U& lane_group, int64_t& row,
                             int64_t& group, Simd::U words[4]) {
  using L = Simd;
  L::U groups, samples, timesteps;
  if (group + L::width <= block.groups || block.rows == 1) {
    groups = static_cast<uint32_t>(block.first_group + group) + lane_group;
    samples = L::U{} + static_cast<uint32_t>(block.first_sample + row);
    timesteps = L::U{} + static_cast<uint32_t>(block.timestep[row]);
    group += L::width;
    if (group == block.groups) {
      group = 0;
      ++row;
    }
  } else {
    uint32_t counters[3][L::width] = {};
    for (int i = 0; i < L::width && row < block.rows; ++i) {
      counters[0][i] = static_cast<uint32_t>(block.first_group + group);
      counters[1][i] = static_cast<uint32_t>(block.first_sample + row);
      counters[2][i] = static_cast<uint32_t>(block.timestep[row]);
      if (++group == block.groups) {
        group = 0;
        ++row;
      }
    }
    for (int p = 0; p < L::width; ++p) {
      groups[p] = counters[0][L::lane_group(p)];
      samples[p] = counters[1][L::lane_group(p)];
      timesteps[p] = counters[2][L::lane_group(p)];
    }
  }
  noise_counter<L>(block.key, groups, samples, timesteps, words);
}

void noise_in_order(const NoiseBlock& block, const Prefetch& prefetch, float* z) {
  using L = Simd;
  const int64_t total = block.rows * block.groups;
  L::U lane_group;
  for (int p = 0; p < L::width; ++p) lane_group[p] = L::lane_group(p);

  int64_t row = 0, group = 0, done = 0;
  const auto fill = [&](auto ways_tag) {
    constexpr int ways = decltype(ways_tag)::value;
    for (int o = 0; o < prefetch.count; ++o)
      for (int64_t b = 0; b < prefetch.bytes * ways * L::width; b += 64)
        __builtin_prefetch(prefetch.data[o] + prefetch.bytes * done + b);
    L::U words[4 * ways];
#pragma GCC unroll 2
    for (int w = 0; w < ways; ++w) next_counters(block, lane_group, row, group, words + 4 * w);
    philox4x32_10<L, ways>(words, block.key.seed_low, block.key.seed_high);
#pragma GCC unroll 2
    for (int w = 0; w < ways; ++w, done += L::width) {
      L::F normals[4];
      box_muller<L>(words + 4 * w, normals);
      L::store_groups(z + 4 * done, normals);
    }
  };
  while (done + L::width < total) fill(std::integral_constant<int, 2>{});
  if (done < total) fill(std::integral_constant<int, 1>{});
}

void noise_across(const NoiseBlock& block, float* z) {
  using L = Simd;
  uint32_t samples[kPack], timesteps[kPack];
  for (int64_t i = 0; i < kPack; ++i) {
    const int64_t row = i < block.rows ? i : block.rows - 1;
    samples[i] = static_cast<uint32_t>(block.first_sample + row);
    timesteps[i] = static_cast<uint32_t>(block.timestep[row]);
  }
  for (int64_t group = 0; group < block.groups; ++group) {
    for (int i = 0; i < kPack; i += L::width) {
      L::U words[4];
      L::F normals[4];
      noise_words<L>(block.key, L::U{} + static_cast<uint32_t>(block.first_group + group),
                     load_as<L::U>(samples + i), load_as<L::U>(timesteps + i), words);
      box_muller<L>(words, normals);
      for (int e = 0; e < 4; ++e) L::store(z + kPack * (4 * group + e) + i, normals[e]);
    }
  }
}

template <class T>
void normal(int64_t n, const float* z, T* out) {
  using L = Policy<T>;
  for_packs(
      n,
      [](int64_t, const float* zs, T* outs) {
        for_registers<L>([&](int i, int) { L::store(outs + i, L::load(zs + i)); });
      },
      z, out);
}

template <class T>
void sampler_step_fwd(int64_t n, const LaneTransitions<ComputeType<T>>& lanes, const T* sample,
                      const T* output, const float* z, T* next, LaneSums<ComputeType<T>>* sums) {
  using L = Policy<T>;
  const TransitionRegisters<L, ComputeType<T>> transition(lanes);
  PackRegisters<L> noise_sq, displacement_sq;
  for_packs(
      n,
      [&](int64_t count, const T* x, const T* o, const float* zs, T* y) {
        for_registers<L>([&](int i, int r) {
          typename L::F noise = noise_sq.at[r], displacement = displacement_sq.at[r];
          L::store(y + i, dxmi::step<L>(transition.at[r], L::load(x + i), L::load(o + i),
                                        L::load(zs + i), noise, displacement));
          set_sums(noise_sq, r, count, noise);
          set_sums(displacement_sq, r, count, displacement);
        });
      },
      sample, output, z, next);
  noise_sq.store(sums[0]);
  displacement_sq.store(sums[1]);
}

template <class T>
void sampler_step_bwd(int64_t n, const LaneTransitions<ComputeType<T>>& lanes, const T* sample,
                      const T* output, const float* z, const T* grad_next, T* grad_sample,
                      T* grad_output, LaneSums<ComputeType<T>>* sums) {
  using L = Policy<T>;
  const TransitionRegisters<L, ComputeType<T>> transition(lanes);
  const PackRegisters<L> grad_displacement_sq = load_lanes<L>(lanes, lanes.grad_displacement_sq);
  PackRegisters<L> grad_std;
  for_packs(
      n,
      [&](int64_t count, const T* x, const T* o, const float* zs, const T* gy, T* gx, T* go) {
        for_registers<L>([&](int i, int r) {
          typename L::F grad_x, grad_o, sum = grad_std.at[r];
          dxmi::step_grad<L>(transition.at[r], L::load(x + i), L::load(o + i), L::load(zs + i),
                             L::load(gy + i), grad_displacement_sq.at[r], grad_x, grad_o, sum);
          set_sums(grad_std, r, count, sum);
          L::store(gx + i, grad_x);
          L::store(go + i, grad_o);
        });
      },
      sample, output, z, grad_next, grad_sample, grad_output);
  grad_std.store(sums[0]);
}

template <class T>
void transition_log_prob_fwd(int64_t n, const LaneTransitions<ComputeType<T>>& lanes, const T* next,
                             const T* sample, const T* output, LaneSums<ComputeType<T>>* sums) {
  using L = Policy<T>;
  const TransitionRegisters<L, ComputeType<T>> transition(lanes);
  const PackRegisters<L> inverse_std = load_lanes<L>(lanes, lanes.inverse_std);
  PackRegisters<L> noise_sq;
  for_packs(
      n,
      [&](int64_t count, const T* y, const T* x, const T* o) {
        for_registers<L>([&](int i, int r) {
          const typename L::F z = dxmi::standardized<L>(
              transition.at[r], inverse_std.at[r], L::load(y + i), L::load(x + i), L::load(o + i));
          set_sums(noise_sq, r, count, L::fma(z, z, noise_sq.at[r]));
        });
      },
      next, sample, output);
  noise_sq.store(sums[0]);
}

template <class T>
void transition_log_prob_bwd(int64_t n, const LaneTransitions<ComputeType<T>>& lanes, const T* next,
                             const T* sample, const T* output, T* grad_next, T* grad_sample,
                             T* grad_output, LaneSums<ComputeType<T>>* sums) {
  using L = Policy<T>;
  const TransitionRegisters<L, ComputeType<T>> transition(lanes);
  const PackRegisters<L> inverse_std = load_lanes<L>(lanes, lanes.inverse_std),
                         grad_scale = load_lanes<L>(lanes, lanes.grad_scale);
  PackRegisters<L> noise_sq;
  for_packs(
      n,
      [&](int64_t count, const T* y, const T* x, const T* o, T* gy, T* gx, T* go) {
        for_registers<L>([&](int i, int r) {
          const typename L::F z = dxmi::standardized<L>(
              transition.at[r], inverse_std.at[r], L::load(y + i), L::load(x + i), L::load(o + i));
          typename L::F grad_y, grad_x, grad_o;
          dxmi::log_prob_grad<L>(transition.at[r], z, grad_scale.at[r], grad_y, grad_x, grad_o);
          set_sums(noise_sq, r, count, L::fma(z, z, noise_sq.at[r]));
          L::store(gy + i, grad_y);
          L::store(gx + i, grad_x);
          L::store(go + i, grad_o);
        });
      },
      next, sample, output, grad_next, grad_sample, grad_output);
  noise_sq.store(sums[0]);
}

template <class T>
constexpr SampleKernels<T> sample_kernels() {
  return {normal<T>, sampler_step_fwd<T>, sampler_step_bwd<T>, transition_log_prob_fwd<T>,
          transition_log_prob_bwd<T>};
}

}  // namespace

#define DXMI_NAME2(variant) kernels_##variant
#define DXMI_NAME(variant) DXMI_NAME2(variant)
#define DXMI_TEXT2(variant) #variant
#define DXMI_TEXT(variant) DXMI_TEXT2(variant)

extern const Kernels DXMI_NAME(DXMI_VARIANT);
const Kernels DXMI_NAME(DXMI_VARIANT) = {
    DXMI_TEXT(DXMI_VARIANT),
    noise_in_order,
    noise_across,
    sample_kernels<float>(),
    sample_kernels<BFloat16>(),
    sample_kernels<Half>(),
    sample_kernels<double>(),
};

}  // namespace dxmi::cpu
