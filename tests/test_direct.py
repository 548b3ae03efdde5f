"""Calls past the dispatcher: the same bits as the op; not where somebody looks on or something is amiss."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_fast import ops
from ddpm_fast.ops import _dispatch

direct = _dispatch.direct("group_norm_silu")
pytestmark = pytest.mark.skipif(_dispatch._DIRECT is None, reason="no compiled library that Python can call")


def call(
    x: object, groups=4, weight=None, bias=None, eps=1e-5, skip=None, act="silu", concat=False, **by_sample
):
    by_sample = [by_sample.get(name) for name in ("add", "scale", "shift")]
    return direct(x, skip, groups, weight, bias, eps, *by_sample, act, concat)


@pytest.fixture
def x(generator) -> Tensor:
    return torch.randn(2, 8, 5, 3, generator=generator)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_bits_as_the_op(dtype, layout, x, generator):
    x = x.to(dtype).contiguous(memory_format=layout)
    weight, bias = nn.Parameter(torch.randn(8, generator=generator), requires_grad=False), torch.randn(8)
    plus = torch.randn(2, 8, generator=generator).double()
    op = torch.ops.ddpm_fast.group_norm_silu_forward
    for given in ({}, {"add": plus, "scale": plus.float(), "shift": plus.half()}):
        got = call(x, 4, weight, bias, **given)
        args = [given.get(name) for name in ("add", "scale", "shift")]
        assert torch.equal(got, op(x, 4, weight, bias, 1e-5, *args, True))
        assert got.stride() == x.stride() and type(got) is Tensor and not got.requires_grad
    y, both = call(x, 2, skip=x, act="none", concat=True)
    args = (2, None, None, 1e-5, None, None, None, False, True)
    expected = torch.ops.ddpm_fast.group_norm_silu_concat_forward(x, x, *args)
    assert torch.equal(y, expected[0]) and torch.equal(both, expected[1])


def test_what_is_not_plain_goes_to_the_op(x, generator):
    weight = torch.randn(8, generator=generator)
    assert call(x, weight=weight) is not None
    strided = x.expand(2, 8, 5, 3)[:, :, ::2]
    negated = torch.randn(1, 4, 1, 1, dtype=torch.complex64).conj().imag
    assert negated.is_neg()
    for other in (
        strided,
        negated,
        x[0, 0, 0, 0],
        x.double(),
        x.int(),
        x.to("meta"),
        x.to_sparse(),
        1.0,
        None,
    ):
        assert call(other) is None
    assert call(x.as_subclass(type("Other", (Tensor,), {}))) is None
    amiss = [
        {"groups": 3},
        {"groups": 0},
        {"groups": 4.0},
        {"groups": 2**70},
        {"eps": -1.0},
        {"eps": float("nan")},
        {"act": "gelu"},
        {"act": None},
        {"weight": weight[:4]},
        {"weight": weight[:, None]},
        {"weight": weight.long()},
        {"bias": weight.to("meta")},
        {"add": weight},
        {"shift": torch.ones(1, 8)},
        {"skip": x[:1].clone()},
        {"skip": x.mT.contiguous()},
        {"skip": x.bfloat16()},
    ]
    for given in amiss:
        assert call(x, **given) is None, given
    assert direct(x) is None


def test_nothing_is_said_that_the_op_would_not_say(x, capfd):
    """libtorch tells stderr of each of its own errors that crosses to C."""
    torch.func.vmap(lambda v: ops.group_norm_silu(v, 4, torch.ones(8)))(x[None])
    with pytest.raises(ValueError, match="skip must have at least 2 dimensions"):
        ops.group_norm_silu_concat(x, x.flatten(), 4)
    with pytest.raises(RuntimeError, match="'concat'"):
        ops.group_norm_silu_concat(x, x, 4, concat="no")
    with pytest.raises(ValueError, match="backend='' is not known"):
        ops.group_norm_silu(x, 4, backend="")
    assert capfd.readouterr().err == ""


def test_a_gradient_goes_to_the_op(x):
    weight = nn.Parameter(torch.ones(8))
    assert call(x, weight=weight) is None and call(x.clone().requires_grad_()) is None
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert call(x, weight=weight) is not None
    assert ops.group_norm_silu(x, 4, weight).requires_grad


class Functions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
def test_who_looks_on_sees_the_op(x):
    for mode in (Functions(), Operators(), torch.profiler.profile()):
        with mode:
            assert call(x) is None
    assert call(x) is not None
    torch.func.vmap(lambda v: v if call(x) is None else pytest.fail("inside vmap"))(x)
    with forward_ad.dual_level():
        assert not _dispatch.goes_direct(None)
    assert _dispatch.goes_direct(None) and _dispatch.goes_direct("native")
    assert not _dispatch.goes_direct("reference") and not _dispatch.goes_direct("triton")
    traced = torch.jit.trace(lambda v: ops.group_norm_silu(v, 4), x, check_trace=False)
    assert torch.equal(traced(2 * x + 1), ops.group_norm_silu(2 * x + 1, 4))
