"""A diffusion over some of another's timesteps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ... import steps
from .gaussian_diffusion import GaussianDiffusion

__all__ = ["SpacedDiffusion", "space_timesteps"]


def space_timesteps(num_timesteps: int, section_counts: str | Sequence[int]) -> set[int]:
    """Which of the timesteps a shorter run keeps: `steps.space_timesteps`, as a set.

    Args:
        num_timesteps: T.
        section_counts: "ddimN", the first integer stride that gives N; or counts, as "50", "10,15,20" or
            [10, 15, 20], one for each of as many equal sections of the timesteps, from t = 0 up.

    Raises:
        ValueError: no stride gives N, or a section is smaller than its count.
    """
    return set(steps.space_timesteps(num_timesteps, section_counts).tolist())


class SpacedDiffusion(GaussianDiffusion):
    """A `GaussianDiffusion` over the timesteps ``use_timesteps`` of one whose betas are given.

    Its own t counts those that are kept, from 0; a model and a ``cond_fn`` are called with the timestep that
    t was before.

    Args:
        use_timesteps: a collection of timesteps of the first diffusion.
        kwargs: see `GaussianDiffusion`.

    Attributes:
        use_timesteps: as a set.
        timestep_map: of each own t, which timestep it was.
        original_num_steps: how many there were.
    """

    def __init__(self, use_timesteps: Iterable[int], **kwargs: Any) -> None:
        self.use_timesteps = set(use_timesteps)
        self.original_num_steps = len(kwargs["betas"])
        alphas_cumprod = GaussianDiffusion(**kwargs).alphas_cumprod
        self.timestep_map = [t for t in range(self.original_num_steps) if t in self.use_timesteps]
        kept = alphas_cumprod[self.timestep_map]
        kwargs["betas"] = 1.0 - kept / np.append(1.0, kept[:-1])
        super().__init__(**kwargs)
        self._kept_maps: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def _wrap_model(self, model: Callable[..., Any]) -> _WrappedModel:
        if isinstance(model, _WrappedModel):
            return model
        wrapped = _WrappedModel(model, self.timestep_map, self.rescale_timesteps, self.original_num_steps)
        wrapped.kept = self._kept_maps
        return wrapped

    def _scale_timesteps(self, t: Tensor) -> Tensor:
        return t  # what is wrapped scales them


class _WrappedModel:
    """``model(x, ts, **kwargs)`` at the timesteps that ``ts`` were before."""

    def __init__(
        self,
        model: Callable[..., Any],
        timestep_map: Sequence[int],
        rescale_timesteps: bool,
        original_num_steps: int,
    ) -> None:
        self.model = model
        self.timestep_map = timestep_map
        self.rescale_timesteps = rescale_timesteps
        self.original_num_steps = original_num_steps
        self.kept: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def __call__(self, x: Tensor, ts: Tensor, **kwargs: Any) -> Any:
        key = ts.device, ts.dtype
        if key not in self.kept:
            with torch.inference_mode(False):
                self.kept[key] = torch.tensor(self.timestep_map, device=ts.device, dtype=ts.dtype)
        times = self.kept[key][ts]
        if self.rescale_timesteps:
            times = times.float() * (1000.0 / self.original_num_steps)
        return self.model(x, times, **kwargs)
