"""A GroupNorm that waits for its SiLU: what the rewritten forwards call in place of `+`, the norm and SiLU.

Each function does what it stands for where there is nothing to fuse, so that only the rewriting has to be
proved: that what is pending reaches nobody but these functions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops import group_norm_silu
from ..ops._dispatch import is_transformed
from ._kinds import has_hooks, is_known_norm, is_known_silu, upcasts

_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Pending(NamedTuple):
    """``norm(x + add) * (1 + scale) + shift``, not computed yet; what is None is not there."""

    x: Tensor
    add: Tensor | None = None
    norm: nn.GroupNorm | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None


def add(a: Any, b: Any) -> Any:
    """``a + b``, pending if one of them has one value per sample and channel of the other."""
    if _is_per_channel(b, a) and a.dtype == b.dtype:
        return Pending(a, b)
    if _is_per_channel(a, b) and a.dtype == b.dtype:
        return Pending(b, a)
    return a + b


def norm(f: Any, x: Any) -> Any:
    """``f(x)``, pending if `f` is a GroupNorm that the op computes."""
    sum = x if isinstance(x, Pending) else Pending(x)
    if is_known_norm(f) and _fits(f, sum.x) and not _is_watched():
        return Pending(sum.x, sum.add, f)
    return f(value(x))


def scale(x: Any, s: Any) -> Any:
    """``x * (1 + s)``"""
    if isinstance(x, Pending) and x.scale is None and x.shift is None and _is_film(s, x):
        return Pending(x.x, x.add, x.norm, s)
    return value(x) * (1 + s)


def shift(a: Any, b: Any) -> Any:
    """``a + b``, one of which may be pending."""
    x, t = (b, a) if isinstance(b, Pending) else (a, b)
    if isinstance(x, Pending) and x.shift is None and _is_film(t, x):
        return Pending(x.x, x.add, x.norm, x.scale, t)
    return value(a) + value(b)


def act(f: Any, x: Any, **options: Any) -> Any:
    """``f(x, **options)``, `f` being SiLU, or a Sequential that begins with it or with a GroupNorm."""
    if type(f) is nn.Sequential and _is_plain_sequential(f):
        return sequential(f, x)
    if isinstance(x, Pending) and x.norm is not None and is_known_silu(f):
        return _compute(x)
    return f(value(x), **options)


def sequential(self: nn.Sequential, input: Any) -> Any:
    """The forward of a fused ``nn.Sequential``."""
    for module in self:
        if isinstance(module, nn.GroupNorm):
            input = norm(module, input)
        else:
            input = act(module, input) if isinstance(input, Pending) else module(input)
    return value(input)


sequential.__name__ = "forward"  # by which a pickle of the bound method finds the class's own


def value(x: Any) -> Any:
    """What is pending, by the modules and in the order in which it was written."""
    if not isinstance(x, Pending):
        return x
    y = x.x if x.add is None else x.x + x.add
    if x.norm is not None:
        y = x.norm(y)
    if x.scale is not None:
        y = y * (1 + x.scale)
    return y if x.shift is None else y + x.shift


def _is_watched() -> bool:
    """Whether the modules are to run for what they show: their operations to torch.func and to forward mode,
    their outputs to hooks of all modules."""
    return is_transformed() or (
        not torch.compiler.is_compiling() and torch.nn.modules.module._has_any_global_hook()
    )


def _compute(p: Pending) -> Tensor:
    def flat(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.reshape(p.x.shape[:2])

    return group_norm_silu(
        p.x.to(_dtype_of_norm(p.x)),
        p.norm.num_groups,
        p.norm.weight,
        p.norm.bias,
        p.norm.eps,
        add=flat(p.add),
        scale=flat(p.scale),
        shift=flat(p.shift),
    )


def _is_plain_sequential(f: nn.Sequential) -> bool:
    own = f.__dict__.get("forward")
    return not has_hooks(f) and (own is None or getattr(own, "__func__", None) is sequential)


def _is_per_channel(values: Any, x: Any) -> bool:
    if not isinstance(values, Tensor) or not isinstance(x, Tensor) or x.dim() < 3:
        return False
    return values.shape == (*x.shape[:2], *[1] * (x.dim() - 2)) and values.is_floating_point()


def _is_film(values: Any, p: Pending) -> bool:
    """Whether the op may take `values`: the result's dtype stays the norm's."""
    dtype = _dtype_of_norm(p.x)
    return _is_per_channel(values, p.x) and torch.promote_types(values.dtype, dtype) == dtype


def _dtype_of_norm(x: Tensor) -> torch.dtype:
    """CUDA's autocast runs group_norm in float32, the CPU's as it comes."""
    half = x.dtype in (torch.float16, torch.bfloat16)
    return torch.float32 if half and x.is_cuda and torch.is_autocast_enabled("cuda") else x.dtype


def _fits(norm: nn.GroupNorm, x: Any) -> bool:
    """Whether the op gives what the module gives: also, whether the module would raise nothing."""
    if not isinstance(x, Tensor) or x.dtype not in _FLOATING or x.dim() < 2:
        return False
    if x.shape[1] != norm.num_channels or x.numel() <= norm.num_groups:
        return False
    weight = norm.weight
    if upcasts(norm):  # float64 would be computed in float32
        return x.dtype != torch.float64 and (weight is None or weight.dtype == torch.float32)
    if weight is None or weight.dtype in (x.dtype, _dtype_of_norm(x)):
        return True
    return weight.dtype == torch.float32 and not x.is_cuda
