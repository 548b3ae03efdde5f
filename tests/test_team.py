"""A team of threads (csrc/cpu/team.cpp) under ThreadSanitizer and AddressSanitizer, without torch."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

CPU = Path(__file__).parent.parent / "csrc" / "cpu"

# torch's loop, with threads that come late.
COMMON = """
#pragma once
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

namespace torch::stable {
inline thread_local int64_t threads = 1;
inline thread_local bool in_loop = false;
inline int64_t late = 0;  // us
inline int64_t get_num_threads() { return threads; }

template <typename Body>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
  const int64_t count = std::min(threads, grain > 0 ? (end - begin + grain - 1) / grain : end - begin);
  if (in_loop || count < 2) return body(begin, end);
  const int64_t part = (end - begin + count - 1) / count;
  const auto run = [&](int64_t k) {
    in_loop = true;
    if (k > 0) std::this_thread::sleep_for(std::chrono::microseconds(late * k % 1000));
    if (begin + k * part < end) body(begin + k * part, std::min(end, begin + (k + 1) * part));
    in_loop = false;
  };
  std::vector<std::thread> others;
  for (int64_t k = 1; k < count; ++k) others.emplace_back(run, k);
  run(0);
  for (std::thread& other : others) other.join();
}
}  // namespace torch::stable
"""

PROGRAM = """
#include "cpu/team.h"

#include <cstdio>
#include <cstdlib>
#include <stdexcept>

using namespace ddpm_fast;

void must(bool good, const char* what) {
  if (good) return;
  std::puts(what);
  std::exit(1);
}

// Loops that read what the one before has left, and what lies on the leader's stack.
void work(int rounds) {
  std::vector<int> sums(64, 0);
  for (int round = 0; round < rounds; ++round) {
    const int64_t count = 1 + round * 7 % 40, grain = round % 4;
    const std::vector<int> one(count, 1);
    parallel_for(0, count, grain, [&](int64_t first, int64_t last) {
      parallel_for(first, last, 1, [&](int64_t k, int64_t end) {
        for (; k < end; ++k) sums[k] += one[k];
      });
    });
    for (int64_t k = 0; k < count; ++k) must(sums[k] == 1, "not each once");
    std::fill_n(sums.begin(), count, 0);
  }
}

void fails(bool within_a_loop) {
  bool raised = false;
  try {
    as_a_team([&] {
      work(5);
      if (!within_a_loop) throw std::logic_error("");
      parallel_for(0, 9, 1, [](int64_t, int64_t last) {
        if (last == 9) throw std::logic_error("");
      });
    });
  } catch (const std::logic_error&) {
    raised = true;
  }
  must(raised, "nothing raised");
}

int main() {
  for (int64_t late : {0, 90, 990}) {
    torch::stable::late = late;
    for (int64_t threads : {1, 2, 3, 5, 16}) {
      torch::stable::threads = threads;
      for (int k = 0; k < 4; ++k) {
        as_a_team([] { work(60); });
        as_a_team([] { as_a_team([] { work(5); }); });
        fails(false);
        fails(true);
      }
    }
  }
  const auto leads = [] {
    torch::stable::threads = 3;
    for (int k = 0; k < 20; ++k) as_a_team([] { work(20); });
  };
  std::thread other(leads);
  leads();
  other.join();
}
"""


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_every_part_is_run_once_and_nothing_races(sanitizer, tmp_path):
    sources = tmp_path / "csrc"
    (sources / "cpu").mkdir(parents=True)
    for name in ("team.h", "team.cpp"):
        shutil.copy(CPU / name, sources / "cpu")
    (sources / "common.h").write_text(COMMON)
    (sources / "main.cpp").write_text(PROGRAM)
    binary = tmp_path / "program"
    flags = ["-std=c++20", "-O1", "-g1", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-pthread"]
    try:
        probe = ["g++", *flags, "-x", "c++", "-", "-o", str(binary)]
        subprocess.run(probe, input="int main() {}", text=True, check=True, capture_output=True)
        subprocess.run([binary], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"g++ builds no program with the sanitizer {sanitizer}: {error}")
    command = ["g++", *flags, f"-I{sources}", str(sources / "main.cpp"), str(sources / "cpu" / "team.cpp")]
    built = subprocess.run([*command, "-o", str(binary)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    done = subprocess.run([binary], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
