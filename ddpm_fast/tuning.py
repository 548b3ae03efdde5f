"""Which of several ways is the fastest on this processor: measured once, and kept for later processes.

A measurement changes nothing that a caller can see but which way is taken, and so the last bits of results.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from . import files
from .ops._dispatch import LIBRARY_FILE, NATIVE_MISSING, cpu_kernels, is_watched

WORTH_MEASURING = 50e-6  # seconds of the prior's call
CLEARLY_FASTER = 0.9  # of the prior's time, at most
CLEARLY_SLOWER = 1.3  # of the least time so far
FEWEST_ROUNDS, MOST_ROUNDS = 3, 9
SECONDS = 0.01  # in which more rounds than the fewest begin
ATTEMPTS, DISTURBED = 3, 0.05  # of a time in which threads waited for other processes for that part of it
PAUSE = 1.0  # seconds for which nothing more is measured on a busy machine
LARGER_THAN_CACHES = 2**26


class Call(NamedTuple):
    """What is timed. It has been called once, which makes what only a first call makes."""

    run: Callable[[], object]
    weight: Tensor  # dense, or as oneDNN has laid it out


class _Busy(Exception):
    """Other processes take this one's processors, and its threads wait for each other."""


_FASTEST: dict[tuple, str] = {}
_busy_until = 0.0


def fastest(of: tuple[object, ...], names: tuple[str, ...], prior: str, make: Callable[[str], Call]) -> str:
    """The name of the fastest way to do something, measured at the first call on this processor.

    In a network every layer's weights come from beyond the caches, and a layer that is called in a loop finds
    them at hand: that flatters what reads the most of them, by up to 2.5 times. So weights are evicted before
    each timed call. Ways are timed in turns, in 3 to 9 rounds. One is taken in place of ``prior`` if it is a
    tenth faster, by the least and by the median of its times, and that twice. Where other processes take this
    one's processors, threads that wait for each other take 50 times as long: then it is the prior, for this
    process.

    Kept are names, in this process and in ``$XDG_CACHE_HOME/ddpm_fast`` (by default ``~/.cache/ddpm_fast``),
    by ``of``, ``names``, the number of threads, the processor, its instruction set, and the builds of this
    library and of torch. Of two processes that measure at once one is believed. A file that cannot be read
    is as none; a folder that cannot be written in keeps nothing.

    Where ``torch.use_deterministic_algorithms`` is on it is the prior; and where a mode, a tracer or a
    profiler looks on and nothing is measured yet, which would see the calls.

    Args:
        of: what is done, and on which shapes: things that say so as text too.
        names: of the ways, ``prior`` among them.
        prior: the fastest as far as is known.
        make: what is timed, by name.
    """
    if torch.are_deterministic_algorithms_enabled():
        return prior
    key = of, torch.get_num_threads(), names
    name = _FASTEST.get(key)
    if name is None:
        if is_watched():
            return prior
        name = _FASTEST.setdefault(key, _known(*key, prior, make))  # another thread may have come first
    return name


def _known(
    of: tuple[object, ...], threads: int, names: tuple[str, ...], prior: str, make: Callable[[str], Call]
) -> str:
    """As an earlier process has measured it, or measured now."""
    global _busy_until
    key = f"{' '.join(map(str, of))}, {threads} threads: {' '.join(names)}"
    name = _read().get(key)
    if name in names:
        return name
    if time.monotonic() < _busy_until:
        return prior
    try:
        name = _measured(names, prior, make)
    except _Busy:
        _busy_until = time.monotonic() + PAUSE
        return prior
    _write(key, name)
    return name


def _measured(names: tuple[str, ...], prior: str, make: Callable[[str], Call]) -> str:
    # It takes no memory until it is written.
    others = torch.empty(LARGER_THAN_CACHES, dtype=torch.uint8, device="cpu")
    calls = _contenders(names, prior, make, others)
    best = prior
    for _ in range(2):
        best = _winner(calls, prior, others)
        if best == prior:
            break
        calls = {name: calls[name] for name in (prior, best)}
    return best


def _contenders(
    names: tuple[str, ...], prior: str, make: Callable[[str], Call], others: Tensor
) -> dict[str, Call]:
    """The prior, and what is not clearly slower at once: packed weights take memory."""
    calls: dict[str, Call] = {}
    least = float("inf")
    for name in (prior, *(name for name in names if name != prior)):
        call = make(name)
        taken = _time(call, others)
        if name == prior or taken < CLEARLY_SLOWER * least:
            calls[name] = call
        if name == prior and taken < WORTH_MEASURING:
            break
        least = min(least, taken)
    return calls


def _winner(calls: dict[str, Call], prior: str, others: Tensor) -> str:
    if len(calls) == 1:
        return prior
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + SECONDS
    for k in range(MOST_ROUNDS):
        if k >= FEWEST_ROUNDS and time.perf_counter() > end:
            break
        for name, call in calls.items():
            times[name].append(_time(call, others))
    least, middle = ({name: by(values) for name, values in times.items()} for by in (min, statistics.median))
    faster = [name for name in calls if all(by[name] < CLEARLY_FASTER * by[prior] for by in (least, middle))]
    return min(faster, key=least.__getitem__, default=prior)


def _time(call: Call, others: Tensor) -> float:
    """Of a call that finds its weight beyond the caches, and every thread awake."""
    threads = torch.get_num_threads()
    clock = time.thread_time if threads == 1 else time.perf_counter  # its own has no other process in it
    for _ in range(ATTEMPTS):
        if not _flush(call.weight):
            others.zero_()
        others[: threads * 2**16].zero_()  # threads that have fallen asleep would begin late
        waited, start = _waited(), clock()
        call.run()
        taken = clock() - start
        if threads == 1 or _waited() - waited <= DISTURBED * taken:
            return taken
    raise _Busy


def _waited() -> float:
    """Seconds for which threads of this process could have run, and others did; 0 where nobody counts."""
    try:
        stats = [(thread / "schedstat").read_text() for thread in Path("/proc/self/task").iterdir()]
    except OSError:  # this system has none, or a thread has ended
        return 0.0
    return 1e-9 * sum(int(text.split()[1]) for text in stats)


def _flush(weight: Tensor) -> bool:
    """Take a weight out of the caches, if the processor has an instruction for that."""
    if weight.is_mkldnn:
        address, size = torch.ops.mkldnn.data_ptr(weight), torch.ops.mkldnn._nbytes(weight)
    else:
        address, size = weight.data_ptr(), weight.nbytes
    return _evict()(address, size)


@cache
def _evict() -> Callable[[int, int], bool]:
    evict = ctypes.CDLL(str(LIBRARY_FILE)).ddpm_fast_evict
    evict.argtypes, evict.restype = (ctypes.c_void_p, ctypes.c_size_t), ctypes.c_bool
    return evict


# ---- between processes ----


@cache
def machine() -> dict[str, str]:
    """What the times depend on, besides the shapes and threads."""
    library = b"" if NATIVE_MISSING is not None else LIBRARY_FILE.read_bytes()
    about = _cpuinfo()
    return {
        "processor": processor(),
        **{name: about[name] for name in ("cpu family", "model", "stepping", "cache size") if name in about},
        "kernels": cpu_kernels(),
        "library": hashlib.sha256(library).hexdigest(),
        "torch": torch.__version__,
    }


@cache
def processor() -> str:
    """Its name, as the system has it."""
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def _cpuinfo() -> dict[str, str]:
    """Linux's description of the first processor; elsewhere nothing."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    lines = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in lines}


def _file() -> Path | None:
    """A machine's own, so that a home that many share, or a new build, takes nothing from another."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    try:
        folder = Path(given) if os.path.isabs(given) else Path.home() / ".cache"
    except RuntimeError:  # there is no home
        return None
    name = hashlib.sha256(json.dumps(machine()).encode()).hexdigest()[:16]
    return folder / "ddpm_fast" / f"fastest-{name}.json"


def _read() -> dict[str, str]:
    file = _file()
    try:
        content = json.loads(file.read_text(encoding="utf-8")) if file else None
        if content["machine"] == machine():
            return dict(content["fastest"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):  # none, or not one of ours
        pass
    return {}


def _write(key: str, name: str) -> None:
    file = _file()
    if file is None:
        return
    content = {"machine": machine(), "fastest": _read() | {key: name}}
    text = json.dumps(content, indent=2) + "\n"
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        files.replace(file, lambda to: to.write(text.encode()))
