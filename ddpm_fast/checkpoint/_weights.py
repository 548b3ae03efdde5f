"""What all layouts need: files read or refused, weights held against a config, a U-Net made of them."""

from __future__ import annotations

import errno
import json
import os
import pickle
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..unet import UNet, UNetConfig

Layout = Callable[[UNet], dict[str, Tensor]]
"""The U-Net's parameters as views under the names, and in the shapes, that another's weights have."""


def renamed(model: UNet, names: Mapping[str, str], pixel_dims: int) -> dict[str, Tensor]:
    """A `Layout`, by the name there of each of our modules.

    What is linear in the channels of a pixel is a convolution there, of ``pixel_dims`` dimensions. A name
    with {} is that of three modules, for q, k and v.
    """
    views = {}
    for name, value in model.state_dict().items():
        module, _, kind = name.rpartition(".")
        if module.endswith((".to_qkv", ".to_out")) and kind == "weight":
            value = value[(...,) + (None,) * pixel_dims]
        if "{}" in names[module]:
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                views[f"{names[module].format(letter)}.{kind}"] = part
        else:
            views[f"{names[module]}.{kind}"] = value
    return views


def below(ours: str, theirs: str, parts: Mapping[str, str]) -> dict[str, str]:
    """The names of a block's parts, each below the name of the block."""
    return {f"{ours}.{name}": f"{theirs}.{other}" for name, other in parts.items()}


def build(config: UNetConfig, tensors: dict[str, Tensor], layout: Layout, origin: Any) -> UNet:
    """A U-Net in the tensors' dtype, on their device; ``layout`` names its parameters as the tensors do."""
    with torch.device("meta"):  # no memory and no random numbers for weights that are overwritten
        model = UNet(config)
    check_fit(layout(model), tensors, origin)
    dtype = reduce(torch.promote_types, {value.dtype for value in tensors.values()})
    model = model.to(dtype).to_empty(device=next(iter(tensors.values())).device)
    for name, parameter in layout(model).items():
        parameter.copy_(tensors[name])
    return model.eval()


def check_fit(expected: Mapping[str, Tensor], given: Mapping[str, Tensor], origin: Any) -> None:
    """ValueError naming what is missing, unexpected, of another shape, or not floating."""

    def named(items: Iterable[str]) -> str:
        items = sorted(items)
        return ", ".join(items[:10]) + (f" and {len(items) - 10} more" if len(items) > 10 else "")

    def differing() -> Iterator[str]:
        for name in expected.keys() & given.keys():
            (shape, dtype), wanted = (given[name].shape, given[name].dtype), expected[name].shape
            if shape != wanted or not dtype.is_floating_point:
                yield f"{name} (is {dtype} {tuple(shape)}, must be floating {tuple(wanted)})"

    faults = {
        "missing": expected.keys() - given.keys(),
        "unexpected": given.keys() - expected.keys(),
        "misshapen": [*differing()],
    }
    if any(faults.values()):
        told = "; ".join(f"{kind}: {named(names)}" for kind, names in faults.items() if names)
        raise ValueError(f"{origin}: the weights do not fit the config. {told}")


def share(
    config: UNetConfig, tensors: Mapping[str, Tensor], layout: Layout, origin: Any
) -> tuple[UNet, list[tuple[Tensor, Tensor]]]:
    """A U-Net on the memory of these tensors, in eval mode; their change in place is there at once.

    Returns:
        The U-Net, and the pairs ``(ours, theirs)`` of what had to be copied: a part of a tensor, one in
        another order, or of another dtype. To copy it again is all that a later change of theirs needs.

    Raises:
        ValueError: the weights do not fit the config.
    """
    with torch.device("meta"):
        model = UNet(config)
    check_fit(layout(model), tensors, origin)
    dtype = reduce(torch.promote_types, {value.dtype for value in tensors.values()})
    model = model.to(dtype).to_empty(device=next(iter(tensors.values())).device).eval()
    whole = {(parameter.data_ptr(), parameter.numel()): parameter for parameter in model.parameters()}
    copies = []
    for name, view in layout(model).items():
        parameter = whole.get((view.data_ptr(), view.numel()))
        if parameter is None or not view.is_contiguous() or parameter.dtype != tensors[name].dtype:
            view.copy_(tensors[name])
            copies.append((view, tensors[name]))
        else:
            parameter.data = tensors[name].detach().view(parameter.shape)
    return model, copies


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of one file, on the CPU. ValueError if it holds anything else; and as `read_file`."""
    return only_tensors(read_file(file), file)


def only_tensors(found: Any, file: Path) -> dict[str, Tensor]:
    """A dict of tensors by name, as one of the model itself where it is one of torch's parallel wrapper."""
    if not (
        isinstance(found, dict)
        and all(isinstance(name, str) and isinstance(value, Tensor) for name, value in found.items())
    ):
        raise ValueError(f"{file} must hold a dict of tensors by name and nothing else")
    if all(name.startswith("module.") for name in found):
        return {name.removeprefix("module."): value for name, value in found.items()}
    return found


def read_file(file: Path) -> Any:
    """What a .safetensors or a pickle holds, its tensors on the CPU.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it is damaged, or a pickle that would run code.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} is refused: it holds more than tensors and would need weights_only=False, which runs "
            f"code from the file. If you trust it, convert it to safetensors."
        ) from error
    except (SafetensorError, RuntimeError, EOFError, struct.error, LookupError, ValueError) as error:
        raise ValueError(f"{file} is truncated or damaged: {error}") from error
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        # torch looks for an archive's end before the start of a file that is too short.
        raise ValueError(f"{file} is truncated or damaged: {error}") from error


def read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # neither JSON nor UTF-8
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(content).__name__}")
    return content


def directory(folder: str | os.PathLike[str]) -> Path:
    folder = Path(folder)
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is not a folder (a model on a hub must be downloaded first)")
    return folder
