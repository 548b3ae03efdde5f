"""Self-attention of queries, keys and values that lie beside each other, as one linear layer makes them."""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor

from .. import reference
from ._checks import check_floating, describe
from ._dispatch import choose, define, implementation


def attention(qkv: Tensor, heads: int, *, backend: str | None = None) -> Tensor:
    """``softmax(q k^T / sqrt(d)) v`` of each head (Vaswani et al. 2017). Equivalent to::

        q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    Sums are of float32. On AMX float32's products are of int8 digits, with errors of float32's size; of
    bfloat16 the weights are rounded to it there, as PyTorch does everywhere. The native kernels have no
    gradient: where one is asked for and no backend named, the reference runs.

    Args:
        qkv: ``(B, N, 3 C)`` float32, bfloat16, float16 or float64: the queries of all heads, then the keys,
            then the values. C = heads * d.
        heads: at least 1.
        backend: "native" (float32 and bfloat16 on the CPU), "reference", or None for the fastest here.

    Returns:
        ``(B, N, C)``, contiguous. An infinity or NaN shows in all that it goes into; of float32 on AMX it is
        NaN there.

    Raises:
        TypeError, ValueError: an argument of a wrong kind, dtype, shape or device.
        RuntimeError: a backend named that cannot run here.
    """
    check_floating("qkv", qkv, 3)
    if not isinstance(heads, Integral) or isinstance(heads, bool) or heads < 1:
        raise ValueError(f"heads must be an int of at least 1, got {heads!r}")
    if qkv.dim() != 3 or 0 in qkv.shape or qkv.shape[2] % (3 * heads):
        raise ValueError(
            f"qkv must be (B, N, 3 C), not empty, with C a multiple of heads={heads}, got {describe(qkv)}"
        )
    chosen = choose("attention", backend, qkv)
    if chosen == "native" and torch.is_grad_enabled() and qkv.requires_grad:
        if backend is not None:
            raise ValueError("qkv asks for a gradient, which backend 'native' does not have")
        chosen = "reference"
    return implementation("attention", chosen, reference.attention)(qkv, heads)


define(
    "attention",
    "(Tensor qkv, int heads) -> Tensor",
    reference.attention,
    lambda qkv, heads: qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3),
    file="attention",
)
