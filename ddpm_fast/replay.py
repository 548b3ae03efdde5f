"""A network's call without the Python of its modules: recorded once, then replayed, op by op.

A tenth to a quarter of a U-Net's step on the CPU is Python: its modules' calls, checks and views. Where every
call runs the same ops, once is enough. A dispatch mode writes down the ops of one call: a number or a dtype
as it is, a tensor that the call made as a variable, any other (a weight, a buffer) by reference. A view is
the strides by which an op reads a variable, and a variable is deleted after its last use. The result is a
Python function of one line an op, which later calls run: the CPU's counterpart of a captured CUDA graph,
equal to the bit to the call that it stands for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch import Tensor, UntypedStorage, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import TorchDispatchMode

Call = Callable[[Tensor], Tensor]

RECORDED = 2
"""Which call is recorded: by then the weights are laid out. To record takes as long as two calls waste in
Python, so that a run of four steps loses nothing."""


class Replayed:
    """``call(given) -> out``, as it is at first, recorded once and replayed from then on.

    Whoever makes one knows that every call runs the same ops on the same shapes: of ``given``, of what those
    ops make of it, and of tensors that stay where they are, whose values are read anew at each call. A call
    whose ops ask for a value is never replayed, nor is one at which somebody watches: a dispatch or function
    mode, autocast, a global hook of modules.
    """

    def __init__(self, call: Call) -> None:
        self.call = call
        self.replay: Call | None = None
        self._calls = 0

    def __call__(self, given: Tensor) -> Tensor:
        if _is_watched():
            return self.call(given)
        if self.replay is not None:
            with torch.inference_mode():  # an op has less to look after
                return self.replay(given)
        self._calls += 1
        if self._calls != RECORDED:
            return self.call(given)
        with torch.inference_mode(), _Recorder(given) as recorder:
            out = self.call(given)
        self.replay = recorder.function(out)
        return out


def _is_watched() -> bool:
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch.is_autocast_enabled("cpu")
        or _has_any_global_hook()
    )


class _View(NamedTuple):
    """How a variable is read. ``offset`` is None for the call's argument: wherever that one begins."""

    variable: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int | None


class _Line(NamedTuple):
    """``targets = op(*args, **kwargs)``; a target of None is not a tensor of its own."""

    targets: list[int | None]
    returns_one: bool
    op: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Unrecordable(Exception):
    """The op may do something else at the next call, or handles tensors that are not plain ones."""


class _Recorder(TorchDispatchMode):
    """Writes down the ops of one call, and keeps nothing of what they return.

    Which variable a storage is, is noted on the storage itself, and gone with it. Weak references would leave
    small blocks of memory between the large ones: a peak two thirds higher, of gaps that nothing fits in.
    """

    def __init__(self, given: Tensor) -> None:
        super().__init__()
        self._complete = True
        self._lines: list[_Line] = []
        self._whole = [_View(0, given.shape, given.stride(), None)]  # by variable
        self._given, self._start = given, given.storage_offset()
        self._mark = object()  # of this recorder's notes

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # to skip it, torch would import it, which takes a second

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self._complete:
            try:
                self._write(func, args, kwargs, result)
            except _Unrecordable:
                self._complete = False
        return result

    def function(self, out: Tensor) -> Call | None:
        """The call that returned ``out`` as a function, None if one of its ops cannot be repeated."""
        try:
            return _function(self._lines, self._whole, self._read(out, set())) if self._complete else None
        except _Unrecordable:
            return None

    def _write(self, func, args, kwargs, result) -> None:
        elsewhere: set[int] = set()
        args = tuple(self._read(value, elsewhere) for value in args)
        kwargs = {name: self._read(value, elsewhere) for name, value in kwargs.items()}
        returns_one = not isinstance(result, (list, tuple))
        targets = [self._target(value, elsewhere) for value in ([result] if returns_one else result)]
        if func._schema.is_mutable or any(target is not None for target in targets):
            self._lines.append(_Line(targets, returns_one, func._op, args, kwargs))

    def _target(self, result: Any, elsewhere: set[int]) -> int | None:
        """The variable that a result is from now on; None for a view, an argument or nothing."""
        if result is None:
            return None
        storage = _storage(result)
        if storage is None:
            raise _Unrecordable
        if self._variable(storage) is not None or storage._cdata in elsewhere:
            return None
        variable = len(self._whole)
        self._whole.append(_View(variable, result.shape, result.stride(), result.storage_offset()))
        storage._ddpm_fast_variable = self._mark, variable, result.dtype
        return variable

    def _variable(self, storage: UntypedStorage) -> tuple[int, torch.dtype] | None:
        """Its number and dtype, if the call has made it or was given it."""
        if storage._cdata == self._given.untyped_storage()._cdata:
            return 0, self._given.dtype
        mark, *variable = getattr(storage, "_ddpm_fast_variable", (None,))
        return tuple(variable) if mark is self._mark else None

    def _read(self, value: Any, elsewhere: set[int]) -> Any:
        """An argument, with a `_View` for each of the call's tensors; other storages are added to the set."""
        if isinstance(value, (list, tuple)):
            read = [self._read(each, elsewhere) for each in value]
            return read if any(isinstance(each, _View) for each in read) else value
        storage = _storage(value) if isinstance(value, Tensor) else None
        if storage is None:
            return value
        known = self._variable(storage)
        if known is None:
            elsewhere.add(storage._cdata)
            return value
        variable, dtype = known
        offset: int | None = value.storage_offset()
        if value.dtype != dtype or (variable == 0 and offset != self._start):
            raise _Unrecordable
        return _View(variable, value.shape, value.stride(), offset if variable else None)


def _storage(value: Any) -> UntypedStorage | None:
    """Of a plain tensor; None for a weight that oneDNN has laid out, which has no storage to look at."""
    if type(value) not in (Tensor, nn.Parameter) or value.is_conj() or value.is_neg():
        raise _Unrecordable
    if value.is_mkldnn:
        return None
    if value.layout != torch.strided:
        raise _Unrecordable
    return value.untyped_storage()


def _variables(value: Any) -> Iterator[int]:
    """Those that an argument, or a list of arguments, reads."""
    if isinstance(value, _View):
        yield value.variable
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _variables(each)


def _function(lines: list[_Line], whole: list[_View], out: Any) -> Call:
    """The lines as Python; what is neither a variable nor a plain number is in its namespace."""
    constants: dict[int, tuple[str, Any]] = {}
    read_later = set(_variables(out))
    body = [f" return {_text(out, whole, constants)}"]
    for targets, returns_one, op, args, kwargs in reversed(lines):
        made = [target for target in targets if target is not None]
        touched = {*made, *_variables(args), *_variables(list(kwargs.values()))}
        done, read_later = sorted(touched - read_later), read_later | touched
        body.extend(f" del v{variable}" for variable in done)
        given = [_text(value, whole, constants) for value in args]
        given += [f"{name}={_text(value, whole, constants)}" for name, value in kwargs.items()]
        names = ", ".join("_" if target is None else f"v{target}" for target in targets)
        returned = "" if not made else f"{names} = " if returns_one else f"[{names}] = "
        body.append(f" {returned}{_text(op, whole, constants)}({', '.join(given)})")
    namespace = {"as_strided": torch.as_strided} | dict(constants.values())
    exec(_compiled("\n".join(["def call(v0):", *reversed(body)])), namespace)
    return namespace.pop("call")  # else the two would keep each other, and the weights


def _text(value: Any, whole: list[_View], constants: dict[int, tuple[str, Any]]) -> str:
    if isinstance(value, _View):
        name = f"v{value.variable}"
        view = f"as_strided({name}, {tuple(value.size)}, {value.stride}, {value.offset})"
        return name if value == whole[value.variable] else view
    if isinstance(value, list) and next(_variables(value), None) is not None:
        return f"[{', '.join(_text(each, whole, constants) for each in value)}]"
    if value is None or type(value) in (bool, int):
        return repr(value)
    return constants.setdefault(id(value), (f"c{len(constants)}", value))[0]


@lru_cache(maxsize=32)
def _compiled(source: str) -> CodeType:
    """The next run of the same network differs in its constants only."""
    return compile(source, __name__, "exec")
