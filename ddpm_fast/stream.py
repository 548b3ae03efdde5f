"""Continuous batching: requests join and leave a running batch at any step, each with steps of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops
from .convolution import Packs, packed_bytes, packing
from .cuda_graph import CapturedStep, Graphs
from .engine import Buffers, Network, advancing, evaluating
from .schedule import check_int
from .steps import StepTable
from .threads import worthwhile


@dataclass(frozen=True, eq=False)
class Request:
    """One image that is asked for.

    Attributes:
        seed, image_index: image ``image_index`` of the runs with that seed, by the counter noise.
        num_steps: of its own; None for the sampler's.
        x_T: its start, a floating tensor of one image's shape; None to draw it.
        clip: bound of the absolute value of x0, infinity for none; None for the sampler's.
    """

    seed: int = 0
    image_index: int = 0
    num_steps: int | None = None
    x_T: Tensor | None = None
    clip: float | None = None


@dataclass
class _Place:
    """A sample of the batch: whose it is, and the steps that it still has to go."""

    request: Request
    left: int


class Stream:
    """A running batch whose samples each stand at a row of their own, in tables stacked by their lengths.

    A sample's noise is drawn by its own step, which is its row less the offset of its table. Launched from
    the host, the live samples are the first of the batch, and only they are computed; a captured step
    computes every place.
    """

    def __init__(
        self,
        network: Network,
        graphs: Graphs,
        table_of: Callable[[int], StepTable],
        table: StepTable,
        clip: float | None,
        shape: tuple[int, ...],
        batch_size: int,
        device: torch.device,
    ) -> None:
        self.network, self.graphs, self.table_of, self.default = network, graphs, table_of, table
        self.clip = math.inf if clip is None else clip
        self.offsets: dict[int, int] = {}
        self.used, self.draws = 0, False
        self.places: list[_Place | None] = [None] * batch_size
        self.advance: Callable[[], None] | None = None
        self.packs: Packs = {}
        self.bound = 0  # how many samples `advance` moves on
        self.captured: CapturedStep | None = None

        def zeros(*size: int, dtype: torch.dtype = torch.int64) -> Tensor:
            with torch.inference_mode(False):
                return torch.zeros(size, dtype=dtype, device=device)

        self.buffers = Buffers(
            x=zeros(batch_size, *shape, dtype=torch.float32),
            x0=None,
            i=zeros(batch_size),
            table=zeros(0, table.rows.shape[1], dtype=torch.float32),
            timesteps=zeros(0),
            seed=zeros(batch_size),
            image_index=zeros(batch_size),
            step=zeros(batch_size),
            clip=zeros(batch_size, dtype=torch.float32),
        )

    def serve(self, requests: Iterator[Request]) -> Iterator[tuple[Request, Tensor]]:
        """Yield each request with its image when that is finished; see `Sampler.stream`."""
        try:
            while True:
                free = [k for k, place in enumerate(self.places) if place is None]
                come = list(zip(free, requests, strict=False))
                if not come and len(free) == len(self.places):
                    return
                with self._running():
                    for k, request in come:
                        self._join(k, request)
                    images = self._next_images()
                yield from images
        finally:
            self.graphs.packed(packed_bytes(self.packs))
            self._release()

    @contextmanager
    def _running(self) -> Iterator[None]:
        model = self.network.model
        threads, packs = worthwhile(model, self.buffers.x), packing(self.packs, self.network.low_memory)
        with torch.inference_mode(False), evaluating(model), packs, threads:
            yield  # out of the caller's inference mode, since the buffers outlive it

    def _next_images(self) -> list[tuple[Request, Tensor]]:
        """Step until a request is done: those that are, whose places are free then."""
        done: list[int] = []
        while not done:
            self._step()
            done = [k for k, place in enumerate(self.places) if place and not place.left]
        images = [(self.places[k].request, self.buffers.x[k].clone()) for k in done]
        for k in done:
            self.places[k] = None
        return images

    def _join(self, k: int, request: Request) -> None:
        """Put a request's first state into place k."""
        if not isinstance(request, Request):
            raise TypeError(f"requests must hold Request, got {type(request).__name__}")
        clip = self.clip if request.clip is None else request.clip
        if isinstance(clip, bool) or not isinstance(clip, (int, float)) or not clip > 0:
            raise ValueError(f"a request's clip must be None or a positive number, got {clip!r}")
        shape, device = self.buffers.x.shape[1:], self.buffers.x.device
        x_T = request.x_T
        if x_T is not None and (
            not isinstance(x_T, Tensor) or not x_T.is_floating_point() or x_T.shape != shape
        ):
            given = f"{tuple(x_T.shape)} {x_T.dtype}" if isinstance(x_T, Tensor) else type(x_T).__name__
            raise ValueError(
                f"a request's x_T must be a floating Tensor of shape {tuple(shape)}, got {given}"
            )
        seed = ops.as_seed(request.seed, 1, device)
        image_index = check_int("a request's image_index", request.image_index, 0, 2**62)
        image_index = ops.as_image_index(image_index, 1, device)
        num_steps = len(self.default)
        if request.num_steps is not None:
            num_steps = check_int("a request's num_steps", request.num_steps, 1)
        if num_steps not in self.offsets:
            self._stack(self.default if num_steps == len(self.default) else self.table_of(num_steps))
        if x_T is None:
            x_T = ops.counter_normal((1, *shape), seed, image_index, 0, stream="x_T")[0]

        buffers = self.buffers
        buffers.x[k].copy_(x_T)
        buffers.i[k].fill_(self.offsets[num_steps])
        buffers.step[k].zero_()
        buffers.clip[k].fill_(clip)
        buffers.seed[k].copy_(seed.reshape(()))
        buffers.image_index[k].copy_(image_index[0])
        self.places[k] = _Place(request, num_steps)

    def _stack(self, table: StepTable) -> None:
        """Put a table under those that are there. Room grows by doubling: each time, a step is bound anew."""
        offset, self.used = self.used, self.used + len(table)
        draws = self.draws or bool(table.column("x_from_noise").any())
        needs_x0 = table.uses_x0_prev and self.buffers.x0 is None
        anew = self.used > len(self.buffers.table) or draws != self.draws or needs_x0
        if anew:
            room = max(64, 1 << (self.used - 1).bit_length())
            old = self.buffers.clone()
            self._release()
            self.buffers = replace(
                old,
                x0=torch.zeros_like(old.x) if needs_x0 else old.x0,
                table=F.pad(old.table[:offset], (0, 0, 0, room - offset)),
                timesteps=F.pad(old.timesteps[:offset], (0, room - offset)),
            )
        self.draws = draws
        self.offsets[len(table)] = offset
        device = self.buffers.x.device
        self.buffers.table[offset : self.used].copy_(table.tensor(device))
        self.buffers.timesteps[offset : self.used].copy_(table.timesteps_tensor(device))
        rows = self.network.time_rows(self.buffers.timesteps)
        if anew:
            self.buffers = replace(self.buffers, rows=rows)
        elif rows is not None:
            self.buffers.rows.values.copy_(rows.values)

    def _step(self) -> None:
        if self.advance is None:
            settings = (
                "stream",
                self.draws,
                self.network.compile,
                self.network.dtype,
                self.network.channels_last,
            )
            self.captured = self.graphs.take(self.buffers, self._bind, (), settings)
            if self.captured is not None:
                self.buffers = self.captured.buffers
                self.advance = partial(self.graphs.replay, self.captured)
        if self.captured is None:
            live = self._close_ranks()
            if live != self.bound:
                self.advance, self.bound = self._bind(self.buffers.first(live), ()), live
        self.advance()
        for place in filter(None, self.places):
            place.left -= 1

    def _bind(self, buffers: Buffers, generators: Sequence[torch.Generator]) -> Callable[[], None]:
        step, last = self.network.bind(buffers, None), len(buffers.table) - 1

        def draw() -> Tensor | None:
            if not self.draws:
                return None
            return ops.counter_normal(buffers.x.shape, buffers.seed, buffers.image_index, buffers.step)

        advance = advancing(step, buffers, draw)

        def tick() -> None:
            advance()
            buffers.i.clamp_(max=last)  # an empty place goes on and on
            buffers.step.add_(1)

        return tick

    def _close_ranks(self) -> int:
        """Move the last samples into empty places, so that the live ones are the first; how many they are."""
        live = sum(place is not None for place in self.places)
        for k in range(live):
            if self.places[k] is None:
                last = max(j for j, place in enumerate(self.places) if place is not None)
                self.buffers.move(last, k)
                self.places[k], self.places[last] = self.places[last], None
        return live

    def _release(self) -> None:
        """Let another run have the captured step."""
        if self.captured is not None:
            self.graphs.give_back(self.captured)
        self.captured, self.advance, self.bound = None, None, 0
