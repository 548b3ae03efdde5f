"""From files to a U-Net, its schedule and the sampler settings it was published with, and back to files.

Two layouts are read and written: diffusers' (read from live objects too) and our own, a folder with

    config.json        {"format": "ddpm_fast", "version": 1, "unet": {...}, "settings": {...}}
    model.safetensors  the weights, and float64 "schedule.betas" and "schedule.alphas_cumprod"
"""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import files
from .schedule import Schedule
from .unet import UNet, UNetConfig

__all__ = ["DIGITS", "load", "load_diffusers", "save", "save_diffusers", "share_diffusers"]

DIGITS = Path(__file__).parent / "weights" / "digits"
"""The checkpoint that comes with the package: `load(DIGITS)`."""

_FORMAT, _VERSION = "ddpm_fast", 1
_DIFFUSERS = "0.42.0"  # whose configs `save_diffusers` writes
_ARRAYS = ("betas", "alphas_cumprod")
_Layout = Callable[[UNet], dict[str, Tensor]]


# Our own format


def save(
    folder: str | os.PathLike[str],
    model: UNet,
    schedule: Schedule,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint that `load` gives back bit for bit.

    It is written beside ``folder`` and renamed into place: nothing is ever half written. An existing
    checkpoint is replaced whole, with every other file in its folder.

    Args:
        folder: to be created, with its parents.
        model: in any dtype, layout and device; the layout is not recorded.
        schedule: the noise schedule it was trained with.
        settings: keyword arguments for the sampler; values that JSON can hold.

    Raises:
        TypeError: not a UNet (not a compiled one either: pass what was compiled), or settings not for JSON.
        FileExistsError: ``folder`` is a file, or a folder with something other than a checkpoint in it.
    """
    _check_model(model)
    folder = Path(folder).resolve()
    if folder.exists() and not (folder.is_dir() and (_is_ours(folder) or not any(folder.iterdir()))):
        raise FileExistsError(f"{folder} exists and is not a ddpm_fast checkpoint: not replaced")
    with files.written_whole(folder) as new:
        write(new, model, schedule, settings)


def write(folder: Path, model: UNet, schedule: Schedule, settings: Mapping[str, Any] | None = None) -> None:
    """The files of `save`, in a folder that is there; within `written_whole`, with others beside them."""
    config = {
        "format": _FORMAT,
        "version": _VERSION,
        "unet": model.config.to_dict(),
        "settings": dict(settings or {}),
    }
    tensors = {f"schedule.{name}": torch.tensor(getattr(schedule, name)) for name in _ARRAYS}
    files.write_json(folder / "config.json", config)
    write_tensors(folder / "model.safetensors", model.state_dict() | tensors)


def load(folder: str | os.PathLike[str]) -> tuple[UNet, Schedule, dict[str, Any]]:
    """Read a checkpoint folder: one that `save` wrote, or else diffusers' (see `load_diffusers`).

    Returns:
        The U-Net in its stored dtype, on the CPU, in eval mode; its schedule; the sampler settings, for
        ``Sampler(model, schedule, **settings)``.

    Raises:
        NotADirectoryError, FileNotFoundError: no such folder, or a file is missing in it.
        ValueError: a file that is damaged or of a newer version, or weights that do not fit the config.
    """
    folder = _directory(folder)
    if not _is_ours(folder):
        return load_diffusers(folder)
    file = folder / "config.json"
    config = _read_json(file)
    if config.get("version") != _VERSION:
        raise ValueError(f"{file}: version is {config.get('version')!r}, this ddpm_fast reads {_VERSION}")
    for name in ("unet", "settings"):
        if not isinstance(config.get(name), dict):
            raise ValueError(f"{file}: {name} must be an object, got {config.get(name)!r}")
    file = folder / "model.safetensors"
    tensors = _read_tensors(file)
    if lacking := {f"schedule.{name}" for name in _ARRAYS} - tensors.keys():
        raise ValueError(f"{file} lacks {sorted(lacking)}")
    schedule = Schedule(*(tensors.pop(f"schedule.{name}").numpy() for name in _ARRAYS))
    model = _build(UNetConfig.from_dict(config["unet"]), tensors, UNet.state_dict, file)
    return model, schedule, config["settings"]


def of_model(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of a checkpoint's settings those that belong to the model, whatever is done with it."""
    return {name: settings[name] for name in ("prediction", "clip", "variance") if name in settings}


# diffusers


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
        origin = _directory(source)
        # diffusers also reads pipelines without subfolders, such as the google/ddpm-* ones.
        folder, scheduler_folder = (
            part if (part := origin / name).is_dir() else origin for name in ("unet", "scheduler")
        )
        file = folder / "config.json"
        if not file.is_file():
            raise FileNotFoundError(f"{origin} holds no model: it has no config.json and no unet/config.json")
        config = _read_json(file)
        if config.get("_class_name") != "UNet2DModel":
            raise ValueError(
                f"{file} is neither of a ddpm_fast checkpoint nor of a diffusers UNet2DModel: "
                f"_class_name is {config.get('_class_name')!r}"
            )
        tensors = _read_weights(folder)
        file = scheduler_folder / "scheduler_config.json"
        if file.is_file():
            scheduler = _read_json(file)
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
    return _build(_convert_unet(config), tensors, _diffusers_views, origin), schedule, settings


def share_diffusers(unet: Any) -> tuple[UNet, list[tuple[Tensor, Tensor]]]:
    """A live diffusers ``UNet2DModel`` as ours, on the memory of its own weights, in eval mode.

    A change of its weights in place is there at once. What cannot be shared (the q, k and v that are one
    tensor here) is copied, and is told, so that it can be copied again.

    Returns:
        The U-Net, and the pairs ``(ours, theirs)`` of what was copied.

    Raises:
        ValueError: as `load_diffusers`.
    """
    tensors = unet.state_dict()
    with torch.device("meta"):
        model = UNet(_convert_unet(unet.config))
    _check_fit(_diffusers_views(model), tensors, type(unet).__name__)
    dtype = reduce(torch.promote_types, {value.dtype for value in tensors.values()})
    model = model.to(dtype).to_empty(device=next(iter(tensors.values())).device).eval()
    whole = {(parameter.data_ptr(), parameter.shape): parameter for parameter in model.parameters()}
    copies = []
    for name, view in _diffusers_views(model).items():
        parameter = whole.get((view.data_ptr(), view.shape))
        if parameter is None or parameter.dtype != tensors[name].dtype:
            view.copy_(tensors[name])
            copies.append((view, tensors[name]))
        else:
            parameter.data = tensors[name]
    return model, copies


_OLD_ATTENTION = re.compile(r"(?<=\.)(query|key|value|proj_attn)(?=\.(weight|bias)$)")


def _modern(match: re.Match[str]) -> str:
    return {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}[match[0]]


def _diffusers_views(model: UNet) -> dict[str, Tensor]:
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
    "add_attention": True,
}
_UNET_FIXED = {  # all that is converted, the default first
    "_class_name": ("UNet2DModel",),
    "time_embedding_type": ("positional",),
    "mid_block_type": ("UNetMidBlock2D",),
    "downsample_type": ("conv",),
    "upsample_type": ("conv",),
    "act_fn": ("silu", "swish"),
    "class_embed_type": (None,),
}


def _convert_unet(config: Mapping[str, Any]) -> UNetConfig:
    config = _complete(config, _UNET_DEFAULTS | _UNET_LAYOUT, _UNET_FIXED)

    def attention(field: str, plain: str) -> tuple[bool, ...]:
        kinds = {plain: False, f"Attn{plain}": True}
        names = [name.removeprefix("UNetRes") for name in config[field]]  # as configs of 2022 wrote them
        if unknown := [name for name in names if name not in kinds]:
            raise ValueError(f"UNet2DModel: {field} has {unknown}, allowed: {[*kinds]}")
        return tuple(kinds[name] for name in names)

    return UNetConfig(
        **{field: config[field] for field in _UNET_DEFAULTS},
        down_attention=attention("down_block_types", "DownBlock2D"),
        up_attention=attention("up_block_types", "UpBlock2D"),
        mid_attention=config["add_attention"],
    )


def save_diffusers(
    folder: str | os.PathLike[str],
    model: UNet,
    schedule: Schedule,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Write a folder that ``diffusers.DDPMPipeline.from_pretrained`` loads; the inverse of `load_diffusers`.

    diffusers is not needed. The betas are written one by one, whatever they were made by; diffusers rounds
    them to float32. Of the settings those of a `DDPMScheduler` are written: prediction, clip, variance,
    spacing and steps_offset; another method's scheduler is made of them by its ``from_config``.

    Args:
        folder: to be created, with its parents. An existing pipeline's folder is replaced whole.
        model, schedule, settings: as in `save`.

    Raises:
        TypeError: not a UNet.
        ValueError: a setting that diffusers has no word for.
        FileExistsError: ``folder`` is a file, or a folder with something other than a pipeline in it.
    """
    _check_model(model)
    folder = Path(folder).resolve()
    ours = (folder / "model_index.json").is_file()
    if folder.exists() and not (folder.is_dir() and (ours or not any(folder.iterdir()))):
        raise FileExistsError(f"{folder} exists and is not a diffusers pipeline: not replaced")
    index = {
        "_class_name": "DDPMPipeline",
        "_diffusers_version": _DIFFUSERS,
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }
    scheduler = _scheduler_of(schedule, dict(settings or {}))
    with files.written_whole(folder) as new:
        (new / "unet").mkdir()
        (new / "scheduler").mkdir()
        files.write_json(new / "model_index.json", index)
        files.write_json(new / "unet" / "config.json", _unet_of(model.config))
        write_tensors(new / "unet" / "diffusion_pytorch_model.safetensors", _diffusers_views(model))
        files.write_json(new / "scheduler" / "scheduler_config.json", scheduler)


def _unet_of(config: UNetConfig) -> dict[str, Any]:
    """Inverse of `_convert_unet`."""
    fields = config.to_dict()

    def kinds(field: str, plain: str) -> list[str]:
        return [f"Attn{plain}" if attends else plain for attends in fields[field]]

    return {
        **{field: allowed[0] for field, allowed in _UNET_FIXED.items()},
        "_diffusers_version": _DIFFUSERS,
        **{field: fields[field] for field in _UNET_DEFAULTS},
        "down_block_types": kinds("down_attention", "DownBlock2D"),
        "up_block_types": kinds("up_attention", "UpBlock2D"),
        "add_attention": config.mid_attention,
    }


def _scheduler_of(schedule: Schedule, settings: dict[str, Any]) -> dict[str, Any]:
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
        "_diffusers_version": _DIFFUSERS,
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


# Files and weights


def _build(config: UNetConfig, tensors: dict[str, Tensor], layout: _Layout, origin: Any) -> UNet:
    """A U-Net in the tensors' dtype, on their device; ``layout`` names its parameters as the tensors do."""
    with torch.device("meta"):  # no memory and no random numbers for weights that are overwritten
        model = UNet(config)
    _check_fit(layout(model), tensors, origin)
    dtype = reduce(torch.promote_types, {value.dtype for value in tensors.values()})
    model = model.to(dtype).to_empty(device=next(iter(tensors.values())).device)
    for name, parameter in layout(model).items():
        parameter.copy_(tensors[name])
    return model.eval()


def _check_fit(expected: Mapping[str, Tensor], given: Mapping[str, Tensor], origin: Any) -> None:
    """ValueError naming what is missing, unexpected, of another shape, or not floating."""

    def named(items: Iterable[str]) -> str:
        items = sorted(items)
        return ", ".join(items[:10]) + (f" and {len(items) - 10} more" if len(items) > 10 else "")

    def differing() -> Iterator[str]:
        for name in expected.keys() & given.keys():
            (shape, dtype), wanted = (given[name].shape, given[name].dtype), expected[name].shape
            if shape != wanted or not dtype.is_floating_point:
                yield f"{name} (is {dtype} {tuple(shape)}, must be floating {tuple(wanted)})"

    faults = {
        "missing": expected.keys() - given.keys(),
        "unexpected": given.keys() - expected.keys(),
        "misshapen": [*differing()],
    }
    if any(faults.values()):
        told = "; ".join(f"{kind}: {named(names)}" for kind, names in faults.items() if names)
        raise ValueError(f"{origin}: the weights do not fit the config. {told}")


def _check_model(model: Any) -> None:
    if not isinstance(model, UNet):
        raise TypeError(f"model must be a ddpm_fast UNet, got {type(model).__name__}")


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """As safetensors, with the permissions of any other file. Raises OSError where there is no room."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    try:
        save_file(tensors, file)
    except SafetensorError as error:
        raise OSError(f"{file} cannot be written: {error}") from error
    files.as_any_other(file)


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of diffusers' weight files in ``folder``, safetensors before pickles."""
    for suffix in ("safetensors", "bin"):
        file = folder / f"diffusion_pytorch_model.{suffix}"
        index = folder / f"{file.name}.index.json"
        if file.is_file():
            return _read_tensors(file)
        if index.is_file():
            shards = sorted(set(_read_json(index)["weight_map"].values()))
            return {name: value for shard in shards for name, value in _read_tensors(folder / shard).items()}
    raise FileNotFoundError(f"{folder} has no diffusion_pytorch_model.safetensors or .bin")


def _read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of one file, on the CPU. ValueError if it is damaged, or a pickle that would run code."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} is refused: it holds more than tensors and would need weights_only=False, which runs "
            f"code from the file. If you trust it, convert it to safetensors."
        ) from error
    except (SafetensorError, RuntimeError, EOFError, struct.error, LookupError, ValueError) as error:
        raise ValueError(f"{file} is truncated or damaged: {error}") from error
    if not (isinstance(tensors, dict) and all(isinstance(value, Tensor) for value in tensors.values())):
        raise ValueError(f"{file} must hold a dict of tensors by name and nothing else")
    return tensors


def _is_ours(folder: Path) -> bool:
    file = folder / "config.json"
    return file.is_file() and _read_json(file).get("format") == _FORMAT


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # neither JSON nor UTF-8
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(content).__name__}")
    return content


def _directory(folder: str | os.PathLike[str]) -> Path:
    folder = Path(folder)
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is not a folder (a model on a hub must be downloaded first)")
    return folder
