"""`verify`: it passes what is right, sees what is wrong, and says so in numbers, a table and a picture."""

from __future__ import annotations

import copy
import importlib
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

import ddpm_fast
from ddpm_fast import checkpoint, cli

diffusers_ = pytest.importorskip(
    "diffusers", reason="diffusers is not installed: pip install ddpm_fast[test]"
)

verify = ddpm_fast.verify
package = "ddpm_fast.compat.diffusers"
module = importlib.import_module(f"{package}.verify")
pairs = importlib.import_module(f"{package}.pair")
verification = importlib.import_module(f"{package}.verification")
TOLERANCES = verification.TOLERANCES

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def timed_once(monkeypatch):
    """The clock is not what is tested here."""
    monkeypatch.setattr(module, "ROUNDS", 1)


@pytest.fixture
def unet(diffusers):
    """The bundled digits' model as a UNet2DModel; a trained one, since others amplify rounding in DDIM."""
    unet = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(48, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=None,
        norm_num_groups=8,
        norm_eps=1e-6,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        dropout=0.1,
    )
    unet.load_state_dict(checkpoint.diffusers_views(checkpoint.load(checkpoint.DIGITS)[0]))
    return unet.eval()


@pytest.fixture
def pipelines(diffusers, unet):
    """A pipeline of each kind, theirs and ours."""
    config = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
    ddpm = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler(variance_type="fixed_large", **config))
    ddim = diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler(timestep_spacing="trailing", **config))
    return {
        "ddpm": ddpm,
        "ddim": ddim,
        "our ddpm": ddpm_fast.accelerate(ddpm),
        "our ddim": ddpm_fast.accelerate(ddim),
    }


class Convolution(nn.Module):
    """A model of one layer and no norm."""

    def __init__(self, made=lambda out: out):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Conv2d(3, 3, 3, padding=1)
        self.made = made

    def forward(self, x, t):
        return self.made(self.layer(x) * (1 + t[:, None, None, None] / 1000))


# What is right passes


@pytest.mark.parametrize("name", ["ddpm", "ddim", "our ddpm", "our ddim"])
def test_what_is_right_passes(pipelines, name):
    pipe = pipelines[name]
    options = {"eta": 0.7} if "ddim" in name else {}
    found = verify(pipe, batch_size=2, num_steps=7, seed=3, **options)
    assert found.ok
    assert found.off_by_one == found.off_by_more == 0
    assert found.tolerance == TOLERANCES[torch.float32]
    assert found.timed_steps == 7 and min(found.seconds) > 0
    assert found.names[0].startswith(f"diffusers {name.split()[-1].upper()}Pipeline, float32, cpu")

    pipe.scheduler.set_timesteps(7)
    assert found.timesteps == tuple(pipe.scheduler.timesteps.tolist())
    assert len(found.errors) == len(found.relative_errors) == 7
    # A step is within 1e-5 of diffusers' and a U-Net within 2e-6; a run adds them up. It was 2e-6.
    assert 0 < max(found.errors) < 7e-5
    for images in (found.original, found.ours):
        expected = pipe(
            2, torch.Generator().manual_seed(3), num_inference_steps=7, output_type="np", **options
        )
        assert np.array_equal((expected.images * 255).round(), images.permute(0, 2, 3, 1))


def test_a_random_model_is_run_by_the_schedule_of_ho_et_al(diffusers):
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
    ).eval()
    found = verify(unet, num_steps=5)
    assert found.ok and "DDPMPipeline" in found.names[0] and found.method == "DDPMScheduler"
    pipe = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler())
    images = pipe(1, torch.Generator().manual_seed(0), num_inference_steps=5, output_type="np").images
    assert np.array_equal((images * 255).round(), found.original.permute(0, 2, 3, 1))
    assert verify(torch.compile(unet, backend="eager"), num_steps=2).ok


def test_a_u_net_that_runs_as_it_is(diffusers):
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("ResnetDownsampleBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "ResnetUpsampleBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
    )
    with pytest.warns(RuntimeWarning, match="runs as it is"):
        assert verify(unet, num_steps=3).ok


@pytest.mark.parametrize("name,method", [("ddpm", "ddim"), ("ddim", "ddpm"), ("our ddpm", "ddim")])
def test_another_method(pipelines, name, method):
    found = verify(pipelines[name], method=method, num_steps=4)
    assert found.ok
    assert found.method == f"{method.upper()}Scheduler" and method.upper() in found.names[0]


def test_the_scheduler_is_run_as_it_stands(diffusers, pipelines):
    """Changed by hand, so that its config does not tell; and of another kind than the pipeline."""
    pipe = pipelines["ddim"]
    plain = verify(pipe, num_steps=4)
    pipe.scheduler.alphas_cumprod = pipe.scheduler.alphas_cumprod**1.5
    changed = verify(pipe, num_steps=4)
    assert changed.ok
    assert (changed.original.int() - plain.original.int()).abs().max() > 10
    solver = diffusers.DDPMPipeline(pipe.unet, diffusers.DPMSolverMultistepScheduler())
    found = verify(solver, num_steps=5)
    assert found.ok and found.method == "DPMSolverMultistepScheduler"


def test_as_many_steps_as_there_are(diffusers, unet):
    pipe = diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler(num_train_timesteps=6))
    assert len(verify(pipe).errors) == 6
    with pytest.raises(ValueError, match="7"):
        verify(pipe, num_steps=7)


def test_what_is_given_is_left_as_it_was(pipelines):
    """Its dropout too, which is off while it runs."""
    for pipe in (pipelines["ddpm"], pipelines["our ddpm"]):
        pipe.unet.train()
        pipe.scheduler.set_timesteps(20)
        weights = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
        scheduler, parts = pipe.scheduler, dict(vars(pipe.scheduler))
        torch.manual_seed(5)
        state = torch.get_rng_state()
        assert verify(pipe, num_steps=3).ok
        assert torch.equal(torch.get_rng_state(), state)
        assert pipe.scheduler is scheduler and len(scheduler.timesteps) == 20
        assert "step" not in vars(scheduler) and vars(scheduler).keys() == parts.keys()
        assert all(part.training for part in pipe.unet.modules())
        assert all(torch.equal(value, weights[name]) for name, value in pipe.unet.state_dict().items())


def test_halves_have_a_tolerance_of_their_own(pipelines):
    """Images in bfloat16: nearly the same, and not by the measure of float32."""
    found = verify(pipelines["ddim"], num_steps=10, batch_size=8, dtype=torch.bfloat16)
    assert found.ok and found.tolerance == TOLERANCES[torch.bfloat16]
    assert found.names[1].endswith("bfloat16") and "float32" in found.names[0]
    assert 0.05 < found.off_by_one < 0.4
    strict = TOLERANCES[torch.float32]
    assert not verify(pipelines["ddim"], num_steps=10, dtype=torch.bfloat16, tolerance=strict).ok


def test_the_noise_is_the_same_in_bfloat16(pipelines):
    """torch's generators give other numbers in another dtype: with those the errors would be about 1."""
    found = verify(pipelines["ddpm"], num_steps=3, dtype=torch.bfloat16)
    assert found.errors[0] < 0.05


class Block(nn.Module):
    """A residual block with the time added between its two norms."""

    def __init__(self, channels):
        super().__init__()
        self.norm1, self.norm2 = (nn.GroupNorm(4, channels) for _ in range(2))
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.time = nn.Linear(1, channels)

    def forward(self, x, t):
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time(t[:, None].to(x.dtype) / 1000)[:, :, None, None]
        return x + self.conv2(F.silu(self.norm2(h)))


class OneBlock(nn.Module):
    """A hand-written network."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv_in, self.conv_out = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.block = Block(8)

    def forward(self, x, t):
        return self.conv_out(self.block(self.conv_in(x), t))


@pytest.mark.parametrize("options", [{}, {"method": "ddim"}, {"method": "ddim", "eta": 0.5}])
def test_any_other_module_is_fused_in_a_copy(options):
    model = OneBlock()
    found = verify(model, shape=(3, 8, 8), num_steps=4, batch_size=2, **options)
    assert found.ok and 0 < max(found.errors) < 7e-5
    assert found.method == options.get("method", "ddpm") and found.ours.shape == (2, 3, 8, 8)
    assert found.names[0] == "OneBlock in the naive loop, float32, cpu"
    assert found.names[1] == "ddpm_fast Sampler with 2 of 2 GroupNorms fused, float32"
    assert "forward" not in vars(model.block)
    model.sample_shape = (3, 8, 8)
    assert torch.equal(verify(model, num_steps=4, batch_size=2, **options).ours, found.ours)


def test_a_fused_module_that_is_wrong(monkeypatch):
    def wrong(model):
        report = ddpm_fast.fuse(model)
        with torch.no_grad():
            model.block.norm2.weight[0] *= 1.5
        return report

    monkeypatch.setattr(pairs, "fuse", wrong)
    assert not verify(OneBlock(), shape=(3, 8, 8), num_steps=4).ok


# Folders


def without_subfolders(pipe, folder):
    """As the google/ddpm-* ones are."""
    pipe.save_pretrained(folder)
    for name in ("unet", "scheduler"):
        for file in (folder / name).iterdir():
            file.rename(folder / file.name)
        (folder / name).rmdir()


def with_a_scheduler(pipe, folder):
    pipe.unet.save_pretrained(folder)
    pipe.scheduler.save_pretrained(folder)


@pytest.mark.parametrize("name", ["ddpm", "ddim", "our ddim"])
@pytest.mark.parametrize(
    "write", [diffusers_.DiffusionPipeline.save_pretrained, without_subfolders, with_a_scheduler]
)
def test_folders(pipelines, tmp_path, write, name):
    pipe, folder = pipelines[name], tmp_path / "model"
    write(pipe, folder)
    found, live = verify(folder, num_steps=3), verify(pipe, num_steps=3)
    assert found.ok and found.names == live.names and found.method == live.method
    assert torch.equal(found.original, live.original)


def test_a_unet_s_folder(unet, tmp_path):
    unet.save_pretrained(tmp_path)
    found = verify(str(tmp_path), num_steps=3, device="cpu")
    assert found.ok and torch.equal(found.original, verify(unet, num_steps=3).original)


def test_our_checkpoint_is_compared_with_the_naive_loop(tmp_path):
    found = verify(checkpoint.DIGITS, num_steps=5, batch_size=2, seed=7)
    assert found.ok and found.method == "ddim" and len(found.errors) == 5
    assert found.names == ("UNet in the naive loop, float32, cpu", "ddpm_fast Sampler, float32")
    assert 0 < max(found.errors) < 7e-5
    model, schedule, settings = checkpoint.load(checkpoint.DIGITS)
    sampler = ddpm_fast.Sampler(model, schedule, num_steps=5, **settings)
    assert torch.equal(found.ours, ddpm_fast.to_uint8(sampler(2, seed=7, noise="torch")))
    assert verify(checkpoint.DIGITS, num_steps=5, dtype=torch.bfloat16).ok

    checkpoint.save(tmp_path / "ddpm", model, schedule, settings | {"method": "ddpm"})
    assert verify(tmp_path / "ddpm", num_steps=5).ok
    with torch.no_grad():
        model.conv_out.weight.mul_(1 + 1e-2)
    exact, found = (verify(tmp_path / "ddpm", num_steps=5, dtype=dtype) for dtype in (None, torch.bfloat16))
    assert found.ok and torch.equal(found.original, exact.original)  # of the same noise


def test_our_checkpoint_in_half_and_of_few_steps(tmp_path):
    model, _, settings = checkpoint.load(checkpoint.DIGITS)
    settings["method"] = "dpm_solver"
    checkpoint.save(tmp_path / "few", model.bfloat16(), ddpm_fast.Schedule.linear(10), settings)
    found = verify(tmp_path / "few")
    assert found.ok and len(found.errors) == 9 and found.tolerance == TOLERANCES[torch.bfloat16]
    assert all("bfloat16" in name for name in found.names)


def test_damaged_folders(pipelines, unet, tmp_path):
    pipelines["ddpm"].save_pretrained(tmp_path / "whole")

    def damaged(name, file, text):
        folder = tmp_path / name
        shutil.copytree(tmp_path / "whole", folder)
        if text is None:
            (folder / file).unlink()
        else:
            (folder / file).write_text(text)
        return folder

    lacking = damaged("i", weights := "unet/diffusion_pytorch_model.safetensors", "")
    tensors = load_file(tmp_path / "whole" / weights)
    del tensors["conv_in.bias"]
    save_file(tensors, lacking / weights)
    index = (tmp_path / "whole" / "model_index.json").read_text()
    for folder, kind, words in (
        (tmp_path / "nowhere", NotADirectoryError, "nowhere is not a folder"),
        (damaged("a", "unet/config.json", None), FileNotFoundError, "holds no model"),
        (damaged("b", "unet/config.json", "{"), OSError, "not a valid JSON"),
        (damaged("c", "unet/config.json", "{}"), ValueError, "neither of a ddpm_fast checkpoint nor"),
        (damaged("d", weights, "short"), OSError, "diffusers cannot read the model"),
        (damaged("e", weights, None), OSError, "diffusers cannot read the model"),
        (lacking, ValueError, "the weights lack conv_in.bias"),
        (damaged("f", "scheduler/scheduler_config.json", None), OSError, "scheduler_config.json"),
        (
            damaged("g", "scheduler/scheduler_config.json", '{"_class_name": "PNDMScheduler"}'),
            ValueError,
            "_class_name is 'PNDMScheduler', allowed: .*DDPMScheduler.*DDIMScheduler.*DPMSolver",
        ),
        (
            damaged("h", "model_index.json", index.replace("DDPMPipeline", "PNDMPipeline")),
            ValueError,
            "_class_name is 'PNDMPipeline', allowed: .*DDPMPipeline.*DDIMPipeline",
        ),
    ):
        with pytest.raises(kind, match=words):
            verify(folder)


# What is wrong does not


def weight(pipe):
    pipe.unet.conv_in.weight[0] += 0.1


def levels(pipe):
    pipe.scheduler.alphas_cumprod *= 0.99


def clip(pipe):
    pipe.scheduler.register_to_config(clip_sample=False)


def infinite(pipe):
    pipe.unet.conv_out.bias[0] = math.inf


@pytest.mark.parametrize("change", [weight, levels, clip, infinite])
def test_what_is_wrong_does_not(pipelines, monkeypatch, change):
    def perturbed(pipe):
        made = copy.deepcopy(ddpm_fast.accelerate(pipe))
        with torch.no_grad():
            change(made)
        return made

    monkeypatch.setattr(pairs, "accelerate", perturbed)
    found = verify(pipelines["ddpm"], num_steps=5)
    assert not found.ok
    assert found.off_by_one + found.off_by_more > 0.01
    assert str(found).endswith("within tolerance: no")
    assert verify(pipelines["our ddpm"], num_steps=5).ok  # that pipeline itself, not another around its U-Net


def test_one_of_ours_is_run_itself(pipelines):
    made = pipelines["our ddim"]
    made.scheduler.strict = False
    made.scheduler.register_to_config(timestep_spacing="linspace")
    assert not verify(made, num_steps=7).ok  # diffusers' previous timestep is wrong there, ours is corrected
    made.scheduler.strict = True
    assert verify(made, num_steps=7).ok


def test_other_timesteps_are_an_error(pipelines, monkeypatch):
    def shifted(pipe):
        made = ddpm_fast.accelerate(pipe)
        made.scheduler.register_to_config(timestep_spacing="trailing")
        return made

    monkeypatch.setattr(pairs, "accelerate", shifted)
    with pytest.raises(RuntimeError, match=r"ours went .* \[999, 499\], the original through \[500, 0\]"):
        verify(pipelines["ddpm"], num_steps=2)


# Bad input


@pytest.mark.parametrize(
    "options,kind,words",
    [
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"batch_size": 1.5}, TypeError, "batch_size must be an integer, got 1.5"),
        ({"num_steps": 0}, ValueError, "num_steps must be at least 1, got 0"),
        ({"num_steps": 1001}, ValueError, "1001"),
        ({"seed": 2**64}, ValueError, "seed must be in"),
        ({"eta": -1}, ValueError, "eta must be finite and at least 0, got -1.0"),
        ({"eta": 0.5}, ValueError, "eta=0.5 is an option of ddim; this is a DDPMPipeline"),
        ({"method": "dpm_solver"}, ValueError, "method='dpm_solver' is not known; allowed: ddpm, ddim"),
        (
            {"dtype": torch.float64},
            ValueError,
            "dtype must be None, float32, float16 or bfloat16, got",
        ),
        ({"dtype": "bfloat16"}, ValueError, "dtype must be None"),
        ({"tolerance": 0.1}, TypeError, "tolerance must be two shares"),
        ({"tolerance": (0.1, 1.1)}, ValueError, r"tolerance\[1\] must be in \[0, 1\], got 1.1"),
        ({"device": "cpu"}, ValueError, "device is where a folder is loaded to"),
        ({"shape": (3, 8, 8)}, ValueError, "shape is for a module"),
    ],
)
def test_bad_options(pipelines, monkeypatch, options, kind, words):
    monkeypatch.setattr(torch.nn.Conv2d, "forward", lambda *_: pytest.fail("work was done"))
    with pytest.raises(kind, match=words):
        verify(pipelines["ddpm"], **options)


def test_bad_sources(diffusers, unet):
    conditioned = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
    )
    for source in (None, 3, unet.forward, conditioned, diffusers.DDPMScheduler()):
        with pytest.raises(TypeError, match=r"pipe_or_model must be .*got "):
            verify(source)
    with pytest.raises(ValueError, match="method='ddpm' is not the checkpoint's, which is 'ddim'"):
        verify(checkpoint.DIGITS, method="ddpm")
    with pytest.raises(ValueError, match=r"eta=0.5 is an option of method 'ddim'"):
        verify(Convolution(), shape=(3, 8, 8), eta=0.5)
    with pytest.raises(ValueError, match=r"shape must be given, as \(C, H, W\)"):
        verify(Convolution())
    with pytest.raises(TypeError, match=r"shape must be a sequence without the batch.*got 8"):
        verify(Convolution(), shape=8)
    with pytest.raises(ValueError, match=r"shape\[1\] must be at least 1, got 0"):
        verify(Convolution(), shape=(3, 0, 8))
    with pytest.raises(TypeError, match="must return a Tensor, got tuple"):
        verify(Convolution(lambda out: (out,)), shape=(3, 8, 8))


# Without diffusers


def test_diffusers_is_imported_when_it_is_needed():
    code = "import ddpm_fast, sys; assert 'diffusers' not in sys.modules; ddpm_fast.verify"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_without_diffusers(monkeypatch):
    for name in [name for name in sys.modules if name.startswith(package)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"pip install ddpm_fast\[diffusers\]"):
        ddpm_fast.verify  # noqa: B018
    monkeypatch.setattr(sys, "argv", ["ddpm-fast", "verify", "."])
    with pytest.raises(SystemExit, match=r"^error: .*pip install ddpm_fast\[diffusers\]$"):
        cli.main()


# Numbers


def pair(original, ours, shape=(1, 1, 1, 4), dtypes=(torch.float32, torch.float32)):
    """Of runs that are known: the states after each step, (N, ...) without the batch."""
    calls = []

    def run(name, states):
        def run(num_steps, record=None):
            calls.append((name, num_steps, record is not None))
            x = torch.zeros(shape)
            for k in range(num_steps):
                x.copy_(torch.tensor(states[k % len(states)]))  # in place, as a sampler's state
                if record is not None:
                    record(10 * (num_steps - k), x)
            return ddpm_fast.to_uint8(x)

        return run

    runs = run("original", original), run("ours", ours)
    return pairs.Pair(*runs, ("one", "two"), dtypes, nn.Identity(), "ddim", 1000), calls


def of(monkeypatch, *given, num_steps=None, tolerance=None, **options):
    made, calls = pair(*given, **options)
    monkeypatch.setattr(module, "pair_of", lambda *_: made)
    return verify(nn.Identity(), num_steps=num_steps, tolerance=tolerance), calls


LEVEL = 2 / 255


def test_errors_and_shares(monkeypatch):
    original = [[4.0, 0.0, 0.0, 0.0], [-2.0, 1.0, 1.0, 1.0], [0.2, 0.0, 0.5, 0.5]]
    ours = [[4.0, 0.0, 0.0, -0.5], [-2.5, 1.0, 1.0, 1.25], [0.2 + LEVEL, 0.0, 0.5, 0.5 + 2 * LEVEL]]
    found, _ = of(monkeypatch, original, ours, num_steps=3)
    assert found.timesteps == (30, 20, 10)
    assert found.errors == pytest.approx((0.5, 0.5, 2 * LEVEL))
    assert found.relative_errors == pytest.approx((0.125, 0.25, 4 * LEVEL))
    assert (found.off_by_one, found.off_by_more) == (0.25, 0.25)
    assert not found.ok
    assert of(monkeypatch, original, ours, num_steps=3, tolerance=(0.25, 0.25))[0].ok
    assert not of(monkeypatch, original, ours, num_steps=3, tolerance=(0.24, 0.25))[0].ok
    assert not of(monkeypatch, original, ours, num_steps=3, tolerance=(0.25, 0.24))[0].ok
    assert not of(monkeypatch, original, ours, num_steps=3, tolerance=(1, 0))[0].ok


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("who", ["original", "ours", "both"])
def test_what_is_not_finite_never_passes(monkeypatch, value, who):
    good, bad = [[0.0] * 4, [0.0] * 4], [[value, 0.0, 0.0, 0.0], [0.0] * 4]
    states = {"original": (bad, good), "ours": (good, bad), "both": (bad, bad)}[who]
    found, _ = of(monkeypatch, *states, num_steps=2, tolerance=(1, 1))
    assert not found.ok and found.off_by_one == found.off_by_more == 0


def test_the_tolerance_is_that_of_the_lower_dtype(monkeypatch):
    exact = [[0.0] * 4]
    for dtypes, expected in (
        ((torch.float64, torch.float32), torch.float32),
        ((torch.float32, torch.float16), torch.float16),
        ((torch.bfloat16, torch.float16), torch.bfloat16),
    ):
        assert of(monkeypatch, exact, exact, num_steps=1, dtypes=dtypes)[0].tolerance == TOLERANCES[expected]


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_a_tolerance_is_what_its_mean_error_gives(dtype):
    """The docstring of TOLERANCES: 8e-6 for float32, eps / 2 for the halves, of uniform images."""
    error = 8e-6 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2_000_000, generator=generator, dtype=torch.float64) * 1.8 - 0.9
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float64) * error * math.sqrt(math.pi / 2)
    steps = [(value / 2 + 0.5).mul(255).round() for value in (x, x + noise)]
    off = (steps[0] - steps[1]).abs()
    one, more = TOLERANCES[dtype]
    assert (off == 1).double().mean() + 2 * (off == 2).double().mean() == pytest.approx(one, rel=0.1)
    assert (off > 1).double().mean() <= more


def test_runs_are_timed_in_turns_after_one_that_is_not(monkeypatch):
    monkeypatch.setattr(module, "ROUNDS", 3)
    clock = iter([0, 0, 0, 4, 10, 12, 20, 80, 80, 81, 90, 95, 100, 103])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    found, calls = of(monkeypatch, [[0.0] * 4], [[0.0] * 4], num_steps=60)
    recorded = [("original", 60, True), ("ours", 60, True)]
    assert calls == recorded + 4 * [("original", 50, False), ("ours", 50, False)]  # 50: long runs are cut
    assert found.seconds == (5, 2) and found.speed == 2.5 and found.timed_steps == 50


def test_the_table(monkeypatch):
    original, ours = [[0.0, 0.0, 0.5, 0.5]], [[0.0, 0.0, 0.5, 0.5 + LEVEL]]
    found, _ = of(monkeypatch, original, ours, num_steps=30)
    lines = str(found).splitlines()
    assert lines[:3] == ["original: one", "ours: two", "run: ddim, 30 steps, batch 1"]
    assert lines[3].split() == ["step", "t", "max", "error", "relative"]
    rows = [line.split() for line in lines[4:14]]
    assert [int(row[0]) for row in rows] == [1, 4, 7, 11, 14, 17, 20, 24, 27, 30]
    assert rows[0] == ["1", "300", "7.8e-03", "1.6e-02"] and rows[-1] == ["30", "10", "7.8e-03", "1.6e-02"]
    assert lines[14:16] == ["pixels off by 1: 25 % (at most 0.1 %)", "pixels off by more: 0 % (at most 0 %)"]
    assert lines[16].startswith(f"speed: {found.speed:.2f}x (30 steps in ")
    assert lines[17:] == ["within tolerance: no"]
    short = str(of(monkeypatch, original, ours, num_steps=2)[0]).splitlines()
    assert [line.split()[0] for line in short[4:6]] == ["1", "2"] and len(short) == 10
    assert str(of(monkeypatch, original, ours, num_steps=1)[0]).splitlines()[4].split()[:2] == ["1", "10"]


# The picture


def found_with(original, ours):
    original, ours = (torch.tensor(values, dtype=torch.uint8) for values in (original, ours))
    return verification.Verification(
        ("one", "two"), "ddim", (0,), (0.0,), (0.0,), 0.0, 0.0, (0.0, 0.0), 1, (1.0, 1.0), original, ours
    )


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_picture(tmp_path, channels):
    original = np.random.default_rng(0).integers(0, 200, (4, channels, 32, 32))
    ours = original.copy()
    ours[0, 0, 3, 5] += 1
    original[0, 0, 4, 5] += 2
    ours[1, channels - 1, 31, 31] += 55
    out = tmp_path / "new" / "a.png"
    found_with(original, ours).save_picture(out)
    assert [file.name for file in out.parent.iterdir()] == ["a.png"]
    picture = np.asarray(Image.open(out)).astype(int).reshape(4 * 34 + 2, 3 * 34 + 2, channels)
    difference = np.zeros_like(original)
    difference[0, 0, 3, 5], difference[0, 0, 4, 5] = verification.AMPLIFIED, 2 * verification.AMPLIFIED
    difference[1, channels - 1, 31, 31] = 255
    difference[:, 3:] = 255  # opaque
    for row in range(4):
        for column, images in enumerate((original, ours, difference)):
            top, left = 2 + 34 * row, 2 + 34 * column
            tile = picture[top : top + 32, left : left + 32]
            assert np.array_equal(tile, images[row].transpose(1, 2, 0))


def test_what_is_no_picture(tmp_path):
    with pytest.raises(ValueError, match="1, 3 or 4 channels, not 2"):
        found_with(np.zeros((1, 2, 4, 4)), np.zeros((1, 2, 4, 4))).save_picture(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"images \(B, C, H, W\), these are \(1, 2\)"):
        found_with(np.zeros((1, 2)), np.zeros((1, 2))).save_picture(tmp_path / "a.png")
    with pytest.raises(OSError, match="is not a file"):
        found_with(np.zeros((1, 1, 4, 4)), np.zeros((1, 1, 4, 4))).save_picture(tmp_path)
    assert not list(tmp_path.iterdir())
