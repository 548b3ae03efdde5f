"""The forward process in one pass:

    x_t = table[t, 0] x0 + table[t, 1] noise

x0, noise, x_t (B, ...) float32, bfloat16 or float16, all in x0's layout (contiguous or channels_last);
computed in float32, rounded once. With s bytes an element: 2 s read and s written with the noise given; s
read and 2 s written with the noise drawn, which is rounded before it is used, so that both give the same x_t.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...reference import STREAM_TRAINING, memory_format
from .philox import normal
from .tile import cut, locate, offsets, rounded, spread, stride


@triton.jit
def _weights(table_ptr, t_ptr, t_stride, rows, sample):
    t = tl.load(t_ptr + sample * t_stride)
    inside = (t >= 0) & (t < rows)  # else the sample is NaN, and nothing is read out of bounds
    x0_weight = tl.load(table_ptr + 2 * t, mask=inside, other=float("nan"))
    noise_weight = tl.load(table_ptr + 2 * t + 1, mask=inside, other=float("nan"))
    return x0_weight, noise_weight


@triton.jit
def _q_sample_kernel(x_t_ptr, x0_ptr, noise_ptr, t_ptr, table_ptr, n, rows, t_stride, BLOCK: tl.constexpr):
    sample, start = locate(n, BLOCK)
    x0_weight, noise_weight = _weights(table_ptr, t_ptr, t_stride, rows, sample)
    base = sample * n + start
    k = tl.arange(0, BLOCK)
    mask = k < n - start
    x0 = tl.load(x0_ptr + base + k, mask=mask).to(tl.float32)
    noise = tl.load(noise_ptr + base + k, mask=mask).to(tl.float32)
    x_t = tl.fma(x0_weight, x0, noise_weight * noise)  # spelled out: both kernels round alike
    tl.store(x_t_ptr + base + k, rounded(x_t, x_t_ptr.dtype.element_ty), mask=mask)


def q_sample(x0: Tensor, noise: Tensor, t: Tensor, table: Tensor) -> Tensor:
    layout = memory_format(x0)
    x0, noise = x0.contiguous(memory_format=layout), noise.contiguous(memory_format=layout)
    x_t = torch.empty_like(x0)
    if x0.numel() == 0:
        return x_t
    n, grid, options = cut(x0)
    table = table.contiguous()
    with torch.cuda.device_of(x0):
        _q_sample_kernel[grid](x_t, x0, noise, t, table, n, table.shape[0], stride(t), **options)
    return x_t


@triton.jit
def _q_sample_counter_kernel(
    x_t_ptr,
    noise_ptr,
    x0_ptr,
    t_ptr,
    table_ptr,
    seed_ptr,
    image_ptr,
    n,
    rows,
    t_stride,
    seed_stride,
    image_stride,
    pixels,
    channels,
    STREAM: tl.constexpr,
    SPREAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample, start = locate(n, BLOCK)
    x0_weight, noise_weight = _weights(table_ptr, t_ptr, t_stride, rows, sample)
    seed = tl.load(seed_ptr + sample * seed_stride)
    image = tl.load(image_ptr + sample * image_stride)
    # Noise counts in NCHW order whatever the layout: in NHWC it is the accesses that are spread.
    where = offsets(start, pixels, channels, BLOCK, SPREAD)
    x0_ptr, noise_ptr, x_t_ptr = x0_ptr + sample * n, noise_ptr + sample * n, x_t_ptr + sample * n
    mask = tl.arange(0, BLOCK) < n - start
    x0 = tl.load(x0_ptr + where, mask=mask).to(tl.float32)
    dtype: tl.constexpr = x_t_ptr.dtype.element_ty
    stream_step = tl.full([], STREAM << 28, tl.int64)
    WIDE: tl.constexpr = dtype != tl.float32 and not SPREAD
    noise = rounded(normal(seed, image, stream_step, start, BLOCK, WIDE), dtype)
    x_t = tl.fma(x0_weight, x0, noise_weight * noise.to(tl.float32))
    tl.store(noise_ptr + where, noise, mask=mask)
    tl.store(x_t_ptr + where, rounded(x_t, dtype), mask=mask)


def q_sample_counter(
    x0: Tensor, t: Tensor, table: Tensor, seed: Tensor, image_index: Tensor
) -> tuple[Tensor, Tensor]:
    x0 = x0.contiguous(memory_format=memory_format(x0))
    x_t, noise = torch.empty_like(x0), torch.empty_like(x0)
    if x0.numel() == 0:
        return x_t, noise
    n, grid, options = cut(x0)
    table = table.contiguous()
    with torch.cuda.device_of(x0):
        _q_sample_counter_kernel[grid](
            x_t,
            noise,
            x0,
            t,
            table,
            seed,
            image_index,
            n,
            table.shape[0],
            stride(t),
            stride(seed),
            stride(image_index),
            *spread(x0),
            STREAM=STREAM_TRAINING,
            SPREAD=not x0.is_contiguous(),
            **options,
        )
    return x_t, noise
