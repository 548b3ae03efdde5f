"""One process or several: who this one is, and the little that they say to each other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Processes", "joined"]


@dataclass(frozen=True)
class Processes:
    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """Of all processes' values, the same in each."""
        if self.count > 1:
            values = values.clone()
            dist.all_reduce(values)
            values /= self.count
        return values

    def gathered(self, values: Tensor) -> Tensor:
        """All processes' values, (count, *shape), the same in each."""
        if self.count == 1:
            return values[None]
        found = [torch.empty_like(values) for _ in range(self.count)]
        dist.all_gather(found, values.contiguous())
        return torch.stack(found)

    def wait(self) -> None:
        if self.count > 1:
            dist.barrier()


@contextmanager
def joined(device: torch.device) -> Iterator[tuple[Processes, torch.device]]:
    """Within, this process beside those that ``torchrun`` started, and its device: on CUDA its own."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Processes(), device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(dist.get_rank(), count), device
    finally:
        dist.destroy_process_group()
