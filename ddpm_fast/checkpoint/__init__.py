"""From files to a U-Net, its schedule and the sampler settings it was published with, and back to files.

Read and written: diffusers' layout (read from live objects too), and our own, a folder with

    config.json        {"format": "ddpm_fast", "version": 1, "unet": {...}, "settings": {...}}
    model.safetensors  the weights, and float64 "schedule.betas" and "schedule.alphas_cumprod"

Read only: the files of improved- and guided-diffusion (`load_openai`), Ho's checkpoints as converted to
PyTorch (`load_ho`), and pytorch-ddpm's (`load_w86`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .. import files
from ..schedule import Schedule
from ..unet import UNet, UNetConfig
from ._weights import build, directory, read_json, read_tensors
from .diffusers import (
    VERSION,
    diffusers_views,
    load_diffusers,
    scheduler_config,
    share_diffusers,
    unet_config,
)
from .ho import load_ho
from .openai import load_openai
from .w86 import load_w86

__all__ = [
    "DIGITS",
    "load",
    "load_diffusers",
    "load_ho",
    "load_openai",
    "load_w86",
    "save",
    "save_diffusers",
    "share_diffusers",
]

DIGITS = Path(__file__).parents[1] / "weights" / "digits"
"""The checkpoint that comes with the package: `load(DIGITS)`."""

_FORMAT, _VERSION = "ddpm_fast", 1
_ARRAYS = ("betas", "alphas_cumprod")


def save(
    folder: str | os.PathLike[str],
    model: UNet,
    schedule: Schedule,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint that `load` gives back bit for bit.

    It is written beside ``folder`` and renamed into place: nothing is ever half written. An existing
    checkpoint is replaced whole, with every other file in its folder.

    Args:
        folder: to be created, with its parents.
        model: in any dtype, layout and device; the layout is not recorded.
        schedule: the noise schedule it was trained with.
        settings: keyword arguments for the sampler; values that JSON can hold.

    Raises:
        TypeError: not a UNet (not a compiled one either: pass what was compiled), or settings not for JSON.
        FileExistsError: ``folder`` is a file, or a folder with something other than a checkpoint in it.
    """
    _check_model(model)
    folder = Path(folder).resolve()
    if folder.exists() and not (folder.is_dir() and (_is_ours(folder) or not any(folder.iterdir()))):
        raise FileExistsError(f"{folder} exists and is not a ddpm_fast checkpoint: not replaced")
    with files.written_whole(folder) as new:
        write(new, model, schedule, settings)


def write(folder: Path, model: UNet, schedule: Schedule, settings: Mapping[str, Any] | None = None) -> None:
    """The files of `save`, in a folder that is there; within `written_whole`, with others beside them."""
    config = {
        "format": _FORMAT,
        "version": _VERSION,
        "unet": model.config.to_dict(),
        "settings": dict(settings or {}),
    }
    tensors = {f"schedule.{name}": torch.tensor(getattr(schedule, name)) for name in _ARRAYS}
    files.write_json(folder / "config.json", config)
    write_tensors(folder / "model.safetensors", model.state_dict() | tensors)


def load(folder: str | os.PathLike[str]) -> tuple[UNet, Schedule, dict[str, Any]]:
    """Read a checkpoint folder: one that `save` wrote, or else diffusers' (see `load_diffusers`).

    Returns:
        The U-Net in its stored dtype, on the CPU, in eval mode; its schedule; the sampler settings, for
        ``Sampler(model, schedule, **settings)``.

    Raises:
        NotADirectoryError, FileNotFoundError: no such folder, or a file is missing in it.
        ValueError: a file that is damaged or of a newer version, or weights that do not fit the config.
    """
    folder = directory(folder)
    if not _is_ours(folder):
        return load_diffusers(folder)
    file = folder / "config.json"
    config = read_json(file)
    if config.get("version") != _VERSION:
        raise ValueError(f"{file}: version is {config.get('version')!r}, this ddpm_fast reads {_VERSION}")
    for name in ("unet", "settings"):
        if not isinstance(config.get(name), dict):
            raise ValueError(f"{file}: {name} must be an object, got {config.get(name)!r}")
    file = folder / "model.safetensors"
    tensors = read_tensors(file)
    if lacking := {f"schedule.{name}" for name in _ARRAYS} - tensors.keys():
        raise ValueError(f"{file} lacks {sorted(lacking)}")
    schedule = Schedule(*(tensors.pop(f"schedule.{name}").numpy() for name in _ARRAYS))
    model = build(UNetConfig.from_dict(config["unet"]), tensors, UNet.state_dict, file)
    return model, schedule, config["settings"]


def of_model(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of a checkpoint's settings those that belong to the model, whatever is done with it."""
    return {name: settings[name] for name in ("prediction", "clip", "variance") if name in settings}


def save_diffusers(
    folder: str | os.PathLike[str],
    model: UNet,
    schedule: Schedule,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Write a folder that ``diffusers.DDPMPipeline.from_pretrained`` loads; the inverse of `load_diffusers`.

    diffusers is not needed. The betas are written one by one, whatever they were made by; diffusers rounds
    them to float32. Of the settings those of a `DDPMScheduler` are written: prediction, clip, variance,
    spacing and steps_offset; another method's scheduler is made of them by its ``from_config``.

    Args:
        folder: to be created, with its parents. An existing pipeline's folder is replaced whole.
        model, schedule, settings: as in `save`.

    Raises:
        TypeError: not a UNet.
        ValueError: a setting, or a field of the model's config, that diffusers has no word for.
        FileExistsError: ``folder`` is a file, or a folder with something other than a pipeline in it.
    """
    _check_model(model)
    folder = Path(folder).resolve()
    ours = (folder / "model_index.json").is_file()
    if folder.exists() and not (folder.is_dir() and (ours or not any(folder.iterdir()))):
        raise FileExistsError(f"{folder} exists and is not a diffusers pipeline: not replaced")
    index = {
        "_class_name": "DDPMPipeline",
        "_diffusers_version": VERSION,
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }
    unet = unet_config(model.config)
    scheduler = scheduler_config(schedule, dict(settings or {}))
    with files.written_whole(folder) as new:
        (new / "unet").mkdir()
        (new / "scheduler").mkdir()
        files.write_json(new / "model_index.json", index)
        files.write_json(new / "unet" / "config.json", unet)
        write_tensors(new / "unet" / "diffusion_pytorch_model.safetensors", diffusers_views(model))
        files.write_json(new / "scheduler" / "scheduler_config.json", scheduler)


def _check_model(model: Any) -> None:
    if not isinstance(model, UNet):
        raise TypeError(f"model must be a ddpm_fast UNet, got {type(model).__name__}")


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """As safetensors, with the permissions of any other file. Raises OSError where there is no room."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    try:
        save_file(tensors, file)
    except SafetensorError as error:
        raise OSError(f"{file} cannot be written: {error}") from error
    files.as_any_other(file)


def _is_ours(folder: Path) -> bool:
    file = folder / "config.json"
    return file.is_file() and read_json(file).get("format") == _FORMAT
