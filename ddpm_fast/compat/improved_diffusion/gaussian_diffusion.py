"""improved-diffusion's `GaussianDiffusion`: guided-diffusion's without ``cond_fn``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..guided_diffusion import gaussian_diffusion as guided
from ..guided_diffusion.gaussian_diffusion import (
    LossType,
    ModelMeanType,
    ModelVarType,
    _extract_into_tensor,
    betas_for_alpha_bar,
    discretized_gaussian_log_likelihood,
    get_named_beta_schedule,
    mean_flat,
    normal_kl,
)
from ..guided_diffusion.process import DenoisedFn, Kwargs, Model, Terms

__all__ = [
    "GaussianDiffusion",
    "LossType",
    "ModelMeanType",
    "ModelVarType",
    "_extract_into_tensor",
    "betas_for_alpha_bar",
    "discretized_gaussian_log_likelihood",
    "get_named_beta_schedule",
    "mean_flat",
    "normal_kl",
]


class GaussianDiffusion(guided.GaussianDiffusion):
    """guided-diffusion's, with ``model_kwargs`` where its methods have ``cond_fn``."""

    def p_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        model_kwargs: Kwargs = None,
    ) -> Terms:
        return super().p_sample(model, x, t, clip_denoised, denoised_fn, model_kwargs=model_kwargs)

    def ddim_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        model_kwargs: Kwargs = None,
        eta: float = 0.0,
    ) -> Terms:
        return super().ddim_sample(model, x, t, clip_denoised, denoised_fn, None, model_kwargs, eta)

    def p_sample_loop(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        model_kwargs: Kwargs = None,
        device: torch.device | str | None = None,
        progress: bool = False,
    ) -> Tensor:
        run = model, shape, noise, clip_denoised, denoised_fn
        return super().p_sample_loop(*run, None, model_kwargs, device, progress)

    def p_sample_loop_progressive(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        model_kwargs: Kwargs = None,
        device: torch.device | str | None = None,
        progress: bool = False,
    ) -> Iterator[Terms]:
        run = model, shape, noise, clip_denoised, denoised_fn
        return super().p_sample_loop_progressive(*run, None, model_kwargs, device, progress)

    def ddim_sample_loop(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        model_kwargs: Kwargs = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
    ) -> Tensor:
        run = model, shape, noise, clip_denoised, denoised_fn
        return super().ddim_sample_loop(*run, None, model_kwargs, device, progress, eta)

    def ddim_sample_loop_progressive(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        model_kwargs: Kwargs = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
    ) -> Iterator[Terms]:
        run = model, shape, noise, clip_denoised, denoised_fn
        return super().ddim_sample_loop_progressive(*run, None, model_kwargs, device, progress, eta)
