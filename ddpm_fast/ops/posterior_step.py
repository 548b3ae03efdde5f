"""One step of any sampler: a row of its table applied to (x, out) in one pass."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .. import reference
from ._checks import (
    Table,
    as_image_index,
    as_index,
    as_seed,
    as_table,
    at_hand,
    check_floating,
    check_like,
    check_range,
    describe,
)
from ._dispatch import choose, define, implementation

HALVES = (torch.bfloat16, torch.float16)


def posterior_step(
    x: Tensor,
    out: Tensor,
    table: Table,
    i: int | Tensor,
    *,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    image_index: int | Tensor | None = None,
    x0_prev: Tensor | None = None,
    clip: float | Tensor | None = 1.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Take sampler step ``i``: from ``x`` and the network's ``out`` to the next ``x`` and this step's ``x0``.

    Equivalent to, with ``p, q, a, b, c, d, s = table[i]``::

        x0     = clip(p * x + q * out)
        x_next = a * x0 + b * x + c * out + d * x0_prev + s * noise

    which is DDPM (Ho et al. 2020, eq. 7 and 11), DDIM (Song et al. 2021, eq. 12) and DPM-Solver++(2M)
    (Lu et al. 2022, algorithm 2), whichever the table is of. With a learned range (nine columns; Nichol &
    Dhariwal 2021, eq. 15) the second half of ``out``'s channels sets the noise's scale. Computed in float32,
    rounded once. In ``x_next``, an ``out``, ``x0_prev`` or ``noise`` whose coefficient is zero is not used.

    Args:
        x: ``(B, C, ...)`` float32, bfloat16, float16 or float64.
        out: ``(B, C, ...)``, or ``(B, 2C, ...)`` where the network also predicts a variance; x's dtype, or
            bfloat16 or float16 beside a float32 ``x``; any memory layout.
        table: a `StepTable`, or its ``(N, 7)`` or ``(N, 9)`` tensor, float32 (float64 with ``x``). Inside
            ``torch.compile`` give the tensor: ``table.tensor(device)``.
        i: the step of this run, 0-d or ``(B,)`` int64: each sample may stand at its own. An int is taken too.
        noise: like ``x``; or
        seed, image_index: the noise is drawn inside, as `counter_normal(x.shape, seed, image_index, i)`.
        x0_prev: like ``x``, the ``x0`` that the step before returned; only DPM-Solver++(2M) needs it.
        clip: bound of ``|x0|``: a number, ``(B,)`` float32 (infinity: none), or None.
        backend: "native", "triton", "reference", or None for the fastest here (the reference where a
            gradient is asked for: kernels have none).

    Returns:
        ``(x_next, x0)``, like ``x``, contiguous.

    Raises:
        TypeError, ValueError: an argument of a wrong kind, dtype, shape or device; noise or x0_prev missing
            where row ``i`` needs it (on a GPU, which is not asked, the result is NaN).
        IndexError: ``i`` outside the table (on a GPU, which is not asked, the sample is NaN).
        RuntimeError: a backend named that cannot run here.
    """
    args = _arguments(x, out, table, i, noise, seed, image_index, x0_prev, clip)
    differentiable = torch.is_grad_enabled() and any(
        v is not None and v.requires_grad for v in (x, out, noise, x0_prev)
    )
    if differentiable and backend is None:
        backend = "reference"
    chosen = choose("posterior_step", backend, x)
    if differentiable and chosen != "reference":
        raise ValueError("x, out, noise or x0_prev asks for a gradient: only backend='reference' has one")
    return implementation("posterior_step", chosen, _reference)(*args)


def posterior_step_(
    x: Tensor,
    out: Tensor,
    table: Table,
    i: int | Tensor,
    *,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    image_index: int | Tensor | None = None,
    x0: Tensor | None = None,
    clip: float | Tensor | None = 1.0,
    backend: str | None = None,
) -> Tensor:
    """`posterior_step` in place, for loops and CUDA graphs: ``x`` becomes ``x_next``, and is returned.

    ``x0``, if given, is read as the step before's and overwritten with this step's; without it this step's is
    not stored. ``x`` and ``x0`` are contiguous. Not differentiable.

    Raises:
        As `posterior_step`.
    """
    step = bind_step(x, table, seed=seed, image_index=image_index, x0=x0, clip=clip, backend=backend)
    if noise is not None:
        if seed is not None:
            raise ValueError("give noise or seed, not both")
        check_like("noise", noise, x, "x")
    step(out, as_index("i", i, x.shape[0], x.device), noise)
    return x


def bind_step(
    x: Tensor,
    table: Table,
    *,
    seed: int | Tensor | None = None,
    image_index: int | Tensor | None = None,
    x0: Tensor | None = None,
    clip: float | Tensor | None = 1.0,
    backend: str | None = None,
) -> Callable[[Tensor, Tensor, Tensor | None], None]:
    """`posterior_step_` for a loop: all but ``out``, ``i`` and ``noise`` is given, and checked, once.

    Returns ``step(out, i, noise)``, which moves ``x`` (and ``x0``) on; ``i`` is an int64 tensor and ``noise``
    like ``x`` or None, neither checked again.

    Raises:
        As `posterior_step`; the returned function for an ``out`` that does not fit.
    """
    check_floating("x", x, 2)
    for name, value in (("x", x), ("x0", x0)):
        if value is not None and not value.is_contiguous():
            raise ValueError(f"{name} must be contiguous to be written in place")
        if value is not None and value.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} asks for a gradient, which a step in place does not have")
    if x0 is not None:
        check_like("x0", x0, x, "x")
    table = as_table(table, x, (7, 9))
    seed, image_index = _as_counter(seed, image_index, x)
    clip, clip_each = _as_clip(clip, x)
    chosen = choose("posterior_step", backend, x)
    run = implementation("posterior_step_", chosen, torch.no_grad()(_reference_))
    written = (x,) if x0 is None else (x, x0)

    def step(out: Tensor, i: Tensor, noise: Tensor | None) -> None:
        _check_out(x, out, table)
        run(x, out, table, i, noise, seed, image_index, x0, clip, clip_each)
        if not torch.compiler.is_compiling():  # a kernel writes behind autograd's back: let it know
            torch.autograd.graph.increment_version(written)

    return step


def _arguments(x, out, table, i, noise, seed, image_index, x0_prev, clip):
    """The checked arguments of the registered op, in its order."""
    check_floating("x", x, 2)
    table = as_table(table, x, (7, 9))
    _check_out(x, out, table)
    i = as_index("i", i, x.shape[0], x.device)
    if noise is not None and seed is not None:
        raise ValueError("give noise or seed, not both")
    for name, value in (("noise", noise), ("x0_prev", x0_prev)):
        if value is not None:
            check_like(name, value, x, "x")
    return x, out, table, i, noise, *_as_counter(seed, image_index, x), x0_prev, *_as_clip(clip, x)


def _check_out(x: Tensor, out: Tensor, table: Tensor) -> None:
    if not isinstance(out, Tensor):
        raise TypeError(f"out must be a Tensor, got {type(out).__name__}")
    shape, learned = x.shape, table.shape[1] == 9
    if learned or out.shape != shape:
        doubled = out.shape == (shape[0], 2 * shape[1], *shape[2:])
        if not doubled and out.shape != shape:
            raise ValueError(
                f"out must have x's shape {tuple(shape)}, or twice its {shape[1]} channels; "
                f"got {describe(out)}"
            )
        if learned and not doubled:
            raise ValueError(
                f"a table with a learned range needs out with {2 * shape[1]} channels, got {out.shape[1]}"
            )
    if out.dtype != x.dtype and not (x.dtype == torch.float32 and out.dtype in HALVES):
        raise TypeError(f"out must be {x.dtype} like x, or a half type beside a float32 x; got {out.dtype}")
    if out.device != x.device:
        raise ValueError(f"out must be on {x.device} like x, got {describe(out)}")


def _as_counter(seed, image_index, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    if (seed is None) != (image_index is None):
        raise ValueError("seed and image_index go together: give both or neither")
    if seed is None:
        return None, None
    return as_seed(seed, x.shape[0], x.device), as_image_index(image_index, x.shape[0], x.device)


def _as_clip(clip, x: Tensor) -> tuple[float, Tensor | None]:
    """The bound for all samples, and that of each."""
    if isinstance(clip, Tensor):
        if clip.shape != (x.shape[0],) or clip.dtype != torch.float32 or clip.device != x.device:
            raise ValueError(
                f"clip must be None, a number or ({x.shape[0]},) float32 on {x.device}; got {describe(clip)}"
            )
        return math.inf, clip
    if clip is None:
        return math.inf, None
    if isinstance(clip, bool) or not isinstance(clip, (int, float)) or not clip > 0:
        raise ValueError(f"clip must be None, a positive number or a (B,) float32 Tensor, got {clip!r}")
    return float(clip), None


def _reference(x, out, table, i, noise, seed, image_index, x0_prev, clip, clip_each):
    check_range("i", i, table.shape[0])
    if at_hand(x):
        for column, name, missing in (
            (5, "x0_prev", x0_prev is None),
            (6, "noise or seed", noise is None and seed is None),
        ):
            if missing and bool((table[i, column] != 0).any()):
                raise ValueError(f"{name} is missing, and row i of the table needs it")
    x_next, x0 = reference.posterior_step(
        x,
        out,
        table,
        i,
        noise=noise,
        seed=seed,
        image_index=image_index,
        x0_prev=x0_prev,
        clip=clip_each if clip_each is not None else clip,
    )
    return x_next.contiguous(), x0.contiguous()


def _reference_(x, out, table, i, noise, seed, image_index, x0, clip, clip_each):
    x_next, x0_next = _reference(x, out, table, i, noise, seed, image_index, x0, clip, clip_each)
    x.copy_(x_next)
    if x0 is not None:
        x0.copy_(x0_next)


def _fake(x, *_):
    return (
        x.new_empty(x.shape),
        x.new_empty(x.shape),
    )


define(
    "posterior_step",
    "(Tensor x, Tensor out, Tensor table, Tensor i, Tensor? noise, Tensor? seed, Tensor? image_index, "
    "Tensor? x0_prev, float clip, Tensor? clip_each) -> (Tensor, Tensor)",
    _reference,
    _fake,
    file="posterior_step",
)
define(
    "posterior_step_",
    "(Tensor(a!) x, Tensor out, Tensor table, Tensor i, Tensor? noise, Tensor? seed, Tensor? image_index, "
    "Tensor(b!)? x0, float clip, Tensor? clip_each) -> ()",
    _reference_,
    lambda *_: None,
    file="posterior_step",
)
