"""`group_norm_silu` of [x, skip], by the same kernels: each element is read where it lies.

Bytes: as for one tensor, 4 an element in bfloat16, and 2 more where the concatenation is asked for.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ... import reference
from .group_norm_silu import in_layout, normalise, with_strides


def group_norm_silu_concat(
    x: Tensor,
    skip: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    add: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    concat: bool,
) -> tuple[Tensor, Tensor]:
    layout = reference.memory_format(x)
    x, of_x = in_layout(x, num_groups)
    skip = skip.contiguous(memory_format=layout)
    shape = replace(of_x, channels=x.shape[1] + skip.shape[1])

    def empty() -> Tensor:
        sizes = (x.shape[0], shape.channels, *x.shape[2:])
        return torch.empty(sizes, dtype=x.dtype, device=x.device, memory_format=layout)

    y, both = empty(), empty() if concat else None
    normalise(x, skip, y, both, shape, with_strides(weight, bias, add, scale, shift), eps, silu)
    return y, x.new_empty(0) if both is None else both
