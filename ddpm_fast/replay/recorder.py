"""Writes down the ops of one call.

A number or a dtype is written as it is, a tensor that the call made as a variable, any other (a weight, a
buffer) by reference. A view is the strides by which an op reads a variable.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, UntypedStorage, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode


class View(NamedTuple):
    """How a variable is read. ``offset`` is None for the call's argument: wherever that one begins."""

    variable: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int | None


class Variable(NamedTuple):
    """A tensor that the call made, as it was made; the first is the call's argument."""

    whole: View
    dtype: torch.dtype
    bytes: int


class Line(NamedTuple):
    """``targets = op(*args, **kwargs)``; a target of None is not a tensor of its own."""

    targets: list[int | None]
    returns_one: bool
    op: OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Recording(NamedTuple):
    lines: list[Line]
    variables: list[Variable]
    out: Any


class _Unrecordable(Exception):
    """The op may do something else at the next call, or handles tensors that are not plain ones."""


class Recorder(TorchDispatchMode):
    """Writes down the ops of one call, and keeps nothing of what they return.

    Which variable a storage is, is noted on the storage itself, and gone with it. Weak references would leave
    small blocks of memory between the large ones: a peak two thirds higher, of gaps that nothing fits in.
    """

    def __init__(self, given: Tensor) -> None:
        super().__init__()
        self._complete = True
        self._lines: list[Line] = []
        whole = View(0, given.shape, given.stride(), None)
        self._variables = [Variable(whole, given.dtype, given.untyped_storage().nbytes())]
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

    def recording(self, out: Tensor) -> Recording | None:
        """Of the call that returned ``out``; None if one of its ops cannot be repeated."""
        try:
            out = self._read(out, set())
        except _Unrecordable:
            return None
        return Recording(self._lines, self._variables, out) if self._complete else None

    def _write(self, func, args, kwargs, result) -> None:
        elsewhere: set[int] = set()
        args = tuple(self._read(value, elsewhere) for value in args)
        kwargs = {name: self._read(value, elsewhere) for name, value in kwargs.items()}
        returns_one = not isinstance(result, (list, tuple))
        targets = [self._target(value, elsewhere) for value in ([result] if returns_one else result)]
        if func._schema.is_mutable or any(target is not None for target in targets):
            self._lines.append(Line(targets, returns_one, func, args, kwargs))

    def _target(self, result: Any, elsewhere: set[int]) -> int | None:
        """The variable that a result is from now on; None for a view, an argument or nothing."""
        if result is None:
            return None
        storage = _storage(result)
        if storage is None:
            raise _Unrecordable
        known = self._variable(storage)
        if known is not None:
            if self._variables[known].bytes != storage.nbytes():
                raise _Unrecordable  # the op has resized it
            return None
        if storage._cdata in elsewhere:
            return None
        variable = len(self._variables)
        whole = View(variable, result.shape, result.stride(), result.storage_offset())
        self._variables.append(Variable(whole, result.dtype, storage.nbytes()))
        storage._ddpm_fast_variable = self._mark, variable
        return variable

    def _variable(self, storage: UntypedStorage) -> int | None:
        """Which one it is, if the call has made it or was given it."""
        if storage._cdata == self._given.untyped_storage()._cdata:
            return 0
        mark, variable = getattr(storage, "_ddpm_fast_variable", (None, None))
        return variable if mark is self._mark else None

    def _read(self, value: Any, elsewhere: set[int]) -> Any:
        """An argument, with a `View` for each of the call's tensors; other storages are added to the set."""
        if isinstance(value, (list, tuple)):
            read = [self._read(each, elsewhere) for each in value]
            return read if any(isinstance(each, View) for each in read) else value
        storage = _storage(value) if isinstance(value, Tensor) else None
        if storage is None:
            return value
        variable = self._variable(storage)
        if variable is None:
            elsewhere.add(storage._cdata)
            return value
        offset: int | None = value.storage_offset()
        if value.dtype != self._variables[variable].dtype or (variable == 0 and offset != self._start):
            raise _Unrecordable
        return View(variable, value.shape, value.stride(), offset if variable else None)


def _storage(value: Any) -> UntypedStorage | None:
    """Of a plain tensor; None for a weight that oneDNN has laid out, which has no storage to look at."""
    if type(value) not in (Tensor, nn.Parameter) or value.is_conj() or value.is_neg():
        raise _Unrecordable
    if value.is_mkldnn:
        return None
    if value.layout != torch.strided:
        raise _Unrecordable
    return value.untyped_storage()


def views(value: Any) -> Iterator[View]:
    """Those of an argument, or of a list of arguments."""
    if isinstance(value, View):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from views(each)
