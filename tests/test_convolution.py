"""`Conv2d` is `nn.Conv2d`, whatever layout its weight is kept in."""

from __future__ import annotations

import copy

import pytest
import torch
from op_cases import check_error_rule
from torch import nn

from ddpm_fast import Sampler, Schedule, UNet, UNetConfig
from ddpm_fast.convolution import Conv2d, can_pack, packing

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
    if not can_pack(torch.float32):
        pytest.skip("this torch has no oneDNN")
    packs = {}
    with packing(packs):
        yield packs


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
        check_error_rule(conv(x), eager, exact)
        assert (conv in packs) == can_pack(dtype)
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


def test_where_it_is_the_plain_layer(generator, packs):
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
    assert not packs
    parametrized = torch.nn.utils.parametrizations.weight_norm(conv)  # computed anew at each call
    with torch.no_grad():
        parametrized(x)
    assert not packs


def test_nothing_is_kept_outside(generator):
    conv = Conv2d(4, 4, 3, padding=1)
    x = channels_last(1, 4, 8, 8, generator=generator)
    packs = {}
    with torch.no_grad():
        with packing(packs):
            expected = conv(x)
        assert packs.keys() == ({conv} if can_pack(torch.float32) else set())
        packs.clear()
        torch.testing.assert_close(conv(x), expected)
    assert not packs and set(vars(copy.deepcopy(conv))) == set(vars(nn.Conv2d(4, 4, 3)))


def test_a_run_sees_every_change_of_the_weights():
    """Also one that leaves no trace in a parameter's version: through .data, or by a fused optimiser."""
    config = UNetConfig((8,), (False,), (False,), norm_num_groups=4, sample_size=8)
    model = UNet(config).eval()
    sampler = Sampler(model, Schedule.linear(), num_steps=2, channels_last=True)
    sampler(1)
    for parameter in model.parameters():
        parameter.data.mul_(0.5).add_(0.1)
    fresh = Sampler(copy.deepcopy(model), Schedule.linear(), num_steps=2, channels_last=True)
    assert torch.equal(sampler(1), fresh(1))
