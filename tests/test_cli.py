"""`ddpm-fast` as a user runs it: files appear, mistakes are one line on stderr and exit status 1."""

from __future__ import annotations

import copy
import importlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_fast import Sampler, Schedule, UNet, UNetConfig, checkpoint, cli, pictures, to_uint8
from ddpm_fast.steps import ddpm


def run(*args, cwd):
    command = [sys.executable, "-m", "ddpm_fast", *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


def call(monkeypatch, *args):
    """The same in this process: fast, for the many small cases."""
    monkeypatch.setattr(sys, "argv", ["ddpm-fast", *map(str, args)])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    return exit_.value.code


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    torch.manual_seed(0)
    config = UNetConfig((8,), (False,), (False,), sample_size=8, norm_num_groups=4, layers_per_block=1)
    folder = tmp_path_factory.mktemp("tiny") / "model"
    settings = {"method": "ddpm", "variance": "fixed_large", "prediction": "v", "clip": 1.0}
    checkpoint.save(folder, UNet(config), Schedule.linear(10), settings)
    return folder


def test_with_no_arguments_it_samples_the_bundled_digits(tmp_path):
    done = run("sample", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "samples.png: 64 images" in done.stdout and "images/s (ddim, 50 steps, cpu)" in done.stdout
    assert "50/50" in done.stderr  # the bar
    picture = Image.open(tmp_path / "samples.png")
    assert picture.mode == "L" and picture.size == (8 * 34 + 2, 8 * 34 + 2)
    assert [p.name for p in tmp_path.iterdir()] == ["samples.png"]


def test_info(tmp_path):
    done = run("info", cwd=tmp_path)
    assert done.returncode == 0
    for word in (
        "ddpm_fast: ",
        "torch: ",
        "library: ",
        "cpu kernels: ",
        "past the dispatcher: ",
        "group_norm_silu on cpu: ",
    ):
        assert word in done.stdout


@pytest.mark.parametrize("method,steps", [("ddpm", 10), ("ddim", 4), ("dpm_solver", 4)])
def test_methods_and_formats(monkeypatch, tmp_path, tiny, method, steps):
    common = ("sample", "--checkpoint", tiny, "--method", method, "--steps", steps, "--n", 5, "--batch", 2)
    assert call(monkeypatch, *common, "--out", tmp_path / "a.npz") == 0
    images = np.load(tmp_path / "a.npz")["arr_0"]
    assert images.shape == (5, 8, 8, 3) and images.dtype == np.uint8
    assert call(monkeypatch, *common, "--out", tmp_path / "deep" / "folder") == 0
    files = sorted((tmp_path / "deep" / "folder").iterdir())
    assert [f.name for f in files] == [f"{k:06}.png" for k in range(5)]
    assert np.array_equal(np.stack([np.asarray(Image.open(f)) for f in files]), images)
    assert call(monkeypatch, *common, "--out", tmp_path / "g.png") == 0
    sheet = np.asarray(Image.open(tmp_path / "g.png"))
    assert np.array_equal(sheet[2:34:4, 36:68:4], images[1])


def test_image_k_does_not_depend_on_the_run(monkeypatch, tmp_path, tiny):
    def images(*args):
        assert call(monkeypatch, "sample", "--checkpoint", tiny, *args, "--out", tmp_path / "a.npz") == 0
        return np.load(tmp_path / "a.npz")["arr_0"].astype(int)

    whole = images("--n", 7, "--seed", 5)
    assert np.abs(images("--n", 7, "--seed", 5, "--batch", 3) - whole).max() <= 1
    assert np.abs(images("--n", 2, "--seed", 5, "--first-image", 4) - whole[4:6]).max() <= 1
    assert np.abs(images("--n", 7, "--seed", 6) - whole).max() > 10
    common = ("sample", "--checkpoint", tiny, "--seed", 5, "--out", tmp_path / "d")
    assert call(monkeypatch, *common, "--n", 4) == 0
    assert call(monkeypatch, *common, "--n", 3, "--first-image", 4) == 0
    files = sorted((tmp_path / "d").iterdir())  # a run in two parts fills one folder
    assert [f.name for f in files] == [f"{k:06}.png" for k in range(7)]
    pixels = np.stack([np.asarray(Image.open(f)) for f in files]).astype(int)
    assert np.abs(pixels - whole).max() <= 1


def test_a_model_with_classes(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = UNetConfig((8,), (False,), (False,), sample_size=4, norm_num_groups=4, num_class_embeds=3)
    model, schedule = UNet(config).eval(), Schedule.linear(4)
    checkpoint.save("model", model, schedule)
    run = ("sample", "--checkpoint", "model", "--n", 5, "--first-image", 1, "--out", "a.npz")
    assert call(monkeypatch, *run, "--batch", 2, "--class-labels", "2,0,1") == 0
    labels = torch.tensor([0, 1, 2, 0, 1])
    expected = to_uint8(Sampler(model, schedule)(5, first_image=1, class_labels=labels)).permute(0, 2, 3, 1)
    assert np.abs(np.load("a.npz")["arr_0"].astype(int) - expected.numpy()).max() <= 1
    for given, words in (
        ((), "the model needs class_labels, in [0, 2]"),
        (("--class-labels", "3"), "class_labels must be in [0, 2], got 3"),
        (("--class-labels", "a"), "--class-labels must be integers such as 3 or 0,1,2, got 'a'"),
    ):
        assert words in call(monkeypatch, *run, *given)


def test_saved_settings_are_kept(monkeypatch, tmp_path, tiny):
    model, schedule, _ = checkpoint.load(tiny)
    checkpoint.save(tmp_path / "m", model.half(), schedule, {"num_steps": 7, "variance": "fixed_large"})
    for args, steps in (((), 7), (("--steps", 3), 3), (("--method", "ddpm"), 7)):
        made = []

        def keep(*given, made=made, **options):
            made.append(Sampler(*given, **options))
            return made[0]

        monkeypatch.setattr(cli, "Sampler", keep)
        out = ("--out", tmp_path / "a.npz")
        assert call(monkeypatch, "sample", "--checkpoint", tmp_path / "m", "--n", 1, *args, *out) == 0
        expected = ddpm(schedule, steps, variance="fixed_large")
        assert np.array_equal(made[0].table.rows, expected.rows)


@pytest.mark.parametrize(
    "args,words",
    [
        (("--device", "foo"), "foo"),
        (("--n", 0), "--n must be at least 1, got 0"),
        (("--batch", 0), "--batch must be at least 1"),
        (("--first-image", -1), "--first-image must be at least 0"),
        (("--method", "euler"), "method='euler' is not known; allowed: ddpm, ddim, dpm_solver"),
        (("--steps", 11), "num_steps must be in [1, 10], got 11"),
        (("--steps", 0), "num_steps must be in [1, 10], got 0"),
        (("--format", "jpg"), "--format 'jpg' is not known; allowed: png-grid, png-dir, npz"),
        (("--out", "a.jpg"), "--out a.jpg does not say its format"),
        (("--out", "/proc/nowhere/a.png"), "/proc/nowhere cannot be written"),
        (("--checkpoint", "nowhere"), "nowhere is not a folder"),
        (("--seed", 2**64), "seed must fit in 64 bits"),
    ],
)
def test_mistakes_are_one_line(monkeypatch, tmp_path, tiny, args, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.nn.Conv2d, "forward", lambda *_: pytest.fail("work was done"))
    code = call(monkeypatch, "sample", "--checkpoint", tiny, *args)
    assert isinstance(code, str) and code.startswith("error: ") and words in code
    assert not list(tmp_path.iterdir())


def test_a_file_is_not_a_folder(tmp_path):
    (tmp_path / "f").touch()
    with pytest.raises(OSError, match="is not a folder"):
        pictures.check_writable(tmp_path / "f", "png-dir")
    with pytest.raises(OSError, match="is not a file"):
        pictures.check_writable(tmp_path, "npz")
    with pytest.raises(OSError, match="cannot be written"):
        pictures.check_writable(tmp_path / "f" / "a.png", "png-grid")
    with pytest.raises(ValueError, match="1, 3 or 4 channels, not 2"):
        pictures.check_channels(2, "png-grid")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    out = tmp_path / "a.npz"
    out.write_bytes(b"old")
    monkeypatch.setattr(np, "savez", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        pictures.write(torch.zeros(1, 1, 2, 2, dtype=torch.uint8), out, "npz")
    assert out.read_bytes() == b"old" and list(tmp_path.iterdir()) == [out]


# verify


@pytest.fixture(scope="module")
def theirs(tmp_path_factory, diffusers):
    """The folder of a small random pipeline; DDPM, in which what a step rounds does not grow."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        norm_num_groups=4,
    )
    folder = tmp_path_factory.mktemp("theirs") / "model"
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(folder)
    return folder


def test_verify(tmp_path, theirs):
    done = run("verify", theirs, "--steps", 4, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for words in ("DDPMPipeline, float32, cpu", "DDPMScheduler, 4 steps, batch 1", "pixels off by 1: 0 %"):
        assert words in done.stdout
    assert done.stdout.endswith("verify.png: the original, ours, and their difference amplified\n")
    bar = done.stderr.splitlines()[-1]
    assert bar.startswith("verify: 100%") and " 40/40 [" in bar  # each ran 5 times
    assert [file.name for file in tmp_path.iterdir()] == ["verify.png"]
    assert Image.open(tmp_path / "verify.png").size == (3 * 34 + 2, 34 + 2)


def test_verify_s_options(monkeypatch, tmp_path, capsys, theirs, tiny):
    out = tmp_path / "deep" / "v.PNG"

    def verify(folder, *options):
        assert call(monkeypatch, "verify", folder, "--device", "cpu", *options, "--out", out) == 0
        return capsys.readouterr().out, np.asarray(Image.open(out))

    table, first = verify(theirs, "--steps", 3, "--batch-size", 2)
    assert "3 steps, batch 2" in table and first.shape == (2 * 34 + 2, 3 * 34 + 2, 3)
    assert np.array_equal(verify(theirs, "--steps", 3, "--batch-size", 2, "--seed", 0)[1], first)
    assert not np.array_equal(verify(theirs, "--steps", 3, "--batch-size", 2, "--seed", 1)[1], first)
    assert "DDIMScheduler, 2 steps" in verify(theirs, "--steps", 2, "--method", "ddim")[0]
    assert "DDPMPipeline, bfloat16" in verify(theirs, "--steps", 50, "--dtype", "bfloat16")[0]
    assert "DDPMPipeline, float32\n" in verify(theirs, "--steps", 2, "--dtype", "float32")[0]
    assert "UNet in the naive loop" in verify(tiny)[0]


def test_verify_past_tolerance(monkeypatch, tmp_path, capsys, theirs):
    pairs = importlib.import_module("ddpm_fast.compat.diffusers.pair")
    accelerate = pairs.accelerate

    def perturbed(pipe):
        made = copy.deepcopy(accelerate(pipe))
        with torch.no_grad():
            made.unet.conv_in.weight[0] += 0.1
        return made

    monkeypatch.setattr(pairs, "accelerate", perturbed)
    code = call(monkeypatch, "verify", theirs, "--steps", 3, "--out", tmp_path / "v.png")
    said = capsys.readouterr()
    assert code == 1
    assert "within tolerance: no" in said.out and (tmp_path / "v.png").is_file()
    assert said.err.endswith("error: the images differ past tolerance\n")


@pytest.mark.parametrize(
    "args,words",
    [
        (("--dtype", "float64"), "--dtype 'float64' is not known; allowed: float32, bfloat16"),
        (("--method", "euler"), "method='euler' is not known; allowed: ddpm, ddim"),
        (("--steps", 0), "num_steps must be at least 1, got 0"),
        (("--steps", 1001), "1001"),
        (("--batch-size", 0), "batch_size must be at least 1, got 0"),
        (("--seed", 2**64), "seed must be in"),
        (("--device", "foo"), "foo"),
        (("--out", "a.jpg"), "--out a.jpg must end in .png"),
        (("--out", "/proc/nowhere/a.png"), "/proc/nowhere cannot be written"),
    ],
)
def test_verify_s_mistakes_are_one_line(monkeypatch, tmp_path, theirs, args, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.nn.Conv2d, "forward", lambda *_: pytest.fail("work was done"))
    code = call(monkeypatch, "verify", theirs, *args)
    assert isinstance(code, str) and code.startswith("error: ") and words in code
    assert not list(tmp_path.iterdir())


def test_verify_wants_a_model(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for folder, words in (("nowhere", "nowhere is not a folder"), (".", "holds no model")):
        code = call(monkeypatch, "verify", folder)
        assert isinstance(code, str) and code.startswith("error: ") and words in code
    assert call(monkeypatch, "verify") == 2
