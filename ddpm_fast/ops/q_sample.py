"""The forward process: noise an image to time t in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ._checks import (
    Table,
    as_image_index,
    as_index,
    as_seed,
    as_table,
    check_floating,
    check_like,
    check_range,
)
from ._dispatch import choose, define, differentiable


def q_sample(
    x0: Tensor, noise: Tensor, t: int | Tensor, table: Table, *, backend: str | None = None
) -> Tensor:
    """Draw ``x_t ~ q(x_t | x_0)`` with the noise given (Ho et al. 2020, eq. 4). Differentiable in both.

    Equivalent to::

        table[t, 0] * x0 + table[t, 1] * noise      # computed in float32, rounded once

    Args:
        x0: ``(B, ...)`` float32, bfloat16, float16 or float64.
        noise: like ``x0``.
        t: training time, 0-d or ``(B,)`` int64 (an int is taken too).
        table: a `Schedule`, or ``(T, 2)`` sqrt(alphas_cumprod) and sqrt(1 - alphas_cumprod), float32
            (float64 for float64 ``x0``) on x0's device. Inside ``torch.compile`` give the tensor:
            ``schedule.tensor(device)``.
        backend: "native", "triton", "reference", or None for the fastest here.

    Returns:
        ``x_t`` like ``x0``, in its memory layout.

    Raises:
        TypeError, ValueError: an argument of a wrong kind, dtype, shape or device.
        IndexError: ``t`` outside the table (on a GPU, which is not asked, the sample is NaN).
        RuntimeError: a backend named that cannot run here.
    """
    check_floating("x0", x0, 1)
    check_like("noise", noise, x0, "x0")
    table = as_table(table, x0, (2,))
    t = as_index("t", t, x0.shape[0], x0.device)
    run = differentiable("q_sample", choose("q_sample", backend, x0), _reference, x0, noise)
    return run(x0, noise, t, table)


def q_sample_counter(
    x0: Tensor,
    t: int | Tensor,
    table: Table,
    seed: int | Tensor,
    image_index: int | Tensor,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`q_sample` with the noise drawn inside, as `counter_normal` draws it: x0 is read once.

    Equivalent to::

        noise = counter_normal(x0.shape, seed, image_index, 0, stream="training").to(x0.dtype)
        return q_sample(x0, noise, t, table), noise

    Args:
        x0, t, table, backend: as in `q_sample`.
        seed: 64 bits, an int or an int64 tensor, 0-d or ``(B,)``.
        image_index: ``(B,)`` int64, who each sample is (in training, its running number); an int k stands
            for k, k + 1, ...

    Returns:
        ``(x_t, noise)``, both like ``x0``. ``x_t`` is differentiable in ``x0``.

    Raises:
        As `q_sample`.
    """
    check_floating("x0", x0, 1)
    table = as_table(table, x0, (2,))
    t = as_index("t", t, x0.shape[0], x0.device)
    seed = as_seed(seed, x0.shape[0], x0.device)
    image_index = as_image_index(image_index, x0.shape[0], x0.device)
    run = differentiable("q_sample_counter", choose("q_sample", backend, x0), _reference_counter, x0)
    return run(x0, t, table, seed, image_index)


def _reference(x0: Tensor, noise: Tensor, t: Tensor, table: Tensor) -> Tensor:
    check_range("t", t, table.shape[0])
    layout = reference.memory_format(x0)
    return reference.q_sample(x0, noise, t, table).contiguous(memory_format=layout)


def _reference_counter(
    x0: Tensor, t: Tensor, table: Tensor, seed: Tensor, image_index: Tensor
) -> tuple[Tensor, Tensor]:
    check_range("t", t, table.shape[0])
    layout = reference.memory_format(x0)
    x_t, noise = reference.q_sample_counter(x0, t, table, seed, image_index)
    return x_t.contiguous(memory_format=layout), noise.contiguous(memory_format=layout)


def _empty_like(x0: Tensor) -> Tensor:
    return torch.empty_like(x0, memory_format=reference.memory_format(x0))


def _scale(grad: Tensor, t: Tensor, table: Tensor, column: int) -> Tensor:
    weight = reference.per_sample(reference.rows(table, t, table.dtype)[:, column], grad)
    return (weight * grad.to(table.dtype)).to(grad.dtype)


def _save_times(ctx, inputs, output) -> None:
    *_, t, table = inputs
    ctx.save_for_backward(t, table)


def _backward(ctx, grad: Tensor):
    t, table = ctx.saved_tensors
    grad_x0 = _scale(grad, t, table, 0) if ctx.needs_input_grad[0] else None
    grad_noise = _scale(grad, t, table, 1) if ctx.needs_input_grad[1] else None
    return grad_x0, grad_noise, None, None


def _save_times_counter(ctx, inputs, output) -> None:
    _, t, table, _, _ = inputs
    ctx.save_for_backward(t, table)
    ctx.mark_non_differentiable(output[1])


def _backward_counter(ctx, grad: Tensor, _grad_noise: Tensor):
    t, table = ctx.saved_tensors
    return _scale(grad, t, table, 0) if ctx.needs_input_grad[0] else None, None, None, None, None


define(
    "q_sample",
    "(Tensor x0, Tensor noise, Tensor t, Tensor table) -> Tensor",
    _reference,
    lambda x0, noise, t, table: _empty_like(x0),
    file="q_sample",
    autograd=lambda _: (_backward, _save_times),
)
define(
    "q_sample_counter",
    "(Tensor x0, Tensor t, Tensor table, Tensor seed, Tensor image_index) -> (Tensor, Tensor)",
    _reference_counter,
    lambda x0, t, table, seed, image_index: (_empty_like(x0), _empty_like(x0)),
    file="q_sample",
    autograd=lambda _: (_backward_counter, _save_times_counter),
)
