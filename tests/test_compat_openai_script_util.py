"""script_util: published models in names and shapes, as the originals build them; diffusions; options."""

import argparse
import hashlib

import numpy as np
import pytest
import torch

from ddpm_fast.checkpoint import openai
from ddpm_fast.compat.guided_diffusion import script_util as guided
from ddpm_fast.compat.improved_diffusion import script_util as improved
from ddpm_fast.unet import UNet

BEST = {"class_cond": True, "learn_sigma": True, "attention_resolutions": "32,16,8"}
BEST |= {"resblock_updown": True, "use_scale_shift_norm": True, "use_fp16": True, "num_res_blocks": 2}
WIDE = BEST | {"num_channels": 256, "num_head_channels": 64}
SIGMA = {"learn_sigma": True, "num_res_blocks": 3}
# As the READMEs publish them, with: tensors, numbers, and the first digits of the sha256 of the sorted lines
# "name shape", all taken from the original classes.
MODELS = {
    (guided, "64"): (
        BEST
        | {"image_size": 64, "num_channels": 192, "num_res_blocks": 3, "num_head_channels": 64}
        | {"use_new_attention_order": True, "dropout": 0.1, "noise_schedule": "cosine"},
        (541, 295904454, "b879ba9ed4fe94bb"),
    ),
    (guided, "128"): (
        BEST | {"image_size": 128, "num_channels": 256, "num_heads": 4},
        (493, 421529606, "d91b9be2449a697e"),
    ),
    (guided, "256"): (WIDE | {"image_size": 256}, (567, 553838086, "408c4d65687d2b6d")),
    (guided, "256-uncond-and-lsun"): (
        WIDE | {"image_size": 256, "class_cond": False},
        (566, 552814086, "b9c90be1570d1541"),
    ),
    (guided, "512"): (
        WIDE | {"image_size": 512, "use_fp16": False},
        (645, 558997638, "f95458c996170da9"),
    ),
    (improved, "imagenet64"): (SIGMA | {"image_size": 64}, (450, 121063942, "5a42ef114f79713a")),
    (improved, "cifar10"): (
        SIGMA | {"image_size": 32, "dropout": 0.3},
        (446, 52546438, "001b621871f3fa9d"),
    ),
    (improved, "imagenet64-cond"): (
        SIGMA | {"image_size": 64, "num_channels": 192, "class_cond": True},
        (451, 273049350, "59179ffdc09597c8"),
    ),
    (improved, "lsun"): (
        {"image_size": 256, "num_heads": 1, "learn_sigma": True}
        | {"use_scale_shift_norm": False, "attention_resolutions": "16"},
        (426, 113676678, "0313288a27e5d1d5"),
    ),
}
UPSAMPLERS = {
    (guided, "64-to-256"): (BEST | {"num_channels": 192}, (567, 311795910, "99d9c28e89d75934")),
    (guided, "128-to-512"): (
        BEST
        | {"large_size": 512, "small_size": 128, "num_channels": 192, "num_head_channels": 64}
        | {"attention_resolutions": "32,16"},
        (537, 308835270, "2424e4b817a8f3a3"),
    ),
    (improved, "64-to-256"): (
        {"num_channels": 192, "learn_sigma": True, "class_cond": True},
        (457, 279792390, "dcd196aa34ef2321"),
    ),
}
CLASSIFIERS = {
    (64, 4): (307, 65438568, "1f101795c34a2e14"),
    (128, 2): (221, 42568040, "d574aa664c511e87"),
    (256, 2): (249, 54096360, "80623bcac5ce31ac"),
    (512, 2): (281, 54448360, "14a2ce08b1e153d1"),
}


def digest(tensors) -> tuple[int, int, str]:
    lines = sorted(f"{name} {tuple(value.shape)}" for name, value in tensors.items())
    numbers = sum(value.numel() for value in tensors.values())
    return len(lines), numbers, hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def named(cases):
    return pytest.mark.parametrize(
        ("scripts", "name"), cases, ids=[f"{s.__name__.split('.')[2]}-{name}" for s, name in cases]
    )


@named(MODELS)
def test_published_models(scripts, name):
    flags, expected = MODELS[scripts, name]
    flags = scripts.model_and_diffusion_defaults() | flags
    with torch.device("meta"):
        model, _ = scripts.create_model_and_diffusion(**flags)
        assert digest(model.state_dict()) == expected
        ours = UNet(openai._config(openai._FLAGS | flags))  # what checkpoint.load_openai fills
        assert digest(openai._views(ours)) == expected


@named(UPSAMPLERS)
def test_published_upsamplers(scripts, name):
    flags, expected = UPSAMPLERS[scripts, name]
    with torch.device("meta"):
        model, _ = scripts.sr_create_model_and_diffusion(**scripts.sr_model_and_diffusion_defaults() | flags)
    assert digest(model.state_dict()) == expected


@pytest.mark.parametrize(("size", "depth"), CLASSIFIERS)
def test_published_classifiers(size, depth):
    flags = guided.classifier_and_diffusion_defaults() | {"image_size": size, "classifier_depth": depth}
    with torch.device("meta"):
        model, _ = guided.create_classifier_and_diffusion(**flags)
    assert digest(model.state_dict()) == CLASSIFIERS[size, depth]


@pytest.mark.parametrize("scripts", [guided, improved])
@pytest.mark.parametrize(
    ("flags", "mean", "variance", "loss"),
    [
        ({}, "EPSILON", "FIXED_LARGE", "MSE"),
        ({"learn_sigma": True, "predict_xstart": True}, "START_X", "LEARNED_RANGE", "MSE"),
        ({"sigma_small": True, "rescale_learned_sigmas": True}, "EPSILON", "FIXED_SMALL", "RESCALED_MSE"),
        ({"use_kl": True, "rescale_learned_sigmas": True}, "EPSILON", "FIXED_LARGE", "RESCALED_KL"),
    ],
)
def test_diffusions(scripts, flags, mean, variance, loss):
    diffusion = scripts.create_gaussian_diffusion(
        steps=4000, noise_schedule="linear", timestep_respacing="10,20", rescale_timesteps=True, **flags
    )
    assert type(diffusion).__name__ == "SpacedDiffusion"
    assert type(diffusion).__module__.split(".")[2] == scripts.__name__.split(".")[2]
    assert diffusion.model_mean_type.name == mean
    assert diffusion.model_var_type.name == variance
    assert diffusion.loss_type.name == loss
    assert diffusion.rescale_timesteps
    assert len(diffusion.betas) == 30
    whole = scripts.create_gaussian_diffusion(steps=4000)
    np.testing.assert_allclose(whole.betas, np.linspace(0.25e-4, 0.005, 4000), rtol=1e-9)


def test_defaults():
    """Where the two differ, images do."""
    ours, theirs = guided.model_and_diffusion_defaults(), improved.model_and_diffusion_defaults()
    differing = {name for name in ours.keys() & theirs.keys() if ours[name] != theirs[name]}
    assert differing == {"rescale_timesteps", "rescale_learned_sigmas"}
    assert ours.keys() - theirs.keys() == {
        "channel_mult",
        "num_head_channels",
        "resblock_updown",
        "use_fp16",
        "use_new_attention_order",
    }
    assert theirs.keys() - ours.keys() == {"sigma_small"}
    for scripts in (guided, improved):
        flags = scripts.sr_model_and_diffusion_defaults()
        assert (flags["large_size"], flags["small_size"]) == (256, 64)
        assert "image_size" not in flags


@pytest.mark.parametrize("package", ["guided_diffusion", "improved_diffusion"])
@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("gaussian_diffusion", "GaussianDiffusion LossType get_named_beta_schedule _extract_into_tensor"),
        ("respace", "SpacedDiffusion space_timesteps"),
        ("resample", "LossAwareSampler UniformSampler create_named_schedule_sampler"),
        ("losses", "normal_kl discretized_gaussian_log_likelihood"),
        ("nn", "mean_flat timestep_embedding update_ema"),
        ("unet", "SuperResModel UNetModel"),
        ("script_util", "NUM_CLASSES create_model_and_diffusion sr_create_model_and_diffusion"),
    ],
)
def test_scripts_import_by_the_modules_names(package, module, names):
    """As a statement: an attribute of the package need not be a module."""
    exec(f"from ddpm_fast.compat.{package}.{module} import {', '.join(names.split())}", {})


def test_channel_mult():
    flags = guided.model_and_diffusion_defaults() | {"image_size": 32, "num_channels": 32}
    model, _ = guided.create_model_and_diffusion(**flags | {"channel_mult": "1,3"})
    assert model.channel_mult == (1, 3)
    with pytest.raises(ValueError, match="size: 32; allowed: 64, 128, 256, 512, or any, where"):
        guided.create_model_and_diffusion(**flags)
    with pytest.raises(ValueError, match=r"unsupported image size: 128; allowed: 32, 64, 256$"):
        improved.create_model_and_diffusion(**improved.model_and_diffusion_defaults() | {"image_size": 128})


def test_options_of_a_script():
    defaults = guided.model_and_diffusion_defaults() | {"model_path": "", "seed": None}
    parser = argparse.ArgumentParser()
    guided.add_dict_to_argparser(parser, defaults)
    args = parser.parse_args(["--class_cond", "yes", "--dropout", "1", "--image_size", "128", "--seed", "7"])
    values = guided.args_to_dict(args, ("class_cond", "dropout", "image_size", "seed", "use_fp16"))
    assert values == {"class_cond": True, "dropout": 1.0, "image_size": 128, "seed": "7", "use_fp16": False}
    for text in ("True", "t", "Y", "1", True):
        assert guided.str2bool(text) is True
    for text in ("no", "FALSE", "f", "n", "0", False):
        assert guided.str2bool(text) is False
    with pytest.raises(argparse.ArgumentTypeError, match="boolean value expected"):
        guided.str2bool("maybe")
