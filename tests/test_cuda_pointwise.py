"""The pointwise kernels on a CUDA device at their edges: integers, cuts, alignment, layouts and tables."""

from __future__ import annotations

import math

import pytest
import torch
from op_cases import tuple_of
from torch import Tensor

from ddpm_fast import ops, reference
from ddpm_fast.ops import _dispatch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=["native", "triton"])
def backend(request) -> str:
    reason = _dispatch.why_not("posterior_step", request.param, "cuda", torch.float32)
    if reason is not None:
        pytest.skip(f"backend {request.param!r}: {reason}")
    return request.param


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


def table(columns: int = 7) -> Tensor:
    """Rows that use everything but a history."""
    rows = draw(7, columns, seed=1)
    rows[:, 5] = 0
    return rows


def unaligned(x: Tensor) -> Tensor:
    """The same values, one element off any alignment."""
    moved = x.new_empty(x.numel() + 1)[1:].view(x.shape)
    return moved.copy_(x)


def equal(some, others) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize("image", [0, 2**32 - 1, 2**32, 2**62])
@pytest.mark.parametrize("seed", [0, 2**32 + 3, 2**63 - 1, -1])
def test_noise_is_the_references(seed, image, backend):
    words = torch.tensor([seed, image])
    low, high = words & 0xFFFFFFFF, (words >> 32) & 0xFFFFFFFF
    quads = torch.tensor([0, 1, 255, 2**31, 2**32 - 1])
    counter = torch.stack(torch.broadcast_tensors(quads, torch.tensor(1 << 28 | 9), low[1], high[1]), 1)
    key = torch.stack([low[0], high[0]]).repeat(5, 1)
    got = ops.philox4x32_10(counter.cuda(), key.cuda(), backend=backend).cpu()
    assert torch.equal(got, reference.philox4x32_10(counter, key))
    images = torch.tensor([image, 7])
    got = ops.counter_normal((2, 3, 67, 61), seed, images.cuda(), 9, backend=backend).cpu()
    expected = reference.counter_normal((2, 3, 67, 61), torch.tensor(seed), images, torch.tensor(9))
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("elements", [1, 2, 3, 4, 5, 8, 12, 31, 33, 511, 512, 513, 1024, 1025, 4097, 12288])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_element_is_written_and_noise_drawn_is_noise_given(elements, dtype, backend, poisoned):
    """Counts that end within a counter, a thread's elements and a block's, and on their borders."""
    seed, images, i = -3, torch.tensor([2**33, 5]).cuda(), torch.tensor([4, 1]).cuda()
    x, rows, weights = draw(2, elements, dtype=dtype), table(), table()[:, :2].contiguous()
    noise = ops.counter_normal(x.shape, seed, images, i, backend=backend)
    if dtype == torch.float32:
        given = ops.posterior_step(x, x, rows, i, noise=noise, backend=backend)
        drawn = ops.posterior_step(x, x, rows, i, seed=seed, image_index=images, backend=backend)
        assert equal(given, drawn)
    x_t, kept = ops.q_sample_counter(x, i, weights, seed, images, backend=backend)
    drawn = ops.counter_normal(x.shape, seed, images, 0, stream="training", backend=backend)
    assert torch.equal(kept, drawn.to(dtype))
    assert torch.equal(x_t, ops.q_sample(x, kept, i, weights, backend=backend))
    assert noise.isfinite().all() and x_t.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_unaligned_and_channels_last_noise(dtype, layout, backend, poisoned):
    x0 = draw(2, 3, 32, 32, dtype=dtype)
    t, weights, images = torch.tensor([3, 0]).cuda(), table()[:, :2].contiguous(), torch.arange(2).cuda()
    expected = ops.q_sample_counter(x0, t, weights, 1, images, backend=backend)
    moved = unaligned(x0).contiguous(memory_format=layout)
    got = ops.q_sample_counter(moved, t, weights, 1, images, backend=backend)
    assert equal(got, expected) and all(g.is_contiguous(memory_format=layout) for g in got)


@pytest.mark.parametrize("dtype", DTYPES)
def test_unaligned_views(dtype, backend, poisoned):
    x, out, noise, history = (unaligned(draw(2, 3, 32, 32, seed=k, dtype=dtype)) for k in range(4))
    rows, i = draw(7, 7, seed=4), torch.tensor([2, 5]).cuda()
    moved = ops.posterior_step(x, out, rows, i, noise=noise, x0_prev=history, backend=backend)
    for which in range(4):  # each by itself takes the others' fast path away
        given = [v if k == which else v.clone() for k, v in enumerate((x, out, noise, history))]
        some = ops.posterior_step(*given[:2], rows, i, noise=given[2], x0_prev=given[3], backend=backend)
        assert equal(some, moved)


@pytest.mark.parametrize("channels", [3, 6])
@pytest.mark.parametrize(
    "dtype,out_dtype", [*((d, d) for d in DTYPES), *((DTYPES[0], d) for d in DTYPES[1:])]
)
@pytest.mark.parametrize("side", [32, 33, 36])
def test_out_in_any_layout(channels, dtype, out_dtype, side, backend, poisoned):
    """channels_last is read as it lies, the rest through a copy: the numbers are a contiguous out's."""
    x, noise = draw(2, 3, side, 35, dtype=dtype), draw(2, 3, side, 35, seed=2, dtype=dtype)
    out, rows = draw(2, channels, side, 35, seed=1, dtype=out_dtype), table(9 if channels == 6 else 7)
    expected = ops.posterior_step(x, out, rows, 1, noise=noise, backend=backend)
    sliced = draw(2, channels, side, 70, dtype=out_dtype)[..., ::2].copy_(out)
    for layout in (out.contiguous(memory_format=torch.channels_last), sliced, out.mT.contiguous().mT):
        assert equal(ops.posterior_step(x, layout, rows, 1, noise=noise, backend=backend), expected)


def test_more_samples_than_a_grid_is_high(backend, poisoned):
    x, i = draw(70_000, 2), torch.arange(70_000).cuda() % 7
    rows = table()
    got = ops.posterior_step(x, x, rows, i, seed=3, image_index=0, backend=backend)
    for first in (0, 65_530, 69_990):
        part = slice(first, first + 10)
        one = ops.posterior_step(x[part], x[part], rows, i[part], seed=3, image_index=first, backend=backend)
        assert equal([g[part] for g in got], one)


def test_strided_indexes_seeds_and_bounds(backend):
    x, rows = draw(3, 40), table()
    i, seeds = (torch.tensor([[a, 9], [6, 9], [0, 9]]).cuda()[:, 0] for a in (1, -5))
    images, clips = torch.arange(6).cuda()[::2], torch.tensor([[0.5, 9], [math.inf, 9], [2, 9]]).cuda()[:, 0]
    got = ops.posterior_step(x, x, rows, i, seed=seeds, image_index=images, clip=clips, backend=backend)
    for k in range(3):
        one = slice(k, k + 1)
        args = {"seed": seeds[k], "image_index": images[one], "clip": clips[k].item()}
        assert equal(
            [g[one] for g in got], ops.posterior_step(x[one], x[one], rows, i[k], **args, backend=backend)
        )


@pytest.mark.parametrize("bad", [-1, 7, 2**31 + 1, -(2**62)])
@pytest.mark.parametrize("columns", [7, 9])
def test_an_index_outside_the_table_gives_nan(bad, columns, backend, poisoned):
    x, out, rows = draw(2, 4, 40), draw(2, 8, 40), table(columns)
    i = torch.tensor([3, bad]).cuda()
    x_next, x0 = ops.posterior_step(x, out, rows, i, noise=x, x0_prev=x, backend=backend)
    assert x_next[0].isfinite().all() and x0[0].isfinite().all()
    assert x_next[1].isnan().all() and x0[1].isnan().all()
    weights = table()[:, :2].contiguous()
    x_t = ops.q_sample(x, x, i, weights, backend=backend)
    assert x_t[0].isfinite().all() and x_t[1].isnan().all()
    x_t, noise = ops.q_sample_counter(x, i, weights, 0, 0, backend=backend)
    assert x_t[0].isfinite().all() and x_t[1].isnan().all() and noise.isfinite().all()


@pytest.mark.parametrize("columns", [7, 9])
@pytest.mark.parametrize("filler", [math.nan, math.inf])
def test_operands_with_a_zero_coefficient_are_not_used(columns, filler, backend):
    x, rows, out = draw(2, 3, 8, 8), table(columns), draw(2, 6, 8, 8, seed=2)
    rows[:, 4:7] = 0
    out[:, 3:] = filler  # the variance of a row without noise
    nothing = torch.full_like(x, filler)
    expected = ops.posterior_step(x, out, rows, 2, backend=backend)
    assert all(e.isfinite().all() for e in expected)
    for changes in ({"noise": nothing}, {"x0_prev": nothing}, {"seed": 1, "image_index": 0}):
        assert equal(ops.posterior_step(x, out, rows, 2, **changes, backend=backend), expected)


def test_an_operand_that_is_needed_and_missing_gives_nan(backend):
    x, rows = draw(2, 3, 8, 8), draw(7, 7, seed=1)
    for operands in ({"noise": x}, {"x0_prev": x}):
        x_next, x0 = ops.posterior_step(x, x, rows, 2, **operands, backend=backend)
        assert x_next.isnan().all() and x0.isfinite().all()


def test_nan_passes_the_clip(backend):
    x, rows = draw(1, 64), table()
    rows[:, 6] = 0
    out = x.clone()
    out[0, 5], out[0, 6] = math.nan, math.inf
    x_next, x0 = ops.posterior_step(x, out, rows, 2, backend=backend)
    assert x0[0, 5].isnan() and x0.isnan().sum() == 1 and x0[0, 6].abs() == 1 and x_next[0, 5].isnan()


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4)])
def test_nothing_to_do(shape, backend):
    x, weights = torch.empty(shape, device="cuda"), torch.zeros(3, 2, device="cuda")
    images = torch.arange(shape[0]).cuda()
    step = ops.posterior_step(x, x, torch.zeros(3, 7, device="cuda"), 1, noise=x, backend=backend)
    assert step[0].shape == shape and ops.q_sample(x, x, 0, weights, backend=backend).shape == shape
    assert ops.q_sample_counter(x, 0, weights, 1, images, backend=backend)[1].shape == shape
    assert ops.counter_normal(shape, 0, images, 0, backend=backend).shape == shape


@pytest.mark.parametrize(
    "name", ["counter_normal", "posterior_step", "learned", "q_sample", "q_sample_counter"]
)
def test_both_backends_agree_to_the_last_bit(name):
    """One order of the same fused operations, whoever compiles them."""
    for backend in ("native", "triton"):
        if reason := _dispatch.why_not("posterior_step", backend, "cuda", torch.float32):
            pytest.skip(f"backend {backend!r}: {reason}")
    x, out, noise = (draw(4, 3, 32, 32, seed=k) for k in range(3))
    rows, i, images = draw(7, 7, seed=4), torch.tensor([0, 3, 6, 2]).cuda(), torch.arange(4).cuda()
    drawn = {"seed": 1, "image_index": images}
    args = {
        "counter_normal": {"shape": (4, 3, 64, 64), "step": 3} | drawn,
        "posterior_step": {"x": x, "out": out, "table": rows, "i": i, "x0_prev": noise} | drawn,
        "learned": {"x": x, "out": draw(4, 6, 32, 32), "table": table(9), "i": i} | drawn,
        "q_sample": {"x0": x, "noise": noise, "t": i, "table": rows[:, :2].contiguous()},
        "q_sample_counter": {"x0": x, "t": i, "table": rows[:, :2].contiguous()} | drawn,
    }[name]
    op = "posterior_step" if name == "learned" else name
    native, triton = (getattr(ops, op)(**args, backend=b) for b in ("native", "triton"))
    assert equal(tuple_of(native), tuple_of(triton))
