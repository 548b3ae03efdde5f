"""OpenAI's improved-diffusion, faster: import from here in place of ``improved_diffusion``.

It is `ddpm_fast.compat.guided_diffusion`, by the same modules, without classifier guidance: no method has a
``cond_fn``, and who gives arguments by position finds ``model_kwargs`` in its place.
"""

from . import gaussian_diffusion, losses, nn, resample, respace, script_util, unet
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
from .script_util import (
    NUM_CLASSES,
    add_dict_to_argparser,
    args_to_dict,
    create_gaussian_diffusion,
    create_model,
    create_model_and_diffusion,
    model_and_diffusion_defaults,
    sr_create_model,
    sr_create_model_and_diffusion,
    sr_model_and_diffusion_defaults,
    str2bool,
)
from .unet import SuperResModel, UNetModel

__all__ = [
    "NUM_CLASSES",
    "GaussianDiffusion",
    "LossAwareSampler",
    "LossSecondMomentResampler",
    "LossType",
    "ModelMeanType",
    "ModelVarType",
    "ScheduleSampler",
    "SpacedDiffusion",
    "SuperResModel",
    "UNetModel",
    "UniformSampler",
    "add_dict_to_argparser",
    "args_to_dict",
    "betas_for_alpha_bar",
    "create_gaussian_diffusion",
    "create_model",
    "create_model_and_diffusion",
    "create_named_schedule_sampler",
    "gaussian_diffusion",
    "get_named_beta_schedule",
    "losses",
    "model_and_diffusion_defaults",
    "nn",
    "resample",
    "respace",
    "script_util",
    "space_timesteps",
    "sr_create_model",
    "sr_create_model_and_diffusion",
    "sr_model_and_diffusion_defaults",
    "str2bool",
    "unet",
]
