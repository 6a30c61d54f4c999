// Chooses the variant of the CPU kernels when the module is loaded.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "variants.h"

#ifdef DXMI_X86_VARIANTS
#include <cpuid.h>
#endif

namespace dxmi::cpu {

extern const Kernels kernels_baseline;
#ifdef DXMI_X86_VARIANTS
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

#ifdef DXMI_X86_VARIANTS
namespace {

// Not every Clang supports it in __builtin_cpu_supports.
bool has_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}

}  // namespace
#endif

std::vector<const Kernels*> usable_kernels() {
  std::vector<const Kernels*> usable;
#ifdef DXMI_X86_VARIANTS
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    usable.push_back(&kernels_avx512);
  if (avx2) usable.push_back(&kernels_avx2);
#endif
  usable.push_back(&kernels_baseline);
  return usable;
}

namespace {

const Kernels& choose() {
  const std::vector<const Kernels*> usable = usable_kernels();
  const char* wanted = std::getenv("DXMI_CPU_VARIANT");
  if (wanted == nullptr || *wanted == '\0') return *usable.front();
  std::string names;
  for (const Kernels* variant : usable) {
    if (std::string(variant->name) == wanted) return *variant;
    names += std::string(names.empty() ? "" : ", ") + variant->name;
  }
  throw std::runtime_error("DXMI_CPU_VARIANT must be one of " + names +
                           " on this processor, got '" + wanted + "'");
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace dxmi::cpu
