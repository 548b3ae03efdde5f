"""Dropout by a seed: every backend's mask is the definition's, and the gradient's is the same."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys

import pytest
import torch

from ddpm_fast import UNet, UNetConfig, ops
from ddpm_fast.ops import _dispatch
from ddpm_fast.unet import Dropout

SHAPES = [(3, 5, 7, 9), (1037,), (2, 48, 8, 8), (1, 1, 1, 1), (3, 4097)]


def make(shape, dtype, generator, channels_last=False) -> torch.Tensor:
    x = torch.randn(shape, generator=generator).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if channels_last and x.dim() == 4 else x


def needs_the_kernel() -> None:
    if _dispatch.NATIVE_MISSING is not None:
        pytest.skip(_dispatch.NATIVE_MISSING)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_is_the_definition(shape, dtype, channels_last, generator):
    """The same elements, forward and backward; a kept one to a rounding of x / (1 - p)."""
    needs_the_kernel()
    x = make(shape, dtype, generator, channels_last).requires_grad_()
    upstream = make(shape, dtype, generator)
    for p, seed in ((0.1, 0), (0.5, 2**63 + 5), (0.999, torch.tensor(-7))):
        got, expected = (ops.dropout(x, p, seed, backend=b) for b in ("native", "reference"))
        assert got.dtype == dtype and got.stride() == expected.stride() == x.stride()
        assert torch.equal(got != 0, expected != 0)
        exact = x.detach().double() / (1 - round(65536 * p) / 65536) * (expected != 0)
        eps, least = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal
        assert bool(((got - exact).abs() <= eps * exact.abs().clamp(min=least)).all())
        grads = [torch.autograd.grad(y, x, upstream)[0] for y in (got, expected)]
        torch.testing.assert_close(*grads, rtol=eps, atol=eps * least)
        assert torch.equal((grads[0] != 0) | (upstream == 0), (got != 0) | (x == 0) | (upstream == 0))


def test_so_many_are_dropped_and_none_knows_its_neighbour(generator):
    """Within four deviations: the share, pairs of neighbours at every distance up to 16, other seeds."""
    n = 2**18
    x = torch.ones(n)
    for p in (0.1, 0.5):
        kept, other = (ops.dropout(x, p, seed) != 0 for seed in (1, 2))
        allowed = 4 * (p * (1 - p) / n) ** 0.5
        assert abs(float(kept.double().mean()) - (1 - p)) < allowed
        for distance in range(1, 17):
            both = kept & kept.roll(distance)
            assert abs(float(both.double().mean()) - (1 - p) ** 2) < 2 * allowed
        assert abs(float((kept & other).double().mean()) - (1 - p) ** 2) < 2 * allowed
    assert torch.equal(ops.dropout(x, 0, 1), x)
    torch.testing.assert_close(ops.dropout(x, 0.25, 1).mean(), torch.tensor(1.0), rtol=0, atol=4 * 0.58 / 512)


def test_any_number_of_threads_draws_the_same(one_thread):
    x = torch.ones(300_001)
    expected = ops.dropout(x, 0.3, 9)
    torch.set_num_threads(3)
    assert torch.equal(ops.dropout(x, 0.3, 9), expected)


@pytest.mark.parametrize("isa", ["avx2", "baseline"])
def test_every_instruction_set_draws_the_same(isa):
    needs_the_kernel()
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip(f"{isa} is asked for on x86-64")
    program = (
        "import torch, hashlib; from ddpm_fast import ops; x = torch.arange(1., 1038.);"
        "print(hashlib.sha256(ops.dropout(x, 0.3, 5, backend='native').numpy().tobytes()).hexdigest())"
    )
    command, env = [sys.executable, "-c", program], os.environ | {"DDPM_FAST_CPU": isa}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if "this processor does not run it" in done.stderr:
        pytest.skip(f"this processor does not run {isa}")
    mine = ops.dropout(torch.arange(1.0, 1038.0), 0.3, 5, backend="native").numpy().tobytes()
    assert done.stdout.strip() == hashlib.sha256(mine).hexdigest(), done.stderr


def test_opcheck(generator):
    x = make((2, 5, 3, 3), torch.float32, generator, channels_last=True).requires_grad_()
    torch.library.opcheck(torch.ops.ddpm_fast.dropout.default, (x, torch.tensor(3), 20000))
    torch.library.opcheck(torch.ops.ddpm_fast.dropout_forward.default, (x.detach(), torch.tensor(3), 20000))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"x": [1.0]}, TypeError, "x must be a Tensor, got list"),
        ({"x": torch.ones(3, dtype=torch.int64)}, TypeError, "x must be float32, .* got torch.int64"),
        ({"p": 1.0}, ValueError, r"p must be a number in \[0, 1\), got 1.0"),
        ({"p": "half"}, ValueError, r"p must be a number in \[0, 1\), got 'half'"),
        ({"seed": 0.5}, TypeError, "seed must be an int or an int64 Tensor, got float"),
        ({"seed": torch.ones(2, dtype=torch.int64)}, ValueError, "seed must be 0-d"),
        ({"seed": 2**64}, ValueError, "seed must fit in 64 bits"),
        ({"backend": "triton"}, RuntimeError, "it has no dropout kernel"),
        ({"backend": "fast"}, ValueError, "backend='fast' is not known"),
    ],
)
def test_bad_input_is_named(change, error, match):
    with pytest.raises(error, match=match):
        ops.dropout(**{"x": torch.ones(3), "p": 0.5, "seed": 0} | change)


def test_the_layer_draws_by_torch_s_generator(generator):
    layer, x = Dropout(0.4), make((4, 8, 4, 4), torch.float32, generator)
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(layer(x))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert not torch.equal(layer(x), layer(x))
    assert layer.eval()(x) is x
    compiled = torch.compile(Dropout(0.4), fullgraph=True, backend="eager")
    assert 0 < float((compiled(x) == 0).float().mean()) < 1


@pytest.mark.parametrize("p", [0, 1.0])
def test_the_layer_takes_either_end(p, generator):
    """As `nn.Dropout` does; with 0 it draws nothing."""
    layer, x, state = Dropout(p), make((2, 8, 4, 4), torch.float32, generator), torch.get_rng_state()
    assert torch.equal(layer(x), (1 - p) * x) and (p or torch.equal(torch.get_rng_state(), state))


def test_the_network_trains_through_it(generator):
    """Each residual block with a mask of its own: what it drops has no gradient."""
    config = UNetConfig((8,), (False,), (False,), sample_size=8, norm_num_groups=4, dropout=0.5)
    model = UNet(config).train()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1, generator=generator)
    x, t = make((2, 3, 8, 8), torch.float32, generator, channels_last=True), torch.tensor([1, 2])
    torch.manual_seed(0)
    first = model(x, t)
    torch.manual_seed(0)
    assert torch.equal(model(x, t), first) and not torch.equal(model(x, t), first)
    first.square().mean().backward()
    assert all(bool(p.grad.isfinite().all()) and bool(p.grad.any()) for p in model.parameters())
