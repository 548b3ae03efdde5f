"""Fast, exact sampling of denoising diffusion models in PyTorch: fused kernels and one loop."""

from importlib import import_module
from typing import Any

from . import checkpoint, ops, steps
from .fusion import fuse, unfuse
from .info import info
from .sampler import Sampler, to_uint8
from .schedule import Schedule
from .steps import StepTable
from .stream import Request
from .unet import UNet, UNetConfig

__version__ = "0.1.0"

__all__ = [
    "Request",
    "Sampler",
    "Schedule",
    "StepTable",
    "UNet",
    "UNetConfig",
    "checkpoint",
    "fuse",
    "info",
    "ops",
    "steps",
    "to_uint8",
    "unfuse",
]

_NEEDS_DIFFUSERS = {"accelerate", "verify"}


def __getattr__(name: str) -> Any:
    """diffusers takes seconds to import, and is an extra: who does not name these does without it."""
    if name in _NEEDS_DIFFUSERS:
        return getattr(import_module(".compat.diffusers", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
