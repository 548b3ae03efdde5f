"""`Sampler`: a model, a table of steps, a source of noise, and the loop."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import ops, steps
from .noise import CounterNoise, Noise, TorchNoise
from .schedule import Schedule, check_int
from .steps import StepTable

Model = Callable[[Tensor, Tensor], Tensor]
Callback = Callable[[int, int, Tensor, Tensor], None]

METHODS = {"ddpm": steps.ddpm, "ddim": steps.ddim, "dpm_solver": steps.dpm_solver}
FEW_STEPS = {"ddim": 50, "dpm_solver": 20}
"""num_steps where it is not given, and T allows it; ddpm takes all T."""


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] as uint8 in [0, 255], any shape, rounded as diffusers rounds (half to even)."""
    _check_floating("images", images)
    return (images.float() / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)


class Sampler:
    """Draws images (or points, or anything of a fixed shape) from a denoising diffusion model.

    Equivalent to, with the float32 state and the noise kept apart from the model's dtype::

        x = x_T
        for i, t in enumerate(table.timesteps):
            out = model(x, t)
            x, x0 = ops.posterior_step(x, out, table, i, seed=seed, image_index=k, x0_prev=x0, clip=clip)

    Args:
        model: any ``model(x, t) -> out``; x (B, ...) of at least two dimensions, t (B,) int64. ``out`` is
            like x, or has twice its channels where the variance is learned. A module runs in eval mode.
        schedule: what training fixed.
        method: "ddpm" (Ho et al. 2020), "ddim" (Song et al. 2021) or "dpm_solver" (DPM-Solver++(2M), Lu et
            al. 2022).
        num_steps: model calls of a run. None: T for ddpm, at most 50 for ddim, at most 20 for dpm_solver.
        spacing: see `steps.ddpm`; None is the method's own: "linspace" for dpm_solver, else "leading".
        prediction, steps_offset: see `steps.ddpm`.
        variance: "fixed_small" (None), "fixed_large" or "learned_range": part of how a model is published, so
            every method takes it, though only ddpm draws noise by it.
        eta, use_clipped_out, final_alpha_cumprod: of ddim only, see `steps.ddim`.
        order: of dpm_solver only, 2 (None) or 1.
        clip: bound of the absolute value of x0, a number or None.
        dtype: what the model runs in; x stays float32. A module is copied, so a later change of its weights
            does not show here. None: as it is, in the dtype of a module's first parameter if that is a half.

    Attributes:
        table: the `StepTable` of the run.

    Raises:
        TypeError, ValueError: see `steps`; an unknown method, or an option that is another method's.
    """

    def __init__(
        self,
        model: Model,
        schedule: Schedule,
        *,
        method: str = "ddpm",
        num_steps: int | None = None,
        spacing: str | Sequence[int] | None = None,
        prediction: str = "epsilon",
        steps_offset: int = 0,
        variance: str | None = None,
        eta: float = 0.0,
        use_clipped_out: bool = False,
        final_alpha_cumprod: float = 1.0,
        order: int | None = None,
        clip: float | None = 1.0,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not callable(model):
            raise TypeError(f"model must be callable as model(x, t), got {type(model).__name__}")
        if not isinstance(method, str) or method not in METHODS:
            raise ValueError(f"method={method!r} is not known; allowed: {', '.join(METHODS)}")
        if clip is not None and (
            isinstance(clip, bool) or not isinstance(clip, (int, float)) or not clip > 0
        ):
            raise ValueError(f"clip must be None or a positive number, got {clip!r}")
        if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"dtype must be None, float32, bfloat16 or float16, got {dtype}")
        options = {"prediction": prediction, "steps_offset": steps_offset}
        if spacing is not None:
            options["spacing"] = spacing
        for name, value, default, owner in (
            ("variance", variance, None, "ddpm"),
            ("eta", eta, 0.0, "ddim"),
            ("use_clipped_out", use_clipped_out, False, "ddim"),
            ("final_alpha_cumprod", final_alpha_cumprod, 1.0, "ddim"),
            ("order", order, None, "dpm_solver"),
        ):
            if value != default:
                if name == "variance" and value in steps.VARIANCES and owner != method:
                    continue
                if owner != method:
                    raise ValueError(f"{name}={value!r} is an option of method {owner!r}, not of {method!r}")
                options[name] = value
        counted = spacing is None or (isinstance(spacing, str) and spacing in steps.SPACINGS)
        if num_steps is None and counted and isinstance(schedule, Schedule):
            most = len(schedule) - (method == "dpm_solver")  # whose spacings lay out one point more
            num_steps = max(1, min(FEW_STEPS.get(method, most), most))
        self.table: StepTable = METHODS[method](schedule, num_steps, **options)
        self.clip = None if clip is None else float(clip)
        if isinstance(model, nn.Module):
            if dtype is not None:
                model = copy.deepcopy(model).to(dtype)
            elif (parameter := next(model.parameters(), None)) is not None:
                dtype = parameter.dtype if parameter.dtype in (torch.bfloat16, torch.float16) else None
        self.dtype = dtype
        self.model = model

    to_uint8 = staticmethod(to_uint8)

    def __call__(
        self,
        batch_size: int | None = None,
        *,
        shape: Sequence[int] | None = None,
        seed: int = 0,
        first_image: int = 0,
        x_T: Tensor | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        noise: str = "counter",
        progress: bool = False,
        callback: Callback | None = None,
    ) -> Tensor:
        """Run the whole table; returns float32 ``(B, *shape)``, contiguous.

        Args:
            batch_size: images of this run; None: as many as ``x_T`` or the generators have, else 1.
            shape: of one sample, without the batch; default the model's ``sample_shape``.
            seed, first_image: sample b is image ``first_image + b`` of this 64-bit seed: the same whatever
                the batch, or how a run is split into batches.
            x_T: the start, ``(B, *shape)``; default drawn.
            generator: with noise="torch": a generator, or a list of one an image; default one that is seeded
                with ``seed``.
            noise: "counter" (drawn in the kernel, see `ops.counter_normal`) or "torch" (drawn as diffusers'
                pipelines draw; ``first_image`` has no meaning there).
            progress: show a bar on stderr.
            callback: called as ``callback(i, t, x, x0)`` after each step with the step, its time and the live
                tensors; it may change x in place.

        Raises:
            TypeError, ValueError: an argument of a wrong kind, shape or combination, named, before any work;
                a model whose output does not fit.
        """
        run = self._start(batch_size, shape, seed, first_image, x_T, generator, noise, callback is not None)
        with _evaluating(self.model), torch.no_grad():
            for i in tqdm(range(len(self.table)), disable=not progress, desc=self.table.method, unit="step"):
                run.step(i)
                if callback is not None:
                    callback(i, int(self.table.timesteps[i]), run.x, run.x0)
        return run.x

    def trajectory(
        self,
        batch_size: int | None = None,
        *,
        every: int = 1,
        shape: Sequence[int] | None = None,
        seed: int = 0,
        first_image: int = 0,
        x_T: Tensor | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        noise: str = "counter",
    ) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """Yield ``(i, t, x, x0)`` after every ``every``-th step and the last; the tensors are copies.

        The other arguments are those of a call.

        Raises:
            As a call, at once; ValueError for ``every`` below 1.
        """
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ValueError(f"every must be an int of at least 1, got {every!r}")
        run = self._start(batch_size, shape, seed, first_image, x_T, generator, noise, True)

        def walk() -> Iterator[tuple[int, int, Tensor, Tensor]]:
            last = len(self.table) - 1
            for i in range(last + 1):
                with _evaluating(self.model), torch.no_grad():
                    run.step(i)
                if (i + 1) % every == 0 or i == last:
                    yield i, int(self.table.timesteps[i]), run.x.clone(), run.x0.clone()

        return walk()

    def _start(self, batch_size, shape, seed, first_image, x_T, generator, noise, stores_x0) -> _Run:
        """The checked arguments of a call as a run that stands before its first step."""
        several = isinstance(generator, Sequence)
        for one in generator if several else (generator,):
            if one is not None and not isinstance(one, torch.Generator):
                raise TypeError(f"generator must be a torch.Generator or a list, got {type(one).__name__}")
        if x_T is not None:
            _check_floating("x_T", x_T)
            if x_T.dim() < 2:
                raise ValueError(f"x_T must have at least two dimensions, got shape {tuple(x_T.shape)}")
        if batch_size is None:
            batch_size = len(x_T) if x_T is not None else len(generator) if several else 1
        batch_size = check_int("batch_size", batch_size, 1)
        if shape is not None:
            if not isinstance(shape, Sequence):
                raise TypeError(f"shape must be a sequence without the batch, as (C, H, W), got {shape!r}")
            shape = tuple(check_int(f"shape[{k}]", size, 1) for k, size in enumerate(shape))
        if x_T is not None:
            shape = tuple(x_T.shape[1:]) if shape is None else tuple(shape)
            if tuple(x_T.shape) != (batch_size, *shape):
                raise ValueError(f"x_T must have shape {(batch_size, *shape)}, got {tuple(x_T.shape)}")
        if shape is None:
            shape = getattr(self.model, "sample_shape", None)
            if shape is None:
                raise ValueError(
                    "shape must be given, as (C, H, W): the model has no sample_shape to take it from"
                )
        shape = (batch_size, *shape)
        if len(shape) < 2:
            raise ValueError("shape must have at least one dimension besides the batch, got ()")
        device = _device(self.model, x_T)

        source: Noise
        if noise == "counter":
            if generator is not None:
                raise ValueError("generator is for noise='torch'; noise='counter' takes seed and first_image")
            first_image = check_int("first_image", first_image, 0, 2**62)
            source = CounterNoise(
                ops.as_seed(seed, batch_size, device), ops.as_image_index(first_image, batch_size, device)
            )
        elif noise == "torch":
            if first_image != 0:
                raise ValueError("first_image is for noise='counter'; torch's generators do not count images")
            if several and len(generator) != batch_size:
                raise ValueError(
                    f"generator must be one, or {batch_size}, one an image; got {len(generator)}"
                )
            if generator is None:
                generator = torch.Generator().manual_seed(check_int("seed", seed, -(2**63), 2**64 - 1))
            source = TorchNoise(generator, self.dtype or torch.float32)
        else:
            raise ValueError(f"noise={noise!r} is not known; allowed: counter, torch")

        if x_T is None:
            x = source.x_T(shape, device)
        else:
            x = x_T.detach().to(device, torch.float32, copy=True).contiguous()
        return _Run(self, x, source, stores_x0)


class _Run:
    """A run under way: the buffers that every step reads and writes."""

    def __init__(self, sampler: Sampler, x: Tensor, noise: Noise, stores_x0: bool) -> None:
        table = sampler.table
        self.model, self.dtype = sampler.model, sampler.dtype
        self.x, self.noise = x, noise
        self.x0 = torch.empty_like(x) if stores_x0 or table.uses_x0_prev else None
        self.move = ops.bind_step(x, table, x0=self.x0, clip=sampler.clip, **noise.counter())
        self.indices = torch.arange(len(table), device=x.device).unbind()
        self.times = table.timesteps_tensor(x.device)[:, None].expand(-1, len(x)).unbind()
        self.draws = table.draws.tolist()

    def step(self, i: int) -> None:
        x = self.x if self.dtype is None else self.x.to(self.dtype)
        out = self.model(x, self.times[i])
        if not isinstance(out, Tensor):
            raise TypeError(
                f"model must return a Tensor, got {type(out).__name__}; wrap it, as in "
                "lambda x, t: model(x, t).sample"
            )
        self.move(out, self.indices[i], self.noise.draw(self.x) if self.draws[i] else None)


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """A module in eval mode; each of its parts as it was afterwards."""
    training = [part for part in model.modules() if part.training] if isinstance(model, nn.Module) else []
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _check_floating(name: str, x: Any) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        given = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} must be a floating Tensor, got {given}")


def _device(model: Any, x_T: Tensor | None) -> torch.device:
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    if parameter is not None:
        return parameter.device
    return torch.device("cpu") if x_T is None else x_T.device
