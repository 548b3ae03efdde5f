"""The files of improved- and guided-diffusion, read by the flags that their scripts are run with.

Nichol & Dhariwal 2021, arXiv 2102.09672; Dhariwal & Nichol 2021, arXiv 2105.05233.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..schedule import Schedule, check_int
from ..steps import space_timesteps
from ..unet import UNet, UNetConfig
from ._weights import below, build, check_fit, read_tensors, renamed, share

CHANNEL_MULT: dict[int, tuple[float, ...]] = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
    32: (1, 2, 2, 2),
}
"""Widths of the levels by the image's size, where no flag names them."""

NUM_CLASSES = 1000  # ImageNet's

_FLAGS = {
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
    "use_scale_shift_norm": True,
    "resblock_updown": False,
    "use_new_attention_order": False,
    "learn_sigma": False,
    "sigma_small": False,
    "diffusion_steps": 1000,
    "noise_schedule": "linear",
    "timestep_respacing": "",
    "predict_xstart": False,
    "rescale_timesteps": None,
    "clip_denoised": True,
    "use_ddim": False,
}
"""Those that an image depends on, with the scripts' defaults."""
_OF_TRAINING = {"use_kl", "rescale_learned_sigmas", "use_checkpoint", "use_fp16"}


def load_openai(path: str | os.PathLike[str], **flags: Any) -> tuple[UNet, Schedule, dict[str, Any]]:
    """Read a ``.pt`` of improved- or guided-diffusion: a model's weights, or their average.

    ::

        model, schedule, settings = load_openai(
            "64x64_diffusion.pt", attention_resolutions="32,16,8", class_cond=True, diffusion_steps=1000,
            dropout=0.1, image_size=64, learn_sigma=True, noise_schedule="cosine", num_channels=192,
            num_head_channels=64, num_res_blocks=3, resblock_updown=True, use_new_attention_order=True,
            use_fp16=True, use_scale_shift_norm=True, timestep_respacing="250",
        )
        images = Sampler(model, schedule, **settings)(4, class_labels=torch.tensor([1, 2, 3, 4]))

    Args:
        path: the file.
        flags: of ``image_sample.py``, as published with the model; the others have its defaults. Those that
            say how to train or to run (``use_kl``, ``rescale_learned_sigmas``, ``use_checkpoint``,
            ``use_fp16``) are allowed, and change nothing: `Sampler` has a ``dtype``. ``rescale_timesteps``,
            on in improved-diffusion and off in guided-diffusion, must be given where they differ: where
            ``diffusion_steps`` is not 1000.

    Returns:
        The U-Net in its stored dtype, on the CPU, in eval mode (its time is that of the schedule, rescaled
        within); its schedule, in float64; the sampler settings, for ``Sampler(model, schedule, **settings)``.

    Raises:
        TypeError: a flag that is none of the script's, or not of its type.
        ValueError: a flag's value that is not allowed, or that our `UNet` has no equal for (different heads
            on the way up); weights that do not fit the flags; a damaged file; a pickle that would run code.
        FileNotFoundError: no such file.
    """
    known = _FLAGS.keys() | _OF_TRAINING
    if unknown := sorted(flags.keys() - known):
        raise TypeError(f"load_openai got {', '.join(unknown)}; flags of image_sample.py: {sorted(known)}")
    flags = _FLAGS | flags
    _check_types(flags)
    T = check_int("diffusion_steps", flags["diffusion_steps"], 1)
    if flags["rescale_timesteps"] is None and T != 1000:
        raise ValueError(
            f"rescale_timesteps must be given with diffusion_steps={T}: the default is True in "
            "improved-diffusion's scripts and False in guided-diffusion's"
        )
    if flags["timestep_respacing"]:
        space_timesteps(T, flags["timestep_respacing"])  # refuses what it cannot be
    schedule, settings, config = _schedule(T, flags["noise_schedule"]), _settings(flags), _config(flags)
    tensors = read_tensors(Path(path))
    with torch.device("meta"):
        check_fit(_views(UNet(config)), tensors, path)
    by_head = not flags["use_new_attention_order"]
    if by_head:
        tensors = _by_head(tensors, config)
    return build(config, tensors, partial(_views, by_head=by_head), path), schedule, settings


def share_openai(
    config: UNetConfig, tensors: Mapping[str, Tensor], new_order: bool, origin: Any
) -> tuple[UNet, list[tuple[Tensor, Tensor]]]:
    """A live ``UNetModel``'s weights, by its names, as a U-Net: as `share_diffusers` does with diffusers'.

    Copied are the q, k and v of several heads in the legacy order, which has those of a head together.
    """
    tensors = tensors if new_order else _by_head(tensors, config)
    return share(config, tensors, partial(_views, by_head=not new_order), origin)


def channel_mult_of(
    image_size: int, widths: Mapping[int, tuple[float, ...]], given: str | None = None
) -> tuple[float, ...]:
    """As ``given``, "1,2,2" say, or by the size of the images. ValueError: one that is not in ``widths``.

    None: where there is no such flag.
    """
    if given:
        return tuple(_numbers("channel_mult", given))
    if image_size not in widths:
        sizes = ", ".join(map(str, sorted(widths)))
        any_other = "" if given is None else ", or any, where there is a channel_mult"
        raise ValueError(f"unsupported image size: {image_size}; allowed: {sizes}{any_other}")
    return widths[image_size]


def downsampling_rates(image_size: int, resolutions: str) -> tuple[int, ...]:
    """By how much an image is smaller at these sides, "16,8" say."""
    return tuple(image_size // side for side in _numbers("attention_resolutions", resolutions))


def _numbers(name: str, text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"{name} must be positive integers such as '16,8', got {text!r}")
    return [int(part) for part in parts]


def config_of(
    *,
    image_size: int | None,
    in_channels: int,
    model_channels: int,
    out_channels: int,
    num_res_blocks: int,
    attention_resolutions: Collection[int],
    dropout: float,
    channel_mult: Sequence[float],
    num_classes: int | None,
    num_heads: int,
    num_head_channels: int,
    num_heads_upsample: int,
    use_scale_shift_norm: bool,
    resblock_updown: bool,
    timestep_scale: float = 1.0,
) -> UNetConfig:
    """The arguments of ``UNetModel`` as our config. Raises ValueError where no config is the same network."""
    if num_head_channels == -1 and num_heads_upsample not in (-1, num_heads):
        raise ValueError(
            f"num_heads_upsample={num_heads_upsample}: UNet has as many heads on the way up as down, "
            f"num_heads={num_heads}; ddpm_fast.compat.guided_diffusion.UNetModel has both"
        )
    channels = tuple(int(factor * model_channels) for factor in channel_mult)
    attention = tuple(2**level in attention_resolutions for level in range(len(channels)))
    halvings = 2 ** (len(channels) - 1)
    return UNetConfig(
        block_out_channels=channels,
        down_attention=attention,
        up_attention=attention[::-1],
        sample_size=image_size if image_size and image_size % halvings == 0 else None,
        in_channels=in_channels,
        out_channels=out_channels,
        layers_per_block=num_res_blocks,
        attention_head_dim=None if num_head_channels == -1 else num_head_channels,
        num_attention_heads=num_heads if num_head_channels == -1 and num_heads != 1 else None,
        norm_eps=1e-5,
        attn_norm_num_groups=32,
        downsample_padding=1,
        flip_sin_to_cos=True,
        freq_shift=0,
        timestep_input_dim=None if model_channels == channels[0] else model_channels,
        time_embedding_dim=None if model_channels == channels[0] else 4 * model_channels,
        timestep_scale=timestep_scale,
        dropout=dropout,
        resnet_time_scale_shift="scale_shift" if use_scale_shift_norm else "default",
        resblock_updown=resblock_updown,
        num_class_embeds=num_classes,
    )


_UNCHANGED = (
    "image_size",
    "num_res_blocks",
    "dropout",
    "num_heads",
    "num_head_channels",
    "num_heads_upsample",
    "use_scale_shift_norm",
    "resblock_updown",
)


def _config(flags: Mapping[str, Any]) -> UNetConfig:
    return config_of(
        **{name: flags[name] for name in _UNCHANGED},
        in_channels=3,
        model_channels=flags["num_channels"],
        out_channels=6 if flags["learn_sigma"] else 3,
        attention_resolutions=downsampling_rates(flags["image_size"], flags["attention_resolutions"]),
        channel_mult=channel_mult_of(flags["image_size"], CHANNEL_MULT, flags["channel_mult"]),
        num_classes=NUM_CLASSES if flags["class_cond"] else None,
        timestep_scale=1000 / flags["diffusion_steps"] if flags["rescale_timesteps"] else 1.0,
    )


def _check_types(flags: Mapping[str, Any]) -> None:
    """A string of a command line is not what it says: "False" would be true."""
    for name, default in _FLAGS.items():
        value = flags[name]
        if isinstance(default, bool) or name == "rescale_timesteps":
            if not isinstance(value, bool) and not (default is None and value is None):
                raise TypeError(f"{name} must be True or False, got {value!r}")
        elif isinstance(default, int):
            check_int(name, value, -1)
        elif isinstance(default, str) and name != "timestep_respacing" and not isinstance(value, str):
            raise TypeError(f"{name} must be a string, got {value!r}")


def _schedule(T: int, name: str) -> Schedule:
    if name == "linear":
        return Schedule.linear(T, 1e-4 * 1000 / T, 0.02 * 1000 / T)
    if name == "cosine":
        return Schedule.cosine(T)
    raise ValueError(f"noise_schedule must be 'linear' or 'cosine', got {name!r}")


def _settings(flags: Mapping[str, Any]) -> dict[str, Any]:
    fixed = "fixed_small" if flags["sigma_small"] else "fixed_large"
    settings = {
        "method": "ddim" if flags["use_ddim"] else "ddpm",
        "prediction": "x0" if flags["predict_xstart"] else "epsilon",
        "clip": 1.0 if flags["clip_denoised"] else None,
        "variance": "learned_range" if flags["learn_sigma"] else fixed,
    }
    if flags["use_ddim"]:
        settings["use_clipped_out"] = True
    if flags["timestep_respacing"]:
        settings["spacing"] = flags["timestep_respacing"]
    return settings


_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "class_embedding": "label_emb",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RES_BLOCK = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_ATTENTION = {"group_norm": "norm", "to_qkv": "qkv", "to_out": "proj_out"}


def _views(model: UNet, by_head: bool = False) -> dict[str, Tensor]:
    """The model's parameters under ``UNetModel``'s names, and in its shapes.

    ``by_head``: q, k and v as (heads, 3, channels of a head, ...), which is how the legacy order has them.
    """
    views = renamed(model, _names(model.config), pixel_dims=1)
    if by_head:
        for name, value in views.items():
            if ".qkv." in name:
                by_kind = value.unflatten(0, (3, _heads(model.config, len(value) // 3), -1))
                views[name] = by_kind.transpose(0, 1)
    return views


def _by_head(tensors: Mapping[str, Tensor], config: UNetConfig) -> dict[str, Tensor]:
    return {
        name: value.unflatten(0, (_heads(config, len(value) // 3), 3, -1)) if ".qkv." in name else value
        for name, value in tensors.items()
    }


def _heads(config: UNetConfig, channels: int) -> int:
    return config.num_attention_heads or channels // (config.attention_head_dim or channels)


def _names(config: UNetConfig) -> dict[str, str]:
    """``UNetModel``'s name of each of our modules: there the levels are one list on each way."""
    names, last = dict(_ENDS), len(config.block_out_channels) - 1
    resized = config.resblock_updown

    number = 1
    for level, attends in enumerate(config.down_attention):
        for layer in range(config.layers_per_block):
            ours, theirs = f"down_blocks.{level}", f"input_blocks.{number}"
            names |= below(f"{ours}.resnets.{layer}", f"{theirs}.0", _RES_BLOCK)
            if attends:
                names |= below(f"{ours}.attentions.{layer}", f"{theirs}.1", _ATTENTION)
            number += 1
        if level < last:
            parts = _RES_BLOCK if resized else {"conv": "op"}
            names |= below(f"{ours}.resample", f"input_blocks.{number}.0", parts)
            number += 1

    names |= below("mid_block.resnets.0", "middle_block.0", _RES_BLOCK)
    names |= below("mid_block.attentions.0", "middle_block.1", _ATTENTION)
    names |= below("mid_block.resnets.1", "middle_block.2", _RES_BLOCK)

    number = 0
    for level, attends in enumerate(config.up_attention):
        for layer in range(config.layers_per_block + 1):
            ours, theirs = f"up_blocks.{level}", f"output_blocks.{number}"
            names |= below(f"{ours}.resnets.{layer}", f"{theirs}.0", _RES_BLOCK)
            if attends:
                names |= below(f"{ours}.attentions.{layer}", f"{theirs}.1", _ATTENTION)
            number += 1
        if level < last:
            parts = _RES_BLOCK if resized else {"conv": "conv"}
            names |= below(f"{ours}.resample", f"{theirs}.{1 + attends}", parts)
    return names
