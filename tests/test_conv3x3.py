"""3x3 convolution by Winograd against float64: every algorithm and instruction set, edge tiles, odd channels.

Rounding errors of F(m, 3) are relative to the terms that it sums, which are larger than the result. For
independent inputs and taps of variance 1 the mean square of an output is 3, and that of its terms

    sum over points i of A[o, i]^2 (sum_k G[i, k]^2) (sum_j B[i, j]^2)

The root of their ratio, averaged over outputs, is the growth of one dimension; that of two is the product.
So the error rule holds for Winograd with all that it allows times the growth: 1.7 for F(2x2), 2.8 for F(4x2),
4.8 for F(4x4) with the points used here, 10.8 with the customary (0, +-1, +-2, infinity). F(2x2) of an image
twice as large and with stride 2 have matrices of their own, below, and 1.7.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import platform
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from instruction_sets import pass_on
from sanitized import ARRAYS, FLAGS, RUNS, run_sanitized
from torch import Tensor

from ddpm_fast import ops, reference
from ddpm_fast.ops import _dispatch
from ddpm_fast.ops.conv3x3 import ALGORITHMS, RESIZES

POINTS = {1: None, 2: (0, 1, -1), 4: (0, 5 / 8, -5 / 8, 3 / 2, -3 / 2)}  # and infinity, by outputs of a tile
DTYPES = [torch.float32, torch.bfloat16]  # that the kernels take
SHAPES = [  # (B, C, K, H, W)
    (1, 3, 128, 7, 5),
    (3, 33, 3, 1, 1),
    (1, 96, 33, 33, 31),
    (8, 128, 96, 4, 4),
    (3, 96, 128, 8, 8),
    (1, 128, 33, 32, 32),
    (1, 1, 1, 2, 9),
    (8, 33, 96, 3, 6),
]
RESIZING = [  # algorithm, resize, padding
    ("f2", "up", (1, 1)),
    ("direct", "down", (1, 1)),
    ("direct", "down", (0, 1)),
    ("f2", "down", (1, 1)),
    ("f2", "down", (0, 1)),
]
RESIZING_MATRICES = {  # (A', G, B') of two outputs, a list a row
    "up": (
        [[1, 1, 0], [0, 1, 1]],
        [[1, 0, 0], [1, 1, 1], [0, 0, 1]],
        [[1, -1, 0], [0, 1, 0], [0, -1, 1]],
    ),
    "down": (
        [[1, 1, 0, 0, 1], [0, 0, 1, 1, 1]],
        [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 1, 0], [1, 0, 1]],
        [[1, 0, -1, 0, 0], [0, 1, 0, 0, 0], [0, 0, -1, 0, 1], [0, 0, 0, 1, 0], [0, 0, 1, 0, 0]],
    ),
}


@pytest.fixture(autouse=True)
def native():
    if _dispatch.NATIVE_MISSING is not None:
        pytest.skip(_dispatch.NATIVE_MISSING)


def toom_cook(outputs: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(A', G, B') of F(outputs, 3), from its points."""
    points = POINTS[outputs]
    if points is None:
        return np.ones((1, 3)), np.eye(3), np.eye(3)
    size = outputs + 2
    to_outputs, of_taps, of_inputs = np.zeros((outputs, size)), np.zeros((size, 3)), np.zeros((size, size))
    for i, a in enumerate(points):
        others = [b for b in points if b != a]
        to_outputs[:, i] = np.power(float(a), np.arange(outputs))
        of_taps[i] = np.power(float(a), np.arange(3)) / math.prod(a - b for b in others)
        of_inputs[i, : size - 1] = np.poly(others)[::-1]
    to_outputs[-1, -1] = of_taps[-1, -1] = 1
    of_inputs[-1] = np.poly(points)[::-1]
    return to_outputs, of_taps, of_inputs


def matrices(outputs: int, resize: str | None) -> list[np.ndarray]:
    if resize is None or outputs == 1:
        return list(toom_cook(outputs))
    return [np.array(matrix, dtype=float) for matrix in RESIZING_MATRICES[resize]]


def growth(algorithm: str, resize: str | None = None) -> float:
    factor = 1.0
    for outputs in ALGORITHMS[algorithm]:
        to_outputs, of_taps, of_inputs = matrices(outputs, resize)
        terms = to_outputs**2 @ ((of_taps**2).sum(1) * (of_inputs**2).sum(1))
        factor *= float(np.sqrt(terms.mean() / 3))
    return factor


def make(shape, generator, *, dtype=torch.float32, mean=0.0, std=1.0, given=True) -> dict:
    batch, channels, out_channels, height, width = shape

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    return {
        "x": (mean + std * randn(batch, channels, height, width)).to(dtype),
        "weight": (randn(out_channels, channels, 3, 3) / (9 * channels) ** 0.5).to(dtype),
        "bias": randn(out_channels).to(dtype) if given else None,
        "plus": randn(batch, out_channels, height, width).to(dtype) if given else None,
    }


def eager(x, weight, bias, plus, resize=None, padding=(1, 1)):
    if resize == "up":
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
    if padding == (0, 1):
        x = F.pad(x, (0, 1, 0, 1))
    y = F.conv2d(x, weight, bias, stride=2 if resize == "down" else 1, padding=padding[0])
    return y if plus is None else y + plus


def upcast(inputs: dict) -> dict:
    return {name: None if value is None else value.double() for name, value in inputs.items()}


def channels_last(inputs: dict) -> dict:
    return {
        name: value.contiguous(memory_format=torch.channels_last)
        if name in ("x", "plus") and value is not None
        else value
        for name, value in inputs.items()
    }


def check_error(got: Tensor, inputs: dict, algorithm: str, **how) -> None:
    """err(kernel) <= growth (2 err(eager) + eps max|ref|), in the largest element and in the mean square."""
    exact = eager(**upcast(inputs), **how) if how else reference.conv3x3(**upcast(inputs))
    plain = eager(**inputs, **how)
    assert got.shape == exact.shape and got.dtype == plain.dtype
    eps = torch.finfo(got.dtype).eps
    for size in (lambda v: v.abs().max().item(), lambda v: v.square().mean().sqrt().item()):
        error = size(got - exact)
        allowed = growth(algorithm, how.get("resize")) * (2 * size(plain - exact) + eps * size(exact))
        assert error <= allowed, f"{algorithm}: {error:.3g} > {allowed:.3g}"


@pytest.mark.parametrize("outputs", [2, 4])
def test_the_matrices_of_the_derivation_convolve(outputs):
    to_outputs, of_taps, of_inputs = toom_cook(outputs)
    d, g = np.random.default_rng(0).normal(size=(2, outputs + 2))
    y = to_outputs @ ((of_taps @ g[:3]) * (of_inputs @ d))
    np.testing.assert_allclose(y, np.correlate(d, g[:3]), atol=1e-12)


@pytest.mark.parametrize("resize", RESIZING_MATRICES)
def test_the_matrices_that_resize_convolve(resize):
    to_outputs, of_taps, of_inputs = matrices(2, resize)
    d, g = np.random.default_rng(0).normal(size=(2, 5))
    d = d[: of_inputs.shape[1]]
    y = to_outputs @ ((of_taps @ g[:3]) * (of_inputs @ d))
    whole = np.correlate(d.repeat(2)[1:5] if resize == "up" else d, g[:3])
    np.testing.assert_allclose(y, whole if resize == "up" else whole[::2], atol=1e-12)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("given", [True, False], ids=["bias-and-plus", "plain"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, algorithm, given, layout, generator, poisoned):
    inputs = make(shape, generator, given=given)
    inputs = channels_last(inputs) if layout == "channels_last" else inputs
    got = ops.conv3x3(**inputs, algorithm=algorithm, backend="native")
    check_error(got, inputs, algorithm)
    assert got.stride() == got.contiguous(memory_format=reference.memory_format(inputs["x"])).stride()


@pytest.mark.parametrize("algorithm,resize,padding", RESIZING)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_resizing_against_float64(shape, algorithm, resize, padding, generator, poisoned):
    if padding == (0, 1) and min(shape[3:]) < 2:
        pytest.skip("no window is whole")
    how = {"resize": resize, "padding": padding}
    for given in (True, False):
        inputs = make(shape, generator, given=given)
        y = eager(**inputs | {"plus": None}, **how)
        inputs["plus"] = torch.randn(y.shape, generator=generator) if given else None
        if shape[0] != 3:
            inputs = channels_last(inputs)
        packed = ops.pack_conv3x3(inputs["weight"], algorithm, resize)
        got = ops.conv3x3_packed(inputs["x"], packed, inputs["bias"], plus=inputs["plus"], padding=padding)
        check_error(got, inputs, algorithm, **how)
        assert got.stride() == got.contiguous(memory_format=reference.memory_format(inputs["x"])).stride()


@pytest.mark.parametrize("algorithm,resize,padding", RESIZING)
def test_resizing_an_image_is_the_same_in_any_batch_and_with_any_threads(
    algorithm, resize, padding, generator, one_thread
):
    inputs = channels_last(make((5, 96, 40, 17, 19), generator, given=False))
    packed = ops.pack_conv3x3(inputs["weight"], algorithm, resize)
    expected = ops.conv3x3_packed(inputs["x"], packed, padding=padding)
    assert torch.equal(ops.conv3x3_packed(inputs["x"][3:4], packed, padding=padding), expected[3:4])
    for count in (2, 3, 7):
        torch.set_num_threads(count)
        assert torch.equal(ops.conv3x3_packed(inputs["x"], packed, padding=padding), expected)


@pytest.mark.parametrize("given", [True, False], ids=["bias-and-plus", "plain"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bfloat16_against_float64(shape, algorithm, given, generator, poisoned):
    """Products and sums are in float32: no tile is allowed any growth, and no element a second rounding."""
    inputs = make(shape, generator, dtype=torch.bfloat16, given=given)
    inputs = channels_last(inputs) if given else inputs
    got = ops.conv3x3(**inputs, algorithm=algorithm, backend="native")
    check_error(got, inputs, "direct")
    exact = reference.conv3x3(**upcast(inputs))
    assert ((got - exact).abs() <= 2**-8 * exact.abs() + 8e-6 * exact.abs().max()).all()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_large_mean_with_a_tiny_variance(algorithm, generator):
    for mean in (1e4, -1e4):
        inputs = make((2, 96, 33, 9, 13), generator, mean=mean, std=1e-2)
        check_error(ops.conv3x3(**inputs, algorithm=algorithm, backend="native"), inputs, algorithm)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_bfloat16_of_a_large_mean(algorithm, generator):
    for mean in (1e4, -1e4):
        inputs = make((2, 96, 33, 9, 13), generator, dtype=torch.bfloat16, mean=mean, std=128)
        check_error(ops.conv3x3(**inputs, algorithm=algorithm, backend="native"), inputs, algorithm)


@pytest.mark.parametrize(
    "algorithm,bound", [("direct", 1.2e-6), ("f2", 0.8e-6), ("f4x2", 1.6e-6), ("f4", 2.5e-6)]
)
def test_the_error_of_a_wide_layer(algorithm, bound, generator):
    """In the 2-norm, relative to the result."""
    inputs = channels_last(make((1, 512, 64, 16, 16), generator, given=False))
    exact = reference.conv3x3(**upcast(inputs))
    error = (ops.conv3x3(**inputs, algorithm=algorithm, backend="native") - exact).norm() / exact.norm()
    assert error <= bound


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_packed_is_the_same_to_the_bit(algorithm, dtype, generator, poisoned):
    for shape in ((3, 33, 96, 9, 7), (1, 256, 256, 4, 4)):  # the second fills a huge page
        inputs = channels_last(make(shape, generator, dtype=dtype))
        expected = ops.conv3x3(**inputs, algorithm=algorithm, backend="native")
        packed = ops.pack_conv3x3(inputs.pop("weight"), algorithm)
        assert torch.equal(
            ops.conv3x3_packed(inputs["x"], packed, inputs["bias"], plus=inputs["plus"]), expected
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_image_is_the_same_in_any_batch_and_with_any_threads(algorithm, dtype, generator):
    inputs = channels_last(make((5, 100, 96, 17, 19), generator, dtype=dtype))
    run = {"algorithm": algorithm, "backend": "native"}
    expected = ops.conv3x3(**inputs, **run)
    alone = {name: v[3:4] if name in ("x", "plus") else v for name, v in inputs.items()}
    assert torch.equal(ops.conv3x3(**alone, **run), expected[3:4])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            assert torch.equal(ops.conv3x3(**inputs, **run), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_what_is_not_finite_shows_where_it_is_read(algorithm, value, dtype, generator):
    inputs = channels_last(make((2, 96, 40, 16, 16), generator, dtype=dtype))
    run = {"algorithm": algorithm, "backend": "native"}
    expected = ops.conv3x3(**inputs, **run)
    inputs["x"][1, 70, 6, 9] = value
    got = ops.conv3x3(**inputs, **run)
    assert not got[1, :, 5:8, 8:11].isfinite().any()
    down, across = ALGORITHMS[algorithm]
    read = torch.zeros_like(got, dtype=torch.bool)
    read[1, :, 5 // down * down : -(-8 // down) * down, 8 // across * across : -(-11 // across) * across] = (
        True
    )
    assert torch.equal(got[~read], expected[~read])


@pytest.mark.skipif(
    platform.system() != "Linux" or platform.machine() != "x86_64", reason="flags are those of x86-64's libm"
)
@pytest.mark.parametrize(
    "algorithm,resize", [(name, resize) for resize in RESIZES for name in RESIZES[resize]]
)
def test_where_inputs_or_differences_vanish_nothing_is_denormal(algorithm, resize, generator, one_thread):
    """On AMX units of zeros once were tiny: their products took up to three times as long."""
    libm, denormal_or_underflow = ctypes.CDLL("libm.so.6"), 0x12
    inputs = channels_last(make((1, 96, 40, 16, 16), generator, given=False))
    x, weight = inputs["x"], inputs["weight"]
    packed, nothing = (ops.pack_conv3x3(w, algorithm, resize) for w in (weight, torch.zeros_like(weight)))
    for image, by in ((x.zero_(), packed), (torch.full_like(x, 0.1), packed), (torch.ones_like(x), nothing)):
        libm.feclearexcept(denormal_or_underflow)
        ops.conv3x3_packed(image, by)
        assert libm.fetestexcept(denormal_or_underflow) == 0
    weight[7, 70, 1, 1] = float("inf")
    y = ops.conv3x3_packed(x, ops.pack_conv3x3(weight, algorithm, resize))
    assert y[:, 7].isnan().all() and (y[:, :7] == 0).all()


def test_calls_at_once_share_nothing(generator, one_thread):
    cases = [channels_last(make(shape, generator, dtype=dtype)) for shape in SHAPES for dtype in DTYPES]
    cases = list(itertools.product(cases, ALGORITHMS)) * 2
    expected = [ops.conv3x3(**inputs, algorithm=algorithm, backend="native") for inputs, algorithm in cases]
    with ThreadPoolExecutor(4) as pool:
        got = pool.map(lambda case: ops.conv3x3(**case[0], algorithm=case[1], backend="native"), cases)
    assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_in_another_layout(dtype, generator):
    inputs = make((2, 33, 40, 5, 9), generator, dtype=dtype)
    expected = ops.conv3x3(**inputs, backend="native")
    inputs["weight"] = inputs["weight"].contiguous(memory_format=torch.channels_last)
    assert torch.equal(ops.conv3x3(**inputs, backend="native"), expected)


# ---- other dtypes, gradients, tracing ----


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_are_the_references(dtype, generator):
    inputs = make((2, 33, 40, 5, 9), generator, dtype=dtype)
    got = ops.conv3x3(**inputs)
    assert got.dtype == dtype
    check_error(got, inputs, "direct")
    with pytest.raises(RuntimeError, match=r"conv3x3 kernel takes .*float32, not"):
        ops.conv3x3(**inputs, backend="native")


def gradient_growth() -> float:
    """The same of the gradient to the weight, of which a tap is a sum over a tile's outputs."""
    to_outputs, of_taps, of_inputs = toom_cook(4)
    terms = (of_taps**2).T @ ((to_outputs**2).sum(0) * (of_inputs**2).sum(1))
    return float(terms.mean() / 4)


@pytest.mark.parametrize("backend", ["f2", "f4", "reference"])
@pytest.mark.parametrize(
    "shape", [(2, 5, 7, 6, 9), (3, 33, 40, 8, 8), (130, 48, 17, 4, 4), (1, 16, 3, 33, 5)]
)
def test_gradients(backend, shape, generator):
    """By the same rule; in several blocks of tiles, either layout of the weight, without bias and plus."""
    given = shape[1] != 33
    inputs = channels_last(make(shape, generator, given=given))
    if shape[0] > 2:
        inputs["weight"] = inputs["weight"].contiguous(memory_format=torch.channels_last)
    leaves = {name: v.requires_grad_() for name, v in inputs.items() if v is not None}
    upstream = torch.randn((shape[0], *shape[2:]), generator=generator)
    algorithm = {"algorithm": backend} if backend in ALGORITHMS else {"backend": backend}
    y = ops.conv3x3(**inputs, **algorithm)
    got = torch.autograd.grad(y, list(leaves.values()), upstream)
    plain = torch.autograd.grad(eager(**inputs), list(leaves.values()), upstream)
    exact = {name: v.detach().double().requires_grad_() for name, v in leaves.items()}
    y = eager(**{name: exact.get(name) for name in inputs})
    expected = torch.autograd.grad(y, list(exact.values()), upstream.double())
    of = {
        "x": growth(algorithm.get("algorithm", "direct")),
        "weight": gradient_growth(),
        "bias": 1,
        "plus": 1,
    }
    for name, g, p, e in zip(leaves, got, plain, expected, strict=True):
        assert g.stride() == leaves[name].stride() or name != "weight" or backend == "reference"
        for size in (lambda v: v.abs().max().item(), lambda v: v.square().mean().sqrt().item()):
            allowed = of[name] * (2 * size(p - e) + torch.finfo(g.dtype).eps * size(e))
            assert size(g - e) <= allowed, f"{name}: {size(g - e):.3g} > {allowed:.3g}"


def test_gradients_in_bfloat16_are_pytorch_s_own(generator):
    inputs = channels_last(make((2, 40, 33, 6, 9), generator, dtype=torch.bfloat16))
    leaves = [v.requires_grad_() for v in inputs.values()]
    got = torch.autograd.grad(ops.conv3x3(**inputs, algorithm="direct").sum(), leaves)
    for g, e in zip(got, torch.autograd.grad(eager(**inputs).sum(), leaves), strict=True):
        assert torch.equal(g, e)


def test_gradients_are_the_same_with_any_number_of_threads(generator, one_thread):
    x, weight, grad = (
        torch.randn(s, generator=generator) for s in ((70, 40, 8, 8), (33, 40, 3, 3), (70, 33, 8, 8))
    )
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(torch.ops.ddpm_fast.conv3x3_weight_gradient(grad, x, weight))
        found[-1] += (torch.ops.ddpm_fast.conv3x3_input_gradient(grad, weight, 4, 4),)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True))


def test_opcheck_in_bfloat16(generator):
    inputs = channels_last(make((2, 40, 33, 6, 9), generator, dtype=torch.bfloat16))
    packed = ops.pack_conv3x3(inputs["weight"], "direct").weight
    assert packed.dtype == torch.bfloat16
    operands = inputs["x"], packed, inputs["bias"], inputs["plus"], 33, 1, 1
    torch.library.opcheck(torch.ops.ddpm_fast.conv3x3_packed.default, operands)
    torch.library.opcheck(
        torch.ops.ddpm_fast.conv3x3_pack.default, (inputs["weight"], 1, 1, torch.empty_like(packed))
    )
    torch.library.opcheck(torch.ops.ddpm_fast.conv3x3.default, (*inputs.values(), 1, 1))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_opcheck(algorithm, generator):
    tile = ALGORITHMS[algorithm]
    for shape in ((2, 5, 33, 6, 9), (1, 3, 7, 1, 1)):
        inputs = channels_last(make(shape, generator))
        packed = ops.pack_conv3x3(inputs["weight"], algorithm).weight
        operands = inputs["x"], packed, inputs["bias"], inputs["plus"], shape[2], *tile
        torch.library.opcheck(torch.ops.ddpm_fast.conv3x3_packed.default, operands)
        torch.library.opcheck(
            torch.ops.ddpm_fast.conv3x3_pack.default, (inputs["weight"], *tile, torch.empty_like(packed))
        )
        leaves = [v.requires_grad_() for v in inputs.values()]
        torch.library.opcheck(torch.ops.ddpm_fast.conv3x3.default, (*leaves, *tile))
        torch.library.opcheck(torch.ops.ddpm_fast.conv3x3.default, (*leaves[:2], None, None, *tile))
        grad, (x, weight) = torch.ones(operands[3].shape), (v.detach() for v in leaves[:2])
        gradient = torch.ops.ddpm_fast.conv3x3_input_gradient.default
        torch.library.opcheck(gradient, (channels_last({"x": grad})["x"], weight, *tile))
        torch.library.opcheck(torch.ops.ddpm_fast.conv3x3_weight_gradient.default, (grad, x, weight))


@pytest.mark.parametrize("algorithm,resize,padding", RESIZING)
def test_opcheck_of_resizing(algorithm, resize, padding, generator):
    inputs = channels_last(make((2, 5, 33, 6, 9), generator, given=False))
    tile, kind = ALGORITHMS[algorithm], list(RESIZES).index(resize)
    packed = ops.pack_conv3x3(inputs["weight"], algorithm, resize).weight
    operands = inputs["x"], packed, None, None, 33, *tile, kind, 1 - padding[0]
    torch.library.opcheck(torch.ops.ddpm_fast.conv3x3_packed.default, operands)
    torch.library.opcheck(
        torch.ops.ddpm_fast.conv3x3_pack.default, (inputs["weight"], *tile, torch.empty_like(packed), kind)
    )


def test_traces_whole(generator):
    torch.compiler.reset()
    inputs = channels_last(make((2, 5, 33, 6, 9), generator))
    compiled = torch.compile(lambda **k: ops.conv3x3(**k, backend="native"), fullgraph=True, backend="eager")
    assert torch.equal(compiled(**inputs), ops.conv3x3(**inputs, backend="native"))


# ---- bad input ----


def good() -> dict:
    return {"x": torch.zeros(2, 3, 5, 5), "weight": torch.zeros(4, 3, 3, 3)}


@pytest.mark.parametrize(
    "change,error,words",
    [
        ({"x": torch.zeros(3, 5, 5)}, ValueError, r"x must .* got shape \(3, 5, 5\)"),
        ({"x": torch.zeros(1, 2, 3, 5, 5)}, ValueError, r"x must be \(B, C_in, H, W\)"),
        ({"x": torch.zeros(0, 3, 5, 5)}, ValueError, "x must be .* not empty"),
        ({"x": torch.zeros(2, 3, 5, 5, dtype=torch.int64)}, TypeError, "x must be float32"),
        ({"weight": torch.zeros(4, 3, 5, 5)}, ValueError, r"weight must be \(C_out, C_in, 3, 3\)"),
        ({"weight": torch.zeros(4, 2, 3, 3)}, ValueError, r"weight must be \(C_out, 3, 3, 3\)"),
        ({"weight": torch.zeros(4, 3, 3, 3).double()}, ValueError, "weight must be .*float32.*got.*float64"),
        ({"bias": torch.zeros(3)}, ValueError, r"bias must be \(4,\)"),
        ({"bias": 1.0}, TypeError, "bias must be a Tensor, got float"),
        ({"plus": torch.zeros(2, 4, 5, 4)}, ValueError, r"plus must be \(2, 4, 5, 5\)"),
        ({"plus": torch.zeros(2, 4, 5, 5).bfloat16()}, ValueError, "plus must be .*float32.*got.*bfloat16"),
        ({"algorithm": "f6"}, ValueError, "algorithm='f6' is not known; allowed: direct, f2, f4x2, f4"),
        ({"backend": "fast"}, ValueError, "backend='fast' is not known"),
        ({"backend": "triton"}, RuntimeError, "it has no conv3x3 kernel"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, str) else "",
)
def test_bad_input(change, error, words):
    with pytest.raises(error, match=words):
        ops.conv3x3(**good() | change)


def test_bad_input_to_a_packed_weight():
    weight, x = good()["weight"], good()["x"]
    packed = ops.pack_conv3x3(weight)
    with pytest.raises(TypeError, match="packed must be what pack_conv3x3 returned, got Tensor"):
        ops.conv3x3_packed(x, packed.weight)
    with pytest.raises(ValueError, match=r"x must be \(B, 3, H, W\) for such a weight"):
        ops.conv3x3_packed(x[:, :2], packed)
    with pytest.raises(RuntimeError, match=r"conv3x3 kernel takes .*float32, not .*float64"):
        ops.conv3x3_packed(x.double(), packed)
    with pytest.raises(RuntimeError, match=r"conv3x3 kernel takes .*float32, not .*float16"):
        ops.pack_conv3x3(weight.half())
    with pytest.raises(ValueError, match="packed must be what was made"):
        ops.conv3x3_packed(x.bfloat16(), packed)
    with pytest.raises(ValueError, match="packed must be in the weight's dtype"):
        torch.ops.ddpm_fast.conv3x3_pack(weight.bfloat16(), 2, 2, packed.weight)
    with pytest.raises(ValueError, match=r"weight must be \(C_out, C_in, 3, 3\)"):
        ops.pack_conv3x3(torch.zeros(4, 3, 1, 1))
    with pytest.raises(ValueError, match="a packed weight does not have: use conv3x3"):
        ops.conv3x3_packed(x.clone().requires_grad_(), packed)
    with pytest.raises(ValueError, match="packed must be what was made"):
        torch.ops.ddpm_fast.conv3x3_packed(x, packed.weight[1:], None, None, 4, 2, 2)
    with pytest.raises(ValueError, match="there are no tiles of 3 x 3 outputs"):
        torch.ops.ddpm_fast.conv3x3_packed(x, packed.weight, None, None, 4, 3, 3)


def test_bad_input_to_resizing():
    weight, x = good()["weight"], good()["x"]
    up, down = ops.pack_conv3x3(weight, resize="up"), ops.pack_conv3x3(weight, "direct", "down")
    with pytest.raises(ValueError, match="resize='left' is not known; allowed: None, up, down"):
        ops.pack_conv3x3(weight, resize="left")
    with pytest.raises(ValueError, match="algorithm='f4' has no resize='down'; allowed: direct, f2"):
        ops.pack_conv3x3(weight, "f4", "down")
    with pytest.raises(ValueError, match=r"padding must be \(1, 1\), or .* got \(0, 1\) with resize='up'"):
        ops.conv3x3_packed(x, up, padding=(0, 1))
    with pytest.raises(ValueError, match=r"padding must be .* got \(0, 0\) with resize='down'"):
        ops.conv3x3_packed(x, down, padding=(0, 0))
    with pytest.raises(ValueError, match=r"x must have two rows and columns .* got \(2, 3, 5, 1\)"):
        ops.conv3x3_packed(x[..., :1], down, padding=(0, 1))
    with pytest.raises(ValueError, match=r"plus must be \(2, 4, 10, 10\)"):
        ops.conv3x3_packed(x, up, plus=torch.zeros(2, 4, 5, 5))
    run = torch.ops.ddpm_fast.conv3x3_packed
    with pytest.raises(ValueError, match="no tiles of 2 x 2 outputs with resize = 3"):
        run(x, up.weight, None, None, 4, 2, 2, 3)
    with pytest.raises(ValueError, match="shift must be 0"):
        run(x, up.weight, None, None, 4, 2, 2, 1, 1)
    with pytest.raises(ValueError, match="shift must be 0"):
        run(x[..., :1], down.weight, None, None, 4, 1, 1, 2, 1)


# ---- instruction sets, addresses ----


@pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline"])
def test_every_instruction_set_passes(isa):
    """The best one runs in the other tests; the others are forced, each in its own process."""
    names = "against_float64 or large_mean or packed_is or any_batch or fingerprint or a_row or not_finite"
    names += " or of_a_norm or a_spike or a_fold_is"
    pass_on(isa, ("test_conv3x3.py", "test_linear.py", "test_norm_in_convolution.py"), names)


PROGRAM = """
#if defined(__AMX_INT8__)
#include "kernels/conv3x3_amx.h"
#include "kernels/conv3x3_amx_direct.h"
#define CONV3X3 Conv3x3Amx
template <int kTaps>
using DirectBFloat16 = ddpm_fast::cpu::Conv3x3AmxDirect<kTaps>;
#else
#include "kernels/conv3x3.h"
#define CONV3X3 Conv3x3
template <int kTaps>
using DirectBFloat16 =
    ddpm_fast::cpu::Conv3x3<1, 1, kTaps, ddpm_fast::cpu::Resize::kNone, ddpm_fast::cpu::BFloat16>;
#endif
#include "kernels/conv3x3_gradient.h"
ARRAYS
using namespace ddpm_fast::cpu;

// Rounded to T, as which they are given too.
template <typename T>
Array<T> rounded(const Array<float>& values, int64_t count) {
  Array<T> made(new T[count]);
  for (int64_t k = 0; k < count; ++k) {
    store(&made[k], load(&values[k], 1), 1);
    values[k] = load(&made[k], 1)[0];
  }
  return made;
}

double direct(
    const Conv3x3Shape& s, const Conv3x3Kernels& kernels, const float* x, const float* w, int64_t b,
    int64_t k, int64_t r, int64_t c) {
  const int64_t up = kernels.resize == Resize::kUp ? 2 : 1, stride = kernels.resize == Resize::kDown ? 2 : 1;
  const int64_t taps = kernels.taps, before = taps / 2 - s.shift;
  double sum = 0;
  for (int64_t i = 0; i < taps; ++i) {
    for (int64_t j = 0; j < taps; ++j) {
      const int64_t row = stride * r + i - before, column = stride * c + j - before;
      if (row < 0 || row >= up * s.height || column < 0 || column >= up * s.width) continue;
      const float* const pixel = x + ((b * s.height + row / up) * s.width + column / up) * s.in_channels;
      for (int64_t p = 0; p < s.in_channels; ++p) {
        sum += pixel[p] * w[((k * s.in_channels + p) * taps + i) * taps + j];
      }
    }
  }
  return sum;
}

// What a norm and its SiLU make of pixels; the first `split` channels go to one array, the others to another.
template <typename T>
void normalise(
    const Conv3x3Shape& s, const float* x, const float* fold, int64_t split, float* y, T* first, T* second) {
  const int64_t rest = s.in_channels - split, pixels = s.height * s.width;
  for (int64_t at = 0; at < s.batch * pixels * s.in_channels; ++at) {
    const int64_t c = at % s.in_channels, pixel = at / s.in_channels;
    const float* const numbers = fold + pixel / pixels * kFoldRows * s.in_channels + c;
    const double u = (double(x[at]) - numbers[0]) * numbers[s.in_channels] + numbers[2 * s.in_channels];
    y[at] = static_cast<float>(u / (1 + std::exp(-u)));
    store(c < split ? &first[pixel * split + c] : &second[pixel * rest + c - split], load(&x[at], 1), 1);
  }
}

template <typename T>
void check(const Conv3x3Kernels& kernels, const Conv3x3Shape& s, bool given) {
  const Conv3x3Plan plan = kernels.plan(s, 1 + s.in_channels % 3);
  const int64_t height = plan.out_height, width = plan.out_width, pixels = s.batch * height * width;
  const int64_t inputs = s.batch * s.height * s.width;
  const int64_t taps = kernels.taps * kernels.taps, weights = taps * s.in_channels * s.out_channels;
  const Array<float> x = floats(inputs * s.in_channels, 1), w = floats(weights, 2);
  const Array<float> bias = floats(s.out_channels, 3), plus = floats(pixels * s.out_channels, 4);
  const Array<float> packed = floats(plan.packed, 5), transformed = floats(plan.transformed, 6);
  const Array<float> scratch = floats(32 * plan.scratch, 9);
  const Array<float> products = floats(plan.products, 7), y = floats(pixels * s.out_channels, 8);
  const auto x_given = rounded<T>(x, inputs * s.in_channels);
  const auto plus_given = rounded<T>(plus, pixels * s.out_channels);
  const auto y_given = rounded<T>(y, pixels * s.out_channels);
  rounded<T>(w, weights);
  const int64_t split = given ? s.in_channels : (s.in_channels + 1) / 2, rest = s.in_channels - split;
  const int64_t numbers = kFoldRows * s.in_channels;
  const Array<float> normal = floats(inputs * s.in_channels, 10), fold = floats(s.batch * numbers, 11);
  const Array<T> first(new T[inputs * split]), second(new T[inputs * rest]);
  const Array<float> prepared = floats(plan.scratch + plan.pixels, 14);
  const bool normed = s.batch * s.height % 2 != 0;
  Conv3x3Input input = {x_given.get()};
  if (normed) {
    for (int64_t at = 0; at < s.batch * numbers; ++at) {  // the last row is a bound of |x - center|
      if (at % numbers >= 3 * s.in_channels) fold[at] = s.in_channels % 2 ? 1e9f : 2;
    }
    normalise(s, x.get(), fold.get(), split, normal.get(), first.get(), second.get());
    input = {first.get(), rest > 0 ? second.get() : nullptr, split, fold.get(), true};
    kernels.begin(plan, input, prepared.get());
  }
  kernels.pack(plan, {w.get(), taps * s.in_channels, taps, 1}, 0, plan.panels, packed.get(), scratch.get());
  for (int64_t block = 0; block < plan.blocks; ++block) {
    kernels.transform(plan, input, block, 0, plan.block, transformed.get(), prepared.get());
    kernels.run(
        plan, transformed.get(), packed.get(), given ? bias.get() : nullptr,
        given ? plus_given.get() : nullptr, y_given.get(), block, 0, plan.panels, products.get());
  }
  const float* const seen = normed ? normal.get() : x.get();
  const double terms = 9 * s.in_channels + 2, of_halves = normed ? 0.02 * std::sqrt(terms) : 0;
  for (int64_t at = 0; at < pixels * s.out_channels; ++at) {
    const int64_t k = at % s.out_channels, pixel = at / s.out_channels, c = pixel % width;
    const int64_t r = pixel / width % height, b = pixel / width / height;
    const double exact =
        direct(s, kernels, seen, w.get(), b, k, r, c) + (given ? bias[k] + plus[at] : 0);
    const double got = load(&y_given[at], 1)[0];
    const double rounding = sizeof(T) == 2 ? std::abs(exact) / 256 + of_halves : 0;
    if (!(std::abs(got - exact) < 1e-5 * terms + rounding)) {
      std::printf(
          "%ld x %ld, %ld %ld %ld %ld %ld: %g, not %g\\n", (long)kernels.down, (long)kernels.across,
          (long)s.batch, (long)s.height, (long)s.width, (long)s.in_channels, (long)s.out_channels, got,
          exact);
      std::exit(1);
    }
  }
}

void check_gradient(const Conv3x3Shape& s) {
  constexpr Conv3x3GradientKernels kernels = Conv3x3Gradient::kKernels;
  const Conv3x3Plan plan = kernels.plan(s);
  const int64_t pixels = s.batch * s.height * s.width, taps = 9 * s.in_channels * s.out_channels;
  const Array<float> x = floats(pixels * s.in_channels, 1), grad = floats(pixels * s.out_channels, 2);
  const Array<float> inputs = floats(plan.transformed, 3), gradients = floats(plan.products, 4);
  const Array<float> sums = floats(plan.packed, 5);
  const Array<float> weight = floats(taps, 6), bias = floats(s.out_channels, 7);
  for (int64_t block = 0; block < plan.blocks; ++block) {
    kernels.transform(plan, x.get(), grad.get(), block, 0, plan.block, inputs.get(), gradients.get());
    kernels.accumulate(
        plan, inputs.get(), gradients.get(), block, 0, plan.panels * kernels.tasks, sums.get());
  }
  const Conv3x3Weight<float> to = {weight.get(), 9 * s.in_channels, 1, s.in_channels};
  kernels.finish(plan, sums.get(), 0, plan.panels, to, bias.get());
  for (int64_t k = 0; k < s.out_channels; ++k) {
    double exact_bias = 0;
    for (int64_t p = 0; p < pixels; ++p) exact_bias += grad[p * s.out_channels + k];
    bool good = std::abs(bias[k] - exact_bias) < 1e-5 * pixels;
    for (int64_t c = 0; c < s.in_channels; ++c) {
      for (int64_t tap = 0; tap < 9; ++tap) {
        double exact = 0;
        for (int64_t p = 0; p < pixels; ++p) {
          const int64_t row = p / s.width % s.height + tap / 3 - 1, column = p % s.width + tap % 3 - 1;
          if (row < 0 || row >= s.height || column < 0 || column >= s.width) continue;
          const int64_t from = p / (s.width * s.height) * s.width * s.height + row * s.width + column;
          exact += double(grad[p * s.out_channels + k]) * x[from * s.in_channels + c];
        }
        good = good && std::abs(*to.at(k, c, tap) - exact) < 1e-5 * (pixels + 2);
      }
    }
    if (!good) {
      std::printf(
          "gradient, %ld %ld %ld %ld %ld\\n", (long)s.batch, (long)s.height, (long)s.width,
          (long)s.in_channels, (long)s.out_channels);
      std::exit(1);
    }
  }
}

int main() {
RUNS
  const int64_t sides[][2] = {{1, 1}, {7, 5}, {4, 4}, {8, 8}, {3, 30}, {33, 31}};
#if defined(__AMX_INT8__)
  const int64_t channels[][2] = {{65, 33}, {300, 1}, {64, 200}};
#else
  const int64_t channels[][2] = {{3, 33}, {33, 3}, {16, 32}, {1, 1}, {35, 65}};
#endif
  for (const auto& side : sides) {
    for (const auto& c : channels) {
      for (const int64_t batch : {1, 3}) {
        const Conv3x3Shape shape = {side[0] > 8 ? 1 : batch, side[0], side[1], c[0], c[1]};
        Conv3x3Shape padded_last = shape;
        padded_last.shift = 1;
        const bool given = batch == 1;
        check<float>(CONV3X3<1, 1>::kKernels, shape, given);
        check<float>(CONV3X3<2, 2>::kKernels, shape, given);
        check<float>(CONV3X3<4, 2>::kKernels, shape, given);
        check<float>(CONV3X3<4, 4>::kKernels, shape, given);
        check<BFloat16>(DirectBFloat16<3>::kKernels, shape, given);
        check<BFloat16>(Conv3x3<4, 4, 3, Resize::kNone, BFloat16>::kKernels, shape, given);
        const Conv3x3Shape linear = {1, 1, side[0] * side[1], c[0], c[1]};
        check<float>(CONV3X3<1, 1, 1>::kKernels, linear, given);
        check<BFloat16>(DirectBFloat16<1>::kKernels, linear, given);
        if (c[0] * c[1] < 1000) check_gradient(shape);
        check<float>(CONV3X3<2, 2, 3, Resize::kUp>::kKernels, shape, given);
        check<float>(CONV3X3<1, 1, 3, Resize::kDown>::kKernels, shape, given);
        check<float>(CONV3X3<2, 2, 3, Resize::kDown>::kKernels, shape, given);
        if (side[0] < 2) continue;
        check<float>(CONV3X3<1, 1, 3, Resize::kDown>::kKernels, padded_last, given);
        check<float>(CONV3X3<2, 2, 3, Resize::kDown>::kKernels, padded_last, given);
      }
    }
  }
}
""".replace("ARRAYS", ARRAYS).replace("RUNS", RUNS)


@pytest.mark.parametrize("isa", FLAGS)
def test_under_address_sanitizer(isa, tmp_path):
    run_sanitized(PROGRAM, isa, tmp_path, "-O1")


# ---- fingerprint ----


def test_a_fingerprint_sees_every_change(generator, one_thread):
    x = torch.randn(3, 70_001, generator=generator)  # a span and a part of one
    first = ops.fingerprint(x)
    torch.set_num_threads(2)
    assert ops.fingerprint(x.clone()) == first
    changed = [x.neg(), x.mul(2), x[:, 1:], x.flip(0), torch.cat([x, x.new_zeros(1, 70_001)]), x.double()]
    for at in (0, 1, 1000, 2**16 - 1, 2**16, x.numel() - 1):
        for value in (x.view(-1)[at].neg(), x.view(-1)[at].nextafter(torch.tensor(9.0))):
            one = x.clone()
            one.view(-1)[at] = value
            changed.append(one)
    swapped = x.clone()
    swapped.view(-1)[[0, 128]] = swapped.view(-1)[[128, 0]]
    changed.append(swapped)
    prints = [ops.fingerprint(v) for v in changed]
    assert len({first, *prints}) == 1 + len(changed)
    assert ops.fingerprint(torch.empty(0)) == ops.fingerprint(torch.empty(0))
    with pytest.raises(TypeError, match="x must be a Tensor, got list"):
        ops.fingerprint([1.0])
