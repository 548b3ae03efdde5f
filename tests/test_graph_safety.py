"""What a CUDA graph needs, shown on the CPU: a run's steps ask the host nothing, and are few ops."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ddpm_fast import Sampler, Schedule, UNet, UNetConfig
from ddpm_fast.engine import advancing, evaluating
from ddpm_fast.ops import _checks, _dispatch

SCHEDULE = Schedule.linear()
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
READS = {"_local_scalar_dense", "is_nonzero", "item", "equal", "allclose"}  # a value, on the host
DATA_SIZED = {"nonzero", "masked_select", "unique_dim", "_unique2", "unique_consecutive", "bincount"}
RUNS = {
    "ddpm": {"method": "ddpm"},
    "ddpm-learned": {"method": "ddpm", "variance": "learned_range"},
    "ddim": {"method": "ddim"},
    "ddim-eta": {"method": "ddim", "eta": 1.0},
    "dpm_solver": {"method": "dpm_solver"},
}


class Refuse(TorchDispatchMode):
    """An error for any op that would wait for a device, copy between two, or size a tensor by its data."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in READS, f"{func} reads a value on the host"
        assert name not in DATA_SIZED, f"the size of what {func} returns depends on data"
        for index in args[1] if name in ("index", "index_put", "index_put_") else ():
            assert index is None or index.dtype != torch.bool, f"{func} by a mask is sized by data"
        if name == "repeat_interleave":
            assert not isinstance(args[-1], torch.Tensor), f"{func} by a tensor is sized by data"
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        assert len({tensor.device for tensor in tensors}) <= 1, f"{func} goes from one device to another"
        return result


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    config = UNetConfig((16, 32), (False, True), (True, False), sample_size=8, norm_num_groups=8)
    return UNet(config).eval()


def learned(model):
    return lambda x, t: torch.cat([model(x, t)] * 2, dim=1)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("kind", RUNS)
@pytest.mark.parametrize("called", ["time rows", "x and t"])
def test_a_run_asks_the_host_nothing(unet, kind, called, backend, monkeypatch, one_thread):
    if reason := _dispatch.why_not("posterior_step", backend, "cpu", torch.float32):
        pytest.skip(reason)
    monkeypatch.setattr(_dispatch, "FORCED_BACKEND", backend)
    for module in (_checks, sys.modules["ddpm_fast.ops.posterior_step"]):  # as on a GPU: no value is at hand
        monkeypatch.setattr(module, "at_hand", lambda x: False)
    model = unet if called == "time rows" else lambda x, t: unet(x, t)
    if kind == "ddpm-learned":
        model = learned(model)
    sampler = Sampler(model, SCHEDULE, num_steps=5, **RUNS[kind])
    with evaluating(model):
        run = sampler._start(2, (3, 8, 8), 0, 0, None, None, "counter", False, *[None] * 4)
        with Refuse():
            for i in range(5):
                run.step(i)
    assert torch.equal(run.result(), sampler(2, shape=(3, 8, 8)))


@pytest.mark.parametrize("kind", RUNS)
def test_the_step_that_is_captured_asks_the_host_nothing(unet, kind):
    """Its row moves on by itself; eager, the same steps give the same images."""
    model = learned(unet) if kind == "ddpm-learned" else unet
    sampler = Sampler(model, SCHEDULE, num_steps=5, **RUNS[kind])
    inputs = []
    sampler._graphs.take = lambda buffers, *_: inputs.append(buffers)
    with evaluating(model):
        run = sampler._start(2, (3, 8, 8), 0, 0, None, None, "counter", False, *[None] * 4)
        buffers = inputs[0].clone()
        advance = advancing(sampler._network.bind(buffers, sampler.clip), buffers, lambda: None)
        with Refuse():
            for _ in range(5):
                advance()
        assert buffers.i.item() == 5
        for i in range(5):
            run.step(i)
    assert torch.equal(buffers.x, run.result())


@pytest.mark.parametrize(
    ("waits", "why"),
    [
        (lambda x: x * float(x.sum()), "reads a value on the host"),
        (lambda x: x * bool((x > 0).any()), "reads a value on the host"),
        (lambda x: x[x > 0].sum() * x, "sized by data"),
        (lambda x: x + x.nonzero().sum(), "depends on data"),
        (lambda x: x.to("meta"), "from one device to another"),
    ],
)
def test_the_refusal_refuses(waits, why):
    with Refuse(), pytest.raises(AssertionError, match=why):
        waits(torch.randn(4))


def test_a_step_dispatches_few_ops(diffusers):
    if reason := _dispatch.why_not("group_norm_silu", "native", "cpu", torch.float32):
        pytest.skip(reason)
    spec = importlib.util.spec_from_file_location("bench_launches", BENCHMARKS / "bench_launches.py")
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    for batch in (1, 4):
        ours, theirs = bench.our_step(batch), bench.their_step(batch)
        assert ours.total() <= 180
        assert theirs.total() >= 2.1 * ours.total()
        assert ours["ddpm_fast.group_norm_silu_forward.default"] == 39  # each counted once, not looked into
        assert ours["ddpm_fast.group_norm_silu_concat_forward.default"] == 12
