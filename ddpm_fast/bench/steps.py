"""A sampler's step beside the model: by itself, and in whole runs of a model that costs nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from .. import ops, steps
from ..compat.peers import diffusers
from ..sampler import METHODS, Sampler
from ..schedule import Schedule
from . import arms, plain
from .measure import Case, Quartiles, Run, measure
from .report import Table
from .settings import Settings

LOOP_SHAPE = (1, 3, 8, 8)


def step_cases(settings: Settings) -> Iterator[Case]:
    """One step, its noise drawn where the method has noise."""
    shapes = [(1, 3, 32), (8, 3, 32), (64, 3, 32), (1, 3, 256)]
    for method in ("ddpm", "ddim"):
        for b, c, h in shapes[:1] if settings.quick else shapes:
            shape = (b, c, h, h)
            builds: dict[str, Callable[[], Run]] = {
                "ours": partial(_our_step, method, shape, settings.device),
                "diffusers": partial(_their_step, method, shape, settings.device),
            }
            if method == "ddpm":
                builds["OpenAI's formula"] = partial(_formula_step, shape, settings.device)
            yield Case({"method": method, "shape": "x".join(map(str, shape))}, builds)


def loop_cases(settings: Settings) -> Iterator[Case]:
    """Whole runs of ``model(x, t) = x`` on the CPU: what a step costs the host."""
    for method in METHODS:
        for num_steps in (50,) if settings.quick else (50, 200, 1000):
            if (method, num_steps) == ("dpm_solver", 1000):
                continue  # its spacings have T - 1 steps at the most
            builds = {
                "ours": partial(_our_loop, method, num_steps),
                "diffusers": partial(diffusers.scheduler_loop, method, _nothing, LOOP_SHAPE, num_steps),
            }
            yield Case({"method": method, "steps": num_steps}, builds, calls=num_steps)


def step_table(settings: Settings) -> Table:
    cases = list(step_cases(settings))
    return arms.table(settings, "steps", "A scheduler's step", cases, rounds=30, base="ours")


def loop_table(settings: Settings) -> Table:
    title = "What a step costs beside the model: whole runs of a model that does nothing"
    return arms.table(settings, "overhead", title, list(loop_cases(settings)), rounds=20, base="ours")


def overhead(rounds: int, num_steps: int) -> Quartiles:
    """diffusers' DDIM loop against ours, of the rounds' ratios. Raises Missing without diffusers."""
    theirs = diffusers.scheduler_loop("ddim", _nothing, LOOP_SHAPE, num_steps)
    loops = {"ours": _our_loop("ddim", num_steps), "diffusers": theirs}
    return measure(loops, rounds).ratio("diffusers", "ours")


def _normal(shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, out = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
    return x, out


def _our_step(method: str, shape: tuple[int, ...], device: torch.device) -> Run:
    x, out = _normal(shape, device)
    table = METHODS[method](Schedule.linear(), 50).tensor(device)
    i = torch.tensor(25, device=device)
    counter = {"seed": torch.tensor(0, device=device), "image_index": torch.arange(len(x), device=device)}
    return lambda: ops.posterior_step(x, out, table, i, **counter)


def _their_step(method: str, shape: tuple[int, ...], device: torch.device) -> Run:
    return diffusers.scheduler_step(method, *_normal(shape, device), num_steps=50, i=25)


def _formula_step(shape: tuple[int, ...], device: torch.device) -> Run:
    x, out = _normal(shape, device)
    schedule = Schedule.linear()
    t = torch.full(shape[:1], int(steps.ddpm(schedule, 50).timesteps[25]), device=device)
    step = plain.p_sample(schedule, t)
    return lambda: step(x, out, None)


def _nothing(x: Tensor, t: Tensor) -> Tensor:
    return x


def _our_loop(method: str, num_steps: int) -> Run:
    sampler = Sampler(_nothing, Schedule.linear(), method=method, num_steps=num_steps)
    return lambda: sampler(LOOP_SHAPE[0], shape=LOOP_SHAPE[1:])
