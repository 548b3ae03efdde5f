"""One step of a run, the model and then the update, on buffers that stay where they are.

It is the same step on the CPU, on a GPU and inside a captured graph: what it reads is in the buffers, and
what does not depend on the images is computed before the first step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import cached_property
from inspect import signature
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from . import ops
from .guidance import Classifier, combine
from .replay import Replayed
from .unet import TimeRows, UNet

Model = Callable[..., Tensor]
Step = Callable[[Tensor, "Tensor | None", "Tensor | None"], None]
"""``step(i, t, noise)`` moves the buffers on: i 0-d or (B,), t (B,) or None where time rows are read."""


@dataclass
class Buffers:
    """All that a step reads and writes, on one device; None for what a run does without.

    Attributes:
        x, x0: float32 (B, ...), contiguous: the state, and the x0 of the step before.
        i: 0-d or (B,) int64: the row of the table that comes next.
        table, timesteps: float32 (N, 7 or 9) and int64 (N,): a `StepTable`'s, or several under each other.
        seed, image_index: of the counter noise, int64.
        step: (B,) int64, where the counter noise's step is not ``i``, and the kernel cannot draw it.
        clip: (B,) float32, each sample's bound of x0, where they differ.
        noise: like x, where it is drawn on the host.
        class_labels: (B, ...), what the model is told of each sample besides its time; or (2B, ...), and then
            what it is told where there is no class, with
        guidance_scale: (B,) float32: how far from the one to the other, see `guidance.combine`.
        rows: the time rows of the timesteps, where the model is our U-Net.
    """

    x: Tensor
    x0: Tensor | None
    i: Tensor
    table: Tensor
    timesteps: Tensor
    seed: Tensor | None = None
    image_index: Tensor | None = None
    step: Tensor | None = None
    clip: Tensor | None = None
    noise: Tensor | None = None
    class_labels: Tensor | None = None
    guidance_scale: Tensor | None = None
    rows: TimeRows | None = None

    def tensors(self) -> dict[str, Tensor]:
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.rows is not None:
            given |= {"values": self.rows.values, "biases": self.rows.biases}
        return {name: value for name, value in given.items() if isinstance(value, Tensor)}

    def layout(self) -> tuple[Any, ...]:
        """What has to be the same for one's values to be copied into another."""
        return tuple((name, value.shape, value.dtype, value.device) for name, value in self.tensors().items())

    def clone(self) -> Buffers:
        copies = {name: value.clone() for name, value in self.tensors().items()}
        rows = self.rows
        if rows is not None:
            rows = replace(rows, values=copies.pop("values"), biases=copies.pop("biases"))
        return replace(self, rows=rows, **copies)

    def load(self, other: Buffers) -> None:
        """Take the values of another of the same layout."""
        given = other.tensors()
        for name, value in self.tensors().items():
            value.copy_(given[name])

    def first(self, live: int) -> Buffers:
        """The first samples of the batch, as views."""
        return replace(self, **{name: value[:live] for name, value in self._by_sample().items()})

    def move(self, source: int, target: int) -> None:
        """Copy one sample of the batch over another."""
        for value in self._by_sample().values():
            value[target].copy_(value[source])

    def _by_sample(self) -> dict[str, Tensor]:
        given = self.tensors()
        names = ("x", "x0", "i", "seed", "image_index", "step", "clip")
        return {name: given[name] for name in names if name in given}


@dataclass(frozen=True)
class Network:
    """A model as a step calls it.

    Attributes:
        model: ``model(x, t) -> out``, or ``model(x, t, class_labels) -> out`` where the buffers have labels.
        dtype: what x is converted to; None to leave it float32.
        channels_last: whether a 4-d x is laid out so.
        compile: False, True or "max-autotune": whether it is called through ``torch.compile``, whole.
        replay: whether our U-Net's ops are recorded and replayed on the CPU (see `replay`).
        low_memory: whether our U-Net's weights are laid out for oneDNN only (see `convolution.packing`).
    """

    model: Model
    dtype: torch.dtype | None
    channels_last: bool
    compile: bool | str = False
    replay: bool = True
    low_memory: bool = False

    @cached_property
    def _compiled(self) -> dict[str, Callable[..., Tensor]]:
        """The ways to call the model, compiled."""
        given: dict[str, Any] = {}
        if self.compile == "max-autotune":  # its own CUDA graphs would be captured within ours
            given["options"] = torch._inductor.list_mode_options("max-autotune-no-cudagraphs")
        if "isolate_recompiles" in signature(torch.compile).parameters:  # else eight a process are the limit
            given["isolate_recompiles"] = True
        calls = {"x and t": self.model}
        if isinstance(self.model, UNet):
            calls["rows"] = self.model.forward_rows
        return {name: torch.compile(call, fullgraph=True, **given) for name, call in calls.items()}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_compiled"}

    def _calling(self) -> AbstractContextManager:
        """On the CPU a compiled model's weights are frozen, in oneDNN's layout; tracing has to know."""
        parameter = next(self.model.parameters(), None) if isinstance(self.model, nn.Module) else None
        if self.compile and parameter is not None and parameter.device.type == "cpu":
            return torch._inductor.config.patch(freezing=True)
        return nullcontext()

    def time_rows(self, timesteps: Tensor) -> TimeRows | None:
        """What our own U-Net computes once a run; None for any other model, which is called as it is."""
        model = self.model
        if not isinstance(model, UNet) or model.class_embedding is not None or not model.is_plain():
            return None
        return model.time_rows(timesteps)

    def _repeats_itself(self) -> bool:
        """Whether each call is known to run the same ops: our own U-Net, of nothing but its own parts."""
        if not isinstance(self.model, UNet) or not self.model.is_plain():
            return False
        own = (torch.nn.__name__ + ".", __package__ + ".")
        return all(
            type(part).__module__.startswith(own) and "forward" not in vars(part)
            for part in self.model.modules()
        )

    def bind(self, buffers: Buffers, clip: float | None, classifier: Classifier | None = None) -> Step:
        """The step on these buffers. It raises TypeError or ValueError for an ``out`` that does not fit."""
        x, rows = buffers.x, buffers.rows
        model, forward_rows = self.model, getattr(self.model, "forward_rows", None)
        if self.compile:
            model, forward_rows = self._compiled["x and t"], self._compiled.get("rows")
        options: dict[str, Any] = {"dtype": self.dtype or x.dtype}
        if self.channels_last and x.dim() == 4:
            options["memory_format"] = torch.channels_last
        as_it_is = len(options) == 1 and options["dtype"] == x.dtype
        move = ops.bind_step(
            x,
            buffers.table,
            x0=buffers.x0,
            clip=clip if buffers.clip is None else buffers.clip,
            seed=buffers.seed if buffers.step is None else None,
            image_index=buffers.image_index if buffers.step is None else None,
        )

        calling = self._calling()
        labels = () if buffers.class_labels is None else (buffers.class_labels,)
        scale = buffers.guidance_scale

        def predict(i_or_t: Tensor) -> Tensor:
            given = x if as_it_is else x.to(**options)
            with calling:
                if scale is not None:
                    out = model(torch.cat([given, given]), torch.cat([i_or_t, i_or_t]), *labels)
                elif rows is None:
                    out = model(given, i_or_t, *labels)
                else:
                    out = forward_rows(given, rows, i_or_t)
            if not isinstance(out, Tensor):
                raise TypeError(
                    f"model must return a Tensor, got {type(out).__name__}; wrap it, as in "
                    "lambda x, t: model(x, t).sample"
                )
            return out if scale is None else combine(out, scale, x.shape[1])

        if self.replay and not self.compile and x.device.type == "cpu" and self._repeats_itself():
            predict = Replayed(predict)

        def step(i: Tensor, t: Tensor | None, noise: Tensor | None) -> None:
            move(predict(t if rows is None else i), i, noise)

        def guided_step(i: Tensor, t: Tensor, noise: Tensor | None) -> None:
            out, gradient = predict(t if rows is None else i), classifier.gradient(x, t)
            out = classifier.before(out, gradient, i)
            move(out, i, noise)
            classifier.after(x, out, gradient, i)

        return step if classifier is None else guided_step


def advancing(step: Step, buffers: Buffers, draw: Callable[[], Tensor | None]) -> Callable[[], None]:
    """The step at ``buffers.i``, which then moves on by one: nothing in it depends on the host."""
    i, batch = buffers.i, len(buffers.x)

    def advance() -> None:
        t = None if buffers.rows is not None else buffers.timesteps.index_select(0, i.reshape(-1))
        step(i, None if t is None else t.expand(batch), draw())
        i.add_(1)

    return advance


_LOCK = Lock()
_EVALUATED: WeakKeyDictionary[nn.Module, tuple[int, list[nn.Module]]] = WeakKeyDictionary()
"""How many, in whatever threads, evaluate a module now, and which of its parts they found in training."""


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """A module in eval mode, without gradients; each of its parts as it was when the last is done with it."""
    is_module = isinstance(model, nn.Module)
    if is_module:
        _begin(model)
    try:
        with torch.no_grad():
            yield
    finally:
        if is_module:
            _end(model)


def _begin(model: nn.Module) -> None:
    with _LOCK:
        count, training = _EVALUATED.get(model, (0, []))
        found = [part for part in model.modules() if part.training]
        for part in found:
            part.training = False
        _EVALUATED[model] = count + 1, training + found


def _end(model: nn.Module) -> None:
    with _LOCK:
        count, training = _EVALUATED.pop(model)
        if count > 1:
            _EVALUATED[model] = count - 1, training
            return
        for part in training:
            part.training = True
