"""One step captured as a CUDA graph: the host launches it once, instead of each of its kernels.

A graph repeats the kernels of its capture on the same addresses. So all that may differ between two runs is
copied into the capture's own buffers, and what was decided in Python is frozen: `version` says what of a
model that was, and a run that differs in it is captured anew.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .engine import Buffers
from .ops import _dispatch

Bind = Callable[[Buffers, Sequence[torch.Generator]], Callable[[], None]]


class CaptureError(RuntimeError):
    """A step that cannot be captured: it waits for the device, or does what a capturing stream may not."""


@dataclass(frozen=True)
class Key:
    """What two runs must have in common to replay one capture.

    Attributes:
        model: see `version`.
        buffers: names, shapes, dtypes and device.
        settings: whatever else the step does differently for.
    """

    model: Version
    buffers: tuple[Hashable, ...]
    settings: tuple[Hashable, ...]


@dataclass(frozen=True)
class CapturedStep:
    """A graph, the buffers that it reads and writes, and the generators that it draws from.

    The generators are its own: a run's state is copied in before a replay, so that another generator needs no
    other graph.
    """

    graph: torch.cuda.CUDAGraph
    buffers: Buffers
    generators: tuple[torch.Generator, ...]
    key: Key


def capture(inputs: Buffers, bind: Bind, generators: Sequence[torch.Generator], key: Key) -> CapturedStep:
    """Capture ``bind(buffers, own)()``, where the buffers and generators are copies of those given.

    The step first runs twice on a side stream, so that kernels are compiled and libraries choose theirs; the
    second time a wait for the device is an error, which names the op and leaves nothing half captured. The
    graph has a memory pool of its own.

    Raises:
        CaptureError: the step cannot be captured; the message says in which op.
        torch.OutOfMemoryError: not enough memory for the graph's pool.
        As the step: whatever it raises the first time.
    """
    device = torch.cuda.device(inputs.x.device)
    with device, torch.inference_mode(False), torch.no_grad():  # a buffer outlives the caller's mode
        buffers = inputs.clone()
        own = tuple(torch.Generator(generator.device) for generator in generators)
        step = bind(buffers, own)
        here, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(here)
        try:
            with torch.cuda.stream(side):
                step()
                buffers.load(inputs)
                _refuse_waiting(step)
                buffers.load(inputs)
        finally:
            here.wait_stream(side)

        graph = torch.cuda.CUDAGraph()
        for generator in own:
            graph.register_generator_state(generator)
        try:
            with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                step()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise CaptureError(str(error)) from error
        finally:
            torch.cuda.set_stream(here)  # a capture that fails leaves its own
    return CapturedStep(graph, buffers, own, key)


def _refuse_waiting(step: Callable[[], None]) -> None:
    try:
        with _waiting_refused():
            step()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise CaptureError(f"{_failing_op(step)} waits for the device: {error}") from error


@contextmanager
def _waiting_refused() -> Iterator[None]:
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is a prototype and misses some: the capture finds those
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def _failing_op(step: Callable[[], None]) -> str:
    """The last op that a failing step dispatches."""
    last = "the step"

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal last
            last = str(func)
            return func(*args, **(kwargs or {}))

    try:
        with Watch(), _waiting_refused():
            step()
    except RuntimeError:
        pass
    return last


@dataclass(frozen=True)
class Version:
    """A model, weakly held, and what a capture freezes of it; see `version`."""

    model: weakref.ref
    frozen: tuple[Hashable, ...]


def version(model: Any) -> Version:
    """What a captured step has frozen of a model: equal versions may replay each other's.

    The model itself; of every part of a module its type, its hooks, its plain attributes (numbers, strings,
    flags) and the addresses, shapes and dtypes of its tensors. Not the tensors' values: weights that change
    in place are replayed. What a module reads from elsewhere is frozen at its capture.
    """
    frozen: list[Hashable] = []
    for part in model.modules() if isinstance(model, nn.Module) else ():
        frozen.append(type(part))
        for name, value in vars(part).items():
            if name in ("_parameters", "_buffers"):
                frozen.extend((key, _place(tensor)) for key, tensor in value.items())
            elif name in ("_forward_hooks", "_forward_pre_hooks"):
                frozen.append(tuple(value))
            elif isinstance(value, Tensor):
                frozen.append((name, _place(value)))
            elif value is None or isinstance(value, (bool, int, float, str)):
                frozen.append((name, value))
    return Version(weakref.ref(model, lambda _: CAPTURED.forget_dead()), tuple(frozen))


def _place(tensor: Tensor | None) -> Hashable:
    if tensor is None:
        return None
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _global_settings() -> tuple[Hashable, ...]:
    """What the process decides about kernels, which a capture freezes too."""
    return (
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.deterministic,
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32,
        _dispatch.FORCED_BACKEND,
    )


class GraphCache:
    """Captured steps that no run is using; the least recently used beyond ``bound`` are dropped.

    A run takes its step out and puts it back at its end, so that two runs at a time never share one: the
    second captures its own.
    """

    def __init__(self, bound: int = 4) -> None:
        self.bound = bound
        self._free: list[CapturedStep] = []

    def take(self, key: Key) -> CapturedStep | None:
        for k in reversed(range(len(self._free))):
            if self._free[k].key == key:
                return self._free.pop(k)
        return None

    def put(self, captured: CapturedStep) -> None:
        self._free.append(captured)
        self.forget_dead()
        del self._free[: -self.bound]

    def forget_dead(self) -> None:
        """Drop those whose model is gone."""
        self._free = [captured for captured in self._free if captured.key.model.model() is not None]

    def clear(self) -> None:
        """Drop them all; their memory goes back to torch's allocator."""
        self._free.clear()

    def __len__(self) -> int:
        return len(self._free)


CAPTURED = GraphCache()


@dataclass(frozen=True)
class Stats:
    """What a sampler's runs have cost so far.

    Attributes:
        captures: CUDA graphs captured: one for each batch size, shape, or other `Key`.
        replays: steps that replayed one.
        first_call_seconds: of the first call, until it returned: kernels compiled, libraries set up, capture.
        eager_because: why the last run launched every kernel from the host; None if it replayed a graph.
        packed_bytes: of the weights as the last run laid them out for the CPU, beside the model's own. Our
            convolution's are kept for the next run, oneDNN's are not: see `Sampler`'s ``low_memory``.
    """

    captures: int = 0
    replays: int = 0
    first_call_seconds: float | None = None
    eager_because: str | None = "nothing has run yet"
    packed_bytes: int = 0


class Graphs:
    """One sampler's use of captured steps: whether it captures, and what came of it.

    ``graph`` is `Sampler`'s option. What cannot be captured is tried once.
    """

    def __init__(self, model: Any, graph: bool | str) -> None:
        self.model, self.graph = model, graph
        self.stats = Stats()
        self._refused: str | None = None

    def take(
        self,
        inputs: Buffers,
        bind: Bind,
        generators: Sequence[torch.Generator],
        settings: tuple[Hashable, ...],
    ) -> CapturedStep | None:
        """A captured step that holds these inputs, for `give_back`; None where the run is to be eager.

        Raises:
            RuntimeError: graph is True and the step cannot be captured; the message names the op.
        """
        because = self._why_eager(inputs.x.device)
        captured = None
        if because is None:
            stream = torch.cuda.current_stream(inputs.x.device)  # two streams would not wait for each other
            settings = (*settings, stream.cuda_stream, *_global_settings())
            key = Key(version(self.model), inputs.layout(), settings)
            captured = CAPTURED.take(key) or self._capture(inputs, bind, generators, key)
            because = self._refused
        if because != self.stats.eager_because:
            self.stats = replace(self.stats, eager_because=because)
        if captured is not None:
            captured.buffers.load(inputs)
        return captured

    def refuse(self, because: str) -> None:
        """Of a run that is eager for a reason of its own.

        Raises:
            ValueError: graph is True.
        """
        if self.graph is True:
            raise ValueError(f"graph=True, but a step cannot be captured: {because}")
        self.stats = replace(self.stats, eager_because=because)

    def give_back(self, captured: CapturedStep) -> None:
        CAPTURED.put(captured)

    def replay(self, captured: CapturedStep) -> None:
        captured.graph.replay()
        self.stats = replace(self.stats, replays=self.stats.replays + 1)

    def packed(self, count: int) -> None:
        """The bytes of a run's packed weights."""
        if self.stats.packed_bytes != count:
            self.stats = replace(self.stats, packed_bytes=count)

    def took(self, seconds: float) -> None:
        """A call's time, of which the first is kept."""
        if self.stats.first_call_seconds is None:
            self.stats = replace(self.stats, first_call_seconds=seconds)

    def _why_eager(self, device: torch.device) -> str | None:
        if self.graph is False:
            return "graph=False"
        if device.type != "cuda":
            return f"the model is on {device}"
        if self.graph == "auto" and not isinstance(self.model, nn.Module):
            return "the model is not a module, and what its Python decides might not stay so"
        if torch.is_autocast_enabled("cuda"):
            return "autocast is on, and a graph would keep its casts of the weights"
        return self._refused

    def _capture(self, inputs, bind, generators, key) -> CapturedStep | None:
        try:
            captured = capture(inputs, bind, generators, key)
        except torch.OutOfMemoryError as error:
            self._refused = f"not enough memory to capture a step: {error}"
        except CaptureError as error:
            if self.graph is True:
                raise RuntimeError(f"graph=True, but a step cannot be captured: {error}") from error
            self._refused = f"a step cannot be captured: {error}"
        else:
            self.stats = replace(self.stats, captures=self.stats.captures + 1)
            return captured
        torch.cuda.empty_cache()
        warnings.warn(f"{self._refused}; every kernel is launched by itself", RuntimeWarning, stacklevel=6)
        return None
