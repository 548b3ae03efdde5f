"""Where a run's noise comes from: a counter, or torch's generators drawn as diffusers draws them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from . import ops


class Noise(Protocol):
    def x_T(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """The start of a run: float32 ``shape`` (B, ...)."""

    def counter(self) -> dict[str, Tensor]:
        """What `ops.bind_step` draws a step's noise from, if the kernel does."""

    def draw(self, x: Tensor) -> Tensor | None:
        """A step's noise, like x; None where the kernel draws it."""


@dataclass(frozen=True)
class CounterNoise:
    """Noise that the kernel draws itself, see `ops.counter_normal`: image k's depends on (seed, k, step).

    ``seed`` 0-d or (B,), ``image_index`` (B,): int64, on the run's device.
    """

    seed: Tensor
    image_index: Tensor

    def x_T(self, shape: Sequence[int], device: torch.device) -> Tensor:
        return ops.counter_normal(shape, self.seed, self.image_index, 0, stream="x_T")

    def counter(self) -> dict[str, Tensor]:
        return {"seed": self.seed, "image_index": self.image_index}

    def draw(self, x: Tensor) -> None:
        return None


@dataclass(frozen=True)
class TorchNoise:
    """Noise from torch generators with the draws of a diffusers pipeline: count, order, dtype and device.

    One generator for the batch, or one an image; a CPU generator draws on the CPU and the noise is copied to
    the run's device. ``dtype`` is what the model runs in.
    """

    generator: torch.Generator | Sequence[torch.Generator]
    dtype: torch.dtype

    def generators(self) -> tuple[torch.Generator, ...]:
        return (self.generator,) if isinstance(self.generator, torch.Generator) else tuple(self.generator)

    def draws_on(self, device: torch.device) -> bool:
        """Whether every generator is on that device, so that a CUDA graph can draw from such."""
        places = {(generator.device.type, generator.device.index) for generator in self.generators()}
        return places <= {(device.type, device.index), (device.type, None)}  # None: the current one

    def of(self, generators: Sequence[torch.Generator]) -> TorchNoise:
        """The same draws from other generators, as many."""
        one = isinstance(self.generator, torch.Generator)
        return TorchNoise(generators[0] if one else list(generators), self.dtype)

    def x_T(self, shape: Sequence[int], device: torch.device) -> Tensor:
        return self._draw(tuple(shape), device)

    def counter(self) -> dict[str, Tensor]:
        return {}

    def draw(self, x: Tensor) -> Tensor:
        return self._draw(tuple(x.shape), x.device)

    def _draw(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        def draw(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
            noise = torch.randn(shape, generator=generator, device=generator.device, dtype=self.dtype)
            return noise.to(device)

        if isinstance(self.generator, torch.Generator):
            return draw(shape, self.generator).float()
        return torch.cat([draw((1, *shape[1:]), generator) for generator in self.generator]).float()


def default_generator(device: torch.device) -> torch.Generator:
    """The one that torch draws from on that device, the CPU or a GPU, where none is given."""
    if device.type == "cpu":
        return torch.default_generator
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.cuda.default_generators[index]
