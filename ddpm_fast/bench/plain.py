"""What a user of PyTorch would write: the eager arms, and our U-Net without its fused ops."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..schedule import Schedule


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
) -> Tensor:
    """`ops.group_norm_silu` by PyTorch's own ops, one after the other."""
    h = x if add is None else x + add[:, :, None, None]
    h = F.group_norm(h, num_groups, weight, bias, eps)
    if scale is not None:
        h = h * (1 + scale[:, :, None, None])
    if shift is not None:
        h = h + shift[:, :, None, None]
    return F.silu(h) if act == "silu" else h


def group_norm_silu_concat(
    x: Tensor, skip: Tensor, *args: Any, concat: bool = False, **options: Any
) -> Tensor | tuple[Tensor, Tensor]:
    """`ops.group_norm_silu_concat`, the concatenation built first."""
    both = torch.cat([x, skip], 1)
    y = group_norm_silu(both, *args, **options)
    return (y, both) if concat else y


def q_sample(x0: Tensor, noise: Tensor, t: Tensor, table: Tensor) -> Tensor:
    """`ops.q_sample`, the table in x0's dtype."""
    weights = table[t].to(x0.dtype)
    return weights[:, 0, None, None, None] * x0 + weights[:, 1, None, None, None] * noise


def p_sample(schedule: Schedule, t: Tensor) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """OpenAI's step (Ho et al. 2020, eq. 7 and 11) at each sample's time ``t`` (B,), tables on the device.

    Returns ``step(x, out, noise) -> x_next``; a noise that is None is drawn.
    """
    names = (
        "sqrt_recip_alphas_cumprod",
        "sqrt_recipm1_alphas_cumprod",
        "posterior_mean_coef1",
        "posterior_mean_coef2",
        "posterior_log_variance_clipped",
    )
    tables = [torch.tensor(getattr(schedule, name), dtype=torch.float32, device=t.device) for name in names]

    def step(x: Tensor, out: Tensor, noise: Tensor | None) -> Tensor:
        p, q, from_x0, from_x, log_variance = (values[t][:, None, None, None] for values in tables)
        x0 = (p * x - q * out).clamp(-1, 1)
        noise = torch.randn_like(x) if noise is None else noise
        return from_x0 * x0 + from_x * x + torch.exp(0.5 * log_variance) * noise

    return step


@contextmanager
def plain_ops() -> Iterator[None]:
    """Within, the U-Net's norms are those above."""
    fused = ops.group_norm_silu, ops.group_norm_silu_concat
    ops.group_norm_silu, ops.group_norm_silu_concat = group_norm_silu, group_norm_silu_concat
    try:
        yield
    finally:
        ops.group_norm_silu, ops.group_norm_silu_concat = fused
