"""Checkpoints of improved- and guided-diffusion, of Ho's in PyTorch and of pytorch-ddpm, as `UNet`s."""

import os

import numpy as np
import pytest
import torch
from op_cases import check_error_rule
from plain_unets import Weights, ho, openai, sinusoids, w86

from ddpm_fast import Sampler, checkpoint, steps
from ddpm_fast.checkpoint import load_ho, load_openai, load_w86
from ddpm_fast.schedule import Schedule

pytestmark = pytest.mark.usefixtures("one_thread")

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
T = torch.tensor([3, 961])
LOADERS = {"openai": load_openai, "ho": load_ho, "w86": load_w86}


def saved(tmp_path, content):
    torch.save(content, tmp_path / "model.pt")
    return tmp_path / "model.pt"


def check(model, plain, weights, *given):
    """The loaded U-Net against the plain expression of the file's weights, by the error rule."""
    assert not model.training
    exact = plain(weights.double(), X.double(), *given)
    with torch.no_grad():
        check_error_rule(model(X, *given), plain(Weights(weights), X, *given), exact)


# OpenAI

FLAGS = {"image_size": 16, "num_channels": 32, "num_res_blocks": 1, "attention_resolutions": "8"}
FLAGS |= {"channel_mult": "1,2", "use_scale_shift_norm": False, "num_heads": 1}
OPENAI = {"channels": 32, "mult": (1, 2), "layers": 1, "rates": (2,), "out": 3}


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ({}, {}),
        ({"num_heads": 4, "use_scale_shift_norm": True}, {"heads": 4, "film": True}),
        (
            {"num_head_channels": 16, "use_new_attention_order": True, "resblock_updown": True},
            {"head_channels": 16, "new_order": True, "updown": True},
        ),
        ({"class_cond": True, "learn_sigma": True}, {"classes": 1000, "out": 6}),
        ({"num_heads": 2, "num_heads_upsample": 2, "use_fp16": True}, {"heads": 2}),
        ({"diffusion_steps": 4000, "rescale_timesteps": True}, {"scale": 0.25}),
    ],
    ids=["plain", "heads", "new-order", "classes", "half", "rescaled"],
)
def test_openai(tmp_path, flags, options):
    options, weights = OPENAI | options, Weights()
    scale = options.pop("scale", 1.0)
    given = (T, torch.tensor([7, 999])) if "classes" in options else (T,)

    def plain(weights, x, t, *y):
        return openai(weights, x, t * scale, *y, **options)

    plain(weights, X, *given)
    model, schedule, settings = load_openai(saved(tmp_path, dict(weights)), **FLAGS | flags)
    check(model, plain, weights, *given)
    assert model.sample_shape == (3, 16, 16)
    assert len(schedule) == flags.get("diffusion_steps", 1000)
    checkpoint.save(tmp_path / "ours", model, schedule, settings)
    again, _, settings_again = checkpoint.load(tmp_path / "ours")
    assert torch.equal(again(X, *given), model(X, *given))
    assert settings_again == settings


DDPM = {"method": "ddpm", "prediction": "epsilon", "clip": 1.0, "variance": "fixed_large"}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, DDPM),
        ({"sigma_small": True}, DDPM | {"variance": "fixed_small"}),
        ({"predict_xstart": True, "use_kl": True}, DDPM | {"prediction": "x0"}),
        ({"clip_denoised": False}, DDPM | {"clip": None}),
        ({"timestep_respacing": "250"}, DDPM | {"spacing": "250"}),
        (
            {"timestep_respacing": "ddim25", "use_ddim": True},
            DDPM | {"method": "ddim", "spacing": "ddim25", "use_clipped_out": True},
        ),
    ],
)
def test_openai_settings(tmp_path, flags, expected):
    """By which `Sampler` does what `image_sample.py` does."""
    openai(weights := Weights(), X, T, **OPENAI)
    model, schedule, settings = load_openai(saved(tmp_path, dict(weights)), **FLAGS | flags)
    assert settings == expected
    table = Sampler(model, schedule, **settings).table
    kept = steps.space_timesteps(1000, flags.get("timestep_respacing", "1000"))
    np.testing.assert_array_equal(table.timesteps, kept)


def test_openai_schedules(tmp_path):
    """Nichol & Dhariwal 2021: the ends of the linear betas scaled by 1000 / T; eq. 17."""
    openai(weights := Weights(), X, T, **OPENAI)
    file = saved(tmp_path, dict(weights))
    flags = FLAGS | {"diffusion_steps": 4000, "rescale_timesteps": False}
    linear = load_openai(file, **flags)[1]
    np.testing.assert_allclose(linear.betas, np.linspace(0.25e-4, 0.005, 4000), rtol=1e-14)
    cosine = load_openai(file, **flags, noise_schedule="cosine")[1]
    level = np.cos((np.arange(4001) / 4000 + 0.008) / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(cosine.betas, np.minimum(1 - level[1:] / level[:-1], 0.999), rtol=1e-9)


@pytest.mark.parametrize(
    ("error", "flags", "message"),
    [
        (TypeError, {"num_chanels": 32}, r"got num_chanels; flags of image_sample.py: \['attention_res"),
        (ValueError, {"image_size": 48, "channel_mult": ""}, "size: 48; allowed: 32, 64, 128, 256, 512"),
        (ValueError, {"noise_schedule": "sqrt"}, "must be 'linear' or 'cosine', got 'sqrt'"),
        (ValueError, {"diffusion_steps": 4000}, "rescale_timesteps must be given with diffusion_steps=4000"),
        (ValueError, {"num_heads": 2, "num_heads_upsample": 4}, "UNet has as many heads on the way up"),
        (ValueError, {"num_heads": 3}, "num_attention_heads: got 3"),
        (ValueError, {"num_channels": 64}, "do not fit the config.*input_blocks.0.0.weight"),
        (ValueError, {"resblock_updown": True}, "missing: input_blocks.2.0.emb_layers.1.bias"),
        (TypeError, {"diffusion_steps": "4000"}, "diffusion_steps must be an integer"),
        (TypeError, {"num_channels": "32"}, "num_channels must be an integer, got '32'"),
        (TypeError, {"predict_xstart": "False"}, "predict_xstart must be True or False, got 'False'"),
        (TypeError, {"rescale_timesteps": 0}, "rescale_timesteps must be True or False, got 0"),
        (TypeError, {"channel_mult": (1, 2)}, r"channel_mult must be a string, got \(1, 2\)"),
        (ValueError, {"channel_mult": "1,x"}, "channel_mult must be positive integers such as .*got '1,x'"),
        (ValueError, {"attention_resolutions": "0"}, "attention_resolutions must be positive .*got '0'"),
        (ValueError, {"timestep_respacing": "ddim700"}, "no integer stride takes exactly 700 of 1000"),
    ],
)
def test_openai_errors(tmp_path, error, flags, message):
    openai(weights := Weights(), X, T, **OPENAI)
    with pytest.raises(error, match=message):
        load_openai(saved(tmp_path, dict(weights)), **FLAGS | flags)


# Ho et al.

HO = {"channels": 32, "mult": (1, 2, 2), "layers": 1, "attended": (1,)}


def ho_weights(x=X, **changes):
    ho(weights := Weights(), x, T, **HO | changes)
    return weights


@pytest.mark.parametrize("changes", [{}, {"layers": 2, "attended": (0, 2), "out": 5}])
def test_ho(tmp_path, changes):
    weights = ho_weights(**changes)
    model, schedule, settings = load_ho(saved(tmp_path, dict(weights)))
    check(model, lambda w, x, t: ho(w, x, t, **HO | changes), weights, T)
    np.testing.assert_allclose(schedule.betas, np.linspace(1e-4, 0.02, 1000), rtol=1e-14)
    assert settings == DDPM | ({} if not changes else {"variance": "fixed_small"})
    assert model.config.sample_size == (32 if not changes else None)


def test_ho_as_published(tmp_path):
    """Attention at 16 x 16 and two fixed variances, by the size of the images."""
    weights = ho_weights(torch.zeros(2, 3, 32, 32), mult=(1, 1, 2, 2, 4, 4), attended=(4,))
    model, _, settings = load_ho(saved(tmp_path, dict(weights)))
    assert model.sample_shape == (3, 256, 256)
    assert settings["variance"] == "fixed_small"
    weights = ho_weights(mult=(1, 2, 2, 2))
    model, _, settings = load_ho(saved(tmp_path, dict(weights)), image_size=64, variance="fixed_small")
    assert model.sample_shape == (3, 64, 64)
    assert settings["variance"] == "fixed_small"


@pytest.mark.parametrize("averaged", [True, False])
def test_ho_as_trained_by_ddim(tmp_path, averaged):
    weights = ho_weights()
    states = [{f"module.{name}": value + averaged for name, value in weights.items()}, {"state": {}}, 3, 900]
    states += [dict(weights)] * averaged
    model = load_ho(saved(tmp_path, states))[0]
    check(model, lambda w, x, t: ho(w, x, t, **HO), weights, T)


# pytorch-ddpm

W86 = {"channels": 64, "mult": (1, 2), "layers": 2, "attended": (1,)}


def w86_weights(T=1000, **changes):
    sin, cos = sinusoids(torch.arange(T), 64, torch.empty(0), 0)
    weights = Weights({"time_embedding.timembedding.0.weight": torch.stack([sin, cos], -1).flatten(1)})
    w86(weights, X, torch.tensor([0, 2]), **W86 | changes)
    return weights


@pytest.mark.parametrize("changes", [{}, {"mult": (1, 1, 2), "layers": 1, "attended": (0, 2)}])
def test_w86(tmp_path, changes):
    weights = w86_weights(**changes)
    model, schedule, settings = load_w86(saved(tmp_path, dict(weights)), image_size=16)
    check(model, lambda w, x, t: w86(w, x, t, **W86 | changes), weights, T)
    betas = torch.linspace(1e-4, 0.02, 1000).double().numpy()
    np.testing.assert_array_equal(schedule.betas, betas)
    assert settings == DDPM | {"clip": None}


def test_w86_checkpoint(tmp_path):
    weights = w86_weights(T=50)
    other = {name: value + 1 for name, value in weights.items()}
    content = {"net_model": other, "ema_model": dict(weights), "step": 3, "x_T": torch.zeros(4, 3, 24, 24)}
    file = saved(tmp_path, content)
    model, schedule, settings = load_w86(file, mean_type="xprev", var_type="fixedsmall", beta_T=0.1)
    check(model, lambda w, x, t: w86(w, x, t, **W86), weights, torch.tensor([3, 49]))
    assert model.sample_shape == (3, 24, 24)
    assert (settings["prediction"], settings["variance"]) == ("mean", "fixed_small")
    assert schedule.T == 50
    assert schedule.betas[-1] == np.float32(0.1)


def test_w86_errors(tmp_path):
    weights = w86_weights()
    file = saved(tmp_path, dict(weights))
    with pytest.raises(ValueError, match="mean_type must be one of 'epsilon', 'xstart', 'xprev', got 'eps'"):
        load_w86(file, mean_type="eps")
    with pytest.raises(ValueError, match="var_type must be one of"):
        load_w86(file, var_type="learned")
    table = weights["time_embedding.timembedding.0.weight"]
    for other in (table + 1e-2, table.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1), table[:, :32]):
        file = saved(tmp_path, dict(weights) | {"time_embedding.timembedding.0.weight": other})
        with pytest.raises(ValueError, match="does not hold the sinusoids that our U-Net computes"):
            load_w86(file)


# All of them


@pytest.mark.parametrize("name", LOADERS)
def test_files_of_something_else(tmp_path, name):
    load, marker = LOADERS[name], tmp_path / "marker"

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    with pytest.raises(FileNotFoundError, match=r"nothing\.pt is missing"):
        load(tmp_path / "nothing.pt")
    with pytest.raises(ValueError, match=r"model\.pt is refused.*weights_only=False"):
        load(saved(tmp_path, {"conv_in.weight": Payload()}))
    assert not marker.exists()
    with pytest.raises(ValueError, match=r"must hold a dict of tensors"):
        load(saved(tmp_path, {"step": 3}))
    with pytest.raises(ValueError, match=r"is not in this layout|do not fit the config"):
        load(saved(tmp_path, {"weight": torch.zeros(1)}))
    with pytest.raises(ValueError, match=r"model\.pt is truncated or damaged"):
        file = saved(tmp_path, {"weight": torch.zeros(1000)})
        file.write_bytes(file.read_bytes()[:-100])
        load(file)


def test_weights_of_a_wrapped_model(tmp_path):
    openai(weights := Weights(), X, T, **OPENAI)
    wrapped = {f"module.{name}": value for name, value in weights.items()}
    check(
        load_openai(saved(tmp_path, wrapped), **FLAGS)[0],
        lambda w, x, t: openai(w, x, t, **OPENAI),
        weights,
        T,
    )
    with pytest.raises(ValueError, match="must hold a dict of tensors by name"):
        load_openai(saved(tmp_path, {3: torch.zeros(1)}), **FLAGS)


def test_misfits_are_named(tmp_path):
    weights = ho_weights()
    weights["mid.attn_1.q.weight"] = weights["mid.attn_1.q.weight"][:5]
    weights["logvar"] = torch.zeros(1000)
    message = r"unexpected: logvar; misshapen: mid.attn_1.q.weight \(is torch.float32 \(5, 64, 1, 1\)"
    with pytest.raises(ValueError, match=message):
        load_ho(saved(tmp_path, dict(weights)))
    assert isinstance(load_ho(saved(tmp_path, dict(ho_weights())))[1], Schedule)
