"""GroupNorm as four numbers a channel, for a convolution that normalises what it reads."""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import check_floating, describe
from ._dispatch import LIBRARY, choose
from .group_norm_silu import check_norm
from .group_norm_silu_concat import check_skip


def group_norm_fold(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    skip: Tensor | None = None,
    add: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """What `group_norm_silu` computes before it writes: one read of x. Not differentiable.

    Of ``center, gain, offset, reach = fold[..., None, None].unbind(1)``::

        group_norm_silu(x, ..., act="none") == (x - center) * gain + offset

    A center is a channel's mean less ``add``, as a float; what that float lacks of it is in the offset, and
    no ``|x - center|`` is above its reach.

    Args:
        x: ``(B, C1, H, W)`` float32, bfloat16 or float16 on the CPU; channels_last is read in place.
        num_groups: divides C, x's channels and skip's.
        weight, bias, eps, add, scale, shift: as in `group_norm_silu`, over C channels.
        skip: ``(B, C2, H, W)``, like ``x``: the norm is of ``torch.cat([x, skip], 1)``, which is not built.

    Returns:
        ``(B, 4, C)`` float32, for `conv3x3_packed` and `linear_packed`.

    Raises:
        TypeError, ValueError: an argument of a wrong kind, dtype, shape or device.
        RuntimeError: the native kernels are not there.
    """
    check_floating("x", x, 4)
    if x.dim() != 4:
        raise ValueError(f"x must be (B, C, H, W), got {describe(x)}")
    channels = x.shape[1]
    if skip is not None:
        check_skip(x, skip)
        channels += skip.shape[1]
    whose = "x's" if skip is None else "x and skip's"
    check_norm(x, channels, whose, num_groups, weight, bias, eps, add, scale, shift, "none")
    choose("group_norm_silu", "native", x)
    given = (x, skip, weight, bias, add, scale, shift)
    if torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in given):
        raise ValueError("an argument asks for a gradient, which a fold does not have: use group_norm_silu")
    run = torch.ops.ddpm_fast.group_norm_fold.default
    return run(x, skip, num_groups, weight, bias, eps, add, scale, shift)


def _fake(x, skip, num_groups, weight, bias, eps, add, scale, shift):
    channels = x.shape[1] + (0 if skip is None else skip.shape[1])
    return x.new_empty((x.shape[0], 4, channels), dtype=torch.float32)


LIBRARY.define(
    "group_norm_fold(Tensor x, Tensor? skip, int num_groups, Tensor? weight, Tensor? bias, float eps, "
    "Tensor? add, Tensor? scale, Tensor? shift) -> Tensor"
)
torch.library.register_fake("ddpm_fast::group_norm_fold", _fake, lib=LIBRARY)
