"""What an update draws, as a function of (seed, update): a run that resumes or is split needs no state."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..losses import SecondMomentSampler, antithetic, uniform

__all__ = ["Batch", "Draws", "stream_seed"]

ORDER, TIMES, FLIPS, LAYERS, LABELS = range(5)
"""Who draws: the order of the images, the times, the flips, what the model draws itself (dropout), and which
labels are dropped."""

_MASK = 2**64 - 1


@dataclass(frozen=True)
class Batch:
    """Of one update, over all processes. `first` is the running number of its first image.

    ``indices`` (B,) int64, which images; ``flip`` and ``unlabelled`` (B,) bool or None.
    """

    first: int
    indices: Tensor
    flip: Tensor | None
    unlabelled: Tensor | None


@dataclass(frozen=True)
class Draws:
    """``draws(update) -> Batch``. The images are dealt one permutation after another.

    Attributes:
        count: of the images.
        T: of the times.
        times: "uniform", "antithetic" or "second_moment".
        label_dropout: the probability that an image's label is dropped.
    """

    seed: int
    count: int
    batch: int
    T: int
    times: str
    flip: bool
    label_dropout: float = 0.0

    def __call__(self, update: int) -> Batch:
        first = update * self.batch
        flip = self._chosen(FLIPS, update, 0.5) if self.flip else None
        unlabelled = self._chosen(LABELS, update, self.label_dropout) if self.label_dropout else None
        return Batch(first, self._indices(first), flip, unlabelled)

    def times_of(
        self, update: int, sampler: SecondMomentSampler | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """t (B,) int64, and the weight (B,) of each loss, None for 1.

        By the ``sampler``, where the times are "second_moment", as it is now: after the update before.
        """
        if sampler is not None:
            return sampler(self.batch, generator=_generator(self.seed, TIMES, update, sampler.counts.device))
        draw = antithetic if self.times == "antithetic" else uniform
        return draw(self.batch, self.T, generator=_generator(self.seed, TIMES, update)), None

    def _chosen(self, stream: int, update: int, probability: float) -> Tensor:
        return torch.rand(self.batch, generator=_generator(self.seed, stream, update)) < probability

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


def _generator(seed: int, stream: int, number: int, device: torch.device | str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(stream_seed(seed, stream, number))


@lru_cache(maxsize=2)
def _permutation(seed: int, count: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=_generator(seed, ORDER, epoch))
