"""How a pointwise kernel is cut: a program takes BLOCK consecutive elements of one sample.

The grid is flat, since a CUDA grid's second axis ends at 65535 samples. Where a program starts is one 64-bit
scalar and what lies within it a 32-bit vector: offsets never overflow, and cost no 64-bit vector arithmetic.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

# 1024 is 8 elements a thread: one 128-bit access in a half type, two in float32. The interpreter's time goes
# by operations, not by elements.
BLOCK = 4096 if _INTERPRETED.value else 1024


def cut(x: Tensor) -> tuple[int, tuple[int], dict[str, int]]:
    """``(elements of a sample, grid, launch options)`` of a tensor ``(B, ...)``; from its shape only."""
    n = math.prod(x.shape[1:])
    block = min(BLOCK, max(32, triton.next_power_of_2(n)))
    return n, (x.shape[0] * triton.cdiv(n, block),), {"BLOCK": block, "num_warps": max(1, block // 256)}


def stride(values: Tensor | None) -> int:
    """Elements from a sample's value to the next: 0 where one 0-d value serves all."""
    return values.stride(0) if values is not None and values.dim() else 0


def spread(x: Tensor) -> tuple[int, int]:
    """``(pixels, channels)`` of a channels_last tensor, ``(0, 0)`` of a contiguous one."""
    return (0, 0) if x.is_contiguous() else (x.shape[2] * x.shape[3], x.shape[1])


def spreadable(x: Tensor) -> bool:
    """Whether a kernel can take x as it lies: channels_last, and small enough for 32-bit offsets."""
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and x[0].numel() < 2**31


@triton.jit
def locate(n, BLOCK: tl.constexpr):
    """This program's sample, and its first element within the sample."""
    blocks = tl.cdiv(n, BLOCK)
    sample = tl.program_id(0) // blocks
    return sample.to(tl.int64), (tl.program_id(0) - sample * blocks).to(tl.int64) * BLOCK


@triton.jit
def offsets(start, pixels, channels, BLOCK: tl.constexpr, SPREAD: tl.constexpr):
    """Where the sample's elements ``start ...``, counted in NCHW order, lie from the sample's first.

    SPREAD: in memory they are NHWC, so neighbours are ``channels`` apart. The sectors that this block leaves
    half used serve the blocks of the other channels from the L2.
    """
    k = tl.arange(0, BLOCK)
    if SPREAD:
        element = start.to(tl.int32) + k
        channel = element // pixels
        return (element - channel * pixels) * channels + channel
    else:
        return start + k


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 to ``dtype``, to the nearest, ties to even; Triton's interpreter would cut bfloat16 off."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), bits)
        return (bits >> 16).to(tl.uint16).to(dtype, bitcast=True)
    else:
        return x.to(dtype)
