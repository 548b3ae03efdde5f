"""diffusers: its folders and live objects to our U-Net, schedule and settings, and its configs of ours."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..schedule import Schedule
from ..unet import UNet, UNetConfig
from ._weights import build, directory, read_json, read_tensors, share

VERSION = "0.42.0"  # whose configs are written


def load_diffusers(source: Any) -> tuple[UNet, Schedule, dict[str, Any]]:
    """Convert a diffusers ``UNet2DModel`` and its scheduler.

    Args:
        source: a pipeline's folder; a U-Net's folder (``config.json`` and ``diffusion_pytorch_model`` as
            ``.safetensors`` or ``.bin``, in one file or sharded), maybe with a ``scheduler_config.json``;
            a live pipeline (``.unet`` and ``.scheduler``); or a live ``UNet2DModel`` (``.config`` and
            ``.state_dict()``). Without a scheduler, that of Ho et al. 2020 is taken.

    Returns:
        As `load`; a live model's copy is on its device. The schedule holds diffusers' own float32 values,
        so images match. The settings come from the DDPM, DDIM or DPM-Solver++ (multistep) scheduler.

    Raises:
        TypeError: a source of none of these kinds.
        NotADirectoryError, FileNotFoundError: no such folder, or a file is missing in it.
        ValueError: a config value that is not converted, with those that are; weights that do not fit the
            config; a damaged file; a pickle that would have to run code.
    """
    scheduler: Mapping[str, Any] = {"_class_name": "DDPMScheduler"}
    if isinstance(source, (str, os.PathLike)):
        origin = directory(source)
        # diffusers also reads pipelines without subfolders, such as the google/ddpm-* ones.
        folder, scheduler_folder = (
            part if (part := origin / name).is_dir() else origin for name in ("unet", "scheduler")
        )
        file = folder / "config.json"
        if not file.is_file():
            raise FileNotFoundError(f"{origin} holds no model: it has no config.json and no unet/config.json")
        config = read_json(file)
        if config.get("_class_name") != "UNet2DModel":
            raise ValueError(
                f"{file} is neither of a ddpm_fast checkpoint nor of a diffusers UNet2DModel: "
                f"_class_name is {config.get('_class_name')!r}"
            )
        tensors = _read_weights(folder)
        file = scheduler_folder / "scheduler_config.json"
        if file.is_file():
            scheduler = read_json(file)
        elif (origin / "model_index.json").is_file():
            raise FileNotFoundError(f"{origin} is a pipeline, but {file} is missing")
    else:
        unet = getattr(source, "unet", source)
        unet = getattr(unet, "_orig_mod", unet)  # what torch.compile wrapped
        if not (isinstance(getattr(unet, "config", None), Mapping) and hasattr(unet, "state_dict")):
            raise TypeError(
                f"source must be a folder, a diffusers pipeline or a UNet2DModel, got {type(source).__name__}"
            )
        if hasattr(source, "scheduler"):
            scheduler = {**source.scheduler.config, "_class_name": type(source.scheduler).__name__}
        config, tensors, origin = unet.config, unet.state_dict(), type(unet).__name__
    schedule, settings = _convert_scheduler(scheduler)
    tensors = {_OLD_ATTENTION.sub(_modern, name): value for name, value in tensors.items()}
    return build(_convert_unet(config), tensors, diffusers_views, origin), schedule, settings


def share_diffusers(unet: Any) -> tuple[UNet, list[tuple[Tensor, Tensor]]]:
    """A live diffusers ``UNet2DModel`` as ours, on the memory of its own weights, in eval mode.

    A change of its weights in place is there at once. What cannot be shared (the q, k and v that are one
    tensor here) is copied, and is told, so that it can be copied again.

    Returns:
        The U-Net, and the pairs ``(ours, theirs)`` of what was copied.

    Raises:
        ValueError: as `load_diffusers`.
    """
    return share(_convert_unet(unet.config), unet.state_dict(), diffusers_views, type(unet).__name__)


_OLD_ATTENTION = re.compile(r"(?<=\.)(query|key|value|proj_attn)(?=\.(weight|bias)$)")


def _modern(match: re.Match[str]) -> str:
    return {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}[match[0]]


def diffusers_views(model: UNet) -> dict[str, Tensor]:
    """The model's parameters under diffusers' names; the fused q, k and v as three views."""
    views = {}
    for name, value in model.state_dict().items():
        resampler = "downsamplers.0" if name.startswith("down") else "upsamplers.0"
        name = name.replace("resample.", f"{resampler}.").replace(".to_out.", ".to_out.0.")
        if ".to_qkv." in name:
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                views[name.replace("to_qkv", f"to_{letter}")] = part
        else:
            views[name] = value
    return views


# What UNet2DModel.__init__ defaults to (diffusers 0.42), for keys that an older config lacks.
_UNET_DEFAULTS = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "block_out_channels": (224, 448, 672, 896),
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "dropout": 0.0,
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "num_class_embeds": None,
}
_UNET_LAYOUT = {  # what `_convert_unet` makes booleans of
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "downsample_type": "conv",
    "upsample_type": "conv",
    "add_attention": True,
}
_PLAIN_BLOCKS = {  # down and up, by how they change the resolution
    "conv": ("DownBlock2D", "UpBlock2D"),
    "resnet": ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"),
}
_ATTENDING_BLOCKS = ("AttnDownBlock2D", "AttnUpBlock2D")  # which go by downsample_type and upsample_type
_UNET_FIXED = {  # all that is converted, the default first
    "_class_name": ("UNet2DModel",),
    "time_embedding_type": ("positional",),
    "mid_block_type": ("UNetMidBlock2D",),
    "act_fn": ("silu", "swish"),
    "class_embed_type": (None,),
}


def _convert_unet(config: Mapping[str, Any]) -> UNetConfig:
    config = _complete(config, _UNET_DEFAULTS | _UNET_LAYOUT, _UNET_FIXED)
    upsample = _choose(config, "upsample_type", {name: name for name in _PLAIN_BLOCKS})
    plain_blocks = _choose(config, "downsample_type", {upsample: _PLAIN_BLOCKS[upsample]})

    def attention(field: str, plain: str, attending: str) -> tuple[bool, ...]:
        kinds = {plain: False, attending: True}
        names = [name.removeprefix("UNetRes") for name in config[field]]  # as configs of 2022 wrote them
        if unknown := [name for name in names if name not in kinds]:
            raise ValueError(f"UNet2DModel: {field} has {unknown}, allowed: {[*kinds]}")
        return tuple(kinds[name] for name in names)

    return UNetConfig(
        **{field: config[field] for field in _UNET_DEFAULTS},
        down_attention=attention("down_block_types", plain_blocks[0], _ATTENDING_BLOCKS[0]),
        up_attention=attention("up_block_types", plain_blocks[1], _ATTENDING_BLOCKS[1]),
        mid_attention=config["add_attention"],
        resblock_updown=upsample == "resnet",
    )


def unet_config(config: UNetConfig) -> dict[str, Any]:
    """Inverse of `_convert_unet`. Raises ValueError for a field that ``UNet2DModel`` has no word for."""
    fields = config.to_dict()
    for field, default in _UNSPOKEN.items():
        if fields[field] != default:
            raise ValueError(f"diffusers' UNet2DModel has no word for UNetConfig.{field}={fields[field]!r}")
    resample = "resnet" if config.resblock_updown else "conv"

    def kinds(side: str, index: int) -> list[str]:
        names = (_PLAIN_BLOCKS[resample][index], _ATTENDING_BLOCKS[index])
        return [names[attends] for attends in fields[f"{side}_attention"]]

    return {
        **{field: allowed[0] for field, allowed in _UNET_FIXED.items()},
        "_diffusers_version": VERSION,
        **{field: fields[field] for field in _UNET_DEFAULTS},
        "down_block_types": kinds("down", 0),
        "up_block_types": kinds("up", 1),
        "downsample_type": resample,
        "upsample_type": resample,
        "add_attention": config.mid_attention,
    }


_UNSPOKEN = {"num_attention_heads": None, "timestep_input_dim": None, "timestep_scale": 1.0}


def scheduler_config(schedule: Schedule, settings: dict[str, Any]) -> dict[str, Any]:
    """Inverse of `_convert_scheduler`, for DDPM."""
    clip = settings.get("clip", 1.0)
    prediction = settings.get("prediction", "epsilon")
    predictions = {"epsilon": "epsilon", "x0": "sample", "v": "v_prediction"}
    if prediction not in predictions:
        raise ValueError(f"prediction {prediction!r} is not diffusers'; allowed: {', '.join(predictions)}")
    spacing = settings.get("spacing") or "leading"
    if not isinstance(spacing, str):
        raise ValueError(f"spacing: diffusers has no list of timesteps, got {spacing!r}")
    return {
        "_class_name": "DDPMScheduler",
        "_diffusers_version": VERSION,
        "num_train_timesteps": schedule.T,
        "trained_betas": schedule.betas.tolist(),
        "prediction_type": predictions[prediction],
        "variance_type": settings.get("variance") or "fixed_small",
        "clip_sample": clip is not None,
        "clip_sample_range": 1.0 if clip is None else clip,
        "timestep_spacing": spacing,
        "steps_offset": settings.get("steps_offset", 0),
    }


_METHODS = {"DDPMScheduler": "ddpm", "DDIMScheduler": "ddim", "DPMSolverMultistepScheduler": "dpm_solver"}
_SCHEDULER_DEFAULTS = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
    "prediction_type": "epsilon",
    "thresholding": False,
    "sample_max_value": 1.0,
    "steps_offset": 0,
}
_CLIPPED = {"clip_sample": True, "clip_sample_range": 1.0, "timestep_spacing": "leading"}
_METHOD_DEFAULTS = {
    "ddpm": _CLIPPED | {"variance_type": "fixed_small"},
    "ddim": _CLIPPED | {"set_alpha_to_one": True},
    "dpm_solver": {"timestep_spacing": "linspace"},
}
_OLD_PREDICTION = {"predict_epsilon": (True,)}  # what prediction_type was in 2022; False would be "sample"
_DPM_SOLVER_FIXED = {
    "solver_order": (2,),
    "algorithm_type": ("dpmsolver++",),
    "solver_type": ("midpoint",),
    "final_sigmas_type": ("zero",),
    "lambda_min_clipped": (-math.inf,),
    "variance_type": (None,),
    "use_karras_sigmas": (False, None),
    "use_exponential_sigmas": (False, None),
    "use_beta_sigmas": (False, None),
    "use_lu_lambdas": (False, None),
    "use_flow_sigmas": (False, None),
    "use_dynamic_shifting": (False, None),
    # It would set the last alphas_cumprod to 2**-24, above the one before: no schedule.
    "rescale_betas_zero_snr": (False,),
}


def _convert_scheduler(config: Mapping[str, Any]) -> tuple[Schedule, dict[str, Any]]:
    method = _choose({"_class_name": None, **config}, "_class_name", _METHODS)
    fixed = _OLD_PREDICTION | (_DPM_SOLVER_FIXED if method == "dpm_solver" else {})
    config = _complete(config, _SCHEDULER_DEFAULTS | _METHOD_DEFAULTS[method], fixed)
    schedule = _convert_betas(config)
    predictions = {"epsilon": "epsilon", "sample": "x0", "v_prediction": "v"}
    spacings = {name: name for name in ("leading", "linspace", "trailing")}
    settings = {
        "method": method,
        "prediction": _choose(config, "prediction_type", predictions),
        "clip": config["clip_sample_range"] if config.get("clip_sample") else None,
        "spacing": _choose(config, "timestep_spacing", spacings),
    }
    if settings["spacing"] == "leading":  # the other spacings do not read it
        settings["steps_offset"] = config["steps_offset"]
    if config["thresholding"]:  # its quantile is cut to [1, sample_max_value]: with 1 there, it is a clip
        settings["clip"] = _choose(config, "sample_max_value", {1.0: 1.0})
    if method == "ddpm":
        kinds = {"fixed_small": "fixed_small", "fixed_small_log": "fixed_small", "fixed_large": "fixed_large"}
        settings["variance"] = _choose(config, "variance_type", kinds | {"learned_range": "learned_range"})
    if method == "ddim" and not config["set_alpha_to_one"]:
        settings["final_alpha_cumprod"] = float(schedule.alphas_cumprod[0])
    return schedule, settings


def _convert_betas(config: Mapping[str, Any]) -> Schedule:
    """The schedule of diffusers' float32 arrays: every operation below is one of theirs, in their dtype."""
    T, start, end = (config[field] for field in ("num_train_timesteps", "beta_start", "beta_end"))
    builders = {
        "linear": lambda: torch.linspace(start, end, T, dtype=torch.float32),
        "scaled_linear": lambda: torch.linspace(start**0.5, end**0.5, T, dtype=torch.float32) ** 2,
        "squaredcos_cap_v2": lambda: _cosine_betas(T),
        "sigmoid": lambda: (
            torch.sigmoid(torch.linspace(-6, 6, T, dtype=torch.float32)) * (end - start) + start
        ),
    }
    if config["trained_betas"] is not None:
        betas = torch.tensor(config["trained_betas"], dtype=torch.float32)
    else:
        betas = _choose(config, "beta_schedule", builders)()
    if config["rescale_betas_zero_snr"]:
        betas = _rescale_zero_terminal_snr(betas)
    alphas_cumprod = torch.cumprod(1.0 - betas, dim=0)
    return Schedule.from_alphas_cumprod(alphas_cumprod.double().numpy())


def _cosine_betas(T: int) -> Tensor:
    """Nichol & Dhariwal 2021, eq. 17, in Python floats and then float32."""
    alpha_bar = [math.cos((i / T + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(T + 1)]
    betas = [min(1 - alpha_bar[i + 1] / alpha_bar[i], 0.999) for i in range(T)]
    return torch.tensor(betas, dtype=torch.float32)


def _rescale_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Lin et al. 2023, algorithm 1, in float32."""
    root = torch.cumprod(1.0 - betas, dim=0).sqrt()
    first, last = root[0].clone(), root[-1].clone()
    alphas_cumprod = ((root - last) * (first / (first - last))) ** 2
    return 1 - torch.cat([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])


def _complete(
    config: Mapping[str, Any], defaults: Mapping[str, Any], fixed: Mapping[str, tuple[Any, ...]]
) -> dict[str, Any]:
    """``config`` with defaults for what it lacks; a ``fixed`` field must have one of the values listed."""
    complete = {**defaults, **{field: values[0] for field, values in fixed.items()}, **config}
    for field, values in fixed.items():
        _choose(complete, field, {value: value for value in values})
    return complete


def _choose(config: Mapping[str, Any], field: str, allowed: Mapping[Any, Any]) -> Any:
    """``allowed[config[field]]``, or a ValueError that names the field, its value and what is allowed."""
    for value, result in allowed.items():
        if config[field] == value:
            return result
    raise ValueError(
        f"{config['_class_name'] or 'config'}: {field} is {config[field]!r}, allowed: {[*allowed]}"
    )


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of diffusers' weight files in ``folder``, safetensors before pickles."""
    for suffix in ("safetensors", "bin"):
        file = folder / f"diffusion_pytorch_model.{suffix}"
        index = folder / f"{file.name}.index.json"
        if file.is_file():
            return read_tensors(file)
        if index.is_file():
            shards = sorted(set(read_json(index)["weight_map"].values()))
            return {name: value for shard in shards for name, value in read_tensors(folder / shard).items()}
    raise FileNotFoundError(f"{folder} has no diffusion_pytorch_model.safetensors or .bin")
