"""Every op and backend at the shapes, dtypes and layouts of DDPM's U-Nets, beside eager and inductor."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops, steps
from ..compat.peers import Missing, attempt, compiled
from ..ops import _dispatch
from ..schedule import Schedule
from . import plain
from .measure import Case, Run, measure
from .report import Column, Picture, Table
from .settings import Settings

Shape = tuple[int, int, int]
"""(B, C, H), the image H wide too."""

WIDTHS = {32: (128, 256, 384), 16: (128, 256, 384, 512), 8: (256, 512), 4: (256, 512)}
NORMS: list[tuple[int, int]] = [(c, h) for h, widths in WIDTHS.items() for c in widths]
"""(C, H) of the activations that the U-Net of Ho et al. 2020 for CIFAR-10 normalises."""
LARGE_NORMS: list[Shape] = [(1, 128, 128), (1, 256, 64), (1, 512, 32)]
"""Some of their U-Net for 256 x 256 images."""
CONCATS: list[tuple[int, int, int]] = [(256, 128, 32), (128, 128, 32), (256, 256, 16), (256, 256, 8)]
"""(C of x, C of skip, H) on the way up."""

LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
COLUMNS = [
    Column("op", "op", "text"),
    Column("backend", "backend", "text"),
    Column("shape", "shape", "text"),
    Column("dtype", "dtype", "text"),
    Column("layout", "layout", "text"),
    Column("time", "time", "time"),
    Column("gb_s", "GB/s", "number"),
    Column("of_copy", "of copy_", "number"),
    Column("eager", "eager / ours", "ratio"),
    Column("inductor", "inductor / ours", "ratio"),
    Column("best", "best / ours", "ratio"),
]
SERIES = ("backend", "dtype", "layout")


class Arguments(NamedTuple):
    """The op and what a user of PyTorch would write, as functions of the same arguments."""

    ours: Callable[..., object]  # takes `backend` too
    eager: Callable[..., object]
    args: tuple[Any, ...]
    like: Tensor  # what `copy_` copies
    grad: Tensor | None = None  # of the result: with it, a call goes on to every floating argument's

    def run(self, function: Callable[..., Any]) -> Run:
        args, grad = self.args, self.grad
        if grad is None:
            return lambda: function(*args)
        leaves = [v.requires_grad_() for v in args if isinstance(v, Tensor) and v.is_floating_point()]

        def both() -> tuple[Tensor, ...]:
            with torch.enable_grad():
                return torch.autograd.grad(function(*args), leaves, grad)

        return both


def cases(settings: Settings) -> Iterator[Case]:
    """Every case, built when it is measured."""
    norms, concats, images = _shapes(settings)
    halves = (torch.float32, torch.bfloat16)
    for shape, dtype, layout in product(norms, halves, LAYOUTS):
        yield _case(settings, "group_norm_silu", shape, dtype, layout, 2, _norm)
    for shape, dtype, layout in product(norms, halves, LAYOUTS):
        yield _case(settings, "group_norm_silu and backward", shape, dtype, layout, 5, _norm_backward)
    for (b, c, skip, h), dtype, layout in product(concats, halves, LAYOUTS):
        make = partial(_concat, skip=skip)
        yield _case(settings, "group_norm_silu_concat", (b, c + skip, h), dtype, layout, 3, make)
    for shape, dtype in product(images, halves):
        yield _case(settings, "q_sample", shape, dtype, "NCHW", 3, _q_sample)
    for shape, dtype in product(images, halves):
        yield _case(settings, "q_sample_counter", shape, dtype, "NCHW", 3, _q_sample_counter)
    for shape in images:
        make = partial(_step, drawn=False)
        yield _case(settings, "posterior_step_, noise given", shape, torch.float32, "NCHW", 4, make)
    for shape in images:
        make = partial(_step, drawn=True)
        yield _case(settings, "posterior_step_, noise drawn", shape, torch.float32, "NCHW", 3, make)
    for shape in images:
        yield _case(settings, "counter_normal", shape, torch.float32, "NCHW", 1, _counter_normal)


def table(settings: Settings) -> Table:
    """A row for each backend of each case; under it each op's geometric mean and worst shape."""
    found = Table("ops", "The fused ops, beside eager and compiled PyTorch", COLUMNS)
    total = sum(1 for _ in cases(settings))
    for case in settings.progress(cases(settings), "ops", total):  # one at a time: a case keeps its inputs
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            runs, skipped = case.built()
        found.skipped |= skipped
        timing = measure(runs, settings.rounds_or(30), device=settings.device, flush=True)
        fastest = timing.fastest("eager", "inductor")
        for backend in (name for name in _dispatch.BACKENDS if name in runs):
            time = timing.time(backend)
            found.rows.append(
                {
                    **case.labels,
                    "backend": backend,
                    "time": time,
                    "gb_s": case.bytes / time[1] / 1e9,
                    "of_copy": case.bytes / case.copied * timing.ratio("copy_", backend)[1],
                    **{peer: timing.ratio(peer, backend) for peer in ("eager", "inductor") if peer in runs},
                    "best": timing.ratio(fastest, backend),
                }
            )
    found.remarks = _summary(found)
    found.pictures = [
        Picture("points", f"{op}: best of eager and inductor / ours", "elements", "best", {"op": op}, SERIES)
        for op in dict.fromkeys(row["op"] for row in found.rows)
    ]
    return found


def _summary(found: Table) -> list[str]:
    lines = []
    for op, backend in dict.fromkeys((row["op"], row["backend"]) for row in found.rows):
        ratios = [row["best"][1] for row in found.rows if (row["op"], row["backend"]) == (op, backend)]
        mean, worst = statistics.geometric_mean(ratios), min(ratios)
        lines.append(f"- {op}, {backend}: geometric mean {mean:.2f}x, worst {worst:.2f}x of the best peer's")
    return lines


def _shapes(settings: Settings) -> tuple[list[Shape], list[tuple[int, int, int, int]], list[Shape]]:
    """Of the norms, of the concatenations (B, C of x, C of skip, H), and of images."""
    if settings.quick:
        return [(2, 64, 8)], [(2, 64, 32, 8)], [(2, 3, 32)]
    batches = (1, 8) if settings.device.type == "cpu" else (8, 64, 256)
    norms = [(b, c, h) for b in batches for c, h in NORMS] + LARGE_NORMS
    concats = [(b, *sizes) for b in batches for sizes in CONCATS]
    images = [(1, 3, 32), (8, 3, 32), (64, 3, 32), (1, 3, 256)]
    return norms, concats, images if settings.device.type == "cpu" else [*images, (1024, 3, 32)]


def _case(
    settings: Settings,
    op: str,
    shape: Shape,
    dtype: torch.dtype,
    layout: str,
    passes: int,
    make: Callable[..., Arguments],
) -> Case:
    """``passes``: how often a tensor of that shape is read or written at the least."""
    b, c, h = shape
    size = b * c * h * h * dtype.itemsize
    labels = {
        "op": op,
        "shape": f"{b}x{c}x{h}x{h}",
        "dtype": str(dtype).removeprefix("torch."),
        "layout": layout,
        "elements": b * c * h * h,
    }

    @cache
    def made() -> Arguments:
        return make(shape, dtype, LAYOUTS[layout], settings.device)

    kernel = next(
        name
        for name in ("group_norm_silu", "q_sample", "posterior_step", "counter_normal")
        if op.startswith(name)
    )

    def ours(backend: str) -> Run:
        if backend == "triton" and settings.device.type == "cpu":
            raise Missing("it has no kernels for the CPU")
        if reason := _dispatch.why_not(kernel, backend, settings.device.type, dtype):
            raise Missing(reason)
        return made().run(partial(made().ours, backend=backend))

    def inductor() -> Run:
        settings.check("inductor", compiles=True)
        return attempt(lambda: made().run(compiled(made().eager)))

    def copy() -> Run:
        source = made().like
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    arms: dict[str, Callable[[], Run]] = {backend: partial(ours, backend) for backend in _dispatch.BACKENDS}
    arms |= {"eager": lambda: made().run(made().eager), "inductor": inductor, "copy_": copy}
    return Case(labels, arms, bytes=passes * size, copied=2 * size)


def _normal(shape: Sequence[int], dtype: torch.dtype, layout: Any, device: torch.device) -> Tensor:
    return torch.randn(shape).to(device, dtype).contiguous(memory_format=layout)


def _affine(channels: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    return [torch.randn(channels).to(device, dtype) for _ in range(2)]


def _norm(shape: Shape, dtype: torch.dtype, layout: Any, device: torch.device) -> Arguments:
    b, c, h = shape
    x = _normal((b, c, h, h), dtype, layout, device)
    args = (x, 32, *_affine(c, dtype, device))
    return Arguments(ops.group_norm_silu, plain.group_norm_silu, args, x)


def _norm_backward(shape: Shape, dtype: torch.dtype, layout: Any, device: torch.device) -> Arguments:
    norm = _norm(shape, dtype, layout, device)
    return norm._replace(like=norm.like.clone(), grad=torch.randn_like(norm.like))


def _concat(shape: Shape, dtype: torch.dtype, layout: Any, device: torch.device, *, skip: int) -> Arguments:
    b, c, h = shape
    x, other = (_normal((b, n, h, h), dtype, layout, device) for n in (c - skip, skip))
    args = (x, other, 32, *_affine(c, dtype, device))
    ours, eager = (
        partial(f, concat=True) for f in (ops.group_norm_silu_concat, plain.group_norm_silu_concat)
    )
    return Arguments(ours, eager, args, torch.cat([x, other], 1))


def _q_sample(shape: Shape, dtype: torch.dtype, layout: Any, device: torch.device) -> Arguments:
    b, c, h = shape
    x0, noise = (_normal((b, c, h, h), dtype, layout, device) for _ in range(2))
    t = torch.randint(0, 1000, (b,)).to(device)
    return Arguments(ops.q_sample, plain.q_sample, (x0, noise, t, Schedule.linear().tensor(device)), x0)


def _q_sample_counter(shape: Shape, dtype: torch.dtype, layout: Any, device: torch.device) -> Arguments:
    given = _q_sample(shape, dtype, layout, device)
    x0, _, t, table = given.args

    def eager(x0: Tensor, t: Tensor, table: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        noise = torch.randn_like(x0)
        return plain.q_sample(x0, noise, t, table), noise

    seed, image_index = torch.tensor(0, device=device), torch.arange(len(x0), device=device)
    return Arguments(ops.q_sample_counter, eager, (x0, t, table, seed, image_index), x0)


def _step(shape: Shape, dtype: torch.dtype, layout: Any, device: torch.device, *, drawn: bool) -> Arguments:
    """In place, as a run does it. The eager step is OpenAI's, and returns another x."""
    b, c, h = shape
    x, out, noise = (_normal((b, c, h, h), dtype, layout, device) for _ in range(3))
    schedule, i = Schedule.linear(), torch.tensor(3, device=device)
    table = steps.ddpm(schedule)
    counter = {"seed": torch.tensor(0, device=device), "image_index": torch.arange(b, device=device)}
    options = counter if drawn else {"noise": noise}

    def ours(x: Tensor, out: Tensor, table: Tensor, *, backend: str) -> Tensor:
        return ops.posterior_step_(x, out, table, i, **options, backend=backend)

    step = plain.p_sample(schedule, torch.full((b,), int(table.timesteps[3]), device=device))

    def eager(x: Tensor, out: Tensor, table: Tensor) -> Tensor:
        return step(x, out, None if drawn else noise)

    return Arguments(ours, eager, (x, out, table.tensor(device)), x.clone())


def _counter_normal(shape: Shape, dtype: torch.dtype, layout: Any, device: torch.device) -> Arguments:
    """The eager arm draws from torch's generator: another stream, of the same distribution."""
    b, c, h = shape
    index, step = torch.arange(b, device=device), torch.tensor(0, device=device)
    x = _normal((b, c, h, h), dtype, layout, device)

    def eager(*_: Any) -> Tensor:
        return torch.randn(x.shape, device=device)

    return Arguments(ops.counter_normal, eager, (x.shape, torch.tensor(0, device=device), index, step), x)
