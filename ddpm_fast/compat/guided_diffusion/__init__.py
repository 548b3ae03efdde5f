"""OpenAI's guided-diffusion, faster: import from here in place of ``guided_diffusion``.

The modules have their names there: ``gaussian_diffusion``, ``respace``, ``resample``, ``losses``, ``nn``,
``unet`` and ``script_util``. What scripts run with stays theirs: ``dist_util``, ``logger``,
``image_datasets``, ``fp16_util``, ``train_util``.
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
    classifier_and_diffusion_defaults,
    classifier_defaults,
    create_classifier,
    create_classifier_and_diffusion,
    create_gaussian_diffusion,
    create_model,
    create_model_and_diffusion,
    diffusion_defaults,
    model_and_diffusion_defaults,
    sr_create_model,
    sr_create_model_and_diffusion,
    sr_model_and_diffusion_defaults,
    str2bool,
)
from .unet import EncoderUNetModel, SuperResModel, UNetModel

__all__ = [
    "NUM_CLASSES",
    "EncoderUNetModel",
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
    "classifier_and_diffusion_defaults",
    "classifier_defaults",
    "create_classifier",
    "create_classifier_and_diffusion",
    "create_gaussian_diffusion",
    "create_model",
    "create_model_and_diffusion",
    "create_named_schedule_sampler",
    "diffusion_defaults",
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
