"""GroupNorm and SiLU over a virtual concatenation: what the way up of a U-Net does with each skip."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from .. import reference
from ._checks import check_floating, describe
from ._dispatch import choose, define, differentiable, goes_direct
from .group_norm_silu import _direct, check_norm


@overload
def group_norm_silu_concat(
    x: Tensor,
    skip: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    add: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    act: str = "silu",
    concat: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...


@overload
def group_norm_silu_concat(
    x: Tensor,
    skip: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    add: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    act: str = "silu",
    concat: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


def group_norm_silu_concat(
    x: Tensor,
    skip: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    add: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    act: str = "silu",
    concat: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`group_norm_silu` of ``torch.cat([x, skip], 1)``, which is not built unless it is asked for.

    A group may straddle the border: 256 + 128 channels in 32 groups of 12, say. Differentiable in every
    tensor, in reverse mode; the backward builds the concatenation, where it is not an output.

    Args:
        x: ``(B, C1, ...)`` float32, bfloat16, float16 or float64; contiguous or channels_last.
        skip: ``(B, C2, ...)``, like ``x`` but for its channels; copied where its layout is another.
        num_groups: divides C = C1 + C2.
        weight, bias, eps, add, scale, shift, act, backend: as in :func:`group_norm_silu`, over C channels.
        concat: also return the concatenation, written in the same pass: for a convolution that reads it.

    Returns:
        ``y`` ``(B, C, ...)`` in ``x``'s dtype and layout; with ``concat`` ``(y, cat)``, cat like ``y``.

    Raises:
        TypeError, ValueError: an argument of a wrong kind, dtype, shape or device.
        RuntimeError: a backend named that cannot run here.
    """
    if goes_direct(backend) and skip is not None:
        found = _direct(x, skip, num_groups, weight, bias, eps, add, scale, shift, act, concat)
        if found is not None:
            return found
    check_floating("x", x, 2)
    check_skip(x, skip)
    channels = x.shape[1] + skip.shape[1]
    check_norm(x, channels, "x and skip's", num_groups, weight, bias, eps, add, scale, shift, act)
    chosen = choose("group_norm_silu", backend, x)
    run = differentiable(
        "group_norm_silu_concat", chosen, _reference, x, skip, weight, bias, add, scale, shift
    )
    y, both = run(x, skip, num_groups, weight, bias, eps, add, scale, shift, act == "silu", concat)
    return (y, both) if concat else y


def check_skip(x: Tensor, skip: Tensor) -> None:
    """Refuse what cannot stand beside x."""
    check_floating("skip", skip, 2)
    alike = skip.dtype == x.dtype and skip.device == x.device
    (batch, _, *pixels), (batch_skip, from_skip, *pixels_skip) = x.shape, skip.shape
    if not alike or batch_skip != batch or pixels_skip != pixels or from_skip == 0:
        raise ValueError(
            f"skip must be like x, {describe(x)}, but for its channels, at least one; got {describe(skip)}"
        )


def _reference(x, skip, num_groups, weight, bias, eps, add, scale, shift, silu, concat):
    y, both = reference.group_norm_silu_concat(
        x,
        skip,
        num_groups,
        weight,
        bias,
        eps,
        add=add,
        scale=scale,
        shift=shift,
        act="silu" if silu else "none",
        concat=True,
    )
    return y, both if concat else x.new_empty(0)


def _fake(x, skip, num_groups, weight, bias, eps, add, scale, shift, silu, concat):
    shape = (x.shape[0], x.shape[1] + skip.shape[1], *x.shape[2:])
    layout = reference.memory_format(x)

    def empty() -> Tensor:
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)

    return empty(), empty() if concat else x.new_empty(0)


def _save_inputs(ctx, inputs, output) -> None:
    x, skip, ctx.num_groups, weight, bias, ctx.eps, add, scale, shift, ctx.silu, ctx.concat = inputs
    ctx.split = x.shape[1], skip.shape[1]
    x, skip = (output[1], None) if ctx.concat else (x, skip)
    ctx.save_for_backward(x, skip, weight, bias, add, scale, shift)


def _autograd(suffix: str):
    """Backward by `group_norm_silu_backward` of the same backend, of the concatenation."""

    def backward(ctx, grad, grad_both):
        x, skip, weight, bias, add, scale, shift = ctx.saved_tensors
        both = x
        if not ctx.concat:
            both = torch.cat([x, skip], 1).contiguous(memory_format=reference.memory_format(x))
        run = getattr(torch.ops.ddpm_fast, f"group_norm_silu_backward{suffix}")
        d_both, *grads = run(grad, both, ctx.num_groups, weight, bias, ctx.eps, add, scale, shift, ctx.silu)
        d_x, d_skip = d_both.split(ctx.split, 1)
        if ctx.concat:  # sums of parts are dense
            d_x, d_skip = (a + b for a, b in zip((d_x, d_skip), grad_both.split(ctx.split, 1), strict=True))
        d_weight, d_bias, d_add, d_scale, d_shift = (
            None if value is None else d
            for value, d in zip((weight, bias, add, scale, shift), grads, strict=True)
        )
        return d_x, d_skip, None, d_weight, d_bias, None, d_add, d_scale, d_shift, None, None

    return backward, _save_inputs


define(
    "group_norm_silu_concat",
    "(Tensor x, Tensor skip, int num_groups, Tensor? weight, Tensor? bias, float eps, Tensor? add, "
    "Tensor? scale, Tensor? shift, bool silu, bool concat) -> (Tensor, Tensor)",
    _reference,
    _fake,
    file="group_norm_silu_concat",
    autograd=_autograd,
)
