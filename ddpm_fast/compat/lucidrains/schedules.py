"""The beta schedules of denoising-diffusion-pytorch as `Schedule`s, to the rounding of their ends."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...schedule import Schedule, check_int

LARGEST_BETA = 0.999


def beta_schedule(name: str, timesteps: int, **options: Any) -> Schedule:
    """The schedule of that name, with its options: "linear"; "cosine", s; "sigmoid", start, end and tau.

    Raises:
        TypeError: an option that the schedule does not have.
        ValueError: an unknown name, timesteps below 1, or options that make no schedule.
    """
    if name not in _BETAS:
        raise ValueError(f"unknown beta schedule {name!r}; allowed: {', '.join(_BETAS)}")
    return Schedule.from_betas(_BETAS[name](check_int("timesteps", timesteps, 1), **options).numpy())


def _linear(timesteps: int) -> Tensor:
    """Ho et al. 2020, section 4, both ends times 1000 / T."""
    scale = 1000 / timesteps
    return torch.linspace(scale * 1e-4, scale * 0.02, timesteps, dtype=torch.float64)


def _cosine(timesteps: int, s: float = 0.008) -> Tensor:
    """Nichol & Dhariwal 2021, arXiv 2102.09672, eq. 17."""
    return _falling(torch.cos((_fractions(timesteps) + s) / (1 + s) * math.pi * 0.5) ** 2)


def _sigmoid(
    timesteps: int, start: float = -3, end: float = 3, tau: float = 1, clamp_min: float = 1e-5
) -> Tensor:
    """Jabri et al. 2022, arXiv 2212.11972. Of ``clamp_min`` nothing depends, there as here.

    The two ends are float32 there while all else is float64, which moves the last levels by 1e-4 of
    themselves: `Schedule.sigmoid` is the one without that.
    """
    first, last = (torch.tensor(edge / tau, dtype=torch.float32).sigmoid() for edge in (start, end))
    fall = -((_fractions(timesteps) * (end - start) + start) / tau).sigmoid()
    return _falling((fall + last) / (last - first))


def _fractions(timesteps: int) -> Tensor:
    return torch.linspace(0, timesteps, timesteps + 1, dtype=torch.float64) / timesteps


def _falling(levels: Tensor) -> Tensor:
    """The betas between T + 1 values of alphas_cumprod, up to a common factor."""
    levels = levels / levels[0]
    return (1 - levels[1:] / levels[:-1]).clip(0, LARGEST_BETA)


_BETAS = {"linear": _linear, "cosine": _cosine, "sigmoid": _sigmoid}
