"""Fast, exact sampling of denoising diffusion models in PyTorch: fused kernels and one loop."""

from . import checkpoint, ops, steps
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
    "info",
    "ops",
    "steps",
    "to_uint8",
]
