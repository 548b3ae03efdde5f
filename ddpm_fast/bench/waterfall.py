"""What each technique gives: one more is switched on in every row, from diffusers' U-Net as it is shipped."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import ops, steps
from ..compat.peers import Missing, Network, attempt, diffusers, peers
from ..convolution import can_pack
from ..ops import _dispatch
from ..sampler import Sampler
from ..schedule import Schedule
from ..unet import UNet
from . import plain, sampling
from .measure import Run, measure
from .networks import TIME, ours
from .report import Column, Picture, Row, Table
from .settings import Settings

NOTHING = dict.fromkeys(("channels_last", "packed", "own", "fused", "rows", "replayed"), False)
EAGER = "eager: diffusers, as shipped"
TECHNIQUES: dict[str, dict[str, Any]] = {
    "the same in our modules": {},
    "channels_last": {"channels_last": True},
    "prepacked weights": {"packed": True},
    "fused ops": {"fused": True},
    "time tables": {"rows": True},
    "own kernels": {"own": True},
    "replayed ops": {"replayed": True},
    "bfloat16": {"dtype": torch.bfloat16},
    "compile": {"compile": True},
}
"""What each row sets, on top of the rows above it; the arguments of `networks.ours`."""
GRAPH = "CUDA graph"
NUM_STEPS = 50
"""Of what a call is on a GPU, so that the host is ahead of it, as in a run. On the CPU a call is one step."""

COLUMNS = [
    Column("batch", "batch", "text"),
    Column("technique", "technique", "text"),
    Column("time", "time", "time"),
    Column("eager", "eager / this", "ratio"),
    Column("before", "row above / this", "ratio"),
    Column("error", "error", "error"),
]
BESIDE = (
    "ONNX Runtime",
    "OpenVINO",
    "OpenVINO, bfloat16",
    "diffusers, compiled, frozen",
    "diffusers, bfloat16, compiled, frozen",
)
"""Peers whose network is measured in the same rounds, at the end of the table."""

Update = Callable[[Tensor, Tensor], Tensor]
"""``update(x, out) -> x_next``."""


def table(settings: Settings) -> Table:
    """A step of DDPM, network and update, by batch: time an image, ratios, error of the network's output."""
    found = Table(
        "waterfall",
        f"The waterfall: a step of DDPM with {sampling.called(settings)}, an image",
        COLUMNS,
        remarks=[
            "Each row keeps the techniques above it. error: of the network's output against the first row's, "
            "the largest difference over the largest value."
        ],
    )
    model = sampling.model_of(settings)
    batches = [batch for batch in sampling.batches(settings) if batch <= 8]
    found.pictures = [
        Picture("bars", f"a step, batch {batch}", "technique", "time", {"batch": batch}, ("whose",))
        for batch in batches
    ]
    for batch in settings.progress(batches, "waterfall"):
        networks, runs, missing = _arms(settings, model, batch)
        found.skipped |= missing
        timing = measure(runs, settings.rounds_or(10), device=settings.device)
        x = sampling.noise(model, batch)
        first = next(iter(networks))
        exact, before = networks[first](x, TIME).float(), None
        for name in (EAGER, *TECHNIQUES, GRAPH, *BESIDE):
            whose = "peers" if name in (EAGER, *BESIDE) else "techniques, one more in each"
            row: Row = {"batch": batch, "technique": name, "whose": whose}
            found.rows.append(row)
            if name not in runs:
                row["technique"] += ": not measured"
                continue
            row["time"] = timing.time(name, batch * _calls(settings))
            if name != first:
                row["eager"] = timing.ratio(first, name)
            if before is not None and name not in BESIDE:
                row["before"] = timing.ratio(before, name)
            if name in networks:
                row["error"] = sampling.error(networks[name](x, TIME), exact)
            before = name
    return found


def _arms(
    settings: Settings, model: UNet, batch: int
) -> tuple[dict[str, Network], dict[str, Run], dict[str, str]]:
    """The networks and the steps that can run here, and why the others cannot."""
    x = sampling.noise(model, batch)
    networks: dict[str, Network] = {}
    runs: dict[str, Run] = {}
    missing: dict[str, str] = {}
    known = {peer.name: peer for peer in peers()}

    def theirs(name: str) -> Network:
        settings.check(name, known[name].compiles)
        return attempt(partial(known[name].build, model, x), x, TIME)

    def add(name: str, build: Callable[[], Network], update: Callable[[], Update]) -> None:
        try:
            networks[name] = build()
            runs[name] = partial(_steps, settings, networks[name], update(), x)
        except Missing as reason:
            missing[name] = str(reason)

    add(EAGER, partial(theirs, sampling.AS_SHIPPED), partial(diffusers.ddpm_update, TIME))
    on = dict(NOTHING)
    for name, technique in TECHNIQUES.items():
        on |= technique
        update = _fused_update if on["fused"] else _plain_update
        add(name, partial(_ours, settings, model, name, dict(on)), partial(update, x))
    if settings.device.type == "cuda":
        options = {"dtype": torch.bfloat16, "compile": not settings.quick, "graph": True}
        sampler = Sampler(model, Schedule.linear(), num_steps=NUM_STEPS, **options)
        runs[GRAPH] = lambda: sampler(batch)
    else:
        missing[GRAPH] = "it needs a CUDA device"
    for name in BESIDE:
        add(name, partial(theirs, name), partial(diffusers.ddpm_update, TIME))
    return networks, runs, missing


def _ours(settings: Settings, model: UNet, name: str, on: dict[str, Any]) -> Network:
    """Raises Missing for a technique that changes nothing here: its row would be the row above."""
    device = settings.device.type
    if name in ("prepacked weights", "own kernels", "replayed ops"):
        if device != "cpu":
            raise Missing("it is for the CPU")
        if name != "replayed ops" and not can_pack(torch.float32):
            raise Missing("this torch has no oneDNN that lays out weights")
    op = {"fused ops": "group_norm_silu", "own kernels": "conv3x3"}.get(name)
    if op and _dispatch.FASTEST[op, device, torch.float32] == "reference":
        raise Missing(f"there is no {op} kernel here")
    settings.check(name, "compile" in on)
    return ours(model, **on)


def _calls(settings: Settings) -> int:
    return 1 if settings.device.type == "cpu" else NUM_STEPS


def _steps(settings: Settings, network: Network, update: Update, x: Tensor) -> Tensor:
    for _ in range(_calls(settings)):
        x_next = update(x, network(x, TIME))
    return x_next


def _plain_update(x: Tensor) -> Update:
    step = plain.p_sample(Schedule.linear(), torch.full((len(x),), TIME, device=x.device))
    return lambda x, out: step(x, out.float(), None)


def _fused_update(x: Tensor) -> Update:
    table = steps.ddpm(Schedule.linear()).tensor(x.device)
    i = torch.tensor(len(table) - 1 - TIME, device=x.device)
    counter = {"seed": torch.tensor(0, device=x.device), "image_index": torch.arange(len(x), device=x.device)}
    return lambda x, out: ops.posterior_step(x, out, table, i, **counter)[0]
