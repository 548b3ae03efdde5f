"""The checkpoints of Ho et al. 2020 as converted to PyTorch (pesser/pytorch_diffusion, ermongroup/ddim)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import count, takewhile
from pathlib import Path
from typing import Any

from torch import Tensor

from ..schedule import Schedule
from ..unet import UNet, UNetConfig
from ._weights import below, build, only_tensors, read_file, renamed


def load_ho(
    path: str | os.PathLike[str], *, image_size: int | None = None, variance: str | None = None
) -> tuple[UNet, Schedule, dict[str, Any]]:
    """Read a ``.ckpt`` or ``.pt`` whose weights are named ``temb.dense.0``, ``down.0.block.0.norm1``, ...

    Also a ``.pth`` that ermongroup/ddim trained: of its states the averaged weights are taken, if there are.

    Args:
        path: the file.
        image_size: None: that at which the one level with attention has 16 x 16 pixels, as in all of Ho's.
        variance: None: as published, "fixed_large" below 256 x 256 pixels and "fixed_small" from there.

    Returns:
        The U-Net in its stored dtype, on the CPU, in eval mode, its widths and levels read off the weights;
        the linear schedule of 1000 steps that all of them have; the settings for `Sampler`.

    Raises:
        ValueError: weights of another layout; a damaged file; a pickle that would have to run code.
        FileNotFoundError: no such file.
    """
    path = Path(path)
    found = read_file(path)
    if isinstance(found, list) and found:  # weights, optimizer, epoch, step, and maybe averaged weights
        found = found[4] if len(found) > 4 else found[0]
    tensors = only_tensors(found, path)
    config = _config(tensors, image_size, path)
    model = build(config, tensors, lambda model: renamed(model, _names(model.config), 2), path)
    if variance is None:
        variance = "fixed_small" if config.sample_size is None or config.sample_size >= 256 else "fixed_large"
    settings = {"method": "ddpm", "prediction": "epsilon", "clip": 1.0, "variance": variance}
    return model, Schedule.linear(), settings


def _config(tensors: Mapping[str, Tensor], image_size: int | None, path: Path) -> UNetConfig:
    def numbered(name: str) -> int:
        return sum(1 for _ in takewhile(lambda i: name.format(i) in tensors, count()))

    levels = numbered("down.{}.block.0.conv1.weight")
    if not levels or not {"conv_in.weight", "conv_out.weight"} <= tensors.keys():
        raise ValueError(f"{path} is not in this layout: it has no conv_in, down.0.block.0 and conv_out")
    attention = tuple(f"down.{level}.attn.0.norm.weight" in tensors for level in range(levels))
    if image_size is None and sum(attention) == 1:
        image_size = 16 * 2 ** attention.index(True)
    return UNetConfig(
        block_out_channels=tuple(
            len(tensors[f"down.{level}.block.0.conv1.weight"]) for level in range(levels)
        ),
        down_attention=attention,
        up_attention=attention[::-1],
        sample_size=image_size,
        in_channels=tensors["conv_in.weight"].shape[1],
        out_channels=len(tensors["conv_out.weight"]),
        layers_per_block=numbered("down.0.block.{}.conv1.weight"),
    )


_ENDS = {
    "time_embedding.linear_1": "temb.dense.0",
    "time_embedding.linear_2": "temb.dense.1",
    "conv_in": "conv_in",
    "conv_norm_out": "norm_out",
    "conv_out": "conv_out",
}
_RES_BLOCK = {
    "norm1": "norm1",
    "conv1": "conv1",
    "time_emb_proj": "temb_proj",
    "norm2": "norm2",
    "conv2": "conv2",
    "conv_shortcut": "nin_shortcut",
}
_ATTENTION = {"group_norm": "norm", "to_qkv": "{}", "to_out": "proj_out"}


def _names(config: UNetConfig) -> dict[str, str]:
    """Their name of each of our modules: the way up is numbered from the full resolution there."""
    names, last = dict(_ENDS), len(config.block_out_channels) - 1
    for level in range(last + 1):
        ways = (f"down_blocks.{level}", f"down.{level}"), (f"up_blocks.{level}", f"up.{last - level}")
        for ours, theirs in ways:
            for layer in range(config.layers_per_block + 1):
                names |= below(f"{ours}.resnets.{layer}", f"{theirs}.block.{layer}", _RES_BLOCK)
                names |= below(f"{ours}.attentions.{layer}", f"{theirs}.attn.{layer}", _ATTENTION)
            way = ours.split("_")[0]
            names[f"{ours}.resample.conv"] = f"{theirs}.{way}sample.conv"
    names |= below("mid_block.resnets.0", "mid.block_1", _RES_BLOCK)
    names |= below("mid_block.attentions.0", "mid.attn_1", _ATTENTION)
    names |= below("mid_block.resnets.1", "mid.block_2", _RES_BLOCK)
    return names
