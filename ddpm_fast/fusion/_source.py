"""A method read from its source, and written again with its norms waiting for their SiLU.

Branches, loops, arguments, closures and globals stay what they were; only the sums, norms and SiLU that
`Flow` has proved are replaced, by the functions of `_pending`.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import copy
import functools
import linecache
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from itertools import chain
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any

from torch import nn

from . import _pending
from ._flow import Flow, gain_of
from ._kinds import swish

HELPERS: dict[str, Callable] = {
    "_ddpm_fast_add": _pending.add,
    "_ddpm_fast_norm": _pending.norm,
    "_ddpm_fast_scale": _pending.scale,
    "_ddpm_fast_shift": _pending.shift,
    "_ddpm_fast_act": _pending.act,
    "_ddpm_fast_swish": swish,
}
SEES_LOCALS = {"locals", "eval", "exec", "vars", "dir"}


class Unreadable(Exception):
    """The source of a method is not at hand, or is not all that runs."""


class Method:
    """A method of a module's class: its source, found to be what runs.

    Raises:
        Unreadable: with the reason.
    """

    def __init__(self, function: FunctionType) -> None:
        self.plain, wrappers = function, 0
        while hasattr(self.plain, "__wrapped__"):
            self.plain, wrappers = self.plain.__wrapped__, wrappers + 1
        if not isinstance(self.plain, FunctionType):
            raise Unreadable("it is not written in Python")
        self._definition = _definition(self.plain)
        self._decorators = self._definition.decorator_list
        if wrappers != len(self._decorators):
            raise Unreadable("it is wrapped by more, or by less, than its source shows")
        _strip(self._definition)
        _check_followed(self._definition)

    def definition(self) -> ast.FunctionDef:
        """A tree of its own: a `Flow` keeps its nodes, and `rewritten` changes it."""
        return copy.deepcopy(self._definition)

    def rewritten(self, definition: ast.FunctionDef, flow: Flow) -> FunctionType:
        """The method with the sites that `flow` has accepted waiting; decorated as it was.

        Raises:
            Unreadable: a decorator fails.
        """
        code = _compile(_Rewrite(flow).visit(definition), self.plain)
        cells = dict(zip(self.plain.__code__.co_freevars, self.plain.__closure__ or (), strict=True))
        cells |= {name: CellType(helper) for name, helper in HELPERS.items()}
        closure = tuple(cells[name] for name in code.co_freevars)
        function = FunctionType(
            code, self.plain.__globals__, self.plain.__name__, self.plain.__defaults__, closure
        )
        functools.update_wrapper(function, self.plain)
        del function.__wrapped__
        function.__kwdefaults__ = self.plain.__kwdefaults__
        for decorator in reversed(self._decorators):
            expression = compile(ast.Expression(decorator), self.plain.__code__.co_filename, "eval")
            try:
                function = eval(expression, self.plain.__globals__)(function)
            except Exception as error:
                raise Unreadable(f"it cannot be decorated again ({error})") from error
        return function


class Names:
    """What the expressions of a method may be, as far as a module's attributes and children tell."""

    def __init__(self, module: nn.Module, definition: ast.FunctionDef, function: FunctionType) -> None:
        arguments = definition.args
        self._self, self._module = arguments.args[0].arg, module
        self._globals = vars(builtins) | function.__globals__ | _cells(function)
        self._locals = Counter(part.arg for part in ast.walk(arguments) if isinstance(part, ast.arg))
        self._locals += Counter(
            node.id
            for node in ast.walk(definition)
            if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)
        )
        code = function.__code__  # also has what is bound by an import or an except
        self._locals += Counter({*code.co_varnames, *code.co_cellvars} - self._locals.keys())
        self._bindings: defaultdict[str, list[Callable[[], tuple]]] = defaultdict(list)
        for node in ast.walk(definition):
            if isinstance(node, ast.Assign) and len(node.targets) == 1:
                self._assign(node.targets[0], node.value)
            elif isinstance(node, ast.For):
                self._assign_each(node.target, node.iter)

    def resolve(self, node: ast.expr) -> tuple:
        """The objects that an expression may be; none if that is not known."""
        match node:
            case ast.Name(id=name) if name == self._self:
                return (self._module,) if self._locals[name] == 1 else ()
            case ast.Name(id=name) if name in self._locals:
                bindings = self._bindings.pop(name, [])  # out of the way, should it be bound to itself
                objects = [binding() for binding in bindings]
                self._bindings[name] = bindings
                known = len(bindings) == self._locals[name] and all(objects)
                return tuple(chain(*objects)) if known else ()
            case ast.Name(id=name):
                return (self._globals[name],) if name in self._globals else ()
            case ast.Attribute(value=value, attr=name):
                return _each(self.resolve(value), lambda f: _attribute(f, name))
            case ast.Subscript(value=value, slice=index):
                return _each(self.resolve(value), lambda f: _item(f, index))
        return ()

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        match target, value:
            case ast.Tuple(elts=targets), ast.Tuple(elts=values) if len(targets) == len(values):
                for part, one in zip(targets, values, strict=True):
                    self._assign(part, one)
            case ast.Name(), _:
                self._bind(target, lambda: self.resolve(value))

    def _assign_each(self, target: ast.expr, value: ast.expr) -> None:
        """As `for a in self.blocks`, with zip or enumerate around it."""
        match target, value:
            case ast.Tuple(elts=[_, each]), ast.Call(func=ast.Name(id="enumerate"), args=[inner]):
                self._assign_each(each, inner)
            case ast.Tuple(elts=targets), ast.Call(func=ast.Name(id="zip"), args=inner):
                for each, one in zip(targets, inner, strict=False):
                    self._assign_each(each, one)
            case _:
                self._bind(target, lambda: _elements(self.resolve(value)))

    def _bind(self, target: ast.expr, get: Callable[[], tuple]) -> None:
        match target:
            case ast.Name(id=name):
                self._bindings[name].append(get)
            case ast.Tuple(elts=targets):
                for k, part in enumerate(targets):
                    index = ast.Constant(k)
                    self._bind(part, lambda index=index: _each(get(), lambda f: _item(f, index)))


class _Rewrite(ast.NodeTransformer):
    def __init__(self, flow: Flow) -> None:
        self._kinds = flow.rewrites

    def generic_visit(self, node: ast.AST) -> ast.AST:
        kind = self._kinds.get(node)
        super().generic_visit(node)
        match kind:
            case "add" | "shift":
                return _helper(node, kind, node.left, node.right)
            case "norm" | "act":
                return _helper(node, kind, node.func, *node.args, keywords=node.keywords)
            case "swish":
                x = node.left if isinstance(node.left, ast.Name) else node.right
                return _helper(node, "act", ast.Name("_ddpm_fast_swish", ast.Load()), x)
            case "scale":
                first = gain_of(node.left)
                parts = (node.left, gain_of(node.right)) if first is None else (node.right, first)
                return _helper(node, kind, *parts)
        return node


def _helper(node: ast.expr, kind: str, *parts: ast.expr, keywords: Iterable[ast.keyword] = ()) -> ast.Call:
    function = ast.Name(f"_ddpm_fast_{kind}", ast.Load())
    return ast.copy_location(ast.Call(function, list(parts), list(keywords)), node)


def _definition(function: FunctionType) -> ast.FunctionDef:
    """A tree that compiles to just the function's code."""
    code = function.__code__
    source = "".join(linecache.getlines(code.co_filename, function.__globals__))
    try:
        definitions, codes = _compiled_file(source, code.co_filename)
    except (SyntaxError, ValueError):
        definitions, codes = {}, {}
    place = code.co_firstlineno, code.co_name
    if place not in definitions or place not in codes:
        raise Unreadable("its source is not at hand")
    if codes[place] != code:
        raise Unreadable("its source is not what runs")
    return copy.deepcopy(definitions[place])


@functools.lru_cache(maxsize=4)
def _compiled_file(source: str, name: str) -> tuple[dict, dict]:
    """The definitions of a file and their code, by first line and name."""
    tree = ast.parse(source)
    definitions = {
        (min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]), node.name): node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    }
    codes: dict[tuple[int, str], CodeType] = {}
    todo = [compile(source, name, "exec", dont_inherit=True)]
    while todo:
        inner = [const for const in todo.pop().co_consts if isinstance(const, CodeType)]
        codes |= {(code.co_firstlineno, code.co_name): code for code in inner}
        todo += inner
    return definitions, codes


def _strip(definition: ast.FunctionDef) -> None:
    """Leave what runs at a call; decorators, defaults and annotations are the function's own."""
    arguments = definition.args
    definition.decorator_list, definition.returns = [], None
    arguments.defaults, arguments.kw_defaults = [], [None] * len(arguments.kwonlyargs)
    for part in ast.walk(arguments):
        if isinstance(part, ast.arg):
            part.annotation = None


def _check_followed(definition: ast.FunctionDef) -> None:
    if not definition.args.args:
        raise Unreadable("it does not name its self")
    for node in ast.walk(definition):
        name = node.id if isinstance(node, ast.Name) else getattr(node, "attr", "")
        if isinstance(node, (ast.Await, ast.Yield, ast.YieldFrom)):
            raise Unreadable("it is a generator")
        if isinstance(node, ast.Name) and name in SEES_LOCALS:
            raise Unreadable(f"it calls {name}")
        if name.startswith("__") and not name.endswith("__"):
            raise Unreadable("it uses private names")


def _compile(definition: ast.FunctionDef, function: FunctionType) -> CodeType:
    """Within a function that has its free variables, as they had in the class."""
    free = dict.fromkeys((*function.__code__.co_freevars, *HELPERS))
    module = ast.parse(f"def outer({', '.join(free)}): pass")
    module.body[0].body = [definition]
    code = compile(
        ast.fix_missing_locations(module), function.__code__.co_filename, "exec", dont_inherit=True
    )
    for _ in range(2):
        code = next(const for const in code.co_consts if isinstance(const, CodeType))
    return code


def _cells(function: FunctionType) -> dict[str, Any]:
    """What the free variables hold now, if anything."""
    held = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):
            held[name] = cell.cell_contents
    return held


def _each(objects: tuple, get: Callable[[Any], Any]) -> tuple:
    """Of every object, or of none."""
    try:
        return tuple(get(f) for f in objects)
    except LookupError:
        return ()


def _elements(lists: tuple) -> tuple:
    if not all(isinstance(f, (nn.ModuleList, nn.Sequential)) for f in lists):
        return ()
    return tuple(module for f in lists for module in f)


def _attribute(f: Any, name: str) -> Any:
    """A child, or an attribute that is stored as it is: a property would run."""
    if isinstance(f, nn.Module) and name in f._modules:
        return f._modules[name]
    if isinstance(f, (nn.Module, ModuleType)):
        return vars(f)[name]
    raise LookupError(name)


def _item(f: Any, index: ast.expr) -> Any:
    if not isinstance(f, (nn.ModuleList, nn.Sequential, nn.ModuleDict)):
        raise LookupError
    if isinstance(index, ast.Slice):
        parts = (None if part is None else _constant(part) for part in (index.lower, index.upper, index.step))
        return f[slice(*parts)]
    return f[_constant(index)]


def _constant(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError as error:
        raise LookupError from error
