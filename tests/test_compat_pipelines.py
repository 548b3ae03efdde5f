"""Our DDPMPipeline and DDIMPipeline: diffusers' pictures, errors and folders, and what is added to them."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ddpm_fast
from ddpm_fast import checkpoint

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install ddpm_fast[test]")

from ddpm_fast.compat.diffusers import (  # noqa: E402
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    accelerate,
)
from ddpm_fast.compat.diffusers.networks import Network  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

THEIRS = {DDPMPipeline: diffusers.DDPMPipeline, DDIMPipeline: diffusers.DDIMPipeline}
BOTH = pytest.mark.parametrize("pipeline", THEIRS, ids=lambda pipeline: pipeline.__name__)

GOOGLE = {
    "attention_head_dim": None,
    "norm_eps": 1e-6,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
}
CIFAR = GOOGLE | {
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}
LSUN = GOOGLE | {
    "sample_size": 64,
    "block_out_channels": (32, 32, 32, 32, 64, 64),
    "down_block_types": (*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4),
}
SMALL = GOOGLE | {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 8,
}


def unet(**config):
    torch.manual_seed(0)
    return diffusers.UNet2DModel(**(SMALL | config)).eval()


@pytest.fixture
def small():
    return unet()


def both(pipeline, model, scheduler):
    """Theirs and ours, around the same parts."""
    pipes = [made(model, copy.deepcopy(scheduler)) for made in (THEIRS[pipeline], pipeline)]
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    return pipes


def quiet(pipeline, model, scheduler):
    pipe = pipeline(model, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def assert_same_pictures(ours, theirs):
    """uint8: at most 0.1 % of the values off, by one level."""
    ours, theirs = (np.stack([np.asarray(image) for image in images]) for images in (ours, theirs))
    assert ours.dtype == theirs.dtype == np.uint8 and ours.shape == theirs.shape
    off = np.abs(ours.astype(int) - theirs.astype(int))
    assert off.max() <= 1 and (off > 0).mean() <= 1e-3


def seeded(kind, batch_size):
    """A generator, one an image, or torch's own, seeded."""
    if kind == "global":
        torch.manual_seed(3)
        return None
    if kind == "one":
        return torch.Generator().manual_seed(3)
    return [torch.Generator().manual_seed(k) for k in range(batch_size)]


def by_hand(model, scheduler, x, steps, *labels):
    """diffusers' loop from x, where nothing is drawn: (B, C, H, W) in [0, 1]."""
    scheduler.set_timesteps(steps)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t, *labels).sample, t, x).prev_sample
    return (x / 2 + 0.5).clamp(0, 1)


def said(told):
    """The one warning that is ours."""
    (ours,) = [warning for warning in told if warning.category is RuntimeWarning]
    return ours


def states(generator):
    if generator is None:
        return torch.get_rng_state()
    one = isinstance(generator, torch.Generator)
    return torch.stack([each.get_state() for each in ([generator] if one else generator)])


# ---- diffusers' pictures ----

# Few steps where nothing is drawn: an untrained network amplifies any rounding tenfold every few of them.
RUNS = [
    (DDPMPipeline, diffusers.DDPMScheduler(variance_type="fixed_large"), {"num_inference_steps": 10}),
    (DDIMPipeline, diffusers.DDIMScheduler(), {"num_inference_steps": 4}),
    (DDIMPipeline, diffusers.DDIMScheduler(), {"num_inference_steps": 10, "eta": 1.0}),
]


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("run", RUNS, ids=["ddpm", "ddim", "ddim-eta"])
@pytest.mark.parametrize(
    "config", [CIFAR | {"block_out_channels": (32, 64, 64, 64)}, LSUN], ids=["32", "256"]
)
def test_pictures_of_the_google_configs(config, run, batch_size):
    pipeline, scheduler, options = run
    theirs, ours = both(pipeline, unet(**config), scheduler)
    drawn = [seeded("one", batch_size) for _ in range(2)]
    expected, got = (
        pipe(batch_size, generator=generator, **options).images
        for pipe, generator in zip((theirs, ours), drawn, strict=True)
    )
    assert_same_pictures(got, expected)
    assert torch.equal(states(drawn[0]), states(drawn[1]))
    assert ours._network.because is None


def test_pictures_at_full_width():
    theirs, ours = both(DDIMPipeline, unet(**CIFAR | {"norm_num_groups": 32}), diffusers.DDIMScheduler())
    expected, got = (
        pipe(generator=seeded("one", 1), num_inference_steps=2).images for pipe in (theirs, ours)
    )
    assert_same_pictures(got, expected)


@pytest.mark.parametrize("pipeline,steps", [(DDPMPipeline, 100), (DDIMPipeline, 50)])
def test_pictures_of_a_trained_network(pipeline, steps):
    """Which amplifies no rounding, so that runs may be as long as in use."""
    model, schedule, settings = checkpoint.load(checkpoint.DIGITS)
    config = model.config
    trained = diffusers.UNet2DModel(
        **GOOGLE,
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=config.layers_per_block,
        block_out_channels=config.block_out_channels,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=config.norm_num_groups,
    ).eval()
    trained.load_state_dict(checkpoint.diffusers_views(model))
    assert settings["prediction"] == "v"
    scheduler = diffusers.DDPMScheduler(
        len(schedule), trained_betas=schedule.betas.tolist(), prediction_type="v_prediction"
    )
    theirs, ours = both(pipeline, trained, scheduler)
    expected, got = (
        pipe(16, generator=seeded("one", 16), num_inference_steps=steps, output_type="np").images
        for pipe in (theirs, ours)
    )
    assert np.abs(got - expected).max() < 1e-4
    assert np.std(expected) > 0.2  # digits


SCHEDULERS = [
    diffusers.DDPMScheduler(),
    diffusers.DDPMScheduler(variance_type="fixed_small_log", prediction_type="sample"),
    diffusers.DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", timestep_spacing="trailing"
    ),
    diffusers.DDPMScheduler(clip_sample=False, timestep_spacing="linspace"),
    DDPMScheduler(thresholding=True, rescale_betas_zero_snr=True, prediction_type="v_prediction"),
    diffusers.DDIMScheduler(clip_sample_range=2.0),
    DDIMScheduler(steps_offset=1, set_alpha_to_one=False),
    diffusers.DPMSolverMultistepScheduler(),
    DPMSolverMultistepScheduler(solver_order=1, prediction_type="v_prediction"),
]


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda each: type(each).__name__)
@pytest.mark.parametrize("kind", ["one", "each", "global"])
def test_every_scheduler_and_generator(small, scheduler, kind):
    theirs, ours = both(DDPMPipeline, small, scheduler)
    assert type(ours.scheduler) is type(scheduler)  # kept as it is given
    left = []
    for pipe in (theirs, ours):
        generator = seeded(kind, 3)
        images = pipe(3, generator, 5, "np").images
        left.append((images, states(generator), torch.randn(2)))
    (expected, state, after), (got, our_state, our_after) = left
    assert np.abs(got - expected).max() < 1e-4
    assert torch.equal(state, our_state) and (kind != "global" or torch.equal(after, our_after))
    assert torch.equal(theirs.scheduler.timesteps, ours.scheduler.timesteps)


def test_a_learned_variance():
    theirs, ours = both(DDPMPipeline, unet(out_channels=6), DDPMScheduler(variance_type="learned_range"))
    drawn = [seeded("one", 2) for _ in range(2)]
    expected, got = (
        pipe(2, generator, 5, "np").images for pipe, generator in zip((theirs, ours), drawn, strict=True)
    )
    assert np.abs(got - expected).max() < 1e-4 and torch.equal(states(drawn[0]), states(drawn[1]))


@pytest.mark.parametrize("options", [{"eta": 0.5}, {"use_clipped_model_output": True}, {"eta": 1.0}])
def test_options_of_ddim(small, options):
    """Whose constructor makes a DDIM scheduler of any other."""
    for scheduler in (diffusers.DDPMScheduler(), diffusers.DPMSolverMultistepScheduler()):
        theirs, ours = both(DDIMPipeline, small, scheduler)
        assert type(ours.scheduler) is DDIMScheduler and dict(ours.scheduler.config) == dict(
            theirs.scheduler.config
        )
        expected, got = (
            pipe(2, seeded("one", 2), num_inference_steps=5, output_type="np", **options).images
            for pipe in (theirs, ours)
        )
        assert np.abs(got - expected).max() < 1e-4
    fixed = DDIMScheduler()
    fixed.strict = False
    assert DDIMPipeline(small, fixed).scheduler.strict is False


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("output_type", ["pil", "np", "pt", None])
def test_outputs(pipeline, dtype, output_type):
    theirs, ours = both(pipeline, unet().to(dtype), diffusers.DDPMScheduler())
    options = {"batch_size": 2, "num_inference_steps": 2, "output_type": output_type}
    if dtype == torch.bfloat16 and output_type != "pt":  # which diffusers cannot give
        images = ours(**options).images
        assert output_type == "pil" or images.dtype == np.float32
        return
    (expected,), got = theirs(**options, return_dict=False), ours(**options)
    assert type(got) is diffusers.ImagePipelineOutput
    (again,) = ours(**options, return_dict=False)
    for images in (got.images, again):
        assert type(images) is type(expected) and len(images) == 2
        if output_type == "pil":
            assert [(image.mode, image.size) for image in images] == [("RGB", (8, 8))] * 2
            continue
        assert images.dtype == expected.dtype and images.shape == expected.shape
        strides = [each.stride() if output_type == "pt" else each.strides for each in (images, expected)]
        assert strides[0] == strides[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_unet_draws_in_its_dtype(dtype):
    theirs, ours = both(DDPMPipeline, unet().to(dtype), diffusers.DDPMScheduler())
    drawn = [seeded("one", 2) for _ in range(2)]
    expected, got = (
        pipe(2, generator, 5, "pt").images for pipe, generator in zip((theirs, ours), drawn, strict=True)
    )
    assert (expected - got).abs().max() < (0.02 if dtype == torch.float16 else 0.1)  # their state is a half
    assert torch.equal(states(drawn[0]), states(drawn[1]))


def test_progress_bar(small, capfd):
    pipe = DDPMPipeline(small, DDPMScheduler())
    pipe.set_progress_bar_config(desc="drawing")
    pipe(num_inference_steps=3)
    assert "drawing: 100%" in (shown := capfd.readouterr().err) and "3/3" in shown
    pipe.set_progress_bar_config(disable=True)
    pipe(num_inference_steps=3)
    assert not capfd.readouterr().err


# ---- the U-Net that the pipeline holds ----


def test_weights_are_shared_but_for_what_is_fused(small):
    pipe = quiet(DDPMPipeline, small, DDPMScheduler())
    pipe(num_inference_steps=1)
    places = {parameter.data_ptr() for parameter in small.parameters()}
    own = [
        name
        for name, parameter in pipe._network.sampler.model.named_parameters()
        if parameter.data_ptr() not in places
    ]
    assert own and all(".to_qkv." in name for name in own)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_change_of_the_weights_is_seen(dtype):
    model = unet()
    pipe = quiet(DDIMPipeline, model, DDIMScheduler())
    query = model.mid_block.attentions[0].to_q

    def images(pipe):
        return pipe(generator=seeded("one", 1), num_inference_steps=2, dtype=dtype, output_type="pt").images

    def another_parameter():
        model.conv_in.weight = torch.nn.Parameter(model.conv_in.weight * 1.5)

    def in_place():
        model.conv_out.weight.mul_(1.1)
        query.weight.mul_(3)

    def behind_the_version_counter():  # as diffusers' EMAModel writes
        query.weight.data.add_(0.5)
        model.conv_in.bias.data.add_(0.5)

    before = images(pipe)
    assert torch.equal(images(pipe), before)
    network = pipe._network
    for change in (in_place, behind_the_version_counter, another_parameter):
        with torch.no_grad():
            change()
        after = images(pipe)
        assert torch.equal(after, images(quiet(DDIMPipeline, model, DDIMScheduler())))
        assert (after - before).abs().max() > 1e-3
        assert (pipe._network is network) == (change is not another_parameter)
        before = after


def test_inside_inference_mode_and_outside(small):
    pipe = quiet(DDIMPipeline, small, DDIMScheduler())
    with torch.inference_mode():
        inside = pipe(generator=seeded("one", 1), num_inference_steps=2, output_type="pt").images
    small.mid_block.attentions[0].to_q.weight.data.add_(0)
    outside = pipe(generator=seeded("one", 1), num_inference_steps=2, output_type="pt").images
    assert torch.equal(inside, outside) and not outside.is_inference()
    assert not any(parameter.is_inference() for parameter in pipe._network.sampler.model.parameters())


def test_another_unet_and_another_scheduler(small):
    pipe = quiet(DDPMPipeline, small, DDPMScheduler())
    pipe(num_inference_steps=2)
    other = unet(block_out_channels=(16, 16))
    pipe.unet, pipe.scheduler = other, diffusers.DDIMScheduler()
    got, expected = (
        each(generator=seeded("one", 1), num_inference_steps=3, output_type="np").images
        for each in (pipe, quiet(DDPMPipeline, other, diffusers.DDIMScheduler()))
    )
    assert np.array_equal(got, expected)


def test_to_another_dtype_lets_go_of_the_weights(small):
    pipe = quiet(DDPMPipeline, small, DDPMScheduler())
    pipe(num_inference_steps=1)
    network = pipe._network
    assert pipe.to("cpu") is pipe and pipe._network is network
    pipe.to(torch.bfloat16)
    assert pipe._network is None
    assert pipe(num_inference_steps=1, output_type="pt").images.dtype == torch.bfloat16


def test_a_copy_and_a_pickle_leave_the_network_out(small):
    pipe = quiet(DDPMPipeline, small, DDPMScheduler())
    first = pipe(generator=seeded("one", 1), num_inference_steps=2, output_type="np").images
    for other in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
        assert other._network is None
        again = other(generator=seeded("one", 1), num_inference_steps=2, output_type="np").images
        assert np.array_equal(again, first)


def hooked():
    model = unet()
    model.conv_in.register_forward_hook(lambda *_: None)
    return model


def test_a_hook_that_comes_later_is_called(small):
    pipe = quiet(DDPMPipeline, small, DDPMScheduler())
    pipe(num_inference_steps=2)
    called = []
    handle = small.mid_block.register_forward_hook(lambda *_: called.append(1))
    with pytest.warns(RuntimeWarning, match="mid_block has a hook"):
        pipe(num_inference_steps=3)
    handle.remove()
    pipe(num_inference_steps=2)
    assert len(called) == 3 and pipe._network.because is None


def patched():
    model = unet()
    model.conv_out.forward = model.conv_out.forward
    return model


class Doubled(diffusers.UNet2DModel):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.sample = out.sample * 2
        return out


def reprocessed():
    class Processor(type(unet().mid_block.attentions[0].processor)):
        pass

    model = unet()
    model.mid_block.attentions[0].set_processor(Processor())
    return model


def tiling():
    """A picture whose edges meet, as many make Stable Diffusion's."""
    model = unet()
    for part in model.modules():
        if isinstance(part, torch.nn.Conv2d):
            part.padding_mode = "circular"
    return model


def activated():
    model = unet()
    model.mid_block.resnets[0].nonlinearity = torch.nn.Tanh()
    return model


@pytest.mark.parametrize(
    "make,reason",
    [
        (lambda: unet(down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D")), "down_block_types"),
        (hooked, "conv_in has a hook or a forward of its own"),
        (patched, "conv_out has a hook or a forward of its own"),
        (lambda: Doubled(**SMALL).eval(), "Doubled is not UNet2DModel"),
        (reprocessed, r"mid_block\.attentions\.0\.processor is Processor"),
        (tiling, "conv_in.padding_mode is 'circular', by the config 'zeros'"),
        (activated, "nonlinearity is Tanh, by the config SiLU"),
    ],
    ids=["block", "hook", "patch", "subclass", "processor", "attribute", "part"],
)
def test_a_unet_that_is_not_converted_runs_as_it_is(make, reason):
    model = make()
    theirs, ours = both(DDPMPipeline, model, DDPMScheduler())
    expected = theirs(2, seeded("one", 2), 4, "np").images
    with pytest.warns(
        RuntimeWarning, match=f"the U-Net is not converted and runs as it is. .*{reason}"
    ) as told:
        got = ours(2, seeded("one", 2), 4, "np").images
    assert said(told).filename == __file__
    assert np.abs(got - expected).max() < 1e-4
    with warnings.catch_warnings():  # said once
        warnings.simplefilter("error", RuntimeWarning)
        ours(2, num_inference_steps=1)
    half = ours(2, seeded("one", 2), 4, "np", dtype=torch.bfloat16).images
    assert 0 < np.abs(half - expected).max() < 0.1


@pytest.mark.parametrize(
    "scheduler,reason",
    [
        (DDPMScheduler(thresholding=True, sample_max_value=2.0), "thresholding"),
        (diffusers.DPMSolverMultistepScheduler(solver_order=3), "solver_order=3"),
        (diffusers.EulerDiscreteScheduler(), "EulerDiscreteScheduler"),
    ],
    ids=["thresholding", "order-3", "euler"],
)
def test_a_run_that_is_no_table(small, scheduler, reason):
    theirs, ours = both(DDPMPipeline, small, scheduler)
    expected = theirs(2, seeded("one", 2), 5, "np").images
    with pytest.warns(RuntimeWarning, match=f"takes diffusers' steps, one by one. .*{reason}") as told:
        got = ours(2, seeded("one", 2), 5, "np").images
    assert said(told).filename == __file__
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        start = torch.randn(1, 3, 8, 8)
        seen = []
        ours(num_inference_steps=3, latents=start, callback_on_step_end=keeping(seen))
        assert len(seen) == 3
        for options in ({"dtype": torch.bfloat16}, {"noise": "counter", "seeds": [1]}):
            with pytest.raises(ValueError, match=f"needs a run that is a table of steps. .*{reason}"):
                ours(num_inference_steps=2, **options)


@pytest.mark.parametrize("name", ["step", "_get_variance"])
def test_a_method_replaced_on_the_scheduler_is_called(small, name):
    theirs, ours = both(DDPMPipeline, small, DDPMScheduler())
    pictures = []
    for pipe in (theirs, ours):
        own = getattr(pipe.scheduler, name)

        def halved(*args, own=own, **kwargs):
            made = own(*args, **kwargs)
            if torch.is_tensor(made):
                return made / 2
            made.prev_sample /= 2
            return made

        setattr(pipe.scheduler, name, halved)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            pictures.append(pipe(2, seeded("one", 2), 4, "np").images)
    assert f"its {name} has been replaced" in str(said(told).message)
    np.testing.assert_allclose(*pictures, rtol=0, atol=1e-5)


def test_two_threads_may_call_one_pipeline(small, monkeypatch):
    pipe = quiet(DDIMPipeline, small, DDIMScheduler())
    refresh = Network.refresh

    def interrupted(network):
        refresh(network)
        pipe._network = None  # as the call of another thread begins

    monkeypatch.setattr(Network, "refresh", interrupted)
    for _ in range(2):
        assert len(pipe(num_inference_steps=1).images) == 1


def test_float64_takes_diffusers_steps():
    theirs, ours = both(DDPMPipeline, unet().double(), diffusers.DDPMScheduler())
    with pytest.warns(RuntimeWarning, match=r"The U-Net is torch\.float64 on cpu"):
        got = ours(1, seeded("one", 1), 3, "np").images
    assert np.array_equal(got, theirs(1, seeded("one", 1), 3, "np").images)


# ---- what diffusers lacks ----


def keeping(seen):
    def callback(pipe, i, t, kwargs):
        seen.append((i, int(t), kwargs["latents"]))
        return {}

    return callback


@BOTH
def test_callback_sees_and_changes_each_step(small, pipeline):
    pipe = quiet(pipeline, small, DDPMScheduler())
    seen = []
    image = pipe(
        2, seeded("one", 2), num_inference_steps=4, output_type="pt", callback_on_step_end=keeping(seen)
    )
    assert [(i, t) for i, t, _ in seen] == [(0, 750), (1, 500), (2, 250), (3, 0)]
    states = [latents for *_, latents in seen]
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(states))  # kept as they were
    torch.testing.assert_close((states[-1] / 2 + 0.5).clamp(0, 1), image.images)

    def halve(pipe, i, t, kwargs):
        return {"latents": kwargs["latents"] * 0.5} if i == 1 else kwargs

    def halve_in_place(pipe, i, t, kwargs):
        kwargs["latents"].mul_(0.5 if i == 1 else 1)
        return {}

    table = pipe(2, num_inference_steps=2, latents=states[1] * 0.5, output_type="pt")  # another list of t
    changed, again = (
        pipe(2, seeded("one", 2), num_inference_steps=4, output_type="pt", callback_on_step_end=change).images
        for change in (halve, halve_in_place)
    )
    assert torch.equal(changed, again) and not torch.equal(changed, image.images)
    assert table.images.shape == changed.shape
    seen_keys = []
    pipe(
        num_inference_steps=1,
        callback_on_step_end=lambda pipe, i, t, kwargs: seen_keys.append(list(kwargs)) or {},
        callback_on_step_end_tensor_inputs=[],
    )
    assert seen_keys == [[]]


def test_a_callback_of_diffusers_kind(small):
    class Every(diffusers.callbacks.PipelineCallback):
        tensor_inputs = []  # noqa: RUF012  a property in diffusers' class

        def callback_fn(self, pipe, i, t, kwargs):
            assert not kwargs
            steps.append(i)
            return kwargs

    steps = []
    quiet(DDPMPipeline, small, DDPMScheduler())(num_inference_steps=3, callback_on_step_end=Every())
    assert steps == [0, 1, 2]


def test_latents_are_the_start(small):
    pipe = quiet(DDIMPipeline, small, DDIMScheduler())
    start = torch.randn(2, 3, 8, 8, generator=seeded("one", 2))
    before = start.clone()
    got = pipe(2, num_inference_steps=3, latents=start, output_type="pt").images
    assert torch.equal(got, pipe(2, seeded("one", 2), num_inference_steps=3, output_type="pt").images)
    assert torch.equal(start, before)


def test_class_labels():
    model = unet(num_class_embeds=4)
    pipe = quiet(DDIMPipeline, model, DDIMScheduler())
    labels = torch.tensor([3, 0])
    start = torch.randn(2, 3, 8, 8)
    expected = by_hand(model, diffusers.DDIMScheduler(), start, 4, labels)
    for given in (labels, [3, 0]):
        got = pipe(2, num_inference_steps=4, latents=start, class_labels=given, output_type="pt").images
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    other = pipe(2, num_inference_steps=4, latents=start, class_labels=[3, 1], output_type="pt").images
    assert not torch.allclose(other[1], got[1], atol=1e-3)
    with pytest.raises(ValueError, match=r"class_labels must be in \[0, 3\], got 4"):
        pipe(2, num_inference_steps=4, class_labels=[4, 1])
    with pytest.raises(ValueError, match="class_labels"):
        pipe(2, num_inference_steps=4)
    with pytest.raises(ValueError, match="takes no class_labels"):
        quiet(DDIMPipeline, unet(), DDIMScheduler())(1, num_inference_steps=1, class_labels=[0])


def test_class_labels_of_a_unet_that_is_not_converted():
    model = unet(class_embed_type="timestep")
    labels, start = torch.tensor([0.5, 3.0]), torch.randn(2, 3, 8, 8)
    pipe = quiet(DDIMPipeline, model, DDIMScheduler())
    with pytest.warns(RuntimeWarning, match="class_embed_type"):
        got = pipe(2, num_inference_steps=4, latents=start, class_labels=labels, output_type="pt").images
    expected = by_hand(model, diffusers.DDIMScheduler(), start, 4, labels)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


@BOTH
def test_counter_noise_does_not_depend_on_the_batch(small, pipeline):
    pipe = quiet(pipeline, small, DDPMScheduler(variance_type="fixed_large"))
    eta = {"eta": 1.0} if pipeline is DDIMPipeline else {}
    state = torch.get_rng_state()

    def images(*seeds):
        options = {"num_inference_steps": 4, "output_type": "pt", "noise": "counter", "seeds": seeds}
        return pipe(len(seeds), **options, **eta).images

    whole = images(5, 2**64 - 1, 11)
    parts = torch.cat([images(5), images(2**64 - 1, 11)])
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-4)
    assert (whole[0] - whole[1]).abs().max() > 0.1 and torch.equal(images(5), images(5))
    torch.testing.assert_close(images(11, 5), whole[[2, 0]], rtol=0, atol=1e-4)
    assert torch.equal(torch.get_rng_state(), state)


def test_dtype_runs_a_copy_of_the_unet(small):
    pipe = quiet(DDPMPipeline, small, DDPMScheduler())
    full, half = (
        pipe(2, seeded("one", 2), 5, "pt", dtype=dtype).images for dtype in (torch.float32, torch.bfloat16)
    )
    assert half.dtype == torch.float32 and small.dtype == torch.float32
    assert pipe._network.sampler.model.conv_in.weight.dtype == torch.bfloat16
    assert 0 < (half - full).abs().max() < 0.1


# ---- folders ----


@BOTH
def test_folders_of_either_load_in_the_other(small, pipeline, tmp_path):
    theirs, ours = both(pipeline, small, diffusers.DDIMScheduler(steps_offset=1))
    theirs.save_pretrained(tmp_path / "theirs")
    ours.scheduler = DDIMScheduler(steps_offset=1)
    ours.save_pretrained(tmp_path / "ours")
    indices = [json.loads((tmp_path / name / "model_index.json").read_text()) for name in ("theirs", "ours")]
    assert indices[0] == indices[1]
    assert indices[1]["_class_name"] == pipeline.__name__
    assert indices[1]["scheduler"] == ["diffusers", "DDIMScheduler"]

    images = []
    for folder in ("theirs", "ours"):
        for load in (pipeline, THEIRS[pipeline], diffusers.DiffusionPipeline):
            pipe = load.from_pretrained(tmp_path / folder, low_cpu_mem_usage=False)
            ours_is_asked = load is pipeline
            assert type(pipe) is (pipeline if ours_is_asked else THEIRS[pipeline])
            assert type(pipe.scheduler) is (DDIMScheduler if ours_is_asked else diffusers.DDIMScheduler)
            assert pipe.scheduler.config.steps_offset == 1
            pipe.set_progress_bar_config(disable=True)
            images.append(pipe(1, seeded("one", 1), num_inference_steps=3, output_type="np").images)
    assert max(np.abs(image - images[1]).max() for image in images) < 1e-4

    given = diffusers.DDPMScheduler()
    pipe = DDPMPipeline.from_pretrained(tmp_path / "ours", scheduler=given, low_cpu_mem_usage=False)
    assert pipe.scheduler is given


def test_what_ours_saves_loads_where_we_are_not(small, tmp_path):
    DDPMPipeline(small, DPMSolverMultistepScheduler()).save_pretrained(tmp_path)
    script = (
        "import sys, diffusers\n"
        f"pipe = diffusers.DiffusionPipeline.from_pretrained({str(tmp_path)!r}, low_cpu_mem_usage=False)\n"
        "assert type(pipe) is diffusers.DDPMPipeline and 'ddpm_fast' not in sys.modules\n"
        "assert type(pipe.scheduler) is diffusers.DPMSolverMultistepScheduler\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


# ---- accelerate ----


def test_accelerate_is_a_public_name_that_is_loaded_when_asked_for():
    assert ddpm_fast.accelerate is accelerate
    script = "import sys, ddpm_fast; assert 'diffusers' not in sys.modules; ddpm_fast.accelerate"
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    with pytest.raises(AttributeError, match="module 'ddpm_fast' has no attribute 'accelerated'"):
        _ = ddpm_fast.accelerated


@BOTH
def test_accelerate_keeps_the_parts_and_their_state(small, pipeline, tmp_path):
    THEIRS[pipeline](small, diffusers.DDIMScheduler()).save_pretrained(tmp_path)
    theirs = THEIRS[pipeline].from_pretrained(tmp_path, low_cpu_mem_usage=False)
    theirs.set_progress_bar_config(disable=True)
    theirs.scheduler.set_timesteps(7)
    ours = accelerate(theirs)
    assert type(ours) is pipeline and ours.unet is theirs.unet
    assert type(ours.scheduler) is DDIMScheduler and ours.scheduler.num_inference_steps == 7
    assert torch.equal(ours.scheduler.timesteps, theirs.scheduler.timesteps)
    assert dict(ours.config) == dict(theirs.config) and ours.name_or_path == theirs.name_or_path
    assert dict(ours.scheduler.config) == dict(theirs.scheduler.config)
    assert ours._progress_bar_config == {"disable": True}
    images = [pipe(2, seeded("one", 2), num_inference_steps=4).images for pipe in (ours, theirs)]
    assert_same_pictures(*images)
    scheduler = ours.scheduler
    assert accelerate(ours) is ours and ours.scheduler is scheduler and scheduler.strict is True
    assert accelerate(ours, strict=False) is ours and scheduler.strict is False
    assert accelerate(ours).scheduler.strict is False
    assert accelerate(theirs, strict=False).scheduler.strict is False
    assert type(theirs.scheduler) is diffusers.DDIMScheduler  # which is left as it was


class Watch(TorchDispatchMode):
    """The names of the ops that are called."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(str(func))
        return func(*args, **(kwargs or {}))


def test_accelerate_any_other_pipeline(small):
    class Other(diffusers.DDPMPipeline):
        pass

    pipe = Other(small, diffusers.DPMSolverMultistepScheduler())
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(2, seeded("one", 2), 4).images
    for _ in range(2):
        assert accelerate(pipe) is pipe
        assert type(pipe.scheduler) is DPMSolverMultistepScheduler
        assert_same_pictures(pipe(2, seeded("one", 2), 4).images, expected)
    assert dict(pipe.config)["scheduler"] == ("diffusers", "DPMSolverMultistepScheduler")
    with Watch() as watch, torch.no_grad():
        small(torch.zeros(1, 3, 8, 8), 0)
    assert any("group_norm_silu" in name for name in watch.seen)  # fused in place


def test_accelerate_refuses_the_rest(small):
    with pytest.raises(TypeError, match="pipe must be a diffusers pipeline, got UNet2DModel"):
        accelerate(small)

    class Other(diffusers.DDPMPipeline):
        pass

    euler = diffusers.EulerDiscreteScheduler()
    with pytest.raises(TypeError, match=r"of Other must be DDPMScheduler, .* got EulerDiscreteScheduler"):
        accelerate(Other(small, euler))
    assert accelerate(diffusers.DDPMPipeline(small, euler)).scheduler is euler
    with pytest.raises(TypeError, match="got EulerDiscreteScheduler"):
        accelerate(diffusers.DDPMPipeline(small, euler), strict=False)


# ---- bad input ----


@BOTH
@pytest.mark.parametrize(
    "options",
    [{"num_inference_steps": 1001}, {"generator": [1, 2]}, {"generator": 3}, {"batch_size": 1.5}],
    ids=lambda options: next(iter(options)),
)
def test_what_diffusers_raises_is_raised(small, pipeline, options):
    theirs, ours = both(pipeline, small, DDPMScheduler())
    options = {"batch_size": 2, "num_inference_steps": 2} | options
    with pytest.raises(Exception) as expected:
        theirs(**options)
    with pytest.raises(expected.type):
        ours(**options)


@BOTH
@pytest.mark.parametrize(
    "options,error,match",
    [
        ({"generator": [torch.Generator()]}, ValueError, "generator must be one, or 2, .* got 1"),
        ({"generator": [torch.Generator()] * 3}, ValueError, "generator must be one, or 2, .* got 3"),
        ({"noise": "philox"}, ValueError, "noise must be 'torch' or 'counter', got 'philox'"),
        ({"noise": "counter"}, ValueError, "noise='counter' needs 2 seeds, .* got none"),
        ({"noise": "counter", "seeds": [1]}, ValueError, "noise='counter' needs 2 seeds, .* got 1"),
        ({"noise": "counter", "seeds": [1, 2**64]}, ValueError, "seed must fit in 64 bits"),
        ({"seeds": [1, 2]}, ValueError, "seeds are for noise='counter'"),
        (
            {"noise": "counter", "seeds": [1, 2], "generator": torch.Generator()},
            ValueError,
            "generator is for noise='torch'",
        ),
        ({"latents": torch.zeros(1, 3, 8, 8)}, ValueError, r"latents must have shape \(2, 3, 8, 8\)"),
        ({"latents": [0]}, TypeError, "latents must be a floating Tensor, got list"),
        ({"dtype": torch.int8}, ValueError, "dtype must be None, float32, bfloat16 or float16"),
        (
            {"callback_on_step_end_tensor_inputs": ["x0"]},
            ValueError,
            r"callback_on_step_end_tensor_inputs may name \['latents'\], got \['x0'\]",
        ),
        ({"callback_on_step_end": lambda *_: None}, TypeError, "callback_on_step_end must return a dict"),
    ],
)
def test_bad_calls_are_named(small, pipeline, options, error, match):
    pipe = quiet(pipeline, small, DDPMScheduler())
    with pytest.raises(error, match=match):
        pipe(**{"batch_size": 2, "num_inference_steps": 2} | options)


def test_pictures_of_nan_are_refused(small):
    with pytest.raises(ValueError, match="fixed_large_log"):
        DDPMPipeline(small, diffusers.DDPMScheduler(variance_type="fixed_large_log"))(num_inference_steps=2)


# ---- on a GPU ----


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
class TestOnAGpu:
    @pytest.mark.parametrize("kind", ["cpu", "cuda", "global"])
    def test_pictures_and_generators(self, kind):
        theirs, ours = both(DDPMPipeline, unet().cuda(), diffusers.DDPMScheduler(variance_type="fixed_large"))
        left = []
        for pipe in (theirs, ours, ours):
            torch.manual_seed(3)
            generator = None if kind == "global" else torch.Generator(kind).manual_seed(3)
            images = pipe(2, generator, 10, "np").images
            left.append(
                (images, torch.randn(2, device="cuda", generator=generator if kind == "cuda" else None))
            )
        for images, after in left[1:]:
            assert np.abs(images - left[0][0]).max() < 1e-2  # cuDNN may choose TF32
            assert torch.equal(after, left[0][1])
        stats = ours._network.sampler.stats
        assert (stats.captures, stats.replays, stats.eager_because) == (1, 20, None)

    def test_other_weights_labels_and_steps_need_no_capture(self):
        model = unet(num_class_embeds=4).cuda()
        ours = quiet(DDIMPipeline, model, DDIMScheduler())

        def images(pipe, labels, eta):
            options = {
                "num_inference_steps": 4,
                "output_type": "pt",
                "generator": seeded("one", 2),
                "eta": eta,
            }
            return pipe(2, class_labels=labels, **options).images

        first = images(ours, [0, 3], 0.0)
        with torch.no_grad():
            model.mid_block.attentions[0].to_q.weight.data.add_(0.1)
        for labels in ([0, 3], [1, 2]):
            expected = images(quiet(DDIMPipeline, model, DDIMScheduler()), labels, 0.0)
            assert torch.equal(images(ours, labels, 0.0), expected) and not torch.equal(first, expected)
        assert ours._network.sampler.stats.captures == 1


@pytest.mark.parametrize(
    ("pipeline", "scheduler", "golden"),
    [
        (DDPMPipeline, DDPMScheduler, [0, 0.99967, 0.00329, 1, 0.9996, 1, 0.00609, 0.00115, 0]),
        (DDIMPipeline, DDIMScheduler, [0, 0.99797, 0, 0.99998, 0.99863, 0.99916, 0.00071, 0, 0]),
    ],
)
def test_golden_slices(pipeline, scheduler, golden):
    """By the protocol of diffusers' own pipeline tests: an untrained model and noise of seed 0, two steps."""
    config = {"block_out_channels": (4, 8), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 8}
    blocks = {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    torch.manual_seed(0)
    pipe = pipeline(diffusers.UNet2DModel(**config, **blocks), scheduler())
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(0)
    images = pipe(generator=generator, num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 8, 8, 3)
    np.testing.assert_allclose(images[0, -3:, -3:, -1].flatten(), golden, atol=1e-4)
