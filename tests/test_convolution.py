"""`Conv2d` is `nn.Conv2d`, whatever layout its weight is kept in."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from op_cases import check_error_rule
from torch import nn

from ddpm_fast.convolution import PACKS, Conv2d

WINDOWS = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "1x1": {"kernel_size": 1},
    "down": {"kernel_size": 3, "stride": 2, "padding": 1},
    "valid": {"kernel_size": 3, "stride": 2},
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)  # the layers' weights


def channels_last(*shape: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator).contiguous(memory_format=torch.channels_last)


@pytest.fixture
def packs():
    if not PACKS:
        pytest.skip("this torch has no oneDNN")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (2, 64, 9, 7), (3, 33, 8, 8), (1, 8, 5, 5)])
def test_against_float64(shape, window, dtype, generator, packs):
    conv = Conv2d(shape[1], 20, **WINDOWS[window])
    x = channels_last(*shape, generator=generator).to(dtype)
    conv.to(dtype)
    plain = nn.Conv2d(shape[1], 20, **WINDOWS[window]).to(dtype)
    plain.load_state_dict(conv.state_dict())
    exact_conv = copy.deepcopy(plain).double()
    with torch.no_grad():
        eager, exact = plain(x), exact_conv(x.double())
        plus = torch.randn(exact.shape, generator=generator).to(dtype)
        assert conv._packed is None
        check_error_rule(conv(x), eager, exact)
        assert conv._packed is not None
        check_error_rule(conv(x, plus), plus + eager, plus + exact)
        plus = plus.contiguous(memory_format=torch.channels_last)
        got = conv(x, plus)
    check_error_rule(got, plus + eager, plus + exact)
    assert got.is_contiguous(memory_format=torch.channels_last) and got.dtype == dtype


def test_a_changed_weight_shows(generator, packs):
    conv = Conv2d(8, 8, 3, padding=1)
    x = channels_last(2, 8, 5, 5, generator=generator)

    def check() -> None:
        with torch.no_grad():
            torch.testing.assert_close(conv(x), nn.Conv2d.forward(conv, x), rtol=1e-5, atol=1e-5)

    check()
    with torch.no_grad():
        conv.weight.mul_(2)
    check()
    conv.load_state_dict({name: value + 1 for name, value in conv.state_dict().items()})
    check()
    conv.weight = nn.Parameter(torch.randn_like(conv.weight))
    check()
    conv.weight.data = torch.randn_like(conv.weight)
    check()
    x = channels_last(1, 8, 16, 16, generator=generator)  # another shape
    check()
    conv.bfloat16()
    x = x.bfloat16()
    with torch.no_grad():
        torch.testing.assert_close(conv(x), nn.Conv2d.forward(conv, x), rtol=2e-2, atol=2e-2)


def test_where_it_is_the_plain_layer(generator):
    conv = Conv2d(4, 4, 3, padding=1)
    x = channels_last(1, 4, 8, 8, generator=generator)
    conv(x).sum().backward()
    assert conv.weight.grad is not None
    with torch.no_grad():
        conv(x.contiguous())
        conv(x.contiguous(), plus=x.contiguous())
        conv.double()(x.double())
        conv.float()
        with torch.autocast("cpu", torch.bfloat16):
            assert conv(x).dtype == torch.bfloat16
        compiled = torch.compile(conv, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), nn.Conv2d.forward(conv, x))
    assert conv._packed is None


def test_copies_and_pickles_leave_the_packed_weight_out(generator, packs):
    conv = Conv2d(4, 4, 3, padding=1)
    x = channels_last(1, 4, 8, 8, generator=generator)
    with torch.no_grad():
        expected = conv(x)
    other = copy.deepcopy(conv)
    assert conv._packed is not None and other._packed is None and set(conv.state_dict()) == {"weight", "bias"}
    file = io.BytesIO()
    torch.save(conv, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    with torch.no_grad():
        assert torch.equal(other(x), expected) and torch.equal(again(x), expected)
