"""What is trained on: images read and refused; and the config: read, written and refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_fast import UNetConfig
from ddpm_fast.training import PRESETS, Config, OptimizerConfig, Trainer, data, parse_changes

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)


def load(source, said=None, **options):
    given = {"channels": 3, "size": (8, 8), "crop": False, "strict": False}
    given |= {"labelled": False, "device": torch.device("cpu")}
    tell = (lambda text: None) if said is None else said.append
    return data.load(str(source), **given | {"tell": tell} | options)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Six images, in three formats, two of them in a folder below; and a text."""
    (tmp_path / "below").mkdir()
    for k, pixels in enumerate(PIXELS):
        ending = ("png", "bmp", "TIFF")[k % 3]
        Image.fromarray(pixels).save(tmp_path / ("below" if k > 3 else "") / f"{k}.{ending}")
    (tmp_path / "readme.txt").write_text("no image")
    return tmp_path


def scaled(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1


def test_a_folder(folder):
    found = load(folder)
    assert len(found) == 6 and found.shape == (3, 8, 8)
    x = found.take(torch.tensor([5, 0, 3]))
    assert x.dtype == torch.float32 and float(x.min()) >= -1 and float(x.max()) <= 1
    assert torch.equal(x, scaled(PIXELS[[5, 0, 3]]))
    grey = load(folder, channels=1)
    expected = np.stack([np.asarray(Image.fromarray(p).convert("L")) for p in PIXELS])[..., None]
    assert torch.equal(grey.take(torch.arange(6)), scaled(expected))
    assert load(folder, channels=4).shape == (4, 8, 8)
    assert load(folder, size=None).shape == (3, 8, 8)


def test_a_large_folder_is_read_as_it_goes(folder, monkeypatch):
    whole = load(folder)
    monkeypatch.setattr(data, "IN_MEMORY", 1)
    streamed = load(folder)
    assert isinstance(streamed, data.Streamed) and len(streamed) == 6
    indices = torch.tensor([5, 5, 0])
    assert torch.equal(streamed.take(indices), whole.take(indices))


def test_a_large_folder_trains_as_a_small_one(folder, tmp_path_factory, monkeypatch, one_thread):
    unet = UNetConfig((8,), (False,), (False,), sample_size=8, norm_num_groups=4, layers_per_block=1)
    config = Config(str(folder), 3, 4, ema=(), unet=unet, samples=1, sampling={"num_steps": 1})
    found = []
    for limit in (2**31, 1):
        monkeypatch.setattr(data, "IN_MEMORY", limit)
        made = Trainer(config, tmp_path_factory.mktemp("run"), bar=False)
        found.append(made.fit().state_dict())
    assert isinstance(made.images, data.Streamed)
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


@pytest.mark.parametrize("memory", [2**31, 1])
def test_images_that_cannot_be_read(folder, memory, monkeypatch):
    """Named and counted, or an error: no image at all, and one that is cut off after its header."""
    monkeypatch.setattr(data, "IN_MEMORY", memory)
    (folder / "3.png").write_bytes(b"nothing")
    whole = (folder / "0.png").read_bytes()
    (folder / "0.png").write_bytes(whole[:100])
    said = []
    found = load(folder, said)
    x = found.take(torch.arange(len(found)))
    said = "\n".join(said)
    assert "3.png" in said and "0.png" in said and "1 of the files were left out" in said
    good = scaled(PIXELS[[1, 2, 4, 5]])
    if memory == 1:  # the next one stands for the one that turned out to be damaged
        good = torch.cat([good[:1], good])
    assert torch.equal(x, good)
    with pytest.raises(ValueError, match=r"data: .*cannot be read: .*(0|3)\.png"):
        load(folder, strict=True)
    (folder / "3.png").write_bytes(whole)
    with pytest.raises(ValueError, match=r"cannot be read: .*0\.png"):
        load(folder, strict=True).take(torch.tensor([0]))


def test_mixed_sizes(folder):
    Image.fromarray(np.zeros((8, 16, 3), np.uint8)).save(folder / "wide.png")
    for size in ((8, 8), None):
        with pytest.raises(ValueError, match=r"wide.png is 16 x 8 .*8 x 8: with crop=true"):
            load(folder, size=size)
    found = load(folder, crop=True)
    assert len(found) == 7 and found.shape == (3, 8, 8)
    with pytest.raises(ValueError, match="the network's size is 4 x 4"):
        load(folder, size=(4, 4))
    assert load(folder, size=(4, 4), crop=True).shape == (3, 4, 4)


def test_an_image_that_a_camera_turned(tmp_path):
    tags = Image.Exif()
    tags[0x0112] = 6  # to be turned by 90 degrees
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, :4] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=tags)
    found = load(tmp_path, size=(8, 4))
    assert torch.equal(found.take(torch.tensor([0]))[0, 0, :, 0], torch.tensor([1.0] * 4 + [-1.0] * 4))


def test_nothing_to_learn(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no images"):
        load(tmp_path)
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"of the 1 images in .* none can be read"):
        load(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"allowed: a folder of images, FILE.npz, or 'digits', 's-curve'"
    ):
        load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"1, 3 or 4 channels, the network has 2: give an .npz"):
        load(tmp_path, channels=2)


@pytest.mark.parametrize("memory", [2**31, 1])
def test_a_folder_of_classes(tmp_path, memory, monkeypatch):
    """Named by their folders, whatever lies below; one that is left out takes its label along."""
    monkeypatch.setattr(data, "IN_MEMORY", memory)
    for k, name in enumerate(("cat", "dog/brown", "ant", "cat", "dog", "dog")):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(PIXELS[k]).save(tmp_path / name / f"{k}.png")
    order = [2, 0, 3, 4, 5, 1]  # by path
    found = load(tmp_path, labelled=True)
    assert found.classes == ("ant", "cat", "dog")
    assert found.labels.tolist() == [0, 1, 1, 2, 2, 2] and found.labels.dtype == torch.int64
    x, labels = found.take_labelled(torch.tensor([5, 0, 1]))
    assert torch.equal(x, scaled(PIXELS[[1, 2, 0]])) and labels.tolist() == [2, 0, 1]
    assert load(tmp_path).labels is None
    (tmp_path / "ant" / "2.png").write_bytes(b"nothing")  # seen when its size is asked
    whole = (tmp_path / "cat" / "3.png").read_bytes()
    (tmp_path / "cat" / "3.png").write_bytes(whole[:100])  # and when it is decoded
    found = load(tmp_path, labelled=True)
    x, labels = found.take_labelled(torch.arange(len(found)))
    kept = [0, 4, 5, 1] if memory > 1 else [0, 4, 4, 5, 1]
    assert torch.equal(x, scaled(PIXELS[kept]))
    assert labels.tolist() == [(1, 2, 0, 1, 2, 2)[k] for k in kept] and sorted(order) == list(range(6))
    assert found.classes == ("ant", "cat", "dog")
    Image.fromarray(PIXELS[0]).save(tmp_path / "0.png")
    with pytest.raises(ValueError, match=r"0.png is of no class: .* folders of images, one a class"):
        load(tmp_path, labelled=True)


def test_labels_of_an_npz_and_of_sets(tmp_path):
    file, labels = tmp_path / "a.npz", np.array([2, 0, 1, 1, 0, 2], dtype=np.int32)
    for wrong in ({}, {"labels": labels[:5]}, {"arr_1": PIXELS}):
        np.savez(file, arr_0=PIXELS, **wrong)
        with pytest.raises(ValueError, match=r"a.npz must hold labels, or arr_1: integers \(6,\), .*; got"):
            load(file, labelled=True)
    for name in ("labels", "arr_1"):
        np.savez(file, arr_0=PIXELS, **{name: labels})
        x, found = load(file, labelled=True).take_labelled(torch.tensor([3, 0]))
        assert torch.equal(x, scaled(PIXELS[[3, 0]])) and found.tolist() == [1, 2]
        assert load(file).labels is None
    pytest.importorskip("sklearn")
    (images, labels), _ = data.digits()
    x, found = load("digits", labelled=True).take_labelled(torch.tensor([7]))
    assert torch.equal(x, images[7:8]) and torch.equal(found, labels[7:8])
    with pytest.raises(ValueError, match="'s-curve' has no labels"):
        load("s-curve", labelled=True)


def test_npz(tmp_path):
    file = tmp_path / "a.npz"
    np.savez(file, PIXELS)
    found = load(file)
    assert torch.equal(found.take(torch.arange(6)), scaled(PIXELS))
    np.savez(file, images=PIXELS[..., 0])
    assert load(file).shape == (1, 8, 8)
    points = np.random.default_rng(0).standard_normal((5, 2))
    np.savez(file, arr_0=points, labels=np.arange(5))
    assert torch.equal(load(file).take(torch.tensor([4])), torch.tensor(points[4:], dtype=torch.float32))
    for arrays, words in (
        ({"a": PIXELS, "b": PIXELS}, "it has a, b, and no arr_0"),
        ({"a": np.arange(3)}, "must hold uint8"),
        ({"a": np.array([{}])}, "cannot be read"),
    ):
        np.savez(file, **arrays)
        with pytest.raises(ValueError, match=words):
            load(file)
    file.write_bytes(b"no zip")
    with pytest.raises(ValueError, match=r"a.npz cannot be read"):
        load(file)
    with pytest.raises(FileNotFoundError, match=r"b.npz is not a file"):
        load(tmp_path / "b.npz")


def test_sets():
    pytest.importorskip("sklearn")
    (images, labels), (held_out, _) = data.digits()
    assert images.shape == (1437, 1, 8, 8) and held_out.shape == (360, 1, 8, 8) and labels.shape == (1437,)
    assert torch.equal(load("digits", size=None).take(torch.tensor([3])), images[3:4])
    points = load("s-curve").take(torch.arange(10**4))
    assert points.shape == (10**4, 2) and float(points.abs().max()) < 0.4


# The config


UNET = UNetConfig((8,), (False,), (False,), sample_size=8, norm_num_groups=4)


def test_a_config_comes_back(tmp_path):
    config = Config(
        data='a "b" \\ \x7f é',
        seed=2**62,
        compile=False,
        ema=(0.9, 1e-05),
        unet=UNET,
        optimizer=OptimizerConfig(lr=1e-05, clip=1.0),
        loss={"min_snr_gamma": 5.0},
        sampling={"clip": float("inf"), "num_steps": 5},
    )
    file = tmp_path / "c.toml"
    file.write_text(config.to_toml(), encoding="utf-8")
    assert Config.read(file) == config == Config.from_dict(config.to_dict())
    assert config.settings() == {"prediction": "epsilon", "clip": None, "num_steps": 5}


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name, tmp_path):
    config = Config.read(name)
    (tmp_path / "c.toml").write_text(config.to_toml())
    assert Config.read(tmp_path / "c.toml") == config
    with torch.device("meta"):
        assert config.make_model() is not None


def test_changes_are_laid_over():
    changes = parse_changes(["optimizer.lr=1e-5", "batch=4", "unet.dropout = 0.5"])
    config, preset = Config.read("digits", changes), Config.read("digits")
    assert (config.optimizer.lr, config.batch, config.unet.dropout) == (1e-5, 4, 0.5)
    changed = dataclasses.replace(preset.optimizer, lr=1e-5)
    assert config.optimizer == changed and config.schedule == preset.schedule


def test_the_rate():
    constant, cosine = OptimizerConfig(lr=1.0, warmup=4), OptimizerConfig(lr=1.0, decay="cosine")
    assert [constant.rate(k, 10) for k in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert [round(cosine.rate(k, 4), 6) for k in range(5)] == [1.0, 0.853553, 0.5, 0.146447, 0.0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("batches = 3", "c.toml: unknown key 'batches'; allowed: accumulate, batch, "),
        ("[unet]\nchannels = 3", r"unknown key 'channels' in \[unet\]; allowed: attention_head_dim, "),
        ("[unet]\nblock_out_channels = [8]", r"\[unet\]: .* missing .* 'down_attention'"),
        ("[mlp]\nunits = 0", "mlp.units must be at least 1, got 0"),
        ("[schedule]\nkind = 'quadratic'", "schedule.kind must be one of 'linear', .* got 'quadratic'"),
        ("[schedule]\nT = 3", "schedule.kind must be one of"),
        (
            "[schedule]\nkind = 'cosine'\nbeta_end = 1",
            r"unknown key 'beta_end' in \[schedule\]; allowed: T, ",
        ),
        ("[loss]\nprediction = 'noise'", "prediction must be one of 'epsilon'"),
        ("[loss]\ndevice = 'cpu'", r"unknown key 'device' in \[loss\]"),
        ("[sampling]\nprediction = 'v'", r"unknown key 'prediction' in \[sampling\]"),
        ("[optimizer]\nname = 'sgd'", "optimizer.name must be one of 'adam', 'adamw', got 'sgd'"),
        ("[optimizer]\nlr = 0", "optimizer.lr must be finite and above 0, got 0"),
        ("[optimizer]\nbetas = [0.9]", "optimizer.betas must be two numbers"),
        ("optimizer = 1", r"\[optimizer\] must be a table"),
        ("ema = [1.0]", r"ema must be in \[0, 1\), got 1.0"),
        ("ema = 0.9", "ema must be a list of numbers, got 0.9"),
        ("batch = 2.5", "batch must be an integer, got 2.5"),
        ("batch = 8\naccumulate = 3", "batch must be a multiple of accumulate=3, got 8"),
        ("flip = 1", "flip must be one of True, False, got 1"),
        ("precision = 'float16'", "precision must be one of 'float32', 'bfloat16'"),
        ("seed = -1", "seed must be in"),
        ("times = 'loss'", "times must be one of 'uniform', 'antithetic', 'second_moment', got 'loss'"),
        ("times = 'second_moment'\ncompile = true", "compile must be 'auto' or false"),
        ("label_dropout = 1", r"label_dropout must be in \[0, 1\), got 1"),
        ("label_dropout = 0.1\n[mlp]\nunits = 8", "label_dropout needs unet.num_class_embeds, .* got none"),
        (
            "label_dropout = 0.1\n[unet]\nblock_out_channels = [32]\ndown_attention = [false]\n"
            "up_attention = [false]\nnum_class_embeds = 1",
            "num_class_embeds, of the data's classes and one more; got 1",
        ),
        ("data = 1", "data must be a string"),
        ("schedule = 'cosine'", r"\[schedule\] must be a table"),
        (
            "[loss]\nvariance = 'learned_range'\n[unet]\nblock_out_channels = [32]\n"
            "down_attention = [false]\nup_attention = [false]",
            "unet.out_channels must be 6: twice in_channels, got 3",
        ),
        ("batch: 3", "c.toml is not TOML"),
    ],
)
def test_a_config_that_is_refused(tmp_path, text, words):
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises((ValueError, TypeError), match=words):
        Config.read(tmp_path / "c.toml")
    with pytest.raises(ValueError, match="not both"):
        Config(unet=UNET, mlp=Config.read("s-curve").mlp)
