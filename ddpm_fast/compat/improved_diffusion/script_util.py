"""improved-diffusion's ``script_util``: its scripts' flags, their defaults, and what is made of them."""

from __future__ import annotations

from functools import partial
from typing import Any

from ...checkpoint.openai import CHANNEL_MULT, NUM_CLASSES, channel_mult_of, downsampling_rates
from ..guided_diffusion.script_util import (
    add_dict_to_argparser,
    args_to_dict,
    both,
    diffusion_of,
    str2bool,
    taken_by,
)
from .respace import SpacedDiffusion
from .unet import SuperResModel, UNetModel

__all__ = [
    "NUM_CLASSES",
    "add_dict_to_argparser",
    "args_to_dict",
    "create_gaussian_diffusion",
    "create_model",
    "create_model_and_diffusion",
    "model_and_diffusion_defaults",
    "sr_create_model",
    "sr_create_model_and_diffusion",
    "sr_model_and_diffusion_defaults",
    "str2bool",
]

_WIDTHS = {size: CHANNEL_MULT[size] for size in (32, 64, 256)}
_LARGE_WIDTHS = {size: CHANNEL_MULT[size] for size in (64, 256)}


def model_and_diffusion_defaults() -> dict[str, Any]:
    return {
        "image_size": 64,
        "num_channels": 128,
        "num_res_blocks": 2,
        "num_heads": 4,
        "num_heads_upsample": -1,
        "attention_resolutions": "16,8",
        "dropout": 0.0,
        "learn_sigma": False,
        "sigma_small": False,
        "class_cond": False,
        "diffusion_steps": 1000,
        "noise_schedule": "linear",
        "timestep_respacing": "",
        "use_kl": False,
        "predict_xstart": False,
        "rescale_timesteps": True,
        "rescale_learned_sigmas": True,
        "use_checkpoint": False,
        "use_scale_shift_norm": True,
    }


def sr_model_and_diffusion_defaults() -> dict[str, Any]:
    """Of those of `model_and_diffusion_defaults` what the upsampler takes, and its two sizes."""
    return taken_by(
        sr_create_model_and_diffusion, model_and_diffusion_defaults() | {"large_size": 256, "small_size": 64}
    )


def create_model_and_diffusion(
    image_size,
    class_cond,
    learn_sigma,
    sigma_small,
    num_channels,
    num_res_blocks,
    num_heads,
    num_heads_upsample,
    attention_resolutions,
    dropout,
    diffusion_steps,
    noise_schedule,
    timestep_respacing,
    use_kl,
    predict_xstart,
    rescale_timesteps,
    rescale_learned_sigmas,
    use_checkpoint,
    use_scale_shift_norm,
) -> tuple[UNetModel, SpacedDiffusion]:
    return both(create_model, create_gaussian_diffusion, locals())


def create_model(
    image_size,
    num_channels,
    num_res_blocks,
    learn_sigma,
    class_cond,
    use_checkpoint,
    attention_resolutions,
    num_heads,
    num_heads_upsample,
    use_scale_shift_norm,
    dropout,
) -> UNetModel:
    """A `UNetModel` for images of a side of 32, 64 or 256. Raises ValueError for another size."""
    return UNetModel(
        in_channels=3,
        model_channels=num_channels,
        out_channels=6 if learn_sigma else 3,
        num_res_blocks=num_res_blocks,
        attention_resolutions=downsampling_rates(image_size, attention_resolutions),
        dropout=dropout,
        channel_mult=channel_mult_of(image_size, _WIDTHS),
        num_classes=NUM_CLASSES if class_cond else None,
        use_checkpoint=use_checkpoint,
        num_heads=num_heads,
        num_heads_upsample=num_heads_upsample,
        use_scale_shift_norm=use_scale_shift_norm,
    )


def sr_create_model_and_diffusion(
    large_size,
    small_size,
    class_cond,
    learn_sigma,
    num_channels,
    num_res_blocks,
    num_heads,
    num_heads_upsample,
    attention_resolutions,
    dropout,
    diffusion_steps,
    noise_schedule,
    timestep_respacing,
    use_kl,
    predict_xstart,
    rescale_timesteps,
    rescale_learned_sigmas,
    use_checkpoint,
    use_scale_shift_norm,
) -> tuple[SuperResModel, SpacedDiffusion]:
    return both(sr_create_model, create_gaussian_diffusion, locals())


def sr_create_model(
    large_size,
    small_size,
    num_channels,
    num_res_blocks,
    learn_sigma,
    class_cond,
    use_checkpoint,
    attention_resolutions,
    num_heads,
    num_heads_upsample,
    use_scale_shift_norm,
    dropout,
) -> SuperResModel:
    """A `SuperResModel` for images of a side of 64 or 256; ``small_size`` changes nothing."""
    return SuperResModel(
        in_channels=3,
        model_channels=num_channels,
        out_channels=6 if learn_sigma else 3,
        num_res_blocks=num_res_blocks,
        attention_resolutions=downsampling_rates(large_size, attention_resolutions),
        dropout=dropout,
        channel_mult=channel_mult_of(large_size, _LARGE_WIDTHS),
        num_classes=NUM_CLASSES if class_cond else None,
        use_checkpoint=use_checkpoint,
        num_heads=num_heads,
        num_heads_upsample=num_heads_upsample,
        use_scale_shift_norm=use_scale_shift_norm,
    )


create_gaussian_diffusion = partial(diffusion_of, SpacedDiffusion)
