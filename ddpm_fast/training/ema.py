"""Averages of the weights over a run."""

from __future__ import annotations

import copy

import torch
from torch import nn

__all__ = ["Ema"]


class Ema:
    """A copy of a model in eval mode, whose parameters are the exponential average of the model's.

    Equivalent to, at update 0, 1, ...::

        r = min(rate, (1 + update) / (10 + update))      # so that the first weights are soon forgotten
        average = r * average + (1 - r) * parameter      # in one kernel for many tensors

    Buffers are copied. It asks the host nothing.
    """

    def __init__(self, model: nn.Module, rate: float) -> None:
        self.rate = rate
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self._averages, self._values = list(self.model.parameters()), list(model.parameters())
        self._buffers = list(zip(self.model.buffers(), model.buffers(), strict=True))

    @torch.no_grad()
    def update(self, update: int) -> None:
        rate = min(self.rate, (1 + update) / (10 + update))
        torch._foreach_lerp_(self._averages, self._values, 1 - rate)
        for mine, theirs in self._buffers:
            mine.copy_(theirs)
