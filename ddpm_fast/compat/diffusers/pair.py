"""An original and what this package makes of it, as two runs on the same start and noise."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import diffusers
import torch
from torch import Tensor, nn

from ... import checkpoint, reference
from ...fusion import fuse
from ...noise import TorchNoise
from ...sampler import Sampler, to_uint8
from ...schedule import Schedule, check_int
from ...unet import UNet
from .accelerate import accelerate

PIPELINES = {"ddpm": diffusers.DDPMPipeline, "ddim": diffusers.DDIMPipeline}
SCHEDULERS = (diffusers.DDPMScheduler, diffusers.DDIMScheduler, diffusers.DPMSolverMultistepScheduler)

Record = Callable[[int, Tensor], None]


class Run(Protocol):
    def __call__(self, num_steps: int, record: Record | None = None) -> Tensor:
        """A whole run, always on the same start and noise: uint8 ``(B, ...)`` on the CPU.

        ``record(t, x)`` is called after each step with the time it began at and the state it led to.
        """


@dataclass(frozen=True)
class Pair:
    """The same images made in two ways.

    Attributes:
        original, ours: how they are made.
        names: of both, for people to read.
        dtypes: that both run the model in.
        model: what both run, or a copy of it.
        method: the sampler.
        most_steps: of a run, that the sampler can lay out.
    """

    original: Run
    ours: Run
    names: tuple[str, str]
    dtypes: tuple[torch.dtype, torch.dtype]
    model: nn.Module
    method: str
    most_steps: int


def load(folder: Path, device: torch.device | str | None) -> Any:
    """What a folder holds: a diffusers pipeline, or our checkpoint as ``(model, schedule, settings)``."""
    # diffusers also reads pipelines without subfolders, such as the google/ddpm-* ones.
    unet, scheduler = (part if (part := folder / name).is_dir() else folder for name in ("unet", "scheduler"))
    is_theirs = (unet / "config.json").is_file()
    if not is_theirs or diffusers.UNet2DModel.load_config(unet).get("_class_name") != "UNet2DModel":
        model, schedule, settings = checkpoint.load(folder)  # or its word on what the folder lacks
        return model.to(device), schedule, settings

    is_pipeline = (folder / "model_index.json").is_file()
    if is_pipeline or (scheduler / "scheduler_config.json").is_file():
        name = diffusers.DDPMScheduler.load_config(scheduler).get("_class_name")
        steps = _choose(scheduler, name, SCHEDULERS).from_pretrained(scheduler)
    else:
        steps = diffusers.DDPMScheduler()
    kind = PIPELINES["ddim" if isinstance(steps, diffusers.DDIMScheduler) else "ddpm"]
    if is_pipeline:
        name = diffusers.DiffusionPipeline.load_config(folder).get("_class_name")
        kind = _choose(folder, name, PIPELINES.values())
    try:
        model, loading = diffusers.UNet2DModel.from_pretrained(
            unet, low_cpu_mem_usage=False, output_loading_info=True
        )
    except Exception as error:  # of diffusers, safetensors, pickle or torch, by what is wrong with the file
        raise OSError(f"{unet}: diffusers cannot read the model: {error}") from error
    if lacking := loading["missing_keys"]:  # which diffusers leaves random
        raise ValueError(f"{unet}: the weights lack {', '.join(lacking[:10])}")
    return kind(model.to(device), steps)


def _choose(folder: Path, name: Any, classes: Iterable[type]) -> type:
    allowed = {kind.__name__: kind for kind in classes}
    if name not in allowed:
        raise ValueError(f"{folder}: _class_name is {name!r}, allowed: {[*allowed]}")
    return allowed[name]


def pair_of(
    source: Any,
    shape: Sequence[int] | None,
    method: str | None,
    batch_size: int,
    eta: float,
    seed: int,
    dtype: torch.dtype | None,
) -> Pair:
    """The two ways to run what `verify` was given."""
    run = {"batch_size": batch_size, "eta": eta, "seed": seed, "dtype": dtype}
    if isinstance(getattr(source, "_orig_mod", source), diffusers.UNet2DModel):  # compiled or not
        source = diffusers.DDPMPipeline(source, diffusers.DDPMScheduler())
    if isinstance(source, tuple(PIPELINES.values())):
        if shape is not None:
            raise ValueError("shape is for a module; a pipeline's is its U-Net's")
        return _pipelines(source, method, **run)
    if isinstance(source, tuple):
        model, schedule, settings = source
        own = settings.get("method", "ddpm")
        if method not in (None, own):
            raise ValueError(f"method={method!r} is not the checkpoint's, which is {own!r}")
        return _samplers(model, schedule, settings, shape, **run)
    if isinstance(source, nn.Module) and not isinstance(source, diffusers.ModelMixin):
        return _samplers(source, Schedule.linear(), {"method": method or "ddpm"}, shape, **run)
    raise TypeError(
        "pipe_or_model must be a DDPMPipeline, a DDIMPipeline, a UNet2DModel, a folder or a module "
        f"model(x, t) -> out, got {type(source).__name__}"
    )


def _pipelines(
    pipe: Any, method: str | None, batch_size: int, eta: float, seed: int, dtype: torch.dtype | None
) -> Pair:
    """A diffusers pipeline, and ours around it."""
    theirs = _theirs(pipe, method)
    made = _ours(pipe) if _is_ours(pipe) and method is None else accelerate(theirs)
    is_ddim = isinstance(theirs, diffusers.DDIMPipeline)
    if eta and not is_ddim:
        raise ValueError(f"eta={eta} is an option of ddim; this is a {type(theirs).__name__}")
    options = {"eta": eta} if is_ddim else {}

    def call(pipe: Any, num_steps: int, **more: Any) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        images = pipe(
            batch_size, generator, num_inference_steps=num_steps, output_type="pt", **options, **more
        ).images
        return images.float().mul(255).round().to(torch.uint8).cpu()  # as diffusers' PIL images

    def original(num_steps: int, record: Record | None = None) -> Tensor:
        with _recording(theirs.scheduler, record):
            return call(theirs, num_steps)

    def ours(num_steps: int, record: Record | None = None) -> Tensor:
        def tell(_: Any, i: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            record(int(t), tensors["latents"])
            return {}

        callback = None if record is None else tell
        return call(made, num_steps, dtype=dtype, callback_on_step_end=callback)

    dtypes = (theirs.unet.dtype, dtype or theirs.unet.dtype)
    return Pair(
        original,
        ours,
        names=(
            f"diffusers {type(theirs).__name__}, {_words(dtypes[0])}, {theirs.device}",
            f"ddpm_fast {type(theirs).__name__}, {_words(dtypes[1])}",
        ),
        dtypes=dtypes,
        model=theirs.unet,
        method=type(theirs.scheduler).__name__,
        most_steps=theirs.scheduler.config.num_train_timesteps,
    )


def _theirs(pipe: Any, method: str | None) -> Any:
    """diffusers' own pipeline around the U-Net of one of theirs or ours, with a scheduler to itself."""
    kind = PIPELINES[method or ("ddim" if isinstance(pipe, diffusers.DDIMPipeline) else "ddpm")]
    scheduler, own = pipe.scheduler, type(pipe.scheduler)
    if method is not None:
        own = {"ddpm": diffusers.DDPMScheduler, "ddim": diffusers.DDIMScheduler}[method]
    elif _is_ours(scheduler):
        own = next(base for base in own.__mro__ if not base.__module__.startswith(__package__))
    scheduler = copy.deepcopy(scheduler) if type(scheduler) is own else own.from_config(scheduler.config)
    theirs = kind(pipe.unet, scheduler)
    theirs.scheduler = scheduler  # a DDIMPipeline makes one from the config
    theirs.set_progress_bar_config(disable=True)
    return theirs


def _ours(pipe: Any) -> Any:
    """One of our pipelines, with a scheduler to itself."""
    made = copy.copy(pipe)
    made.scheduler = copy.deepcopy(pipe.scheduler)
    made.set_progress_bar_config(disable=True)
    return made


def _is_ours(part: Any) -> bool:
    return type(part).__module__.startswith(__package__)


@contextmanager
def _recording(scheduler: Any, record: Record | None) -> Iterator[None]:
    """Call ``record`` with the time and the result of each of the scheduler's steps."""
    if record is None:
        yield
        return
    step = scheduler.step

    def recorded(model_output: Tensor, timestep: Tensor, *args: Any, **kwargs: Any) -> Any:
        result = step(model_output, timestep, *args, **kwargs)
        record(int(timestep), result.prev_sample)
        return result

    scheduler.step = recorded
    try:
        yield
    finally:
        del scheduler.step


def _samplers(
    model: nn.Module,
    schedule: Schedule,
    settings: Mapping[str, Any],
    shape: Sequence[int] | None,
    batch_size: int,
    eta: float,
    seed: int,
    dtype: torch.dtype | None,
) -> Pair:
    """A model in the naive loop, and in `Sampler`, its GroupNorm and SiLU fused."""
    shape = getattr(model, "sample_shape", None) if shape is None else shape
    if shape is None:
        raise ValueError("shape must be given, as (C, H, W): the model has no sample_shape to take it from")
    if not isinstance(shape, Sequence):
        raise TypeError(f"shape must be a sequence without the batch, as (C, H, W), got {shape!r}")
    shape = (batch_size, *(check_int(f"shape[{k}]", size, 1) for k, size in enumerate(shape)))
    settings = {**settings, "dtype": dtype} | ({"eta": eta} if eta else {})
    parameter = next(model.parameters(), torch.empty(0))
    ours_is, fused = "Sampler", model
    if not isinstance(model, UNet):  # whose kernels are fused as they are written
        fused = copy.deepcopy(model)
        fusion = fuse(fused)
        ours_is += f" with {len(fusion.fused)} of {len(fusion.fused) + len(fusion.left)} GroupNorms fused"

    def draws() -> TorchNoise:
        return TorchNoise(torch.Generator().manual_seed(seed), torch.float32)

    @lru_cache
    def sampler(num_steps: int) -> Sampler:
        return Sampler(fused, schedule, **settings | {"num_steps": num_steps})

    def original(num_steps: int, record: Record | None = None) -> Tensor:
        table, clip, noise = sampler(num_steps).table, sampler(num_steps).clip, draws()
        rows = table.tensor(parameter.device)
        x, x0 = noise.x_T(shape, parameter.device), None
        for i, t in enumerate(table.timesteps_tensor(parameter.device)):
            out = model(x.to(parameter.dtype), t.expand(batch_size))
            if not isinstance(out, Tensor):
                raise TypeError(f"model(x, t) must return a Tensor, got {type(out).__name__}: wrap it")
            x, x0 = reference.posterior_step(
                x,
                out,
                rows,
                torch.tensor(i, device=x.device),
                noise=noise.draw(x) if table.draws[i] else None,
                x0_prev=x0,
                clip=clip,
            )
            if record is not None:
                record(int(t), x)
        return to_uint8(x).cpu()

    def ours(num_steps: int, record: Record | None = None) -> Tensor:
        callback = None if record is None else lambda i, t, x, x0: record(t, x)
        x = sampler(num_steps)(batch_size, shape=shape[1:], noise=draws(), callback=callback)
        return to_uint8(x).cpu()

    dtypes = (parameter.dtype, dtype or parameter.dtype)
    method = settings.get("method", "ddpm")
    return Pair(
        original,
        ours,
        names=(
            f"{type(model).__name__} in the naive loop, {_words(dtypes[0])}, {parameter.device}",
            f"ddpm_fast {ours_is}, {_words(dtypes[1])}",
        ),
        dtypes=dtypes,
        model=model,
        method=method,
        most_steps=len(schedule) - (method == "dpm_solver"),  # whose spacings lay out one point more
    )


def _words(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
