"""Interpolation of images in the latent space of a diffusion."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import ops, steps
from ..engine import Model
from ..guidance import as_labels
from ..noise import CounterNoise
from ..sampler import Progress, Sampler
from ..schedule import Schedule, check_int, check_number
from .reader import check_device, check_schedule, told


def interpolate(
    model: Model,
    schedule: Schedule,
    a: Tensor,
    b: Tensor,
    t: int,
    lambdas: Sequence[float],
    *,
    same_noise: bool = True,
    prediction: str = "epsilon",
    variance: str = "fixed_small",
    clip: float | None = 1.0,
    method: str = "ddpm",
    num_steps: int | None = None,
    seed: int = 0,
    first_image: int = 0,
    class_labels: Tensor | None = None,
    progress: bool | Progress = False,
) -> Tensor:
    """Noise two images to time t, mix them, ``(1 - lambda) a_t + lambda b_t``, and sample on (section 4.4).

    Args:
        a, b: (B, ...) floating, alike, where the model is: the ends of B interpolations.
        t: in [0, T): at T - 1 little is left of either, at 0 they are cross-faded.
        lambdas: L numbers; 0 gives back a, to what the noise at t has blotted out, and 1 b.
        same_noise: both ends get the same noise, so that a mix is as noisy as the model expects it to be. At
            T - 1 all are then nearly the same image. False: each its own, as in Ho's code and in
            denoising-diffusion-pytorch; half-way the noise has then half the variance.
        method, num_steps: of the way back, see `Sampler`; None: all the t + 1 steps; else as many of them,
            spaced as in `steps.trailing`.
        seed, first_image: pair k is image ``first_image + k`` of this seed. The noise, that of the steps too,
            is the same for all lambdas.
        model, schedule, prediction, variance, clip, class_labels, progress: see `Sampler`; one label a pair.

    Returns:
        float32 (B, L, ...).

    Raises:
        TypeError, ValueError: an argument of a wrong kind, shape or range, before any work.
    """
    check_schedule(schedule)
    for name, images in (("a", a), ("b", b)):
        if not isinstance(images, Tensor) or not images.is_floating_point() or images.dim() < 2:
            raise TypeError(
                f"{name} must be a floating Tensor of at least two dimensions, got {told(images)}"
            )
    if a.shape != b.shape or a.device != b.device or not len(a):
        raise ValueError(f"a and b must be alike and not empty, got {told(a)} and {told(b)}")
    check_device("a", a, model)
    t = check_int("t", t, 0, schedule.T - 1)
    weights = [check_number(f"lambdas[{k}]", w, math.isfinite, "finite") for k, w in enumerate(lambdas)]
    if not weights:
        raise ValueError("lambdas must hold at least one number, got none")
    num_steps = t + 1 if num_steps is None else check_int("num_steps", num_steps, 1, t + 1)
    sampler = Sampler(
        model,
        schedule,
        method=method,
        spacing=steps.trailing(t + 1, num_steps),
        prediction=prediction,
        variance=variance,
        clip=clip,
    )
    labels = as_labels(sampler.model, class_labels, len(a), a.device)
    seed = ops.as_seed(seed, len(a), a.device)
    image = ops.as_image_index(first_image, len(a), a.device)

    def noised(images: Tensor, draw: int) -> Tensor:
        noise = ops.counter_normal(images.shape, seed, image, draw, stream="x_T")
        return ops.q_sample(images.float(), noise, t, schedule)[:, None]

    weight = torch.tensor(weights, device=a.device).reshape(1, -1, *[1] * (a.dim() - 1))
    mixed = (1 - weight) * noised(a, 0) + weight * noised(b, 0 if same_noise else 1)
    count = len(weights)
    labels = None if labels is None else labels.repeat_interleave(count, 0)
    noise = CounterNoise(seed, image.repeat_interleave(count))
    x = sampler(x_T=mixed.flatten(0, 1), noise=noise, class_labels=labels, progress=progress)
    return x.unflatten(0, (len(a), count))
