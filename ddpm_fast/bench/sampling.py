"""The U-Net's forward and whole runs, ours and every peer's; and many requests in one running batch."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from .. import checkpoint
from ..compat.peers import Missing, Network, Peer, attempt, diffusers, peers
from ..sampler import Sampler
from ..schedule import Schedule
from ..stream import Request
from ..unet import UNet
from . import arms
from .measure import Case, Run, Timing, measure
from .networks import TIME, config_of, network, ours
from .report import Column, Picture, Row, Table
from .settings import Settings

AS_SHIPPED = "diffusers, as shipped"
OURS: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours, bfloat16": {"dtype": torch.bfloat16},
    "ours, compiled": {"compile": True},
    "ours, bfloat16, compiled": {"dtype": torch.bfloat16, "compile": True},
}
NUM_STEPS = 10
"""Of a whole run by DDIM: its start weighs more than in one of 50."""

COLUMNS = [
    Column("batch", "batch", "text"),
    Column("arm", "", "text"),
    Column("time", "time", "time"),
    Column("shipped", "diffusers, as shipped / this", "ratio"),
    Column("float32", "this / ours", "ratio"),
    Column("bfloat16", "this / ours, bfloat16", "ratio"),
]
ERROR = Column("error", "error", "error")
GFLOP = Column("gflop", "GFLOP an image", "number")
LENGTHS = (10, 50)
"""Steps of the requests of `stream_table`."""


def batches(settings: Settings) -> tuple[int, ...]:
    if settings.quick:
        return (2,)
    if config_of(settings).sample_size > 64:
        return (1,)
    return (1, 8) if settings.device.type == "cpu" else (1, 8, 64, 256)


def model_of(settings: Settings) -> UNet:
    return network(config_of(settings)).to(settings.device)


def called(settings: Settings) -> str:
    return "a small U-Net" if settings.quick else f"google/{settings.network}'s U-Net, random weights"


def noise(model: UNet, batch: int) -> Tensor:
    x = torch.randn((batch, *model.sample_shape), generator=torch.Generator().manual_seed(0))
    return x.to(model.conv_in.weight.device)


def forward_cases(settings: Settings) -> Iterator[Case]:
    """One call of the network; see `networks.ours` for what ours is."""
    model = model_of(settings)
    for batch in batches(settings):
        x = noise(model, batch)
        builds: dict[str, Callable[[], Run]] = {}
        for name, build in _networks(settings, model, x).items():
            builds[name] = lambda build=build, x=x: partial(build(), x, TIME)
        yield Case({"batch": batch}, builds, calls=batch)


def run_cases(settings: Settings) -> Iterator[Case]:
    """DDIM from noise to images: our `Sampler`, diffusers' pipeline, and diffusers' loop of each peer."""
    model = model_of(settings)
    for batch in batches(settings):
        builds = _runs(settings, model, batch, _networks(settings, model, noise(model, batch)))
        yield Case({"batch": batch}, builds, calls=batch * NUM_STEPS)


def tables(settings: Settings) -> list[Table]:
    """The forward and the whole runs of every arm, its network built once."""
    title = f"A forward of {called(settings)}, an image"
    forward = Table("forward", title, [*COLUMNS, ERROR, GFLOP])
    title = f"Whole runs of {called(settings)}, {NUM_STEPS} steps of DDIM, an image and step"
    whole = Table("runs", title, COLUMNS)
    for table, what in ((forward, "forward"), (whole, "whole run, a step")):
        table.pictures = [
            Picture("bars", f"{what}, batch {batch}", "arm", "time", {"batch": batch}, ("whose",))
            for batch in batches(settings)
        ]
    model = model_of(settings)
    for batch in settings.progress(batches(settings), "forward and runs"):
        x = noise(model, batch)
        made: dict[str, Network] = {}
        for name, build in _networks(settings, model, x).items():
            try:
                made[name] = build()
            except Missing as reason:
                forward.skipped[name] = whole.skipped[name] = str(reason)
        timing = measure(
            {name: partial(call, x, TIME) for name, call in made.items()},
            settings.rounds_or(10),
            device=settings.device,
        )
        exact = made["ours"](x, TIME)
        same = {peer.name for peer in peers() if peer.converts} | OURS.keys()
        for name, call in made.items():
            row = _row(timing, batch, name, AS_SHIPPED, batch)
            if name in same:
                row["error"] = error(call(x, TIME), exact)
            else:
                row["gflop"] = _gflop(call, x)
            forward.rows.append(row)
        builds = _runs(settings, model, batch, {name: lambda call=call: call for name, call in made.items()})
        runs, skipped = Case({}, builds).built()
        whole.skipped |= skipped
        timing = measure(runs, settings.rounds_or(5), device=settings.device)
        whole.rows += [_row(timing, batch, name, AS_SHIPPED, batch * NUM_STEPS) for name in runs]
    forward.remarks = [
        "error: the largest difference to ours in float32, over its largest value. Ours has the time's part "
        "computed before, as in a run. denoising-diffusion-pytorch has another U-Net: its GFLOP are stated."
    ]
    return [forward, whole]


def _networks(settings: Settings, model: UNet, x: Tensor) -> dict[str, Callable[[], Network]]:
    """What builds each network, by name."""

    def own(name: str) -> Network:
        settings.check(name, "compile" in OURS[name])
        return ours(model, **OURS[name])

    def foreign(peer: Peer) -> Network:
        settings.check(peer.name, peer.compiles)
        return attempt(partial(peer.build, model, x), x, TIME)

    builds: dict[str, Callable[[], Network]] = {name: partial(own, name) for name in OURS}
    return builds | {peer.name: partial(foreign, peer) for peer in peers()}


def _runs(
    settings: Settings, model: UNet, batch: int, networks: dict[str, Callable[[], Network]]
) -> dict[str, Callable[[], Run]]:
    shape = (batch, *model.sample_shape)

    def own(name: str) -> Run:
        settings.check(name, "compile" in OURS[name])
        sampler = Sampler(model, Schedule.linear(), method="ddim", num_steps=NUM_STEPS, **OURS[name])
        return lambda: sampler(batch)

    def foreign(build: Callable[[], Network]) -> Run:
        return diffusers.ddim_run(build(), shape, NUM_STEPS, settings.device)

    builds: dict[str, Callable[[], Run]] = {}
    for name, build in networks.items():
        if name in OURS:
            builds[name] = partial(own, name)
        elif name == AS_SHIPPED:
            builds[name] = partial(diffusers.pipeline_run, model, batch, NUM_STEPS)
        else:
            builds[name] = partial(foreign, build)
    return builds


def _row(timing: Timing, batch: int, name: str, shipped: str, calls: int) -> Row:
    whose = "ours" if name in OURS else "peers"
    row: Row = {"batch": batch, "arm": name, "whose": whose, "time": timing.time(name, calls)}
    for key, slow, fast in (
        ("shipped", shipped, name),
        ("float32", name, "ours"),
        ("bfloat16", name, "ours, bfloat16"),
    ):
        if slow != fast and {slow, fast} <= timing.seconds.keys():
            row[key] = timing.ratio(slow, fast)
    return row


def error(out: Tensor, exact: Tensor) -> float:
    """The largest difference, over the largest value."""
    return ((out.float() - exact).abs().max() / exact.abs().max()).item()


def _gflop(call: Network, x: Tensor) -> float:
    with FlopCounterMode(display=False) as counter:
        call(x, TIME)
    return counter.get_total_flops() / len(x) / 1e9


def stream_cases(settings: Settings) -> Iterator[Case]:
    """The same requests, of 10 and 50 steps, of the bundled digits, three ways.

    In batches that compute all their places until the longest request is done; in batches that drop a place
    when its request is done, but take no new one; and in one running batch.
    """
    batch, count = (2, 4) if settings.quick else (8, 96)
    model, schedule, options = checkpoint.load(checkpoint.DIGITS)
    options = {"prediction": options["prediction"], "method": "ddim"}
    model = model.to(settings.device)
    samplers = {n: Sampler(model, schedule, num_steps=n, **options) for n in LENGTHS}
    choose = random.Random(0)
    requests = [Request(image_index=k, num_steps=choose.choice(LENGTHS)) for k in range(count)]
    groups = [requests[k : k + batch] for k in range(0, count, batch)]
    longest = samplers[LENGTHS[-1]]

    def full() -> None:
        for group in groups:
            slowest = max(request.num_steps for request in group)
            samplers[slowest](len(group), first_image=group[0].image_index)

    def shrinking() -> None:
        for group in groups:
            list(longest.stream(group, batch_size=batch))

    def stream() -> None:
        list(longest.stream(requests, batch_size=batch))

    runs: dict[str, Run] = {"full batches": full, "shrinking batches": shrinking, "stream": stream}
    yield Case({"batch": batch}, {name: lambda run=run: run for name, run in runs.items()}, calls=count)


def stream_table(settings: Settings) -> Table:
    """Time an image."""
    title = f"Requests of {LENGTHS[0]} and {LENGTHS[1]} steps, mixed: the digits; an image"
    return arms.table(settings, "stream", title, list(stream_cases(settings)), rounds=5, base="stream")
