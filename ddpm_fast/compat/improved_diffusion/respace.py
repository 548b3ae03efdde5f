"""improved-diffusion's `SpacedDiffusion`."""

from ..guided_diffusion import respace
from ..guided_diffusion.respace import space_timesteps
from .gaussian_diffusion import GaussianDiffusion

__all__ = ["SpacedDiffusion", "space_timesteps"]


class SpacedDiffusion(GaussianDiffusion, respace.SpacedDiffusion):
    """guided-diffusion's, with the methods of improved-diffusion."""
