"""The CPU's kernels in a C++ program of their own, under AddressSanitizer, for each instruction set."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from instruction_sets import ROOT, needs_x86

FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
}
FLAGS["amx"] = [*FLAGS["avx512"], "-mavx512bf16", "-mamx-tile", "-mamx-int8", "-mamx-bf16"]

# For the head of a program, after the kernels.
ARRAYS = """
#if defined(__AMX_INT8__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#include <cmath>
#include <cstdio>
#include <memory>

// Exactly as many as are asked for: AddressSanitizer sees the first one too many.
template <typename T>
using Array = std::unique_ptr<T[]>;

// In [-1, 1).
Array<float> floats(int64_t count, uint32_t seed) {
  Array<float> made(new float[count]);
  for (int64_t k = 0; k < count; ++k) {
    seed = seed * 1664525u + 1013904223u;
    made[k] = static_cast<float>(seed >> 8) / (1 << 23) - 1;
  }
  return made;
}
"""

# For a program's main: 77 where the processor does not run what it was compiled for.
RUNS = """
#if defined(__AVX512F__)
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq")) return 77;
#elif defined(__AVX2__)
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 77;
#endif
#if defined(__AMX_INT8__)
  unsigned a, b, c, d;
  const bool has = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1) && (d >> 24 & 3) == 3;
  if (!has || syscall(SYS_arch_prctl, 0x1023, 18) != 0) return 77;
#endif
"""


def run_sanitized(program: str, isa: str, folder: Path, optimization: str) -> None:
    """Build a program for an instruction set and run it; what it prints is what is wrong."""
    needs_x86(isa)
    source, binary = folder / "main.cpp", folder / "program"
    source.write_text(program)
    sanitized = [optimization, "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-w"]
    try:
        probe = ["g++", *sanitized, *FLAGS[isa], "-x", "c++", "-", "-o", str(binary)]
        subprocess.run(probe, input="int main() {}", text=True, check=True, capture_output=True)
        subprocess.run([binary], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"g++ builds no program with AddressSanitizer for {isa}: {error}")
    include = f"-I{ROOT / 'csrc' / 'cpu'}"
    command = ["g++", "-std=c++20", *sanitized, *FLAGS[isa], include, "-include", "cstdlib"]
    built = subprocess.run([*command, str(source), "-o", str(binary)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    done = subprocess.run([binary], capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip(f"this processor does not run {isa}")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
