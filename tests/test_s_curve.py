"""The S-curve example, and that its benchmark compares like with like."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from ddpm_fast import Schedule, ops, steps

pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install ddpm_fast[test]")
ROOT = Path(__file__).parents[1]


@pytest.fixture
def bench(monkeypatch, one_thread):
    for folder in ("examples", "benchmarks"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    return importlib.import_module("bench_s_curve")


def same_weights(bench, tutorial, ours) -> None:
    linears = [layer for layer in tutorial.linears if isinstance(layer, torch.nn.Linear)]
    pairs = zip([*linears, *tutorial.step_embeddings], [*ours.layers, ours.out, *ours.times], strict=True)
    for theirs, mine in pairs:
        mine.load_state_dict(theirs.state_dict())


def test_both_train_the_same_network_on_the_same_loss(bench, monkeypatch):
    points = bench.s_curve(0)
    tutorial, model = bench.Tutorial(points, 0), bench.EmbeddingMLP()
    same_weights(bench, tutorial.model, model)
    x0, t, noise = next(bench.batches(points, torch.Generator().manual_seed(0)))
    half = bench.BATCH // 2
    monkeypatch.setattr(torch, "randint", lambda *args, **kwargs: t[:half])
    monkeypatch.setattr(torch, "randn_like", lambda x: noise)
    expected = tutorial.loss(x0)
    values = bench.Loss(bench.SCHEDULE)(model, x0, t, noise=noise)
    torch.testing.assert_close(values.mean(), expected, rtol=1e-5, atol=1e-6)
    grads = torch.autograd.grad(expected, tutorial.model.linears[2].weight)
    torch.testing.assert_close(torch.autograd.grad(values.mean(), model.layers[1].weight), grads)


def test_both_sample_by_the_same_steps(bench, monkeypatch):
    """But for the last, to which the tutorial adds noise."""
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    points = bench.s_curve(0)
    tutorial, model = bench.Tutorial(points, 0), bench.EmbeddingMLP().eval()
    same_weights(bench, tutorial.model, model)
    sampler = bench.Sampler(model, bench.SCHEDULE, **bench.SAMPLING)
    before = None
    for i, t, x, _ in sampler.trajectory(50, seed=0):
        if before is not None:
            with torch.no_grad():
                mean = tutorial.p_sample(before, t)
            noise = ops.counter_normal((50, 2), 0, 0, i) * tutorial.betas[t].sqrt()
            torch.testing.assert_close(x, mean + (noise if t > 0 else 0), rtol=1e-4, atol=1e-5)
        before = x


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("points", [1, 1023, 2500])  # a part of a block, and three with the last in part
def test_points_in_blocks_are_the_network(bench, dtype, points, generator):
    model = bench.EmbeddingMLP().to(dtype).eval()
    x = torch.randn(points, 2, generator=generator).to(dtype)
    each, shared = torch.full((points,), 7), torch.tensor([7]).expand(points)
    eager, found = model(x, each), model(x, shared)
    expected = model.double()(x.double(), each)
    allowed = 2 * (eager - expected).abs().max() + torch.finfo(dtype).eps * expected.abs().max()
    assert (found - expected).abs().max() <= allowed
    assert found.is_contiguous() and found.dtype == dtype


def test_where_points_are_not_taken_in_blocks(bench):
    model, x, t = bench.EmbeddingMLP().eval(), torch.randn(3, 4, 2), torch.tensor(3).expand(4)
    with torch.no_grad():
        expected = torch.stack([model(each, t) for each in x])
        torch.testing.assert_close(torch.vmap(lambda each: model(each, t))(x), expected)
        torch.testing.assert_close(model(x, t), expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert model(x[0], t).dtype == torch.bfloat16


def test_points_that_share_a_time_have_gradients(bench):
    model = bench.EmbeddingMLP()
    x, shared = torch.randn(5, 2), torch.tensor([7]).expand(5)
    grads = [
        torch.autograd.grad(model(x, t).square().sum(), [*model.parameters()])
        for t in (shared, shared.clone())
    ]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("elements", [1, 2, 5, 127])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_point_steps_alike_in_any_batch(elements, dtype, generator):
    """Small samples go through the kernel together, their noise drawn side by side."""
    table = steps.ddpm(Schedule.linear(50)).tensor(dtype=torch.float64 if dtype.itemsize == 8 else None)
    x, out = torch.randn(2, 600, elements, generator=generator).to(dtype).unbind()
    image = torch.randint(2**40, (600,), generator=generator)
    given = {"seed": 2**63 + 5, "clip": 0.5}
    together = ops.posterior_step(x, out, table, 7, image_index=image, **given)
    for k in (0, 1, 17, 204, 511, 599):
        alone = ops.posterior_step(x[k:][:1], out[k:][:1], table, 7, image_index=image[k:][:1], **given)
        torch.testing.assert_close([y[k] for y in together], [y[0] for y in alone], rtol=0, atol=0)
    both = ops.posterior_step(x, torch.cat([out, out * torch.nan], 1), table, 7, image_index=image, **given)
    torch.testing.assert_close(both, together, rtol=0, atol=0)


def test_an_epoch_is_a_permutation(bench):
    points = torch.arange(20_000.0).reshape(10_000, 2)
    drawn = bench.batches(points, torch.Generator().manual_seed(0))
    epoch = [next(drawn) for _ in range(len(points) // bench.BATCH)]
    seen = torch.cat([x0 for x0, _, _ in epoch])
    assert len(seen.unique(dim=0)) == len(seen) == 78 * 128
    for _, t, _ in epoch:
        assert torch.equal(t[:64], 99 - t[64:])
    assert not torch.equal(next(drawn)[0], epoch[0][0])


def test_the_distance_is_that_of_shifted_points(bench):
    """Of points moved by d, W1 of a projection is |d cos|, whose mean over directions is 2 |d| / pi."""
    points = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
    moved = points + torch.tensor([0.3, 0.4])
    assert bench.sliced_wasserstein(points, moved) == pytest.approx(0.5 * 2 / torch.pi, rel=1e-3)
    assert bench.sliced_wasserstein(points, points.flip(0)) == 0


def test_the_example_writes_its_pictures(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["s_curve.py", "--out", str(tmp_path), "--updates", "3", "--no-compile"])
    importlib.import_module("s_curve").main()
    for name, strip, frames in (("forward", (10, 2), 100), ("reverse", (10, 1), 100)):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert picture.size == tuple(2 + 130 * tiles for tiles in strip)
        with Image.open(tmp_path / f"{name}.gif") as film:
            assert film.n_frames > frames // 2  # frames that are alike may be one
