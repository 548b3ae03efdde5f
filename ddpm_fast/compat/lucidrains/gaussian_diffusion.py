"""`GaussianDiffusion`: denoising-diffusion-pytorch's class, whose loops run in `Sampler`."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import ops
from ...reference import per_sample
from ...sampler import Sampler
from ...unet import UNet
from . import tables
from .run import Run, denoise
from .schedules import beta_schedule as schedule_of

OBJECTIVES = ("pred_noise", "pred_x0", "pred_v")
BUFFERS = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "loss_weight",
)
"""In the order of the package's state dict."""


class ModelPrediction(NamedTuple):
    pred_noise: Tensor
    pred_x_start: Tensor


class GaussianDiffusion(nn.Module):
    """The diffusion of denoising-diffusion-pytorch 2.3: its arguments, buffers, draws and pictures.

    The same state dict, and from the same generator the same draws in the same order. `p_sample_loop`,
    `ddim_sample` and `interpolate` run in `Sampler`, one fused update a step (on CUDA a captured step),
    unless a step is more than that: self-conditioning, a network that training mode makes random, autocast,
    another dtype than float32, or steps that a subclass has of its own. Then they run as they are written.

    Args:
        model: ``model(x, t, x_self_cond) -> out`` with ``channels``, ``out_dim`` and ``self_condition``: the
            ``Unet`` of the package, or any other; or our `UNet`.
        image_size: of a square, or (height, width).
        timesteps: T.
        sampling_timesteps: of `sample`; below T it samples by DDIM. None: T.
        objective: what the model returns, "pred_noise", "pred_x0" or "pred_v" (Salimans & Ho 2022, arXiv
            2202.00512).
        beta_schedule, schedule_fn_kwargs: "linear"; "cosine", s; "sigmoid", start, end, tau.
        ddim_sampling_eta: 0 is deterministic; noise is drawn all the same.
        auto_normalize: images are [0, 1] outside and [-1, 1] inside.
        offset_noise_strength: each channel of the noise in training is shifted by that times a normal number.
        min_snr_loss_weight, min_snr_gamma: weigh the squared error of x0 by `min(SNR, gamma)`, not by SNR
            (Hang et al. 2023, arXiv 2303.09556).
        immiscible: x_t is made of the batch's noise assigned to the nearest images (Li et al. 2024, arXiv
            2406.12303); needs scipy. As in the package the target stays the noise before that.

    Raises:
        AssertionError: where the package asserts.
        TypeError, ValueError: a model without those attributes, an unknown schedule or a bad option of it,
            a count below 1.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        image_size: int | Sequence[int],
        timesteps: int = 1000,
        sampling_timesteps: int | None = None,
        objective: str = "pred_v",
        beta_schedule: str = "sigmoid",
        schedule_fn_kwargs: Mapping[str, Any] | None = None,
        ddim_sampling_eta: float = 0.0,
        auto_normalize: bool = True,
        offset_noise_strength: float = 0.0,
        min_snr_loss_weight: bool = False,
        min_snr_gamma: float = 5,
        immiscible: bool = False,
    ) -> None:
        super().__init__()
        channels, out_dim, self_condition = _interface(model)
        if type(self) is GaussianDiffusion:
            assert channels == out_dim, f"model must return its {channels} channels, not {out_dim}"
        assert not getattr(model, "random_or_learned_sinusoidal_cond", False), (
            "model must not have random or learned Fourier features of its time"
        )
        if isinstance(image_size, int):
            image_size = (image_size, image_size)
        assert isinstance(image_size, (tuple, list)) and len(image_size) == 2, (
            f"image_size must be an integer, or a tuple or list of two, got {image_size!r}"
        )
        assert objective in OBJECTIVES, f"objective must be one of {OBJECTIVES}, got {objective!r}"
        schedule = schedule_of(beta_schedule, timesteps, **(schedule_fn_kwargs or {}))

        self.model, self.channels, self.self_condition = model, channels, self_condition
        self.image_size, self.objective = image_size, objective
        self.num_timesteps = len(schedule)
        self.sampling_timesteps = self.num_timesteps if sampling_timesteps is None else sampling_timesteps
        assert self.sampling_timesteps <= self.num_timesteps, (
            f"sampling_timesteps must be at most timesteps {timesteps}, got {sampling_timesteps}"
        )
        if self.sampling_timesteps < 1:
            raise ValueError(f"sampling_timesteps must be at least 1, got {sampling_timesteps}")
        self.is_ddim_sampling = self.sampling_timesteps < self.num_timesteps
        self.ddim_sampling_eta = ddim_sampling_eta
        self.immiscible, self.offset_noise_strength = immiscible, offset_noise_strength
        self.normalize, self.unnormalize = (_to_signed, _to_unit) if auto_normalize else (_same, _same)

        snr = schedule.snr
        clipped = np.minimum(snr, min_snr_gamma) if min_snr_loss_weight else snr
        of = {"pred_noise": snr, "pred_x0": 1.0, "pred_v": snr + 1}[objective]
        with np.errstate(divide="ignore", invalid="ignore"):
            own = {
                "posterior_log_variance_clipped": np.log(np.maximum(schedule.posterior_variance, 1e-20)),
                "loss_weight": clipped / of,
            }
            for name in BUFFERS:
                values = own[name] if name in own else getattr(schedule, name)
                self.register_buffer(name, torch.tensor(values, dtype=torch.float32))
        self._sampler: tuple[nn.Module | None, Sampler | None] = None, None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_sampler": (None, None)}

    @property
    def device(self) -> torch.device:
        return self.betas.device

    # The equations

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """x_t of x0 (Ho et al. 2020, eq. 4), in one pass; t (B,) int64."""
        noise = torch.randn_like(x_start) if noise is None else noise
        if self.immiscible:
            noise = noise[self.noise_assignment(x_start, noise)]
        return _mix(x_start, noise, t, self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod)

    def predict_v(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """`v = sqrt(ab) noise - sqrt(1 - ab) x0` (Salimans & Ho 2022, appendix D)."""
        return _mix(noise, x_start, t, self.sqrt_alphas_cumprod, -self.sqrt_one_minus_alphas_cumprod)

    def predict_start_from_noise(self, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        recip, recipm1 = self._at(t, x_t, "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod")
        return recip * x_t - recipm1 * noise

    def predict_noise_from_start(self, x_t: Tensor, t: Tensor, x0: Tensor) -> Tensor:
        recip, recipm1 = self._at(t, x_t, "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod")
        return (recip * x_t - x0) / recipm1

    def predict_start_from_v(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        alpha, sigma = self._at(t, x_t, "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod")
        return alpha * x_t - sigma * v

    def q_posterior(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and clipped log-variance of `q(x_{t-1} | x_t, x0)` (Ho et al. 2020, eq. 7)."""
        from_x0, from_x = self._at(t, x_t, "posterior_mean_coef1", "posterior_mean_coef2")
        variance, log_variance = self._at(t, x_t, "posterior_variance", "posterior_log_variance_clipped")
        return from_x0 * x_start + from_x * x_t, variance, log_variance

    # The model

    def model_predictions(
        self,
        x: Tensor,
        t: Tensor,
        x_self_cond: Tensor | None = None,
        clip_x_start: bool = False,
        rederive_pred_noise: bool = False,
    ) -> ModelPrediction:
        """``(pred_noise, pred_x_start)``; with "pred_noise" the noise is that of the clipped x0 if asked."""
        out = self.model(x, t, x_self_cond)
        if self.objective == "pred_noise":
            x_start = self.predict_start_from_noise(x, t, out)
        elif self.objective == "pred_v":
            x_start = self.predict_start_from_v(x, t, out)
        else:
            x_start = out
        if clip_x_start:
            x_start = x_start.clamp(-1.0, 1.0)
        if self.objective == "pred_noise" and not (clip_x_start and rederive_pred_noise):
            return ModelPrediction(out, x_start)
        return ModelPrediction(self.predict_noise_from_start(x, t, x_start), x_start)

    def p_mean_variance(
        self, x: Tensor, t: Tensor, x_self_cond: Tensor | None = None, clip_denoised: bool = True
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mean, variance and log-variance of `p(x_{t-1} | x_t)`, and x0."""
        x_start = self.model_predictions(x, t, x_self_cond).pred_x_start
        if clip_denoised:
            x_start = x_start.clamp(-1.0, 1.0)
        return *self.q_posterior(x_start=x_start, x_t=x, t=t), x_start

    @torch.no_grad()
    def p_sample(self, x: Tensor, t: int, x_self_cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(x of t - 1, x0)``; noise is drawn where t > 0."""
        times = torch.full((len(x),), t, device=self.device, dtype=torch.long)
        mean, _, log_variance, x_start = self.p_mean_variance(
            x=x, t=times, x_self_cond=x_self_cond, clip_denoised=True
        )
        noise = torch.randn_like(x) if t > 0 else 0.0
        return mean + (0.5 * log_variance).exp() * noise, x_start

    # The loops

    def sample(self, batch_size: int = 16, return_all_timesteps: bool = False) -> Tensor:
        """Images (B, C, H, W), in [0, 1] unless ``auto_normalize`` is off; by DDIM below T steps."""
        loop = self.ddim_sample if self.is_ddim_sampling else self.p_sample_loop
        shape = (batch_size, self.channels, *self.image_size)
        return loop(shape, return_all_timesteps=return_all_timesteps)

    def p_sample_loop(self, shape: Sequence[int], return_all_timesteps: bool = False) -> Tensor:
        """Sample by all T steps. With all timesteps (B, T + 1, C, H, W), from the start on."""
        run = Run(range(self.num_timesteps)[::-1], self.p_sample, tables.ddpm(self._levels(), self.objective))
        return self._sample(shape, run, return_all_timesteps)

    def ddim_sample(self, shape: Sequence[int], return_all_timesteps: bool = False) -> Tensor:
        """Sample by DDIM in ``sampling_timesteps`` steps, all of which but the last draw noise.

        Raises:
            ValueError: a ``ddim_sampling_eta`` far enough above 1 to leave a step less than no variance.
        """
        times = tables.times_of(self.num_timesteps, self.sampling_timesteps)
        table = tables.ddim(self._levels(), self.objective, times, self.ddim_sampling_eta)
        return self._sample(shape, Run(times, self._ddim_step, table), return_all_timesteps)

    @torch.no_grad()
    def interpolate(self, x1: Tensor, x2: Tensor, t: int | None = None, lam: float = 0.5) -> Tensor:
        """Between two images in [-1, 1], noised to t, mixed and denoised from t - 1 on; in [-1, 1]."""
        t = self.num_timesteps - 1 if t is None else t
        assert x1.shape == x2.shape, f"x1 and x2 must be alike, got {tuple(x1.shape)} and {tuple(x2.shape)}"
        if not 0 <= t < self.num_timesteps:
            raise ValueError(f"t must be in [0, {self.num_timesteps - 1}], got {t}")
        times = torch.full((len(x1),), t, device=x1.device)
        first, second = self.q_sample(x1, t=times), self.q_sample(x2, t=times)
        img = (1 - lam) * first + lam * second
        if t == 0:
            return img
        table = tables.last(tables.ddpm(self._levels(), self.objective), t)
        return denoise(self, img, Run(range(t)[::-1], self.p_sample, table), "interpolation sample time step")

    @torch.no_grad()
    def _sample(self, shape: Sequence[int], run: Run, return_all_timesteps: bool) -> Tensor:
        img = torch.randn(shape, device=self.device)
        kept = [img] if return_all_timesteps else None
        img = denoise(self, img, run, "sampling loop time step", kept)
        return self.unnormalize(img if kept is None else torch.stack(kept, dim=1))

    def _ddim_step(
        self, img: Tensor, times: tuple[int, int], x_self_cond: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        time, time_next = times
        batched = torch.full((len(img),), time, device=self.device, dtype=torch.long)
        noise_of, x_start = self.model_predictions(
            img, batched, x_self_cond, clip_x_start=True, rederive_pred_noise=True
        )
        if time_next < 0:
            return x_start, x_start
        x_from_x0, x_from_eps, sigma = tables.ddim_weights(
            self.alphas_cumprod[time], self.alphas_cumprod[time_next], self.ddim_sampling_eta
        )
        return x_start * x_from_x0 + x_from_eps * noise_of + sigma * torch.randn_like(img), x_start

    # Training

    def noise_assignment(self, x_start: Tensor, noise: Tensor) -> Tensor:
        """Which noise each image takes, (B,) int64, so that the distances add up to the least."""
        try:
            from scipy.optimize import linear_sum_assignment
        except ImportError as error:
            raise ImportError("immiscible=True needs scipy: pip install scipy") from error
        distances = torch.cdist(x_start.flatten(1), noise.flatten(1))
        _, assigned = linear_sum_assignment(distances.cpu())
        return torch.from_numpy(assigned).to(distances.device)

    def p_losses(
        self,
        x_start: Tensor,
        t: Tensor,
        noise: Tensor | None = None,
        offset_noise_strength: float | None = None,
        loss_reduction: str = "mean",
    ) -> Tensor:
        """The weighted loss of images in [-1, 1] at t (B,): its mean, or with "none" each image's, (B,)."""
        if loss_reduction not in ("mean", "none"):
            raise ValueError(f"loss_reduction must be 'mean' or 'none', got {loss_reduction!r}")
        batch, channels, _, _ = x_start.shape
        noise = torch.randn_like(x_start) if noise is None else noise
        strength = self.offset_noise_strength if offset_noise_strength is None else offset_noise_strength
        if strength > 0:
            noise = noise + strength * torch.randn(batch, channels, 1, 1, device=self.device)
        x = self.q_sample(x_start=x_start, t=t, noise=noise)

        x_self_cond = None
        if self.self_condition and random.random() < 0.5:
            with torch.no_grad():
                x_self_cond = self.model_predictions(x, t).pred_x_start
        out = self.model(x, t, x_self_cond)
        if self.objective == "pred_noise":
            target = noise
        else:
            target = x_start if self.objective == "pred_x0" else self.predict_v(x_start, t, noise)
        loss = F.mse_loss(out, target, reduction="none").flatten(1).mean(1) * self.loss_weight[t]
        return loss if loss_reduction == "none" else loss.mean()

    def random_times(self, batch_size: int) -> Tensor:
        return torch.randint(0, self.num_timesteps, (batch_size,), device=self.device).long()

    def forward(
        self,
        img: Tensor,
        *args: Any,
        times: Tensor | None = None,
        loss_reduction: str = "mean",
        **kwargs: Any,
    ) -> Tensor:
        """`p_losses` of images as `sample` returns them, at times drawn alike or given."""
        size = tuple(self.image_size)
        assert tuple(img.shape[2:]) == size, f"img must be of {size}, got {tuple(img.shape[2:])}"
        times = self.random_times(len(img)) if times is None else times
        return self.p_losses(self.normalize(img), times, *args, loss_reduction=loss_reduction, **kwargs)

    def _levels(self) -> dict[str, Tensor]:
        """The buffers on the CPU: what was loaded or changed since is what the tables are made of."""
        return {name: buffer.cpu() for name, buffer in self.named_buffers(recurse=False)}

    def _at(self, t: Tensor, x: Tensor, *names: str) -> list[Tensor]:
        """Buffers at t, to be multiplied with x."""
        return [per_sample(getattr(self, name)[t], x) for name in names]


def _mix(x: Tensor, y: Tensor, t: Tensor, of_x: Tensor, of_y: Tensor) -> Tensor:
    """``of_x[t] x + of_y[t] y``, differentiable; by the op where it would not change the result's dtype."""
    if {x.dtype, y.dtype, of_x.dtype} == {torch.float32} and x.shape == y.shape:
        return ops.q_sample(x, y, t, torch.stack([of_x, of_y], dim=1))
    return per_sample(of_x[t], x) * x + per_sample(of_y[t], y) * y


def _interface(model: Any) -> tuple[int, int | None, bool]:
    """channels, out_dim and self_condition of a model."""
    if isinstance(model, UNet):
        return model.config.in_channels, model.config.out_channels, False
    missing = [name for name in ("channels", "self_condition") if not hasattr(model, name)]
    if missing:
        raise TypeError(
            f"model must have channels, out_dim and self_condition, as Unet has; {type(model).__name__} has "
            f"no {' and no '.join(missing)}"
        )
    return model.channels, getattr(model, "out_dim", None), model.self_condition


def _to_signed(img: Tensor) -> Tensor:
    return img * 2 - 1


def _to_unit(img: Tensor) -> Tensor:
    return (img + 1) * 0.5


def _same(img: Tensor) -> Tensor:
    return img
