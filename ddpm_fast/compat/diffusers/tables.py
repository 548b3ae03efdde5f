"""A diffusers scheduler as a table: its own float32 numbers, to the rounding, as rows of `steps.COLUMNS`.

What is computed in float32 here follows the order of diffusers' operations: `1 - ab / ab_prev` from a float32
`alphas_cumprod` is off by up to 4e-4 of itself, and a picture that shall be theirs needs that error too. A
column is combined from such numbers in float64 and rounded once, by `StepTable.tensor`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor

from ...steps import COLUMNS, LEARNED_RANGE_COLUMNS, SMALLEST_VARIANCE, StepTable


class NotATable(ValueError):
    """The scheduler, as it stands, is no table of steps; the message says why, in a line."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Steps of a diffusers scheduler as numbers, good or not.

    Attributes:
        timesteps: int64 (N,), as in ``scheduler.timesteps``.
        rows: float64 (N, 7) or (N, 9), as a `StepTable`'s; not finite where diffusers' own step is not.
        draws: bool (N,): the steps at which diffusers draws noise.
        clip: the bound of |x0|, None for none.
        thresholds: whether x0 is thresholded by its own quantiles, which is no matter of rows: they then
            leave x0 as predicted.
    """

    timesteps: np.ndarray
    rows: np.ndarray
    draws: np.ndarray
    clip: float | None
    thresholds: bool = False


def step_table(
    scheduler: Any, *, eta: float = 0.0, use_clipped_model_output: bool | None = None
) -> tuple[StepTable, float | None]:
    """The run that a scheduler's `set_timesteps` has laid out, as ``(table, clip)``.

    Args:
        scheduler: a DDPMScheduler, DDIMScheduler or DPMSolverMultistepScheduler, of diffusers or of ours; the
            quirks of diffusers are in the table, unless it is one of ours with ``strict = False``.
        eta, use_clipped_model_output: of `DDIMScheduler.step`, and of it only; None is False.

    Returns:
        A `StepTable` whose rows hold diffusers' float32 values and whose ``draws`` are its draws, and the
        bound of |x0| (None: none), as `Sampler` takes it.

    Raises:
        NotATable: another scheduler, or settings that no affine row expresses; ``str(error)`` says which.
        ValueError: "fixed_large_log", whose steps are NaN in diffusers.
    """
    if isinstance(scheduler, diffusers.DDPMScheduler):
        method, rows = "ddpm", ddpm_rows(scheduler)
    elif isinstance(scheduler, diffusers.DDIMScheduler):
        method, rows = "ddim", ddim_rows(scheduler, eta, bool(use_clipped_model_output))
    elif isinstance(scheduler, diffusers.DPMSolverMultistepScheduler):
        method, rows = "dpm_solver", _dpm_solver_run(scheduler)
    else:
        raise NotATable(f"{type(scheduler).__name__} is none of DDPM, DDIM and DPMSolverMultistep")
    if rows.thresholds:
        raise NotATable(_THRESHOLDS)
    bad = ~np.isfinite(rows.rows).all(axis=1)
    if bad.any():
        raise NotATable(f"the step at t = {rows.timesteps[bad][0]} is not finite")
    t = rows.timesteps
    if t.size == 0 or t[-1] < 0 or (np.diff(t) >= 0).any():
        raise NotATable(f"the timesteps do not descend strictly to at least 0, but to {t[-3:].tolist()}")
    return StepTable(method, t, rows.rows, rows.draws), rows.clip


def ddpm_rows(scheduler: diffusers.DDPMScheduler) -> Rows:
    """The steps of DDPM (Ho et al. 2020, eq. 7 and 11) over ``scheduler.timesteps``.

    Raises:
        NotATable: a variance that the network gives directly, or one of `_check`'s.
        ValueError: "fixed_large_log", whose steps are NaN in diffusers, unless ``scheduler.strict = False``.
    """
    _check(scheduler, diffusers.DDPMScheduler, ("epsilon", "sample", "v_prediction"))
    config, strict = scheduler.config, getattr(scheduler, "strict", True)
    kind = config.variance_type
    if scheduler.variance_type != kind:
        raise NotATable(f"variance_type is {scheduler.variance_type!r}, and {kind!r} in the config")
    if kind == "fixed_large_log" and strict:
        raise ValueError(
            "variance_type='fixed_large_log' takes the root of a negative number in diffusers: every picture "
            "is NaN. Use 'fixed_large', which it was meant to be, or set scheduler.strict = False"
        )
    if kind not in ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned_range"):
        raise NotATable(f"variance_type={kind!r} is no column of a table")

    t = _timesteps(scheduler)
    respaced = scheduler.custom_timesteps or scheduler.num_inference_steps
    prev_t = np.append(t[1:], -1) if respaced else t - 1
    ab = _at(scheduler.alphas_cumprod, t)
    ab_prev = _at(scheduler.alphas_cumprod, prev_t, after_last=scheduler.one)
    alpha = ab / ab_prev
    beta = 1 - alpha
    small = torch.clamp((1 - ab_prev) / (1 - ab) * beta, min=SMALLEST_VARIANCE)

    columns = _prediction(config.prediction_type, ab**0.5, (1 - ab) ** 0.5)[0]
    columns["x_from_x0"] = (ab_prev**0.5 * beta) / (1 - ab)
    columns["x_from_x"] = alpha**0.5 * (1 - ab_prev) / (1 - ab)
    if kind == "learned_range":
        std = torch.ones_like(ab)
        columns |= {"min_log": torch.log(small), "max_log": torch.log(beta)}
    elif kind == "fixed_small":
        std = small**0.5
    elif kind == "fixed_small_log":
        std = torch.exp(0.5 * torch.log(small))
    else:
        std = beta**0.5
    draws = t > 0
    noisy = draws if strict else draws & (np.arange(len(t)) < len(t) - 1)
    columns["x_from_noise"] = torch.where(torch.from_numpy(noisy), std, 0.0)
    return Rows(t, _rows(columns), draws, *_clipping(config))


def ddim_rows(scheduler: diffusers.DDIMScheduler, eta: float = 0.0, use_clipped: bool = False) -> Rows:
    """The steps of DDIM (Song et al. 2021, eq. 12 and 16) over ``scheduler.timesteps``.

    The noise level that a step ends at is that of ``t - T // N``, as in diffusers, though with some spacings
    the next step starts from another; with ``scheduler.strict = False`` it is the next step's.

    Raises:
        NotATable: before `set_timesteps`, or one of `_check`'s.
    """
    _check(scheduler, diffusers.DDIMScheduler, ("epsilon", "sample", "v_prediction"))
    if scheduler.num_inference_steps is None:
        raise NotATable("set_timesteps has not run")
    config, t = scheduler.config, _timesteps(scheduler)
    if getattr(scheduler, "strict", True):
        prev_t = t - config.num_train_timesteps // scheduler.num_inference_steps
    else:
        prev_t = np.append(t[1:], -1)
    ab = _at(scheduler.alphas_cumprod, t)
    ab_prev = _at(scheduler.alphas_cumprod, prev_t, after_last=scheduler.final_alpha_cumprod)
    std = eta * (((1 - ab_prev) / (1 - ab)) * (1 - ab / ab_prev)) ** 0.5
    x_from_eps = ((1 - ab_prev - std**2) ** 0.5).double()

    columns, (eps_from_x, eps_from_out) = _prediction(config.prediction_type, ab**0.5, (1 - ab) ** 0.5)
    x_from_x0 = (ab_prev**0.5).double()
    if use_clipped:  # eps = (x - sqrt(ab) x0) / sqrt(1 - ab)
        eps_from_x, eps_from_out = 1 / ((1 - ab) ** 0.5).double(), 0.0
        x_from_x0 = x_from_x0 - x_from_eps * (ab**0.5).double() * eps_from_x
    columns["x_from_x0"] = x_from_x0
    columns["x_from_x"] = x_from_eps * eps_from_x
    columns["x_from_out"] = x_from_eps * eps_from_out
    columns["x_from_noise"] = std if eta > 0 else torch.zeros_like(std)
    return Rows(t, _rows(columns), np.full(len(t), eta > 0), *_clipping(config))


def dpm_solver_rows(scheduler: diffusers.DPMSolverMultistepScheduler) -> tuple[Rows, Rows]:
    """The steps of DPM-Solver++ (Lu et al. 2022, arXiv 2211.01095, algorithm 2) over ``scheduler.timesteps``:
    each of first order, and each of second.

    Raises:
        NotATable: another algorithm, order 3, before `set_timesteps`, or one of `_check`'s.
    """
    config = scheduler.config
    predictions = ("epsilon", "sample", "v_prediction", "flow_prediction")
    _check(scheduler, diffusers.DPMSolverMultistepScheduler, predictions)
    if config.algorithm_type != "dpmsolver++":
        raise NotATable(f"algorithm_type={config.algorithm_type!r} is not 'dpmsolver++'")
    if config.solver_order not in (1, 2):
        raise NotATable(f"solver_order={config.solver_order} needs the outputs of two steps before")
    clip, thresholds = _clipping({**config, "clip_sample": False})
    if thresholds:
        raise NotATable(_THRESHOLDS)
    if scheduler.num_inference_steps is None:
        raise NotATable("set_timesteps has not run")

    sigmas = scheduler.sigmas.detach().cpu()
    alphas, stds = scheduler._sigma_to_alpha_sigma_t(sigmas)
    log_snr = torch.log(alphas) - torch.log(stds)
    h = torch.diff(log_snr)
    h_prev = torch.cat([torch.full_like(h[:1], torch.nan), h[:-1]])  # the first step has none
    decay = torch.exp(-h) - 1.0
    by = sigmas if config.prediction_type == "flow_prediction" else stds
    columns = _prediction(config.prediction_type, alphas[:-1], by[:-1])[0]
    columns["x_from_x"] = stds[1:] / stds[:-1]
    columns["x_from_x0"] = x_from_x0 = (-(alphas[1:] * decay)).double()
    t, draws = _timesteps(scheduler), np.zeros(len(h), dtype=np.bool_)
    first = Rows(t, _rows(columns), draws, clip)

    x_from_slope = alphas[1:] * (decay / h + 1.0) if config.solver_type == "heun" else x_from_x0 / 2
    x_from_slope = (1.0 / (h_prev / h)).double() * x_from_slope
    columns |= {"x_from_x0": x_from_x0 + x_from_slope, "x_from_x0_prev": -x_from_slope}
    return first, Rows(t, _rows(columns), draws, clip)


def ends_in_first_order(scheduler: diffusers.DPMSolverMultistepScheduler) -> bool:
    """Whether the last step of DPM-Solver is of first order, whatever the solver's."""
    config = scheduler.config
    return (
        config.euler_at_final
        or (config.lower_order_final and len(scheduler.timesteps) < 15)
        or config.final_sigmas_type == "zero"
    )


def _dpm_solver_run(scheduler: diffusers.DPMSolverMultistepScheduler) -> Rows:
    if scheduler.begin_index:
        raise NotATable(f"begin_index={scheduler.begin_index} leaves steps out")
    first, second = dpm_solver_rows(scheduler)
    low = np.full(len(first.rows), scheduler.config.solver_order == 1)
    low[0] = True
    low[-1] |= ends_in_first_order(scheduler)
    rows = np.where(low[:, None], first.rows, second.rows)
    return Rows(first.timesteps, rows, first.draws, first.clip)


_THRESHOLDS = "thresholding with a sample_max_value other than 1 depends on all of a picture"
_STEPPING = ("step", "_get_variance", "previous_timestep", "_threshold_sample", "convert_model_output")


def _check(scheduler: Any, base: type, predictions: tuple[str, ...]) -> None:
    """Refuse a prediction that is unknown, and a subclass or an object that steps in a way of its own."""
    if scheduler.config.prediction_type not in predictions:
        raise NotATable(f"prediction_type={scheduler.config.prediction_type!r} is none of {predictions}")
    replaced = [name for name in _STEPPING if name in vars(scheduler)]
    if replaced:
        raise NotATable(f"its {replaced[0]} has been replaced")
    for cls in type(scheduler).__mro__:
        if cls is base:
            return
        own = [name for name in _STEPPING if name in vars(cls)]
        if own and not cls.__module__.startswith(f"{__package__}."):
            raise NotATable(f"{cls.__name__} has a {own[0]} of its own")


def _timesteps(scheduler: Any) -> np.ndarray:
    return scheduler.timesteps.cpu().numpy().astype(np.int64)


def _at(alphas_cumprod: Tensor, t: np.ndarray, after_last: Tensor | None = None) -> Tensor:
    """``alphas_cumprod[t]`` as in diffusers: `after_last` after a run, NaN where diffusers raises."""
    values, T = alphas_cumprod.detach().cpu(), len(alphas_cumprod)
    picked = values[torch.from_numpy(np.clip(t, -T, T - 1))]
    picked = torch.where(torch.from_numpy((t < -T) | (t >= T)), torch.nan, picked)
    if after_last is not None:
        picked = torch.where(torch.from_numpy(t < 0), after_last.detach().cpu(), picked)
    return picked


def _prediction(kind: str, alpha: Tensor, sigma: Tensor) -> tuple[dict[str, Any], tuple[Any, Any]]:
    """The columns that make x0, and the weights of (x, out) in eps, before any clipping."""
    alpha, sigma = alpha.double(), sigma.double()
    x0, eps = {
        "epsilon": ((1 / alpha, -sigma / alpha), (0.0, 1.0)),
        "sample": ((torch.zeros_like(alpha), torch.ones_like(alpha)), (1 / sigma, -alpha / sigma)),
        "v_prediction": ((alpha, -sigma), (sigma, alpha)),
        "flow_prediction": ((torch.ones_like(alpha), -sigma), ()),
    }[kind]
    return dict(zip(COLUMNS[:2], x0, strict=True)), eps


def _clipping(config: Any) -> tuple[float | None, bool]:
    """``(clip, thresholds)``. Thresholds that may not exceed 1, the default, are a clip at 1."""
    if config["thresholding"]:
        if config["sample_max_value"] == 1 and 0 <= config["dynamic_thresholding_ratio"] <= 1:
            return 1.0, False
        return None, True
    if not config["clip_sample"]:
        return None, False
    clip = float(config["clip_sample_range"])
    if not clip > 0:
        raise NotATable(f"clip_sample_range={clip} is not above 0")
    return clip, False


def _rows(columns: dict[str, Any]) -> np.ndarray:
    """The columns as rows, float64; a column not named is 0."""
    names = LEARNED_RANGE_COLUMNS if "min_log" in columns else COLUMNS
    rows = np.zeros((len(columns["x0_from_x"]), len(names)))
    for name, values in columns.items():
        rows[:, names.index(name)] = values
    return rows
