"""The `GaussianDiffusion` of medical-segmentation forks (MedSegDiff), which draws a mask for an image.

x is (B, C + 1, ...): the image, and as the last channel the state, which alone is noised and denoised. The
model returns ``out`` of one channel (two with a learned variance), or ``(out, cal)``, where ``cal`` is a mask
of its own; the dicts of `p_mean_variance` and of the steps gain ``cal``, 0 where there is none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ... import ops, steps
from ...reference import per_sample
from ...schedule import Schedule, check_int
from . import gaussian_diffusion as guided
from . import respace
from .gaussian_diffusion import (
    LossType,
    ModelMeanType,
    ModelVarType,
    betas_for_alpha_bar,
    get_named_beta_schedule,
    options_of,
    start_of,
)
from .nn import mean_flat
from .process import DenoisedFn, Kwargs, Model, Terms
from .respace import space_timesteps

__all__ = [
    "GaussianDiffusion",
    "LossType",
    "ModelMeanType",
    "ModelVarType",
    "SpacedDiffusion",
    "betas_for_alpha_bar",
    "get_named_beta_schedule",
    "space_timesteps",
]

THRESHOLD = 0.995
"""The quantile of |x0| that is taken for its bound (Saharia et al. 2022, arXiv 2205.11487, section 2.3)."""


class GaussianDiffusion(guided.GaussianDiffusion):
    """guided-diffusion's, for masks.

    What the fork computes against itself is computed as said here: its DDIM noised the image with the mask,
    and ran for one size and batch only; with ``progress`` its loop took no step; DPM-Solver took one image at
    a time. A ``cond_fn``, which it ignored, is an error.

    Args:
        dpm_solver: `p_sample_loop_known` runs DPM-Solver++(2M).
        args, kwargs: see `guided_diffusion.GaussianDiffusion`, or `SpacedDiffusion`.

    Attributes:
        strict: True, as it begins: with ``dpm_solver`` a run returns what the fork's returns, which is not
            the sample, but the noise that the network sees in it at the last noise level. Set it to False
            for the sample.
    """

    strict: bool = True
    _carried = ("cal",)
    _is_all_state = False

    def __init__(self, *args: Any, dpm_solver: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.dpm_solver = dpm_solver

    def _state(self, x: Tensor) -> Tensor:
        return x[:, -1:]

    def _call(
        self, model: Model, x: Tensor, t: Tensor, model_kwargs: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        out, cal = _split(self._wrap_model(model)(x, self._scale_timesteps(t), **model_kwargs))
        return out, {"cal": cal}

    def p_sample_loop_progressive(
        self,
        model: Model,
        shape: Sequence[int],
        time: int | None = None,
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        cond_fn: None = None,
        org: Any = None,
        model_kwargs: Kwargs = None,
        device: torch.device | str | None = None,
        progress: bool = False,
    ) -> Iterator[Terms]:
        """Yield the dict of `p_sample` at the last ``time`` timesteps (None: all); org has no meaning.

        ``noise`` is the image with the start as its last channel; None to draw both.
        """
        _refuse(cond_fn)
        options = options_of(clip_denoised, denoised_fn, None, model_kwargs)
        return self._steps(self.p_sample, model, shape, noise, device, progress, options, time)

    def ddim_sample_loop_progressive(
        self,
        model: Model,
        shape: Sequence[int],
        time: int | None = None,
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        cond_fn: None = None,
        model_kwargs: Kwargs = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
    ) -> Iterator[Terms]:
        """Yield the dict of `ddim_sample`; otherwise as `p_sample_loop_progressive`."""
        _refuse(cond_fn)
        options = options_of(clip_denoised, denoised_fn, None, model_kwargs) | {"eta": eta}
        return self._steps(self.ddim_sample, model, shape, noise, device, progress, options, time)

    def _next(self, x: Tensor, sample: Tensor) -> Tensor:
        return torch.cat([x[:, :-1], sample], dim=1)

    def p_sample_loop_known(
        self,
        model: Model,
        shape: Sequence[int],
        img: Tensor,
        step: int | None = None,
        org: Any = None,
        noise: Any = None,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        cond_fn: None = None,
        model_kwargs: Kwargs = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        conditioner: Any = None,
        classifier: Any = None,
    ) -> tuple[Tensor, Tensor, Tensor, Any, Tensor]:
        """Masks of images: ``(sample, x_noisy, img, cal, cal_out)``.

        Args:
            shape: its first entry is B.
            img: (B, C + 1, H, W); the last channel is not read. The start is always drawn, by torch's own
                generator.
            step: how many steps; None: T. Of DPM-Solver, which spaces them evenly and bounds x0 by its
                quantile whatever ``clip_denoised`` says, at least 2; else the last so many timesteps.
            org, noise, conditioner, classifier: no meaning.

        Returns:
            The sample (B, 1, H, W), of DPM-Solver what ``strict`` says, with mean 0 and deviation 1 over the
            batch; the start; the image; the last ``cal``; and both masks as one, in [0, 1].

        Raises:
            ValueError: a ``cond_fn``; ``step`` out of range; DPM-Solver and a model of another kind than
                EPSILON.
        """
        _refuse(cond_fn)
        device, img, x_noisy = self._known(model, shape, img, device)
        step = self.num_timesteps if step is None else check_int("step", step, 1)
        if self.dpm_solver:
            with torch.no_grad():
                sample, cal = self._by_dpm_solver(model, x_noisy.float(), step, model_kwargs or {})
            sample = (sample - sample.mean()) / sample.std()
            weights = 1.0, 0.25
        else:
            options = options_of(clip_denoised, denoised_fn, None, model_kwargs)
            where = {"device": device, "progress": progress}
            for out in self.p_sample_loop_progressive(model, shape, step, x_noisy, **options, **where):  # noqa: B007
                pass
            sample, cal = out["sample"], out["cal"]
            mask = (sample > 0).float()
            agree = 2.0 * (mask * cal).sum() / (mask + cal).sum() >= 0.65  # Dice's coefficient
            weights = (0.5, 0.5) if agree else (1.0, 0.25)
        return sample, x_noisy, img, cal, torch.clamp(weights[0] * cal + weights[1] * sample, 0, 1)

    def ddim_sample_loop_known(
        self,
        model: Model,
        shape: Sequence[int],
        img: Tensor,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        cond_fn: None = None,
        model_kwargs: Kwargs = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``(sample, x_noisy, img)`` of DDIM at every timestep; otherwise as `p_sample_loop_known`."""
        _refuse(cond_fn)
        device, img, x_noisy = self._known(model, shape, img, device)
        options = options_of(clip_denoised, denoised_fn, None, model_kwargs) | {"eta": eta}
        sample = self.ddim_sample_loop(
            model, shape, noise=x_noisy, device=device, progress=progress, **options
        )
        return sample, x_noisy, img

    def _known(
        self, model: Model, shape: Sequence[int], img: Tensor, device: torch.device | str | None
    ) -> tuple[torch.device | str, Tensor, Tensor]:
        """``(device, img, x_noisy)``: the image with a start drawn in its last channel."""
        device, img = start_of(model, shape, img, device)
        img = img.to(device)
        return device, img, self._next(img, torch.randn_like(img[:, :1]))

    def _by_dpm_solver(
        self, model: Model, x: Tensor, num_steps: int, model_kwargs: dict[str, Any]
    ) -> tuple[Tensor, Any]:
        """``(sample, cal)`` by DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2), from time 1
        to 1 / T in even steps; between the timesteps log ab is interpolated. Then the network once more."""
        if self.model_mean_type is not ModelMeanType.EPSILON:
            raise ValueError(
                f"dpm_solver needs a model of {ModelMeanType.EPSILON}, got {self.model_mean_type}"
            )
        check_int("step", num_steps, 2)
        times, log_ab, rows = solver_rows(self._schedule, num_steps)
        table = torch.tensor(rows, dtype=torch.float32, device=x.device)

        def evaluate(x: Tensor, i: int) -> tuple[Tensor, Any]:
            t = torch.full((len(x),), (times[i] - times[-1]) * 1000, dtype=torch.float32, device=x.device)
            out, cal = _split(model(x, t, **model_kwargs))
            return out[:, :1].float(), cal

        state, x0 = x[:, -1:].contiguous(), None
        for i in range(num_steps):
            out, _ = evaluate(self._next(x, state), i)
            alpha, sigma = np.exp(log_ab[i] / 2), np.sqrt(-np.expm1(log_ab[i]))
            previous, x0 = x0, _threshold((state - sigma * out) / alpha)
            state = ops.posterior_step(state, x0, table, i, x0_prev=previous, clip=None)[0]
        out, cal = evaluate(self._next(x, state), num_steps)
        return (out if self.strict else state), cal

    def training_losses_segmentation(
        self,
        model: Model,
        classifier: Any,
        x_start: Tensor,
        t: Tensor,
        model_kwargs: Kwargs = None,
        noise: Tensor | None = None,
    ) -> tuple[Terms, Tensor]:
        """``(terms, out)`` of images whose last channel is a mask, which counts as 1 where it is above 0.

        Args:
            model: returns ``(out, cal)``.
            classifier: no meaning.
            noise: (B, 1, H, W); None to draw it.

        Returns:
            A dict of ``loss_diff``, the squared error of what is predicted, ``loss_cal``, that of ``cal``
            from the mask, ``vb`` where a variance is learned, and ``loss``, without ``loss_cal``: each (B,);
            and what was predicted.

        Raises:
            NotImplementedError: a loss that is the bound alone.
            ValueError: the model returns no ``cal``.
        """
        if self.loss_type.is_vb():
            raise NotImplementedError(self.loss_type)
        mask = (x_start[:, -1:] > 0).float()
        if noise is None:
            noise = torch.randn_like(x_start[:, -1:])
        x_t = self._next(x_start.float(), self.q_sample(mask, t, noise=noise))
        state, out, more = self._evaluate(model, x_t, t, model_kwargs)
        if not isinstance(more["cal"], Tensor):
            raise ValueError("the model must return (out, cal), got out alone")
        terms = self._squared_error(state, out, mask, t, noise)
        terms["loss_diff"] = terms.pop("mse")
        terms["loss_cal"] = mean_flat((mask - more["cal"]) ** 2)
        return terms, out[:, :1]


class SpacedDiffusion(GaussianDiffusion, respace.SpacedDiffusion):
    """guided-diffusion's, for masks."""


def solver_rows(schedule: Schedule, num_steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``(times, log_ab, rows)``, (N + 1,), (N + 1,) and (N, 7): times from 1 to 1 / T, the log of
    alphas_cumprod there, and the rows between them for a step from (x, x0). The first is of first order, and
    the last of a run of less than 10."""
    T = schedule.T
    times = np.linspace(1.0, 1.0 / T, num_steps + 1)
    log_ab = np.interp(times, np.arange(1, T + 1) / T, np.cumsum(np.log1p(-schedule.betas)))
    fine = Schedule.from_alphas_cumprod(np.exp(log_ab[::-1]))

    def rows(order: int) -> np.ndarray:
        spacing = range(num_steps, -1, -1)
        return steps.dpm_solver(fine, order=order, prediction="x0", spacing=spacing).rows[:-1]

    table = rows(2).copy()
    if num_steps < 10:
        table[-1] = rows(1)[-1]
    return times, log_ab, table


def _split(returned: Any) -> tuple[Tensor, Any]:
    return returned if isinstance(returned, tuple) else (returned, 0)


def _refuse(cond_fn: Any) -> None:
    if cond_fn is not None:
        raise ValueError("cond_fn must be None: the segmentation diffusion has no classifier guidance")


def _threshold(x0: Tensor) -> Tensor:
    """x0 bounded by its quantile and divided by that, where it is above 1."""
    bound = per_sample(torch.quantile(x0.abs().flatten(1), THRESHOLD, dim=1).clamp(min=1.0), x0)
    return torch.clamp(x0, -bound, bound) / bound
