"""The captured step: replays equal to eager runs, when a capture is needed, and what cannot be captured."""

from __future__ import annotations

import copy
import gc
import itertools

import pytest
import torch
from torch import nn

from ddpm_fast import Request, Sampler, Schedule, UNet, UNetConfig, cuda_graph
from ddpm_fast.cuda_graph import CAPTURED, CapturedStep, GraphCache, Graphs, Key, version

SCHEDULE = Schedule.linear()
gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
RUNS = [
    {"method": "ddpm", "num_steps": 50},
    {"method": "ddim", "num_steps": 50},
    {"method": "ddim", "num_steps": 50, "eta": 1.0},
    {"method": "dpm_solver", "num_steps": 50},
]


def tiny_unet() -> UNet:
    torch.manual_seed(0)
    config = UNetConfig((8,), (True,), (False,), sample_size=4, norm_num_groups=4, layers_per_block=1)
    model = UNet(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.08)
    return model.eval()


class Plain(nn.Module):
    """A module that is not our U-Net: called with x and t."""

    sample_shape = (3, 4, 4)

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((3, 1, 1), 0.5))
        self.offset = 0.1

    def forward(self, x, t):
        time = (t / 1000).reshape(-1, 1, 1, 1)
        return torch.tanh(x * (self.gain + time)) + self.offset * x.roll(1, 1)


@pytest.fixture(autouse=True)
def no_captures():
    CAPTURED.clear()
    yield
    CAPTURED.clear()


# ---- bookkeeping, without a GPU ----


def captured(model, *settings) -> CapturedStep:
    return CapturedStep(None, None, (), Key(version(model), (), settings))


def test_cache_gives_out_each_step_once_and_keeps_the_latest():
    cache, model = GraphCache(bound=2), Plain()
    a, b, c = (captured(model, k) for k in range(3))
    assert cache.take(a.key) is None
    for step in (a, b, c):
        cache.put(step)
    assert len(cache) == 2
    assert cache.take(a.key) is None  # the oldest
    assert cache.take(b.key) is b
    assert cache.take(b.key) is None  # in use
    cache.put(b)
    cache.put(a)  # c is the oldest now
    assert cache.take(c.key) is None
    cache.clear()
    assert len(cache) == 0 and cache.take(b.key) is None


def test_cache_forgets_a_model_that_is_gone():
    model = Plain()
    CAPTURED.put(captured(model))
    assert len(CAPTURED) == 1
    del model
    gc.collect()
    assert len(CAPTURED) == 0


def test_version_changes_with_what_a_capture_freezes():
    model = Plain()
    first = version(model)
    assert version(model) == first and hash(first) == hash(version(model))
    with torch.no_grad():
        model.gain.mul_(2)  # in place: replayed
    assert version(model) == first
    assert version(copy.deepcopy(model)) != first

    def changed() -> bool:
        nonlocal first
        was, first = first, version(model)
        return first != was

    model.gain = nn.Parameter(model.gain.detach().clone())
    assert changed()
    model.offset = 0.2
    assert changed()
    handle = model.register_forward_hook(lambda *_: None)
    assert changed()
    handle.remove()
    assert changed()
    model.half()
    assert changed()
    model.block = nn.Linear(2, 2)
    assert changed()
    assert not changed()


def test_version_of_a_unet_does_not_change_by_running():
    model = tiny_unet()
    first = version(model)
    Sampler(model, SCHEDULE, num_steps=2)(1)
    assert version(model) == first


@pytest.mark.parametrize(
    ("model", "graph", "because"),
    [
        (Plain(), False, "graph=False"),
        (Plain(), "auto", "the model is on cpu"),
        (lambda x, t: x, "auto", "the model is on cpu"),
    ],
)
def test_stats_say_why_a_run_was_eager(model, graph, because):
    sampler = Sampler(model, SCHEDULE, num_steps=2, graph=graph)
    assert sampler.stats == cuda_graph.Stats()
    sampler(1, shape=(3, 4, 4))
    stats = sampler.stats
    assert (stats.captures, stats.replays, stats.eager_because) == (0, 0, because)
    assert stats.first_call_seconds > 0
    sampler(1, shape=(3, 4, 4))
    assert sampler.stats == stats


def test_why_eager_on_a_gpu():
    device = torch.device("cuda")
    assert Graphs(Plain(), "auto")._why_eager(device) is None
    assert "not a module" in Graphs(lambda x, t: x, "auto")._why_eager(device)
    assert Graphs(lambda x, t: x, True)._why_eager(device) is None


def test_graph_on_the_cpu_is_an_error():
    with pytest.raises(ValueError, match="graph=True needs a model on CUDA, got one on cpu"):
        Sampler(Plain(), SCHEDULE, graph=True)
    sampler = Sampler(lambda x, t: x, SCHEDULE, graph=True)  # whose device is not known before the call
    with pytest.raises(ValueError, match="graph=True needs a model on CUDA, got one on cpu"):
        sampler(1, shape=(3, 4, 4))
    with pytest.raises(ValueError, match="graph=True needs a model on CUDA, got one on cpu"):
        sampler.stream([], shape=(3, 4, 4))


# ---- on a GPU ----


@pytest.fixture(params=["unet", "plain"])
def model(request):
    return (tiny_unet() if request.param == "unet" else Plain()).cuda()


def eager(model, **options) -> Sampler:
    return Sampler(model, SCHEDULE, graph=False, **options)


class TestOnAGpu:
    pytestmark = gpu

    @pytest.mark.parametrize("options", RUNS, ids=["ddpm", "ddim", "ddim-eta", "dpm_solver"])
    def test_replays_are_bit_equal_to_eager(self, model, options):
        sampler = Sampler(model, SCHEDULE, **options)
        expected = eager(model, **options)(2, seed=3, first_image=5)
        for _ in range(2):
            assert torch.equal(sampler(2, seed=3, first_image=5), expected)
        assert sampler.stats.captures == 1
        assert sampler.stats.replays == 100
        assert sampler.stats.eager_because is None

    def test_what_needs_no_capture_and_what_does(self):
        model = Plain().cuda()
        options = {"num_steps": 4}
        sampler = Sampler(model, SCHEDULE, **options)
        sampler(2)
        other = Sampler(model, Schedule.cosine(), num_steps=4)
        x_T = torch.randn(2, 3, 4, 4, device="cuda")
        with torch.no_grad():
            model.gain.add_(0.3)
        for run in ({"seed": 9}, {"first_image": 4}, {"x_T": x_T}):
            arguments = {"batch_size": 2, **run}
            assert torch.equal(sampler(**arguments), eager(model, **options)(**arguments))
        expected = Sampler(model, Schedule.cosine(), num_steps=4, graph=False)(2)
        assert torch.equal(other(2), expected)
        assert (sampler.stats.captures, other.stats.captures) == (1, 0)
        sampler(3)
        assert sampler.stats.captures == 2
        sampler(2)
        sampler(3)
        assert sampler.stats.captures == 2
        model.offset = 0.7
        assert torch.equal(sampler(2), eager(model, **options)(2))
        assert sampler.stats.captures == 3
        assert len(CAPTURED) == 3

    def test_new_weights_of_a_unet_are_replayed(self):
        model = tiny_unet().cuda()
        sampler = Sampler(model, SCHEDULE, num_steps=4)
        before = sampler(2)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.9).add_(0.01)
        after = sampler(2)
        assert torch.equal(after, eager(model, num_steps=4)(2)) and not torch.equal(after, before)
        assert sampler.stats.captures == 1

    def test_a_run_never_waits_for_the_device(self, model):
        for options in ({"num_steps": 4}, {"num_steps": 4, "graph": False}):
            sampler = Sampler(model, SCHEDULE, **options)
            expected = sampler(2, seed=1)
            torch.cuda.set_sync_debug_mode("error")
            try:
                got = sampler(2, seed=1)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert torch.equal(got, expected)

    def test_two_runs_alternate(self, model):
        """Of one sampler, whose second run must not share the first's buffers, and of two."""
        options = {"num_steps": 4}
        one = Sampler(model, SCHEDULE, **options)
        two = Sampler(model, SCHEDULE, method="ddim", eta=1.0, **options)
        walks = [one.trajectory(2, seed=1), one.trajectory(2, seed=2), two.trajectory(2, seed=3)]
        last = [walk[-1] for walk in zip(*zip(*walks, strict=True), strict=True)]
        for (_, _, x, x0), sampler, seed in zip(last, (one, one, two), (1, 2, 3), strict=True):
            kind = {} if sampler is one else {"method": "ddim", "eta": 1.0}
            *_, (_, _, expected, expected_x0) = eager(model, **options, **kind).trajectory(2, seed=seed)
            assert torch.equal(x, expected) and torch.equal(x0, expected_x0)
        assert one.stats.captures + two.stats.captures == 3

    def test_a_result_outlives_the_next_run(self):
        sampler = Sampler(Plain().cuda(), SCHEDULE, num_steps=3)
        first = sampler(2, seed=1)
        kept = first.clone()
        sampler(2, seed=2)
        assert torch.equal(first, kept)

    def test_an_abandoned_walk_gives_its_step_back(self):
        sampler = Sampler(Plain().cuda(), SCHEDULE, num_steps=3)
        walk = sampler.trajectory(2)
        next(walk)
        walk.close()
        sampler.trajectory(2)
        assert sampler.stats.captures == 1

    def test_callback_runs_between_replays(self, model):
        seen = []

        def callback(i, t, x, x0):
            seen.append((i, t, x0.abs().max().item() <= 1))
            if i == 2:
                x.zero_()

        sampler = Sampler(model, SCHEDULE, num_steps=5)
        got = sampler(2, callback=callback)
        assert seen == [(i, t, True) for i, t in enumerate((800, 600, 400, 200, 0))]
        assert torch.equal(got, eager(model, num_steps=5)(2, callback=callback))
        assert not torch.equal(got, sampler(2))
        assert sampler.stats.replays == 10

    @pytest.mark.parametrize("device", ["cpu", "cuda"])
    @pytest.mark.parametrize("several", [False, True])
    def test_torch_noise(self, device, several):
        """The same draws as an eager run's, and as many of them; another generator is no new capture."""
        model = Plain().cuda()

        def run(sampler, seed):
            generators = [torch.Generator(device).manual_seed(seed + k) for k in range(2)]
            x = sampler(2, noise="torch", generator=generators if several else generators[0])
            return x, [generator.get_state() for generator in generators]

        sampler = Sampler(model, SCHEDULE, num_steps=4, variance="fixed_large")
        for seed in (1, 7):
            x, states = run(sampler, seed)
            expected, expected_states = run(eager(model, num_steps=4, variance="fixed_large"), seed)
            assert torch.equal(x, expected)
            assert all(torch.equal(a, b) for a, b in zip(states, expected_states, strict=True))
        assert (sampler.stats.captures, sampler.stats.replays) == (1, 8)
        assert [len(step.generators) for step in CAPTURED._free] == [(1 + several) * (device == "cuda")]

    def test_inside_inference_mode_and_outside(self):
        sampler = Sampler(Plain().cuda(), SCHEDULE, num_steps=3)
        with torch.inference_mode():
            inside = sampler(1)
        assert torch.equal(sampler(1), inside) and not sampler(1).is_inference()

    def test_half_precision_and_channels_last(self):
        model = tiny_unet().cuda()
        options = {"num_steps": 4, "dtype": torch.bfloat16}
        sampler = Sampler(model, SCHEDULE, **options)
        assert sampler.channels_last
        assert sampler.model.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
        got = sampler(2)
        assert got.dtype == torch.float32 and got.is_contiguous()
        assert torch.equal(got, eager(model, **options)(2))
        assert sampler.stats.replays == 4

    def test_a_model_that_waits_names_the_op(self):
        class Waits(Plain):
            def forward(self, x, t):
                return super().forward(x, t) * (1 if x.sum().item() > 0 else 0.5)

        model = Waits().cuda()
        message = (
            r"graph=True, but a step cannot be captured: aten\._local_scalar_dense.* waits for the device"
        )
        with pytest.raises(RuntimeError, match=message):
            Sampler(model, SCHEDULE, num_steps=3, graph=True)(1)
        sampler = Sampler(model, SCHEDULE, num_steps=3)
        with pytest.warns(
            RuntimeWarning, match=r"aten\._local_scalar_dense.*every kernel is launched"
        ) as warned:
            got = [sampler(1), sampler(1)]
        assert len(warned) == 1 and warned[0].filename == __file__
        expected = eager(model, num_steps=3)(1)
        assert all(torch.equal(x, expected) for x in got)
        assert "_local_scalar_dense" in sampler.stats.eager_because

    def test_a_model_that_cannot_be_captured_otherwise(self):
        class Synchronizes(Plain):
            def forward(self, x, t):
                torch.cuda.synchronize()
                return super().forward(x, t)

        with pytest.raises(RuntimeError, match="graph=True, but a step cannot be captured: "):
            Sampler(Synchronizes().cuda(), SCHEDULE, num_steps=3, graph=True)(1)
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
        assert Sampler(Plain().cuda(), SCHEDULE, num_steps=3)(1).isfinite().all()

    @pytest.mark.parametrize("graph", ["auto", True])
    def test_no_memory_for_a_capture(self, graph):
        class Large(Plain):
            def forward(self, x, t):
                if torch.cuda.is_current_stream_capturing():
                    kept = x.new_empty(2**20)
                    raise torch.OutOfMemoryError(f"after {kept.numel()}")
                return super().forward(x, t)

        model = Large().cuda()
        expected = eager(model, num_steps=3)(1)
        sampler = Sampler(model, SCHEDULE, num_steps=3, graph=graph)
        before = torch.cuda.memory_reserved()
        with pytest.warns(RuntimeWarning, match="not enough memory to capture a step: after"):
            got = sampler(1)
        assert torch.equal(got, expected)
        assert torch.cuda.memory_reserved() <= before
        assert "not enough memory" in sampler.stats.eager_because

    def test_autocast_is_eager(self):
        sampler = Sampler(Plain().cuda(), SCHEDULE, num_steps=3)
        with torch.autocast("cuda", torch.bfloat16):
            sampler(1)
        assert sampler.stats.captures == 0 and "autocast" in sampler.stats.eager_because
        sampler(1)
        assert sampler.stats.replays == 3

    def test_errors_of_the_model_are_its_own(self):
        class Wrong(Plain):
            def forward(self, x, t):
                return x[:, :2]

        with pytest.raises(ValueError, match="out must have x's shape"):
            Sampler(Wrong().cuda(), SCHEDULE, num_steps=3)(1)

    def test_stream_replays(self, model):
        sampler = Sampler(model, SCHEDULE, num_steps=3)
        lengths = itertools.cycle((3, 7, None))
        requests = [Request(seed=1, image_index=k, num_steps=next(lengths)) for k in range(7)]
        for request, image in sampler.stream(iter(requests), batch_size=3):
            alone = eager(model, num_steps=request.num_steps or 3)(1, seed=1, first_image=request.image_index)
            torch.testing.assert_close(image, alone[0], rtol=0, atol=1e-4)
        captures = sampler.stats.captures
        assert 1 <= captures <= 2 and sampler.stats.eager_because is None
        assert len(list(sampler.stream(requests[:4], batch_size=3))) == 4
        assert sampler.stats.captures == captures
        slow, fast = Request(num_steps=60), Request(num_steps=3)  # whose place is empty until the other's end
        served = dict(sampler.stream([slow, fast], batch_size=2))
        torch.testing.assert_close(served[slow], eager(model, num_steps=60)(1)[0], rtol=0, atol=1e-4)
