"""The CPU's kernels in a C++ program of their own, under AddressSanitizer, for each instruction set."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
}
FLAGS["amx"] = [*FLAGS["avx512"], "-mamx-tile", "-mamx-int8", "-mamx-bf16"]

# For a program's main: 77 where the processor does not run what it was compiled for.
RUNS = """
#if defined(__AVX512F__)
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq")) return 77;
#elif defined(__AVX2__)
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 77;
#endif
"""


def run_sanitized(program: str, isa: str, folder: Path, optimization: str) -> None:
    """Build a program for an instruction set and run it; what it prints is what is wrong."""
    if isa != "baseline" and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip(f"{isa} is an instruction set of x86-64")
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
