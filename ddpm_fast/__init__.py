"""The fastest correct way to sample and train denoising diffusion models in PyTorch."""

from . import ops

__all__ = ["ops"]
