"""OpenAI's guided-diffusion, faster: import from here in place of ``guided_diffusion``, whose modules' names
these have too (``gaussian_diffusion``, ``respace``, ``resample``, ``losses``, ``nn``)."""

from . import gaussian_diffusion, losses, nn, resample, respace
from .gaussian_diffusion import (
    GaussianDiffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
    betas_for_alpha_bar,
    get_named_beta_schedule,
)
from .resample import (
    LossAwareSampler,
    LossSecondMomentResampler,
    ScheduleSampler,
    UniformSampler,
    create_named_schedule_sampler,
)
from .respace import SpacedDiffusion, space_timesteps

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
