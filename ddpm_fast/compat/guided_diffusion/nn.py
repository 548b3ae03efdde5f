"""What scripts take from guided-diffusion's ``nn``, beside the layers of its U-Net."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ...unet import timestep_embedding as _timestep_embedding

__all__ = ["mean_flat", "scale_module", "timestep_embedding", "update_ema", "zero_module"]


def mean_flat(tensor: Tensor) -> Tensor:
    """The mean over all but the batch: (B, ...) -> (B,)."""
    return tensor.mean(dim=list(range(1, tensor.dim())))


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000) -> Tensor:
    """``[cos(t w), sin(t w)]`` with ``w_k = max_period^(-k / (dim // 2))``: (B,) -> float32 (B, dim).

    Raises:
        ValueError: another ``max_period`` than 10000, with which every published model was trained.
    """
    if max_period != 10000:
        raise ValueError(f"max_period must be 10000, got {max_period}")
    return _timestep_embedding(timesteps.float(), dim, flip_sin_to_cos=True, freq_shift=0)


@torch.no_grad()
def update_ema(target_params: Iterable[Tensor], source_params: Iterable[Tensor], rate: float = 0.99) -> None:
    """Move each target by `1 - rate` of the way to its source, in place."""
    targets, sources = list(target_params), list(source_params)
    torch._foreach_mul_(targets, rate)
    torch._foreach_add_(targets, sources, alpha=1 - rate)


@torch.no_grad()
def zero_module(module: nn.Module) -> nn.Module:
    """The module, its parameters zero from now on."""
    return scale_module(module, 0.0)


@torch.no_grad()
def scale_module(module: nn.Module, scale: float) -> nn.Module:
    """The module, its parameters multiplied by ``scale``."""
    for parameter in module.parameters():
        parameter.mul_(scale)
    return module
