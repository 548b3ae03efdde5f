"""A model that is asked for the x0 of given images, at any of their noise levels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from .. import ops
from ..convolution import packing
from ..engine import Model, Network, evaluating
from ..guidance import as_labels
from ..losses import bound_term, log_variances
from ..reference import per_sample
from ..sampler import Progress, Sampler
from ..schedule import Schedule, check_int
from ..threads import worthwhile


class Read(NamedTuple):
    """Of some pairs the images; and what the model says: their x0, clipped and as it was; the v."""

    images: Tensor
    x0: Tensor
    raw: Tensor
    v: Tensor | None


class Reader:
    """A model that is asked for the x0 of given images, noised to time t. Made before any work: it checks."""

    def __init__(
        self,
        model: Model,
        schedule: Schedule,
        x0: Tensor,
        prediction: str,
        variance: str,
        clip: float | None,
        seed: int,
        first_image: int,
        class_labels: Tensor | None,
        batch_size: int,
        progress: bool | Progress,
    ) -> None:
        check_schedule(schedule)
        if not isinstance(x0, Tensor) or x0.dtype not in (torch.float32, torch.float64) or x0.dim() < 2:
            raise TypeError(f"x0 must be float32 or float64, of at least two dimensions, got {told(x0)}")
        # Of all T steps: its table has the weights of x0, and it knows how the model is best fed.
        run = Sampler(model, schedule, prediction=prediction, variance=variance, clip=clip, graph=False)
        device, dtype = x0.device, x0.dtype
        check_device("x0", x0, model)
        if not x0.numel():
            raise ValueError(f"x0 must not be empty, got {told(x0)}")
        low, high = (float(end) for end in x0.aminmax())
        if not (low >= -1 and high <= 1):
            raise ValueError(f"x0 must be in [-1, 1], as images are scaled, got [{low:g}, {high:g}]")
        class_labels = as_labels(run.model, class_labels, len(x0), device)
        if not isinstance(progress, bool) and not callable(progress):
            raise TypeError(f"progress must be True, False or a function, got {type(progress).__name__}")
        self.x0, self.schedule, self.class_labels, self.progress = x0, schedule, class_labels, progress
        self.batch_size = check_int("batch_size", batch_size, 1)
        self.seed = ops.as_seed(seed, len(x0), device)
        self.images = ops.as_image_index(check_int("first_image", first_image, 0, 2**62), len(x0), device)
        self.learned, self.gives_mean = variance == "learned_range", prediction == "mean"
        self.model, self.clip = run.model, run.clip
        self._options: dict[str, Any] = {"dtype": run.dtype or dtype}
        if run.channels_last and x0.dim() == 4:
            self._options["memory_format"] = torch.channels_last
        self._network = Network(run.model, run.dtype, run.channels_last)
        weights = [run.table.column(name)[::-1] for name in ("x0_from_x", "x0_from_out")]
        weights = np.stack([*weights, schedule.posterior_mean_coef1], axis=1)
        columns = np.concatenate([weights, log_variances(schedule, variance)], axis=1)
        self._table = torch.tensor(columns, dtype=dtype, device=device)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within, the model is called as a run of `Sampler` calls it."""
        example = self.x0[:1].expand(self.batch_size, *self.x0.shape[1:])
        with evaluating(self.model), worthwhile(self.model, example), packing({}):
            times = torch.arange(self.schedule.T, device=self.x0.device)
            self._rows = self._network.time_rows(times) if self.class_labels is None else None
            yield

    def pairs(self, timesteps: Tensor, progress: bool | Progress) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """``(place, t, image)`` of all pairs in batches, images fastest: their place in the whole list."""
        count, batch = len(timesteps) * len(self.x0), self.batch_size
        starts: Iterable[int] = range(0, count, batch)
        if progress is True:
            starts = tqdm(starts, desc="bits/dim", unit="batch")
        elif progress:
            starts = progress(starts)
        for start in starts:
            place = slice(start, min(start + batch, count))
            pair = torch.arange(place.start, place.stop, device=self.x0.device)
            yield place, timesteps.index_select(0, pair // len(self.x0)), pair % len(self.x0)

    def read(self, t: Tensor, image: Tensor) -> Read:
        """The model called once, on pairs."""
        x0 = self.x0.index_select(0, image)
        who = self.images.index_select(0, image)
        noise = ops.counter_normal(x0.shape, self.seed, who, t, stream="step").to(x0.dtype)
        x_t = ops.q_sample(x0, noise, t, self.schedule)
        given = x_t.to(**self._options)
        labels = () if self.class_labels is None else (self.class_labels.index_select(0, image),)
        rows = self._rows
        out = self.model(given, t, *labels) if rows is None else self.model.forward_rows(given, rows, t)
        shape = (x0.shape[0], x0.shape[1] * (2 if self.learned else 1), *x0.shape[2:])
        if not isinstance(out, Tensor) or out.shape != shape:
            raise ValueError(f"model must return a Tensor of shape {shape}, got {told(out)}")
        out, v = out.chunk(2, dim=1) if self.learned else (out, None)
        of_x, of_out = (per_sample(self._table[:, k].index_select(0, t), x0) for k in range(2))
        raw = of_x * x_t + of_out * out.to(x0.dtype)
        return Read(x0, raw if self.clip is None else raw.clamp(-self.clip, self.clip), raw, v)

    def terms(self, t: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """The term of the bound, in nats a dimension, and the mean squared error of x0: (B,) each."""
        found = self.read(t, image)
        off = found.images - found.x0
        rows = self._table.index_select(0, t)
        # The means of p and q differ by x0's error only; a model that gives the mean itself is not clipped.
        apart = per_sample(rows[:, 2], off) * (found.images - found.raw if self.gives_mean else off)
        nats = bound_term(found.images, apart, t, rows[:, 3:], found.v)
        return nats, off.square().flatten(1).mean(1)


def check_schedule(schedule: Any) -> None:
    if not isinstance(schedule, Schedule):
        raise TypeError(f"schedule must be a Schedule, got {type(schedule).__name__}")


def check_device(name: str, x: Tensor, model: Model) -> None:
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    if parameter is not None and parameter.device != x.device:
        raise ValueError(f"{name} must be on {parameter.device}, where the model is, got {x.device}")


def told(value: Any) -> str:
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
