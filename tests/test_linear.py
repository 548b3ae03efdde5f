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


def make(shape, generator):
    rows, channels, out_channels = shape
    x = torch.randn(rows, channels, generator=generator)
    weight = torch.randn(out_channels, channels, generator=generator) / channels**0.5
    return (
        x,
        weight,
        torch.randn(out_channels, generator=generator),
        torch.randn(rows, out_channels, generator=generator),
    )


@pytest.mark.parametrize("given", [True, False], ids=["bias-and-plus", "plain"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, given, generator, poisoned):
    x, weight, bias, plus = make(shape, generator)
    bias, plus = (bias, plus) if given else (None, None)
    got = ops.linear_packed(x, ops.pack_linear(weight), bias, plus=plus)
    eager = torch.nn.functional.linear(x, weight, bias)
    exact = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    if given:
        eager, exact = eager + plus, exact + plus
    check_error_rule(got, eager, exact)


def test_a_row_is_the_same_among_any_others_and_with_any_threads(generator):
    x, weight, bias, plus = make((300, 130, 96), generator)
    packed = ops.pack_linear(weight)
    expected = ops.linear_packed(x, packed, bias, plus=plus)
    assert torch.equal(ops.linear_packed(x[70:71], packed, bias, plus=plus[70:71]), expected[70:71])
    shaped = ops.linear_packed(x.view(3, 10, 10, 130), packed, bias, plus=plus.view(3, 10, 10, 96))
    assert torch.equal(shaped, expected.view(3, 10, 10, 96))
    apart = x.t().contiguous().t()
    assert torch.equal(ops.linear_packed(apart, packed, bias, plus=plus), expected)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert torch.equal(ops.linear_packed(x, packed, bias, plus=plus), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 3e38, 1e-38])
def test_a_row_of_extremes_spoils_no_other(value, generator):
    x, weight, *_ = make((40, 128, 48), generator)
    packed = ops.pack_linear(weight)
    expected = ops.linear_packed(x, packed)
    x[3] *= 0
    x[3, 5] = value
    got = ops.linear_packed(x, packed)
    others = [row for row in range(40) if row != 3]
    assert torch.equal(got[others], expected[others])
    if abs(value) < float("inf"):  # on AMX, numbers that are smaller than 2^-124 are 0
        atol = 1e-6 * value + 2**-124
        torch.testing.assert_close(got[3].double(), value * weight[:, 5].double(), rtol=0, atol=atol)
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


def test_opcheck(generator):
    x, weight, bias, plus = make((5, 65, 33), generator)
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
    with pytest.raises(RuntimeError, match=r"linear kernel takes .*float32, not .*bfloat16"):
        ops.linear_packed(x.bfloat16(), packed)
    with pytest.raises(ValueError, match="a packed weight does not have"):
        ops.linear_packed(x.requires_grad_(), packed)
    with pytest.raises(ValueError, match=r"weight must be \(C_out, C_in\) and not empty"):
        ops.pack_linear(weight[:, :, None])
    with pytest.raises(ValueError, match="packed must be what was made"):
        torch.ops.ddpm_fast.linear_packed(x.detach(), packed.weight[1:], None, None, 33)
