"""How t is drawn in training, with the draws of guided-diffusion: from numpy's global generator."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor


def create_named_schedule_sampler(name: str, diffusion: Any, maxt: int | None = None) -> ScheduleSampler:
    """A `ScheduleSampler` by its name: "uniform", of t below ``maxt`` (None: T), or "loss-second-moment".

    Raises:
        NotImplementedError: another name.
    """
    if name == "uniform":
        return UniformSampler(diffusion, maxt)
    if name == "loss-second-moment":
        return LossSecondMomentResampler(diffusion)
    raise NotImplementedError(f"unknown schedule sampler: {name!r}; known: uniform, loss-second-moment")


class ScheduleSampler(ABC):
    """A distribution of t; a loss that is weighted by what `sample` returns keeps its mean."""

    @abstractmethod
    def weights(self) -> np.ndarray:
        """(T,), positive; they need not sum to 1."""

    def sample(self, batch_size: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """``(t, weights)``, int64 and float32 (B,), with `weight = 1 / (T p(t))`."""
        weights = self.weights()
        p = weights / np.sum(weights)
        t = np.random.choice(len(p), size=(batch_size,), p=p)  # noqa: NPY002  the original's draws
        scale = 1 / (len(p) * p[t])
        return torch.from_numpy(t).long().to(device), torch.from_numpy(scale).float().to(device)


class UniformSampler(ScheduleSampler):
    """Each t alike, of those below ``maxt`` (None: T), as a segmentation fork asks."""

    def __init__(self, diffusion: Any, maxt: int | None = None) -> None:
        self.diffusion = diffusion
        self._weights = np.ones([diffusion.num_timesteps if maxt is None else maxt])

    def weights(self) -> np.ndarray:
        return self._weights


class LossAwareSampler(ScheduleSampler):
    """One that learns from the losses, and stays the same in every process.

    ``guided_diffusion.train_util.TrainLoop`` gives losses to its own `LossAwareSampler` only, unless it is
    told of this one: ``guided_diffusion.resample.LossAwareSampler.register(LossAwareSampler)``.
    """

    def update_with_local_losses(self, local_ts: Tensor, local_losses: Tensor) -> None:
        """Take this process's t (B,) and losses (B,), with those of all others; B may differ between them."""
        if not (dist.is_available() and dist.is_initialized()):
            self.update_with_all_losses(local_ts.tolist(), local_losses.tolist())
            return
        counts = [
            torch.zeros(1, dtype=torch.int64, device=local_ts.device) for _ in range(dist.get_world_size())
        ]
        dist.all_gather(counts, torch.full_like(counts[0], len(local_ts)))
        sizes = [int(count) for count in counts]

        def gather(local: Tensor) -> list[float]:
            padded = local.new_zeros(max(sizes))
            padded[: len(local)] = local.detach()
            parts = [torch.empty_like(padded) for _ in sizes]
            dist.all_gather(parts, padded)
            return [value for part, size in zip(parts, sizes, strict=True) for value in part[:size].tolist()]

        self.update_with_all_losses(gather(local_ts), gather(local_losses))

    @abstractmethod
    def update_with_all_losses(self, ts: Sequence[int], losses: Sequence[float]) -> None:
        """Take the t and losses of all processes: the same in each, so that their states stay alike."""


class LossSecondMomentResampler(LossAwareSampler):
    """t in proportion to the root mean square of its last losses (Nichol & Dhariwal 2021, eq. 18).

    Until each t has ``history_per_term`` of them, each alike.
    """

    def __init__(self, diffusion: Any, history_per_term: int = 10, uniform_prob: float = 0.001) -> None:
        self.diffusion = diffusion
        self.history_per_term = history_per_term
        self.uniform_prob = uniform_prob
        self._loss_history = np.zeros([diffusion.num_timesteps, history_per_term])
        self._loss_counts = np.zeros([diffusion.num_timesteps], dtype=np.int64)

    def weights(self) -> np.ndarray:
        if not self._warmed_up():
            return np.ones([self.diffusion.num_timesteps])
        weights = np.sqrt(np.mean(self._loss_history**2, axis=-1))
        weights /= np.sum(weights)
        return weights * (1 - self.uniform_prob) + self.uniform_prob / len(weights)

    def update_with_all_losses(self, ts: Sequence[int], losses: Sequence[float]) -> None:
        for t, loss in zip(ts, losses, strict=True):
            history = self._loss_history[t]
            if self._loss_counts[t] == self.history_per_term:  # the oldest makes way
                history[:-1] = history[1:]
                history[-1] = loss
            else:
                history[self._loss_counts[t]] = loss
                self._loss_counts[t] += 1

    def _warmed_up(self) -> bool:
        return bool((self._loss_counts == self.history_per_term).all())
