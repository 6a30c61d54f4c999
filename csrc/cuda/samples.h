// Kernels over sample-shaped tensors. A row is worked on by a team of threads of one warp if it is short,
// by one block or, if it is long, by several. Sums run in an order that the shape alone fixes.
#pragma once

#include "device.h"

namespace dxmi::cuda {

// How rows are laid over threads. Kernels are templates over kVector: whether all tensors are dense, aligned
// for 16-byte accesses, and their rows whole units.
struct Plan {
  int64_t rows, dim;
  int64_t units;   // of a row, kUnit elements each; the last may be partial
  int team;        // threads of a short row, a power of two; 0: rows have blocks of their own
  int64_t splits;  // blocks of a long row
  int64_t units_per_split;
};

// This thread's part of a row.
struct Part {
  int64_t row;
  int64_t first, end, stride;  // its units
  bool active;                 // the row exists
};

__device__ inline Part part_of(const Plan& plan) {
  if (plan.team > 0) {
    const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    const int64_t row = thread / plan.team;
    const bool active = row < plan.rows;
    return {row, thread % plan.team, active ? plan.units : 0, plan.team, active};
  }
  const int64_t row = blockIdx.x / plan.splits, split = blockIdx.x % plan.splits;
  const int64_t first = split * plan.units_per_split;
  const int64_t end = first + plan.units_per_split;
  return {row, first + threadIdx.x, end < plan.units ? end : plan.units, blockDim.x, true};
}

// Whether this thread writes what its team or block has summed.
__device__ inline bool leads(const Plan& plan) {
  return threadIdx.x % (plan.team > 0 ? plan.team : kMaxThreads) == 0;
}

template <class R>
__device__ R row_sum(const Plan& plan, R value) {
  return plan.team > 0 ? team_sum(value, plan.team) : block_sum(value);
}

// A call, not inlined: its divisions, eight times over, would push sums out of registers.
__device__ __noinline__ int64_t offset_of(const View& view, int64_t i) {
  if (view.dense) return i;
  int64_t offset = 0;
  for (int d = view.dims - 1; d >= 0; --d) {
    offset += i % view.size[d] * view.stride[d];
    i /= view.size[d];
  }
  return offset;
}

// A unit of a row, widened; zeros beyond the row's end and for an absent tensor.
template <class T, bool kVector>
__device__ void load(const View& view, const Plan& plan, int64_t row, int64_t unit,
                     WideT<T> out[kUnit<T>]) {
  constexpr int n = kUnit<T>;
  const T* const base = static_cast<const T*>(view.data) + row * view.row_stride;
  if (view.data == nullptr) {
    for (int i = 0; i < n; ++i) out[i] = 0;
  } else if constexpr (kVector) {
    const Unit<T> values = *reinterpret_cast<const Unit<T>*>(base + unit * n);
    DXMI_UNROLL
    for (int i = 0; i < n; ++i) out[i] = widen(values.values[i]);
  } else {
    for (int i = 0; i < n; ++i)
      out[i] = unit * n + i < plan.dim ? widen(base[offset_of(view, unit * n + i)]) : WideT<T>(0);
  }
}

template <class T, bool kVector>
__device__ void store(const View& view, const Plan& plan, int64_t row, int64_t unit,
                      const WideT<T> values[kUnit<T>]) {
  constexpr int n = kUnit<T>;
  if (view.data == nullptr) return;
  T* const base = static_cast<T*>(view.data) + row * view.row_stride;
  if constexpr (kVector) {
    Unit<T> out;
    DXMI_UNROLL
    for (int i = 0; i < n; ++i) narrow(values[i], out.values[i]);
    *reinterpret_cast<Unit<T>*>(base + unit * n) = out;
  } else {
    for (int i = 0; i < n && unit * n + i < plan.dim; ++i)
      narrow(values[i], base[offset_of(view, unit * n + i)]);
  }
}

// The normals of a unit; zeros beyond the row's end, where they would enter sums.
template <class T, bool kVector>
__device__ void noise(const NoiseKey& key, const Plan& plan, int64_t unit, uint32_t sample,
                      uint32_t timestep, WideT<T> z[kUnit<T>]) {
  constexpr int n = kUnit<T>;
  DXMI_UNROLL
  for (int group = 0; group < n / 4; ++group) {
    uint32_t words[4];
    float normals[4];
    noise_words<ScalarLane>(key, static_cast<uint32_t>(unit * (n / 4) + group), sample, timestep,
                            words);
    box_muller<ScalarLane>(words, normals);
    DXMI_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int e = 4 * group + i;
      z[e] = kVector || unit * n + e < plan.dim ? normals[i] : 0.0f;
    }
  }
}

__device__ inline NoiseKey read_key(const Vector<const int64_t>& key) {
  return noise_key(key[0], key[1]);
}

// The row's timestep and transition. A timestep outside 0..T-1 makes a row of NaN rather than a read
// beyond the tables; a debug build stops at it.
template <class R>
struct RowTables {
  Transition<R> transition;
  R log_std;
  int64_t timestep;
};

template <class R>
__device__ RowTables<R> row_tables(const TransitionProblem& p, const Part& part) {
  const int64_t t = part.active ? p.timestep[part.row] : 0;
  assert(t >= 0 && t < p.steps && "dxmi_ext: timestep must be in 0..T-1");
  if (t < 0 || t >= p.steps) {
    const R nan = static_cast<R>(NAN);
    return {{nan, nan, nan}, nan, t};
  }
  const R log_std = p.log_std.as<const R>()[t];
  return {transition_at(p.sample_coef.as<const R>()[t], p.output_coef.as<const R>()[t], log_std),
          log_std, t};
}

// --- kernels -----------------------------------------------------------------------------------------------

template <class T, bool kVector>
DXMI_KERNEL normal_kernel(NormalProblem p, Plan plan) {
  const Part part = part_of(plan);
  const NoiseKey key = read_key(p.key);
  for (int64_t unit = part.first; unit < part.end; unit += part.stride) {
    WideT<T> z[kUnit<T>];
    noise<T, kVector>(key, plan, unit, static_cast<uint32_t>(p.sample_offset + part.row),
                      static_cast<uint32_t>(p.timestep), z);
    store<T, kVector>(p.out, plan, part.row, unit, z);
  }
}

// partial: [rows, splits, 2] sums and arrived: [rows] zeros, if rows are split. The last block of a row to
// arrive adds its splits up in order, so the result does not depend on which one that is.
template <class T, bool kVector>
DXMI_KERNEL step_kernel(StepProblem p, StepResult result, Plan plan, WideT<T>* partial,
                        unsigned* arrived) {
  using L = LaneOf<T>;
  using R = WideT<T>;
  constexpr int n = kUnit<T>;
  const Part part = part_of(plan);
  const RowTables<R> row = row_tables<R>(p, part);
  const NoiseKey key = read_key(p.key);
  R noise_sq = 0, displacement_sq = 0;
  for (int64_t unit = part.first; unit < part.end; unit += part.stride) {
    R x[n], output[n], z[n];
    load<T, kVector>(p.sample, plan, part.row, unit, x);
    load<T, kVector>(p.output, plan, part.row, unit, output);
    noise<T, kVector>(key, plan, unit, static_cast<uint32_t>(p.sample_offset + part.row),
                      static_cast<uint32_t>(row.timestep), z);
    DXMI_UNROLL
    for (int i = 0; i < n; ++i)
      x[i] = step<L>(row.transition, x[i], output[i], z[i], noise_sq, displacement_sq);
    store<T, kVector>(result.next, plan, part.row, unit, x);
  }
  R sums[2] = {row_sum(plan, noise_sq), row_sum(plan, displacement_sq)};
  if (!part.active || !leads(plan)) return;
  if (plan.splits > 1) {
    R* const mine = partial + 2 * blockIdx.x;
    mine[0] = sums[0];
    mine[1] = sums[1];
    __threadfence();
    if (atomicAdd(arrived + part.row, 1u) + 1 != plan.splits) return;
    __threadfence();
    sums[0] = sums[1] = 0;
    const volatile R* const all = partial + 2 * part.row * plan.splits;
    for (int64_t s = 0; s < plan.splits; ++s) {
      sums[0] += all[2 * s];
      sums[1] += all[2 * s + 1];
    }
  }
  const R dim = static_cast<R>(plan.dim);
  result.log_prob.as<R>()[part.row] = log_prob_row(sums[0], dim, row.log_std);
  result.sq_displacement.as<R>()[part.row] = sums[1] / dim;
}

// grad_std: [rows, splits] sums of the gradient of std.
template <class T, bool kVector>
DXMI_KERNEL step_grad_kernel(StepProblem p, StepGradients g, Plan plan, WideT<T>* grad_std) {
  using L = LaneOf<T>;
  using R = WideT<T>;
  constexpr int n = kUnit<T>;
  const Part part = part_of(plan);
  const RowTables<R> row = row_tables<R>(p, part);
  const NoiseKey key = read_key(p.key);
  const bool has_sq = g.grad_sq_displacement.data != nullptr;
  const R grad_sq = has_sq && part.active ? 2 * g.grad_sq_displacement.as<const R>()[part.row] /
                                                static_cast<R>(plan.dim)
                                          : R(0);
  const bool needs_noise = has_sq || g.grad_log_std.data != nullptr;
  R sum = 0;
  for (int64_t unit = part.first; unit < part.end; unit += part.stride) {
    R x[n], output[n], z[n] = {}, grad_next[n], grad_x[n], grad_output[n];
    load<T, kVector>(p.sample, plan, part.row, unit, x);
    load<T, kVector>(p.output, plan, part.row, unit, output);
    load<T, kVector>(g.grad_next, plan, part.row, unit, grad_next);
    if (needs_noise)
      noise<T, kVector>(key, plan, unit, static_cast<uint32_t>(p.sample_offset + part.row),
                        static_cast<uint32_t>(row.timestep), z);
    DXMI_UNROLL
    for (int i = 0; i < n; ++i)
      step_grad<L>(row.transition, x[i], output[i], z[i], grad_next[i], grad_sq, grad_x[i],
                   grad_output[i], sum);
    store<T, kVector>(g.grad_sample, plan, part.row, unit, grad_x);
    store<T, kVector>(g.grad_output, plan, part.row, unit, grad_output);
  }
  if (g.grad_log_std.data == nullptr) return;
  sum = row_sum(plan, sum);
  if (part.active && leads(plan)) grad_std[plan.team > 0 ? part.row : blockIdx.x] = sum;
}

// partial and arrived as in step_kernel, with one sum a split.
template <class T, bool kVector>
DXMI_KERNEL log_prob_kernel(LogProbProblem p, AnyVector log_prob, Plan plan, WideT<T>* partial,
                            unsigned* arrived) {
  using L = LaneOf<T>;
  using R = WideT<T>;
  constexpr int n = kUnit<T>;
  const Part part = part_of(plan);
  const RowTables<R> row = row_tables<R>(p, part);
  const R inverse_std = dxmi::exp(-row.log_std);
  R sum = 0;
  for (int64_t unit = part.first; unit < part.end; unit += part.stride) {
    R next[n], x[n], output[n];
    load<T, kVector>(p.next, plan, part.row, unit, next);
    load<T, kVector>(p.sample, plan, part.row, unit, x);
    load<T, kVector>(p.output, plan, part.row, unit, output);
    DXMI_UNROLL
    for (int i = 0; i < n; ++i) {
      const R z = standardised<L>(row.transition, inverse_std, next[i], x[i], output[i]);
      if (kVector || unit * n + i < plan.dim) sum = L::fma(z, z, sum);
    }
  }
  sum = row_sum(plan, sum);
  if (!part.active || !leads(plan)) return;
  if (plan.splits > 1) {
    partial[blockIdx.x] = sum;
    __threadfence();
    if (atomicAdd(arrived + part.row, 1u) + 1 != plan.splits) return;
    __threadfence();
    sum = 0;
    const volatile R* const all = partial + part.row * plan.splits;
    for (int64_t s = 0; s < plan.splits; ++s) sum += all[s];
  }
  log_prob.as<R>()[part.row] = log_prob_row(sum, static_cast<R>(plan.dim), row.log_std);
}

// noise_sq: [rows, splits] sums of z^2.
template <class T, bool kVector>
DXMI_KERNEL log_prob_grad_kernel(LogProbProblem p, LogProbGradients g, Plan plan,
                                 WideT<T>* noise_sq) {
  using L = LaneOf<T>;
  using R = WideT<T>;
  constexpr int n = kUnit<T>;
  const Part part = part_of(plan);
  const RowTables<R> row = row_tables<R>(p, part);
  const R inverse_std = dxmi::exp(-row.log_std);
  const R grad = part.active ? g.grad_log_prob.as<const R>()[part.row] : R(0);
  const R scale = grad * inverse_std / static_cast<R>(plan.dim);
  R sum = 0;
  for (int64_t unit = part.first; unit < part.end; unit += part.stride) {
    R next[n], x[n], output[n];
    load<T, kVector>(p.next, plan, part.row, unit, next);
    load<T, kVector>(p.sample, plan, part.row, unit, x);
    load<T, kVector>(p.output, plan, part.row, unit, output);
    DXMI_UNROLL
    for (int i = 0; i < n; ++i) {
      const R z = standardised<L>(row.transition, inverse_std, next[i], x[i], output[i]);
      if (kVector || unit * n + i < plan.dim) sum = L::fma(z, z, sum);
      log_prob_grad<L>(row.transition, z, scale, next[i], x[i], output[i]);
    }
    store<T, kVector>(g.grad_next, plan, part.row, unit, next);
    store<T, kVector>(g.grad_sample, plan, part.row, unit, x);
    store<T, kVector>(g.grad_output, plan, part.row, unit, output);
  }
  if (g.grad_log_std.data == nullptr) return;
  sum = row_sum(plan, sum);
  if (part.active && leads(plan)) noise_sq[plan.team > 0 ? part.row : blockIdx.x] = sum;
}

}  // namespace dxmi::cuda
