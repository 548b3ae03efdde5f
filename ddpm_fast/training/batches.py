"""What each process sees of an update: images, and their labels, ready on the device."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .data import Images, Streamed
from .draws import Draws
from .processes import Processes

__all__ = ["Batches", "Part"]


class Part(NamedTuple):
    """What one process sees of an update at a time.

    x0 (b, ...); class labels (b,) or None; of which samples of the batch; the running number of the first.
    """

    x0: Tensor
    labels: Tensor | None
    rows: slice
    first: int


@dataclass(frozen=True)
class Batches:
    """``batches(updates)`` yields each update and this process's parts of its batch.

    Attributes:
        accumulate: parts of the batch for each process.
        unlabelled: the class that stands for none; None: the network has no classes.
        layout: of the images.
    """

    images: Images
    draws: Draws
    processes: Processes
    accumulate: int
    unlabelled: int | None
    device: torch.device
    layout: torch.memory_format

    def __call__(self, updates: range) -> Iterator[tuple[int, list[Part]]]:
        """Files are read one update ahead."""
        if not isinstance(self.images, Streamed):
            yield from ((update, self._parts(update)) for update in updates)
            return
        with ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(self._parts, updates[0]) if updates else None
            for update in updates:
                parts = ahead.result()
                ahead = pool.submit(self._parts, update + 1) if update + 1 in updates else None
                yield update, parts

    @property
    def size(self) -> int:
        """Images of a part."""
        return self.draws.batch // (self.accumulate * self.processes.count)

    def _parts(self, update: int) -> list[Part]:
        batch, processes = self.draws(update), self.processes
        parts = []
        for k in range(self.accumulate):
            first = (k * processes.count + processes.rank) * self.size
            rows = slice(first, first + self.size)
            x0, labels = self._taken(batch.indices[rows])
            if batch.flip is not None:
                flip = batch.flip[rows].to(self.device, non_blocking=True)
                x0 = torch.where(flip.reshape(-1, *[1] * (x0.dim() - 1)), x0.flip(-1), x0)
            if batch.unlabelled is not None:
                unlabelled = batch.unlabelled[rows].to(self.device, non_blocking=True)
                labels = torch.where(unlabelled, self.unlabelled, labels)
            parts.append(Part(x0.contiguous(memory_format=self.layout), labels, rows, batch.first + first))
        return parts

    def _taken(self, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.unlabelled is None:
            return self.images.take(indices).to(self.device, non_blocking=True), None
        x0, labels = self.images.take_labelled(indices)
        return x0.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
