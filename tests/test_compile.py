"""`Sampler(compile=...)`: no graph break, no recompile, and the same images."""

from __future__ import annotations

import copy

import pytest
import torch
from op_cases import check_error_rule
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from ddpm_fast import Sampler, Schedule, UNet, UNetConfig
from ddpm_fast.ops import _dispatch

CIFAR10 = {
    "block_out_channels": (128, 256, 256, 256),
    "down_attention": (False, True, False, False),
    "up_attention": (False, False, True, False),
}
CELEBAHQ = {
    "block_out_channels": (128, 128, 256, 256, 512, 512),
    "down_attention": (False, False, False, False, True, False),
    "up_attention": (False, True, False, False, False, False),
}
SMALL = UNetConfig(
    block_out_channels=(16, 32),
    down_attention=(False, True),
    up_attention=(True, False),
    norm_num_groups=8,
    layers_per_block=1,
)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def unet() -> UNet:
    torch.manual_seed(0)
    model = UNet(SMALL)
    for parameter in model.parameters():  # the last layers begin at zero
        torch.nn.init.normal_(parameter, std=0.1) if parameter.dim() > 1 else None
    return model.eval()


@pytest.mark.parametrize("config", [CIFAR10, CELEBAHQ], ids=["ddpm-cifar10-32", "ddpm-celebahq-256"])
def test_googles_networks_are_one_graph(config):
    with torch.device("meta"), torch.no_grad():
        model = UNet(UNetConfig(**config)).eval()
        rows, x, i = model.time_rows(torch.arange(5)), torch.empty(1, 3, 64, 64), torch.tensor(1)
        found = torch._dynamo.explain(model.forward_rows)(x, rows, i)
    assert (found.graph_count, found.graph_break_count) == (1, 0)


def test_steps_and_batch_sizes_recompile_at_most_once(unet):
    counter = CompileCounter()
    forward_rows = torch.compile(unet.forward_rows, backend=counter, fullgraph=True)
    compiled = []
    with torch.no_grad():
        for batch in (1, 8, 3, 5):
            rows = unet.time_rows(torch.arange(7))
            for i in torch.arange(7).unbind():
                forward_rows(torch.randn(batch, 3, 8, 8), rows, i)
            compiled.append(counter.frame_count)
    assert compiled == [1, 2, 2, 2]


def needs_a_compiler() -> None:
    if _dispatch.NATIVE_MISSING is not None:
        pytest.skip(f"inductor needs a C++ compiler: {_dispatch.NATIVE_MISSING}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_images_are_those_of_the_model(unet, dtype):
    needs_a_compiler()
    run = {"method": "ddim", "num_steps": 3, "channels_last": True}
    plain = Sampler(unet, Schedule.linear(), dtype=dtype, **run)
    compiled = Sampler(unet, Schedule.linear(), dtype=dtype, compile=True, **run)
    x_T = torch.randn(2, 3, 8, 8)
    counters.clear()
    got = compiled(x_T=x_T)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    exact = Sampler(copy.deepcopy(unet).double(), Schedule.linear(), **run)
    exact = _double_run(exact, x_T)
    check_error_rule(got.to(dtype), plain(x_T=x_T), exact)
    assert compiled.stats.first_call_seconds > 0


def _double_run(sampler: Sampler, x_T: torch.Tensor) -> torch.Tensor:
    """The run of the sampler in float64 throughout, written out."""
    x = x_T.double()
    rows = torch.tensor(sampler.table.rows)
    with torch.no_grad():
        for row, t in zip(rows, sampler.table.timesteps.tolist(), strict=True):
            out = sampler.model(x, torch.full((len(x),), t))
            x0 = (row[0] * x + row[1] * out).clamp(-1, 1)
            x = row[2] * x0 + row[3] * x + row[4] * out
    return x


def test_weights_are_frozen_on_the_cpu(unet):
    needs_a_compiler()
    sampler = Sampler(unet, Schedule.linear(), num_steps=1, method="ddim", compile=True)
    x_T = torch.randn(1, 3, 8, 8)
    before = sampler(x_T=x_T)
    with torch.no_grad():
        sampler.model.conv_in.weight.mul_(2)
    assert torch.equal(sampler(x_T=x_T), before)


@pytest.mark.parametrize("wrong", ["fast", 1, None])
def test_an_unknown_mode_is_named(unet, wrong):
    with pytest.raises(ValueError, match="compile must be False, True or 'max-autotune'"):
        Sampler(unet, Schedule.linear(), compile=wrong)


def test_a_graph_break_is_an_error():
    def model(x, t):
        print(end="")
        return x * float(x.sum())

    with pytest.raises(torch._dynamo.exc.Unsupported):
        Sampler(model, Schedule.linear(), num_steps=2, compile=True)(1, shape=(2,))
