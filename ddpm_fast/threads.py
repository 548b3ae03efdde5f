"""How many of the processor's threads a step is worth: to wake one for little work costs more than that."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .unet import UNet, UNetConfig

FLOPS_A_THREAD = 200_000_000
"""About 2 ms of work. Where another process is busy, threads that wait for each other at every op can take
fifty times as long as one; with less than this each, there is little to gain by that risk."""

MOST_COORDINATES = 16  # of what is taken for a point, and not for a flattened image or sequence


@contextmanager
def worthwhile(model: Any, x: Tensor) -> Iterator[None]:
    """As many of torch's threads as a call on x keeps busy, and afterwards as many as before.

    That is known of our U-Net, by its config, and of modules on points, x (B, D), by their parameters. It is
    the same for the same shapes, so that a run repeats to the bit. Other models and devices are left alone.
    """
    before = torch.get_num_threads()
    flops = _flops(model, x) if x.device.type == "cpu" and before > 1 else None
    if flops is None or flops >= before * FLOPS_A_THREAD:
        yield
        return
    torch.set_num_threads(max(1, flops // FLOPS_A_THREAD))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _flops(model: Any, x: Tensor) -> int | None:
    if isinstance(model, UNet):
        return _unet_flops(model.config, tuple(x.shape))
    points = x.dim() == 2 and x.shape[1] <= MOST_COORDINATES
    if isinstance(model, nn.Module) and points and all(p.dim() <= 2 for p in model.parameters()):
        return 2 * len(x) * sum(parameter.numel() for parameter in model.parameters())
    return None


@lru_cache(maxsize=64)
def _unet_flops(config: UNetConfig, shape: tuple[int, ...]) -> int:
    with torch.device("meta"), torch.no_grad():
        labels = None if config.num_class_embeds is None else torch.zeros(shape[:1], dtype=torch.int64)
        with FlopCounterMode(display=False) as counter:
            UNet(config).eval()(torch.empty(shape), torch.zeros(()), labels)
    return counter.get_total_flops()
