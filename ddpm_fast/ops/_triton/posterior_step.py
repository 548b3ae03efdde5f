"""One row of a sampler's table in one pass, in place or not:

    x0     = clip(p x + q out)
    x_next = a x0 + b x + c out + d x0_prev + s noise,   s = x_from_noise exp(log_variance / 2)

x, noise, x0_prev, x_next, x0 (B, C, ...) contiguous, float32, bfloat16 or float16; out (B, C or 2C, ...) of
the same dtype or a half beside float32, contiguous or channels_last (read as it lies; other layouts are
copied). Computed in float32, rounded once. Reads x, out, and what the row uses of x0_prev, noise and the
variance (an operand whose coefficient is 0 costs no traffic); writes x_next, and x0 if asked for. With noise
drawn inside and a float32 x beside a bfloat16 out: 4 + 2 bytes read and 4 written an element.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...reference import STREAM_STEP
from .philox import normal
from .tile import cut, locate, offsets, rounded, spread, spreadable, stride


@triton.jit
def _posterior_step_kernel(
    x_next_ptr,
    x0_ptr,
    x_ptr,
    out_ptr,
    table_ptr,
    i_ptr,
    noise_ptr,
    seed_ptr,
    image_ptr,
    x0_prev_ptr,
    clip_ptr,
    n,
    out_n,
    variance,
    rows,
    i_stride,
    seed_stride,
    image_stride,
    clip_stride,
    clip,
    pixels,
    channels,
    STREAM: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPREAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample, start = locate(n, BLOCK)
    i = tl.load(i_ptr + sample * i_stride)
    inside = (i >= 0) & (i < rows)  # else the sample is NaN, and nothing is read out of bounds
    row = table_ptr + i * COLUMNS
    p = tl.load(row, mask=inside, other=float("nan"))
    q = tl.load(row + 1, mask=inside, other=float("nan"))
    a = tl.load(row + 2, mask=inside, other=float("nan"))
    b = tl.load(row + 3, mask=inside, other=float("nan"))
    c = tl.load(row + 4, mask=inside, other=float("nan"))
    d = tl.load(row + 5, mask=inside, other=float("nan"))
    s = tl.load(row + 6, mask=inside, other=float("nan"))
    if clip_ptr is not None:
        clip = tl.load(clip_ptr + sample * clip_stride)

    base = sample * n + start
    k, left = tl.arange(0, BLOCK), n - start
    mask = k < left
    x = tl.load(x_ptr + base + k, mask=mask).to(tl.float32)
    out_ptr += sample * out_n
    where = offsets(start, pixels, channels, BLOCK, SPREAD)
    out = tl.load(out_ptr + where, mask=mask).to(tl.float32)

    # Each fma is spelled out: left to the compiler, noise drawn and noise given could round differently.
    x0 = tl.fma(p, x, q * out)
    x0 = tl.maximum(x0, -clip, propagate_nan=tl.PropagateNan.ALL)
    x0 = tl.minimum(x0, clip, propagate_nan=tl.PropagateNan.ALL)
    x_next = tl.fma(a, x0, b * x)
    x_next = tl.where(c != 0, tl.fma(c, out, x_next), x_next)

    if x0_prev_ptr is not None:
        x0_prev = tl.load(x0_prev_ptr + base + k, mask=k < tl.where(d != 0, left, 0)).to(tl.float32)
    else:
        x0_prev = tl.full([BLOCK], float("nan"), tl.float32)
    x_next = tl.where(d != 0, tl.fma(d, x0_prev, x_next), x_next)

    if noise_ptr is not None:
        noise = tl.load(noise_ptr + base + k, mask=k < tl.where(s != 0, left, 0)).to(tl.float32)
    elif seed_ptr is not None:
        noise = tl.zeros([BLOCK], tl.float32)
        if s != 0:
            seed = tl.load(seed_ptr + sample * seed_stride)
            image = tl.load(image_ptr + sample * image_stride)
            WIDE: tl.constexpr = out_ptr.dtype.element_ty != tl.float32 and not SPREAD
            noise = normal(seed, image, i | (STREAM << 28), start, BLOCK, WIDE)
    else:
        noise = tl.full([BLOCK], float("nan"), tl.float32)
    if COLUMNS == 9:
        min_log = tl.load(row + 7, mask=inside, other=float("nan"))
        max_log = tl.load(row + 8, mask=inside, other=float("nan"))
        v = tl.load(out_ptr + variance + where, mask=k < tl.where(s != 0, left, 0)).to(tl.float32)
        fraction = (v + 1.0) * 0.5
        log_variance = tl.fma(fraction, max_log, (1.0 - fraction) * min_log)
        scale = s * tl.exp(0.5 * log_variance)
        x_next = tl.where(s != 0, tl.fma(scale, noise, x_next), x_next)
    else:
        x_next = tl.where(s != 0, tl.fma(s, noise, x_next), x_next)

    dtype: tl.constexpr = x_next_ptr.dtype.element_ty
    if x0_ptr is not None:
        tl.store(x0_ptr + base + k, rounded(x0, dtype), mask=mask)
    tl.store(x_next_ptr + base + k, rounded(x_next, dtype), mask=mask)


def _launch(x_next, x0_next, x, out, table, i, noise, seed, image_index, x0_prev, clip, clip_each) -> None:
    if x.numel() == 0:
        return
    if not spreadable(out):
        out = out.contiguous()
    noise, x0_prev = (v if v is None else v.contiguous() for v in (noise, x0_prev))
    table = table.contiguous()
    n, grid, options = cut(x)
    spread_out = not out.is_contiguous()
    with torch.cuda.device_of(x):
        _posterior_step_kernel[grid](
            x_next,
            x0_next,
            x,
            out,
            table,
            i,
            noise,
            seed,
            image_index,
            x0_prev,
            clip_each,
            n,
            out.numel() // x.shape[0],
            x.shape[1] if spread_out else n,  # from an element of out to its variance's
            table.shape[0],
            stride(i),
            stride(seed),
            stride(image_index),
            stride(clip_each),
            clip,
            *spread(out),
            STREAM=STREAM_STEP,
            COLUMNS=table.shape[1],
            SPREAD=spread_out,
            **options,
        )


def posterior_step(
    x: Tensor,
    out: Tensor,
    table: Tensor,
    i: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    image_index: Tensor | None,
    x0_prev: Tensor | None,
    clip: float,
    clip_each: Tensor | None,
) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    x_next, x0 = torch.empty_like(x), torch.empty_like(x)
    _launch(x_next, x0, x, out, table, i, noise, seed, image_index, x0_prev, clip, clip_each)
    return x_next, x0


def posterior_step_(
    x: Tensor,
    out: Tensor,
    table: Tensor,
    i: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    image_index: Tensor | None,
    x0: Tensor | None,
    clip: float,
    clip_each: Tensor | None,
) -> None:
    """``x`` and ``x0`` are contiguous; ``x0`` is read as the step before's, where the row uses it."""
    _launch(x, x0, x, out, table, i, noise, seed, image_index, x0, clip, clip_each)
