"""Diffusion on points: the S-curve tutorial's set and its network, and how points are drawn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..schedule import check_int

__all__ = ["EmbeddingMLP", "MLPConfig", "picture"]

PIXELS = 128


@dataclass(frozen=True)
class MLPConfig:
    """
    Attributes:
        units: of each hidden layer.
        dim: coordinates of a point.
    """

    units: int = 128
    dim: int = 2

    def __post_init__(self) -> None:
        check_int("mlp.units", self.units, 1)
        check_int("mlp.dim", self.dim, 1)


class EmbeddingMLP(nn.Module):
    """Three hidden layers on a point (B, dim), each shifted by an embedding of t (B,) in [0, T)."""

    def __init__(self, T: int = 100, config: MLPConfig | None = None) -> None:
        super().__init__()
        config = config or MLPConfig()
        dim, units = config.dim, config.units
        self.sample_shape = (dim,)
        self.layers = nn.ModuleList(nn.Linear(size, units) for size in (dim, units, units))
        self.times = nn.ModuleList(nn.Embedding(T, units) for _ in self.layers)
        self.out = nn.Linear(units, dim)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        for layer, time in zip(self.layers, self.times, strict=True):
            if t.stride(0) == 0:  # one time for all points, as when sampling: a bias
                x = F.relu(F.linear(x, layer.weight, layer.bias + time(t[0])))
            else:
                x = F.relu(layer(x) + time(t))
        return self.out(x)


def picture(points: Tensor) -> Tensor:
    """(n, 2) points as uint8 (3, PIXELS, PIXELS), in a window as wide as all but the outermost need."""
    edge = max(float(points.abs().quantile(0.99)), 1e-6)
    counts, _, _ = np.histogram2d(
        points[:, 1].numpy(), points[:, 0].numpy(), bins=PIXELS, range=[[-edge, edge]] * 2
    )
    ink = np.minimum(counts[::-1] / 3, 1.0)[..., None]
    pixels = (255 - ink * (255 - np.array([30, 90, 160]))).astype(np.uint8)
    return torch.from_numpy(pixels).permute(2, 0, 1)
