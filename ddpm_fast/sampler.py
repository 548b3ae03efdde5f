"""`Sampler`: a model, a table of steps, a source of noise, and the loop."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import ops, steps
from .convolution import can_pack
from .cuda_graph import Graphs, Stats
from .engine import Model, Network, evaluating
from .guidance import Classifier, CondFn, as_labels, as_pair
from .noise import CounterNoise, Noise, TorchNoise
from .run import Run
from .schedule import Schedule, check_int
from .steps import StepTable
from .stream import Request, Stream
from .unet import UNet

Callback = Callable[[int, int, Tensor, Tensor], None]
Progress = Callable[[Iterable[int]], Iterable[int]]

METHODS = {"ddpm": steps.ddpm, "ddim": steps.ddim, "dpm_solver": steps.dpm_solver}
FEW_STEPS = {"ddim": 50, "dpm_solver": 20}
"""num_steps where it is not given, and T allows it; ddpm takes all T."""
DEFAULTS = {
    "method": "ddpm",
    "num_steps": None,
    "spacing": None,
    "prediction": "epsilon",
    "steps_offset": 0,
    "variance": None,
    "eta": 0.0,
    "use_clipped_out": False,
    "final_alpha_cumprod": 1.0,
    "order": None,
}
"""The options of `Sampler` that a table is made of."""
OWNERS = {
    "variance": "ddpm",
    "eta": "ddim",
    "use_clipped_out": "ddim",
    "final_alpha_cumprod": "ddim",
    "order": "dpm_solver",
}
"""The method of those that one method has."""


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

    On the CPU each of our U-Net's 3x3 convolutions is computed in the way that is fastest on this processor,
    measured in a first run of a batch size and kept in the user's cache (see `tuning.fastest`). On another
    machine, when that is gone, or where other processes or a profiler kept a first run from measuring, the
    last bits of a later process may be others. With ``torch.use_deterministic_algorithms(True)`` nothing is
    measured, and the way follows from the shapes and the instruction set.

    Args:
        model: any ``model(x, t) -> out``; x (B, ...) of at least two dimensions, t (B,) int64. ``out`` is
            like x, or has twice its channels where the variance is learned. A module runs in eval mode. A run
            that is given class labels calls ``model(x, t, class_labels)``.
        schedule: what training fixed; or a `StepTable`, the whole run: then nothing that a table is made of
            can be given, from ``method`` to ``order``.
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
        graph: capture a step as a CUDA graph and replay it, so that the host launches one thing a step.
            "auto": on CUDA where the model is a module; one that cannot be captured runs launch by launch,
            with a warning. True: of any model, and one that cannot be captured is an error. False: never.
            Where there is no memory for the capture, a run goes on without it, with a warning; under autocast
            none is made. A replay repeats kernels: what the model decides in Python is frozen at the capture
            (see `cuda_graph.version`), while weights that change in place are seen. On the CPU the ops of our
            U-Net are recorded in each run's second step and replayed without its Python (see `replay`), if
            nothing of it is replaced or hooked; not with False.
        channels_last: feed the model 4-d inputs in that layout; a module is copied and its weights converted
            too. "auto": on CUDA where ``dtype`` is a half, so that the copy is made anyway; on the CPU for
            our U-Net, which is not copied: it lays out its weights itself, once a run (`convolution`).
        compile: call the model through ``torch.compile``, whole (a graph break is an error); "max-autotune"
            also tries out kernels. A first call takes some seconds to a minute, a second batch size once
            more; torch keeps what it compiled between processes. On the CPU the module is copied and its
            weights are frozen.
        low_memory: on the CPU leave out our own convolution and linear layer, whose packed weights take up to
            four times the memory of the weights; `stats` says how much they took.

    Attributes:
        table: the `StepTable` of a run.
        stats: a `cuda_graph.Stats`, of all runs so far.

    Raises:
        TypeError, ValueError: see `steps`; an unknown method, or an option that is another method's or the
            table's; a dtype that the model's device cannot compute in; graph=True for a model that is not on
            CUDA.
    """

    def __init__(
        self,
        model: Model,
        schedule: Schedule | StepTable,
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
        graph: bool | str = "auto",
        channels_last: bool | str = "auto",
        compile: bool | str = False,
        low_memory: bool = False,
    ) -> None:
        if not callable(model):
            raise TypeError(f"model must be callable as model(x, t), got {type(model).__name__}")
        if compile is not True and compile is not False and compile != "max-autotune":
            raise ValueError(f"compile must be False, True or 'max-autotune', got {compile!r}")
        if not isinstance(low_memory, bool):
            raise TypeError(f"low_memory must be True or False, got {low_memory!r}")
        if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"dtype must be None, float32, bfloat16 or float16, got {dtype}")
        for name, value in (("graph", graph), ("channels_last", channels_last)):
            if value is not True and value is not False and value != "auto":
                raise ValueError(f"{name} must be 'auto', True or False, got {value!r}")
        options = {
            "method": method,
            "num_steps": num_steps,
            "spacing": spacing,
            "prediction": prediction,
            "steps_offset": steps_offset,
            "variance": variance,
            "eta": eta,
            "use_clipped_out": use_clipped_out,
            "final_alpha_cumprod": final_alpha_cumprod,
            "order": order,
        }
        self.table, self._table_of = _tables(schedule, options)
        self._schedule = schedule if isinstance(schedule, Schedule) else None
        self.clip = _as_clip(clip)
        parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
        halves = (torch.bfloat16, torch.float16)
        packs = False  # whether the model lays out its weights itself
        if parameter is not None:
            _check_device(parameter.device, dtype, graph)
            packs = isinstance(model, UNet) and parameter.device.type == "cpu"
            packs = packs and can_pack(dtype or parameter.dtype)
            if channels_last == "auto":
                channels_last = packs or (parameter.is_cuda and dtype in halves)
        self.channels_last = channels_last is True
        if isinstance(model, nn.Module):
            converts = self.channels_last and not packs
            freezes = bool(compile) and parameter is not None and parameter.device.type == "cpu"
            if dtype is not None or converts or freezes:
                layout = {"memory_format": torch.channels_last} if converts else {}
                model = copy.deepcopy(model).to(dtype=dtype, **layout)
            if dtype is None and parameter is not None and parameter.dtype in halves:
                dtype = parameter.dtype
        self.dtype = dtype
        self.model = model
        self._network = Network(model, dtype, self.channels_last, compile, graph is not False, low_memory)
        self._graphs = Graphs(model, graph)

    @property
    def stats(self) -> Stats:
        """What the runs of this sampler have cost so far."""
        return self._graphs.stats

    to_uint8 = staticmethod(to_uint8)

    def with_table(self, table: StepTable, clip: float | None = 1.0) -> Sampler:
        """A sampler of other steps that shares this one's model, its copy in another dtype, and its captures.

        Raises:
            TypeError, ValueError: not a StepTable; clip is neither None nor a positive number.
        """
        if not isinstance(table, StepTable):
            raise TypeError(f"table must be a StepTable, got {type(table).__name__}")
        other = copy.copy(self)
        other.table, other._table_of = _tables(table, {})
        other._schedule = None
        other.clip = _as_clip(clip)
        return other

    def __call__(
        self,
        batch_size: int | None = None,
        *,
        shape: Sequence[int] | None = None,
        seed: int = 0,
        first_image: int = 0,
        x_T: Tensor | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        noise: str | Noise = "counter",
        class_labels: Tensor | None = None,
        guidance_scale: float | Tensor | None = None,
        null_label: int | Tensor | None = None,
        cond_fn: CondFn | None = None,
        progress: bool | Progress = False,
        callback: Callback | None = None,
    ) -> Tensor:
        """Run the whole table; returns float32 ``(B, *shape)``, contiguous.

        Args:
            batch_size: images of this run; None: as many as ``x_T``, ``class_labels`` or the generators are,
                else 1.
            shape: of one sample, without the batch; default the model's ``sample_shape``.
            seed, first_image: sample b is image ``first_image + b`` of this 64-bit seed: the same whatever
                the batch, or how a run is split into batches.
            x_T: the start, ``(B, *shape)``; default drawn.
            generator: with noise="torch": a generator, or a list of one an image; default one that is seeded
                with ``seed``.
            noise: "counter" (drawn in the kernel, see `ops.counter_normal`) or "torch" (drawn as diffusers'
                pipelines draw; ``first_image`` has no meaning there); or a `noise.CounterNoise`, where each
                image has a seed and an index of its own, or a `noise.TorchNoise`.
            class_labels: what a class-conditional model is told of each image: (B,) int64 for our U-Net; for
                another model any tensor of B entries. Labels that differ replay the same captured step.
            guidance_scale: guidance without a classifier (Ho & Salimans 2022, arXiv 2207.12598; their w is
                one less): a step sees ``uncond + guidance_scale (cond - uncond)``, of one call of the model
                with both. A number, or (B,) floating; 1 is the model's own prediction, of half a call. A
                scale that differs replays the same captured step.
            null_label: with it, what the model is told where there is no class: an int, or a tensor like one
                of ``class_labels`` or like all of them.
            cond_fn: guidance by a classifier (Dhariwal & Nichol 2021, algorithms 1 and 2), for ddpm and ddim:
                ``cond_fn(x, t)`` returns the gradient of ``log p(y | x)``, like x, (B,) int64 t; it is called
                without gradients enabled. ddpm's mean moves by the variance times that, ddim's epsilon by
                ``-sqrt(1 - ab)`` times that. No step is captured then.
            progress: show a bar on stderr; or a function that shows one, as ``tqdm.tqdm``, given the steps.
            callback: called as ``callback(i, t, x, x0)`` after each step with the step, its time and the live
                tensors; it may change x in place, and not the weights, which a run has laid out.

        Raises:
            TypeError, ValueError: an argument of a wrong kind, shape or combination, named, before any work;
                a model whose output does not fit.
            RuntimeError: with graph=True, a model that waits for the device; the message names the op.
        """
        if not isinstance(progress, bool) and not callable(progress):
            raise TypeError(f"progress must be True, False or a function, got {type(progress).__name__}")
        start = time.perf_counter()
        stores_x0 = callback is not None
        with evaluating(self.model):
            run = self._start(
                batch_size,
                shape,
                seed,
                first_image,
                x_T,
                generator,
                noise,
                stores_x0,
                class_labels,
                guidance_scale,
                null_label,
                cond_fn,
            )
            try:
                count: Iterable[int] = range(len(self.table))
                if progress is True:
                    count = tqdm(count, desc=self.table.method, unit="step")
                elif progress:
                    count = progress(count)
                with run.computing():
                    for i in count:
                        run.step(i)
                        if callback is not None:
                            callback(i, int(self.table.timesteps[i]), run.x, run.x0)
                x = run.result()
            finally:
                run.close()
        self._graphs.took(time.perf_counter() - start)
        return x

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
        noise: str | Noise = "counter",
        class_labels: Tensor | None = None,
        guidance_scale: float | Tensor | None = None,
        null_label: int | Tensor | None = None,
        cond_fn: CondFn | None = None,
    ) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """Yield ``(i, t, x, x0)`` after every ``every``-th step and the last; the tensors are copies.

        The weights must not change meanwhile. The other arguments are those of a call.

        Raises:
            As a call, at once; ValueError for ``every`` below 1.
        """
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ValueError(f"every must be an int of at least 1, got {every!r}")
        with evaluating(self.model):
            run = self._start(
                batch_size,
                shape,
                seed,
                first_image,
                x_T,
                generator,
                noise,
                True,
                class_labels,
                guidance_scale,
                null_label,
                cond_fn,
            )

        def walk() -> Iterator[tuple[int, int, Tensor, Tensor]]:
            last = len(self.table) - 1
            try:
                for i in range(last + 1):
                    with evaluating(self.model), run.computing():
                        run.step(i)
                    if (i + 1) % every == 0 or i == last:
                        yield i, int(self.table.timesteps[i]), run.x.clone(), run.x0.clone()
            finally:
                run.close()

        return walk()

    def stream(
        self,
        requests: Iterable[Request],
        *,
        batch_size: int = 8,
        shape: Sequence[int] | None = None,
    ) -> Iterator[tuple[Request, Tensor]]:
        """Serve requests as they come, in one running batch; yield ``(request, image)`` as they finish.

        A request joins at any step, as soon as a place is free, and leaves after its own last: none waits for
        a slower one. Its image is that of a run of its own, to the rounding of the model's batch size: the
        noise is the counter's, of its own seed, index and step. The weights must not change meanwhile.

        Args:
            requests: `Request`s, may be lazy: the next is asked for when a place is free.
            batch_size: how many run at a time.
            shape: of one image, without the batch; default the model's ``sample_shape``.

        Returns:
            An iterator, in the order of finishing; images float32 ``shape``.

        Raises:
            TypeError, ValueError: an argument of a wrong kind or shape, at once; a request's, when its turn
                comes.
        """
        if not isinstance(requests, Iterable):
            raise TypeError(f"requests must be iterable, got {type(requests).__name__}")
        batch_size = check_int("batch_size", batch_size, 1)
        shape = self._shape(shape, None)
        device = _device(self.model, None)
        _check_device(device, self.dtype, self._graphs.graph)
        stream = Stream(
            self._network,
            self._graphs,
            self._table_of,
            self.table,
            self.clip,
            shape,
            batch_size,
            device,
        )
        return stream.serve(iter(requests))

    def _start(
        self,
        batch_size,
        shape,
        seed,
        first_image,
        x_T,
        generator,
        noise,
        stores_x0,
        class_labels,
        guidance_scale,
        null_label,
        cond_fn,
    ) -> Run:
        """The checked arguments of a call as a run that stands before its first step; for `evaluating`."""
        several = isinstance(generator, Sequence)
        for one in generator if several else (generator,):
            if one is not None and not isinstance(one, torch.Generator):
                raise TypeError(f"generator must be a torch.Generator or a list, got {type(one).__name__}")
        if x_T is not None:
            _check_floating("x_T", x_T)
            if x_T.dim() < 2:
                raise ValueError(f"x_T must have at least two dimensions, got shape {tuple(x_T.shape)}")
        if batch_size is None:
            labels = class_labels if isinstance(class_labels, Tensor) and class_labels.dim() else None
            counted = (x_T, labels, generator if several else None)
            batch_size = next((len(given) for given in counted if given is not None), 1)
        batch_size = check_int("batch_size", batch_size, 1)
        shape = (batch_size, *self._shape(shape, x_T))
        if x_T is not None and tuple(x_T.shape) != shape:
            raise ValueError(f"x_T must have shape {shape}, got {tuple(x_T.shape)}")
        device = _device(self.model, x_T)
        _check_device(device, self.dtype, self._graphs.graph)

        source = _noise(noise, generator, seed, first_image, self.dtype, batch_size, device)
        labels = as_labels(self.model, class_labels, batch_size, device)
        labels, scale = as_pair(self.model, labels, guidance_scale, null_label)
        classifier = None
        if cond_fn is not None:
            classifier = Classifier.of(cond_fn, self.table, self._schedule, device)
        if x_T is None:
            x = source.x_T(shape, device)
        else:
            x = x_T.detach().to(device, torch.float32, copy=True).contiguous()
        return Run(
            self.table,
            self.clip,
            self._network,
            self._graphs,
            x,
            source,
            stores_x0,
            labels,
            scale,
            classifier,
        )

    def _shape(self, shape: Sequence[int] | None, x_T: Tensor | None) -> tuple[int, ...]:
        """Of one sample: as given, else as x_T's, else the model's own."""
        if shape is not None:
            if not isinstance(shape, Sequence):
                raise TypeError(f"shape must be a sequence without the batch, as (C, H, W), got {shape!r}")
            shape = tuple(check_int(f"shape[{k}]", size, 1) for k, size in enumerate(shape))
        elif x_T is not None:
            shape = tuple(x_T.shape[1:])
        else:
            shape = getattr(self.model, "sample_shape", None)
            if shape is None:
                raise ValueError(
                    "shape must be given, as (C, H, W): the model has no sample_shape to take it from"
                )
        if len(shape) < 1:
            raise ValueError("shape must have at least one dimension besides the batch, got ()")
        return shape


def _tables(
    schedule: Schedule | StepTable, options: dict[str, Any]
) -> tuple[StepTable, Callable[[int], StepTable]]:
    """The table of a sampler with these options, and what makes one of another length for a request."""
    given = {
        name: value
        for name, value in options.items()
        if (value is not None if DEFAULTS[name] is None else value != DEFAULTS[name])
    }
    if isinstance(schedule, StepTable):
        if given:
            raise ValueError(f"{', '.join(given)} cannot be given beside a StepTable, which fixes the run")
        return schedule, partial(_only, schedule)
    method, num_steps, spacing = options["method"], options["num_steps"], options["spacing"]
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"method={method!r} is not known; allowed: {', '.join(METHODS)}")
    for name, owner in OWNERS.items():
        if name not in given or owner == method:
            continue
        if name != "variance" or given[name] not in steps.VARIANCES:
            raise ValueError(f"{name}={given[name]!r} is an option of method {owner!r}, not of {method!r}")
        del given[name]
    counted = spacing is None or (isinstance(spacing, str) and spacing in steps.SPACINGS)
    if num_steps is None and counted and isinstance(schedule, Schedule):
        most = len(schedule) - (method == "dpm_solver")  # whose spacings lay out one point more
        num_steps = max(1, min(FEW_STEPS.get(method, most), most))
    table_of = partial(
        METHODS[method],
        schedule,
        **{name: value for name, value in given.items() if name not in ("method", "num_steps")},
    )
    return table_of(num_steps), table_of


def _only(table: StepTable, num_steps: int) -> StepTable:
    if num_steps != len(table):
        raise ValueError(
            f"num_steps must be None or {len(table)}, which the sampler's StepTable has, got {num_steps}"
        )
    return table


def _noise(
    noise: str | Noise,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    seed: int | Tensor,
    first_image: int,
    dtype: torch.dtype | None,
    batch_size: int,
    device: torch.device,
) -> Noise:
    """Where a call's noise comes from, with its arguments checked."""
    if isinstance(noise, (CounterNoise, TorchNoise)):
        if generator is not None or first_image != 0 or isinstance(seed, Tensor) or seed != 0:
            raise ValueError(
                "generator, seed and first_image cannot be given beside a noise that has its own"
            )
        if isinstance(noise, CounterNoise):
            ops.as_seed(noise.seed, batch_size, device)
            ops.as_image_index(noise.image_index, batch_size, device)
            return noise
        generator = noise.generator
    elif noise == "counter":
        if generator is not None:
            raise ValueError("generator is for noise='torch'; noise='counter' takes seed and first_image")
        first_image = check_int("first_image", first_image, 0, 2**62)
        return CounterNoise(
            ops.as_seed(seed, batch_size, device), ops.as_image_index(first_image, batch_size, device)
        )
    elif noise == "torch":
        if first_image != 0:
            raise ValueError("first_image is for noise='counter'; torch's generators do not count images")
        if generator is None:
            generator = torch.Generator().manual_seed(check_int("seed", seed, -(2**63), 2**64 - 1))
        noise = TorchNoise(generator, dtype or torch.float32)
    else:
        raise ValueError(f"noise={noise!r} is not known; allowed: counter, torch")
    if isinstance(generator, Sequence) and len(generator) != batch_size:
        raise ValueError(f"generator must be one, or {batch_size}, one an image; got {len(generator)}")
    return noise


def _as_clip(clip: float | None) -> float | None:
    if clip is not None and (isinstance(clip, bool) or not isinstance(clip, (int, float)) or not clip > 0):
        raise ValueError(f"clip must be None or a positive number, got {clip!r}")
    return None if clip is None else float(clip)


def _check_floating(name: str, x: Any) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        given = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} must be a floating Tensor, got {given}")


def _check_device(device: torch.device, dtype: torch.dtype | None, graph: bool | str) -> None:
    if graph is True and device.type != "cuda":
        raise ValueError(f"graph=True needs a model on CUDA, got one on {device}; there 'auto' or False")
    is_half = dtype == torch.bfloat16 and device.type == "cuda"
    if is_half and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError(f"dtype bfloat16 is not supported by {device}; allowed: float32, float16")


def _device(model: Any, x_T: Tensor | None) -> torch.device:
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    if parameter is not None:
        return parameter.device
    return torch.device("cpu") if x_T is None else x_T.device
