"""Dropout whose mask is a function of a seed: none is stored, and the gradient draws it again."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ._checks import as_seed, check_floating
from ._dispatch import choose, define, differentiable


def dropout(x: Tensor, p: float, seed: int | Tensor, *, backend: str | None = None) -> Tensor:
    """Each element of ``x`` is zero with probability ``p``, else divided by ``1 - p``.

    Equivalent to, with bits by Philox4x32-10 (`reference.dropout` is the definition)::

        kept = sixteen_random_bits(seed, element) >= round(p * 65536)
        x * kept / (1 - round(p * 65536) / 65536)

    Elements are counted in the order of memory. The same seed gives the same mask on every backend.
    Differentiable, in reverse mode.

    Args:
        x: float32, bfloat16, float16 or float64; contiguous or channels_last, which is kept.
        p: in [0, 1), to a multiple of 2^-16.
        seed: 64 bits, an int or a 0-d int64 tensor.
        backend: "native", "reference", or None for the fastest here.

    Returns:
        Like ``x``, in its layout.

    Raises:
        TypeError, ValueError: an argument of a wrong kind, dtype, shape or device.
        RuntimeError: a backend named that cannot run here.
    """
    check_floating("x", x, 1)
    if not isinstance(p, (int, float)) or not 0 <= p < 1:
        raise ValueError(f"p must be a number in [0, 1), got {p!r}")
    seed = as_seed(seed, 1, x.device)
    run = differentiable("dropout", choose("dropout", backend, x), reference.dropout, x)
    return run(x, seed, min(round(65536 * p), 65535))


def _save_inputs(ctx, inputs, output) -> None:
    x, seed, ctx.threshold = inputs
    ctx.layout = reference.memory_format(x)
    ctx.save_for_backward(seed)


def _autograd(suffix: str):
    """Backward is the op itself, with the same seed."""

    def backward(ctx, grad):
        (seed,) = ctx.saved_tensors
        run = getattr(torch.ops.ddpm_fast, f"dropout{suffix or '_forward'}")
        return run(grad.contiguous(memory_format=ctx.layout), seed, ctx.threshold), None, None

    return backward, _save_inputs


define(
    "dropout",
    "(Tensor x, Tensor seed, int threshold) -> Tensor",
    reference.dropout,
    lambda x, seed, threshold: torch.empty_like(x, memory_format=reference.memory_format(x)),
    file="dropout",
    autograd=_autograd,
)
