"""`verify`: an original and what this package makes of it, side by side on the same start and noise."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ...engine import evaluating
from ...schedule import check_int, check_number
from .pair import PIPELINES, Pair, load, pair_of
from .verification import TOLERANCES, Verification

FEW_STEPS = 50
"""Steps of a run where they are not given, and the most that a timed one takes."""
ROUNDS = 3
"""Timed runs of each, in turns, after one that is not timed."""


def verify(
    pipe_or_model: Any,
    *,
    shape: Sequence[int] | None = None,
    method: str | None = None,
    batch_size: int = 1,
    num_steps: int | None = None,
    eta: float = 0.0,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    tolerance: tuple[float, float] | None = None,
    progress: bool = False,
) -> Verification:
    """Run an original as it is and what this package makes of it, on the same start and noise.

    Each runs once with its state looked at after every step, which keeps the original's N states in memory,
    and four times against the clock, in turns. What is given is left as it was.

    A network that is not trained amplifies what a step rounds, in DDIM a thousandfold within 50 steps: its
    images can differ past tolerance though every step is right. The errors of the first steps tell.

    Args:
        pipe_or_model: a diffusers ``DDPMPipeline`` or ``DDIMPipeline``, or ours, which is compared with
            theirs; a ``UNet2DModel``, with the schedule of Ho et al. 2020; a folder of one of these, or a
            checkpoint of ours. Any other module ``model(x, t) -> out`` is run in the naive loop (Ho et al.
            2020, algorithm 2) and, its GroupNorm and SiLU fused in a copy, in `Sampler`; so is our
            checkpoint.
        shape: of one sample, without the batch, for a module that has no ``sample_shape``.
        method: "ddpm" or "ddim"; None: the pipeline's or the checkpoint's own, and "ddpm" for a model.
        batch_size: images of a run.
        num_steps: steps of a run; None: at most 50.
        eta: of ddim only, see `steps.ddim`.
        seed: of the generators, on the CPU, that both draw from.
        dtype: what ours runs the model in; the original stays as it is.
        device: where a folder is loaded to; None: the CPU. What is live stays where it is.
        tolerance: the largest shares of pixel values that may differ by one level, and by more; None:
            `TOLERANCES` of the lower of the two dtypes.
        progress: show a bar on stderr.

    Raises:
        TypeError, ValueError: an argument of a wrong kind or value, or one that has no meaning here.
        OSError: no such folder, or a file is missing in it or damaged.
        RuntimeError: the two runs go through different timesteps.
    """
    batch_size = check_int("batch_size", batch_size, 1)
    seed = check_int("seed", seed, -(2**63), 2**64 - 1)
    eta = check_number("eta", eta, lambda value: 0 <= value < math.inf, "finite and at least 0")
    if num_steps is not None:
        num_steps = check_int("num_steps", num_steps, 1)
    if method not in (None, *PIPELINES):
        raise ValueError(f"method={method!r} is not known; allowed: {', '.join(PIPELINES)}")
    if dtype not in (None, *TOLERANCES):
        raise ValueError(f"dtype must be None, float32, float16 or bfloat16, got {dtype}")
    if tolerance is not None:
        tolerance = _check_tolerance(tolerance)
    if isinstance(pipe_or_model, (str, os.PathLike)):
        pipe_or_model = load(Path(pipe_or_model), device)
    elif device is not None:
        raise ValueError("device is where a folder is loaded to; a live pipeline or model stays where it is")
    pair = pair_of(pipe_or_model, shape, method, batch_size, eta, seed, dtype)
    if num_steps is None:
        num_steps = min(FEW_STEPS, pair.most_steps)
    if tolerance is None:
        tolerance = TOLERANCES[max(torch.float32, *pair.dtypes, key=lambda kind: torch.finfo(kind).eps)]
    timed_steps = min(num_steps, FEW_STEPS)
    total = 2 * (num_steps + (1 + ROUNDS) * timed_steps)
    with evaluating(pair.model), tqdm(total=total, desc="verify", unit="step", disable=not progress) as bar:
        measured = _compare(pair, num_steps, bar)
        seconds = _race(pair, timed_steps, bar)
    return Verification(
        names=pair.names,
        method=pair.method,
        tolerance=tolerance,
        timed_steps=timed_steps,
        seconds=seconds,
        **measured,
    )


def _compare(pair: Pair, num_steps: int, bar: tqdm) -> dict[str, Any]:
    """A run of each, ours beside the original's states: what they fill of a `Verification`."""
    states: list[tuple[int, Tensor]] = []
    times, errors, relative_errors = [], [], []

    def keep(t: int, x: Tensor) -> None:
        states.append((t, x.clone()))
        bar.update()

    def compare(t: int, x: Tensor) -> None:
        if len(times) < len(states):
            expected = states[len(times)][1].float()
            error = (expected - x.float()).abs().max()
            errors.append(error.item())
            relative_errors.append((error / expected.abs().max()).item())
        times.append(t)
        bar.update()

    original = pair.original(num_steps, keep)
    ours = pair.ours(num_steps, compare)
    timesteps = [t for t, _ in states]
    if times != timesteps:
        raise RuntimeError(f"ours went through the timesteps {times}, the original through {timesteps}")
    levels = (original.int() - ours.int()).abs()
    return {
        "timesteps": tuple(timesteps),
        "errors": tuple(errors),
        "relative_errors": tuple(relative_errors),
        "off_by_one": (levels == 1).double().mean().item(),
        "off_by_more": (levels > 1).double().mean().item(),
        "original": original,
        "ours": ours,
    }


def _race(pair: Pair, num_steps: int, bar: tqdm) -> tuple[float, float]:
    """Medians of the seconds that a run of each takes, in turns, after one that is not timed."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for round_ in range(1 + ROUNDS):
        for taken, run in zip(seconds, (pair.original, pair.ours), strict=True):
            start = time.perf_counter()
            run(num_steps)
            if round_ > 0:
                taken.append(time.perf_counter() - start)
            bar.update(num_steps)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def _check_tolerance(tolerance: Any) -> tuple[float, float]:
    if not isinstance(tolerance, Sequence) or len(tolerance) != 2:
        raise TypeError(f"tolerance must be two shares, of values off by one and by more, got {tolerance!r}")
    one, more = (
        check_number(f"tolerance[{k}]", share, lambda value: 0 <= value <= 1, "in [0, 1]")
        for k, share in enumerate(tolerance)
    )
    return one, more
