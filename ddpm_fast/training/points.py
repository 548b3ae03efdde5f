"""Diffusion on points: the S-curve tutorial's set and its network, and how points are drawn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops._dispatch import is_transformed
from ..schedule import check_int

__all__ = ["EmbeddingMLP", "MLPConfig", "picture"]

PIXELS = 128
BLOCK = 2**19
"""Bytes that a layer makes at a time of points that share a time: these and the next layer's are to stay in a
core's second cache."""


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
        if t.stride(0) == 0:  # one time for all points, as when sampling: its embeddings are biases
            shifts = [layer.bias + time(t[0]) for layer, time in zip(self.layers, self.times, strict=True)]
            if self._is_plain(x):
                return self._by_blocks(x, shifts)
            for layer, shift in zip(self.layers, shifts, strict=True):
                x = F.relu(F.linear(x, layer.weight, shift))
            return self.out(x)
        for layer, time in zip(self.layers, self.times, strict=True):
            x = F.relu(layer(x) + time(t))
        return self.out(x)

    def _is_plain(self, x: Tensor) -> bool:
        """Whether products may be written to memory that is there: (B, dim), and nobody would see others."""
        return (
            x.device.type == "cpu"
            and x.shape[1:] == (self.out.out_features,)
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
            and not is_transformed()
        )

    def _by_blocks(self, x: Tensor, shifts: list[Tensor]) -> Tensor:
        """The network on some points after the others, so that what its layers make stays in the cache."""
        first, *others = (layer.weight for layer in self.layers)
        # Of few coordinates: a bias costs least as one more of them, and points at the end as columns.
        first = torch.cat([first, shifts[0][:, None]], 1).t()
        others = [(weight.t(), shift) for weight, shift in zip(others, shifts[1:], strict=True)]
        x, out = torch.cat([x, x.new_ones(len(x), 1)], 1), x.new_empty(self.out.out_features, len(x))
        rows = max(1, BLOCK // (first.shape[1] * x.element_size()))
        h, after = x.new_empty(2, min(rows, len(x)), first.shape[1])
        for points, result in zip(x.split(rows), out.split(rows, 1), strict=True):
            h, after = h[: len(points)], after[: len(points)]
            torch.mm(points, first, out=h).relu_()
            for weight, shift in others:
                torch.addmm(shift, h, weight, out=after).relu_()
                h, after = after, h
            torch.mm(self.out.weight, h.t(), out=result)
        return out.add_(self.out.bias[:, None]).t().contiguous()


def picture(points: Tensor) -> Tensor:
    """(n, 2) points as uint8 (3, PIXELS, PIXELS), in a window as wide as all but the outermost need."""
    edge = max(float(points.abs().quantile(0.99)), 1e-6)
    counts, _, _ = np.histogram2d(
        points[:, 1].numpy(), points[:, 0].numpy(), bins=PIXELS, range=[[-edge, edge]] * 2
    )
    ink = np.minimum(counts[::-1] / 3, 1.0)[..., None]
    pixels = (255 - ink * (255 - np.array([30, 90, 160]))).astype(np.uint8)
    return torch.from_numpy(pixels).permute(2, 0, 1)
