"""One block of memory for all tensors of a call: those that are never needed together share bytes."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

LINE = 64
"""Where torch's own tensors begin: at a multiple of a cache line, which a BLAS's rounding may depend on."""


class Lifetime(NamedTuple):
    bytes: int
    first: int
    last: int


@lru_cache(maxsize=32)
def plan(lifetimes: tuple[Lifetime, ...]) -> tuple[tuple[int, ...], int]:
    """Where each tensor begins, and the bytes of all: two that live at the same time are apart.

    The largest is placed first, each in the smallest gap between those in its way that holds it (Pisarchyk
    and Lee 2020, arXiv 2001.03288, section 4.3).
    """
    begins = [0] * len(lifetimes)
    placed: list[tuple[int, int, Lifetime]] = []  # (begin, end, lifetime), by begin
    total = 0
    for k in sorted(range(len(lifetimes)), key=lambda k: -lifetimes[k].bytes):
        size, first, last = lifetimes[k]
        best, smallest, free = None, None, 0
        for begin, end, other in placed:
            if other.last < first or last < other.first:
                continue
            gap = begin - free
            if gap >= size and (smallest is None or gap < smallest):
                best, smallest = free, gap
            free = max(free, end)
        at = free if best is None else best
        end = at + -(-size // LINE) * LINE
        begins[k], total = at, max(total, end)
        placed.append((at, end, lifetimes[k]))
        placed.sort(key=lambda place: place[0])
    return tuple(begins), total
