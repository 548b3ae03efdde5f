"""A network's call without the Python of its modules: recorded once, then replayed, op by op.

A tenth to a quarter of a U-Net's step on the CPU is Python: its modules' calls, checks and views. Where every
call runs the same ops, once is enough. `recorder` writes down the ops of one call, `arena` gives each tensor
of it a place in one block of memory, and `program` makes a function of it all, which later calls run: the
CPU's counterpart of a captured CUDA graph, equal to the bit to the call that it stands for.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock

import torch
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook

from ..ops._dispatch import is_watched
from .program import function
from .recorder import Recorder

Call = Callable[[Tensor], Tensor]

RECORDED = 2
"""Which call is recorded: by then the weights are laid out. To record takes as long as two calls waste in
Python, so that a run of four steps loses nothing."""


class Replayed:
    """``call(given) -> out``, as it is at first, recorded once and replayed from then on.

    Whoever makes one knows that every call runs the same ops on the same shapes: of ``given``, of what those
    ops make of it, and of tensors that stay where they are, whose values are read anew at each call. A call
    whose ops ask for a value is never replayed, nor is one at which somebody watches: a mode, a transform, a
    tracer, a profiler, autocast, a global hook of modules. ``out`` is new at each call; all else is written
    to the same memory, so that of two calls at once the second is not replayed.
    """

    def __init__(self, call: Call) -> None:
        self.call = call
        self.replay: Call | None = None
        self._calls = 0
        self._busy = Lock()

    def __call__(self, given: Tensor) -> Tensor:
        if _is_watched() or not self._busy.acquire(blocking=False):
            return self.call(given)
        try:
            return self._call(given)
        finally:
            self._busy.release()

    def _call(self, given: Tensor) -> Tensor:
        if self.replay is not None:
            with torch.inference_mode():  # an op has less to look after
                return self.replay(given)
        self._calls += 1
        if self._calls != RECORDED:
            return self.call(given)
        with torch.inference_mode():
            with Recorder(given) as recorder:
                out = self.call(given)
            recording = recorder.recording(out)
            if recording is not None:
                self.replay = function(recording)
        return out


def _is_watched() -> bool:
    return is_watched() or torch.is_autocast_enabled("cpu") or _has_any_global_hook()
