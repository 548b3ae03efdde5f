"""A linear layer on the CPU, with its weight laid out once: past BLAS on processors with AMX."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import check_floating, describe
from ._dispatch import LIBRARY, choose
from ._packed import check_packed_call, on_a_huge_page


class PackedLinear(NamedTuple):
    """A weight as the kernels of this processor read it: see `pack_linear`."""

    weight: Tensor  # opaque
    in_features: int
    out_features: int


def pack_linear(weight: Tensor) -> PackedLinear:
    """Lay a weight out for many calls of `linear_packed` on this processor.

    It takes the weight's memory, on AMX from 64 channels on 3/4 of it, rounded up to 64 of them; C_out is
    rounded up to 32. Of a bfloat16 weight it takes what a float32 one would without AMX, there from 32
    channels on its own memory, rounded up to 32 of them.

    Args:
        weight: ``(C_out, C_in)`` float32 or bfloat16 on the CPU. A later change of it does not show.

    Raises:
        TypeError, ValueError: an argument of a wrong kind, dtype, shape or device.
        RuntimeError: the native kernels are not there.
    """
    check_floating("weight", weight, 2)
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"weight must be (C_out, C_in) and not empty, got {describe(weight)}")
    choose("linear", "native", weight)
    out_features, in_features = weight.shape
    size = torch.ops.ddpm_fast.linear_packed_size.default(in_features, out_features, weight.dtype)
    packed = on_a_huge_page(size, weight.dtype)
    torch.ops.ddpm_fast.linear_pack.default(weight.detach(), packed)
    return PackedLinear(packed, in_features, out_features)


def linear_packed(
    x: Tensor, packed: PackedLinear, bias: Tensor | None = None, *, plus: Tensor | None = None
) -> Tensor:
    """``torch.nn.functional.linear(x, weight, bias) + plus``. Not differentiable.

    Errs by 0.2-0.3e-6 relative to float64 in the 2-norm; of bfloat16, summed in float32, by 1.7e-3. An
    infinity or NaN in x shows in its row; of float32 on AMX the whole row is NaN (see `conv3x3`).

    Args:
        x: ``(..., C_in)`` float32 or bfloat16 on the CPU.
        packed: of a weight ``(C_out, C_in)`` in ``x``'s dtype.
        bias: ``(C_out,)``, like ``x``.
        plus: ``(..., C_out)``, like ``x``.

    Returns:
        ``(..., C_out)``, contiguous. A row is the same to the bit among any others.

    Raises:
        TypeError, ValueError: an argument of a wrong kind, dtype, shape or device.
        RuntimeError: the native kernels are not there.
    """
    check_floating("x", x, 2)
    if not isinstance(packed, PackedLinear):
        raise TypeError(f"packed must be what pack_linear returned, got {type(packed).__name__}")
    if x.dim() < 2 or 0 in x.shape or x.shape[-1] != packed.in_features:
        raise ValueError(
            f"x must be (..., {packed.in_features}) for such a weight and not empty, got {describe(x)}"
        )
    choose("linear", "native", x)
    shape = (*x.shape[:-1], packed.out_features)
    check_packed_call(x, {"bias": (bias, shape[-1:]), "plus": (plus, shape)}, "torch.nn.functional.linear")
    rows = x.reshape(-1, packed.in_features)
    plus = None if plus is None else plus.reshape(-1, packed.out_features)
    y = torch.ops.ddpm_fast.linear_packed.default(rows, packed.weight, bias, plus, packed.out_features)
    return y.view(shape)


def _fake(x, packed, bias, plus, out_features):
    return x.new_empty(x.shape[0], out_features)


LIBRARY.define("linear_packed_size(int in_features, int out_features, ScalarType dtype) -> int")
LIBRARY.define("linear_pack(Tensor weight, Tensor(a!) packed) -> ()")
LIBRARY.define(
    "linear_packed(Tensor x, Tensor packed, Tensor? bias, Tensor? plus, int out_features) -> Tensor"
)
torch.library.register_fake("ddpm_fast::linear_pack", lambda weight, packed: None, lib=LIBRARY)
torch.library.register_fake("ddpm_fast::linear_packed", _fake, lib=LIBRARY)
