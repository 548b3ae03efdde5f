"""denoising-diffusion-pytorch's ``GaussianDiffusion``: import it from here in place of its own.

The package itself is not needed, but for ``from ddpm_fast.compat.lucidrains import Unet``, which is its own.
"""

from __future__ import annotations

from typing import Any

from .gaussian_diffusion import GaussianDiffusion, ModelPrediction

__all__ = ["GaussianDiffusion", "ModelPrediction"]


def __getattr__(name: str) -> Any:
    if name != "Unet":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from denoising_diffusion_pytorch import Unet
    except ImportError as error:
        raise ImportError(
            "Unet is denoising-diffusion-pytorch's, an optional package: pip install "
            "denoising-diffusion-pytorch. GaussianDiffusion does without it, over any model"
        ) from error
    return Unet
