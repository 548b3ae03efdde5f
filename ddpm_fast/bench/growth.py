"""How time and peak memory grow with the batch, the resolution and the steps: each point in its own process.

    python -m ddpm_fast.bench.growth '{"batch": 1, "size": 32, "steps": 10, ...}'

is a point: it prints what it found as JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from itertools import product

import numpy as np
import torch

from ..sampler import Sampler
from ..schedule import Schedule
from .measure import quartiles
from .networks import config_of, network
from .report import Column, Picture, Row, Table
from .settings import Settings

BATCHES, SIZES, STEPS = (1, 2, 4, 8, 16, 32, 64), (32, 64, 128, 256), (10, 30, 100, 300, 1000)
FEW_STEPS = 3
"""Of a run whose batch or size is what grows."""
SECONDS = 5.0
"""That a point repeats its run for; a run that is longer is made once."""
SLACK = 4 << 20
"""Bytes that a longer run's peak may be above a shorter one's: one activation of the first level is more."""

COLUMNS = [
    Column("sweep", "what grows", "text"),
    Column("dtype", "dtype", "text"),
    Column("batch", "batch", "text"),
    Column("size", "size", "text"),
    Column("steps", "steps", "text"),
    Column("time", "a run", "time"),
    Column("each", "an image and step", "time"),
    Column("memory", "peak memory", "bytes"),
    Column("above", "above the model's", "bytes"),
]


@dataclass(frozen=True)
class Point:
    """A run of DDIM, and what it runs on."""

    batch: int
    size: int
    steps: int
    dtype: str
    device: str
    threads: int
    quick: bool
    network: str


def table(settings: Settings) -> Table:
    """Three sweeps in two dtypes. The time is to be linear in the steps, and the peak not to grow."""
    found = Table(
        "growth",
        "Time and peak memory as the work grows",
        COLUMNS,
        pictures=[
            Picture("lines", f"{what}, by {sweep}", sweep, y, {"sweep": sweep}, ("dtype",))
            for sweep in ("batch", "size", "steps")
            for y, what in (("time", "a run"), ("memory", "peak memory"))
        ],
    )
    points = _points(settings)
    measured: dict[Point, Row] = {}  # the sweeps meet in a point
    for sweep, point in settings.progress(points, "growth"):
        measured[point] = measured.get(point) or _in_its_own_process(point)
        found.rows.append({"sweep": sweep, **asdict(point), **measured[point]})
    for dtype in dict.fromkeys(point.dtype for _, point in points):
        rows = [row for row in found.rows if (row["sweep"], row["dtype"]) == ("steps", dtype)]
        found.remarks.append(_linear(dtype, rows))
        found.remarks.append(_flat(dtype, rows))
    return found


def run(point: Point) -> Row:
    """Quartiles of a run's seconds, the same an image and step, and the peak of this process's memory.

    ``above``: the peak less what the process has once the model is there. None where /proc is not.
    """
    torch.set_num_threads(point.threads)
    device = torch.device(point.device)
    model = network(config_of(Settings(quick=point.quick, network=point.network))).to(device)
    dtype = getattr(torch, point.dtype)
    sampler = Sampler(model, Schedule.linear(), method="ddim", num_steps=point.steps, dtype=dtype)
    shape = (point.batch, 3, point.size, point.size)
    before = _memory(device, "VmRSS")
    Sampler(model, Schedule.linear(), method="ddim", num_steps=1, dtype=dtype)(shape[0], shape=shape[1:])
    taken: list[float] = []
    while sum(taken) < (SECONDS / 50 if point.quick else SECONDS) and len(taken) < 10:
        start = time.perf_counter()
        sampler(shape[0], shape=shape[1:]).cpu()
        taken.append(time.perf_counter() - start)
    peak = _memory(device, "VmHWM")
    seconds = quartiles(taken) if len(taken) > 1 else taken * 3
    return {
        "time": seconds,
        "each": [s / point.batch / point.steps for s in seconds],
        "memory": peak,
        "above": None if peak is None or before is None else peak - before,
    }


def _points(settings: Settings) -> list[tuple[str, Point]]:
    batches, sizes, steps = BATCHES, SIZES, STEPS
    if settings.quick:
        batches, sizes, steps = (1, 2), (16,), (FEW_STEPS, 50)
    small = sizes[0]
    sweeps = [("batch", b, small, FEW_STEPS) for b in batches]
    sweeps += [("size", 1, size, FEW_STEPS) for size in sizes]
    sweeps += [("steps", 1, small, n) for n in steps]
    rest = (str(settings.device), torch.get_num_threads(), settings.quick, settings.network)
    dtypes = ("float32",) if settings.quick else ("float32", "bfloat16")
    return [
        (sweep, Point(batch, size, n, dtype, *rest))
        for dtype, (sweep, batch, size, n) in product(dtypes, sweeps)
    ]


def _in_its_own_process(point: Point) -> Row:
    command = [sys.executable, "-m", "ddpm_fast.bench.growth", json.dumps(asdict(point))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"growth: {point} failed: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def _memory(device: torch.device, what: str) -> int | None:
    """Bytes: "VmRSS", what this process has now, or "VmHWM", the most that it had."""
    if device.type == "cuda":
        is_peak = what == "VmHWM"
        return torch.cuda.max_memory_allocated(device) if is_peak else torch.cuda.memory_allocated(device)
    if not sys.platform.startswith("linux"):
        return None
    with open("/proc/self/status") as file:  # a child begins with its parent's peak in getrusage
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(what))


def _linear(dtype: str, rows: list[Row]) -> str:
    """How far the times are from a + b steps, each relative to itself."""
    steps = np.array([row["steps"] for row in rows], dtype=float)
    seconds = np.array([row["time"][1] for row in rows])
    slope, start = np.polyfit(steps, seconds, 1, w=1 / seconds)
    off = abs((start + slope * steps) / seconds - 1).max()
    return (
        f"- {dtype}: {slope * 1e3:.2f} ms a step and {start * 1e3:.1f} ms a run; {len(rows)} points are "
        f"within {off:.1%} of that."
    )


def _flat(dtype: str, rows: list[Row]) -> str:
    """Whether the longest run's peak is that of the shortest."""
    peaks = [row["memory"] for row in rows]
    if None in peaks:
        return f"- {dtype}: memory is not measured here."
    more = peaks[-1] - peaks[0]
    verdict = "does not grow" if more <= SLACK else "GROWS"
    return (
        f"- {dtype}: peak memory {verdict} with the steps: {rows[-1]['steps']} take {more / 2**20:+.1f} MiB "
        f"beside {rows[0]['steps']}."
    )


if __name__ == "__main__":
    print(json.dumps(run(Point(**json.loads(sys.argv[1])))))
