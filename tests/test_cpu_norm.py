"""What the CPU's norm promises beyond the error rule: all of SiLU, a pilot anywhere, no autograd in vain.

And its gradient: the slope of SiLU anywhere, any width and layout, the same bits for any number of threads.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from op_cases import check_error_rule
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_fast import ops, reference
from ddpm_fast.ops import _dispatch
from ddpm_fast.ops.group_norm_silu import _reference_backward

pytestmark = pytest.mark.skipif(_dispatch.NATIVE_MISSING is not None, reason=str(_dispatch.NATIVE_MISSING))

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def silu_of(y: Tensor, dtype: torch.dtype, layout: str, pixels: int) -> Tensor:
    """SiLU by the op: of a norm that is zero, shifted by y."""
    x = torch.zeros(1, len(y), pixels, 1, dtype=dtype).contiguous(memory_format=LAYOUTS[layout])
    got = ops.group_norm_silu(x, 1, shift=y[None], backend="native")
    assert all(torch.equal(got[0, :, k], got[0, :, 0]) for k in range(pixels))
    return got[0, :, 0, 0].double()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pixels", [3, 16, 64])  # a partial register, one, and the loop of several
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_silu_over_its_whole_range(dtype, pixels, layout):
    """The relative error is float32's, times |y| below zero (e^-y takes y's rounding), and one rounding.

    bfloat16's kernel may add 4.5e-4, the estimate of a reciprocal. Below -85 nothing is left of it.
    """
    magnitudes = torch.logspace(-30, 4, 500)
    dense = torch.linspace(-85, 100, 5001)
    y = torch.cat([dense, magnitudes, -magnitudes[magnitudes < 85], torch.zeros(1)])
    got, exact = silu_of(y, dtype, layout, pixels), F.silu(y.double())
    error = (got - exact).abs()
    allowed = (3 + y.double().clamp(max=0).abs()) * torch.finfo(torch.float32).eps * exact.abs()
    if dtype != torch.float32:
        allowed += torch.finfo(dtype).eps / 2 * exact.abs()
    if dtype == torch.float16:
        allowed += 2**-25  # half of its smallest subnormal
    if dtype == torch.bfloat16:
        allowed += 4.5e-4 * exact.abs()
    worst = (error / allowed.clamp(min=1e-38)).argmax()
    assert (error <= allowed + 1e-36).all(), f"silu({y[worst]}) = {got[worst]}, not {exact[worst]}"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pixels", [3, 16, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_silu_where_the_exponential_overflows(dtype, pixels, layout):
    y = torch.tensor(
        [-86.0, -88.0, -90.0, -128.0, -1e3, -1e10, -3e38, 90.0, 1e10, 3e38, torch.inf, torch.nan]
    )
    got = silu_of(y[:-1], dtype, layout, pixels)
    assert (got[:7].abs() <= 1e-35).all() and (got[:7] <= 0).all()
    torch.testing.assert_close(got[7:], y[7:-1].to(dtype).double())
    x = torch.zeros(1, len(y), pixels, 1, dtype=dtype).contiguous(memory_format=LAYOUTS[layout])
    nan = ops.group_norm_silu(x, 1, shift=y[None], backend="native").isnan()
    assert nan[0, -1].all() and nan.sum() == pixels


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pixels", [4, 16, 64])
def test_a_nan_of_any_payload_stays(pixels, layout):
    """Rounding 0x7fffffff to bfloat16 by its bits would give -0."""
    weight = torch.ones(32)
    weight.view(torch.int32)[5] = 0x7FFFFFFF
    x = torch.randn(1, 32, pixels, 1).bfloat16().contiguous(memory_format=LAYOUTS[layout])
    nan = ops.group_norm_silu(x, 8, weight, backend="native").isnan()
    assert nan[0, 5].all() and nan.sum() == pixels


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("size", [4, 16, 32])
@pytest.mark.parametrize("first", [1e-3, 1.0, 1e3])
def test_a_pilot_far_from_the_mean(first, size, add, layout, generator):
    """The first eighth of the pixels, which the sums run about, is of another mean; and of one as large."""
    for mean in (0.0, 1e4):
        x = mean + 1e-2 * torch.randn(2, 40, size, size, generator=generator, dtype=torch.float64)
        x[:, :, : max(1, size // 8)] += first
        x = x.float().contiguous(memory_format=LAYOUTS[layout])
        plus = torch.randn(2, 40, generator=generator) if add else None
        given = {"num_groups": 8, "add": plus}
        exact = reference.group_norm_silu(
            x.double(), num_groups=8, add=None if plus is None else plus.double()
        )
        got = ops.group_norm_silu(x, **given, backend="native")
        error = (got - exact).abs().max().item()
        assert error <= 32 * torch.finfo(torch.float32).eps * exact.abs().max().item()


def test_bfloat16_pairs_of_every_width(generator):
    """Channels, groups and borders of two sources at every place of a register."""
    for channels in range(1, 81):
        for skip in (0, 1, 15, 16, 33):
            x = torch.randn(2, channels, 3, 3, generator=generator).bfloat16()
            x = x.contiguous(memory_format=torch.channels_last)
            other = torch.randn(2, skip, 3, 3, generator=generator).bfloat16()
            both = torch.cat([x, other], 1)
            groups = next(g for g in (5, 4, 3, 2, 1) if both.shape[1] % g == 0)
            plus = torch.randn(2, both.shape[1], generator=generator).bfloat16()
            if skip:
                got = ops.group_norm_silu_concat(x, other, groups, add=plus, backend="native")
            else:
                got = ops.group_norm_silu(x, groups, add=plus, backend="native")
            eager = F.silu(F.group_norm(both + plus[:, :, None, None], groups))
            exact = reference.group_norm_silu(both.double(), groups, add=plus.double())
            check_error_rule(got, eager, exact, f"{channels} + {skip} channels")


class Names(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_autograd_is_a_function_and_left_out_without_a_gradient(generator):
    """The op without its registered autograd is called, whose gradient is a Function's: the op's own."""
    x, weight = torch.randn(2, 8, 4, 4, generator=generator), torch.ones(8, requires_grad=True)

    def run(weight: Tensor) -> Tensor:
        with Names() as names:
            y = ops.group_norm_silu(x, 4, weight)
        assert names.seen == ["ddpm_fast.group_norm_silu_forward.default"]
        return y

    y = run(weight)
    assert y.requires_grad
    registered = torch.ops.ddpm_fast.group_norm_silu(x, 4, weight, None, 1e-5, None, None, None, True)
    assert torch.equal(y, registered)
    got, expected = (torch.autograd.grad(v.square().sum(), weight)[0] for v in (y, registered))
    assert torch.equal(got, expected) and bool(got.abs().min() > 0)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert torch.equal(run(weight), y) and not run(weight).requires_grad
    assert not run(weight.detach()).requires_grad


def test_opcheck_of_the_forward_ops(generator):
    x, weight = torch.randn(2, 8, 4, 4, generator=generator), torch.ones(8)
    args = (weight, weight, 1e-5, None, None, None, True)
    torch.library.opcheck(torch.ops.ddpm_fast.group_norm_silu_forward.default, (x, 4, *args))
    both = torch.ones(16)
    args = (both, both, 1e-5, None, None, None, True, True)
    torch.library.opcheck(torch.ops.ddpm_fast.group_norm_silu_concat_forward.default, (x, x, 4, *args))
    t, table = torch.tensor([3, 4]), torch.rand(10, 2, generator=generator)
    torch.library.opcheck(torch.ops.ddpm_fast.q_sample_forward.default, (x, x, t, table))
    seeds = (torch.tensor(1), torch.arange(2))
    torch.library.opcheck(torch.ops.ddpm_fast.q_sample_counter_forward.default, (x, t, table, *seeds))


# ---- gradients ----


def gradients(grad: Tensor, x: Tensor, groups: int, *operands: Tensor | None, silu: bool = True):
    """To x, weight, bias, add, scale, shift, by the kernel; `operands` are the latter five."""
    weight, bias, *by_sample = operands
    return torch.ops.ddpm_fast.group_norm_silu_backward(grad, x, groups, weight, bias, 1e-5, *by_sample, silu)


def exact_gradients(grad: Tensor, x: Tensor, groups: int, *operands: Tensor | None, silu: bool = True):
    weight, bias, *by_sample = (None if v is None else v.double() for v in operands)
    return _reference_backward(grad.double(), x.double(), groups, weight, bias, 1e-5, *by_sample, silu)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pixels", [3, 16, 64])
def test_slope_of_silu_over_its_whole_range(pixels, layout):
    """The gradient to `shift` of a norm that is zero: equal slopes, each to a few last digits."""
    magnitudes = torch.logspace(-30, 38, 500)
    y = torch.cat([torch.linspace(-86, 100, 5001), magnitudes, -magnitudes, torch.tensor([0.0, torch.inf])])
    x = torch.zeros(1, len(y), pixels, 1).contiguous(memory_format=LAYOUTS[layout])
    got = gradients(torch.ones_like(x), x, 1, None, None, None, None, y[None])[5][0].double() / pixels
    exact_y = y.double().clamp(-800, 800)
    gate, rest = exact_y.sigmoid(), (-exact_y).sigmoid()
    exact = gate * (1 + exact_y * rest)
    # Below zero e^y takes y's rounding; about its zero at -1.28 the slope is a difference of two gates.
    allowed = (4 + exact_y.clamp(-90, 0).abs()) * torch.finfo(torch.float32).eps
    allowed = allowed * (gate + (exact_y * gate * rest).abs()) + 1e-35
    error = (got - exact).abs()
    worst = (error / allowed).argmax()
    assert (error <= allowed).all(), f"slope at {y[worst]}: {got[worst]}, not {exact[worst]}"


def norm_inputs(generator: torch.Generator, shape: tuple[int, ...], dtype=torch.float32):
    """grad, x and the five operands."""
    batch, channels = shape[:2]
    shapes = [shape, shape, (channels,), (channels,), *[(batch, channels)] * 3]
    return [torch.randn(s, generator=generator).to(dtype) for s in shapes]


def check_near(got: tuple[Tensor, ...], exact: tuple[Tensor, ...], eps: float, what: str) -> None:
    for name, g, e in zip(("x", "weight", "bias", "add", "scale", "shift"), got, exact, strict=False):
        error, largest = (g.double() - e).abs().max().item(), e.abs().max().item()
        assert error <= eps * largest, f"{what}: {name} is off by {error:.3g} of {largest:.3g}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [1, 3, 4])
@pytest.mark.parametrize("silu", [True, False])
def test_gradients_of_every_width(silu, size, layout, dtype, generator):
    """Channels and pixels that end at every place of a register, with every operand."""
    few = layout == "contiguous" and size > 1  # there the channels do not share registers
    for channels in range(13 if size == 1 else 6, 81, 9 if few else 1):
        # A group of one channel has no gradient to `add`, and one of few elements hardly one to x.
        enough = max(2, 12 // size**2)
        groups = next(g for g in (3, 2, 1) if channels % g == 0 and (channels >= enough * g or g == 1))
        grad, x, *operands = norm_inputs(generator, (2, channels, size, size), dtype)
        grad, x = (v.contiguous(memory_format=LAYOUTS[layout]) for v in (grad, x))
        got = gradients(grad, x, groups, *operands, silu=silu)
        assert got[0].stride() == x.stride()
        for g, like in zip(got, (x, *operands), strict=True):
            assert g.dtype == dtype and g.shape == like.shape
        exact = exact_gradients(grad, x, groups, *operands, silu=silu)
        eps = 32 * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps
        check_near(got, exact, eps, f"{channels} channels in {groups} groups")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 96, 24, 24), (3, 80, 20, 20)])
def test_gradients_are_the_same_bits_with_any_threads(shape, layout, generator):
    grad, x, *operands = norm_inputs(generator, shape)
    x = x.contiguous(memory_format=LAYOUTS[layout])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = gradients(grad, x, 8, *operands)
        for count in (2, 3):
            torch.set_num_threads(count)
            assert all(map(torch.equal, gradients(grad, x, 8, *operands), alone))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gradient_in_any_layout_and_operands_in_any_dtype(layout, generator):
    grad, x, *operands = norm_inputs(generator, (3, 24, 5, 4))
    x = x.contiguous(memory_format=LAYOUTS[layout])
    expected = gradients(grad, x, 4, *operands)
    for other in (grad.contiguous(memory_format=torch.channels_last), grad.mT.contiguous().mT):
        assert all(map(torch.equal, gradients(other, x, 4, *operands), expected))
    ones = torch.ones(()).expand_as(grad)
    assert torch.equal(gradients(ones, x, 4, *operands)[0], gradients(ones.clone(), x, 4, *operands)[0])
    wide = gradients(grad, x, 4, *(v.double() for v in operands))
    assert all(g.dtype == torch.float64 for g in wide[1:])
    assert all(torch.equal(g.float(), e) for g, e in zip(wide, expected, strict=True))
    rows = torch.stack([*operands[2:]], 1).flatten(1).chunk(3, 1)  # rows of one tensor, as chunk gives them
    assert all(map(torch.equal, gradients(grad, x, 4, *operands[:2], *rows), expected))
    for k in range(5):  # only what was given has a gradient
        alone = [v if j == k else None for j, v in enumerate(operands)]
        got = gradients(grad, x, 4, *alone)
        assert [g.numel() > 0 for g in got[1:]] == [j == k for j in range(5)]
        check_near(got[:1], exact_gradients(grad, x, 4, *alone)[:1], 4e-6, f"operand {k} alone")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("add", [False, True])
def test_gradients_about_a_large_mean(add, layout, generator):
    """Mean 1e4, standard deviation 1e-2: a float holds neither the mean nor the mean less `add`."""
    grad, x, *operands = norm_inputs(generator, (2, 40, 16, 16))
    x = (1e4 + 1e-2 * x).contiguous(memory_format=LAYOUTS[layout])
    operands[2] = operands[2] if add else None
    got, exact = gradients(grad, x, 8, *operands), exact_gradients(grad, x, 8, *operands)
    given = [k for k in range(6) if got[k].numel()]
    for k in given:
        error = (got[k] - exact[k]).abs().max()
        assert error <= 1e-4 * exact[k].abs().max(), f"gradient {k}: {error:.3g}"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_stays_in_the_gradients_of_its_group(dtype, layout, generator):
    grad, x, *operands = norm_inputs(generator, (2, 32, 6, 5), dtype)
    for k in range(2):
        changed = [v.clone().contiguous(memory_format=LAYOUTS[layout]) for v in (grad, x)]
        changed[k][1, 9, 2, 3] = torch.nan
        nan = gradients(*changed, 8, *operands)[0].isnan()
        assert nan[1, 8:12].all() and nan.sum() == 4 * 30


def test_bad_gradients_are_named(generator):
    grad, x, *operands = norm_inputs(generator, (2, 8, 3, 3))
    for bad in (grad[:, :, :2], grad.bfloat16()):
        with pytest.raises(ValueError, match="grad must be like x"):
            gradients(bad, x, 4, *operands)
    with pytest.raises(ValueError, match="num_groups must divide"):
        gradients(grad, x, 3, *operands)
