"""`Run`: a run of `Sampler` under way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from .convolution import Packs, packed_bytes, packing
from .cuda_graph import Graphs
from .engine import Buffers, Network, Step, advancing
from .guidance import Classifier
from .noise import Noise, TorchNoise
from .steps import StepTable
from .threads import worthwhile


class Run:
    """A run under way: what every step reads and writes, and how it is launched."""

    def __init__(
        self,
        table: StepTable,
        clip: float | None,
        network: Network,
        graphs: Graphs,
        x: Tensor,
        noise: Noise,
        stores_x0: bool,
        class_labels: Tensor | None,
        guidance_scale: Tensor | None,
        classifier: Classifier | None,
    ) -> None:
        timesteps = table.timesteps_tensor(x.device)
        self.noise, self.draws = noise, table.draws.tolist()
        self.graphs = graphs
        self.packs: Packs = {}
        self.network = network
        self.fed = len(x) if guidance_scale is None else 2 * len(x)  # samples that the model sees at a time
        indices = torch.arange(len(table), device=x.device).unbind()
        buffers = Buffers(
            x=x,
            x0=torch.empty_like(x) if stores_x0 or table.uses_x0_prev else None,
            i=indices[0],
            table=table.tensor(x.device),
            timesteps=timesteps,
            class_labels=class_labels,
            guidance_scale=guidance_scale,
            rows=network.time_rows(timesteps),
            **noise.counter(),
        )
        drawing = isinstance(noise, TorchNoise) and any(self.draws)
        self.generators = noise.generators() if drawing and noise.draws_on(x.device) else ()
        self.noise_is_given = drawing and not self.generators

        def bind(buffers: Buffers, own: Sequence[torch.Generator]) -> Callable[[], None]:
            drawn = noise.of(own) if own else None
            step = network.bind(buffers, clip)
            return advancing(step, buffers, lambda: drawn.draw(buffers.x) if own else buffers.noise)

        inputs = replace(buffers, noise=torch.zeros_like(x)) if self.noise_is_given else buffers
        settings = clip, network.compile, network.dtype, network.channels_last, len(self.generators)
        self.captured = None
        if classifier is None:
            self.captured = self.graphs.take(inputs, bind, self.generators, settings)
        else:
            self.graphs.refuse("cond_fn may do anything")
        if self.captured is not None:
            self.x, self.x0 = self.captured.buffers.x, self.captured.buffers.x0
            self.step = self._replay
            return
        self.x, self.x0 = buffers.x, buffers.x0
        step = network.bind(buffers, clip, classifier)
        self.step = self._launching(step, indices, timesteps)

    def _launching(self, step: Step, indices: Sequence[Tensor], timesteps: Tensor) -> Callable[[int], None]:
        """Indices and times as views that are made once: cheaper than an increment and a look-up a step."""
        x, draw, draws = self.x, self.noise.draw, self.draws
        times = timesteps[:, None].expand(-1, len(x)).unbind()

        def launch(i: int) -> None:
            step(indices[i], times[i], draw(x) if draws[i] else None)

        return launch

    def _replay(self, i: int) -> None:
        """The noise of torch's generators is drawn at just the steps at which diffusers draws."""
        if self.noise_is_given and self.draws[i]:
            self.captured.buffers.noise.copy_(self.noise.draw(self.x))
        for own, given in zip(self.captured.generators, self.generators, strict=True):
            own.set_state(given.get_state())
        self.graphs.replay(self.captured)
        if self.draws[i]:
            for own, given in zip(self.captured.generators, self.generators, strict=True):
                given.set_state(own.get_state())

    def result(self) -> Tensor:
        """x, which no later run writes to."""
        return self.x if self.captured is None else self.x.clone()

    @contextmanager
    def computing(self) -> Iterator[None]:
        """As many threads as a step keeps busy, and weights laid out for the processor."""
        fed = self.x if self.fed == len(self.x) else self.x[:1].expand(self.fed, *self.x.shape[1:])
        with worthwhile(self.network.model, fed), packing(self.packs, self.network.low_memory):
            yield

    def close(self) -> None:
        """Let another run have the captured step."""
        self.graphs.packed(packed_bytes(self.packs))
        if self.captured is not None:
            self.graphs.give_back(self.captured)
