"""`Conv2d` is `nn.Conv2d`, whatever layout its weight is kept in."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from op_cases import check_error_rule
from torch import nn

from ddpm_fast import Request, Sampler, Schedule, UNet, UNetConfig, convolution, ops, tuning
from ddpm_fast.convolution import Conv2d, Linear, can_pack, fastest_conv3x3, has_amx, packing
from ddpm_fast.ops import _dispatch
from ddpm_fast.unet import Dropout, Shortcut

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


@pytest.mark.parametrize("first", [None, "repeat"])
@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (2, 32, 1, 1), (1, 1, 1, 1), (2, 32, 8, 1)], ids=str)
def test_the_result_is_channels_last_whatever_is_the_fastest(shape, first, generator, packs, monkeypatch):
    """Also of an x of one channel or one pixel, which is contiguous as well."""
    monkeypatch.setattr(tuning, "fastest", lambda of, names, prior, make: "f2")
    conv = Conv2d(shape[1], 20, 3, padding=1)
    with torch.no_grad():
        y = conv(channels_last(*shape, generator=generator), first=first)
    assert y.is_contiguous(memory_format=torch.channels_last)


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


# ---- our own kernels ----


@pytest.fixture
def own(packs):
    """Packs that our kernels may be in."""
    if _dispatch.NATIVE_MISSING is not None:
        pytest.skip(_dispatch.NATIVE_MISSING)
    return packs


@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize(
    "batch,side,algorithm", [(1, 32, "f4"), (1, 16, "f4x2"), (1, 8, "f2"), (1, 4, "direct"), (8, 4, "f2")]
)
def test_a_3x3_window_is_our_own_kernels(batch, side, algorithm, amx, generator, own, monkeypatch):
    monkeypatch.setattr(convolution, "has_amx", lambda: amx)
    if amx and algorithm != "direct":
        algorithm = "f2"
    conv = Conv2d(32, 48, 3, padding=1)
    x = channels_last(batch, 32, side, side, generator=generator)
    plus = channels_last(batch, 48, side, side, generator=generator)
    bias = torch.randn(48, generator=generator)
    with torch.no_grad():
        got = conv(x, plus, bias)
        expected = plus + nn.functional.conv2d(x, conv.weight, bias, padding=1)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert own[conv].weight.algorithm == algorithm


@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize("side,algorithm", [(32, "f4"), (16, "f4x2"), (8, None)])
def test_a_3x3_window_in_bfloat16(side, algorithm, amx, generator, own, monkeypatch):
    if not can_pack(torch.bfloat16):
        pytest.skip("oneDNN has no bfloat16 here")
    monkeypatch.setattr(convolution, "has_amx", lambda: amx)
    conv = Conv2d(32, 48, 3, padding=1).bfloat16()
    x = channels_last(1, 32, side, side, generator=generator).bfloat16()
    plus = channels_last(1, 48, side, side, generator=generator).bfloat16()
    with torch.no_grad():
        eager, exact = nn.Conv2d.forward(conv, x), copy.deepcopy(conv).double()(x.double())
        got = conv(x, plus)
    check_error_rule(got, plus + eager, plus + exact)
    packed = own[conv].weight
    if amx:
        algorithm = "direct"
        assert not has_amx() or convolution.packed_bytes(own) == 9 * 32 * 64 * 2  # 48 filled up to 64
    assert isinstance(packed, torch.Tensor) if algorithm is None else packed.algorithm == algorithm
    own.clear()
    with torch.no_grad(), packing(own, low_memory=True):
        conv(x)
    assert isinstance(own[conv].weight, torch.Tensor)


@pytest.mark.parametrize("plus", [True, False])
def test_it_learns_by_our_own_kernels(plus, generator, own):
    """With a gradient asked for, from 32 tiles on: forward and backward are the op's, elsewhere torch's."""
    layer = Conv2d(48, 33, 3, padding=1).to(memory_format=torch.channels_last)

    def is_ours(y: torch.Tensor) -> bool:
        return y.grad_fn.name() == "FunctionBackward"

    for batch, ours in ((8, True), (7, False)):
        x = channels_last(batch, 48, 8, 8, generator=generator).requires_grad_()
        residual = channels_last(batch, 33, 8, 8, generator=generator).requires_grad_() if plus else None
        upstream = channels_last(batch, 33, 8, 8, generator=generator)
        leaves = [v for v in (x, layer.weight, layer.bias, residual) if v is not None]
        y = layer(x, plus=residual)
        assert is_ours(y) == ours
        if ours:
            expected = ops.conv3x3(x, layer.weight, layer.bias, plus=residual, algorithm="f4")
        else:
            expected = nn.functional.conv2d(x, layer.weight, layer.bias, padding=1)
            expected = expected if residual is None else residual + expected
        assert torch.equal(y, expected)
        gradients = (torch.autograd.grad(out, leaves, upstream) for out in (y, expected))
        for a, b in zip(*gradients, strict=True):
            assert torch.equal(a, b)
    x = channels_last(8, 48, 8, 8, generator=generator)
    assert is_ours(layer(x)) and not is_ours(layer(x.contiguous()))
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_ours(layer(x))
    assert not is_ours(layer.double()(x.double()))


@pytest.mark.parametrize("window", ["1x1", "valid"])
def test_other_windows_are_onednns(window, generator, own):
    conv = Conv2d(32, 32, **WINDOWS[window])
    unpadded = Conv2d(32, 32, 3)
    with torch.no_grad():
        for layer in (conv, unpadded):
            layer(channels_last(1, 32, 16, 16, generator=generator))
            assert isinstance(own[layer].weight, torch.Tensor)


@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize(
    "side,first,window,kernel",
    [
        (8, "repeat", {"padding": 1}, ("f2", "up", (1, 1))),
        (16, None, {"padding": 1, "stride": 2}, ("f2", "down", (1, 1))),
        (32, "pad", {"stride": 2}, ("f2", "down", (0, 1))),
        (6, "pad", {"stride": 2}, ("direct", "down", (0, 1))),
    ],
)
def test_what_comes_first_is_our_own_kernels(side, first, window, kernel, amx, generator, own, monkeypatch):
    monkeypatch.setattr(convolution, "has_amx", lambda: amx)
    conv = Conv2d(32, 48, 3, **window)
    x = channels_last(1, 32, side, side, generator=generator)
    before = {
        None: x,
        "repeat": nn.functional.interpolate(x, scale_factor=2.0, mode="nearest"),
        "pad": nn.functional.pad(x, (0, 1, 0, 1)),
    }[first]
    expected = nn.Conv2d.forward(conv, before)
    with torch.no_grad():
        got = conv(x, first=first)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        assert got.is_contiguous(memory_format=torch.channels_last)
        algorithm = "direct" if amx and side == 16 else kernel[0]
        assert own[conv].key[0] == (algorithm, *kernel[1:]) and own[conv].weight.resize == kernel[1]
        with packing(own, low_memory=True):
            torch.testing.assert_close(conv(x, first=first), expected, rtol=1e-5, atol=1e-5)
            assert isinstance(own[conv].weight, torch.Tensor)
    assert torch.equal(conv(x, first=first), expected)  # with a gradient


def test_the_layout_of_one_pixel_enlarged_is_channels_last(generator, own):
    conv = Conv2d(32, 32, 3, padding=1)
    x = channels_last(2, 32, 1, 1, generator=generator)
    with torch.no_grad():
        assert conv(x, first="repeat").is_contiguous(memory_format=torch.channels_last)


def test_few_channels_and_other_backends_are_onednns(generator, own, monkeypatch):
    assert fastest_conv3x3(1, 3, 32, 32) is None
    monkeypatch.setattr(_dispatch, "FORCED_BACKEND", "reference")
    conv = Conv2d(32, 32, 3, padding=1)
    with torch.no_grad():
        conv(channels_last(1, 32, 16, 16, generator=generator))
    assert isinstance(own[conv].weight, torch.Tensor)


def test_a_packed_weight_is_kept_for_the_next_run_if_nothing_changed(generator, own):
    def run(side: int) -> ops.PackedConv3x3:
        """In packs of its own."""
        x = channels_last(1, 32, side, side, generator=generator)
        run_packs = {}
        with torch.no_grad(), packing(run_packs):
            got, expected = layers[0](x), nn.Conv2d.forward(layers[0], x)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        return run_packs[layers[0]].weight

    layers = [Conv2d(32, 32, 3, padding=1)]
    first = run(16)
    assert run(16) is first
    layers[0].weight.data.neg_()  # which leaves no trace in the parameter's version
    second = run(16)
    assert second is not first and run(16) is second
    assert run(4).algorithm == "direct"
    memory = weakref.ref(run(4).weight)
    layers.clear()
    gc.collect()
    assert memory() is None


@pytest.mark.parametrize(
    "set_to,default",
    [(torch.set_default_dtype, torch.float64), (torch.set_default_device, "meta")],
)
def test_packed_weights_are_the_same_whatever_torch_s_defaults(set_to, default, generator, own):
    weight = torch.randn(64, 128, 3, 3, generator=generator)
    expected = ops.pack_conv3x3(weight, "f4"), ops.pack_linear(weight.flatten(1))  # of a huge page, and less
    try:
        set_to(default)
        got = ops.pack_conv3x3(weight, "f4"), ops.pack_linear(weight.flatten(1))
    finally:
        set_to(torch.float32 if default is torch.float64 else None)
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one.weight.view(torch.uint8), other.weight.view(torch.uint8))


@pytest.fixture
def amx(monkeypatch):
    """The kernels of any instruction set in the part that AMX's have."""
    monkeypatch.setattr(convolution, "has_amx", lambda: True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_layer_is_our_own_on_amx(dtype, generator, own, amx):
    layer, shortcut = Linear(64, 40).to(dtype), Shortcut(64, 40).to(dtype)
    tokens = torch.randn(2, 9, 64, generator=generator).to(dtype)
    x, h = (channels_last(2, channels, 3, 5, generator=generator).to(dtype) for channels in (64, 40))
    plus = torch.randn(2, 9, 40, generator=generator).to(dtype)
    near = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-6, "atol": 2**-6}

    def check() -> None:
        with torch.no_grad():
            torch.testing.assert_close(layer(tokens), nn.Linear.forward(layer, tokens), **near)
            expected = nn.Linear.forward(layer, tokens) + plus
            torch.testing.assert_close(layer(tokens, plus), expected, **near)
            expected = h + nn.functional.conv2d(x, shortcut.weight)
            got = shortcut(x, h.clone(memory_format=torch.preserve_format))
        torch.testing.assert_close(got, expected, **near)
        assert got.is_contiguous(memory_format=torch.channels_last)

    check()
    first = own[layer].weight
    assert isinstance(first, ops.PackedLinear) and isinstance(own[shortcut].weight, ops.PackedLinear)
    with packing({}):  # the next run
        check()
    with torch.no_grad():
        layer.weight.mul_(2)
    check()
    assert own[layer].weight is not first
    layer.weight.data.neg_()
    with packing({}):
        check()


def test_where_a_linear_layer_is_the_plain_one(generator, own, amx, monkeypatch):
    layer, narrow = Linear(64, 8), Linear(32, 8)
    x = torch.randn(2, 9, 64, generator=generator)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    with torch.no_grad():
        for few in (x[:1], narrow(x[..., :32])):
            assert few.dtype == torch.float32
        layer(x[0])
        layer.double()(x.double())
        layer.float()
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        with packing(own, low_memory=True):
            layer(x)
        monkeypatch.setattr(convolution, "has_amx", lambda: False)
        layer(x)
        layer.bfloat16()(x.bfloat16())
    assert not own


def network(generator) -> UNet:
    """Of random weights everywhere: some start at zero."""
    config = UNetConfig((64, 128), (False, True), (True, False), sample_size=32)
    model = UNet(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5, generator=generator)
    return model


def test_the_whole_network_against_float64(generator, own):
    """Relative to the output, in the 2-norm: 5e-6."""
    model = network(generator)
    with torch.no_grad():
        for batch in (1, 8):
            x = channels_last(batch, 3, 32, 32, generator=generator)
            got = model(x, 500)
            exact = copy.deepcopy(model).double()(x.double(), 500)
            assert (got - exact).norm() <= 5e-6 * exact.norm()
    algorithms = {
        pack.weight.algorithm for pack in own.values() if isinstance(pack.weight, ops.PackedConv3x3)
    }
    assert algorithms >= {"f2" if has_amx() else "f4"}
    assert has_amx() == any(isinstance(pack.weight, ops.PackedLinear) for pack in own.values())


def test_the_whole_network_in_bfloat16(generator, own):
    """No further from float64 than PyTorch's own layers, of the same weights in bfloat16."""
    model = network(generator)
    model = model.bfloat16()
    exact_model = copy.deepcopy(model).double()
    for batch in (1, 8):
        x = channels_last(batch, 3, 32, 32, generator=generator).bfloat16()
        with torch.no_grad():
            exact = exact_model(x.double(), 500)
            got = model(x, 500)
            token = convolution._PACKS.set(None)
            eager = model(x, 500)
            convolution._PACKS.reset(token)
        assert (got - exact).norm() <= 1.1 * (eager - exact).norm()  # they round alike, by chance
    if can_pack(torch.bfloat16):
        assert any(isinstance(pack.weight, ops.PackedConv3x3) for pack in own.values())
    assert has_amx() == any(isinstance(pack.weight, ops.PackedLinear) for pack in own.values())


def test_low_memory_leaves_our_own_kernels_out(own):
    """And the statistics say what the weights of the last run took."""
    config = UNetConfig((32,), (True,), (False,), sample_size=16, layers_per_block=1)
    torch.manual_seed(0)
    model = UNet(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    in_use = {}

    def callback(i, t, x, x0):
        in_use.update(convolution._PACKS.get())

    def run(**options) -> tuple[torch.Tensor, Sampler, int]:
        """The images, and how many layers are in our kernels' layout."""
        in_use.clear()
        sampler = Sampler(model, Schedule.linear(), num_steps=3, **options)
        x = sampler(1, seed=2, callback=callback)
        own = [pack.weight for pack in in_use.values() if not isinstance(pack.weight, torch.Tensor)]
        onednns = [layer for layer, pack in in_use.items() if isinstance(pack.weight, torch.Tensor)]
        expected = sum(packed.weight.nbytes for packed in own)
        assert sampler.stats.packed_bytes == expected + sum(layer.weight.nbytes for layer in onednns) > 0
        return x, sampler, len(own)

    x, normal, count = run()
    assert count > 5
    low, sampler, count = run(low_memory=True)
    assert count == 0 and sampler.stats.packed_bytes < normal.stats.packed_bytes
    torch.testing.assert_close(low, x, rtol=0, atol=1e-4)
    taken = sampler.stats.packed_bytes
    for _ in sampler.stream([Request()], batch_size=1):
        pass
    assert sampler.stats.packed_bytes == taken
    *_, (_, _, walked, _) = sampler.trajectory(1, seed=2)
    assert torch.equal(walked, low) and sampler.stats.packed_bytes == taken
    with pytest.raises(TypeError, match="low_memory must be True or False, got 1"):
        run(low_memory=1)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_transforms_and_tracers_see_the_convolution_of_pytorch(generator):
    conv, x = Conv2d(16, 16, 3, padding=1), channels_last(2, 16, 32, 32, generator=generator)
    assert conv._learns(x) == (_dispatch.NATIVE_MISSING is None)
    plain = torch.nn.functional.conv2d(x, conv.weight, conv.bias, padding=1)
    torch.testing.assert_close(torch.vmap(conv)(x[None])[0], plain)
    traced = torch.jit.trace(conv, x)  # which looks whether a second trace is the same
    torch.testing.assert_close(traced(x), plain)


@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_forced_backend_without_the_op_leaves_pytorch_s_own(backend, dtype, generator, monkeypatch, packs):
    monkeypatch.setattr(_dispatch, "FORCED_BACKEND", backend)
    conv, x = Conv2d(16, 16, 3, padding=1).to(dtype), channels_last(2, 16, 32, 32, generator=generator)
    exact, x = copy.deepcopy(conv).double()(x.to(dtype).double()), x.to(dtype)
    conv(x).float().sum().backward()
    with torch.no_grad():
        torch.testing.assert_close(conv(x).double(), exact, rtol=0, atol=32 * torch.finfo(dtype).eps)
    layer = Dropout(0.5)
    assert 0 < int((layer(x) == 0).sum()) < x.numel()
