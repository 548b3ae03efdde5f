"""3x3 convolution on the CPU: by Winograd, which is past what direct convolution can reach."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from ._checks import check_floating, describe
from ._dispatch import LIBRARY, choose, define, differentiable, runs_native
from ._packed import Operands, check_operands, check_packed_call, on_a_huge_page

ALGORITHMS: dict[str, tuple[int, int]] = {
    "direct": (1, 1),
    "f2": (2, 2),
    "f4x2": (4, 2),
    "f4": (4, 4),
}
"""By name, height and width of a tile of outputs."""

RESIZES: dict[str | None, tuple[str, ...]] = {
    None: tuple(ALGORITHMS),
    "up": ("f2",),
    "down": ("direct", "f2"),
}
"""What `conv3x3_packed` may do to height and width, as the kernels number it, and by which algorithms."""


class PackedConv3x3(NamedTuple):
    """A weight as the kernels of this processor read it: see `pack_conv3x3`."""

    weight: Tensor  # opaque
    in_channels: int
    out_channels: int
    algorithm: str
    resize: str | None


def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    plus: Tensor | None = None,
    algorithm: str = "f2",
    backend: str | None = None,
) -> Tensor:
    """3x3 convolution, stride 1, padded with zeros by 1, and ``plus``, say a residual, added to it.

    Equivalent to::

        torch.nn.functional.conv2d(x, weight, bias, padding=1) + plus

    The native kernels of the CPU compute it by Winograd's minimal filtering (Lavin & Gray 2016). Relative to
    float64, in the 2-norm, for 128 to 512 channels:

    - "direct": 9 products for an output; errs by 0.2-0.3e-6;
    - "f2", F(2x2, 3x3): 16 products for 4 outputs; 0.2-0.5e-6;
    - "f4x2", F(4x2, 3x3): 24 products for 8 outputs; 0.4-0.9e-6;
    - "f4", F(4x4, 3x3): 36 products for 16 outputs; 0.7-1.5e-6. oneDNN and eager PyTorch: 0.4-0.9e-6.

    On AMX the products are of int8 digits, exact to 2^-24 of the largest in a row (docs/kernels.md): "direct"
    errs by 0.2-0.4e-6, "f2" by 0.4-0.6e-6, "f4x2" by 0.8-1.0e-6, "f4" by 1.2-1.8e-6; numbers that are tiny
    beside the largest channel of their pixel count for less than in float32.

    Of bfloat16 all of it is in float32, transforms too, and the result is rounded once: 1.7e-3, whatever the
    algorithm. "direct" on AMX takes products of bfloat16, summed in float32, and is the fastest there.

    An infinity or NaN in x shows in every output of the tiles that read it, of float32 on AMX as NaN. A call
    transforms the weight too: for more than one, `pack_conv3x3`. Differentiable in every tensor, in reverse
    mode: to x by ``algorithm``, to weight by F(4x4, 3x3) turned about, which errs as "f4"; of bfloat16 by
    PyTorch's own.

    Args:
        x: ``(B, C_in, H, W)`` float32, bfloat16, float16 or float64; contiguous or channels_last, which is
            kept, and is the faster.
        weight: ``(C_out, C_in, 3, 3)``, like ``x``.
        bias: ``(C_out,)``, like ``x``.
        plus: ``(B, C_out, H, W)``, like ``x``.
        algorithm: one of the above, for the native backend.
        backend: "native", "reference", or None for the fastest here.

    Returns:
        ``(B, C_out, H, W)`` in ``x``'s dtype and layout.

    Raises:
        TypeError, ValueError: an argument of a wrong kind, dtype, shape or device.
        RuntimeError: a backend named that cannot run here.
    """
    check_floating("x", x, 4)
    check_floating("weight", weight, 4)
    down, across = _tile(algorithm)
    _check_x(x)
    _check_weight(weight)
    if weight.shape[1] != x.shape[1] or weight.dtype != x.dtype or weight.device != x.device:
        raise ValueError(
            f"weight must be (C_out, {x.shape[1]}, 3, 3) {x.dtype} on {x.device} for such an x, "
            f"got {describe(weight)}"
        )
    check_operands(x, _operands(x, weight.shape[0], bias, plus))
    run = differentiable("conv3x3", choose("conv3x3", backend, x), _reference, x, weight, bias, plus)
    return run(x, weight, bias, plus, down, across)


def pack_conv3x3(weight: Tensor, algorithm: str = "f2", resize: str | None = None) -> PackedConv3x3:
    """Transform a weight and lay it out, for many calls of `conv3x3_packed` on this processor.

    It takes the weight's memory, for "f2" 16/9, "f4x2" 24/9, "f4" 4 times as much; C_out is rounded up to 32.
    On AMX it takes 3/4 of that, and C_in, from 64 on, is rounded up to 64. Of a bfloat16 weight it takes what
    a float32 one would, but by "direct" on AMX the weight's own memory, C_in rounded up to 32. To convolve
    and resize at once:

    - "up", the convolution of ``F.interpolate(x, scale_factor=2, mode="nearest")``, which is not made: one in
      four of F(2, 3)'s products would be of zeros in each dimension, and "f2" takes 9 for 4 outputs and the
      weight's own memory;
    - "down", with stride 2: 9 products for an output by "direct", 25 for 4 by "f2", which takes 25/9 of the
      weight's memory: in each dimension F(2, 2) of every other pixel with the outer taps, and two products
      with the middle one.

    Args:
        weight: ``(C_out, C_in, 3, 3)`` float32 or bfloat16 on the CPU. A later change of it does not show.
        algorithm: as in `conv3x3`; with ``resize`` "up" it is "f2", with "down" "direct" or "f2".
        resize: "up", "down", or None, which keeps height and width.

    Raises:
        TypeError, ValueError: an argument of a wrong kind, dtype, shape or device.
        RuntimeError: the native kernels are not there.
    """
    check_floating("weight", weight, 4)
    down, across = _tile(algorithm)
    if resize not in RESIZES:
        raise ValueError(f"resize={resize!r} is not known; allowed: None, up, down")
    if algorithm not in RESIZES[resize]:
        allowed = ", ".join(RESIZES[resize])
        raise ValueError(f"algorithm={algorithm!r} has no resize={resize!r}; allowed: {allowed}")
    _check_weight(weight)
    choose("conv3x3", "native", weight)
    out_channels, in_channels = weight.shape[:2]
    kind = _number(resize)
    size = torch.ops.ddpm_fast.conv3x3_packed_size.default(
        in_channels, out_channels, down, across, weight.dtype, kind
    )
    packed = on_a_huge_page(size, weight.dtype)
    torch.ops.ddpm_fast.conv3x3_pack.default(weight.detach(), down, across, packed, kind)
    return PackedConv3x3(packed, in_channels, out_channels, algorithm, resize)


def conv3x3_packed(
    x: Tensor,
    packed: PackedConv3x3,
    bias: Tensor | None = None,
    *,
    plus: Tensor | None = None,
    padding: tuple[int, int] = (1, 1),
    skip: Tensor | None = None,
    norm: Tensor | None = None,
) -> Tensor:
    """`conv3x3` with a weight that `pack_conv3x3` has laid out, maybe to resize. Not differentiable.

    Its input may be two tensors side by side, and it may be the SiLU of their norm, neither of which is then
    written anywhere: ``conv3x3_packed(x, packed, skip=skip, norm=group_norm_fold(x, groups, skip=skip))`` is
    the convolution of ``group_norm_silu(torch.cat([x, skip], 1), groups)``.

    Args:
        x: ``(B, C, H, W)`` float32 or bfloat16 on the CPU.
        packed: of a weight ``(C_out, C_in, 3, 3)`` in ``x``'s dtype.
        bias: as in `conv3x3`.
        plus: of the result's shape.
        padding: zeros before and after each dimension: (1, 1), or with ``resize`` "down" (0, 1).
        skip: ``(B, C_in - C, H, W)``, like ``x``: the channels after those of x. Without it C is C_in.
        norm: ``(B, 4, C_in)`` float32, of `group_norm_fold`. What pads the input is zero after the SiLU.

    Returns:
        ``(B, C_out, H', W')`` in ``x``'s layout. Without ``resize`` H' is H, and the result is equal to the
        bit to `conv3x3`'s with the same algorithm; with "up" H' is 2 H; with "down" H / 2, rounded up, or
        down where the padding is (0, 1).

    Raises:
        TypeError, ValueError: an argument of a wrong kind, dtype, shape or device.
        RuntimeError: the native kernels are not there.
    """
    check_floating("x", x, 4)
    if not isinstance(packed, PackedConv3x3):
        raise TypeError(f"packed must be what pack_conv3x3 returned, got {type(packed).__name__}")
    _check_x(x)
    rest = packed.in_channels - x.shape[1]
    if rest < 0 or (rest == 0) != (skip is None):
        raise ValueError(
            f"x must be (B, {packed.in_channels}, H, W) for such a weight, or have fewer channels and a skip "
            f"with the others, got {describe(x)}"
        )
    kind, shift = _number(packed.resize), _shift(x, packed.resize, padding)
    choose("conv3x3", "native", x)
    operands = _operands(x, packed.out_channels, bias, plus, kind, shift)
    operands["skip"] = skip, (x.shape[0], rest, *x.shape[2:])
    operands["norm"] = norm, (x.shape[0], 4, packed.in_channels)
    check_packed_call(x, operands, "conv3x3")
    down, across = ALGORITHMS[packed.algorithm]
    run = torch.ops.ddpm_fast.conv3x3_packed.default
    return run(x, packed.weight, bias, plus, packed.out_channels, down, across, kind, shift, skip, norm)


def _number(resize: str | None) -> int:
    return tuple(RESIZES).index(resize)


def _shift(x: Tensor, resize: str | None, padding: tuple[int, int]) -> int:
    if padding == (1, 1):
        return 0
    if padding != (0, 1) or resize != "down":
        allowed = '(1, 1), or with resize="down" (0, 1)'
        raise ValueError(f"padding must be {allowed}, got {padding!r} with resize={resize!r}")
    if min(x.shape[2:]) < 2:
        raise ValueError(f"x must have two rows and columns for padding (0, 1), got {describe(x)}")
    return 1


def _resized(side: int, resize: int, shift: int) -> int:
    return (side, 2 * side, (side + 1 - shift) // 2)[resize]


def _tile(algorithm: str) -> tuple[int, int]:
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm={algorithm!r} is not known; allowed: {', '.join(ALGORITHMS)}")
    return ALGORITHMS[algorithm]


def _check_x(x: Tensor) -> None:
    if x.dim() != 4 or 0 in x.shape:
        raise ValueError(f"x must be (B, C_in, H, W) and not empty, got {describe(x)}")


def _check_weight(weight: Tensor) -> None:
    if weight.dim() != 4 or weight.shape[2:] != (3, 3) or 0 in weight.shape:
        raise ValueError(f"weight must be (C_out, C_in, 3, 3) and not empty, got {describe(weight)}")


def _operands(
    x: Tensor, out_channels: int, bias: Tensor | None, plus: Tensor | None, resize: int = 0, shift: int = 0
) -> Operands:
    shape = _shape(x, out_channels, resize, shift)
    return {"bias": (bias, (out_channels,)), "plus": (plus, shape)}


def _shape(x: Tensor, out_channels: int, resize: int, shift: int) -> tuple[int, ...]:
    return (x.shape[0], out_channels, *(_resized(side, resize, shift) for side in x.shape[2:]))


def _reference(x, weight, bias, plus, down, across):
    return reference.conv3x3(x, weight, bias, plus=plus)


def _fake(x, weight, bias, plus, down, across):
    return _fake_packed(x, weight, bias, plus, weight.shape[0], down, across)


def _fake_packed(x, packed, bias, plus, out_channels, down, across, resize=0, shift=0, skip=None, norm=None):
    shape = _shape(x, out_channels, resize, shift)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=reference.memory_format(x))


def _reference_input_gradient(grad, weight, down, across):
    return reference.conv3x3(grad, weight.flip(2, 3).transpose(0, 1), None)


def _fake_input_gradient(grad, weight, down, across):
    return _fake_packed(grad, None, None, None, weight.shape[1], down, across)


def _reference_weight_gradient(grad, x, weight):
    _, d_weight, d_bias = _eager_backward(grad, x, weight, [False, True, True])
    return d_weight, d_bias


def _fake_weight_gradient(grad, x, weight):
    return torch.empty_like(weight), weight.new_empty(len(weight))


def _eager_backward(grad, x, weight, mask):
    ones, zeros = [1, 1], [0, 0]
    bias = [len(weight)] if mask[2] else None
    return torch.ops.aten.convolution_backward(grad, x, weight, bias, ones, ones, ones, False, zeros, 1, mask)


def _save_inputs(ctx, inputs, output) -> None:
    x, weight, bias, plus, ctx.down, ctx.across = inputs
    ctx.save_for_backward(x, weight)
    ctx.given = bias is not None, plus is not None


def _backward(ctx, grad):
    """To x it is the convolution with the weight turned about; to the weight Winograd's transposed."""
    x, weight = ctx.saved_tensors
    has_bias, has_plus = ctx.given
    d_plus = grad if has_plus else None
    if x.dtype != torch.float32 or not runs_native("conv3x3", x):
        mask = [*ctx.needs_input_grad[:2], has_bias and ctx.needs_input_grad[2]]
        return *_eager_backward(grad, x, weight, mask), d_plus, None, None
    d_x = d_weight = d_bias = None
    grad = grad.contiguous(memory_format=reference.memory_format(x))  # once for both
    if ctx.needs_input_grad[0]:
        d_x = torch.ops.ddpm_fast.conv3x3_input_gradient.default(grad, weight, ctx.down, ctx.across)
    if any(ctx.needs_input_grad[1:3]):
        d_weight, d_bias = torch.ops.ddpm_fast.conv3x3_weight_gradient.default(grad, x, weight)
    return d_x, d_weight, d_bias if has_bias else None, d_plus, None, None


define(
    "conv3x3",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? plus, int down, int across) -> Tensor",
    _reference,
    _fake,
    file="conv3x3",
    autograd=lambda _: (_backward, _save_inputs),
)
define(
    "conv3x3_input_gradient",
    "(Tensor grad, Tensor weight, int down, int across) -> Tensor",
    _reference_input_gradient,
    _fake_input_gradient,
    file="conv3x3",
)
define(
    "conv3x3_weight_gradient",
    "(Tensor grad, Tensor x, Tensor weight) -> (Tensor, Tensor)",
    _reference_weight_gradient,
    _fake_weight_gradient,
    file="conv3x3",
)
LIBRARY.define(
    "conv3x3_packed_size(int in_channels, int out_channels, int down, int across, ScalarType dtype, "
    "int resize=0) -> int"
)
LIBRARY.define("conv3x3_pack(Tensor weight, int down, int across, Tensor(a!) packed, int resize=0) -> ()")
LIBRARY.define(
    "conv3x3_packed(Tensor x, Tensor packed, Tensor? bias, Tensor? plus, int out_channels, "
    "int down, int across, int resize=0, int shift=0, Tensor? skip=None, Tensor? norm=None) -> Tensor"
)
torch.library.register_fake(
    "ddpm_fast::conv3x3_pack", lambda weight, down, across, packed, resize=0: None, lib=LIBRARY
)
torch.library.register_fake("ddpm_fast::conv3x3_packed", _fake_packed, lib=LIBRARY)
