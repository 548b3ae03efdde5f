"""Counter noise: image k of a run is the same whatever the batch, the process or the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from ._checks import as_image_index, as_index, as_seed, check_range
from ._dispatch import choose, define, implementation

STREAMS = {
    "x_T": reference.STREAM_X_T,
    "step": reference.STREAM_STEP,
    "training": reference.STREAM_TRAINING,
}


def counter_normal(
    shape: Sequence[int],
    seed: int | Tensor,
    image_index: int | Tensor,
    step: int | Tensor,
    *,
    stream: str = "step",
    device: torch.device | str | None = None,
    backend: str | None = None,
) -> Tensor:
    """Standard normal noise that is a function of (seed, image, stream, step, element) and nothing else.

    Philox4x32-10 (Salmon et al. 2011) and Box-Muller; `reference.counter_normal` is the definition. The
    integer stage is bit-exact between backends, the float stage agrees to 1e-6.

    Args:
        shape: ``(B, ...)`` of the result; elements are counted in this order within a sample.
        seed: 64 bits, an int or an int64 tensor, 0-d or ``(B,)``.
        image_index: ``(B,)`` int64; an int k stands for k, k + 1, ...
        step: the step of the run, an int or an int64 tensor, 0-d or ``(B,)``, in [0, 2**28).
        stream: what it is for: "x_T", "step" or "training"; streams never meet.
        device: of the result where no argument is a tensor; default the CPU.
        backend: "native", "triton", "reference", or None for the fastest here.

    Returns:
        float32 ``shape``, contiguous.

    Raises:
        TypeError, ValueError: an argument of a wrong kind, dtype, shape, range or device.
        IndexError: a step outside its range (on a GPU, which is not asked, another stream's noise).
        RuntimeError: a backend named that cannot run here.
    """
    shape = tuple(shape)
    if not shape:
        raise ValueError("shape must have a batch dimension, got ()")
    if stream not in STREAMS:
        raise ValueError(f"stream={stream!r} is not known; allowed: {', '.join(STREAMS)}")
    given = next((v.device for v in (image_index, seed, step) if isinstance(v, Tensor)), None)
    device = given if given is not None else torch.device(device or "cpu")
    seed = as_seed(seed, shape[0], device)
    image_index = as_image_index(image_index, shape[0], device)
    step = as_index("step", step, shape[0], device)
    check_range("step", step, 2**28)  # past which it would count as another stream
    proxy = torch.empty(0, dtype=torch.float32, device=device)
    run = implementation("counter_normal", choose("counter_normal", backend, proxy), reference.counter_normal)
    return run(shape, seed, image_index, step, STREAMS[stream])


def philox4x32_10(counter: Tensor, key: Tensor, *, backend: str | None = None) -> Tensor:
    """The integer stage by itself, for known-answer tests.

    ``counter`` (n, 4) and ``key`` (n, 2) -> (n, 4), uint32 words held in int64.
    """
    proxy = torch.empty(0, dtype=torch.float32, device=counter.device)
    chosen = choose("counter_normal", backend, proxy)
    return implementation("philox4x32_10", chosen, reference.philox4x32_10)(counter, key)


define(
    "counter_normal",
    "(SymInt[] shape, Tensor seed, Tensor image_index, Tensor step, int stream) -> Tensor",
    reference.counter_normal,
    lambda shape, seed, image_index, step, stream: image_index.new_empty(shape, dtype=torch.float32),
    file="counter_normal",
)
define(
    "philox4x32_10",
    "(Tensor counter, Tensor key) -> Tensor",
    reference.philox4x32_10,
    lambda counter, key: torch.empty_like(counter),
    file="counter_normal",
)
