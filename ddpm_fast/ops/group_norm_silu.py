"""GroupNorm and SiLU, with the time embedding before and FiLM after, in one op."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ._checks import FLOATING, check_floating, describe
from ._dispatch import choose, define, differentiable, direct, goes_direct

_direct = direct("group_norm_silu")


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    add: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    act: str = "silu",
    backend: str | None = None,
) -> Tensor:
    """Group normalisation (Wu & He 2018) with what a diffusion U-Net puts around it.

    Equivalent to::

        h = x if add is None else x + add[:, :, None, None]
        h = torch.nn.functional.group_norm(h, num_groups, weight, bias, eps)
        if scale is not None: h = h * (1 + scale[:, :, None, None])
        if shift is not None: h = h + shift[:, :, None, None]
        return torch.nn.functional.silu(h)                         # act="silu"

    with statistics in float32 whatever the dtype, about a value near the mean (no E[x^2] - E[x]^2), and one
    rounding.
    Differentiable in every tensor, in reverse mode.

    Args:
        x: ``(B, C, ...)`` float32, bfloat16, float16 or float64; contiguous or channels_last, which is kept.
        num_groups: divides C.
        weight, bias: ``(C,)``, any floating dtype.
        eps: added to the variance; at least 0.
        add: ``(B, C)``, added before the statistics: the time embedding (Ho et al. 2020).
        scale, shift: ``(B, C)``, FiLM after the affine (Dhariwal & Nichol 2021, section 3).
        act: "silu" or "none".
        backend: "native", "triton", "reference", or None for the fastest here.

    Returns:
        Like ``x``, in its layout.

    Raises:
        TypeError, ValueError: an argument of a wrong kind, dtype, shape or device.
        RuntimeError: a backend named that cannot run here.
    """
    if goes_direct(backend):
        y = _direct(x, None, num_groups, weight, bias, eps, add, scale, shift, act, False)
        if y is not None:
            return y
    check_floating("x", x, 2)
    check_norm(x, x.shape[1], "x's", num_groups, weight, bias, eps, add, scale, shift, act)
    chosen = choose("group_norm_silu", backend, x)
    run = differentiable("group_norm_silu", chosen, _reference, x, weight, bias, add, scale, shift)
    return run(x, num_groups, weight, bias, eps, add, scale, shift, act == "silu")


def check_norm(x, channels, whose, num_groups, weight, bias, eps, add, scale, shift, act) -> None:
    """Refuse what does not fit a norm of x's samples over `channels`: those of x, or more than those."""
    if not isinstance(num_groups, int) or num_groups <= 0 or channels % num_groups != 0:
        raise ValueError(f"num_groups must divide {whose} {channels} channels, got {num_groups}")
    shape, device = x.shape, x.device
    if 0 in shape:
        raise ValueError(f"x must not be empty, got shape {tuple(shape)}")
    if weight is not None:
        _check_channels("weight", weight, (channels,), device)
    if bias is not None:
        _check_channels("bias", bias, (channels,), device)
    if add is not None:
        _check_channels("add", add, (shape[0], channels), device)
    if scale is not None:
        _check_channels("scale", scale, (shape[0], channels), device)
    if shift is not None:
        _check_channels("shift", shift, (shape[0], channels), device)
    if act != "silu" and act != "none":
        raise ValueError(f"act={act!r} is not known; allowed: silu, none")
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0, got {eps}")


def _check_channels(name: str, values: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if not isinstance(values, Tensor) or values.dtype not in FLOATING:
        check_floating(name, values, 1)
    if values.shape != shape or values.device != device:
        raise ValueError(f"{name} must have shape {shape} on {device}, got {describe(values)}")


def _reference(x, num_groups, weight, bias, eps, add, scale, shift, silu):
    act = "silu" if silu else "none"
    return reference.group_norm_silu(
        x, num_groups, weight, bias, eps, add=add, scale=scale, shift=shift, act=act
    )


def _reference_backward(grad, x, num_groups, weight, bias, eps, add, scale, shift, silu):
    """Gradients to (x, weight, bias, add, scale, shift); an empty tensor for each that was not given.

    The normalised activation is recomputed rather than stored: the forward keeps its inputs only.
    """
    dtype = reference.compute_dtype(x.dtype)
    batch, channels = x.shape[:2]
    pixels = tuple(range(2, x.dim()))

    def per_channel(values: Tensor) -> Tensor:  # (C,) or (B, C) -> (1 or B, C, 1, ...)
        return values.to(dtype).reshape(-1, channels, *[1] * len(pixels))

    def sum_pixels(values: Tensor) -> Tensor:  # (B, C, ...) -> (B, C)
        return values.sum(pixels) if pixels else values

    h = x.to(dtype) if add is None else x.to(dtype) + per_channel(add)
    grouped = h.reshape(batch, num_groups, -1)
    variance, mean = torch.var_mean(grouped, dim=-1, correction=0, keepdim=True)
    rstd = torch.rsqrt(variance + eps)
    normal = ((grouped - mean) * rstd).reshape(x.shape)
    affine = normal if weight is None else normal * per_channel(weight)
    if bias is not None:
        affine = affine + per_channel(bias)
    gain = 1 if scale is None else 1 + per_channel(scale)

    grad = grad.to(dtype)
    if silu:
        y = affine * gain
        if shift is not None:
            y = y + per_channel(shift)
        gate = torch.sigmoid(y)
        grad = grad * gate * (1 + y * (1 - gate))
    grad_shift = sum_pixels(grad)
    grad_scale = sum_pixels(grad * affine)
    grad = grad * gain
    grad_bias = sum_pixels(grad).sum(0)
    grad_weight = sum_pixels(grad * normal).sum(0)
    if weight is not None:
        grad = grad * per_channel(weight)

    grad, normal = (v.reshape(batch, num_groups, -1) for v in (grad, normal))
    centered = grad - grad.mean(-1, keepdim=True) - normal * (grad * normal).mean(-1, keepdim=True)
    grad_x = (rstd * centered).reshape(x.shape)
    grad_add = sum_pixels(grad_x)

    def as_given(value: Tensor, like: Tensor | None) -> Tensor:
        return x.new_empty(0) if like is None else value.to(like.dtype)

    return (
        grad_x.to(x.dtype).contiguous(memory_format=reference.memory_format(x)),
        as_given(grad_weight, weight),
        as_given(grad_bias, bias),
        as_given(grad_add, add),
        as_given(grad_scale, scale),
        as_given(grad_shift, shift),
    )


def _fake(x, *_):
    return torch.empty_like(x, memory_format=reference.memory_format(x))


def _fake_backward(grad, x, num_groups, weight, bias, eps, add, scale, shift, silu):
    def like(value: Tensor | None) -> Tensor:
        return x.new_empty(0) if value is None else value.new_empty(value.shape)

    return _fake(x), like(weight), like(bias), like(add), like(scale), like(shift)


def _save_inputs(ctx, inputs, output) -> None:
    x, ctx.num_groups, weight, bias, ctx.eps, add, scale, shift, ctx.silu = inputs
    ctx.save_for_backward(x, weight, bias, add, scale, shift)


def _autograd(suffix: str):
    """Backward by the same backend's kernel."""

    def backward(ctx, grad):
        x, weight, bias, add, scale, shift = ctx.saved_tensors
        run = getattr(torch.ops.ddpm_fast, f"group_norm_silu_backward{suffix}")
        grads = run(grad, x, ctx.num_groups, weight, bias, ctx.eps, add, scale, shift, ctx.silu)
        given = (x, weight, bias, add, scale, shift)
        d_x, d_weight, d_bias, d_add, d_scale, d_shift = (
            None if value is None else d for value, d in zip(given, grads, strict=True)
        )
        return d_x, None, d_weight, d_bias, None, d_add, d_scale, d_shift, None

    return backward, _save_inputs


define(
    "group_norm_silu",
    "(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, Tensor? add, Tensor? scale, "
    "Tensor? shift, bool silu) -> Tensor",
    _reference,
    _fake,
    file="group_norm_silu",
    autograd=_autograd,
)
define(
    "group_norm_silu_backward",
    "(Tensor grad, Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, Tensor? add, "
    "Tensor? scale, Tensor? shift, bool silu) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _reference_backward,
    _fake_backward,
    file="group_norm_silu_backward",
)
