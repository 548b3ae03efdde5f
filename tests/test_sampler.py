"""The sampler: equal to the naive loop, to diffusers' pipelines, and to itself whatever the batch."""

from __future__ import annotations

import copy
import threading
import types
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch

from ddpm_fast import (
    Request,
    Sampler,
    Schedule,
    UNet,
    UNetConfig,
    checkpoint,
    ops,
    reference,
    steps,
    to_uint8,
)
from ddpm_fast.bench.steps import overhead
from ddpm_fast.convolution import can_pack
from ddpm_fast.engine import Buffers, Network, advancing, evaluating
from ddpm_fast.noise import CounterNoise, TorchNoise
from ddpm_fast.ops import _dispatch
from ddpm_fast.sampler import _check_device

SCHEDULE = Schedule.linear()
METHODS = ("ddpm", "ddim", "dpm_solver")


def denoiser(x, t):
    """A model with some of a network's behaviour: bounded, and different at every t and channel."""
    time = (t.float() / 1000).reshape(-1, *[1] * (x.dim() - 1))
    return torch.tanh(x * (0.5 + time)) + 0.1 * x.roll(1, 1)


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    model = UNet(UNetConfig((16, 32), (False, True), (True, False), sample_size=8, norm_num_groups=8))
    for parameter in model.parameters():  # zero-initialised outputs would make a model that does nothing
        torch.nn.init.normal_(parameter, std=0.08)
    return model.eval()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("clip", [1.0, None])
def test_is_the_naive_loop(method, clip):
    sampler = Sampler(denoiser, SCHEDULE, method=method, num_steps=20, clip=clip)
    images, seed = torch.arange(7, 10), torch.tensor(5)
    x_T = ops.counter_normal((3, 3, 9, 7), 5, 7, 0, stream="x_T")
    expected = reference.sample(
        denoiser,
        x_T,
        sampler.table.timesteps_tensor(),
        sampler.table.tensor(),
        seed=seed,
        image_index=images,
        clip=clip,
    )
    got = sampler(3, shape=(3, 9, 7), seed=5, first_image=7)
    assert got.dtype == torch.float32 and got.is_contiguous()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_defaults_are_documented(method):
    steps = {"ddpm": 1000, "ddim": 50, "dpm_solver": 20}[method]
    table = Sampler(denoiser, SCHEDULE, method=method).table
    assert len(table) == steps
    assert table.timesteps[0] == {"ddpm": 999, "ddim": 980, "dpm_solver": 999}[method]
    few = Sampler(denoiser, Schedule.linear(10), method=method).table
    assert len(few) == (9 if method == "dpm_solver" else 10) and few.timesteps[0] == 9
    assert len(Sampler(denoiser, Schedule.linear(1), method="ddim").table) == 1


def test_noise_does_not_depend_on_the_batch():
    """x_T and every step's noise, bit for bit: a model that returns 0 leaves only them."""

    def silent(x, t):
        return torch.zeros_like(x)

    sampler = Sampler(silent, SCHEDULE, num_steps=8, variance="fixed_large", clip=None)
    whole = sampler(64, shape=(3, 8, 8), seed=11, first_image=100)
    for first, size in ((0, 1), (5, 1), (0, 3), (61, 3), (10, 54)):
        part = sampler(size, shape=(3, 8, 8), seed=11, first_image=100 + first)
        assert torch.equal(part, whole[first : first + size])
    other = sampler(64, shape=(3, 8, 8), seed=12, first_image=100)
    assert (other - whole).abs().amax((1, 2, 3)).min() > 0.1


@pytest.mark.parametrize("method", METHODS)
def test_images_do_not_depend_on_the_batch(unet, method):
    sampler = Sampler(unet, SCHEDULE, method=method, num_steps=10)
    whole = sampler(64, seed=3)
    for first, size in ((0, 1), (63, 1), (0, 3), (30, 3), (0, 20), (20, 44)):
        part = sampler(size, seed=3, first_image=first)
        assert (part - whole[first : first + size]).abs().max() <= 1e-4


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_point_cloud_and_a_video(backend, monkeypatch):
    if reason := _dispatch.why_not("posterior_step", backend, "cpu", torch.float32):
        pytest.skip(reason)
    monkeypatch.setattr(_dispatch, "FORCED_BACKEND", backend)
    for shape in ((2,), (1, 3, 4, 5)):
        x = Sampler(denoiser, SCHEDULE, num_steps=5)(10, shape=shape)
        assert x.shape == (10, *shape) and x.isfinite().all()


def test_learned_range():
    def model(x, t):
        return torch.cat([denoiser(x, t), denoiser(x, t) * 0.5], 1)

    drawn = Sampler(model, SCHEDULE, num_steps=20, variance="learned_range")(2, shape=(3, 8, 8))
    assert drawn.isfinite().all()
    ddim = Sampler(model, SCHEDULE, method="ddim", num_steps=20)(2, shape=(3, 8, 8))  # ignores the variance
    assert torch.equal(ddim, Sampler(denoiser, SCHEDULE, method="ddim", num_steps=20)(2, shape=(3, 8, 8)))


# ---- a table as it is given ----


def test_a_table_in_place_of_a_schedule():
    table = steps.ddim(SCHEDULE, 7, eta=0.5, spacing="trailing")
    sampler = Sampler(denoiser, table, clip=None)
    options = {"method": "ddim", "num_steps": 7, "eta": 0.5, "spacing": "trailing", "clip": None}
    expected = Sampler(denoiser, SCHEDULE, **options)
    assert sampler.table is table
    assert torch.equal(sampler(2, shape=(3, 8, 8)), expected(2, shape=(3, 8, 8)))

    requests = [Request(seed=k, num_steps=n) for k, n in enumerate((None, 7))]
    images = {request.seed: image for request, image in sampler.stream(requests, shape=(3, 8, 8))}
    for seed in (0, 1):
        torch.testing.assert_close(images[seed], expected(1, shape=(3, 8, 8), seed=seed)[0])
    with pytest.raises(ValueError, match=r"num_steps must be None or 7, .* got 8"):
        list(sampler.stream([Request(num_steps=8)], shape=(3, 8, 8)))


def test_another_table_on_the_same_sampler(unet):
    sampler = Sampler(unet, SCHEDULE, method="ddim", num_steps=4, dtype=torch.bfloat16)
    table = steps.dpm_solver(SCHEDULE, 3)
    other = sampler.with_table(table, clip=None)
    assert other.model is sampler.model and other.table is table and len(sampler.table) == 4
    expected = Sampler(unet, table, clip=None, dtype=torch.bfloat16)
    assert torch.equal(other(2), expected(2))
    with pytest.raises(TypeError, match="table must be a StepTable, got Schedule"):
        sampler.with_table(SCHEDULE)
    with pytest.raises(ValueError, match="clip must be None or a positive number"):
        sampler.with_table(table, clip=-1)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "ddim"},
        {"num_steps": 5},
        {"spacing": np.array([5, 0])},
        {"prediction": "v"},
        {"steps_offset": 1},
        {"variance": "fixed_small"},
        {"eta": 1.0},
        {"use_clipped_out": True},
        {"final_alpha_cumprod": 0.9},
        {"order": 1},
    ],
    ids=lambda options: next(iter(options)),
)
def test_a_table_takes_no_options_of_a_table(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} cannot be given beside a StepTable"):
        Sampler(denoiser, steps.ddim(SCHEDULE, 5), **options)


# ---- class labels ----


@pytest.fixture(scope="module")
def conditional():
    torch.manual_seed(0)
    config = UNetConfig((8,), (False,), (False,), sample_size=4, norm_num_groups=4, num_class_embeds=3)
    model = UNet(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def test_class_labels(conditional):
    sampler = Sampler(conditional, SCHEDULE, num_steps=5)
    labels = torch.tensor([2, 0, 2])
    images = sampler(class_labels=labels, seed=1)
    assert len(images) == 3
    fixed = Sampler(lambda x, t: conditional(x, t, labels), SCHEDULE, num_steps=5)
    torch.testing.assert_close(images, fixed(3, shape=(3, 4, 4), seed=1), rtol=0, atol=1e-5)
    others = sampler(class_labels=torch.tensor([2, 1, 2]), seed=1)
    same = [torch.allclose(a, b, atol=1e-5) for a, b in zip(images, others, strict=True)]
    assert same == [True, False, True]
    *_, (_, _, last, _) = sampler.trajectory(class_labels=labels, seed=1)
    assert torch.equal(last, images)
    assert torch.equal(labels, torch.tensor([2, 0, 2]))


def test_class_labels_are_a_buffer(conditional):
    """What a captured step does: it is bound once, and other labels are copied in."""

    def inputs(labels):
        x, i = torch.ones(2, 3, 4, 4), torch.tensor(0)
        table = Sampler(conditional, SCHEDULE, num_steps=2).table
        image_index = {"seed": torch.tensor(0), "image_index": torch.arange(2)}
        labels = torch.tensor(labels)
        return Buffers(
            x, None, i, table.tensor(), table.timesteps_tensor(), **image_index, class_labels=labels
        )

    def bound(buffers):
        return advancing(Network(conditional, None, False).bind(buffers, 1.0), buffers, lambda: None)

    first, second = inputs([0, 1]), inputs([2, 1])
    assert first.layout() == second.layout()
    assert replace(first, class_labels=None).layout() != first.layout()
    own = first.clone()
    step = bound(own)
    with torch.no_grad():
        step()
        own.load(second)
        step()
        bound(second)()
    assert torch.equal(own.x, second.x) and not torch.equal(second.x[0], second.x[1])


def test_class_labels_of_any_model():
    """A callable is given them as they are, whatever they are."""
    seen = []

    def model(x, t, class_labels):
        seen.append(class_labels)
        return denoiser(x, t)

    labels = torch.randn(2, 5)
    x = Sampler(model, SCHEDULE, num_steps=3)(2, shape=(3, 4, 4), class_labels=labels)
    assert len(seen) == 3 and all(torch.equal(given, labels) for given in seen)
    assert torch.equal(x, Sampler(denoiser, SCHEDULE, num_steps=3)(2, shape=(3, 4, 4)))


@pytest.mark.parametrize(
    "labels,error,match",
    [
        (None, ValueError, r"needs class_labels, in \[0, 2\]"),
        ([0, 1], TypeError, "class_labels must be an int64 Tensor, got list"),
        (torch.zeros(2), TypeError, "class_labels must be an int64 Tensor, got torch.float32"),
        (torch.tensor([0]), ValueError, r"class_labels must have shape \(2,\), one an image, got \(1,\)"),
        (torch.tensor([[0], [1]]), ValueError, r"class_labels must have shape \(2,\)"),
        (torch.tensor(1), ValueError, r"class_labels must have shape \(2,\), one an image, got \(\)"),
        (torch.tensor([0, 3]), ValueError, r"class_labels must be in \[0, 2\], got 3"),
        (torch.tensor([-1, 0]), ValueError, r"class_labels must be in \[0, 2\], got -1"),
    ],
)
def test_bad_class_labels_are_named(conditional, labels, error, match):
    with pytest.raises(error, match=match):
        Sampler(conditional, SCHEDULE, num_steps=2)(2, class_labels=labels)


def test_class_labels_for_a_model_without_classes(unet):
    with pytest.raises(ValueError, match="the model has no classes and takes no class_labels"):
        Sampler(unet, SCHEDULE, num_steps=2)(2, class_labels=torch.tensor([0, 1]))


# ---- noise as it is given ----


def test_noise_of_each_image():
    """Seeds of their own: an image is that of its seed and index in any batch."""
    sampler = Sampler(denoiser, SCHEDULE, num_steps=5, variance="fixed_large")
    noise = CounterNoise(torch.tensor([7, 3, 7]), torch.tensor([0, 4, 1]))
    images = sampler(3, shape=(3, 4, 4), noise=noise)
    for image, seed, index in zip(images, (7, 3, 7), (0, 4, 1), strict=True):
        assert torch.equal(image, sampler(1, shape=(3, 4, 4), seed=seed, first_image=index)[0])


def test_noise_of_a_generator_in_another_dtype():
    sampler = Sampler(denoiser, SCHEDULE, num_steps=5, dtype=torch.bfloat16)
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    whole = Sampler(denoiser, SCHEDULE, num_steps=5)(
        2, shape=(3, 4, 4), noise="torch", generator=generators[0]
    )
    half = sampler(2, shape=(3, 4, 4), noise=TorchNoise(generators[1], torch.float32))
    assert (half - whole).abs().max() < 0.05
    assert torch.equal(generators[0].get_state(), generators[1].get_state())


def test_progress_may_be_a_function():
    seen = []

    def bar(steps):
        for i in steps:
            seen.append(i)
            yield i

    Sampler(denoiser, SCHEDULE, num_steps=3)(1, shape=(3, 4, 4), progress=bar)
    assert seen == [0, 1, 2]


# ---- against diffusers ----


@pytest.fixture(scope="module")
def hf_unet(diffusers):
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    ).eval()


@pytest.mark.parametrize("generators", ["one", "each"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_is_the_ddpm_pipeline(diffusers, hf_unet, variance, generators):
    pipe = diffusers.DDPMPipeline(hf_unet, diffusers.DDPMScheduler(variance_type=variance))
    pipe.set_progress_bar_config(disable=True)
    compare_with_pipeline(pipe, generators, 20)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_is_the_ddim_pipeline(diffusers, hf_unet, eta):
    pipe = diffusers.DDIMPipeline(hf_unet, diffusers.DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    compare_with_pipeline(pipe, "one", 5, eta=eta)  # few: an untrained DDIM amplifies rounding


def compare_with_pipeline(pipe, kind, num_steps, **options):
    def generator():
        if kind == "one":
            return torch.Generator().manual_seed(3)
        return [torch.Generator().manual_seed(k) for k in (3, 4)]

    drawn_by_them, drawn_by_us = generator(), generator()
    theirs = pipe(
        batch_size=2,
        generator=drawn_by_them,
        num_inference_steps=num_steps,
        output_type="np",
        **options,
    ).images
    model, schedule, settings = checkpoint.load_diffusers(pipe)
    sampler = Sampler(model, schedule, num_steps=num_steps, **settings, **options)
    ours = sampler(2, noise="torch", generator=drawn_by_us)
    images = (ours / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert np.abs(images - theirs).max() <= 1e-4
    if kind == "one":  # as many draws, so that whatever is drawn next is the same too
        assert torch.equal(drawn_by_us.get_state(), drawn_by_them.get_state())


def test_to_uint8_is_the_pipelines(diffusers):
    images = torch.linspace(-1.2, 1.2, 3 * 64 * 64).reshape(1, 3, 64, 64)
    unit = (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    theirs = np.asarray(diffusers.DDPMPipeline.numpy_to_pil(unit)[0])
    assert np.array_equal(to_uint8(images)[0].permute(1, 2, 0).numpy(), theirs)
    assert np.array_equal(Sampler.to_uint8(images)[0].permute(1, 2, 0).numpy(), theirs)
    with pytest.raises(TypeError, match="images must be a floating Tensor"):
        to_uint8(torch.zeros(3, dtype=torch.uint8))


# ---- what a call takes and gives ----


def test_trajectory_walks_the_call():
    sampler = Sampler(denoiser, SCHEDULE, num_steps=10)
    walk = list(sampler.trajectory(2, every=4, shape=(3, 8, 8), seed=1))
    assert [(i, t) for i, t, _, _ in walk] == [(3, 600), (7, 200), (9, 0)]
    assert torch.equal(walk[-1][2], sampler(2, shape=(3, 8, 8), seed=1))
    assert torch.equal(walk[-1][2], walk[-1][3])  # DDPM's last step returns x0
    assert walk[0][2].data_ptr() != walk[1][2].data_ptr()
    assert not torch.is_inference_mode_enabled()
    for bad in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="every must be an int of at least 1"):
            sampler.trajectory(2, every=bad, shape=(3, 8, 8))


def test_callback_sees_and_may_change_each_step():
    seen = []

    def callback(i, t, x, x0):
        seen.append((i, t, x.shape, x0.abs().max().item() <= 1))
        if i == 4:
            x.zero_()

    sampler = Sampler(denoiser, SCHEDULE, num_steps=5)
    x = sampler(2, shape=(3, 4, 4), callback=callback)
    assert seen == [(i, t, (2, 3, 4, 4), True) for i, t in enumerate((800, 600, 400, 200, 0))]
    assert not x.any()


def test_x_T_is_taken_and_left_alone():
    sampler = Sampler(denoiser, SCHEDULE, method="ddim", num_steps=5)
    x_T = torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    before = x_T.detach().clone()
    x = sampler(x_T=x_T)
    assert x.shape == x_T.shape and torch.equal(x_T, before)
    drawn = ops.counter_normal((2, 3, 8, 8), 0, 0, 0, stream="x_T")
    assert torch.equal(sampler(2, x_T=drawn), sampler(2, shape=(3, 8, 8)))


def test_result_is_an_ordinary_tensor(unet):
    x = Sampler(unet, SCHEDULE, num_steps=2)(1)
    weight = torch.ones(1, requires_grad=True)
    (x * weight).sum().backward()
    assert weight.grad is not None


def test_half_precision_keeps_a_float32_state(unet):
    full = Sampler(unet, SCHEDULE, num_steps=10)(2)
    seen = []

    class Watched(torch.nn.Module):
        sample_shape = (3, 8, 8)

        def __init__(self):
            super().__init__()
            self.unet = copy.deepcopy(unet)

        def forward(self, x, t):
            seen.append(x.dtype)
            return self.unet(x, t)

    half = Sampler(Watched(), SCHEDULE, num_steps=10, dtype=torch.bfloat16)(2)
    assert half.dtype == torch.float32 and set(seen) == {torch.bfloat16}
    assert (half - full).abs().max() < 0.1
    assert next(unet.parameters()).dtype == torch.float32


def test_a_half_model_runs_in_its_own_dtype(unet):
    half = copy.deepcopy(unet).half()
    sampler = Sampler(half, SCHEDULE, num_steps=3)
    assert sampler.model is half and sampler(1).dtype == torch.float32


def test_time_rows_are_read_of_a_plain_unet_only(unet, one_thread):
    """A hook, a subclass or a wrapper is called as it is, and the images are the same."""
    model, called = copy.deepcopy(unet), []
    run = {"num_steps": 5, "channels_last": True}
    rows = Sampler(model, SCHEDULE, **run)
    model.time_rows = lambda *arguments: called.append("rows") or UNet.time_rows(model, *arguments)
    expected = rows(2)
    assert called == ["rows"]
    assert torch.equal(Sampler(lambda x, t: model(x, t), SCHEDULE, **run)(2, shape=(3, 8, 8)), expected)
    handle = model.register_forward_hook(lambda *_: called.append("hook"))
    assert torch.equal(rows(2), expected)
    assert called == ["rows"] + 5 * ["hook"]
    handle.remove()
    with torch.no_grad():  # in place, and as a new parameter: a run computes its rows anew
        model.time_embedding.linear_1.bias.add_(1)
    changed = rows(2)
    model.mid_block.resnets[0].time_emb_proj.bias = torch.nn.Parameter(torch.ones(32))
    assert not torch.equal(changed, expected) and not torch.equal(rows(2), changed)
    assert torch.equal(rows(2), Sampler(model.__call__, SCHEDULE, **run)(2, shape=(3, 8, 8)))


def test_a_model_of_classes_says_what_it_needs():
    config = UNetConfig((8,), (False,), (False,), sample_size=4, norm_num_groups=4, num_class_embeds=3)
    with pytest.raises(ValueError, match="needs class_labels"):
        Sampler(UNet(config), SCHEDULE, num_steps=2)(1)


def test_channels_last(unet):
    seen = []

    def model(x, t):
        seen.append(x.is_contiguous(memory_format=torch.channels_last))
        return unet(x, t)

    expected = Sampler(unet, SCHEDULE, num_steps=5)(2)
    x = Sampler(model, SCHEDULE, num_steps=5, channels_last=True)(2, shape=(3, 8, 8))
    assert all(seen) and len(seen) == 5 and x.is_contiguous()
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-4)

    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.unet = unet

        def forward(self, x, t):
            return self.unet(x, t)

    sampler = Sampler(Wrapped(), SCHEDULE, num_steps=5, channels_last=True)
    weight = sampler.model.unet.mid_block.resnets[0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    torch.testing.assert_close(sampler(2, shape=(3, 8, 8)), expected, rtol=0, atol=1e-4)
    assert unet.mid_block.resnets[0].conv1.weight.is_contiguous()
    assert Sampler(unet, SCHEDULE, channels_last=True).model is unet  # lays out its weights itself

    flat = Sampler(lambda x, t: 0.1 * x, SCHEDULE, num_steps=2, channels_last=True)  # not 4-d: as it is
    assert flat(3, shape=(2,)).shape == (3, 2)
    for dtype in (None, torch.bfloat16, torch.float16):  # "auto", on the CPU
        assert Sampler(unet, SCHEDULE, dtype=dtype).channels_last == can_pack(dtype or torch.float32)
        assert not Sampler(Wrapped(), SCHEDULE, dtype=dtype).channels_last


def test_a_dtype_that_the_device_lacks(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    with pytest.raises(ValueError, match="dtype bfloat16 is not supported by cuda; allowed: float32"):
        _check_device(gpu, torch.bfloat16, "auto")
    for device, dtype in ((gpu, torch.float16), (gpu, None), (cpu, torch.bfloat16)):
        _check_device(device, dtype, "auto")


def test_a_model_may_use_autograd_inside():
    def energy(x, t):
        with torch.enable_grad():
            y = x.detach().clone().requires_grad_()
            return torch.autograd.grad((y**2).sum() * 0.05, y)[0]

    x = Sampler(energy, SCHEDULE, num_steps=3)(2, shape=(2,))
    expected = Sampler(lambda x, t: 0.1 * x, SCHEDULE, num_steps=3)(2, shape=(2,))
    torch.testing.assert_close(x, expected)


def test_a_published_variance_suits_every_method():
    for method in METHODS:
        Sampler(denoiser, SCHEDULE, method=method, num_steps=5, variance="fixed_large")(1, shape=(3, 4, 4))


def test_numpy_numbers_and_arrays_are_taken():
    sampler = Sampler(denoiser, SCHEDULE, method="ddim", spacing=np.array([900, 500, 0]))
    got = sampler(np.int64(2), shape=(3, 4, 4), seed=np.int64(3), first_image=np.int64(1))
    assert torch.equal(got, sampler(2, shape=(3, 4, 4), seed=3, first_image=1))


def test_runs_in_eval_mode_and_restores(unet):
    modes = []
    model = torch.nn.Sequential()
    model.forward = lambda x, t: modes.append(model.training) or denoiser(x, t)
    frozen = torch.nn.Dropout().eval()
    model.append(frozen).append(torch.nn.Dropout()).train()
    frozen.eval()
    sampler = Sampler(model, SCHEDULE, num_steps=2)
    sampler(1, shape=(3, 4, 4))
    assert modes == [False, False] and model.training and model[1].training and not frozen.training
    walk = sampler.trajectory(1, shape=(3, 4, 4))
    next(walk)
    assert model.training


def test_memory_does_not_grow_with_the_steps():
    """A run keeps one x, and of its steps at most the output just made."""
    made = []

    def model(x, t):
        made.append(weakref.ref(out := denoiser(x, t)))
        assert sum(ref() is not None for ref in made) <= 2
        return out

    Sampler(model, SCHEDULE, num_steps=50)(1, shape=(3, 4, 4))
    assert len(made) == 50


def test_a_step_costs_a_fifth_of_diffusers(diffusers):
    """Beside a model that does nothing; measured 7x for these 200 steps, 11x for 1000."""
    medians = (overhead(rounds=10, num_steps=200)[1] for _ in range(4))
    assert any(median >= 5 for median in medians)  # what else runs here takes more from the shorter arm


# ---- bad input ----


@pytest.mark.parametrize(
    "options,error,match",
    [
        ({"method": "euler"}, ValueError, "method='euler' is not known; allowed: ddpm, ddim, dpm_solver"),
        ({"num_steps": 1001}, ValueError, "num_steps must be"),
        ({"num_steps": 0}, ValueError, "num_steps must be"),
        ({"num_steps": 2.5}, TypeError, "num_steps must be"),
        ({"prediction": "noise"}, ValueError, "prediction must be one of"),
        ({"spacing": "even"}, ValueError, "spacing must be"),
        ({"variance": "small"}, ValueError, "variance must be one of"),
        ({"method": "ddim", "eta": 1.5}, ValueError, r"eta must be in \[0, 1\]"),
        ({"eta": 0.5}, ValueError, "eta=0.5 is an option of method 'ddim', not of 'ddpm'"),
        ({"method": "ddim", "variance": "large"}, ValueError, "is an option of method 'ddpm'"),
        ({"order": 1}, ValueError, "is an option of method 'dpm_solver'"),
        ({"clip": 0}, ValueError, "clip must be None or a positive number"),
        ({"clip": True}, ValueError, "clip must be None or a positive number"),
        ({"dtype": torch.int8}, ValueError, "dtype must be None, float32, bfloat16 or float16"),
        ({"graph": "yes"}, ValueError, "graph must be 'auto', True or False, got 'yes'"),
        ({"graph": 1}, ValueError, "graph must be 'auto', True or False, got 1"),
        ({"channels_last": None}, ValueError, "channels_last must be 'auto', True or False, got None"),
    ],
)
def test_bad_options_are_named(options, error, match):
    with pytest.raises(error, match=match):
        Sampler(denoiser, SCHEDULE, **options)


def test_bad_model_and_schedule_are_named():
    with pytest.raises(TypeError, match="model must be callable"):
        Sampler(3, SCHEDULE)
    with pytest.raises(TypeError, match="schedule must be a ddpm_fast Schedule"):
        Sampler(denoiser, [0.1, 0.2])
    zero = SCHEDULE.rescale_zero_terminal_snr()
    with pytest.raises(ValueError, match="zero terminal SNR needs prediction 'v' or 'x0'"):
        Sampler(denoiser, zero)
    assert (
        Sampler(denoiser, zero, num_steps=10, spacing="trailing", prediction="v")(1, shape=(3, 4, 4))
        .isfinite()
        .all()
    )


@pytest.mark.parametrize(
    "call,error,match",
    [
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"batch_size": 2.0}, TypeError, "batch_size must be an integer"),
        ({"shape": None}, ValueError, "shape must be given"),
        ({"shape": ()}, ValueError, "shape must have at least one dimension besides the batch"),
        ({"shape": (3, 0, 4)}, ValueError, r"shape\[1\] must be at least 1, got 0"),
        ({"shape": 4}, TypeError, "shape must be a sequence without the batch"),
        ({"x_T": torch.zeros(())}, ValueError, "x_T must have at least two dimensions"),
        ({"noise": "torch", "generator": [1, 2]}, TypeError, "generator must be a torch.Generator or a list"),
        ({"noise": "torch", "seed": 2**64}, ValueError, "seed must be"),
        ({"seed": 2**64}, ValueError, "seed must fit in 64 bits"),
        ({"seed": 0.5}, TypeError, "seed must be an int"),
        ({"progress": 1}, TypeError, "progress must be True, False or a function, got int"),
        ({"first_image": -1}, ValueError, "first_image must be"),
        ({"noise": "philox"}, ValueError, "noise='philox' is not known; allowed: counter, torch"),
        ({"generator": torch.Generator()}, ValueError, "generator is for noise='torch'"),
        ({"noise": "torch", "first_image": 1}, ValueError, "first_image is for noise='counter'"),
        ({"noise": "torch", "generator": [torch.Generator()] * 3}, ValueError, "generator must be one, or"),
        (
            {"noise": TorchNoise([torch.Generator()] * 3, torch.float32)},
            ValueError,
            "generator must be one, or",
        ),
        ({"noise": CounterNoise(torch.tensor(1), torch.arange(3))}, ValueError, "image_index must be"),
        (
            {"noise": CounterNoise(torch.tensor(1), torch.arange(2)), "seed": 1},
            ValueError,
            "generator, seed and first_image cannot be given beside a noise that has its own",
        ),
        ({"x_T": torch.zeros(3, 3, 4, 4)}, ValueError, r"x_T must have shape \(2, 3, 4, 4\)"),
        ({"x_T": torch.zeros(2, 3, 4, 4, dtype=torch.int64)}, TypeError, "x_T must be a floating Tensor"),
    ],
)
def test_bad_calls_are_named_before_any_work(call, error, match):
    calls = []

    def model(x, t):
        calls.append(t)
        return x

    arguments = {"batch_size": 2, "shape": (3, 4, 4)} | call
    with pytest.raises(error, match=match):
        Sampler(model, SCHEDULE, num_steps=3)(**arguments)
    assert not calls


def test_bad_model_outputs_are_named():
    def run(model):
        Sampler(model, SCHEDULE, num_steps=2)(1, shape=(3, 4, 4))

    with pytest.raises(TypeError, match="model must return a Tensor, got SimpleNamespace"):
        run(lambda x, t: types.SimpleNamespace(sample=x))
    with pytest.raises(ValueError, match="out must have x's shape"):
        run(lambda x, t: x[:, :2])
    with pytest.raises(TypeError, match=r"out must be torch\.float32"):
        run(lambda x, t: x.double())


def test_threads_evaluate_one_model():
    """One that is done leaves it in eval mode for the other; the last puts back what was found."""
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Linear(1, 1).eval())
    begun, left, found = threading.Event(), threading.Event(), []

    def second():
        with evaluating(model):
            begun.set()
            left.wait(10)
            found.append(any(part.training for part in model.modules()))

    thread = threading.Thread(target=second)
    with evaluating(model):
        thread.start()
        assert begun.wait(10)
    left.set()
    thread.join()
    assert found == [False] and [part.training for part in model.modules()] == [True, True, False]
