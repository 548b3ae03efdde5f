"""guided-diffusion's ``script_util``: its scripts' flags, their defaults, and what is made of them."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from ...checkpoint.openai import CHANNEL_MULT, NUM_CLASSES, channel_mult_of, downsampling_rates
from . import gaussian_diffusion as gd
from .respace import SpacedDiffusion, space_timesteps
from .unet import EncoderUNetModel, SuperResModel, UNetModel

__all__ = [
    "NUM_CLASSES",
    "add_dict_to_argparser",
    "args_to_dict",
    "classifier_and_diffusion_defaults",
    "classifier_defaults",
    "create_classifier",
    "create_classifier_and_diffusion",
    "create_gaussian_diffusion",
    "create_model",
    "create_model_and_diffusion",
    "diffusion_defaults",
    "model_and_diffusion_defaults",
    "sr_create_model",
    "sr_create_model_and_diffusion",
    "sr_model_and_diffusion_defaults",
    "str2bool",
]

_WIDTHS = {size: CHANNEL_MULT[size] for size in (64, 128, 256, 512)}
_LARGE_WIDTHS = {64: CHANNEL_MULT[64], 256: CHANNEL_MULT[256], 512: CHANNEL_MULT[256]}


def diffusion_defaults() -> dict[str, Any]:
    return {
        "learn_sigma": False,
        "diffusion_steps": 1000,
        "noise_schedule": "linear",
        "timestep_respacing": "",
        "use_kl": False,
        "predict_xstart": False,
        "rescale_timesteps": False,
        "rescale_learned_sigmas": False,
    }


def classifier_defaults() -> dict[str, Any]:
    return {
        "image_size": 64,
        "classifier_use_fp16": False,
        "classifier_width": 128,
        "classifier_depth": 2,
        "classifier_attention_resolutions": "32,16,8",
        "classifier_use_scale_shift_norm": True,
        "classifier_resblock_updown": True,
        "classifier_pool": "attention",
    }


def model_and_diffusion_defaults() -> dict[str, Any]:
    return {
        "image_size": 64,
        "num_channels": 128,
        "num_res_blocks": 2,
        "num_heads": 4,
        "num_heads_upsample": -1,
        "num_head_channels": -1,
        "attention_resolutions": "16,8",
        "channel_mult": "",
        "dropout": 0.0,
        "class_cond": False,
        "use_checkpoint": False,
        "use_scale_shift_norm": True,
        "resblock_updown": False,
        "use_fp16": False,
        "use_new_attention_order": False,
        **diffusion_defaults(),
    }


def classifier_and_diffusion_defaults() -> dict[str, Any]:
    return classifier_defaults() | diffusion_defaults()


def sr_model_and_diffusion_defaults() -> dict[str, Any]:
    """Of those of `model_and_diffusion_defaults` what the upsampler takes, and its two sizes."""
    return taken_by(
        sr_create_model_and_diffusion, model_and_diffusion_defaults() | {"large_size": 256, "small_size": 64}
    )


def create_model_and_diffusion(
    image_size,
    class_cond,
    learn_sigma,
    num_channels,
    num_res_blocks,
    channel_mult,
    num_heads,
    num_head_channels,
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
    resblock_updown,
    use_fp16,
    use_new_attention_order,
) -> tuple[UNetModel, SpacedDiffusion]:
    return both(create_model, create_gaussian_diffusion, locals())


def create_model(
    image_size,
    num_channels,
    num_res_blocks,
    channel_mult="",
    learn_sigma=False,
    class_cond=False,
    use_checkpoint=False,
    attention_resolutions="16",
    num_heads=1,
    num_head_channels=-1,
    num_heads_upsample=-1,
    use_scale_shift_norm=False,
    dropout=0,
    resblock_updown=False,
    use_fp16=False,
    use_new_attention_order=False,
) -> UNetModel:
    """A `UNetModel` for images of a side of 64, 128, 256 or 512; or of any, with a ``channel_mult``, "1,2".

    Raises:
        ValueError: another size without it.
    """
    return UNetModel(
        image_size=image_size,
        in_channels=3,
        model_channels=num_channels,
        out_channels=6 if learn_sigma else 3,
        num_res_blocks=num_res_blocks,
        attention_resolutions=downsampling_rates(image_size, attention_resolutions),
        dropout=dropout,
        channel_mult=channel_mult_of(image_size, _WIDTHS, channel_mult),
        num_classes=NUM_CLASSES if class_cond else None,
        use_checkpoint=use_checkpoint,
        use_fp16=use_fp16,
        num_heads=num_heads,
        num_head_channels=num_head_channels,
        num_heads_upsample=num_heads_upsample,
        use_scale_shift_norm=use_scale_shift_norm,
        resblock_updown=resblock_updown,
        use_new_attention_order=use_new_attention_order,
    )


def create_classifier_and_diffusion(
    image_size,
    classifier_use_fp16,
    classifier_width,
    classifier_depth,
    classifier_attention_resolutions,
    classifier_use_scale_shift_norm,
    classifier_resblock_updown,
    classifier_pool,
    learn_sigma,
    diffusion_steps,
    noise_schedule,
    timestep_respacing,
    use_kl,
    predict_xstart,
    rescale_timesteps,
    rescale_learned_sigmas,
) -> tuple[EncoderUNetModel, SpacedDiffusion]:
    return both(create_classifier, create_gaussian_diffusion, locals())


def create_classifier(
    image_size,
    classifier_use_fp16,
    classifier_width,
    classifier_depth,
    classifier_attention_resolutions,
    classifier_use_scale_shift_norm,
    classifier_resblock_updown,
    classifier_pool,
) -> EncoderUNetModel:
    return EncoderUNetModel(
        image_size=image_size,
        in_channels=3,
        model_channels=classifier_width,
        out_channels=1000,
        num_res_blocks=classifier_depth,
        attention_resolutions=downsampling_rates(image_size, classifier_attention_resolutions),
        channel_mult=channel_mult_of(image_size, _WIDTHS),
        use_fp16=classifier_use_fp16,
        num_head_channels=64,
        use_scale_shift_norm=classifier_use_scale_shift_norm,
        resblock_updown=classifier_resblock_updown,
        pool=classifier_pool,
    )


def sr_create_model_and_diffusion(
    large_size,
    small_size,
    class_cond,
    learn_sigma,
    num_channels,
    num_res_blocks,
    num_heads,
    num_head_channels,
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
    resblock_updown,
    use_fp16,
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
    num_head_channels,
    num_heads_upsample,
    use_scale_shift_norm,
    dropout,
    resblock_updown,
    use_fp16,
) -> SuperResModel:
    """A `SuperResModel` for images of a side of 64, 256 or 512; ``small_size`` changes nothing."""
    return SuperResModel(
        image_size=large_size,
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
        num_head_channels=num_head_channels,
        num_heads_upsample=num_heads_upsample,
        use_scale_shift_norm=use_scale_shift_norm,
        resblock_updown=resblock_updown,
        use_fp16=use_fp16,
    )


def diffusion_of(
    kind: type[SpacedDiffusion],
    *,
    steps=1000,
    learn_sigma=False,
    sigma_small=False,
    noise_schedule="linear",
    use_kl=False,
    predict_xstart=False,
    rescale_timesteps=False,
    rescale_learned_sigmas=False,
    timestep_respacing="",
) -> SpacedDiffusion:
    """`create_gaussian_diffusion` for guided-diffusion's class, or improved-diffusion's."""
    loss_type = gd.LossType.RESCALED_MSE if rescale_learned_sigmas else gd.LossType.MSE
    var_type = gd.ModelVarType.FIXED_SMALL if sigma_small else gd.ModelVarType.FIXED_LARGE
    return kind(
        use_timesteps=space_timesteps(steps, timestep_respacing or [steps]),
        betas=gd.get_named_beta_schedule(noise_schedule, steps),
        model_mean_type=gd.ModelMeanType.START_X if predict_xstart else gd.ModelMeanType.EPSILON,
        model_var_type=gd.ModelVarType.LEARNED_RANGE if learn_sigma else var_type,
        loss_type=gd.LossType.RESCALED_KL if use_kl else loss_type,
        rescale_timesteps=rescale_timesteps,
    )


create_gaussian_diffusion = partial(diffusion_of, SpacedDiffusion)


def both(
    network: Callable[..., Any], diffusion: Callable[..., Any], flags: Mapping[str, Any]
) -> tuple[Any, Any]:
    """What the two functions make of a script's flags, each of those that it takes."""
    steps = {"steps": flags["diffusion_steps"]}
    return network(**taken_by(network, flags)), diffusion(**steps, **taken_by(diffusion, flags))


def taken_by(function: Callable, flags: Mapping[str, Any]) -> dict[str, Any]:
    """Those flags that the function has an argument for."""
    names = inspect.signature(function).parameters
    return {name: value for name, value in flags.items() if name in names}


def add_dict_to_argparser(parser: argparse.ArgumentParser, default_dict: Mapping[str, Any]) -> None:
    """An option ``--name`` of each default, of its type; of None a string's, and of a bool `str2bool`'s."""
    for name, default in default_dict.items():
        kind: Callable = str if default is None else type(default)
        parser.add_argument(f"--{name}", default=default, type=str2bool if kind is bool else kind)


def args_to_dict(args: argparse.Namespace, keys: Iterable[str]) -> dict[str, Any]:
    return {key: getattr(args, key) for key in keys}


def str2bool(v: str | bool) -> bool:
    """Raises argparse.ArgumentTypeError for what is neither yes, true, t, y or 1 nor no, false, f, n or 0."""
    if isinstance(v, bool):
        return v
    if v.lower() in ("yes", "true", "t", "y", "1"):
        return True
    if v.lower() in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError("boolean value expected")
