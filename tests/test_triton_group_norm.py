"""The Triton GroupNorm where `test_ops`, which runs every case, does not reach: launches and odd operands.

The launchers by themselves: both ways through memory, layouts, dtypes, strides, repetition.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from op_cases import EAGER
from test_ops import check_error_rule
from torch import Tensor

from ddpm_fast import reference
from ddpm_fast.ops.group_norm_silu import _reference_backward

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("needs TRITON_INTERPRET=1, set before triton is imported", allow_module_level=True)

from ddpm_fast.ops._triton import group_norm_silu as forward  # noqa: E402
from ddpm_fast.ops._triton import group_norm_silu_backward as backward  # noqa: E402
from ddpm_fast.ops._triton import group_norm_silu_concat as concatenated  # noqa: E402

LAYOUTS = (torch.contiguous_format, torch.channels_last)
NAMES = ("x", "weight", "bias", "add", "scale", "shift")


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def operands(batch: int, channels: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    shapes = [(channels,)] * 2 + [(batch, channels)] * 3
    return {
        name: draw(*shape, seed=k, dtype=dtype)
        for k, (name, shape) in enumerate(zip(NAMES[1:], shapes, strict=True), 1)
    }


def arguments(x: Tensor, groups: int, given: dict[str, Tensor], silu: bool = True) -> tuple:
    weight, bias, add, scale, shift = (given.get(name) for name in NAMES[1:])
    return x, groups, weight, bias, 1e-5, add, scale, shift, silu


def check(x: Tensor, groups: int, given: dict[str, Tensor], silu: bool = True) -> None:
    """Value and gradients against float64: the value by the error rule, gradients within 16 roundings."""
    args = arguments(x, groups, given, silu)
    wide = arguments(x.double(), groups, {name: v.double() for name, v in given.items()}, silu)
    weight, bias, eps, add, scale, shift = args[2:8]
    act = "silu" if silu else "none"
    eager = EAGER["group_norm_silu"](x, groups, weight, bias, eps, add, scale, shift, act)
    exact = EAGER["group_norm_silu"](*wide[:8], act)
    y = forward.group_norm_silu(*args)
    assert y.stride() == x.contiguous(memory_format=reference.memory_format(x)).stride()
    check_error_rule(y, eager, exact)

    grad = draw(*x.shape, seed=9, dtype=x.dtype)
    got = backward.group_norm_silu_backward(grad, *args)
    plain = _reference_backward(grad, *args)
    exact = _reference_backward(grad.double(), *wide)
    for name, g, p, e in zip(NAMES, got, plain, exact, strict=True):
        assert g.shape == p.shape and g.dtype == p.dtype and g.stride() == p.stride(), name
        if name == "x" or name in given:
            assert (g - e).abs().max() <= 16 * torch.finfo(g.dtype).eps * e.abs().max(), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("groups", [1, 3, 24])
@pytest.mark.parametrize("split", [False, True])
def test_both_ways(layout, groups, split, poisoned, monkeypatch):
    """A tile of all pixels and several with a remainder: 4087 pixels, 24 channels, groups of 24, 8 and 1."""
    one_tile = forward.resident_tile

    def tile(shape, best, most):
        return None if split else one_tile(shape, 0, 2**20)

    monkeypatch.setattr(forward, "resident_tile", tile)
    monkeypatch.setattr(backward, "resident_tile", tile)
    x = draw(2, 24, 67, 61).contiguous(memory_format=layout)
    given = operands(2, 24)
    if groups == 24:
        del given["add"]  # a channel's own norm takes it off again: its gradient is rounding
    check(x, groups, given)


@pytest.mark.parametrize("present", list(itertools.product([False, True], repeat=5)))
def test_every_set_of_operands(present, poisoned):
    given = {n: v for (n, v), there in zip(operands(2, 12).items(), present, strict=True) if there}
    for layout, silu in zip(LAYOUTS, (True, False), strict=True):
        check(draw(2, 12, 5, 3).contiguous(memory_format=layout), 4, given, silu)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_operands_of_any_dtype_and_stride(dtype, x_dtype, poisoned):
    given = operands(3, 16, dtype)
    both = torch.cat([given["scale"], given["shift"]], 1)
    given["scale"], given["shift"] = both.chunk(2, 1)  # as a time embedding's projection gives them
    given["add"] = given["add"].t().contiguous().t()
    given["weight"] = torch.stack([given["weight"]] * 2, 1)[:, 0]
    x, grad = draw(3, 16, 7, 5, dtype=x_dtype), draw(3, 16, 7, 5, seed=9, dtype=x_dtype)
    args = arguments(x, 4, given)
    expected = reference.group_norm_silu(*args[:5], add=args[5], scale=args[6], shift=args[7])
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if x_dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(forward.group_norm_silu(*args), expected, **tolerance)
    got = backward.group_norm_silu_backward(grad, *args)
    for g, e in zip(got, _reference_backward(grad, *args), strict=True):
        loose = min(1.0, 8 * torch.finfo(g.dtype).eps)
        assert g.dtype == e.dtype
        torch.testing.assert_close(g, e, rtol=max(loose, tolerance["rtol"]), atol=max(loose, 5e-2))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_x_and_grad_in_any_layout(layout, poisoned):
    """Slices, transposes, an expanded gradient, unaligned storage: the numbers are those of dense tensors."""
    given = operands(2, 8)
    x = draw(2, 8, 6, 10).contiguous(memory_format=layout)
    grad = draw(2, 8, 6, 10, seed=9)
    expected = backward.group_norm_silu_backward(grad, *arguments(x, 2, given))
    moved = x.new_empty(x.numel() + 1)[1:].as_strided(x.shape, x.stride(), 1).copy_(x)
    grads = (
        grad.mT.contiguous().mT,
        torch.stack([grad] * 2, -1)[..., 0],
        grad.contiguous(memory_format=layout),
    )
    for g in grads:
        got = backward.group_norm_silu_backward(g, *arguments(moved, 2, given))
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    sliced = torch.stack([x] * 2, -1)[..., 0]  # dense no more: the op makes it contiguous
    y = forward.group_norm_silu(*arguments(sliced, 2, given))
    assert y.is_contiguous()
    torch.testing.assert_close(
        y, forward.group_norm_silu(*arguments(x.contiguous(), 2, given)), rtol=0, atol=0
    )
    one = torch.ones(()).expand_as(x)
    for a, b in zip(
        backward.group_norm_silu_backward(one, *arguments(x, 2, given)),
        backward.group_norm_silu_backward(one.contiguous(), *arguments(x, 2, given)),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shift", [0.0, 1e4])
@pytest.mark.parametrize("side", [16, 96])
def test_a_large_mean_cancels_nowhere(layout, shift, side, poisoned):
    """Mean 1e4, standard deviation 1e-2: as near to float64 as with no mean, forward and backward."""
    x = (draw(1, 8, side, side).double() * 1e-2 + shift).float().contiguous(memory_format=layout)
    given = {name: v for name, v in operands(1, 8).items() if name in ("weight", "bias", "add")}
    given["add"] *= 1e-2
    exact = reference.group_norm_silu(
        x.double(), 2, given["weight"].double(), given["bias"].double(), add=given["add"].double()
    )
    y = forward.group_norm_silu(*arguments(x, 2, given))
    assert (y - exact).abs().max() <= 5e-6 * exact.abs().max()
    grad = draw(*x.shape, seed=9)
    wide = arguments(x.double(), 2, {name: v.double() for name, v in given.items()})
    exact = _reference_backward(grad.double(), *wide)
    got = backward.group_norm_silu_backward(grad, *arguments(x, 2, given))
    for name, g, e in zip(NAMES, got, exact, strict=True):
        if e.numel() and name != "add":
            assert (g - e).abs().max() <= 1e-5 * e.abs().max(), name


CIFAR = [(128, 32), (256, 32), (384, 32), (256, 16), (384, 16), (512, 16), (512, 8), (512, 4)]


@pytest.mark.parametrize("batch", [1, 8, 256])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("last", [False, True])
def test_cifar_is_one_launch(batch, itemsize, last):
    """Whole groups of all pixels, in registers enough; whole sectors where channels are fastest."""
    for (channels, side), (best, most) in itertools.product(CIFAR, [(16384, 32768), (8192, 16384)]):
        shape = forward.Shape(batch, channels, side**2, 32, itemsize, last)
        tile = forward.resident_tile(shape, best, most)
        assert tile is not None and tile.elements <= most
        assert tile.block_c >= tile.groups * shape.group and tile.block_p >= shape.pixels
        forwards = most == 32768
        launch = tile.launch() if forwards else backward.resident_launch(tile, shape)
        assert tile.elements <= launch["num_warps"] * 32 * (128 if forwards else 64)
        width = tile.groups * shape.group * itemsize
        if last and shape.group & (shape.group - 1) == 0:
            assert width % 32 == 0
        assert width >= 16 or not last


# ---- of a virtual concatenation ----


def check_concat(x: Tensor, skip: Tensor, groups: int, given: dict[str, Tensor]) -> None:
    """Bit for bit what the norm of the concatenation is, and the concatenation itself, by the same tiles."""
    layout = reference.memory_format(x)
    both = torch.cat([x, skip], 1).contiguous(memory_format=layout)
    _, _, *rest = arguments(both, groups, given)
    expected = forward.group_norm_silu(both, groups, *rest)
    for concat in (False, True):
        y, built = concatenated.group_norm_silu_concat(x, skip, groups, *rest, concat)
        assert torch.equal(y, expected) and y.stride() == expected.stride()
        if concat:
            assert torch.equal(built, both) and built.stride() == both.stride()
        else:
            assert built.shape == (0,)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels,groups", [((16, 8), 3), ((16, 8), 1), ((11, 13), 24), ((1, 23), 4)])
@pytest.mark.parametrize("split", [False, True])
def test_concat_both_ways(layout, channels, groups, split, poisoned, monkeypatch):
    """The border between groups and within one; a tile of all pixels, and several with a remainder."""
    one_tile = forward.resident_tile
    monkeypatch.setattr(
        forward, "resident_tile", lambda shape, best, most: None if split else one_tile(shape, 0, 2**20)
    )
    x, skip = (draw(2, c, 67, 61, seed=k).contiguous(memory_format=layout) for k, c in enumerate(channels))
    check_concat(x, skip, groups, operands(2, 24))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_concat_of_halves_and_any_layout_of_skip(dtype, poisoned):
    """A skip in another layout than x is read as the one in x's would be."""
    given = operands(2, 24, dtype)
    for layout in LAYOUTS:
        x = draw(2, 13, 6, 10, dtype=dtype).contiguous(memory_format=layout)
        skip = draw(2, 11, 6, 10, seed=1, dtype=dtype)
        channels_last, transposed = (
            skip.contiguous(memory_format=torch.channels_last),
            skip.mT.contiguous().mT,
        )
        for other in (skip, channels_last, transposed):
            check_concat(x, other, 8, given)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("channels", [(256, 256), (256, 128)])
def test_concat_of_cifar_is_one_launch(channels, last, monkeypatch):
    """The tile is the one of as many channels in one tensor: the border plays no part in it."""
    shapes = []
    one_tile = forward.resident_tile

    def tile(shape, best, most):
        shapes.append(shape)
        return one_tile(shape, best, most)

    monkeypatch.setattr(forward, "resident_tile", tile)
    layout = LAYOUTS[last]
    x, skip = (draw(1, c, 8, 8).contiguous(memory_format=layout) for c in channels)
    concatenated.group_norm_silu_concat(x, skip, 32, *[None] * 2, 1e-5, *[None] * 3, True, False)
    assert shapes == [forward.Shape(1, sum(channels), 64, 32, 4, last)]
