"""The one way that times are taken: several arms in one process, one after the other in every round.

A drift of the clock, or a neighbour on the machine, so falls on all arms alike; what is compared is the ratio
of two arms within a round, by its median and quartiles over the rounds.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..compat.peers import Missing

Run = Callable[[], object]
Quartiles = list[float]
"""First quartile, median, third quartile."""

A_ROUND = 2e-3
"""Seconds that an arm is repeated for in a round, at least: enough for the clock."""

L2 = 256 << 20
"""Bytes that are written before each launch on a GPU, so that it finds nothing in the cache."""


@dataclass(frozen=True)
class Case:
    """What several arms do, each in its own way.

    Attributes:
        labels: what it is: an op, its shape, a batch.
        arms: what builds each arm, by name; called right before it is measured. One that cannot run here
            raises `Missing` with the reason.
        bytes: that a call has to move at the least, where it is bound by memory.
        copied: that ``copy_`` moves, where it is an arm.
        calls: how many of what a row states (steps, images) are in a call.
    """

    labels: dict[str, str | int]
    arms: Mapping[str, Callable[[], Run]]
    bytes: int | None = None
    copied: int | None = None
    calls: int = 1

    def built(self) -> tuple[dict[str, Run], dict[str, str]]:
        """The arms that can run here, and why each of the others cannot."""
        runs, skipped = {}, {}
        for name, build in self.arms.items():
            try:
                runs[name] = build()
            except Missing as reason:
                skipped[name] = str(reason)
        return runs, skipped


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: by arm, one a round."""

    seconds: dict[str, list[float]]

    def time(self, arm: str, calls: int = 1) -> Quartiles:
        """Of one of the ``calls`` things that a call does."""
        return quartiles([taken / calls for taken in self.seconds[arm]])

    def ratio(self, slow: str, fast: str) -> Quartiles:
        """How many times as long ``slow`` takes as ``fast``, round by round."""
        pairs = zip(self.seconds[slow], self.seconds[fast], strict=True)
        return quartiles([a / b for a, b in pairs])

    def fastest(self, *arms: str) -> str | None:
        """Of those that were measured."""
        measured = [arm for arm in arms if arm in self.seconds]
        return min(measured, key=lambda arm: statistics.median(self.seconds[arm]), default=None)


def quartiles(values: list[float]) -> Quartiles:
    return statistics.quantiles(values, n=4, method="inclusive")


def measure(
    arms: Mapping[str, Run],
    rounds: int,
    *,
    device: torch.device = torch.device("cpu"),  # noqa: B008
    flush: bool = False,
    on_round: Callable[[], object] = lambda: None,
) -> Timing:
    """Time every arm once a round, the arms in turns of who is first, without garbage collection.

    Args:
        arms: what is called, without arguments. Each is called twice before the first round.
        rounds: at least 2.
        device: that the arms work on; a GPU is waited for.
        flush: on a GPU, time each call by its events, its data not in the L2 cache: for single kernels.
        on_round: called after each round.

    Raises:
        ValueError: no arm; fewer than two rounds; an arm whose result is zero everywhere or not finite, since
            both are faster than numbers.
        RuntimeError: an arm that changed the number of torch's threads.
    """
    if not arms:
        raise ValueError("arms must not be empty")
    if rounds < 2:
        raise ValueError(f"rounds must be at least 2, got {rounds}")
    threads = torch.get_num_threads()
    clock = _clock(device, flush)
    repeats = {}
    for name, run in arms.items():
        _check_result(name, run())
        repeats[name] = max(1, int(A_ROUND / max(clock(run, 1), 1e-7)))
    names = list(arms)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with _no_collection() as collect:
        for _ in range(rounds):
            for name in names:
                seconds[name].append(clock(arms[name], repeats[name]))
            names.append(names.pop(0))
            collect()
            on_round()
    if torch.get_num_threads() != threads:
        raise RuntimeError(f"an arm changed torch's threads from {threads} to {torch.get_num_threads()}")
    return Timing(seconds)


def ceilings(device: torch.device, rounds: int) -> dict[str, Quartiles]:
    """What this machine does at its best, now: bytes and operations a second.

    ``copy_`` of 64 MiB, read and written; a product of two 1024 x 1024 matrices (4096 on a GPU).
    """
    size = 4096 if device.type == "cuda" else 1024
    x = torch.randn(16 << 20, device=device)
    target = torch.empty_like(x)
    arms: dict[str, Run] = {"copy_ GB/s": lambda: target.copy_(x)}
    work = {"copy_ GB/s": 2 * x.nbytes}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        name = f"matmul {str(dtype).removeprefix('torch.')} GFLOP/s"
        arms[name] = lambda a=a, b=b: a @ b
        work[name] = 2 * size**3
    timing = measure(arms, rounds, device=device, flush=True)
    return {name: [work[name] / s / 1e9 for s in reversed(timing.time(name))] for name in arms}


def _clock(device: torch.device, flush: bool) -> Callable[[Run, int], float]:
    """Seconds of one call, from so many."""

    def wall(run: Run, repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - start) / repeats

    if device.type != "cuda":
        return wall
    cache = torch.empty(L2, dtype=torch.int8, device=device)

    def waited(run: Run, repeats: int) -> float:
        def until_done() -> None:
            for _ in range(repeats):
                run()
            torch.cuda.synchronize(device)

        torch.cuda.synchronize(device)
        return wall(until_done, 1) / repeats

    def events(run: Run, repeats: int) -> float:
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for start, end in pairs:
            cache.zero_()  # long enough that the launch of the next waits for nothing
            start.record()
            run()
            end.record()
        torch.cuda.synchronize(device)
        return sum(start.elapsed_time(end) for start, end in pairs) / repeats / 1e3

    return events if flush else waited


def _check_result(name: str, result: object) -> None:
    for value in tree_leaves(result):
        if isinstance(value, Tensor) and value.is_floating_point():
            if not value.isfinite().all():
                raise ValueError(f"{name} gives numbers that are not finite: its time says nothing")
            if not value.any():
                raise ValueError(f"{name} gives zeros only: its time says nothing")


@contextmanager
def _no_collection() -> Iterator[Callable[[], object]]:
    """No garbage collection but where it is asked for, and then of what is new only."""
    enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield gc.collect
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()
