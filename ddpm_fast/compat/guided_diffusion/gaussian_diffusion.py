"""OpenAI's `GaussianDiffusion` over our schedule, tables and ops: the same methods, dicts and draws."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ... import ops
from ...reference import per_sample
from ...schedule import check_int
from . import whole_run
from .bound import Bound
from .kinds import LossType, ModelMeanType, ModelVarType
from .losses import discretized_gaussian_log_likelihood, normal_kl
from .nn import mean_flat
from .process import DenoisedFn, Kwargs, Model, Terms, floating, index

__all__ = [
    "GaussianDiffusion",
    "LossType",
    "ModelMeanType",
    "ModelVarType",
    "betas_for_alpha_bar",
    "discretized_gaussian_log_likelihood",
    "get_named_beta_schedule",
    "mean_flat",
    "normal_kl",
]


def get_named_beta_schedule(schedule_name: str, num_diffusion_timesteps: int) -> np.ndarray:
    """The betas of "linear", its ends scaled by 1000 / T, or "cosine": float64 (T,).

    Raises:
        NotImplementedError: another name.
    """
    if schedule_name == "linear":
        scale = 1000 / num_diffusion_timesteps
        return np.linspace(scale * 1e-4, scale * 0.02, num_diffusion_timesteps)
    if schedule_name == "cosine":  # Nichol & Dhariwal 2021, arXiv 2102.09672, eq. 17
        return betas_for_alpha_bar(
            num_diffusion_timesteps, lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
        )
    raise NotImplementedError(f"unknown beta schedule: {schedule_name!r}; known: linear, cosine")


def betas_for_alpha_bar(
    num_diffusion_timesteps: int, alpha_bar: Callable[[float], float], max_beta: float = 0.999
) -> np.ndarray:
    """`beta_t = 1 - alpha_bar((t + 1) / T) / alpha_bar(t / T)`, at most ``max_beta``: float64 (T,)."""
    levels = [alpha_bar(i / num_diffusion_timesteps) for i in range(num_diffusion_timesteps + 1)]
    return np.array([min(1 - after / before, max_beta) for before, after in pairwise(levels)])


class GaussianDiffusion(Bound):
    """A diffusion over T timesteps and what can be asked of it: see the methods.

    In all of them x is (B, C, ...) floating and t (B,) integer, 0 the least noise. Computed in float32, or in
    float64 for float64 x. A step is one pass of `ops.posterior_step` unless a function that is given has to
    see what lies between. A subclass's own ``p_mean_variance``, ``_vb_terms_bpd``, steps and loops are called
    by the others; its own ``q_posterior_mean_variance`` or ``_predict_*`` would not be, and is refused.

    Args:
        betas: (T,), in (0, 1]; 1 as the last only.
        model_mean_type, model_var_type, loss_type: of those enums. With a learned variance the model returns
            twice the channels.
        rescale_timesteps: the model is told `1000 t / T`, floating, instead of t.

    Attributes:
        num_timesteps: T.
        betas, alphas_cumprod, ...: float64 (T,), as in the original; copies, which nothing here reads.

    Raises:
        AssertionError: betas are not 1-D, or not in (0, 1].
        TypeError: a subclass with a method that no step would call.
        ValueError: no betas, or a 1 that is not the last.
    """

    # Steps

    def p_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        cond_fn: Model | None = None,
        model_kwargs: Kwargs = None,
    ) -> Terms:
        """x_{t-1} drawn from p(x_{t-1} | x_t), and x_0 as predicted: a dict of ``sample, pred_xstart``.

        Noise is drawn at every t by torch's own generator, and has no weight at t = 0.

        Args:
            cond_fn: see `condition_mean`; for the rest, `p_mean_variance`.
        """
        if self._in_one_pass(denoised_fn, cond_fn):
            return self._step("ddpm", model, x, t, clip_denoised, model_kwargs)
        out = self.p_mean_variance(
            model, x, t, clip_denoised=clip_denoised, denoised_fn=denoised_fn, model_kwargs=model_kwargs
        )
        noise = torch.randn_like(self._state(x))
        if cond_fn is not None:
            out["mean"] = self.condition_mean(cond_fn, out, x, t, model_kwargs=model_kwargs)
        weight = per_sample(t != 0, noise) * torch.exp(0.5 * out["log_variance"])
        return self._sampled(out["mean"] + weight * noise, out)

    def ddim_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        cond_fn: Model | None = None,
        model_kwargs: Kwargs = None,
        eta: float = 0.0,
    ) -> Terms:
        """x_{t-1} by DDIM (Song et al. 2021, eq. 12), eps derived again from x_0: otherwise as `p_sample`.

        Noise is drawn whatever eta is. With a ``cond_fn`` see `condition_score`.

        Raises:
            ValueError: eta outside [0, 1].
        """
        return self._by_ddim("ddim", model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs, eta)

    def ddim_reverse_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        model_kwargs: Kwargs = None,
        eta: float = 0.0,
    ) -> Terms:
        """x_{t+1} by DDIM's way back, which draws nothing; the dict of `p_sample`.

        Raises:
            AssertionError: eta is not 0.
        """
        assert eta == 0.0, f"DDIM's way back is for eta = 0, got {eta}"
        return self._by_ddim("ddim_reverse", model, x, t, clip_denoised, denoised_fn, None, model_kwargs, 0.0)

    def _by_ddim(self, kind, model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs, eta) -> Terms:
        if self._in_one_pass(denoised_fn, cond_fn):
            return self._step(kind, model, x, t, clip_denoised, model_kwargs, eta)
        out = self.p_mean_variance(
            model, x, t, clip_denoised=clip_denoised, denoised_fn=denoised_fn, model_kwargs=model_kwargs
        )
        if cond_fn is not None:
            out = self.condition_score(cond_fn, out, x, t, model_kwargs=model_kwargs)
        x = floating(self._state(x))
        table = self._table(kind, x, eta, of_x0=True)
        noise = torch.randn_like(x) if kind == "ddim" else None
        x0 = out["pred_xstart"].to(x.dtype)
        return self._sampled(ops.posterior_step(x, x0, table, index(t, x), noise=noise, clip=None)[0], out)

    def _in_one_pass(self, denoised_fn: DenoisedFn | None, cond_fn: Model | None) -> bool:
        return denoised_fn is None and cond_fn is None and self._is_ours("p_mean_variance")

    def _step(self, kind, model, x, t, clip_denoised, model_kwargs, eta=0.0) -> Terms:
        """The dict of a step, in one pass."""
        x, out, more = self._evaluate(model, x, t, model_kwargs)
        noise = None if kind == "ddim_reverse" else torch.randn_like(x)
        table, clip = self._table(kind, x, eta), 1.0 if clip_denoised else None
        sample, x0 = ops.posterior_step(x, out, table, index(t, x), noise=noise, clip=clip)
        return {"sample": sample, "pred_xstart": x0, **more}

    def _sampled(self, sample: Tensor, out: Terms) -> Terms:
        return {"sample": sample, "pred_xstart": out["pred_xstart"]} | {
            key: out[key] for key in self._carried
        }

    # Runs

    def p_sample_loop(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        cond_fn: Model | None = None,
        model_kwargs: Kwargs = None,
        device: torch.device | str | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Images of `p_sample` at every t: ``shape``, in `Sampler` where that does just the same.

        Args:
            shape: (B, C, ...), a tuple or list.
            noise: the start; None to draw it by torch's own generator.
            device: default the model's.
            progress: show a bar.

        Raises:
            AssertionError: shape is neither a tuple nor a list.
            TypeError: no device, and a model that is no module with parameters.
        """
        options = options_of(clip_denoised, denoised_fn, cond_fn, model_kwargs)
        return self._whole("ddpm", "p_sample", model, shape, noise, device, progress, options)

    def p_sample_loop_progressive(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        cond_fn: Model | None = None,
        model_kwargs: Kwargs = None,
        device: torch.device | str | None = None,
        progress: bool = False,
    ) -> Iterator[Terms]:
        """Yield the dict of each `p_sample`. What ``"sample"`` then holds is where the next begins."""
        options = options_of(clip_denoised, denoised_fn, cond_fn, model_kwargs)
        return self._steps(self.p_sample, model, shape, noise, device, progress, options)

    def ddim_sample_loop(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        cond_fn: Model | None = None,
        model_kwargs: Kwargs = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
    ) -> Tensor:
        """Images of `ddim_sample` at every t; otherwise as `p_sample_loop`."""
        options = options_of(clip_denoised, denoised_fn, cond_fn, model_kwargs) | {"eta": eta}
        return self._whole("ddim", "ddim_sample", model, shape, noise, device, progress, options)

    def ddim_sample_loop_progressive(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        cond_fn: Model | None = None,
        model_kwargs: Kwargs = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
    ) -> Iterator[Terms]:
        """Yield the dict of each `ddim_sample`; otherwise as `p_sample_loop_progressive`."""
        options = options_of(clip_denoised, denoised_fn, cond_fn, model_kwargs) | {"eta": eta}
        return self._steps(self.ddim_sample, model, shape, noise, device, progress, options)

    def _whole(self, kind, step, model, shape, noise, device, progress, options) -> Tensor:
        """The images after all steps of that name."""
        plain = self._in_one_pass(options["denoised_fn"], options.get("cond_fn")) and self._is_all_state
        if plain and self._is_ours(step, f"{step}_loop_progressive"):
            device, noise = start_of(model, shape, noise, device)
            run = whole_run.sample(self, kind, model, noise, progress, options)
            if run is not None:
                return run
        progressive = getattr(self, f"{step}_loop_progressive")
        for out in progressive(model, shape, noise=noise, device=device, progress=progress, **options):  # noqa: B007
            pass
        return out["sample"]

    def _steps(self, step, model, shape, noise, device, progress, options, time=None) -> Iterator[Terms]:
        """The last ``time`` steps, or all."""
        device, x = start_of(model, shape, noise, device)
        time = self.num_timesteps if time is None else check_int("time", time, 1, self.num_timesteps)
        count = range(time)[::-1]
        for i in tqdm(count) if progress else count:
            t = torch.full((shape[0],), i, dtype=torch.int64, device=device)
            with torch.no_grad():
                out = step(model, x, t, **options)
            yield out
            x = self._next(x, out["sample"])

    def _next(self, x: Tensor, sample: Tensor) -> Tensor:
        """What the model sees after x."""
        return sample


def options_of(
    clip_denoised: bool, denoised_fn: DenoisedFn | None, cond_fn: Model | None, model_kwargs: Kwargs
) -> dict[str, Any]:
    """Of a step, by name; without a ``cond_fn`` for the classes that have none."""
    options = {"clip_denoised": clip_denoised, "denoised_fn": denoised_fn, "model_kwargs": model_kwargs}
    return options if cond_fn is None else options | {"cond_fn": cond_fn}


def start_of(
    model: Model, shape: Sequence[int], noise: Tensor | None, device: torch.device | str | None
) -> tuple[torch.device | str, Tensor]:
    """Where a run is, and what it begins with."""
    assert isinstance(shape, (tuple, list)), f"shape must be a tuple or a list, got {type(shape).__name__}"
    if device is None:
        parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
        if parameter is None:
            raise TypeError(f"device must be given: {type(model).__name__} has no parameters to take it from")
        device = parameter.device
    return device, torch.randn(*shape, device=device) if noise is None else noise


def _extract_into_tensor(arr: np.ndarray, timesteps: Tensor, broadcast_shape: Sequence[int]) -> Tensor:
    """``arr[timesteps]``, float32, expanded to ``broadcast_shape``: for scripts that import it."""
    values = torch.from_numpy(arr).to(device=timesteps.device)[timesteps].float()
    return values.reshape(-1, *[1] * (len(broadcast_shape) - 1)).expand(broadcast_shape)
