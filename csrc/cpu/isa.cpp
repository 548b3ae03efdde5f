// Which instruction set's kernels run: one decision, made once.
#include <cstdlib>
#include <stdexcept>
#include <string>

#ifdef DDPM_FAST_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernels.h"

namespace ddpm_fast::cpu {

extern const Kernels baseline;
#ifdef DDPM_FAST_X86_64
extern const Kernels avx2, avx512;
#endif
#ifdef DDPM_FAST_AMX
extern const Kernels amx;
#endif

namespace {

#ifdef DDPM_FAST_X86_64
bool runs_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

bool runs_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
#endif

#ifdef DDPM_FAST_AMX
// The processor has to have tiles and products of int8 and bfloat16, and the system has to let the process
// use them.
bool runs_amx() {
  constexpr unsigned kOsxsave = 1u << 27, kTile = 1u << 24, kInt8 = 1u << 25, kBFloat16 = 1u << 22,
                     kTileStates = 3u << 17;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl's ARCH_REQ_XCOMP_PERM
  unsigned a, b, c, d, states, high;
  if (!runs_avx512() || !__get_cpuid(1, &a, &b, &c, &d) || !(c & kOsxsave)) return false;
  asm volatile("xgetbv" : "=a"(states), "=d"(high) : "c"(0));
  if ((states & kTileStates) != kTileStates) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kTile) || !(d & kInt8) || !(d & kBFloat16))
    return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

struct Candidate {
  const Kernels* kernels;
  bool (*runs)();  // asked only if it may be chosen: a process has tiles for good
};

// The best first.
const Candidate kCandidates[] = {
#ifdef DDPM_FAST_AMX
    {&amx, runs_amx},
#endif
#ifdef DDPM_FAST_X86_64
    {&avx512, runs_avx512},
    {&avx2, runs_avx2},
#endif
    {&baseline, [] { return true; }},
};

std::string built_for() {
  std::string names;
  for (const Candidate& candidate : kCandidates) {
    names += std::string(names.empty() ? "" : ", ") + candidate.kernels->isa;
  }
  return names;
}

const Kernels& choose() {
  const char* environment = std::getenv("DDPM_FAST_CPU");
  const std::string named = environment == nullptr ? "" : environment;
  for (const Candidate& candidate : kCandidates) {
    if (!named.empty() && named != candidate.kernels->isa) continue;
    if (candidate.runs()) return *candidate.kernels;
    if (!named.empty())
      throw std::runtime_error("DDPM_FAST_CPU=" + named + ": this processor does not run it");
  }
  throw std::invalid_argument("DDPM_FAST_CPU=" + named + " is not known; built for: " + built_for());
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace ddpm_fast::cpu

// For `ddpm_fast.info()`, which reads it with ctypes: the instruction set in use and those built for, or what
// is wrong with the choice.
extern "C" __attribute__((visibility("default"))) const char* ddpm_fast_cpu_kernels() {
  static const std::string text = [] {
    try {
      return std::string(ddpm_fast::cpu::kernels().isa) + " (built for " + ddpm_fast::cpu::built_for() + ")";
    } catch (const std::exception& error) {
      return std::string("none: ") + error.what();
    }
  }();
  return text.c_str();
}
