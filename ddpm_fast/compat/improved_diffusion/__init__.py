"""OpenAI's improved-diffusion, faster: import from here in place of ``improved_diffusion``.

It is `ddpm_fast.compat.guided_diffusion` without classifier guidance: no method has a ``cond_fn``, and who
gives arguments by position finds ``model_kwargs`` in its place.
"""

from ..guided_diffusion import (
    LossAwareSampler,
    LossSecondMomentResampler,
    LossType,
    ModelMeanType,
    ModelVarType,
    ScheduleSampler,
    UniformSampler,
    betas_for_alpha_bar,
    create_named_schedule_sampler,
    get_named_beta_schedule,
    losses,
    nn,
    resample,
    space_timesteps,
)
from . import gaussian_diffusion, respace
from .gaussian_diffusion import GaussianDiffusion
from .respace import SpacedDiffusion

__all__ = [
    "GaussianDiffusion",
    "LossAwareSampler",
    "LossSecondMomentResampler",
    "LossType",
    "ModelMeanType",
    "ModelVarType",
    "ScheduleSampler",
    "SpacedDiffusion",
    "UniformSampler",
    "betas_for_alpha_bar",
    "create_named_schedule_sampler",
    "gaussian_diffusion",
    "get_named_beta_schedule",
    "losses",
    "nn",
    "resample",
    "respace",
    "space_timesteps",
]
