"""The libraries that we are measured beside: one file each, each optional, each at its best."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from inspect import signature
from io import StringIO
from typing import Any, TypeVar

import torch
from torch import Tensor

from ...unet import UNet

Network = Callable[[Tensor, int], Tensor]
"""``network(x, t)``: float32 (B, C, H, W) at one time -> what is predicted, like x, in any floating dtype."""


Call = TypeVar("Call", bound=Callable[..., object])


class Missing(Exception):
    """Why something cannot be measured here; the message is for a table."""


@dataclass(frozen=True)
class Peer:
    """A library in one of its configurations.

    Attributes:
        name: as a table has it.
        dtype: what it computes in.
        build: ``build(model, x)`` gives the `Network` for x's shape and device, with the model's weights
            where it ``converts`` them; it raises Missing with the reason that it cannot.
        converts: whether it computes the same function, so that the difference to ours is an error.
        compiles: whether building it takes minutes.
    """

    name: str
    dtype: torch.dtype
    build: Callable[[UNet, Tensor], Network]
    converts: bool = True
    compiles: bool = False


def require(*libraries: str) -> None:
    """Raises Missing naming the first of the libraries that is not installed."""
    for name in libraries:
        if find_spec(name) is None:
            raise Missing(f"{name} is not installed")


def compiled(function: Callable[..., object], mode: str | None = None) -> Callable[..., Any]:
    """``torch.compile``, whole, for each shape anew, and apart from other compilations of the same code."""
    apart = "isolate_recompiles" in signature(torch.compile).parameters  # else eight a process are the limit
    options = {"isolate_recompiles": True} if apart else {}
    return torch.compile(function, fullgraph=True, dynamic=False, mode=mode, **options)


def attempt(build: Callable[[], Call], *args: object) -> Call:
    """Build what another library makes and call it once, so that what it compiles is compiled.

    What it prints on the way is not shown.

    Raises:
        Missing: it is not installed, does not run here, or failed; the reason in one line.
    """
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call = build()
            call(*args)
    except Missing:
        raise
    except Exception as error:  # whatever another library raises, the others are still measured
        first = next(iter(str(error).splitlines()), "")
        raise Missing(f"failed: {type(error).__name__}: {first}"[:200]) from error
    return call


def peers() -> list[Peer]:
    """Every peer, in the order of the tables."""
    from . import denoising_diffusion, diffusers, onnx_runtime, openvino

    return [*diffusers.PEERS, *openvino.PEERS, *onnx_runtime.PEERS, *denoising_diffusion.PEERS]
