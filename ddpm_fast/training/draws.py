"""What an update draws, as a function of (seed, update): a run that resumes or is split needs no state."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..losses import antithetic, uniform

__all__ = ["Batch", "Draws", "stream_seed"]

ORDER, TIMES, FLIPS, LAYERS = range(4)
"""Who draws: the order of the images, the times, the flips, and what the model draws itself (dropout)."""

_MASK = 2**64 - 1


@dataclass(frozen=True)
class Batch:
    """Of one update, over all processes. `first` is the running number of its first image.

    ``indices`` (B,) int64, which images; ``t`` (B,) int64; ``flip`` (B,) bool or None.
    """

    first: int
    indices: Tensor
    t: Tensor
    flip: Tensor | None


@dataclass(frozen=True)
class Draws:
    """``draws(update) -> Batch``. The images are dealt one permutation after another.

    Attributes:
        count: of the images.
        T: of the times.
        times: "uniform" or "antithetic".
    """

    seed: int
    count: int
    batch: int
    T: int
    times: str
    flip: bool

    def __call__(self, update: int) -> Batch:
        first = update * self.batch
        draw = antithetic if self.times == "antithetic" else uniform
        t = draw(self.batch, self.T, generator=_generator(self.seed, TIMES, update))
        flip = None
        if self.flip:
            flip = torch.rand(self.batch, generator=_generator(self.seed, FLIPS, update)) < 0.5
        return Batch(first, self._indices(first), t, flip)

    def _indices(self, first: int) -> Tensor:
        parts, end = [], first + self.batch
        while first < end:
            epoch, start = divmod(first, self.count)
            stop = min(self.count, start + end - first)
            parts.append(_permutation(self.seed, self.count, epoch)[start:stop])
            first += stop - start
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def stream_seed(seed: int, stream: int, number: int) -> int:
    """64 bits for a generator of its own: SplitMix64 (Steele, Lea & Flood 2014) over the three numbers."""
    state = 0
    for value in (seed, stream, number):
        state = (state ^ value) + 0x9E3779B97F4A7C15 & _MASK
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state


def _generator(seed: int, stream: int, number: int) -> torch.Generator:
    return torch.Generator().manual_seed(stream_seed(seed, stream, number))


@lru_cache(maxsize=2)
def _permutation(seed: int, count: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=_generator(seed, ORDER, epoch))
