"""A linear layer with a packed weight against float64; test_conv3x3.py forces the other instruction sets."""

from __future__ import annotations

import pytest
import torch
from op_cases import check_error_rule

from ddpm_fast import ops
from ddpm_fast.ops import _dispatch

SHAPES = [(1, 3, 33), (7, 33, 3), (16, 64, 32), (33, 96, 65), (300, 330, 40), (64, 192, 128)]  # (N, C, K)


@pytest.fixture(autouse=True)
def native():
    if _dispatch.NATIVE_MISSING is not None:
        pytest.skip(_dispatch.NATIVE_MISSING)


DTYPES = [torch.float32, torch.bfloat16]


def make(shape, generator, dtype=torch.float32):
    rows, channels, out_channels = shape
    x = torch.randn(rows, channels, generator=generator)
    weight = torch.randn(out_channels, channels, generator=generator) / channels**0.5
    bias, plus = (torch.randn(*size, out_channels, generator=generator) for size in ((), (rows,)))
    return tuple(value.to(dtype) for value in (x, weight, bias, plus))


@pytest.mark.parametrize("given", [True, False], ids=["bias-and-plus", "plain"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, given, generator, poisoned):
    check(make(shape, generator), given)


@pytest.mark.parametrize("given", [True, False], ids=["bias-and-plus", "plain"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bfloat16_against_float64(shape, given, generator, poisoned):
    check(make(shape, generator, torch.bfloat16), given)


def check(operands, given):
    x, weight, bias, plus = operands
    bias, plus = (bias, plus) if given else (None, None)
    got = ops.linear_packed(x, ops.pack_linear(weight), bias, plus=plus)
    eager = torch.nn.functional.linear(x, weight, bias)
    exact = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    if given:
        eager, exact = eager + plus, exact + plus
    assert got.dtype == x.dtype
    check_error_rule(got, eager, exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_the_same_among_any_others_and_with_any_threads(dtype, generator):
    x, weight, bias, plus = make((700, 330, 96), generator, dtype)
    packed = ops.pack_linear(weight)
    expected = ops.linear_packed(x, packed, bias, plus=plus)
    assert torch.equal(ops.linear_packed(x[70:71], packed, bias, plus=plus[70:71]), expected[70:71])
    shaped = ops.linear_packed(x.view(7, 10, 10, 330), packed, bias, plus=plus.view(7, 10, 10, 96))
    assert torch.equal(shaped, expected.view(7, 10, 10, 96))
    apart = x.t().contiguous().t()
    assert torch.equal(ops.linear_packed(apart, packed, bias, plus=plus), expected)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert torch.equal(ops.linear_packed(x, packed, bias, plus=plus), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 3e38, 1e-38])
def test_a_row_of_extremes_spoils_no_other(value, dtype, generator):
    x, weight, *_ = make((40, 128, 48), generator, dtype)
    packed = ops.pack_linear(weight)
    expected = ops.linear_packed(x, packed)
    x[3] *= 0
    x[3, 5] = value
    got = ops.linear_packed(x, packed)
    others = [row for row in range(40) if row != 3]
    assert torch.equal(got[others], expected[others])
    if abs(value) < float("inf"):  # on AMX, numbers that are smaller than 2^-124 are 0
        exact = x[3, 5].double() * weight[:, 5].double()
        atol = (1e-6 if dtype == torch.float32 else 2**-9) * value + 2**-124
        torch.testing.assert_close(got[3].double(), exact, rtol=0, atol=atol)
    else:
        assert not got[3].isfinite().any()


def test_onednn_and_ours_by_turns(generator):
    """Both configure AMX's tiles, on the same threads."""
    x, weight, *_ = make((64, 128, 48), generator)
    packed = ops.pack_linear(weight)
    halves = x.bfloat16(), weight.bfloat16()
    expected = ops.linear_packed(x, packed), torch.nn.functional.linear(*halves)
    for _ in range(3):
        assert torch.equal(ops.linear_packed(x, packed), expected[0])
        assert torch.equal(torch.nn.functional.linear(*halves), expected[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype, generator):
    x, weight, bias, plus = make((5, 65, 33), generator, dtype)
    packed = ops.pack_linear(weight).weight
    for given in ((bias, plus), (None, None)):
        torch.library.opcheck(torch.ops.ddpm_fast.linear_packed.default, (x, packed, *given, 33))
    torch.library.opcheck(torch.ops.ddpm_fast.linear_pack.default, (weight, torch.empty_like(packed)))


def test_bad_input(generator):
    x, weight, bias, plus = make((5, 65, 33), generator)
    packed = ops.pack_linear(weight)
    with pytest.raises(TypeError, match="packed must be what pack_linear returned, got Tensor"):
        ops.linear_packed(x, weight)
    with pytest.raises(ValueError, match=r"x must be \(..., 65\) for such a weight"):
        ops.linear_packed(x[:, :64], packed)
    with pytest.raises(ValueError, match=r"bias must be \(33,\)"):
        ops.linear_packed(x, packed, bias[:3])
    with pytest.raises(ValueError, match=r"plus must be \(5, 33\)"):
        ops.linear_packed(x, packed, plus=plus[:3])
    with pytest.raises(RuntimeError, match=r"linear kernel takes .*float32, not .*float16"):
        ops.linear_packed(x.half(), packed)
    with pytest.raises(ValueError, match="packed must be what was made"):
        ops.linear_packed(x.bfloat16(), packed)
    with pytest.raises(ValueError, match="a packed weight does not have"):
        ops.linear_packed(x.requires_grad_(), packed)
    with pytest.raises(ValueError, match=r"weight must be \(C_out, C_in\) and not empty"):
        ops.pack_linear(weight[:, :, None])
    with pytest.raises(ValueError, match="packed must be what was made"):
        torch.ops.ddpm_fast.linear_packed(x.detach(), packed.weight[1:], None, None, 33)
