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

// The part of a row that a team or block works on, and of its units those that this thread does. They are
// few, so that loops count in 32 bits.
struct Part {
  int64_t row;
  int64_t begin;             // the part's first unit
  int first, count, stride;  // units begin + first, begin + first + stride .. below begin + count
  bool active;               // the row exists
};

__device__ inline Part part_of(const Plan& plan) {
  if (plan.team > 0) {
    const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    const int64_t row = thread / plan.team;
    const bool active = row < plan.rows;
    const int first = static_cast<int>(threadIdx.x) & (plan.team - 1);
    return {row, 0, first, active ? static_cast<int>(plan.units) : 0, plan.team, active};
  }
  const int64_t row = blockIdx.x / plan.splits;
  const int64_t begin = (blockIdx.x - row * plan.splits) * plan.units_per_split;
  const int64_t left = plan.units - begin;
  const int count = static_cast<int>(left < plan.units_per_split ? left : plan.units_per_split);
  return {row, begin, static_cast<int>(threadIdx.x), count, static_cast<int>(blockDim.x), true};
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

// Unit `unit` of the part, widened; zeros beyond the row's end.
template <class T, bool kVector>
__device__ void load(const View& view, const Plan& plan, const Part& part, int unit,
                     WideT<T> out[kUnit<T>]) {
  constexpr int n = kUnit<T>;
  const T* const row = static_cast<const T*>(view.data) + part.row * view.row_stride;
  if constexpr (kVector) {
    Unit<T> values = reinterpret_cast<const Unit<T>*>(row + part.begin * n)[unit];
    widen(values, out);
  } else {
    const int64_t first = (part.begin + unit) * n;
    for (int i = 0; i < n; ++i)
      out[i] = first + i < plan.dim ? widen(row[offset_of(view, first + i)]) : WideT<T>(0);
  }
}

// An absent tensor reads as zeros.
template <class T, bool kVector>
__device__ void load_if_given(const View& view, const Plan& plan, const Part& part, int unit,
                              WideT<T> out[kUnit<T>]) {
  if (view.data != nullptr)
    load<T, kVector>(view, plan, part, unit, out);
  else
    for (int i = 0; i < kUnit<T>; ++i) out[i] = 0;
}

template <class T, bool kVector>
__device__ void store(const View& view, const Plan& plan, const Part& part, int unit,
                      const WideT<T> values[kUnit<T>]) {
  constexpr int n = kUnit<T>;
  T* const row = static_cast<T*>(view.data) + part.row * view.row_stride;
  if constexpr (kVector) {
    Unit<T> out;
    narrow(values, out);
    reinterpret_cast<Unit<T>*>(row + part.begin * n)[unit] = out;
  } else {
    const int64_t first = (part.begin + unit) * n;
    for (int i = 0; i < n && first + i < plan.dim; ++i)
      narrow(values[i], row[offset_of(view, first + i)]);
  }
}

template <class T, bool kVector>
__device__ void store_if_wanted(const View& view, const Plan& plan, const Part& part, int unit,
                                const WideT<T> values[kUnit<T>]) {
  if (view.data != nullptr) store<T, kVector>(view, plan, part, unit, values);
}

// Whether element i of a unit is one of the row. Those beyond its end must not enter sums: of zeros, an infinite
// coefficient makes NaN.
template <class T, bool kVector>
__device__ bool in_row(const Plan& plan, const Part& part, int unit, int i) {
  return kVector || (part.begin + unit) * kUnit<T> + i < plan.dim;
}

// The normals of a unit; zeros beyond the row's end, where they would enter sums.
template <class T, bool kVector>
__device__ void noise(const NoiseKey& key, const Plan& plan, const Part& part, int unit,
                      int64_t sample_offset, int64_t timestep, WideT<T> z[kUnit<T>]) {
  constexpr int n = kUnit<T>;
  const uint32_t sample = static_cast<uint32_t>(sample_offset + part.row);
  const uint32_t first = static_cast<uint32_t>(part.begin * (n / 4)) + unit * (n / 4);
  DXMI_UNROLL
  for (int group = 0; group < n / 4; ++group) {
    uint32_t words[4];
    float normals[4];
    noise_words<ScalarLane>(key, first + group, sample, static_cast<uint32_t>(timestep), words);
    box_muller<ScalarLane>(words, normals);
    DXMI_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int e = 4 * group + i;
      z[e] = in_row<T, kVector>(plan, part, unit, e) ? normals[i] : 0.0f;
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
DXMI_KERNEL normal_kernel(const __grid_constant__ NormalProblem p, Plan plan) {
  const Part part = part_of(plan);
  const NoiseKey key = read_key(p.key);
  for (int unit = part.first; unit < part.count; unit += part.stride) {
    WideT<T> z[kUnit<T>];
    noise<T, kVector>(key, plan, part, unit, p.sample_offset, p.timestep, z);
    store<T, kVector>(p.out, plan, part, unit, z);
  }
}

// Completes the K sums of a split row: every block leaves its own in `partial` [rows, splits, K], and the last
// to arrive (counted from zero in `arrived` [rows]) adds all of them up, in an order that does not depend on
// which block that is. True in that block, and where rows are not split.
template <int K, class R>
__device__ bool sum_splits(const Plan& plan, const Part& part, R (&sums)[K], R* partial,
                           unsigned* arrived) {
  if (plan.splits == 1) return true;
  __shared__ bool last;
  if (threadIdx.x == 0) {
    for (int k = 0; k < K; ++k) partial[static_cast<int64_t>(blockIdx.x) * K + k] = sums[k];
    __threadfence();
    last = atomicAdd(arrived + part.row, 1u) + 1 == plan.splits;
  }
  __syncthreads();
  if (!last) return false;
  __threadfence();
  const volatile R* const all = partial + part.row * plan.splits * K;  // not from a stale cache
  R mine[K] = {};
  for (int64_t s = threadIdx.x; s < plan.splits; s += blockDim.x)
    for (int k = 0; k < K; ++k) mine[k] += all[s * K + k];
  for (int k = 0; k < K; ++k) sums[k] = block_sum(mine[k]);
  return true;
}

// partial and arrived: for sum_splits.
template <class T, bool kVector>
DXMI_KERNEL step_kernel(const __grid_constant__ StepProblem p,
                        const __grid_constant__ StepResult result, Plan plan, WideT<T>* partial,
                        unsigned* arrived) {
  using L = LaneOf<T>;
  using R = WideT<T>;
  constexpr int n = kUnit<T>;
  const Part part = part_of(plan);
  const RowTables<R> row = row_tables<R>(p, part);
  const NoiseKey key = read_key(p.key);
  R noise_sq = 0, displacement_sq = 0;
  for (int unit = part.first; unit < part.count; unit += part.stride) {
    R x[n], output[n], z[n];
    load<T, kVector>(p.sample, plan, part, unit, x);
    load<T, kVector>(p.output, plan, part, unit, output);
    noise<T, kVector>(key, plan, part, unit, p.sample_offset, row.timestep, z);
    DXMI_UNROLL
    for (int i = 0; i < n; ++i)
      if (in_row<T, kVector>(plan, part, unit, i))
        x[i] = step<L>(row.transition, x[i], output[i], z[i], noise_sq, displacement_sq);
    store<T, kVector>(result.next, plan, part, unit, x);
  }
  R sums[2] = {row_sum(plan, noise_sq), row_sum(plan, displacement_sq)};
  if (!sum_splits(plan, part, sums, partial, arrived) || !part.active || !leads(plan)) return;
  const R dim = static_cast<R>(plan.dim);
  result.log_prob.as<R>()[part.row] = log_prob_row(sums[0], dim, row.log_std);
  result.sq_displacement.as<R>()[part.row] = sums[1] / dim;
}

// grad_std: [rows, splits] sums of the gradient of std.
template <class T, bool kVector>
DXMI_KERNEL step_grad_kernel(const __grid_constant__ StepProblem p,
                             const __grid_constant__ StepGradients g, Plan plan,
                             WideT<T>* grad_std) {
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
  for (int unit = part.first; unit < part.count; unit += part.stride) {
    R x[n], output[n], z[n] = {}, grad_next[n], grad_x[n], grad_output[n];
    load<T, kVector>(p.sample, plan, part, unit, x);
    load<T, kVector>(p.output, plan, part, unit, output);
    load_if_given<T, kVector>(g.grad_next, plan, part, unit, grad_next);
    if (needs_noise) noise<T, kVector>(key, plan, part, unit, p.sample_offset, row.timestep, z);
    DXMI_UNROLL
    for (int i = 0; i < n; ++i)
      if (in_row<T, kVector>(plan, part, unit, i))
        step_grad<L>(row.transition, x[i], output[i], z[i], grad_next[i], grad_sq, grad_x[i],
                     grad_output[i], sum);
    store_if_wanted<T, kVector>(g.grad_sample, plan, part, unit, grad_x);
    store_if_wanted<T, kVector>(g.grad_output, plan, part, unit, grad_output);
  }
  if (g.grad_log_std.data == nullptr) return;
  sum = row_sum(plan, sum);
  if (part.active && leads(plan)) grad_std[plan.team > 0 ? part.row : blockIdx.x] = sum;
}

// partial and arrived: for sum_splits.
template <class T, bool kVector>
DXMI_KERNEL log_prob_kernel(const __grid_constant__ LogProbProblem p, AnyVector log_prob, Plan plan,
                            WideT<T>* partial, unsigned* arrived) {
  using L = LaneOf<T>;
  using R = WideT<T>;
  constexpr int n = kUnit<T>;
  const Part part = part_of(plan);
  const RowTables<R> row = row_tables<R>(p, part);
  const R inverse_std = dxmi::exp(-row.log_std);
  R sum = 0;
  for (int unit = part.first; unit < part.count; unit += part.stride) {
    R next[n], x[n], output[n];
    load<T, kVector>(p.next, plan, part, unit, next);
    load<T, kVector>(p.sample, plan, part, unit, x);
    load<T, kVector>(p.output, plan, part, unit, output);
    DXMI_UNROLL
    for (int i = 0; i < n; ++i) {
      const R z = standardised<L>(row.transition, inverse_std, next[i], x[i], output[i]);
      if (in_row<T, kVector>(plan, part, unit, i)) sum = L::fma(z, z, sum);
    }
  }
  R sums[1] = {row_sum(plan, sum)};
  if (!sum_splits(plan, part, sums, partial, arrived) || !part.active || !leads(plan)) return;
  log_prob.as<R>()[part.row] = log_prob_row(sums[0], static_cast<R>(plan.dim), row.log_std);
}

// noise_sq: [rows, splits] sums of z^2.
template <class T, bool kVector>
DXMI_KERNEL log_prob_grad_kernel(const __grid_constant__ LogProbProblem p,
                                 const __grid_constant__ LogProbGradients g, Plan plan,
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
  for (int unit = part.first; unit < part.count; unit += part.stride) {
    R next[n], x[n], output[n];
    load<T, kVector>(p.next, plan, part, unit, next);
    load<T, kVector>(p.sample, plan, part, unit, x);
    load<T, kVector>(p.output, plan, part, unit, output);
    DXMI_UNROLL
    for (int i = 0; i < n; ++i) {
      const R z = standardised<L>(row.transition, inverse_std, next[i], x[i], output[i]);
      if (in_row<T, kVector>(plan, part, unit, i)) sum = L::fma(z, z, sum);
      log_prob_grad<L>(row.transition, z, scale, next[i], x[i], output[i]);
    }
    store_if_wanted<T, kVector>(g.grad_next, plan, part, unit, next);
    store_if_wanted<T, kVector>(g.grad_sample, plan, part, unit, x);
    store_if_wanted<T, kVector>(g.grad_output, plan, part, unit, output);
  }
  if (g.grad_log_std.data == nullptr) return;
  sum = row_sum(plan, sum);
  if (part.active && leads(plan)) noise_sq[plan.team > 0 ? part.row : blockIdx.x] = sum;
}

}  // namespace dxmi::cuda
