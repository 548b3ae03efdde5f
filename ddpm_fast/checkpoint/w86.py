"""The checkpoints of w86763777/pytorch-ddpm."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..schedule import Schedule
from ..unet import UNet, UNetConfig, timestep_embedding
from ._weights import below, build, only_tensors, read_file, renamed

_PREDICTIONS = {"epsilon": "epsilon", "xstart": "x0", "xprev": "mean"}
_VARIANCES = {"fixedlarge": "fixed_large", "fixedsmall": "fixed_small"}
_TABLE, _FIRST = "time_embedding.timembedding.0.weight", "time_embedding.timembedding.1.weight"


def load_w86(
    path: str | os.PathLike[str],
    *,
    image_size: int | None = None,
    beta_1: float = 1e-4,
    beta_T: float = 0.02,
    mean_type: str = "epsilon",
    var_type: str = "fixedlarge",
) -> tuple[UNet, Schedule, dict[str, Any]]:
    """Read a ``ckpt.pt`` of that repository, its averaged weights, or a file of the weights alone.

    Its table of the embedded times holds sin and cos by turns; ours come one after the other, so the first
    layer's columns are reordered, and the table is left out: it must be what our U-Net computes.

    Args:
        path: the file.
        image_size: None: that of the images that a ``ckpt.pt`` starts its samples from.
        beta_1, beta_T, mean_type, var_type: its flags of these names.

    Returns:
        The U-Net in its stored dtype, on the CPU, in eval mode, its widths and levels read off the weights;
        the schedule, of its own float32 betas, with the table's T; the settings for `Sampler`. Their clip is
        None: that code uses no x0 that it clips, and clips the picture at the end.

    Raises:
        ValueError: a flag's value that is not allowed; weights of another layout; a table of something other
            than the sinusoids; a damaged file; a pickle that would have to run code.
        FileNotFoundError: no such file.
    """
    for name, value, allowed in (("mean_type", mean_type, _PREDICTIONS), ("var_type", var_type, _VARIANCES)):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    path = Path(path)
    found = read_file(path)
    if isinstance(found, dict) and "ema_model" in found:
        if image_size is None and isinstance(found.get("x_T"), Tensor):
            image_size = found["x_T"].shape[-1]
        found = found["ema_model"]
    tensors = dict(only_tensors(found, path))
    config = _config(tensors, image_size, path)
    table = tensors.pop(_TABLE)
    _check_table(table, config.block_out_channels[0], path)
    first = tensors[_FIRST]
    tensors[_FIRST] = torch.cat([first[:, 0::2], first[:, 1::2]], dim=1)

    model = build(config, tensors, lambda model: renamed(model, _names(model.config), 2), path)
    betas = torch.linspace(beta_1, beta_T, len(table), dtype=torch.float32)
    settings = {
        "method": "ddpm",
        "prediction": _PREDICTIONS[mean_type],
        "clip": None,
        "variance": _VARIANCES[var_type],
    }
    return model, Schedule.from_betas(betas.double()), settings


def _check_table(table: Tensor, width: int, path: Path) -> None:
    if table.dim() == 2 and table.shape[1] == width:
        T = len(table)
        waves = timestep_embedding(torch.arange(T), width, freq_shift=0)
        expected = waves.unflatten(1, (2, -1)).transpose(1, 2).flatten(1)
        # float32 knows an angle of up to T to T eps.
        if (table.float() - expected).abs().max() <= 4 * T * torch.finfo(torch.float32).eps:
            return
    raise ValueError(
        f"{path}: {_TABLE} {tuple(table.shape)} does not hold the sinusoids that our U-Net computes"
    )


def _config(tensors: Mapping[str, Tensor], image_size: int | None, path: Path) -> UNetConfig:
    if not {"head.weight", "tail.2.weight", "downblocks.0.block1.2.weight", _TABLE, _FIRST} <= tensors.keys():
        raise ValueError(f"{path} is not in this layout: it has no head, downblocks.0, tail and {_TABLE}")
    levels: list[list[int]] = [[]]  # the numbers of the residual blocks of each
    number = 0
    while True:
        if f"downblocks.{number}.block1.2.weight" in tensors:
            levels[-1].append(number)
        elif f"downblocks.{number}.main.weight" in tensors:
            levels.append([])
        else:
            break
        number += 1
    firsts = [level[0] for level in levels if level]
    attention = tuple(f"downblocks.{first}.attn.proj.weight" in tensors for first in firsts)
    return UNetConfig(
        block_out_channels=tuple(len(tensors[f"downblocks.{first}.block1.2.weight"]) for first in firsts),
        down_attention=attention,
        up_attention=attention[::-1],
        sample_size=image_size,
        layers_per_block=len(levels[0]),
        norm_eps=1e-5,
        downsample_padding=1,
        freq_shift=0,
    )


_ENDS = {
    "time_embedding.linear_1": "time_embedding.timembedding.1",
    "time_embedding.linear_2": "time_embedding.timembedding.3",
    "conv_in": "head",
    "conv_norm_out": "tail.0",
    "conv_out": "tail.2",
}
_RES_BLOCK = {
    "norm1": "block1.0",
    "conv1": "block1.2",
    "time_emb_proj": "temb_proj.1",
    "norm2": "block2.0",
    "conv2": "block2.3",
    "conv_shortcut": "shortcut",
}
_ATTENTION = {"group_norm": "attn.group_norm", "to_qkv": "attn.proj_{}", "to_out": "attn.proj"}


def _names(config: UNetConfig) -> dict[str, str]:
    """Its name of each of our modules: the levels are one list on each way, an attention is its block's."""
    names, last = dict(_ENDS), len(config.block_out_channels) - 1
    for way, layers in (("down", config.layers_per_block), ("up", config.layers_per_block + 1)):
        number = 0
        for level in range(last + 1):
            for layer in range(layers):
                theirs = f"{way}blocks.{number}"
                names |= below(f"{way}_blocks.{level}.resnets.{layer}", theirs, _RES_BLOCK)
                names |= below(f"{way}_blocks.{level}.attentions.{layer}", theirs, _ATTENTION)
                number += 1
            names[f"{way}_blocks.{level}.resample.conv"] = f"{way}blocks.{number}.main"
            number += level < last
    names |= below("mid_block.resnets.0", "middleblocks.0", _RES_BLOCK)
    names |= below("mid_block.attentions.0", "middleblocks.0", _ATTENTION)
    names |= below("mid_block.resnets.1", "middleblocks.1", _RES_BLOCK)
    return names
