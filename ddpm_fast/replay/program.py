"""A recording as a function: one line of Python for each run of our own ops, and for every other op.

A tensor of the call is a place in an arena, and so is each view of it, made once, where the op that makes it
can be told where to: our own, which are then called past PyTorch's dispatcher, one after another, and those
of PyTorch's that have an ``out``. Others return new tensors: variables, deleted after their last use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload

from ..ops._dispatch import PROGRAM_OPS, direct
from .arena import Lifetime, plan
from .recorder import Line, Recording, View, views

_ATEN = torch.ops.aten
_INTO = {
    _ATEN.add.Tensor: _ATEN.add.out,
    _ATEN.addmm.default: _ATEN.addmm.out,
    _ATEN.avg_pool2d.default: _ATEN.avg_pool2d.out,
    _ATEN.baddbmm.default: _ATEN.baddbmm.out,
    _ATEN.cat.default: _ATEN.cat.out,
    _ATEN.div.Tensor: _ATEN.div.out,
    _ATEN.index_select.default: _ATEN.index_select.out,
    _ATEN.mul.Tensor: _ATEN.mul.out,
    _ATEN.sub.Tensor: _ATEN.sub.out,
}
"""The same kernels, told where to write to."""
_COPIES = (
    _ATEN._to_copy.default,
    _ATEN.clone.default,
    _ATEN.contiguous.default,
    _ATEN.to.dtype,
    _ATEN.to.dtype_layout,
)
"""Where they make a tensor of their own."""


class _Call(NamedTuple):
    op: OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def function(recording: Recording) -> Callable[[Tensor], Tensor]:
    """``call(given) -> out``, which does again what was recorded."""
    return _Function(recording).compiled()


class _Function:
    """The lines as Python; what is neither a variable nor a plain number is in their namespace."""

    def __init__(self, recording: Recording) -> None:
        self.lines, self.variables, self.out = recording
        self.constants: dict[int, tuple[str, Any]] = {}
        returned = _read(self.out)
        self.last = {}  # the line of a variable's last use
        self.told: dict[int, list[_Call]] = {}  # by line: the calls that are told where to write
        self.placed: set[int] = set()
        for k, line in enumerate(self.lines):
            self.last.update(dict.fromkeys(_touched(line), k))
            if returned.isdisjoint(line.targets):
                calls = self._told(line)
                if calls is not None:
                    self.told[k] = calls
                    self.placed.update(line.targets)
        self.last.update(dict.fromkeys(returned, len(self.lines)))
        self.views = self._arena()

    def compiled(self) -> Callable[[Tensor], Tensor]:
        body, own = ["def call(v0):"], []
        for k, line in enumerate(self.lines):
            done = [v for v in sorted(_touched(line) - self.placed) if self.last[v] == k]
            if k in self.told and _is_own(line):
                own += self.told[k]
                if not done:
                    continue
            if own:
                body.append(self._program(own))
                own = []
            if k not in self.told:
                body.append(self._statement(line))
            elif not _is_own(line):
                body.extend(f" {self._called(call)}" for call in self.told[k])
            body.extend(f" del v{variable}" for variable in done)
        if own:
            body.append(self._program(own))
        body.append(f" return {self._text(self.out)}")
        namespace = {"as_strided": torch.as_strided} | dict(self.constants.values())
        exec(_code("\n".join(body)), namespace)
        return namespace.pop("call")  # else the two would keep each other, and the weights

    def _told(self, line: Line) -> list[_Call] | None:
        """The line's calls with the places of its results as arguments; None where it has none such."""
        if None in line.targets:
            return None
        into = [self.variables[target].whole for target in line.targets]
        if _is_own(line):
            rest = line.op._schema.arguments[len(line.args) :]
            defaults = (line.kwargs.get(each.name, each.default_value) for each in rest)
            return [_Call(line.op, (*line.args, *defaults, *into), {})]
        if line.op in _INTO:
            return [_Call(_INTO[line.op], line.args, line.kwargs | {"out": into[0]})]
        if line.op in _COPIES:
            return [_Call(_ATEN.copy_.default, (into[0], line.args[0]), {})]
        if line.op is _ATEN.upsample_nearest2d.vec:  # its own `out` is a copy
            x, _, scales = line.args
            args = x, into[0].size[2:], *(scales or (None, None))
            return [_Call(_ATEN.upsample_nearest2d.out, args, {"out": into[0]})]
        if line.op is _ATEN.pad.default and _is_of_zeros(line.args):
            return _padded(into[0], *line.args)
        return None

    def _arena(self) -> dict[View, Tensor]:
        """Every view of what has a place, there."""
        first = {target: k for k in self.told for target in self.lines[k].targets}
        lifetimes = (Lifetime(self.variables[v].bytes, first[v], self.last[v]) for v in first)
        begins, total = plan(tuple(lifetimes))
        begin = dict(zip(first, begins, strict=True))
        arena = torch.empty(total, dtype=torch.uint8, device="cpu")
        dtypes = {self.variables[v].dtype for v in first}
        typed = {dtype: arena.view(dtype) for dtype in dtypes}
        made: dict[View, Tensor] = {}
        for view in self._wanted():
            if view.variable in begin and view not in made:
                dtype = self.variables[view.variable].dtype
                offset = begin[view.variable] // dtype.itemsize + view.offset
                made[view] = typed[dtype].as_strided(view.size, view.stride, offset)
        return made

    def _wanted(self) -> Iterator[View]:
        for k, line in enumerate(self.lines):
            for call in self.told.get(k, [line]):
                yield from views([*call.args, *call.kwargs.values()])

    def _program(self, calls: list[_Call]) -> str:
        """Our own ops, one after another: a function of the variables that they read."""
        given: dict[View, tuple[int]] = {}

        def argument(value: Any) -> Any:
            if not isinstance(value, View):
                return value
            return self.views[value] if value in self.views else given.setdefault(value, (len(given),))

        made = tuple((call.op.name(), tuple(map(argument, call.args))) for call in calls)
        run = direct("program")(made, len(given))
        return f" {self._text(run)}({', '.join(map(self._text, given))})"

    def _statement(self, line: Line) -> str:
        names = ""
        if any(target is not None for target in line.targets):
            names = ", ".join("_" if target is None else f"v{target}" for target in line.targets)
            names = f"{names} = " if line.returns_one else f"[{names}] = "
        return f" {names}{self._called(_Call(line.op, line.args, line.kwargs))}"

    def _called(self, call: _Call) -> str:
        given = [self._text(value) for value in call.args]
        given += [f"{name}={self._text(value)}" for name, value in call.kwargs.items()]
        return f"{self._text(call.op._op)}({', '.join(given)})"

    def _text(self, value: Any) -> str:
        if isinstance(value, View):
            if value in self.views:
                return self._text(self.views[value])
            name, whole = f"v{value.variable}", self.variables[value.variable].whole
            view = f"as_strided({name}, {tuple(value.size)}, {value.stride}, {value.offset})"
            return name if value == whole else view
        if isinstance(value, list) and next(views(value), None) is not None:
            return f"[{', '.join(self._text(each) for each in value)}]"
        if value is None or type(value) in (bool, int):
            return repr(value)
        return self.constants.setdefault(id(value), (f"c{len(self.constants)}", value))[0]


def _is_own(line: Line) -> bool:
    return line.op.name() in PROGRAM_OPS


def _is_of_zeros(args: tuple[Any, ...]) -> bool:
    return len(args) == 2 and isinstance(args[0], View) and min(args[1]) >= 0


def _padded(into: View, x: View, margins: list[int]) -> list[_Call]:
    """Zeros, and x between them; ``margins`` of the last dimension come first."""
    before = [*reversed(margins[::2])]
    steps = into.stride[-len(before) :]
    start = sum(margin * step for margin, step in zip(before, steps, strict=True))
    inside = into._replace(size=x.size, offset=into.offset + start)
    return [_Call(_ATEN.zero_.default, (into,), {}), _Call(_ATEN.copy_.default, (inside, x), {})]


def _read(value: Any) -> set[int]:
    return {view.variable for view in views(value)}


def _touched(line: Line) -> set[int]:
    made = {target for target in line.targets if target is not None}
    return made | _read([*line.args, *line.kwargs.values()])


@lru_cache(maxsize=32)
def _code(source: str) -> CodeType:
    """The next run of the same network differs in its constants only."""
    return compile(source, __name__, "exec")
