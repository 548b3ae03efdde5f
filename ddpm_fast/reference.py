"""Plain PyTorch, one function per op: what the kernels must equal, and what runs where there is no kernel.

Every function computes in float32 (float64 for float64 inputs), rounds once at the end, and takes tables,
tensors and numbers only.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

STREAM_X_T, STREAM_STEP, STREAM_TRAINING, STREAM_DROPOUT = 0, 1, 2, 3
"""What a counter noise is for; the top four bits of the second counter word."""


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64; every other floating dtype is computed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def per_sample(values: Tensor, x: Tensor) -> Tensor:
    """Reshape a 0-d or ``(B,)`` tensor so that it broadcasts over the samples of ``x`` ``(B, ...)``."""
    return values.reshape(-1, *[1] * (x.dim() - 1))


def rows(table: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows at a 0-d or ``(B,)`` index, ``(1 or B, columns)``; indexing would read a 0-d one on the host."""
    return table.to(dtype).index_select(0, index.reshape(-1))


def q_sample(x0: Tensor, noise: Tensor, t: Tensor, table: Tensor) -> Tensor:
    """``x_t = sqrt(alphas_cumprod[t]) x0 + sqrt(1 - alphas_cumprod[t]) noise`` (Ho et al. 2020, eq. 4)."""
    dtype = compute_dtype(x0.dtype)
    weights = rows(table, t, dtype)
    x0_weight, noise_weight = (per_sample(weights[..., k], x0) for k in range(2))
    return (x0_weight * x0.to(dtype) + noise_weight * noise.to(dtype)).to(x0.dtype)


def q_sample_counter(
    x0: Tensor, t: Tensor, table: Tensor, seed: Tensor, image_index: Tensor
) -> tuple[Tensor, Tensor]:
    """`q_sample` with the counter noise of the training stream, step 0; returns ``(x_t, noise)``."""
    step = torch.zeros((), dtype=torch.int64, device=x0.device)
    noise = counter_normal(x0.shape, seed, image_index, step, STREAM_TRAINING).to(x0.dtype)
    return q_sample(x0, noise, t, table), noise


def posterior_step(
    x: Tensor,
    out: Tensor,
    table: Tensor,
    i: Tensor,
    *,
    noise: Tensor | None = None,
    seed: Tensor | None = None,
    image_index: Tensor | None = None,
    x0_prev: Tensor | None = None,
    clip: float | Tensor | None = 1.0,
) -> tuple[Tensor, Tensor]:
    """One row of a sampler's table, ``(x_next, x0)``::

        x0     = clip(x0_from_x x + x0_from_out out)
        x_next = x_from_x0 x0 + x_from_x x + x_from_out out + x_from_x0_prev x0_prev + x_from_noise noise

    With a learned range (nine columns, Nichol & Dhariwal 2021, eq. 15) the second half of ``out``'s channels
    interpolates the log-variance, and the noise is scaled by its square root too. In ``x_next``, an ``out``,
    ``x0_prev`` or ``noise`` whose coefficient is zero is not used, so it may hold anything; one that is
    needed and missing gives NaN.
    """
    dtype = compute_dtype(x.dtype)
    row = rows(table, i, dtype)
    p, q, a, b, c, d, s = (per_sample(row[..., k], x) for k in range(7))
    if out.shape[1] == 2 * x.shape[1]:
        out, v = out.chunk(2, dim=1)
        if table.shape[1] == 9:
            min_log, max_log = (per_sample(row[..., k], x) for k in (7, 8))
            frac = (v.to(dtype) + 1) / 2
            scale = torch.exp(0.5 * (frac * max_log + (1 - frac) * min_log))
            s = torch.where(s != 0, s * scale, 0.0)
    if seed is not None and noise is None:
        noise = counter_normal(x.shape, seed, image_index, i, STREAM_STEP)

    x_, out_ = x.to(dtype), out.to(dtype)
    x0 = p * x_ + q * out_
    if clip is not None:
        bound = per_sample(clip.to(dtype), x) if isinstance(clip, Tensor) else clip
        x0 = x0.clamp(-bound, bound)
    x_next = a * x0 + b * x_
    for weight, operand in ((c, out_), (d, x0_prev), (s, noise)):
        term = math.nan if operand is None else weight * operand.to(dtype)
        x_next = x_next + torch.where(weight != 0, term, 0.0)
    return x_next.to(x.dtype), x0.to(x.dtype)


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
    """``silu((1 + scale) (weight norm(x + add) + bias) + shift)``, statistics over each group of channels
    (Wu & He 2018, eq. 1-7; FiLM as in Dhariwal & Nichol 2021, section 3)."""
    dtype = compute_dtype(x.dtype)

    def per_channel(values: Tensor) -> Tensor:  # (C,) or (B, C) -> (1 or B, C, 1, ...)
        return values.to(dtype).reshape(-1, x.shape[1], *[1] * (x.dim() - 2))

    h = x.to(dtype)
    if add is not None:
        h = h + per_channel(add)
    grouped = h.reshape(x.shape[0], num_groups, -1)
    variance, mean = torch.var_mean(grouped, dim=-1, correction=0, keepdim=True)
    h = ((grouped - mean) * torch.rsqrt(variance + eps)).reshape(x.shape)
    if weight is not None:
        h = h * per_channel(weight)
    if bias is not None:
        h = h + per_channel(bias)
    if scale is not None:
        h = h * (1 + per_channel(scale))
    if shift is not None:
        h = h + per_channel(shift)
    if act == "silu":
        h = torch.nn.functional.silu(h)
    return h.to(x.dtype).contiguous(memory_format=memory_format(x))


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
) -> Tensor | tuple[Tensor, Tensor]:
    """`group_norm_silu` of ``[x, skip]``, concatenated by channels in x's layout; and that, if asked for."""
    both = torch.cat([x, skip], 1).contiguous(memory_format=memory_format(x))
    y = group_norm_silu(both, num_groups, weight, bias, eps, add=add, scale=scale, shift=shift, act=act)
    y = y.contiguous(memory_format=memory_format(x))  # with one pixel, say, both layouts are the same
    return (y, both) if concat else y


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, plus: Tensor | None = None) -> Tensor:
    """3x3 convolution, stride 1, padded with zeros by 1, plus ``plus``, in x's layout."""
    dtype = compute_dtype(x.dtype)
    y = torch.nn.functional.conv2d(
        x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), padding=1
    )
    if plus is not None:
        y = y + plus.to(dtype)
    return y.to(x.dtype).contiguous(memory_format=memory_format(x))


def attention(qkv: Tensor, heads: int) -> Tensor:
    """``softmax(q k^T / sqrt(d)) v`` of each head: (B, N, 3 C), q of all heads, k, v, -> (B, N, C)."""
    q, k, v = qkv.to(compute_dtype(qkv.dtype)).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(2, 3) / math.sqrt(q.shape[3])).softmax(3)
    return (weights @ v).transpose(1, 2).flatten(2).to(qkv.dtype)


def dropout(x: Tensor, seed: Tensor, threshold: int) -> Tensor:
    """Each element dropped, or kept and divided by ``1 - threshold / 2^16`` (Srivastava et al. 2014).

    Element ``e``, in the order of memory, is kept where 16 bits are at least ``threshold``: of Philox4x32-10
    at the counter ``(e // 8, 3 << 28, 0, 0)`` word ``e % 4``, the low half for ``e % 8 < 4``, else the high.
    """
    mask, layout, seed = 0xFFFFFFFF, memory_format(x), seed.reshape(())
    counter = torch.zeros((x.numel() + 7) // 8, 4, dtype=torch.int64, device=x.device)
    counter[:, 0] = torch.arange(len(counter), device=x.device)
    counter[:, 1] = STREAM_DROPOUT << 28
    words = philox4x32_10(counter, torch.stack([seed & mask, (seed >> 32) & mask]).expand(len(counter), 2))
    bits = torch.stack([words & 0xFFFF, words >> 16], dim=1).flatten()[: x.numel()]
    kept = torch.empty_like(x, dtype=torch.bool, memory_format=layout)
    in_memory = kept.permute(0, 2, 3, 1) if layout == torch.channels_last else kept
    in_memory.copy_((bits >= threshold).reshape(in_memory.shape))
    dtype = compute_dtype(x.dtype)
    y = x.to(dtype) * kept / (1 - threshold / 65536)
    return y.to(x.dtype).contiguous(memory_format=layout)


def memory_format(x: Tensor) -> torch.memory_format:
    """The layout an op keeps: channels_last for a 4-d tensor that is so and nothing else, else contiguous."""
    if x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def philox4x32_10(counter: Tensor, key: Tensor) -> Tensor:
    """Philox4x32 with 10 rounds (Salmon et al. 2011, section 3.3), uint32 words held in int64.

    ``counter`` (..., 4), ``key`` (..., 2) -> (..., 4).
    """
    mask = 0xFFFFFFFF
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key.unbind(-1)
    for _ in range(10):
        hi0, lo0 = _mul_hi_lo(0xD2511F53, c0)
        hi1, lo1 = _mul_hi_lo(0xCD9E8D57, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return torch.stack(torch.broadcast_tensors(c0, c1, c2, c3), dim=-1)


def _mul_hi_lo(constant: int, words: Tensor) -> tuple[Tensor, Tensor]:
    """The 64-bit product's two 32-bit words, from 16-bit halves since int64 would overflow its sign."""
    low = (words & 0xFFFF) * constant
    high = (words >> 16) * constant + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def counter_normal(
    shape: tuple[int, ...], seed: Tensor, image_index: Tensor, step: Tensor, stream: int = STREAM_STEP
) -> Tensor:
    """Standard normal noise that depends only on (seed, image index, stream, step, element), float32.

    Element ``e`` of an image, in NCHW order, is lane ``e % 4`` of Philox4x32-10 at the counter
    ``(e // 4, stream << 28 | step, image index low, image index high)`` under the 64-bit seed, through
    ``u = (r + 0.5) 2^-32`` in float32 and Box-Muller on lanes (0, 1) and (2, 3), cosine first. The
    transcendental stage runs in float64 here: the kernels' float32 is within 1e-6 of it.
    """
    batch, elements = shape[0], math.prod(shape[1:])
    mask, device = 0xFFFFFFFF, image_index.device
    quad = torch.arange((elements + 3) // 4, device=device)
    seed, image_index, step = (v.reshape(-1, 1) for v in (seed, image_index, step))
    counter = torch.broadcast_tensors(
        quad, stream << 28 | step, image_index & mask, (image_index >> 32) & mask, seed
    )
    key = torch.stack([seed & mask, (seed >> 32) & mask], dim=-1)
    r = philox4x32_10(torch.stack(counter[:4], dim=-1), key)
    u = ((r.to(torch.float32) + 0.5) * 2.0**-32).to(torch.float64)
    radius = torch.sqrt(-2 * torch.log(u[..., 0::2]))
    angle = 2 * math.pi * u[..., 1::2]
    normal = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1).to(torch.float32)
    normal = normal.reshape(normal.shape[0], quad.shape[0] * 4)[:, :elements]
    return normal.expand(batch, -1).reshape(shape).contiguous()


def sample(
    model: Callable[[Tensor, Tensor], Tensor],
    x_T: Tensor,
    timesteps: Tensor,
    table: Tensor,
    *,
    seed: Tensor,
    image_index: Tensor,
    clip: float | Tensor | None = 1.0,
) -> Tensor:
    """The naive loop (Ho et al. 2020, algorithm 2, over the rows of a table): what `Sampler` must equal."""
    x, x0 = x_T, None
    for i, t in enumerate(timesteps):
        x, x0 = posterior_step(
            x,
            model(x, t.expand(x.shape[0])),
            table,
            torch.tensor(i, device=x.device),
            seed=seed,
            image_index=image_index,
            x0_prev=x0,
            clip=clip,
        )
    return x
