// The CPU kernels, compiled once per instruction set: DXMI_VARIANT names the variant.
// All math is core/'s; here are loops over packs of 16 elements.
#include "simd.h"

#include <tuple>
#include <type_traits>

namespace dxmi::cpu {
namespace {

template <class T>
using Lanes = std::conditional_t<std::is_same_v<T, double>, Simd64, Simd>;

// Sixteen running sums, added up in a fixed tree at the end.
template <class L>
struct Sum {
  typename L::F part[kPack / L::width] = {};

  double total() const {
    double lane[kPack];
    for (int i = 0; i < kPack; ++i) lane[i] = part[i / L::width][i % L::width];
    for (int width = kPack / 2; width > 0; width /= 2)
      for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
    return lane[0];
  }
};

// The tail of an operand, in a full pack. Zeros fill it up: they add nothing to any sum.
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

// pack(operands + i ...) for i = 0, 16, 32 ..; the tail on copies.
template <class Pack, class... T>
DXMI_CORE void for_packs(int64_t n, const Pack& pack, T*... operands) {
  int64_t i = 0;
  for (; i + kPack <= n; i += kPack) pack((operands + i)...);
  if (i < n) {
    std::tuple<TailPack<T>...> tail{TailPack<T>(operands + i, n - i)...};
    std::apply([&](auto&... t) { pack(t.values...); }, tail);
    std::apply([](const auto&... t) { (t.write_back(), ...); }, tail);
  }
}

// body(offset, r) for each register r of a pack, unrolled so that sums stay in registers.
template <class L, class Body>
DXMI_CORE void for_registers(const Body& body) {
#pragma GCC unroll 16
  for (int r = 0; r < kPack / L::width; ++r) body(r * L::width, r);
}

void fill_normals(const NoiseBlock& block, float* z) {
  using L = Simd;
  const int64_t total = block.rows * block.groups;
  L::U lane_group;
  for (int p = 0; p < L::width; ++p) lane_group[p] = L::lane_group(p);

  int64_t row = 0, group = 0;  // of the first lane
  for (int64_t done = 0; done < total; done += L::width) {
    L::U groups, samples, timesteps;
    if (group + L::width <= block.groups) {
      groups = static_cast<uint32_t>(block.first_group + group) + lane_group;
      samples = L::U{} + static_cast<uint32_t>(block.first_sample + row);
      timesteps = L::U{} + static_cast<uint32_t>(block.timestep[row]);
      group += L::width;
    } else {  // short rows: several to a register
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
    if (group == block.groups) {
      group = 0;
      ++row;
    }

    L::U words[4];
    L::F normals[4];
    noise_words<L>(block.key, groups, samples, timesteps, words);
    box_muller<L>(words, normals);
    const int64_t left = total - done;
    if (left >= L::width) {
      L::store_groups(z + 4 * done, normals);
    } else {
      float tail[4 * L::width];
      L::store_groups(tail, normals);
      __builtin_memcpy(z + 4 * done, tail, 4 * left * sizeof(float));
    }
  }
}

template <class T>
void store(int64_t n, const float* z, T* out) {
  using L = Lanes<T>;
  for_packs(
      n,
      [](const float* zs, T* outs) {
        for_registers<L>([&](int i, int) { L::store(outs + i, L::load(zs + i)); });
      },
      z, out);
}

template <class T>
void step(int64_t n, const Transition<WideT<T>>& p, const T* sample, const T* output,
          const float* z, T* next, double sums[2]) {
  using L = Lanes<T>;
  Sum<L> noise_sq, displacement_sq;
  for_packs(
      n,
      [&](const T* x, const T* o, const float* zs, T* y) {
        for_registers<L>([&](int i, int r) {
          L::store(y + i, dxmi::step<L>(p, L::load(x + i), L::load(o + i), L::load(zs + i),
                                        noise_sq.part[r], displacement_sq.part[r]));
        });
      },
      sample, output, z, next);
  sums[0] = noise_sq.total();
  sums[1] = displacement_sq.total();
}

template <class T>
void step_grad(int64_t n, const Transition<WideT<T>>& p, WideT<T> grad_displacement_sq,
               const T* sample, const T* output, const float* z, const T* grad_next, T* grad_sample,
               T* grad_output, double* grad_std) {
  using L = Lanes<T>;
  Sum<L> std_sum;
  for_packs(
      n,
      [&](const T* x, const T* o, const float* zs, const T* gy, T* gx, T* go) {
        for_registers<L>([&](int i, int r) {
          typename L::F grad_x, grad_o;
          dxmi::step_grad<L>(p, L::load(x + i), L::load(o + i), L::load(zs + i), L::load(gy + i),
                             grad_displacement_sq, grad_x, grad_o, std_sum.part[r]);
          L::store(gx + i, grad_x);
          L::store(go + i, grad_o);
        });
      },
      sample, output, z, grad_next, grad_sample, grad_output);
  *grad_std = std_sum.total();
}

template <class T>
void log_prob(int64_t n, const Transition<WideT<T>>& p, WideT<T> inverse_std, const T* next,
              const T* sample, const T* output, double* noise_sq) {
  using L = Lanes<T>;
  Sum<L> sum;
  for_packs(
      n,
      [&](const T* y, const T* x, const T* o) {
        for_registers<L>([&](int i, int r) {
          const typename L::F z =
              dxmi::standardised<L>(p, inverse_std, L::load(y + i), L::load(x + i), L::load(o + i));
          sum.part[r] = L::fma(z, z, sum.part[r]);
        });
      },
      next, sample, output);
  *noise_sq = sum.total();
}

template <class T>
void log_prob_grad(int64_t n, const Transition<WideT<T>>& p, WideT<T> inverse_std, WideT<T> scale,
                   const T* next, const T* sample, const T* output, T* grad_next, T* grad_sample,
                   T* grad_output, double* noise_sq) {
  using L = Lanes<T>;
  Sum<L> sum;
  for_packs(
      n,
      [&](const T* y, const T* x, const T* o, T* gy, T* gx, T* go) {
        for_registers<L>([&](int i, int r) {
          const typename L::F z =
              dxmi::standardised<L>(p, inverse_std, L::load(y + i), L::load(x + i), L::load(o + i));
          typename L::F grad_y, grad_x, grad_o;
          dxmi::log_prob_grad<L>(p, z, scale, grad_y, grad_x, grad_o);
          sum.part[r] = L::fma(z, z, sum.part[r]);
          L::store(gy + i, grad_y);
          L::store(gx + i, grad_x);
          L::store(go + i, grad_o);
        });
      },
      next, sample, output, grad_next, grad_sample, grad_output);
  *noise_sq = sum.total();
}

template <class T>
constexpr TypedKernels<T> typed_kernels() {
  return {store<T>, step<T>, step_grad<T>, log_prob<T>, log_prob_grad<T>};
}

}  // namespace

#define DXMI_NAME2(variant) kernels_##variant
#define DXMI_NAME(variant) DXMI_NAME2(variant)
#define DXMI_TEXT2(variant) #variant
#define DXMI_TEXT(variant) DXMI_TEXT2(variant)

extern const Kernels DXMI_NAME(DXMI_VARIANT);
const Kernels DXMI_NAME(DXMI_VARIANT) = {
    DXMI_TEXT(DXMI_VARIANT),   fill_normals,          typed_kernels<float>(),
    typed_kernels<BFloat16>(), typed_kernels<Half>(), typed_kernels<double>(),
};

}  // namespace dxmi::cpu
