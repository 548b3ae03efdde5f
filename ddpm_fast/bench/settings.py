"""What a run of the suite is asked for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
from tqdm import tqdm

from ..compat.peers import Missing

T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """
    Attributes:
        device: that everything runs on.
        rounds: of every measurement; None: as many as a table says for itself.
        quick: small shapes and networks, few rounds, nothing compiled: to see that all of it runs.
        network: which one is sampled and trained, by its name among google's; not with ``quick``.
        skip: parts of the names of peers that are left out.
        bar: show a progress bar on stderr.
    """

    device: torch.device = torch.device("cpu")  # noqa: RUF009
    rounds: int | None = None
    quick: bool = False
    network: str = "ddpm-cifar10-32"
    skip: tuple[str, ...] = ()
    bar: bool = False

    def rounds_or(self, usual: int) -> int:
        return self.rounds or (3 if self.quick else usual)

    def check(self, arm: str, compiles: bool = False) -> None:
        """Raises Missing for an arm that is left out: by its name, or since it takes long to compile."""
        if any(part in arm for part in self.skip):
            raise Missing("left out by --skip")
        if self.quick and compiles:
            raise Missing("--quick compiles nothing")

    def progress(self, cases: Iterable[T], name: str, total: int | None = None) -> Iterable[T]:
        return tqdm(cases, desc=name, unit="case", total=total, disable=not self.bar)
