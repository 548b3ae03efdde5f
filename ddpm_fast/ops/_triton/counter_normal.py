"""Counter noise, and its integer stage by itself.

    out[b, e] = normal(seed[b], image_index[b], stream << 28 | step[b], e)      (`philox`)

(B, ...) float32, contiguous. Reads nothing an element and writes 4 bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .philox import normal
from .philox import philox4x32_10 as rounds
from .tile import cut, locate, stride


@triton.jit
def _counter_normal_kernel(
    out_ptr,
    seed_ptr,
    image_ptr,
    step_ptr,
    n,
    seed_stride,
    image_stride,
    step_stride,
    STREAM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample, start = locate(n, BLOCK)
    seed = tl.load(seed_ptr + sample * seed_stride)
    image = tl.load(image_ptr + sample * image_stride)
    step = tl.load(step_ptr + sample * step_stride)
    k = tl.arange(0, BLOCK)
    z = normal(seed, image, step | (STREAM << 28), start, BLOCK, False)
    tl.store(out_ptr + (sample * n + start) + k, z, mask=k < n - start)


def counter_normal(
    shape: tuple[int, ...], seed: Tensor, image_index: Tensor, step: Tensor, stream: int
) -> Tensor:
    out = torch.empty(shape, dtype=torch.float32, device=image_index.device)
    if out.numel() == 0:
        return out
    n, grid, options = cut(out)
    strides = stride(seed), stride(image_index), stride(step)
    with torch.cuda.device_of(out):
        _counter_normal_kernel[grid](out, seed, image_index, step, n, *strides, STREAM=stream, **options)
    return out


@triton.jit
def _philox4x32_10_kernel(out_ptr, counter_ptr, key_ptr, n, BLOCK: tl.constexpr):
    k = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = k < n
    counter_ptr, key_ptr, out_ptr = counter_ptr + 4 * k, key_ptr + 2 * k, out_ptr + 4 * k
    c0 = tl.load(counter_ptr, mask=mask).to(tl.uint32)
    c1 = tl.load(counter_ptr + 1, mask=mask).to(tl.uint32)
    c2 = tl.load(counter_ptr + 2, mask=mask).to(tl.uint32)
    c3 = tl.load(counter_ptr + 3, mask=mask).to(tl.uint32)
    key0 = tl.load(key_ptr, mask=mask).to(tl.uint32)
    key1 = tl.load(key_ptr + 1, mask=mask).to(tl.uint32)
    r0, r1, r2, r3 = rounds(c0, c1, c2, c3, key0, key1)
    tl.store(out_ptr, r0.to(tl.int64), mask=mask)
    tl.store(out_ptr + 1, r1.to(tl.int64), mask=mask)
    tl.store(out_ptr + 2, r2.to(tl.int64), mask=mask)
    tl.store(out_ptr + 3, r3.to(tl.int64), mask=mask)


def philox4x32_10(counter: Tensor, key: Tensor) -> Tensor:
    """uint32 words held in int64: for known-answer tests, so it is written for clarity."""
    counter, key = counter.contiguous(), key.contiguous()
    out = torch.empty_like(counter)
    n = counter.numel() // 4
    if n:
        with torch.cuda.device_of(out):
            _philox4x32_10_kernel[(triton.cdiv(n, 128),)](out, counter, key, n, BLOCK=128, num_warps=4)
    return out
