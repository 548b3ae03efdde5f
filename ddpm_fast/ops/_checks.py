"""Argument checks that the ops share: each names the argument, what was given and what is allowed."""

from __future__ import annotations

from numbers import Integral
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from ..reference import compute_dtype


class HasTensor(Protocol):
    """A `Schedule` or a `StepTable`: something that can lay out its table as a tensor, and keeps it."""

    def tensor(self, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> Tensor: ...


Table: TypeAlias = Tensor | HasTensor

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_floating(name: str, x: Tensor, min_dim: int) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(x).__name__}")
    if x.dtype not in FLOATING:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {x.dtype}")
    if x.dim() < min_dim:
        raise ValueError(f"{name} must have at least {min_dim} dimensions, got shape {tuple(x.shape)}")


def check_like(name: str, value: Tensor, x: Tensor, x_name: str) -> None:
    """`value` has the shape, dtype and device of `x`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(value).__name__}")
    if value.shape != x.shape or value.dtype != x.dtype or value.device != x.device:
        raise ValueError(f"{name} must be like {x_name}, {describe(x)}; got {describe(value)}")


def describe(x: Tensor) -> str:
    return f"{tuple(x.shape)} {x.dtype} on {x.device}"


def as_table(table: Table, x: Tensor, columns: tuple[int, ...]) -> Tensor:
    """A table as a tensor on x's device, in the dtype that x is computed in."""
    dtype, device = compute_dtype(x.dtype), x.device
    if not isinstance(table, Tensor):
        if not hasattr(table, "tensor"):
            raise TypeError(f"table must be a Tensor, a Schedule or a StepTable, got {type(table).__name__}")
        table = table.tensor(device, dtype)
    shape = table.shape
    if len(shape) != 2 or shape[1] not in columns:
        allowed = " or ".join(map(str, columns))
        raise ValueError(f"table must have shape (rows, {allowed}), got {tuple(shape)}")
    if table.dtype != dtype or table.device != device:
        raise ValueError(f"table must be {dtype} on {device} for such an x, got {describe(table)}")
    return table


def as_index(name: str, index: int | Tensor, batch: int, device: torch.device) -> Tensor:
    """A 0-d or ``(B,)`` int64 tensor; whether it is in range, the kernel tells."""
    if not isinstance(index, Tensor):  # asked first: whether it is an Integral takes ten times as long
        if isinstance(index, Integral) and not isinstance(index, bool):
            return torch.full((), int(index), dtype=torch.int64, device=device)
        raise TypeError(f"{name} must be an int or an int64 Tensor, got {type(index).__name__}")
    if index.dtype != torch.int64:
        raise TypeError(f"{name} must be an int or an int64 Tensor, got {index.dtype}")
    if (index.dim() != 0 and index.shape != (batch,)) or index.device != device:
        raise ValueError(
            f"{name} must be 0-d or of shape ({batch},), one per sample, on {device}; got {describe(index)}"
        )
    return index


def as_seed(seed: int | Tensor, batch: int, device: torch.device) -> Tensor:
    """The 64-bit seed as a 0-d or ``(B,)`` int64 tensor; ints from 2**63 on wrap to the same 64 bits."""
    if not isinstance(seed, Tensor) and isinstance(seed, Integral) and not isinstance(seed, bool):
        if not -(2**63) <= seed < 2**64:
            raise ValueError(f"seed must fit in 64 bits, got {seed}")
        seed = int(seed) - 2**64 if seed >= 2**63 else seed
    return as_index("seed", seed, batch, device)


def as_image_index(image_index: int | Tensor, batch: int, device: torch.device) -> Tensor:
    """``(B,)`` int64; an int k stands for the images k, k + 1, ..."""
    is_tensor = isinstance(image_index, Tensor)
    if not is_tensor and isinstance(image_index, Integral) and not isinstance(image_index, bool):
        if image_index < 0:
            raise ValueError(f"image_index must be at least 0, got {image_index}")
        return torch.arange(int(image_index), int(image_index) + batch, device=device)
    image_index = as_index("image_index", image_index, batch, device)
    if image_index.dim() != 1:
        raise ValueError(f"image_index must have shape ({batch},), got {tuple(image_index.shape)}")
    return image_index


def check_range(name: str, index: Tensor, rows: int) -> None:
    """Refuse an index outside the table; where its value is not at hand, the indexing itself asserts."""
    if at_hand(index) and index.numel() > 0:
        low, high = (int(v) for v in index.aminmax())
        if low < 0 or high >= rows:
            raise IndexError(f"{name} must be in [0, {rows - 1}], got {low if low < 0 else high}")


def at_hand(x: Tensor) -> bool:
    """Whether reading x's values costs nothing: not from a GPU, nor while a graph is traced."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()
