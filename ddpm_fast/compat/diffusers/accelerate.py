"""`accelerate`: a diffusers pipeline that is already built, made faster."""

from __future__ import annotations

from typing import Any

import diffusers
from torch import nn

from ...fusion import fuse
from .pipelines import OUR_SCHEDULERS, DDIMPipeline, DDPMPipeline, our_scheduler

OUR_PIPELINES = {diffusers.DDPMPipeline: DDPMPipeline, diffusers.DDIMPipeline: DDIMPipeline}


def accelerate(pipe: Any, *, strict: bool | None = None) -> Any:
    """A pipeline of diffusers made faster, with the same parts and the same pictures.

    A ``DDPMPipeline`` or ``DDIMPipeline`` becomes ours, around the same U-Net. Any other pipeline stays the
    one that it is: its scheduler becomes ours, and the norms of its U-Net are fused in place (`unfuse` undoes
    it). One of ours is returned.

    Args:
        pipe: a diffusers ``DDPMPipeline`` or ``DDIMPipeline``, or another pipeline whose scheduler is a
            DDPMScheduler, DDIMScheduler or DPMSolverMultistepScheduler.
        strict: of our scheduler: False corrects what diffusers computes against its own formulas. None leaves
            it as it is.

    Raises:
        TypeError: another object, or another scheduler; ``strict`` where the scheduler stays diffusers' own.
    """
    ours = tuple(OUR_SCHEDULERS.values())
    is_ours = isinstance(pipe, tuple(OUR_PIPELINES.values()))
    if not isinstance(pipe, diffusers.DiffusionPipeline):
        raise TypeError(f"pipe must be a diffusers pipeline, got {type(pipe).__name__}")
    scheduler = our_scheduler(getattr(pipe, "scheduler", None))
    whole = is_ours or type(pipe) in OUR_PIPELINES
    if not isinstance(scheduler, ours) and (strict is not None or not whole):
        raise TypeError(
            f"the scheduler of {type(pipe).__name__} must be {', '.join(cls.__name__ for cls in ours)}, got "
            f"{type(scheduler).__name__}"
        )
    if strict is not None:
        scheduler.strict = strict

    if type(pipe) in OUR_PIPELINES:
        made = OUR_PIPELINES[type(pipe)](pipe.unet, pipe.scheduler)
        vars(made).update({name: value for name, value in vars(pipe).items() if name not in vars(made)})
        private = {name: value for name, value in pipe.config.items() if name.startswith("_")}
        made.register_to_config(**private)
        pipe = made
    elif not is_ours and isinstance(getattr(pipe, "unet", None), nn.Module):
        fuse(pipe.unet)
    pipe.scheduler = scheduler
    return pipe
