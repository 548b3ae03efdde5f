"""The gradient of `group_norm_silu` to x, weight, bias, add, scale and shift.

With n = (x + add - mean) rstd, gain = (1 + scale) weight, y as in the forward and g = grad act'(y):

    grad_x = rstd (gain g - E[gain g] - n E[gain g n]), E over a group;  grad_add = sum over pixels of grad_x
    A = sum of g, N = sum of g n, over pixels:  grad_shift = A,  grad_scale = weight N + bias A,
    grad_bias = sum over samples of (1 + scale) A,  grad_weight = sum over samples of (1 + scale) N

Nothing but the inputs was kept: the statistics are taken anew. All but grad_x follows from A and N, sums by
(sample, channel); those over samples are torch's, of float32, in one order. float32 arithmetic.

resident    x and grad stay in registers: one launch, two reads and a write (6 bytes an element in bfloat16).
split       larger: the forward's statistics, `sums` (A and N by chunk, each in a slot of its own), `spread`
            (merges the slots into what `apply` needs), `apply`. Five reads and a write, same bits every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import reference
from .group_norm_silu import (
    Shape,
    Tile,
    affine,
    finish_tile,
    given,
    group_mean,
    in_layout,
    moments,
    place,
    resident_tile,
    split_statistics,
    split_tile,
    statistics,
    with_strides,
)
from .tile import rounded


@triton.jit
def before_activation(grad, y, SILU: tl.constexpr):
    """grad act'(y); sigmoid(y) and 1 - sigmoid(y) each to its own last digits, whatever the sign of y."""
    if SILU:
        small = tl.exp(-tl.abs(y))
        large = 1 / (1 + small)
        small *= large
        gate, rest = tl.where(y < 0, small, large), tl.where(y < 0, large, small)
        grad = grad * gate * (1 + y * rest)
    return grad


@triton.jit
def put(target, at, values, valid):
    """Store where the gradient is asked for."""
    if target is not None:
        tl.store(target + at, rounded(values, target.dtype.element_ty), mask=valid)


@triton.jit
def through_norm(
    a, b, h, rstd, gain, pixels, GROUP: tl.constexpr, GROUPS: tl.constexpr, BLOCK_C: tl.constexpr
):
    """From the channels' sums of g, g h and h, where h = n / rstd: N, what grad_x = p g + q h + r is made of,
    and grad_add."""
    n = rstd * b
    mean1 = group_mean(gain * a, GROUP, GROUPS, BLOCK_C) / pixels
    mean2 = group_mean(gain * n, GROUP, GROUPS, BLOCK_C) / pixels
    p, q, r = rstd * gain, -rstd * rstd * mean2, -rstd * mean1
    return n, p, q, r, p * a + q * h + r * pixels


@triton.jit
def put_parameters(
    weight, bias, scale, grad_weight, grad_bias, grad_add, grad_scale, grad_shift, a, n, added, at, c,
    scale_at, valid,
):  # fmt: skip
    film = 1 + given(scale, scale_at, valid, 0.0)
    put(grad_weight, at, film * n, valid)
    put(grad_bias, at, film * a, valid)
    put(grad_add, at, added, valid)
    put(grad_scale, at, given(weight, c, valid, 1.0) * n + given(bias, c, valid, 0.0) * a, valid)
    put(grad_shift, at, a, valid)


# ---- one launch ----


@triton.jit
def resident_backward_kernel(
    grad, x, grad_x, grad_weight, grad_bias, grad_add, grad_scale, grad_shift,
    weight, bias, add, scale, shift, add_stride, scale_stride, shift_stride, eps,
    C: tl.constexpr, PIXELS: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, LAST: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    TILES: tl.constexpr = (C + GROUPS * GROUP - 1) // (GROUPS * GROUP)
    sample, first = (tl.program_id(0) // TILES).to(tl.int64), tl.program_id(0) % TILES * (GROUPS * GROUP)
    c = first + tl.arange(0, BLOCK_C)
    valid = (tl.arange(0, BLOCK_C) < GROUPS * GROUP) & (c < C)
    inside = valid[:, None] & (tl.arange(0, BLOCK_P) < PIXELS)[None, :]
    offsets = place(PIXELS, C, BLOCK_C, BLOCK_P, LAST)
    start = sample * (C * PIXELS) + (first if LAST else first.to(tl.int64) * PIXELS)

    values = tl.load(x + start + offsets, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad + start + offsets, mask=inside, other=0.0).to(tl.float32)
    scale_at, shift_at = sample * scale_stride + c, sample * shift_stride + c
    gain, offset = affine(weight, bias, scale, shift, scale_at, shift_at, c, valid)
    added = given(add, sample * add_stride + c, valid, 0.0)
    values, mean, s1, s2 = moments(values, inside, PIXELS)
    lift, rstd = statistics(mean, s1, s2, added, PIXELS, eps, GROUP, GROUPS, BLOCK_C)

    y = values * (rstd * gain)[:, None] + (offset + lift * rstd * gain)[:, None]
    g = before_activation(g, y, SILU)
    values += lift[:, None]
    a, b, h = tl.sum(g, 1), tl.sum(g * values, 1), s1 + lift * PIXELS
    n, p, q, r, added = through_norm(a, b, h, rstd, gain, PIXELS, GROUP, GROUPS, BLOCK_C)
    g = g * p[:, None] + values * q[:, None] + r[:, None]
    tl.store(grad_x + start + offsets, rounded(g, grad_x.dtype.element_ty), mask=inside)
    put_parameters(
        weight, bias, scale, grad_weight, grad_bias, grad_add, grad_scale, grad_shift, a, n, added,
        sample * C + c, c, scale_at, valid,
    )  # fmt: skip


# ---- split ----


@triton.jit
def sums_kernel(
    grad, x, coefficients, sums, pixels, row_stride, slot_stride,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, LAST: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """sums (3, B, chunks, C): of g, of g h and of h."""
    TILES: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    sample, first_c = (tl.program_id(0) // TILES).to(tl.int64), tl.program_id(0) % TILES * BLOCK_C
    chunk, chunks = tl.program_id(1), tl.num_programs(1)
    first_p = chunk.to(tl.int64) * BLOCK_P
    c = first_c + tl.arange(0, BLOCK_C)
    inside = (c < C)[:, None] & (first_p + tl.arange(0, BLOCK_P) < pixels)[None, :]
    offsets = place(pixels, C, BLOCK_C, BLOCK_P, LAST)
    start = sample * C * pixels + (first_p * C + first_c if LAST else first_c.to(tl.int64) * pixels + first_p)

    values = tl.load(x + start + offsets, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad + start + offsets, mask=inside, other=0.0).to(tl.float32)
    row = coefficients + sample * C + c
    mean = tl.load(row, mask=c < C, other=0.0)
    gain = tl.load(row + row_stride, mask=c < C, other=0.0)
    offset = tl.load(row + 2 * row_stride, mask=c < C, other=0.0)
    lift = tl.load(row + 3 * row_stride, mask=c < C, other=0.0)
    values = tl.where(inside, values - mean[:, None], 0.0)
    g = before_activation(g, values * gain[:, None] + offset[:, None], SILU)
    values = tl.where(inside, values + lift[:, None], 0.0)
    slot = sums + (sample * chunks + chunk) * C + c
    tl.store(slot, tl.sum(g, 1), mask=c < C)
    tl.store(slot + slot_stride, tl.sum(g * values, 1), mask=c < C)
    tl.store(slot + 2 * slot_stride, tl.sum(values, 1), mask=c < C)


@triton.jit
def spread_kernel(
    sums, coefficients, grad_weight, grad_bias, grad_add, grad_scale, grad_shift,
    weight, bias, scale, scale_stride,
    pixels, chunks, slot_stride, row_stride,
    C: tl.constexpr, GROUP: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows 5, 6, 7 of the coefficients (8, B, C): p, q and r. One group a program."""
    GROUPS: tl.constexpr = C // GROUP
    sample, first = (tl.program_id(0) // GROUPS).to(tl.int64), tl.program_id(0) % GROUPS * GROUP
    c = first + tl.arange(0, BLOCK_C)
    valid = tl.arange(0, BLOCK_C) < GROUP
    k = tl.arange(0, BLOCK_K)
    slots = sums + sample * chunks * C + c[:, None] + k.to(tl.int64)[None, :] * C
    a = tl.zeros((BLOCK_C, BLOCK_K), tl.float32)
    b = tl.zeros((BLOCK_C, BLOCK_K), tl.float32)
    h = tl.zeros((BLOCK_C, BLOCK_K), tl.float32)
    for begin in range(0, chunks, BLOCK_K):
        inside = valid[:, None] & (begin + k < chunks)[None, :]
        slot = slots + begin * C
        a += tl.load(slot, mask=inside, other=0.0)
        b += tl.load(slot + slot_stride, mask=inside, other=0.0)
        h += tl.load(slot + 2 * slot_stride, mask=inside, other=0.0)
    a, b, h = tl.sum(a, 1), tl.sum(b, 1), tl.sum(h, 1)

    row = coefficients + sample * C + c
    rstd = tl.load(row + 4 * row_stride, mask=valid, other=0.0)
    scale_at = sample * scale_stride + c
    gain = given(weight, c, valid, 1.0) * (1 + given(scale, scale_at, valid, 0.0))
    n, p, q, r, added = through_norm(a, b, h, rstd, gain, pixels, GROUP, 1, BLOCK_C)
    tl.store(row + 5 * row_stride, p, mask=valid)
    tl.store(row + 6 * row_stride, q, mask=valid)
    tl.store(row + 7 * row_stride, r, mask=valid)
    put_parameters(
        weight, bias, scale, grad_weight, grad_bias, grad_add, grad_scale, grad_shift, a, n, added,
        sample * C + c, c, scale_at, valid,
    )  # fmt: skip


@triton.jit
def apply_backward_kernel(
    grad, x, grad_x, coefficients, pixels, row_stride,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, LAST: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    TILES: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    sample, first_c = (tl.program_id(0) // TILES).to(tl.int64), tl.program_id(0) % TILES * BLOCK_C
    first_p = tl.program_id(1).to(tl.int64) * BLOCK_P
    c = first_c + tl.arange(0, BLOCK_C)
    inside = (c < C)[:, None] & (first_p + tl.arange(0, BLOCK_P) < pixels)[None, :]
    offsets = place(pixels, C, BLOCK_C, BLOCK_P, LAST)
    start = sample * C * pixels + (first_p * C + first_c if LAST else first_c.to(tl.int64) * pixels + first_p)

    values = tl.load(x + start + offsets, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad + start + offsets, mask=inside, other=0.0).to(tl.float32)
    row = coefficients + sample * C + c
    mean = tl.load(row, mask=c < C, other=0.0)
    gain = tl.load(row + row_stride, mask=c < C, other=0.0)
    offset = tl.load(row + 2 * row_stride, mask=c < C, other=0.0)
    lift = tl.load(row + 3 * row_stride, mask=c < C, other=0.0)
    p = tl.load(row + 5 * row_stride, mask=c < C, other=0.0)
    q = tl.load(row + 6 * row_stride, mask=c < C, other=0.0)
    r = tl.load(row + 7 * row_stride, mask=c < C, other=0.0)
    values -= mean[:, None]
    g = before_activation(g, values * gain[:, None] + offset[:, None], SILU)
    values += lift[:, None]
    g = g * p[:, None] + values * q[:, None] + r[:, None]
    tl.store(grad_x + start + offsets, rounded(g, grad_x.dtype.element_ty), mask=inside)


# ---- launcher ----


def resident_launch(tile: Tile, shape: Shape) -> dict[str, int | bool]:
    """With two values an element, 32 elements a thread in a large tile too: 64 spill on sm_100.

    But not where the 16 bytes that a thread reads are of eight channels: what it keeps for each of those does
    not grow less with more warps, and their registers do.
    """
    launch = tile.launch(products=True)
    if not (shape.channels_last and shape.itemsize == 2):
        launch["num_warps"] = max(tile.warps, tile.elements // 1024)
    return launch


def group_norm_silu_backward(
    grad: Tensor,
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    add: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, shape = in_layout(x, num_groups)
    layout = reference.memory_format(x)
    grad, grad_x = grad.contiguous(memory_format=layout), torch.empty_like(x, memory_format=layout)
    batch, channels = x.shape[:2]

    def by_sample(like: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
        return None if like is None else x.new_empty((batch, channels), dtype=dtype or like.dtype)

    rows = [by_sample(v, torch.float32) for v in (weight, bias)] + [by_sample(v) for v in (add, scale, shift)]
    operands = with_strides(weight, bias, add, scale, shift)
    with torch.cuda.device_of(x):
        tile = resident_tile(shape, best=8192, most=16384)
        if tile is not None:
            resident_backward_kernel[(batch * triton.cdiv(num_groups, tile.groups),)](
                grad, x, grad_x, *rows, *operands, eps, channels, shape.pixels, shape.group, tile.groups,
                tile.block_c, tile.block_p, shape.channels_last, silu, **resident_launch(tile, shape),
            )  # fmt: skip
        else:
            _split(grad, x, grad_x, rows, operands, eps, shape, silu)

    for k, v in enumerate((weight, bias)):
        rows[k] = None if v is None else rows[k].sum(0).to(v.dtype)
    return grad_x, *(x.new_empty(0) if row is None else row for row in rows)


def _split(grad, x, grad_x, rows, operands, eps, shape, silu) -> None:
    tile = split_tile(shape)
    chunks = triton.cdiv(shape.pixels, tile.block_p)
    finish = finish_tile(shape, chunks)
    grid = (shape.batch * triton.cdiv(shape.channels, tile.block_c), chunks)
    in_tile = (shape.channels, tile.block_c, tile.block_p, shape.channels_last, silu)
    coefficients = split_statistics(x, shape, operands, eps)
    weight, bias, _, scale, _, _, scale_stride, _ = operands
    sums = x.new_empty((3, shape.batch, chunks, shape.channels), dtype=torch.float32)
    row_stride, slot_stride = coefficients.stride(0), sums.stride(0)
    sums_kernel[grid](
        grad, x, coefficients, sums, shape.pixels, row_stride, slot_stride, *in_tile,
        **tile.launch(products=True),
    )  # fmt: skip
    spread_kernel[(shape.batch * shape.groups,)](
        sums, coefficients, *rows, weight, bias, scale, scale_stride, shape.pixels, chunks, slot_stride,
        row_stride, shape.channels, shape.group, finish.block_c, finish.block_p,
        **finish.launch(products=True),
    )  # fmt: skip
    apply_backward_kernel[grid](
        grad, x, grad_x, coefficients, shape.pixels, row_stride, *in_tile, num_warps=tile.warps
    )
