"""What this run does: N rows of numbers. A sampler is a table, not a loop.

With `x0 = clip(x0_from_x x + x0_from_out out)`, every sampler here is one affine update

    x_next = x_from_x0 x0 + x_from_x x + x_from_out out + x_from_x0_prev x0_prev + x_from_noise noise

where `out` is what the network returned at `(x, t)` and `x0_prev` the x0 of the row before. Row 0 is the
first step, at the largest t. All is derived in numpy float64 and rounded once, by `StepTable.tensor`.

`ab` is `alphas_cumprod` at a row's own timestep and `ab_prev` at the next of the run's *own* list, 1 after
the last: a respaced run is a diffusion of its own, with `beta = 1 - ab / ab_prev` (Nichol & Dhariwal 2021,
arXiv 2102.09672, eq. 19).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from .schedule import Schedule, cached_tensor, check_int, check_number, read_only

if TYPE_CHECKING:
    import torch

__all__ = [
    "COLUMNS",
    "LEARNED_RANGE_COLUMNS",
    "PREDICTIONS",
    "SPACINGS",
    "VARIANCES",
    "StepTable",
    "ddim",
    "ddpm",
    "dpm_solver",
    "leading",
    "linspace",
    "space_timesteps",
    "trailing",
]

COLUMNS = (
    "x0_from_x",
    "x0_from_out",
    "x_from_x0",
    "x_from_x",
    "x_from_out",
    "x_from_x0_prev",
    "x_from_noise",
)
LEARNED_RANGE_COLUMNS = (*COLUMNS, "min_log", "max_log")

PREDICTIONS = ("epsilon", "x0", "v", "mean")
VARIANCES = ("fixed_small", "fixed_large", "learned_range")
SPACINGS = ("leading", "linspace", "trailing")

SMALLEST_VARIANCE = 1e-20  # diffusers' clamp: keeps log(variance) finite where the variance is 0


@dataclass(frozen=True, eq=False, repr=False)
class StepTable:
    """A run of N steps as numbers. Immutable; the arrays are read-only.

    Attributes:
        method: the sampler's name, for people to read.
        timesteps: int64 (N,), strictly descending: the training time t that the network sees at each step.
        rows: float64 (N, 7), columns as in `COLUMNS`; or (N, 9) for a learned range of variance, whose `out`
            has 2C channels, the second C being `v`: the noise then weighs `x_from_noise exp(log_var / 2)`,
            with `log_var = frac max_log + (1 - frac) min_log` and `frac = (v + 1) / 2`.
        draws: bool (N,): the steps at which diffusers draws noise, whatever weight the row then gives it. Who
            draws at just these keeps a shared generator in step with diffusers.

    Raises:
        ValueError: the shapes disagree, timesteps do not descend to at least 0, or a row is not finite.
    """

    method: str
    timesteps: np.ndarray
    rows: np.ndarray
    draws: np.ndarray

    def __post_init__(self) -> None:
        timesteps = np.array(self.timesteps, dtype=np.int64)
        rows = np.array(self.rows, dtype=np.float64)
        draws = np.array(self.draws, dtype=np.bool_)
        N = timesteps.size
        widths = (len(COLUMNS), len(LEARNED_RANGE_COLUMNS))
        if (
            N == 0
            or timesteps.shape != (N,)
            or draws.shape != (N,)
            or rows.shape not in [(N, w) for w in widths]
        ):
            raise ValueError(
                "a StepTable needs timesteps (N,), rows (N, 7) or (N, 9) and draws (N,) with N > 0, got "
                f"{timesteps.shape}, {rows.shape} and {draws.shape}"
            )
        if timesteps[-1] < 0 or (np.diff(timesteps) >= 0).any():
            raise ValueError(
                f"timesteps must descend strictly and end at 0 or above, got {timesteps.tolist()}"
            )
        bad = ~np.isfinite(rows).all(axis=1)
        if bad.any():
            raise ValueError(f"rows must be finite, the row at t = {timesteps[bad][0]} is not")
        for name, array in (("timesteps", timesteps), ("rows", rows), ("draws", draws)):
            object.__setattr__(self, name, read_only(array))

    @property
    def num_steps(self) -> int:
        """N, the number of network calls."""
        return len(self.timesteps)

    @property
    def learned_range(self) -> bool:
        """Whether the variance is learned: nine columns, and an `out` of 2C channels."""
        return self.rows.shape[1] == len(LEARNED_RANGE_COLUMNS)

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the columns of `rows`, in order."""
        return LEARNED_RANGE_COLUMNS if self.learned_range else COLUMNS

    @property
    def uses_x0_prev(self) -> bool:
        """Whether a row needs the x0 of the row before (row 0 never does)."""
        return bool(self.column("x_from_x0_prev").any())

    def column(self, name: str) -> np.ndarray:
        """One column by name: float64 (N,), a read-only view.

        Raises:
            ValueError: this table has no such column.
        """
        return self.rows[:, self.columns.index(_choose("column", name, self.columns))]

    def tensor(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """`rows` rounded once to `dtype` (None: float32), shape (N, 7) or (N, 9), kept per (device, dtype).

        Every caller gets the same tensor, so none may write to it. The first call copies to the device: make
        it before a CUDA graph is captured.

        Raises:
            TypeError: dtype is not a floating type.
        """
        import torch

        dtype = torch.float32 if dtype is None else dtype
        if not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating type, got {dtype}")
        return cached_tensor(self._tensors, self.rows, device, dtype)

    def timesteps_tensor(self, device: torch.device | str | None = None) -> torch.Tensor:
        """`timesteps` as an int64 tensor (N,), kept per device; none may write to it."""
        import torch

        return cached_tensor(self._tensors, self.timesteps, device, torch.int64)

    @cached_property
    def _tensors(self) -> dict[Any, torch.Tensor]:
        return {}

    def __len__(self) -> int:
        return self.num_steps

    def __repr__(self) -> str:
        t = self.timesteps
        return f"StepTable({self.method!r}, num_steps={self.num_steps}, timesteps={t[0]}..{t[-1]})"

    def __reduce__(self) -> tuple[Any, ...]:
        return StepTable, (self.method, self.timesteps, self.rows, self.draws)


# Samplers


def ddpm(
    schedule: Schedule,
    num_steps: int | None = None,
    *,
    variance: str = "fixed_small",
    prediction: str = "epsilon",
    spacing: str | Sequence[int] = "leading",
    steps_offset: int = 0,
    arithmetic: str = "float64",
) -> StepTable:
    """Ancestral sampling, x_next from `q(x_prev | x, x0)` (Ho et al. 2020, arXiv 2006.11239, eq. 7 and 11).

    The last step returns its mean, as in Ho's and OpenAI's code. diffusers adds noise to it when its t is
    above 0, as with "trailing" or a `steps_offset`: 1e-10 of it for "fixed_small", but `sqrt(beta)` for
    "fixed_large".

    Args:
        schedule: what training fixed.
        num_steps: N in [1, T]; None is T, or the length that `spacing` fixes.
        variance: "fixed_small" `beta (1 - ab_prev) / (1 - ab)`, at least 1e-20; "fixed_large" `beta`;
            "learned_range" between the two, as the network says (Nichol & Dhariwal 2021, eq. 15).
        prediction: what the network returns: "epsilon"; "x0"; "v" `sqrt(ab) noise - sqrt(1 - ab) x0`
            (Salimans & Ho 2022, arXiv 2202.00512); or "mean", of `q(x_prev | x, x0)` itself
            (`ModelMeanType.PREVIOUS_X` of OpenAI): clipping x0 then leaves x alone.
        spacing: "leading", "linspace" or "trailing" as in diffusers' DDPMScheduler; OpenAI's "ddimN" or
            sections in one string, as "50" or "10,15,20"; or the timesteps themselves, descending integers.
        steps_offset: added to each timestep of "leading", and of that only.
        arithmetic: what the coefficients are computed in. "float32" repeats diffusers' rounding, whose
            `1 - ab / ab_prev` is off by up to 4e-4 of itself (its step by 8e-5, at the smallest t): for who
            must match its images, not the mathematics.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an unknown name, a number out of range, timesteps that do not descend within [0, T), or a
            prediction that cannot give x0 at one of the run's noise levels ("epsilon" where ab is 0).
    """
    _choose("variance", variance, VARIANCES)
    _choose("arithmetic", arithmetic, ("float64", "float32"))
    levels = _Levels.of(schedule, num_steps, spacing, steps_offset)
    levels = _Levels(levels.timesteps, levels.ab.astype(arithmetic))
    (x0_from_x, x0_from_out), _ = levels.predictions(prediction)

    small = np.maximum((1.0 - levels.ab_prev) / (1.0 - levels.ab) * levels.beta, SMALLEST_VARIANCE)
    large = levels.beta
    not_last = np.arange(len(levels.timesteps)) < len(levels.timesteps) - 1
    learned = {}
    if variance == "learned_range":
        std = 1.0
        learned = {"min_log": np.log(small), "max_log": np.log(np.maximum(large, SMALLEST_VARIANCE))}
    else:
        std = np.sqrt(small if variance == "fixed_small" else large)

    predicts_mean = prediction == "mean"
    return levels.table(
        "ddpm",
        draws=levels.timesteps > 0,
        x0_from_x=x0_from_x,
        x0_from_out=x0_from_out,
        x_from_x0=0.0 if predicts_mean else levels.posterior_mean_coef1,
        x_from_x=0.0 if predicts_mean else levels.posterior_mean_coef2,
        x_from_out=1.0 if predicts_mean else 0.0,
        x_from_noise=std * not_last,
        **learned,
    )


def ddim(
    schedule: Schedule,
    num_steps: int | None = None,
    *,
    eta: float = 0.0,
    use_clipped_out: bool = False,
    prediction: str = "epsilon",
    spacing: str | Sequence[int] = "leading",
    steps_offset: int = 0,
    final_alpha_cumprod: float = 1.0,
) -> StepTable:
    """DDIM, deterministic or not (Song et al. 2021, arXiv 2010.02502, eq. 12 and 16)::

        x_next = sqrt(ab_prev) x0 + sqrt(1 - ab_prev - s^2) eps + s noise
        s = eta sqrt((1 - ab_prev) / (1 - ab) (1 - ab / ab_prev))

    `ab_prev` belongs to the next timestep of the run's own list. diffusers takes that of `t - T // N`: with
    "linspace", and with a "trailing" whose N does not divide T, that is not the noise level from which the
    next step starts, and its images differ.

    Args:
        eta: 0 is deterministic, 1 is as random as DDPM with "fixed_small".
        use_clipped_out: derive eps again from the clipped x0 (OpenAI, lucidrains) instead of taking it from
            `out` (Song et al., diffusers' default). The two differ where x0 is clipped.
        final_alpha_cumprod: ab_prev of the last step; diffusers' `set_alpha_to_one=False` is
            `schedule.alphas_cumprod[0]`.
        schedule, num_steps, prediction, spacing, steps_offset: see `ddpm`.

    Raises:
        TypeError, ValueError: as `ddpm`, or eta lies outside [0, 1], or final_alpha_cumprod outside [ab, 1]
            of the last timestep.
    """
    eta = check_number("eta", eta, lambda eta: 0 <= eta <= 1, "in [0, 1]")
    if not isinstance(use_clipped_out, (bool, np.bool_)):
        raise TypeError(f"use_clipped_out must be a bool, got {use_clipped_out!r}")
    levels = _Levels.of(schedule, num_steps, spacing, steps_offset)
    (x0_from_x, x0_from_out), (eps_from_x, eps_from_out) = levels.predictions(prediction)
    ab = levels.ab
    final_alpha_cumprod = check_number(
        "final_alpha_cumprod",
        final_alpha_cumprod,
        lambda final: ab[-1] <= final <= 1 and final > 0,
        f"in [{ab[-1]}, 1], from the noise level of the last timestep, t = {levels.timesteps[-1]}, to none,",
    )

    ab_prev = np.append(ab[1:], final_alpha_cumprod)
    # The variance over 1 - ab_prev is at most 1, so that its root below cannot turn negative by rounding.
    fraction = eta**2 * np.minimum((1.0 - ab / ab_prev) / (1.0 - ab), 1.0)
    x_from_eps = np.sqrt((1.0 - ab_prev) * (1.0 - fraction))

    x_from_x0 = np.sqrt(ab_prev)
    if use_clipped_out:  # eps = (x - sqrt(ab) x0) / sqrt(1 - ab)
        x_from_x0 = x_from_x0 - x_from_eps * np.sqrt(ab / (1.0 - ab))
        eps_from_x, eps_from_out = 1.0 / np.sqrt(1.0 - ab), 0.0
    return levels.table(
        "ddim",
        draws=np.full(len(ab), eta > 0),
        x0_from_x=x0_from_x,
        x0_from_out=x0_from_out,
        x_from_x0=x_from_x0,
        x_from_x=x_from_eps * eps_from_x,
        x_from_out=x_from_eps * eps_from_out,
        x_from_noise=np.sqrt((1.0 - ab_prev) * fraction),
    )


def dpm_solver(
    schedule: Schedule,
    num_steps: int | None = None,
    *,
    order: int = 2,
    prediction: str = "epsilon",
    spacing: str | Sequence[int] = "linspace",
    steps_offset: int = 0,
) -> StepTable:
    """DPM-Solver++(2M), midpoint form (Lu et al. 2022, arXiv 2211.01095, algorithm 2).

    The first step is of first order, as no x0 comes before it; the last goes to noise 0, so x_next = x0. This
    is diffusers' DPMSolverMultistepScheduler with its defaults, except at zero terminal SNR: diffusers puts
    ab at 2^-24 to stay finite, while here the first step takes its limit for ab = 0, and the second, whose
    slope would span an infinite step of log-SNR, its own limit: first order.

    Args:
        order: 1, which is DDIM with eta 0, or 2.
        num_steps: N; "linspace" and "leading" allow at most T - 1, which is what None is there.
        spacing: as in `ddpm`, but "leading" and "linspace" mean what *this* scheduler of diffusers does: lay
            out N + 1 points and drop the last, so that the last network call is well above t = 0.
        schedule, prediction, steps_offset: see `ddpm`.

    Raises:
        TypeError, ValueError: as `ddpm`, or order is not 1 or 2.
    """
    order = check_int("order", order, 1, 2)
    levels = _Levels.of(schedule, num_steps, spacing, steps_offset, drop_last=True)
    (x0_from_x, x0_from_out), _ = levels.predictions(prediction)

    alpha, sigma = np.sqrt(levels.ab), np.sqrt(1.0 - levels.ab)
    alpha_next, sigma_next = np.sqrt(levels.ab_prev), np.sqrt(1.0 - levels.ab_prev)
    x_from_x = sigma_next / sigma
    x_from_x0 = alpha_next - alpha * x_from_x  # alpha_next (1 - exp(-h)), finite at ab = 0 too

    # D1 = (x0 - x0_prev) / r0 with 1 / r0 = h / h_prev: 0 where h_prev is infinite (after ab = 0), and left 0
    # where h_prev is 0, since two steps at one noise level tell no slope.
    slope = np.zeros(len(alpha))
    if order == 2:
        with np.errstate(divide="ignore"):
            log_snr = np.log(alpha) - np.log(sigma)
        h = np.diff(log_snr)
        np.divide(h[1:], h[:-1], out=slope[1:-1], where=h[:-1] > 0)
    x_from_slope = 0.5 * slope * x_from_x0
    return levels.table(
        "dpm_solver",
        draws=np.zeros(len(alpha), dtype=np.bool_),
        x0_from_x=x0_from_x,
        x0_from_out=x0_from_out,
        x_from_x0=x_from_x0 + x_from_slope,
        x_from_x=x_from_x,
        x_from_x0_prev=-x_from_slope,
    )


@dataclass(frozen=True, eq=False)
class _Levels:
    """The noise levels a run visits: arrays of shape (N,), row 0 the first step."""

    timesteps: np.ndarray
    ab: np.ndarray

    @classmethod
    def of(
        cls,
        schedule: Schedule,
        num_steps: int | None,
        spacing: Any,
        steps_offset: int,
        drop_last: bool = False,
    ) -> _Levels:
        if not isinstance(schedule, Schedule):
            raise TypeError(f"schedule must be a ddpm_fast Schedule, got {type(schedule).__name__}")
        timesteps = _timesteps(schedule.T, num_steps, spacing, steps_offset, drop_last)
        return cls(timesteps, schedule.alphas_cumprod[timesteps])

    @cached_property
    def ab_prev(self) -> np.ndarray:
        return np.append(self.ab[1:], self.ab.dtype.type(1))

    @cached_property
    def beta(self) -> np.ndarray:
        return 1.0 - self.ab / self.ab_prev

    @cached_property
    def posterior_mean_coef1(self) -> np.ndarray:
        return np.sqrt(self.ab_prev) * self.beta / (1.0 - self.ab)

    @cached_property
    def posterior_mean_coef2(self) -> np.ndarray:
        return np.sqrt(self.ab / self.ab_prev) * (1.0 - self.ab_prev) / (1.0 - self.ab)

    def predictions(self, prediction: str) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
        """The weights of `(x, out)` in x0, and in eps, before any clipping."""
        _choose("prediction", prediction, PREDICTIONS)
        alpha, sigma = np.sqrt(self.ab), np.sqrt(1.0 - self.ab)
        if prediction == "epsilon":
            if (self.ab == 0).any():
                raise ValueError(
                    f"prediction 'epsilon' cannot give x0 at t = {self.timesteps[self.ab == 0][0]}, where "
                    "alphas_cumprod is 0: zero terminal SNR needs prediction 'v' or 'x0'"
                )
            return (1.0 / alpha, -sigma / alpha), (0.0, 1.0)
        if prediction == "x0":
            return (0.0, 1.0), (1.0 / sigma, -alpha / sigma)
        if prediction == "v":
            return (alpha, -sigma), (sigma, alpha)
        coef1, coef2 = self.posterior_mean_coef1, self.posterior_mean_coef2
        if (coef1 == 0).any():
            raise ValueError(
                f"prediction 'mean' cannot give x0 at t = {self.timesteps[coef1 == 0][0]}, where beta is 0 "
                "and the posterior mean does not depend on x0: use prediction 'epsilon', 'v' or 'x0'"
            )
        x0_from_x, x0_from_out = -coef2 / coef1, 1.0 / coef1
        return (x0_from_x, x0_from_out), ((1.0 - alpha * x0_from_x) / sigma, -alpha * x0_from_out / sigma)

    def table(self, method: str, draws: np.ndarray, **columns: Any) -> StepTable:
        """The StepTable of these columns; a column not named is 0."""
        names = LEARNED_RANGE_COLUMNS if "min_log" in columns else COLUMNS
        rows = np.zeros((len(self.timesteps), len(names)))
        for name, values in columns.items():
            rows[:, names.index(name)] = values
        return StepTable(method, self.timesteps, rows, draws)


# Spacings: which of the T timesteps a run visits, int64, descending


def leading(T: int, num_steps: int, steps_offset: int = 0) -> np.ndarray:
    """Multiples of `T // num_steps` from 0, plus `steps_offset`: diffusers' default.

    Starts at T - 1 only when num_steps is T.

    Raises:
        TypeError, ValueError: num_steps is not an integer in [1, T], or the offset takes t past T - 1.
    """
    num_steps = check_int("num_steps", num_steps, 1, T)
    steps_offset = check_int("steps_offset", steps_offset, 0)
    timesteps = np.arange(num_steps, dtype=np.int64)[::-1] * (T // num_steps) + steps_offset
    if timesteps[0] >= T:
        raise ValueError(
            f"steps_offset must keep t below T = {T}, got {steps_offset}, which starts {num_steps} steps of "
            f"'leading' spacing at t = {timesteps[0]}"
        )
    return timesteps


def linspace(T: int, num_steps: int) -> np.ndarray:
    """Evenly spaced from T - 1 to 0, rounded half to even.

    Raises:
        TypeError, ValueError: num_steps is not an integer in [1, T].
    """
    num_steps = check_int("num_steps", num_steps, 1, T)
    return np.linspace(0, T - 1, num_steps).round()[::-1].astype(np.int64)


def trailing(T: int, num_steps: int) -> np.ndarray:
    """From T - 1 down by `T / num_steps`, rounded half to even (Lin et al. 2023, arXiv 2305.08891, table 2).

    For some counts (61, 103, 121 ... of T = 1000) diffusers' own list has one entry too many, t = -1, by
    rounding of its float range. It is left out here.

    Raises:
        TypeError, ValueError: num_steps is not an integer in [1, T].
    """
    num_steps = check_int("num_steps", num_steps, 1, T)
    return np.round(np.arange(T, 0, -T / num_steps)).astype(np.int64)[:num_steps] - 1


def space_timesteps(T: int, section_counts: str | Sequence[int]) -> np.ndarray:
    """OpenAI's respacing: what `space_timesteps` of improved- and guided-diffusion chooses, descending.

    Args:
        T: the number of training timesteps.
        section_counts: "ddimN", the first integer stride that gives N steps; or counts, as "50", "10,15,20"
            or [10, 15, 20], one for each of as many equal sections of the timesteps, from t = 0 up.

    Raises:
        TypeError: neither a string nor a sequence of integers.
        ValueError: not of that form, no stride gives N steps, or a section is smaller than its count.
    """
    wrong = f"section_counts must be 'ddimN' or counts such as '50' or '10,15,20', got {section_counts!r}"
    if not isinstance(section_counts, (str, Sequence)):
        raise TypeError(wrong)
    if isinstance(section_counts, str):
        try:
            counts = [int(count) for count in section_counts.removeprefix("ddim").split(",")]
        except ValueError:
            raise ValueError(wrong) from None
        if section_counts.startswith("ddim"):
            if len(counts) > 1:
                raise ValueError(wrong)
            for stride in range(1, T):
                if len(range(0, T, stride)) == counts[0]:
                    return np.arange(0, T, stride, dtype=np.int64)[::-1]
            raise ValueError(
                f"{section_counts!r}: no integer stride takes exactly {counts[0]} of {T} timesteps"
            )
    else:
        counts = [check_int(f"section_counts[{i}]", count, 0) for i, count in enumerate(section_counts)]
    if not counts or min(counts) < 0 or max(counts) == 0:
        raise ValueError(wrong)

    timesteps, start = [], 0
    for section, count in enumerate(counts):
        size = T // len(counts) + (section < T % len(counts))
        if count > size:
            raise ValueError(
                f"section_counts {section_counts!r}: section {section} has {size} timesteps, not {count}"
            )
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):
            timesteps.append(start + round(position))
            position += stride  # a running sum, as OpenAI's: np.linspace rounds to other timesteps
        start += size
    return np.array(timesteps[::-1], dtype=np.int64)


def _timesteps(T: int, num_steps: Any, spacing: Any, steps_offset: Any, drop_last: bool) -> np.ndarray:
    """The timesteps of a run; with `drop_last`, "leading" and "linspace" lay out N + 1 and drop one."""
    num_steps = None if num_steps is None else check_int("num_steps", num_steps, 1, T)
    steps_offset = check_int("steps_offset", steps_offset, 0)
    if not isinstance(spacing, str):
        timesteps = _explicit(T, spacing)
    elif spacing in SPACINGS:
        if steps_offset and spacing != "leading":
            raise ValueError(f"steps_offset is for 'leading' spacing, got {steps_offset} with {spacing!r}")
        if spacing == "trailing":
            return trailing(T, T if num_steps is None else num_steps)
        num_steps = max(1, T - drop_last) if num_steps is None else num_steps
        points = num_steps + drop_last
        if points > T:
            raise ValueError(
                f"num_steps must be in [1, {T - 1}] for dpm_solver with spacing {spacing!r}, which lays out "
                f"one point more than steps among T = {T}, got {num_steps}"
            )
        timesteps = linspace(T, points) if spacing == "linspace" else leading(T, points, steps_offset)
        return timesteps[:num_steps]
    elif steps_offset:
        raise ValueError(f"steps_offset is for 'leading' spacing, got {steps_offset} with {spacing!r}")
    elif spacing.startswith("ddim") or spacing[:1].isdigit():
        timesteps = space_timesteps(T, spacing)
    else:
        raise ValueError(
            f"spacing must be one of {', '.join(map(repr, SPACINGS))}, OpenAI's 'ddimN' or counts such as "
            f"'50' or '10,15,20', or the descending timesteps themselves, got {spacing!r}"
        )
    if num_steps is not None and num_steps != len(timesteps):
        raise ValueError(f"num_steps is {num_steps} but spacing {spacing!r} has {len(timesteps)} timesteps")
    return timesteps


def _explicit(T: int, spacing: Any) -> np.ndarray:
    """Timesteps given as such: a sequence, array or tensor of integers, strictly descending within [0, T)."""
    values = spacing.tolist() if hasattr(spacing, "tolist") else spacing
    if not isinstance(values, Sequence):
        raise TypeError(
            "spacing must be a name or a descending sequence of integers (a count belongs in num_steps), "
            f"got {spacing!r} ({type(spacing).__name__})"
        )
    if len(values) == 0:
        raise ValueError("spacing must hold at least one timestep, got none")
    timesteps = np.array(
        [check_int(f"spacing[{i}]", t, 0, T - 1) for i, t in enumerate(values)], dtype=np.int64
    )
    rises = np.diff(timesteps) >= 0
    if rises.any():
        i = int(rises.argmax())
        raise ValueError(
            f"spacing must be strictly descending, got {timesteps[i]} then {timesteps[i + 1]} from entry {i} "
            "(OpenAI's section counts are given as one string, such as '10,15,20')"
        )
    return timesteps


def _choose(name: str, value: Any, allowed: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value
