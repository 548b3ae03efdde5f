"""A replayed call is, to the bit, the call that it stands for; what may not repeat itself is not replayed."""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_fast import Request, Sampler, Schedule, UNet, UNetConfig, convolution, unet
from ddpm_fast.convolution import can_pack
from ddpm_fast.replay import Replayed

SCHEDULE = Schedule.linear()
STEPS = 6
OLD = 2  # steps that are not replayed


def small_unet(**fields) -> UNet:
    torch.manual_seed(0)
    config = {"sample_size": 16, "norm_num_groups": 8} | fields
    model = UNet(UNetConfig((16, 32), (False, True), (True, False), **config))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.08)
    return model.eval()


@pytest.fixture
def blocks(monkeypatch):
    """Names of the residual blocks' calls from Python."""
    calls, forward = [], unet.ResBlock.forward

    def counted(self, *args):
        calls.append(self)
        return forward(self, *args)

    monkeypatch.setattr(unet.ResBlock, "forward", counted)
    return calls


def steps_in_python(calls: list, model: UNet) -> int:
    total, blocks = len(calls), len(list(model._blocks()))
    calls.clear()
    assert total % blocks == 0
    return total // blocks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {"method": "ddpm"},
        {"method": "dpm_solver"},
        {"method": "ddim", "channels_last": False},
        {"method": "ddim", "eta": 1.0, "fields": {"num_class_embeds": 3}},
        {"fields": {"resnet_time_scale_shift": "scale_shift", "downsample_padding": 1, "dropout": 0.5}},
        {"fields": {"attention_head_dim": 8, "center_input_sample": True, "mid_block_scale_factor": 1.4}},
    ],
)
def test_images_are_bit_equal(options, dtype, blocks):
    if dtype == torch.bfloat16 and not can_pack(dtype):
        pytest.skip("no bfloat16 in oneDNN here")
    options = dict(options)
    model = small_unet(**options.pop("fields", {}))
    labels = torch.tensor([2, 0, 1]) if model.config.num_class_embeds else None
    given = {"num_steps": STEPS, "dtype": dtype} | options
    expected = Sampler(model, SCHEDULE, graph=False, **given)(3, seed=4, class_labels=labels)
    assert steps_in_python(blocks, model) == STEPS
    sampler = Sampler(model, SCHEDULE, **given)
    for _ in range(2):
        assert torch.equal(sampler(3, seed=4, class_labels=labels), expected)
        assert steps_in_python(blocks, model) == OLD
    walk = list(sampler.trajectory(3, seed=4, class_labels=labels, every=2))
    assert torch.equal(walk[-1][2], expected) and steps_in_python(blocks, model) == OLD


def test_a_stream_replays_too(blocks):
    model = small_unet()
    requests = [Request(seed=k, num_steps=STEPS) for k in range(3)]

    def images(**options) -> dict[int, torch.Tensor]:
        sampler = Sampler(model, SCHEDULE, num_steps=STEPS, **options)
        return {r.seed: image for r, image in sampler.stream(requests, batch_size=2)}

    expected = images(graph=False)
    assert steps_in_python(blocks, model) == 2 * STEPS
    got = images()
    assert steps_in_python(blocks, model) == 2 * OLD  # of two images, then of one
    assert all(torch.equal(got[seed], expected[seed]) for seed in expected)


def test_a_run_sees_new_weights_and_what_a_callback_does(blocks):
    model = small_unet()
    sampler = Sampler(model, SCHEDULE, num_steps=STEPS)

    def callback(i, t, x, x0):
        if i == 3:
            x.mul_(0.5)

    def check() -> torch.Tensor:
        fresh = Sampler(copy.deepcopy(model), SCHEDULE, num_steps=STEPS, graph=False)
        for given in (None, callback):
            assert torch.equal(sampler(2, callback=given), fresh(2, callback=given))
        return sampler(2)

    results = [check()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    results.append(check())
    for parameter in model.parameters():
        parameter.data.mul_(0.9)
    results.append(check())
    model.load_state_dict({name: value + 0.01 for name, value in model.state_dict().items()})
    results.append(check())
    model.conv_out.weight = nn.Parameter(model.conv_out.weight.detach() * 2)
    results.append(check())
    assert not any(torch.equal(a, b) for k, a in enumerate(results) for b in results[:k])


class Halved(nn.Identity):
    """Something else's module, which may decide anything in its Python."""

    def forward(self, x):
        return x * 0.5


class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class WatchFunctions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def replaced(model):
    model.down_blocks[0].attentions[0] = Halved()


def hooked(model):
    model.mid_block.resnets[0].conv1.register_forward_hook(lambda module, given, out: out * 1.5)


def own_forward(model):
    model.down_blocks[0].attentions[1].forward = lambda x: x * 0.5


@pytest.mark.parametrize(
    ("change", "context"),
    [
        (replaced, nullcontext),
        (hooked, nullcontext),
        (own_forward, nullcontext),
        (None, lambda: torch.autocast("cpu", torch.bfloat16)),
        (None, Watch),
        (None, WatchFunctions),
        (None, torch.profiler.profile),
    ],
)
def test_what_is_not_replayed(change, context, blocks):
    model = small_unet()
    if change is not None:
        change(model)
    with context():
        Sampler(model, SCHEDULE, num_steps=STEPS)(1)
    assert steps_in_python(blocks, model) == STEPS


def test_a_watch_in_the_middle_of_a_run(blocks):
    model = small_unet()
    seen = []
    watch = torch.nn.modules.module.register_module_forward_hook

    def callback(i, t, x, x0):
        if i == 2:
            seen.append(watch(lambda module, given, out: None))
        if i == 3:
            seen.pop().remove()

    Sampler(model, SCHEDULE, num_steps=STEPS)(1, callback=callback)
    assert steps_in_python(blocks, model) == OLD + 1


# ---- any call ----


def calls_of(function, *inputs):
    replayed = Replayed(function)
    with torch.no_grad():
        return [replayed(given) for given in inputs], replayed


def test_views_lists_and_changes_in_place(generator):
    """Of an argument that begins elsewhere at each call, and of tensors that others change meanwhile."""
    weight, state = torch.randn(4, 6, generator=generator), torch.zeros(2, 3)

    def call(i: torch.Tensor) -> torch.Tensor:
        row = weight.t()[2:].index_select(0, i.reshape(-1)).expand(3, -1)
        first, second = row.split([1, 3], dim=1)
        both = torch.cat([second, first + state.sum()], dim=1)
        both[:, 1].mul_(2)
        values, _ = both.t().sort(dim=0)
        low, high = torch.var_mean(values.clone(), dim=0)
        state.add_(1)
        return torch.stack([low, high, torch.full((3,), float("inf")).where(low > 99, high)])[1:]

    every = torch.arange(4).unbind()
    expected = [call(i) for i in every]
    state.zero_()
    got, replayed = calls_of(call, *every)
    assert replayed.replay is not None and torch.equal(state, torch.full((2, 3), 4.0))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert not torch.equal(got[2], got[3])


@pytest.mark.parametrize(
    "call",
    [
        lambda i: i * 2 if i.item() > 1 else i,
        lambda i: (i.reshape(1) + torch.ones(3)).nonzero()[:, 0] if bool(i > 1) else i,
        lambda i: torch.complex(i.float(), i.float()).conj().real,
        lambda i: torch.eye(3).mul(i).to_sparse().to_dense(),
        lambda i: (i.float() + 0.5).view(torch.int32) + 1,
    ],
)
def test_what_asks_for_a_value_or_is_no_plain_tensor_runs_as_it_is(call):
    got, replayed = calls_of(call, *torch.arange(4).unbind())
    assert replayed.replay is None
    for k, out in enumerate(got):
        assert torch.equal(out, call(torch.tensor(k)))


def test_nothing_outlives_a_run():
    """The packed weights go with the last reference to the run, without the collector."""
    if not can_pack(torch.float32):
        pytest.skip("oneDNN does not pack here")
    model, kept = small_unet(), []

    def callback(i, t, x, x0):
        if i == STEPS - 1:
            packs = convolution._PACKS.get()
            kept.extend(weakref.ref(p.weight) for p in packs.values() if isinstance(p.weight, torch.Tensor))

    gc.collect()
    gc.disable()
    try:
        Sampler(model, SCHEDULE, num_steps=STEPS)(1, callback=callback)
        assert kept and all(reference() is None for reference in kept)
    finally:
        gc.enable()


PEAK = """
import torch
from ddpm_fast import Sampler, Schedule, UNet, UNetConfig

torch.set_num_threads(1)
def peak():  # of this process: a child begins with its parent's in getrusage
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])

model = UNet(UNetConfig((32, 64), (False, True), (True, False), sample_size=32)).eval()
peaks = [peak()]
for graph in (False, "auto"):
    Sampler(model, Schedule.linear(), method="ddim", num_steps=4, graph=graph)(32)
    peaks.append(peak())
print(*(value - peaks[0] for value in peaks[1:]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_peak_is_that_of_the_modules():
    """Did a variable outlive its last use, the activations of a whole step would lie there at a time."""
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed is given back at once
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr
    plain, replayed = map(int, done.stdout.split())
    assert replayed <= 1.05 * plain
