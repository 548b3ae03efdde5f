"""A long run takes no more memory than a short one."""

from __future__ import annotations

import subprocess
import sys

import pytest

RUN = """
import sys
import torch
from ddpm_fast import Sampler, Schedule, UNet, UNetConfig

def peak():  # of this process: a child begins with its parent's in getrusage
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])

config = UNetConfig((32, 64), (False, True), (True, False), sample_size=16, norm_num_groups=8)
model = UNet(config).eval()
dtype = getattr(torch, sys.argv[1])
schedule = Schedule.linear()
for _ in range(2):  # the second has what the first leaves
    Sampler(model, schedule, method=sys.argv[2], num_steps=10, dtype=dtype)(16)
short = peak()
Sampler(model, schedule, method=sys.argv[2], num_steps=300, dtype=dtype)(16)
print(peak() - short)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(("dtype", "method"), [("float32", "ddpm"), ("bfloat16", "dpm_solver")])
def test_the_peak_of_300_steps_is_that_of_10(dtype, method):
    """Kept at each step, a state would be 14 MiB more; what an allocator leaves in pieces is some 3."""
    command = [sys.executable, "-c", RUN, dtype, method]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= 8 * 1024, f"{done.stdout.strip()} KiB more"
