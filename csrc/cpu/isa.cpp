// Which instruction set's kernels run: one decision, made once.
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

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

std::vector<Candidate> candidates() {  // the best first
  return {
#ifdef DDPM_FAST_X86_64
      {&avx512, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")},
      {&avx2,
       __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")},
#endif
      {&baseline, true},
  };
}

std::string built_for() {
  std::string names;
  for (const Candidate& candidate : candidates()) {
    names += std::string(names.empty() ? "" : ", ") + candidate.kernels->isa;
  }
  return names;
}

const Kernels& choose() {
  const char* environment = std::getenv("DDPM_FAST_CPU");
  const std::string named = environment == nullptr ? "" : environment;
  for (const Candidate& candidate : candidates()) {
    if (named.empty() ? candidate.runs : named == candidate.kernels->isa) {
      if (candidate.runs) return *candidate.kernels;
      throw std::runtime_error("DDPM_FAST_CPU=" + named + ": this processor does not run it");
    }
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
