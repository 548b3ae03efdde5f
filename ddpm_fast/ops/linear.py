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
    x: Tensor,
    packed: PackedLinear,
    bias: Tensor | None = None,
    *,
    plus: Tensor | None = None,
    skip: Tensor | None = None,
    norm: Tensor | None = None,
) -> Tensor:
    """``torch.nn.functional.linear(x, weight, bias) + plus``. Not differentiable.

    As `conv3x3_packed` it may read x and skip side by side, and normalise them, without a SiLU.

    Errs by 0.2-0.3e-6 relative to float64 in the 2-norm; of bfloat16, summed in float32, by 1.7e-3. An
    infinity or NaN in x shows in its row; of float32 on AMX the whole row is NaN (see `conv3x3`).

    Args:
        x: ``(..., C)`` float32 or bfloat16 on the CPU.
        packed: of a weight ``(C_out, C_in)`` in ``x``'s dtype.
        bias: ``(C_out,)``, like ``x``.
        plus: ``(..., C_out)``, like ``x``.
        skip: ``(..., C_in - C)``, like ``x``: the features after those of x. Without it C is C_in.
        norm: ``(B, 4, C_in)`` float32, of `group_norm_fold`; x's first dimension is then B.

    Returns:
        ``(..., C_out)``, contiguous. A row is the same to the bit among any others.

    Raises:
        TypeError, ValueError: an argument of a wrong kind, dtype, shape or device.
        RuntimeError: the native kernels are not there.
    """
    check_floating("x", x, 2)
    if not isinstance(packed, PackedLinear):
        raise TypeError(f"packed must be what pack_linear returned, got {type(packed).__name__}")
    rest = packed.in_features - x.shape[-1] if x.dim() else 0
    if x.dim() < 2 or 0 in x.shape or rest < 0 or (rest == 0) != (skip is None):
        raise ValueError(
            f"x must be (..., {packed.in_features}) for such a weight and not empty, or have fewer features "
            f"and a skip with the others, got {describe(x)}"
        )
    choose("linear", "native", x)
    shape = (*x.shape[:-1], packed.out_features)
    operands = {
        "bias": (bias, shape[-1:]),
        "plus": (plus, shape),
        "skip": (skip, (*x.shape[:-1], rest)),
        "norm": (norm, (x.shape[0], 4, packed.in_features)),
    }
    check_packed_call(x, operands, "torch.nn.functional.linear")
    x, skip, plus = (None if v is None else v.reshape(-1, v.shape[-1]) for v in (x, skip, plus))
    run = torch.ops.ddpm_fast.linear_packed.default
    return run(x, packed.weight, bias, plus, packed.out_features, skip, norm).view(shape)


def _fake(x, packed, bias, plus, out_features, skip=None, norm=None):
    return x.new_empty(x.shape[0], out_features)


LIBRARY.define("linear_packed_size(int in_features, int out_features, ScalarType dtype) -> int")
LIBRARY.define("linear_pack(Tensor weight, Tensor(a!) packed) -> ()")
LIBRARY.define(
    "linear_packed(Tensor x, Tensor packed, Tensor? bias, Tensor? plus, int out_features, "
    "Tensor? skip=None, Tensor? norm=None) -> Tensor"
)
torch.library.register_fake("ddpm_fast::linear_pack", lambda weight, packed: None, lib=LIBRARY)
torch.library.register_fake("ddpm_fast::linear_packed", _fake, lib=LIBRARY)
