"""The pointwise Triton kernels at edges that `test_ops` and `test_noise`, which run every case, do not reach.

The launchers by themselves: the ends of integers, tiles, alignment and tables.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ddpm_fast import reference

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
if not triton.knobs.runtime.interpret:
    pytest.skip("needs TRITON_INTERPRET=1, set before triton is imported", allow_module_level=True)

from ddpm_fast.ops._triton import counter_normal, posterior_step, q_sample, tile  # noqa: E402

NAN = math.nan
HALVES = (torch.bfloat16, torch.float16)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def unaligned(x: Tensor) -> Tensor:
    """The same values, one element off any alignment."""
    moved = x.new_empty(x.numel() + 1)[1:].view(x.shape)
    return moved.copy_(x)


def step(x, out, table, i, noise=None, seed=None, image_index=None, x0_prev=None, clip=1.0, clip_each=None):
    return posterior_step.posterior_step(
        x, out, table, torch.as_tensor(i), noise, seed, image_index, x0_prev, clip, clip_each
    )


# ---- the counter ----


@pytest.mark.parametrize("image", [0, 2**32 - 1, 2**32, 2**40 + 7, 2**62])
@pytest.mark.parametrize("seed", [0, 2**32 + 3, 2**63 - 1, -(2**63), -1])
def test_integers_are_bit_equal(seed, image):
    """As the kernels build counter and key from 64-bit seeds and images: low word, high word."""
    words = torch.tensor([seed, image])
    low, high = words & 0xFFFFFFFF, (words >> 32) & 0xFFFFFFFF
    quads = torch.tensor([0, 1, 255, 2**31, 2**32 - 1])
    counter = torch.stack(torch.broadcast_tensors(quads, torch.tensor(1 << 28 | 9), low[1], high[1]), 1)
    key = torch.stack([low[0], high[0]]).expand(5, 2)
    assert torch.equal(counter_normal.philox4x32_10(counter, key), reference.philox4x32_10(counter, key))
    args = torch.tensor(seed), torch.tensor([image]), torch.tensor(9), 1
    expected = reference.counter_normal((1, 64), *args)
    torch.testing.assert_close(counter_normal.counter_normal((1, 64), *args), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("elements", [1, 2, 3, 5, 31, 33, 1025, 4093, 4096, 4097, 12291])
def test_every_element_is_written_whatever_the_tile(elements, poisoned):
    """Counts that end within a counter, a tile, and on their borders; noise drawn is noise given."""
    seed, images, i = torch.tensor(-3), torch.arange(2) + 2**33, torch.tensor([4, 1])
    x, table = draw(2, elements), draw(7, 7, seed=1)
    table[:, 5] = 0
    noise = counter_normal.counter_normal(x.shape, seed, images, i, reference.STREAM_STEP)
    exact = reference.counter_normal(tuple(x.shape), seed, images, i, reference.STREAM_STEP)
    torch.testing.assert_close(noise, exact, rtol=1e-6, atol=1e-6)
    given, drawn = step(x, x, table, i, noise), step(x, x, table, i, None, seed, images)
    assert all(torch.equal(g, d) for g, d in zip(given, drawn, strict=True))
    x_t, kept = q_sample.q_sample_counter(x, i, table[:, :2].contiguous(), seed, images)
    assert x_t.isfinite().all() and kept.isfinite().all()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_drawn_noise_is_rounded_as_torch_rounds(dtype, layout, poisoned):
    x0 = draw(2, 3, 19, 17, dtype=dtype).contiguous(memory_format=layout)
    seed, images, t, table = torch.tensor(1), torch.arange(2), torch.tensor([3, 0]), draw(5, 2, seed=1)
    x_t, noise = q_sample.q_sample_counter(x0, t, table, seed, images)
    zero = torch.tensor(0)
    drawn = counter_normal.counter_normal(x0.shape, seed, images, zero, reference.STREAM_TRAINING)
    assert torch.equal(noise, drawn.to(dtype))
    assert torch.equal(x_t, q_sample.q_sample(x0, noise, t, table))


@triton.jit
def _round_kernel(y_ptr, x_ptr, n: tl.constexpr):
    k = tl.arange(0, n)
    tl.store(y_ptr + k, tile.rounded(tl.load(x_ptr + k), y_ptr.dtype.element_ty))


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("dtype", HALVES)
def test_rounding_is_to_nearest_even(dtype, poisoned):
    """Ties, carries into the exponent, infinities and NaN; the interpreter alone would cut bfloat16 off."""
    edges = [1.00390625, 1.01171875, 1.999999, 3.4e38, math.inf, -math.inf, NAN, -0.0, 0.0, 1e-30, -1.0039063]
    x = torch.cat([torch.tensor(edges), draw(1024 - len(edges)) * 10])
    y = torch.empty(1024, dtype=dtype)
    _round_kernel[(1,)](y, x, n=1024)
    torch.testing.assert_close(y, x.to(dtype), rtol=0, atol=0, equal_nan=True)


# ---- layouts and alignment ----


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_unaligned_views(dtype, poisoned):
    x, out, noise = (unaligned(draw(2, 3, 32, 32, seed=k, dtype=dtype)) for k in range(3))
    table, i = draw(7, 7, seed=4), torch.tensor([2, 5])
    table[:, 5] = 0
    moved = step(x, out, table, i, noise)
    aligned = step(x.clone(), out.clone(), table, i, noise.clone())
    assert all(torch.equal(m, a) for m, a in zip(moved, aligned, strict=True))
    weights = unaligned(table[:, :2].contiguous())
    assert torch.equal(
        q_sample.q_sample(x, noise, i, weights), q_sample.q_sample(x.clone(), noise, i, weights)
    )


@pytest.mark.parametrize("channels", [3, 6])
@pytest.mark.parametrize("out_dtype", [torch.float32, *HALVES])
def test_out_in_any_layout(channels, out_dtype, poisoned):
    """channels_last is read as it lies, the rest through a copy: the numbers are a contiguous out's."""
    x, out, noise = (
        draw(2, 3, 33, 35),
        draw(2, channels, 33, 35, seed=1, dtype=out_dtype),
        draw(2, 3, 33, 35, seed=2),
    )
    table = draw(7, 9 if channels == 6 else 7, seed=3)
    table[:, 5] = 0
    expected = step(x, out, table, 1, noise)
    sliced = draw(2, channels, 33, 70, dtype=out_dtype)[..., ::2].copy_(out)
    for layout in (out.contiguous(memory_format=torch.channels_last), sliced, out.mT.contiguous().mT):
        got = step(x, layout, table, 1, noise)
        assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))


def test_strided_indexes_seeds_and_bounds():
    """0-d serves all samples, (B,) each its own, whatever its stride."""
    x, table = draw(3, 40), draw(7, 7, seed=1)
    table[:, 5] = 0
    i, seeds = torch.tensor([[1, 9], [6, 9], [0, 9]])[:, 0], torch.tensor([[5, 9], [-6, 9], [7, 9]])[:, 0]
    images = torch.arange(6)[::2]
    clips = torch.tensor([[0.5, 9], [math.inf, 9], [2.0, 9]])[:, 0]
    got = step(x, x, table, i, None, seeds, images, clip=math.inf, clip_each=clips)
    for k in range(3):
        one = step(
            x[k : k + 1], x[k : k + 1], table, i[k], None, seeds[k], images[k : k + 1], clip=clips[k].item()
        )
        assert all(torch.equal(g[k : k + 1], o) for g, o in zip(got, one, strict=True))


# ---- tables ----


@pytest.mark.parametrize("bad", [-1, 7, 2**31 + 1, -(2**62)])
def test_an_index_outside_the_table_gives_nan(bad, poisoned):
    """Two rows of NaN stand on either side: neither they nor anything beyond is read into another sample."""
    x, table = draw(2, 50), draw(7, 7, seed=1)
    x_next, x0 = step(x, x, table, [3, bad], x, x0_prev=x)
    assert x_next[0].isfinite().all() and x0[0].isfinite().all()
    assert x_next[1].isnan().all() and x0[1].isnan().all()
    x_t = q_sample.q_sample(x, x, torch.tensor([bad, 3]), table[:, :2].contiguous())
    assert x_t[0].isnan().all() and x_t[1].isfinite().all()
    drawn = q_sample.q_sample_counter(
        x, torch.tensor([bad, 3]), table[:, :2].contiguous(), torch.tensor(0), torch.arange(2)
    )
    assert drawn[0][0].isnan().all() and drawn[0][1].isfinite().all() and drawn[1].isfinite().all()


@pytest.mark.parametrize("columns", [7, 9])
@pytest.mark.parametrize("filler", [NAN, math.inf])
def test_operands_with_a_zero_coefficient_are_not_used(columns, filler):
    x, table = draw(2, 3, 8, 8), draw(7, columns, seed=1)
    table[:, 4:7] = 0
    out = draw(2, 6, 8, 8, seed=2)
    out[:, 3:] = filler  # the variance of a row without noise
    nothing = torch.full_like(x, filler)
    expected = step(x, out, table, 2)
    for changes in (
        {"noise": nothing},
        {"x0_prev": nothing},
        {"seed": torch.tensor(1), "image_index": torch.arange(2)},
    ):
        got = step(x, out, table, 2, **changes)
        assert all(g.isfinite().all() and torch.equal(g, e) for g, e in zip(got, expected, strict=True))


def test_an_operand_that_is_needed_and_missing_gives_nan():
    x, table = draw(2, 3, 8, 8), draw(7, 7, seed=1)
    for operands in ({"noise": x}, {"x0_prev": x}):
        x_next, x0 = step(x, x, table, 2, **operands)
        assert x_next.isnan().all() and x0.isfinite().all()


def test_nan_passes_the_clip():
    x, table = draw(1, 64), draw(7, 7, seed=1)
    table[:, 5:] = 0
    out = x.clone()
    out[0, 5], out[0, 6] = NAN, math.inf
    x_next, x0 = step(x, out, table, 2)
    assert x0[0, 5].isnan() and x0.isnan().sum() == 1 and x0[0, 6].abs() == 1
    assert x_next[0, 5].isnan()


def test_the_grid_covers_each_sample():
    for shape in ((1, 1), (3, 5), (130, 2), (2, 3, 32, 32), (70_000, 2), (2, 3, 67, 61)):
        n, (programs,), options = tile.cut(torch.empty(shape, device="meta"))
        blocks = programs // shape[0]
        assert (
            programs == blocks * shape[0] and (blocks - 1) * options["BLOCK"] < n <= blocks * options["BLOCK"]
        )
        assert options["BLOCK"] % (32 * options["num_warps"]) == 0


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4)])
def test_nothing_to_do(shape):
    x, table = torch.empty(shape), torch.zeros(3, 7)
    images = torch.arange(shape[0])
    assert step(x, x, table, 1, x)[0].shape == shape
    assert q_sample.q_sample(x, x, torch.tensor(0), table[:, :2].contiguous()).shape == shape
    assert counter_normal.counter_normal(shape, torch.tensor(0), images, torch.tensor(0), 1).shape == shape
