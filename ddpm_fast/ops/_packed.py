"""What the ops with packed weights share: memory for them, and checks of what is given beside them."""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import describe

Operands = dict[str, tuple[Tensor | None, tuple[int, ...]]]
"""By name: what is given, and the shape that it must have."""


def on_a_huge_page(floats: int, dtype: torch.dtype) -> Tensor:
    """Memory that starts with one, if it fills one; what lies before it is never touched, and takes none.

    So many floats of it, in a dtype that says what they are for.
    """
    page, like = 2**21 // 4, {"dtype": torch.float32, "device": "cpu"}  # whatever the defaults are
    if floats < page:
        return torch.empty(floats, **like).view(dtype)
    memory = torch.empty(floats + page, **like)
    return memory.narrow(0, -(memory.data_ptr() // 4) % page, floats).view(dtype)


def check_operands(x: Tensor, operands: Operands) -> None:
    """Raises TypeError, ValueError for an operand that is not like x, or has not the shape named.

    A ``norm`` is float32 whatever x is.
    """
    for name, (value, shape) in operands.items():
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(value).__name__}")
        dtype = torch.float32 if name == "norm" else x.dtype
        if value.shape != shape or value.dtype != dtype or value.device != x.device:
            raise ValueError(f"{name} must be {shape} {dtype} on {x.device}, got {describe(value)}")


def check_packed_call(x: Tensor, operands: Operands, differentiable: str) -> None:
    """As `check_operands`; ValueError where a gradient is asked for, which ``differentiable`` has."""
    check_operands(x, operands)
    given = (x, *(value for value, _ in operands.values()))
    if torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in given):
        raise ValueError(
            f"an argument asks for a gradient, which a packed weight does not have: use {differentiable}"
        )
