// Prints a digest of everything that the CPU half computes: each op, dtype, kind of row and layout, a line each,
// so that processors and compilers can be compared by diff. Needs csrc/core and csrc/cpu, and no torch: this
// folder stands in for its headers. .ci/aarch64 builds it for two processors.
#include <cstdio>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

#include "core/philox.h"
#include "cpu/variants.h"
#include "ops/energy_loss.h"
#include "ops/normal.h"
#include "ops/sampler_step.h"
#include "ops/td_target.h"
#include "ops/transition_log_prob.h"
#include "ops/update_velocity_var.h"

namespace {

using namespace dxmi;

Device device;

// --- inputs: the same on every processor, so of integers and exact scalings alone ----------------------

uint32_t state = 1;
uint32_t draw() {
  state = state * 1664525u + 1013904223u;
  return state ^ (state >> 15);
}

void fill(float& x) { x = static_cast<float>(static_cast<int32_t>(draw())) * 0x1p-30f; }
void fill(double& x) { x = static_cast<int32_t>(draw()) * 0x1p-30 + draw() * 0x1p-62; }
void fill(BFloat16& x) {
  float value;
  fill(value);
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  x.bits = static_cast<uint16_t>(bits >> 16);
}
void fill(Half& x) {  // between 1/4 and 2 in size
  x.bits = static_cast<uint16_t>((draw() & 0x83FFu) | ((13 + draw() % 3) << 10));
}

template <class T>
std::vector<T> values(int64_t count) {
  std::vector<T> out(static_cast<size_t>(count));
  for (T& x : out) fill(x);
  return out;
}

template <class R>
std::vector<R> positive(int64_t count) {
  std::vector<R> out = values<R>(count);
  for (R& x : out) x = x * x + R(0.25);
  return out;
}

template <class T>
AnyVector any(std::vector<T>& v) {
  return {v.data(), 1};
}

// --- outputs -------------------------------------------------------------------------------------------

std::string prefix;

template <class T>
void report(const char* name, const std::vector<T>& out) {
  uint64_t digest = 0xCBF29CE484222325u;  // FNV-1a
  const auto* bytes = reinterpret_cast<const unsigned char*>(out.data());
  for (size_t i = 0; i < out.size() * sizeof(T); ++i) digest = (digest ^ bytes[i]) * 0x100000001B3u;
  std::printf("%s %s %016llx\n", prefix.c_str(), name, static_cast<unsigned long long>(digest));
}

// --- ops over samples ----------------------------------------------------------------------------------

template <class T>
constexpr Dtype dtype_of() {
  if (std::is_same_v<T, float>) return Dtype::kFloat32;
  if (std::is_same_v<T, BFloat16>) return Dtype::kBFloat16;
  if (std::is_same_v<T, Half>) return Dtype::kFloat16;
  return Dtype::kFloat64;
}

template <class T>
SampleView view_of(std::vector<T>& data, int64_t dim, bool transposed) {
  SampleView view;
  view.data = data.data();
  view.row_stride = dim;
  if (transposed) {
    const int64_t across = dim % 7 == 0 ? 7 : 1;
    view.dense = false;
    view.dims = 2;
    view.size[0] = view.stride[1] = dim / across;
    view.size[1] = across;
    view.stride[0] = 1;
  }
  return view;
}

template <class T>
void samples(const char* type, int64_t rows, int64_t dim, bool transposed) {
  using R = ComputeType<T>;
  constexpr int64_t steps = 5;
  prefix = std::string(type) + " " + std::to_string(rows) + "x" + std::to_string(dim) +
           (transposed ? " transposed" : "");
  const int64_t count = rows * dim;
  int64_t key[2] = {0x123456789ABCDEF, 7};
  std::vector<int64_t> timestep(static_cast<size_t>(rows));
  for (int64_t& t : timestep) t = draw() % steps;
  std::vector<R> a = values<R>(steps), b = values<R>(steps), log_std = values<R>(steps);
  std::vector<T> x = values<T>(count), o = values<T>(count), y = values<T>(count),
                 gy = values<T>(count), next(static_cast<size_t>(count)), gx = next, go = next,
                 gnext = next;
  std::vector<R> first(static_cast<size_t>(rows)), second = first, grad_first = values<R>(rows),
                                                   grad_second = values<R>(rows),
                                                   table(static_cast<size_t>(steps));
  const auto view = [&](std::vector<T>& data) { return view_of(data, dim, transposed); };

  loops::normal_(device, {dtype_of<T>(), rows, dim, {key, 1}, 3, 11, view(next)});
  report("normal", next);

  SamplerStepInputs step{};
  step.dtype = dtype_of<T>();
  step.rows = rows;
  step.dim = dim;
  step.steps = steps;
  step.sample = view(x);
  step.model_output = view(o);
  step.timestep = {timestep.data(), 1};
  step.sample_coef = any(a);
  step.output_coef = any(b);
  step.log_std = any(log_std);
  TransitionLogProbInputs given{};
  static_cast<TransitionInputs&>(given) = step;
  given.next_sample = view(y);
  step.key = {key, 1};
  step.sample_offset = 11;

  loops::sampler_step_fwd(device, step, {view(next), any(first), any(second)});
  report("sampler_step next_sample", next);
  report("sampler_step log_prob", first);
  report("sampler_step sq_displacement", second);
  loops::sampler_step_bwd(
      device, step, {view(gy), any(grad_first), any(grad_second), view(gx), view(go), any(table)});
  report("sampler_step grad sample", gx);
  report("sampler_step grad output", go);
  report("sampler_step grad log_std", table);

  loops::transition_log_prob_fwd(device, given, any(first));
  report("transition_log_prob", first);
  loops::transition_log_prob_bwd(device, given,
                                 {any(grad_first), view(gnext), view(gx), view(go), any(table)});
  report("transition_log_prob grad next_sample", gnext);
  report("transition_log_prob grad sample", gx);
  report("transition_log_prob grad output", go);
  report("transition_log_prob grad log_std", table);
}

template <class T>
void samples(const char* type) {
  for (const int64_t dim : {1, 2, 7, 16, 100, 129, 2100})
    for (const bool transposed : {false, true})
      samples<T>(type, dim > 1000 ? 3 : 37, dim, transposed);
}

// --- ops over rows -------------------------------------------------------------------------------------

template <class R>
void rows(const char* type) {
  constexpr int64_t rows = 37, steps = 5;
  constexpr bool is_float64 = std::is_same_v<R, double>;
  prefix = type;
  std::vector<int64_t> timestep(rows);
  for (int64_t& t : timestep) t = draw() % steps;
  std::vector<R> sq = positive<R>(rows), value = values<R>(rows), grad = values<R>(rows);
  std::vector<R> log_std = values<R>(steps), velocity_var = positive<R>(steps),
                 time = values<R>(steps);
  std::vector<R> out(rows), other(rows), table(steps), scalar = values<R>(1);

  const RunningCostInputs cost{
      is_float64, rows, steps, {timestep.data(), 1}, any(log_std), any(velocity_var), 0.3, 0.7, 1};
  loops::running_cost_fwd(device, cost, any(sq), any(out));
  report("running_cost", out);
  loops::running_cost_bwd(device, cost, {any(grad), any(out), any(table)});
  report("running_cost grad sq_displacement", out);
  report("running_cost grad log_std", table);
  loops::td_target(device, {cost, any(value), any(sq), any(time)}, any(out));
  report("td_target", out);

  const EnergyLossInputs energy{is_float64, rows, rows, any(value), any(grad), 0.9};
  loops::energy_loss_bwd(device, energy, {any(scalar), any(out), any(other)});
  report("energy_loss grad energy_data", out);
  report("energy_loss grad energy_sample", other);
  loops::energy_loss_fwd(device, energy, any(scalar));
  report("energy_loss", scalar);

  UpdateVelocityVarArguments velocity{};
  std::vector<R> path = positive<R>(steps * rows);
  velocity.is_float64 = is_float64;
  velocity.steps = steps;
  velocity.rows = rows;
  velocity.velocity_var = any(velocity_var);
  velocity.sq_displacement = path.data();
  velocity.step_stride = rows;
  velocity.row_stride = 1;
  velocity.decay = 0.99;
  loops::update_velocity_var_(device, velocity);
  report("update_velocity_var_", velocity_var);
}

// --- the known answers of Philox4x32-10 (Random123) ----------------------------------------------------

bool philox_is_right() {
  const uint32_t cases[3][10] = {
      {0, 0, 0, 0, 0, 0, 0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8},
      {~0u, ~0u, ~0u, ~0u, ~0u, ~0u, 0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD},
      {0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0, 0xD16CFE09,
       0x94FDCCEB, 0x5001E420, 0x24126EA1},
  };
  for (const auto& known : cases) {
    uint32_t words[4];
    std::memcpy(words, known, sizeof words);
    philox4x32_10<ScalarLane>(words, known[4], known[5]);
    if (std::memcmp(words, known + 6, sizeof words) != 0) return false;
  }
  return true;
}

}  // namespace

int main() {
  if (!philox_is_right()) {
    std::fputs("Philox4x32-10 misses its known answers\n", stderr);
    return 1;
  }
  std::fprintf(stderr, "kernels: %s\n", cpu::kernels().name);
  samples<float>("float32");
  samples<BFloat16>("bfloat16");
  samples<Half>("float16");
  samples<double>("float64");
  rows<float>("float32");
  rows<double>("float64");
}
