// Which instruction set's kernels run: one decision, made once.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace ddpm_fast::cpu {

extern const Kernels baseline;
#ifdef DDPM_FAST_X86_64
extern const Kernels avx2, avx512;
#endif

namespace {

struct Candidate {
  const Kernels* kernels;
  bool runs;
};

const Kernels& choose() {
  const Candidate candidates[] = {
#ifdef DDPM_FAST_X86_64
      {&avx512, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")},
      {&avx2,
       __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")},
#endif
      {&baseline, true},
  };
  const char* named = std::getenv("DDPM_FAST_CPU");
  std::string known;
  for (const Candidate& candidate : candidates) {
    if (named == nullptr || *named == '\0') {
      if (candidate.runs) return *candidate.kernels;
    } else if (std::string(named) == candidate.kernels->isa) {
      if (candidate.runs) return *candidate.kernels;
      throw std::runtime_error(std::string("DDPM_FAST_CPU=") + named + ": this processor does not run it");
    }
    known += std::string(known.empty() ? "" : ", ") + candidate.kernels->isa;
  }
  throw std::invalid_argument(std::string("DDPM_FAST_CPU=") + named + " is not known; built for: " + known);
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace ddpm_fast::cpu

// For `ddpm_fast.info()`, which reads it with ctypes: the name of the instruction set in use.
extern "C" __attribute__((visibility("default"))) const char* ddpm_fast_cpu_kernels() {
  return ddpm_fast::cpu::kernels().isa;
}
