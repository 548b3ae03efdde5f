"""A norm that the next convolution works out as it reads, beside the norm that is written, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from test_conv3x3 import growth
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_fast import UNetConfig, convolution, ops, reference
from ddpm_fast.convolution import packing
from ddpm_fast.ops import _dispatch
from ddpm_fast.ops.conv3x3 import ALGORITHMS
from ddpm_fast.unet import Attention, ResBlock, UNet

SHAPES = [  # (B, channels of x, of skip, H, W, groups)
    (1, 3, 0, 7, 5, 3),
    (3, 33, 0, 1, 1, 11),
    (1, 96, 0, 33, 31, 32),
    (3, 40, 56, 4, 6, 8),  # a group straddles them
    (1, 20, 13, 9, 6, 11),
    (2, 128, 64, 8, 8, 32),
    (1, 35, 0, 3, 200, 7),  # wider than a block of tiles
]
MEANS = {"plain": (0.0, 1.0), "far": (1e4, 1e-2)}


@pytest.fixture(autouse=True)
def native():
    if _dispatch.NATIVE_MISSING is not None:
        pytest.skip(_dispatch.NATIVE_MISSING)


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def make(shape, generator, *, mean=0.0, std=1.0, film=True, dtype=torch.float32) -> dict:
    batch, from_x, from_skip, height, width, groups = shape
    channels = from_x + from_skip

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    def image(count: int) -> Tensor:
        return channels_last((mean + std * randn(batch, count, height, width)).to(dtype))

    made = {"x": image(from_x), "skip": image(from_skip) if from_skip else None, "num_groups": groups}
    made |= {"weight": 1 + 0.3 * randn(channels), "bias": randn(channels)}
    if film:
        made |= {name: 0.5 * randn(batch, channels) for name in ("add", "scale", "shift")}
    return made


def upcast(inputs: dict) -> dict:
    return {name: v.double() if isinstance(v, Tensor) else v for name, v in inputs.items()}


def both(inputs: dict) -> dict:
    """The same with the concatenation built."""
    joined = dict(inputs)
    skip = joined.pop("skip")
    return joined if skip is None else joined | {"x": channels_last(torch.cat([inputs["x"], skip], 1))}


def eager_norm(x, num_groups, weight, bias, add=None, scale=None, shift=None):
    def wide(v: Tensor) -> Tensor:
        return v[..., None, None]

    h = F.group_norm(x if add is None else x + wide(add), num_groups, weight, bias, 1e-5)
    h = h if scale is None else h * (1 + wide(scale))
    return h if shift is None else h + wide(shift)


def check_error(got: Tensor, eager: Tensor, exact: Tensor, factor: float = 1) -> None:
    eps = torch.finfo(got.dtype).eps
    for size in (lambda v: v.abs().max().item(), lambda v: v.square().mean().sqrt().item()):
        error = size(got - exact)
        allowed = factor * (2 * size(eager - exact) + eps * size(exact))
        assert error <= allowed, f"{error:.3g} > {allowed:.3g}"


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_fold_is_the_norm(shape, mean, generator, poisoned):
    for film in (True, False):
        inputs = make(shape, generator, mean=MEANS[mean][0], std=MEANS[mean][1], film=film)
        center, gain, offset, reach = ops.group_norm_fold(**inputs).double()[..., None, None].unbind(1)
        joined = both(inputs)
        x = joined["x"].double()
        got = (x - center) * gain + offset
        exact = reference.group_norm_silu(**upcast(joined), act="none")
        check_error(got, eager_norm(**joined), exact)
        assert ((x - center).abs() <= reach * (1 + 1e-5)).all()


@pytest.mark.parametrize("group", [0, 1, 31])
def test_a_spike_in_any_group(group, generator):
    """So far out that 2^u needs its bound, which the reach of that group has to say."""
    inputs = make((1, 64, 0, 64, 64, 32), generator, film=False)
    inputs |= {"weight": torch.full((64,), 3.0), "bias": torch.zeros(64)}
    inputs["x"][0, 2 * group, 9, 9] = -1e4
    packed = ops.pack_conv3x3(
        torch.eye(64)[:, :, None, None] * torch.eye(3)[1, :, None] * torch.eye(3)[1], "direct"
    )
    fused = ops.conv3x3_packed(inputs["x"], packed, norm=ops.group_norm_fold(**inputs))
    written = ops.group_norm_silu(**both(inputs))
    exact = reference.group_norm_silu(**upcast(both(inputs)))
    for got in (fused, written):
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_fold_of_halves_and_of_another_layout(dtype, generator):
    inputs = make(SHAPES[3], generator, dtype=dtype)
    fold = ops.group_norm_fold(**inputs)
    assert fold.dtype == torch.float32
    torch.testing.assert_close(
        fold, ops.group_norm_fold(**inputs | upcast_floats(inputs)), rtol=1e-5, atol=1e-5
    )
    contiguous = {name: inputs[name].contiguous() for name in ("x", "skip")}
    assert torch.equal(ops.group_norm_fold(**inputs | contiguous), fold)


def upcast_floats(inputs: dict) -> dict:
    return {name: inputs[name].float() for name in ("x", "skip")}


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_convolution_of_a_norm(shape, algorithm, mean, generator, poisoned):
    inputs = make(shape, generator, mean=MEANS[mean][0], std=MEANS[mean][1])
    joined = both(inputs)
    batch, channels, *side = joined["x"].shape
    weight = torch.randn(33, channels, 3, 3, generator=generator) / (9 * channels) ** 0.5
    bias = torch.randn(33, generator=generator)
    plus = channels_last(torch.randn(batch, 33, *side, generator=generator))
    packed, fold = ops.pack_conv3x3(weight, algorithm), ops.group_norm_fold(**inputs)
    got = ops.conv3x3_packed(inputs["x"], packed, bias, plus=plus, skip=inputs["skip"], norm=fold)
    h = reference.group_norm_silu(**upcast(joined))
    exact = F.conv2d(h, weight.double(), bias.double(), padding=1) + plus
    eager = F.conv2d(F.silu(eager_norm(**joined)), weight, bias, padding=1) + plus
    check_error(got, eager, exact, growth(algorithm))
    if inputs["skip"] is not None:
        concatenation = ops.conv3x3_packed(both(inputs)["x"], packed)
        assert torch.equal(ops.conv3x3_packed(inputs["x"], packed, skip=inputs["skip"]), concatenation)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_in_bfloat16(shape, algorithm, generator, poisoned):
    inputs = make(shape, generator, dtype=torch.bfloat16)
    inputs = {name: v.bfloat16() if isinstance(v, Tensor) else v for name, v in inputs.items()}
    joined = both(inputs)
    batch, channels, *side = joined["x"].shape
    weight = torch.randn(33, channels, 3, 3, generator=generator) / (9 * channels) ** 0.5
    plus = channels_last(torch.randn(batch, 33, *side, generator=generator).bfloat16())
    weight, fold = weight.bfloat16(), ops.group_norm_fold(**inputs)
    packed = ops.pack_conv3x3(weight, algorithm)
    got = ops.conv3x3_packed(inputs["x"], packed, plus=plus, skip=inputs["skip"], norm=fold)
    h = reference.group_norm_silu(**upcast(joined))
    exact = F.conv2d(h, weight.double(), padding=1) + plus
    check_error(got, F.conv2d(F.silu(eager_norm(**joined)), weight, padding=1) + plus, exact)
    if inputs["skip"] is not None:
        concatenation = ops.conv3x3_packed(joined["x"], packed)
        assert torch.equal(ops.conv3x3_packed(inputs["x"], packed, skip=inputs["skip"]), concatenation)

    x, skip = (v if v is None else v.permute(0, 2, 3, 1).flatten(1, 2) for v in (inputs["x"], inputs["skip"]))
    weight = weight[:, :, 0, 0]
    fold = ops.group_norm_fold(**inputs | {"shift": None})
    rows = reference.group_norm_silu(**upcast(joined) | {"shift": None}, act="none")
    rows, eager = (
        v.permute(0, 2, 3, 1).flatten(1, 2) for v in (rows, eager_norm(**joined | {"shift": None}))
    )
    got = ops.linear_packed(x, ops.pack_linear(weight), skip=skip, norm=fold)
    check_error(got, eager @ weight.t(), rows @ weight.t().double())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_linear_layer_of_a_norm(shape, generator, poisoned):
    def rows(v: Tensor | None) -> Tensor | None:
        return None if v is None else v.permute(0, 2, 3, 1).flatten(1, 2)

    inputs = make(shape, generator, film=False)
    joined = both(inputs)
    weight = torch.randn(40, joined["x"].shape[1], generator=generator)
    packed, x, skip = ops.pack_linear(weight), rows(inputs["x"]), rows(inputs["skip"])
    got = ops.linear_packed(x, packed, skip=skip, norm=ops.group_norm_fold(**inputs))
    exact = rows(reference.group_norm_silu(**upcast(joined), act="none")) @ weight.double().t()
    check_error(got, rows(eager_norm(**joined)) @ weight.t(), exact)
    if skip is not None:
        concatenation = ops.linear_packed(rows(joined["x"]), packed)
        assert torch.equal(ops.linear_packed(x, packed, skip=skip), concatenation)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_threads_batches_and_a_norm_that_is_written_give_the_same_bits(algorithm, generator, one_thread):
    inputs = make((5, 96, 32, 17, 19, 32), generator)
    packed = ops.pack_conv3x3(torch.randn(64, 128, 3, 3, generator=generator), algorithm)

    def run(**given) -> Tensor:
        fold = ops.group_norm_fold(**given)
        return ops.conv3x3_packed(given["x"], packed, skip=given["skip"], norm=fold)

    expected = run(**inputs)
    assert torch.equal(expected, ops.conv3x3_packed(ops.group_norm_silu(**both(inputs)), packed))
    one = {name: inputs[name][3:4] for name in ("x", "skip", "add", "scale", "shift")}
    assert torch.equal(run(**inputs | one), expected[3:4])
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        assert torch.equal(run(**inputs), expected)
        assert torch.equal(run(**inputs | one), expected[3:4])


def test_opcheck(generator):
    inputs = make((2, 20, 13, 5, 7, 11), generator)
    names = ("x", "skip", "num_groups", "weight", "bias")
    given = *(inputs[name] for name in names), 1e-5, inputs["add"], inputs["scale"], inputs["shift"]
    torch.library.opcheck(torch.ops.ddpm_fast.group_norm_fold.default, given)
    torch.library.opcheck(
        torch.ops.ddpm_fast.group_norm_fold.default, (*given[:1], None, 5, None, None, 0.0, None, None, None)
    )
    x, skip, fold = inputs["x"], inputs["skip"], ops.group_norm_fold(**inputs)
    packed = ops.pack_conv3x3(torch.randn(9, 33, 3, 3)).weight
    torch.library.opcheck(
        torch.ops.ddpm_fast.conv3x3_packed.default, (x, packed, None, None, 9, 2, 2, 0, 0, skip, fold)
    )
    packed = ops.pack_linear(torch.randn(9, 33)).weight
    x, skip = (v.permute(0, 2, 3, 1).reshape(-1, v.shape[1]) for v in (x, skip))
    torch.library.opcheck(torch.ops.ddpm_fast.linear_packed.default, (x, packed, None, None, 9, skip, fold))


def test_bad_input():
    x, skip = (channels_last(torch.zeros(2, c, 5, 7)) for c in (8, 4))
    packed, linear = ops.pack_conv3x3(torch.zeros(3, 12, 3, 3)), ops.pack_linear(torch.zeros(3, 12))
    fold = ops.group_norm_fold(x, 4, skip=skip)
    for given, error, words in (
        ({"x": x[0]}, ValueError, "x must have at least 4 dimensions"),
        ({"num_groups": 5}, ValueError, "num_groups must divide x and skip's 12 channels, got 5"),
        ({"skip": skip[:1]}, ValueError, "skip must be like x"),
        ({"skip": skip.bfloat16()}, ValueError, "skip must be like x"),
        ({"weight": torch.zeros(8)}, ValueError, r"weight must have shape \(12,\)"),
        ({"x": x.double(), "skip": skip.double()}, RuntimeError, "group_norm_silu kernel takes .*float32"),
        ({"weight": torch.zeros(12, requires_grad=True)}, ValueError, "which a fold does not have"),
    ):
        with pytest.raises(error, match=words):
            ops.group_norm_fold(**{"x": x, "num_groups": 4, "skip": skip} | given)
    for given, words in (
        ({}, "x must be .*12.* or have fewer channels and a skip"),
        ({"skip": x}, r"skip must be \(2, 4, 5, 7\)"),
        ({"skip": skip[..., :6]}, r"skip must be \(2, 4, 5, 7\)"),
        ({"skip": skip, "norm": fold[:1]}, r"norm must be \(2, 4, 12\)"),
        ({"skip": skip, "norm": fold.double()}, r"norm must be \(2, 4, 12\) torch.float32"),
    ):
        with pytest.raises(ValueError, match=words):
            ops.conv3x3_packed(x, packed, **given)
        with pytest.raises(
            ValueError, match=words.replace("channels", "features").replace("4, 5, 7", "5, 7, 4")
        ):
            given = {name: v.permute(0, 2, 3, 1) if name == "skip" else v for name, v in given.items()}
            ops.linear_packed(x.permute(0, 2, 3, 1), linear, **given)
    for operands in ((skip[:1], None), (None, fold), (skip, fold[:1]), (skip.bfloat16(), fold)):
        with pytest.raises(ValueError, match=r"(skip|norm|packed) must be"):
            torch.ops.ddpm_fast.conv3x3_packed(x, packed.weight, None, None, 3, 2, 2, 0, 0, *operands)


# ---- in the network ----


class Names(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.name())
        return func(*args, **kwargs or {})


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return module.eval()


@pytest.fixture(params=[True, False], ids=["amx", "blas"])
def amx(request, monkeypatch) -> bool:
    monkeypatch.setattr(convolution, "has_amx", lambda: request.param)
    return request.param


def apart(module: torch.nn.Module) -> torch.nn.Module:
    """The same module in float64, where every norm is written."""
    return copy.deepcopy(module).double()


@pytest.mark.parametrize("scale_shift", [False, True])
def test_a_residual_block_writes_no_norm_and_no_concatenation(scale_shift, amx, generator):
    config = UNetConfig(
        (96,), (False,), (False,), resnet_time_scale_shift="scale_shift" if scale_shift else "default"
    )
    block = randomised(ResBlock(96, 64, config))
    x, skip = (channels_last(torch.randn(2, c, 9, 7, generator=generator)) for c in (64, 32))
    time, bias = torch.randn(2, 64 * (1 + scale_shift), generator=generator), block.last_bias()
    with torch.no_grad(), packing({}):
        with Names() as names:
            got = block(x, time, bias, skip)
        exact = apart(block)(x.double(), time.double(), bias.double(), skip.double())
    check_error(got, block(x, time, bias, skip), exact, 2)
    assert names.seen.count("ddpm_fast::group_norm_fold") == 2
    assert "aten::cat" not in names.seen and ("ddpm_fast::linear_packed" in names.seen) == amx
    assert not any("group_norm_silu" in name for name in names.seen)


def test_where_a_residual_block_writes_its_norms(generator):
    config = UNetConfig((96,), (False,), (False,), dropout=0.5)
    x = channels_last(torch.randn(1, 96, 16, 16, generator=generator))
    time = torch.randn(1, 96, generator=generator)

    def folds(block: ResBlock, x: Tensor) -> int:
        with torch.no_grad(), packing({}), Names() as names:
            block(x, time, None)
        return names.seen.count("ddpm_fast::group_norm_fold")

    block = randomised(ResBlock(96, 96, config))
    assert folds(block, x) == 2 and folds(block.train(), x) == 1
    assert folds(block.eval(), x.contiguous()) == 0
    assert folds(randomised(ResBlock(96, 96, config, resize="down")), x) == 1
    with torch.no_grad(), Names() as names:
        block.float()(x, time, None)
    assert "ddpm_fast::group_norm_fold" not in names.seen


def test_a_concatenation_that_is_its_own_shortcut_is_built(generator):
    block = randomised(ResBlock(96, 96, UNetConfig((96,), (False,), (False,))))
    x, skip = (channels_last(torch.randn(1, c, 16, 16, generator=generator)) for c in (64, 32))
    time = torch.randn(1, 96, generator=generator)
    with torch.no_grad():
        written = block(x, time, None, skip)
        with packing({}):
            got = block(x, time, None, skip)
    check_error(got, written, apart(block)(x.double(), time.double(), None, skip.double()), 2)


def test_a_hook_sees_what_it_saw(generator):
    x, skip = (channels_last(torch.randn(1, c, 16, 16, generator=generator)) for c in (64, 32))
    time = torch.randn(1, 64, generator=generator)
    for name, channels in (
        ("conv1", 96),
        ("norm2", 64),
        ("conv2", 64),
        ("dropout", 64),
        ("conv_shortcut", 96),
    ):
        block, seen = randomised(ResBlock(96, 64, UNetConfig((96,), (False,), (False,)))), []
        with torch.no_grad(), packing({}):
            expected = block(x, time, block.last_bias(), skip)
            getattr(block, name).register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0]))
            got = block(x, time, block.last_bias(), skip)
        assert [v.shape[1] for v in seen] == [channels]
        assert name in ("norm2", "conv_shortcut") or seen[0].min() > -0.28  # a SiLU's least
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    block.norm2 = torch.nn.GroupNorm(8, 64)  # replaced: it is called, and takes no time embedding
    with torch.no_grad(), packing({}), pytest.raises(TypeError, match="add"):
        block(x, time, block.last_bias(), skip)


def test_attention_and_the_last_layer(amx, generator):
    attention = randomised(Attention(64, 8, UNetConfig((64,), (True,), (True,))))
    x = channels_last(torch.randn(2, 64, 8, 6, generator=generator))
    with torch.no_grad():
        with packing({}), Names() as names:
            got = attention(x)
        check_error(got, attention(x), apart(attention)(x.double()), 2)
    assert names.seen.count("ddpm_fast::group_norm_fold") == amx
    model = randomised(UNet(UNetConfig((64,), (False,), (False,), mid_attention=False, sample_size=16)))
    x = channels_last(torch.randn(1, 3, 16, 16, generator=generator))
    with torch.no_grad(), packing({}), Names() as names:
        model(x, 3)
    written = [name for name in names.seen if "group_norm_silu" in name]
    assert not written and names.seen[-1] == "ddpm_fast::conv3x3_packed"
