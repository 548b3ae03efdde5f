"""What a step of OpenAI's `GaussianDiffusion` does as a row of numbers, one row for each t, float64.

Row t of a table is for `ops.posterior_step`, which takes a batch of t of any order as its ``i``.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ... import steps
from ...schedule import Schedule
from ...steps import COLUMNS

X_FROM_X0, X_FROM_X, X_FROM_OUT, NOISE = (
    COLUMNS.index(name) for name in ("x_from_x0", "x_from_x", "x_from_out", "x_from_noise")
)


def level(schedule: Schedule, name: str) -> np.ndarray:
    """An array (T,) of the schedule by its name, or one of those below."""
    s = schedule
    if name in _LEVELS:
        with np.errstate(divide="ignore"):
            return _LEVELS[name](s)
    return getattr(s, name)


def _fixed_large(s: Schedule) -> np.ndarray:
    """At t = 0 the small one, as in OpenAI's code, for a better likelihood."""
    return np.append(np.exp(s.posterior_log_variance_clipped[:1]), s.betas[1:])


_LEVELS: dict[str, Callable[[Schedule], np.ndarray]] = {
    "one_minus_alphas_cumprod": lambda s: 1.0 - s.alphas_cumprod,
    "log_betas": lambda s: np.log(s.betas),
    "fixed_large": _fixed_large,
    "log_fixed_large": lambda s: np.log(_fixed_large(s)),
    "recip_posterior_mean_coef1": lambda s: 1.0 / s.posterior_mean_coef1,
    "posterior_mean_ratio": lambda s: s.posterior_mean_coef2 / s.posterior_mean_coef1,
    "x0_from_gradient": lambda s: (1.0 - s.alphas_cumprod) / s.sqrt_alphas_cumprod,
}


def posterior(schedule: Schedule) -> np.ndarray:
    """(T, 2): what x_0 and x_t weigh in the mean of q(x_{t-1} | x_t, x_0) (Ho et al. 2020, eq. 7)."""
    return np.stack([schedule.posterior_mean_coef1, schedule.posterior_mean_coef2], axis=1)


def rows(schedule: Schedule, kind: str, prediction: str, variance: str, eta: float) -> np.ndarray:
    """(T, 7), or (T, 9) where the noise of "ddpm" has a learned variance; row t is that of timestep t.

    Args:
        kind: "ddpm", x_{t-1} drawn from p(x_{t-1} | x_t); "mean", that without the noise; "ddim" (Song et al.
            2021, arXiv 2010.02502, eq. 12) and "ddim_reverse", its way back to x_{t+1}: both with eps derived
            again from the clipped x0.
        prediction: in the words of `steps`.
        variance: of "ddpm": "fixed_small", "fixed_large", "learned_range", or "learned", where the second
            half of ``out`` is the log-variance itself.
        eta: of "ddim".

    Raises:
        ValueError: as `steps.ddpm` and `steps.ddim`.
    """
    if kind == "ddim":
        return _by_time(steps.ddim(schedule, eta=eta, prediction=prediction, use_clipped_out=True))
    if kind == "ddim_reverse":
        return _reverse(schedule, prediction)
    if kind == "mean":
        table = _by_time(steps.ddpm(schedule, prediction=prediction))
        table[:, NOISE] = 0.0
        return table
    learned = variance in ("learned", "learned_range")
    table = _by_time(
        steps.ddpm(schedule, prediction=prediction, variance="learned_range" if learned else variance)
    )
    if variance == "learned":  # v = frac * 1 + (1 - frac) * -1, with frac = (v + 1) / 2
        table[:, len(COLUMNS) :] = -1.0, 1.0
    return table


def _by_time(table: steps.StepTable) -> np.ndarray:
    return table.rows[::-1].copy()


def _reverse(schedule: Schedule, prediction: str) -> np.ndarray:
    """x_{t+1} = sqrt(ab_next) x0 + sqrt(1 - ab_next) eps, with eps = (x - sqrt(ab) x0) / sqrt(1 - ab)."""
    table = _by_time(steps.ddim(schedule, prediction=prediction, use_clipped_out=True))
    ab, ab_next = schedule.alphas_cumprod, np.append(schedule.alphas_cumprod[1:], 0.0)
    from_eps = np.sqrt(1.0 - ab_next)
    table[:, X_FROM_X0] = np.sqrt(ab_next) - from_eps * np.sqrt(ab / (1.0 - ab))
    table[:, X_FROM_X] = from_eps / np.sqrt(1.0 - ab)
    table[:, [X_FROM_OUT, NOISE]] = 0.0
    return table
