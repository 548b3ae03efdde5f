"""denoising-diffusion-pytorch's two loops as tables: its own float32 buffers, as rows of `steps.COLUMNS`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ...steps import COLUMNS, StepTable

LOUD = 8.0
"""How much of a rounding of x may reach the next x by way of x0. Above it x0 is a small difference of large
numbers, and another order of operations than the original's moves the next x by more than 1e-5."""


def times_of(T: int, num_steps: int) -> list[tuple[int, int]]:
    """(t, next t) of each step of DDIM, evenly spaced and truncated, from T - 1 down to -1."""
    times = torch.linspace(-1, T - 1, steps=num_steps + 1).int().tolist()[::-1]
    return list(pairwise(times))


def ddpm(levels: Mapping[str, Tensor], objective: str) -> StepTable:
    """The T steps of `p_sample_loop` (Ho et al. 2020, arXiv 2006.11239, eq. 7 and 11).

    ``levels`` are the buffers by name, on the CPU.
    """
    t = np.arange(len(levels["betas"]))[::-1]
    columns = _x0_columns(levels, objective, t)
    columns["x_from_x0"] = _at(levels["posterior_mean_coef1"], t)
    columns["x_from_x"] = _at(levels["posterior_mean_coef2"], t)
    std = (0.5 * levels["posterior_log_variance_clipped"]).exp()
    columns["x_from_noise"] = np.where(t > 0, _at(std, t), 0.0)
    return _table("ddpm", t, columns, draws=t > 0)


def ddim(
    levels: Mapping[str, Tensor], objective: str, times: Sequence[tuple[int, int]], eta: float
) -> StepTable:
    """The steps of `ddim_sample`, which derives eps from the clipped x0 (Song et al. 2021, arXiv 2010.02502,
    eq. 12). Noise is drawn at all of them but the last, whatever eta is.

    Raises:
        ValueError: an eta so large that a step's noise would have more than all of its variance.
    """
    t, t_next = (np.array(ends) for ends in zip(*times, strict=True))
    ends = t_next < 0  # in x0 itself
    ab, ab_next = (levels["alphas_cumprod"][torch.from_numpy(np.maximum(at, 0))] for at in (t, t_next))
    x_from_x0, x_from_eps, sigma = (weight.double().numpy() for weight in ddim_weights(ab, ab_next, eta))
    if not np.isfinite(x_from_eps[~ends]).all():
        bad = t[~ends & ~np.isfinite(x_from_eps)][0]
        raise ValueError(
            f"ddim_sampling_eta must leave the step at t = {bad} some variance beside its noise: 1 always "
            f"does, got {eta}"
        )
    columns = _x0_columns(levels, objective, t)
    recip, recipm1 = (_at(levels[f"sqrt_{name}_alphas_cumprod"], t) for name in ("recip", "recipm1"))
    columns["x_from_x0"] = np.where(ends, 1.0, x_from_x0 - x_from_eps / recipm1)
    columns["x_from_x"] = np.where(ends, 0.0, x_from_eps * recip / recipm1)
    columns["x_from_noise"] = np.where(ends, 0.0, sigma)
    return _table("ddim", t, columns, draws=~ends)


def ddim_weights(ab: Tensor, ab_next: Tensor, eta: float) -> tuple[Tensor, Tensor, Tensor]:
    """The weights of x0, eps and noise in the next x, in the dtype of the levels."""
    sigma = eta * ((1 - ab / ab_next) * (1 - ab_next) / (1 - ab)).sqrt()
    return ab_next.sqrt(), (1 - ab_next - sigma**2).sqrt(), sigma


def last(table: StepTable, count: int) -> StepTable:
    """The last `count` steps of a run, at least one."""
    return StepTable(table.method, table.timesteps[-count:], table.rows[-count:], table.draws[-count:])


def loud(table: StepTable) -> int:
    """How many steps it takes to be past all that are `LOUD`."""
    over = np.flatnonzero(np.abs(table.column("x0_from_x") * table.column("x_from_x0")) > LOUD)
    return int(over[-1]) + 1 if over.size else 0


def _x0_columns(levels: Mapping[str, Tensor], objective: str, t: np.ndarray) -> dict[str, np.ndarray]:
    zero, one = np.zeros(len(t)), np.ones(len(t))
    from_x, from_out = {
        "pred_noise": lambda: (
            _at(levels["sqrt_recip_alphas_cumprod"], t),
            -_at(levels["sqrt_recipm1_alphas_cumprod"], t),
        ),
        "pred_x0": lambda: (zero, one),
        "pred_v": lambda: (
            _at(levels["sqrt_alphas_cumprod"], t),
            -_at(levels["sqrt_one_minus_alphas_cumprod"], t),
        ),
    }[objective]()
    return {"x0_from_x": from_x, "x0_from_out": from_out}


def _at(level: Tensor, t: np.ndarray) -> np.ndarray:
    return level.double().numpy()[t]


def _table(method: str, t: np.ndarray, columns: dict[str, np.ndarray], draws: np.ndarray) -> StepTable:
    zero = np.zeros(len(t))
    return StepTable(method, t, np.stack([columns.get(name, zero) for name in COLUMNS], axis=1), draws)
