"""The proof, on a method's syntax tree, that its norms may wait for their SiLU.

The body is walked in the order in which it runs, with what each variable may hold. A sum `a + b` and a norm
are *sites*: what they give waits until a norm, or SiLU, takes it, and may be scaled and shifted on the way.
Anything else that sees it rejects the site, and so does anything that runs meanwhile and could change what it
reads.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from torch import nn

from ._kinds import is_silu, norms_of_pairs, plain, why_not_norm

Site = ast.Call | ast.BinOp
Sites = frozenset[Site]
NOTHING: Sites = frozenset()

VIEWS = {"chunk", "split", "tensor_split", "unbind", "unsqueeze", "view", "reshape", "flatten", "size", "dim"}
READERS = (len, isinstance, hasattr, getattr, tuple)
SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)

SEEN = "something other than SiLU uses its output"
TWICE = "its output is used more than once"
BETWEEN = "something else runs between it and SiLU"
UNUSED = "its output does not reach a SiLU"
JUMP = "it stands in a try or a match"


@dataclass
class State:
    """What may be so, on one of the paths that lead here."""

    holds: dict[str, Sites] = field(default_factory=dict)
    waiting: set[Site] = field(default_factory=set)
    taken: set[Site] = field(default_factory=set)

    def copy(self) -> State:
        return State(dict(self.holds), set(self.waiting), set(self.taken))

    def merged(self, other: State | None) -> State:
        if other is None:
            return self.copy()
        names = self.holds.keys() | other.holds.keys()
        holds = {name: self.holds.get(name, NOTHING) | other.holds.get(name, NOTHING) for name in names}
        return State(holds, self.waiting | other.waiting, self.taken | other.taken)


class Flow:
    """One walk of a function.

    Args:
        function: the tree; its nodes are the keys of the results.
        resolve: the objects that an expression may be, as far as the module tells; none if unknown.

    Attributes:
        rewrites: what each node becomes: "add", "norm", "scale", "shift", "act" or "swish".
        folded: the norms that are fused, each with what goes into the op besides.
        left: the norms that some call of them does not let fuse, each with a reason.
    """

    def __init__(self, function: ast.FunctionDef, resolve: Callable[[ast.expr], tuple]) -> None:
        self._norms: dict[ast.expr, tuple[nn.GroupNorm, ...]] = {}  # what a call runs, or a Sequential first
        self._loose: dict[ast.expr, list[nn.GroupNorm]] = {}  # in Sequentials that only this method has
        self._places: dict[ast.expr, tuple[str, Sites]] = {}  # what takes or carries sites, and which
        self._reasons: dict[Site, str] = {}
        self._resolve = resolve
        self._hidden = _names_of_inner_scopes(function)
        self._sites: set[Site] = set()
        self._served: set[Site] = set()
        self._testing = False
        self._jumps = 0
        self._exits: list[list[State]] = []  # of each loop that is open: where a break or a continue left it
        self._state: State | None = State()
        self._block(function.body)
        self._reject(self._sites - self._served, UNUSED)
        for place, (kind, sites) in self._places.items():
            if kind == "norm" and place in self._reasons:  # a sum may wait only for norms that wait
                self._reject(sites, SEEN)
        self.rewrites = self._what_is_rewritten()
        self.folded = self._what_is_folded()
        self.left = {
            norm: self._reasons[site]
            for site, norms in self._norms.items()
            for norm in norms
            if site in self._reasons
        }

    def _what_is_rewritten(self) -> dict[ast.expr, str]:
        accepted = self._sites - self._reasons.keys()
        rewrites = {site: "add" if isinstance(site, ast.BinOp) else "norm" for site in accepted}
        for place, (kind, sites) in self._places.items():
            if kind != "norm" and sites & accepted:
                rewrites[place] = kind
        return rewrites | dict.fromkeys(self._loose, "act")

    def _what_is_folded(self) -> dict[nn.GroupNorm, set[str]]:
        folded: dict[nn.GroupNorm, set[str]] = {}
        for norms in self._loose.values():
            folded |= {norm: set() for norm in norms}
        for site in self.rewrites.keys() & self._norms.keys():
            folded |= {norm: folded.get(norm, set()) for norm in self._norms[site]}
        for place, (kind, sites) in self._places.items():
            for site in sites & self.rewrites.keys():
                owner, what = (place, "add") if isinstance(site, ast.BinOp) else (site, kind)
                for norm in self._norms[owner]:
                    folded.setdefault(norm, set()).add(what)
        return folded

    # Statements

    def _block(self, statements: list[ast.stmt]) -> None:
        for statement in statements:
            if self._state is None:  # after a return
                return
            self._statement(statement)

    def _statement(self, node: ast.stmt) -> None:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)]):
                self._bind(name, self._value(node.value))
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr()):
                self._bind(name, self._value(node.value))
            case ast.Assign():
                self._see(node.value)
                for target in node.targets:
                    self._store(target)
            case ast.If():
                self._testing = True
                self._see(node.test)
                self._testing = False
                self._branches(node.body, node.orelse)
            case ast.For():
                self._see(node.iter)
                self._loop(lambda: self._store(node.target), node.body, node.orelse)
            case ast.While():
                self._loop(lambda: self._see(node.test), node.body, node.orelse)
            case ast.With():
                for item in node.items:
                    self._see(item.context_expr)
                    if item.optional_vars is not None:
                        self._store(item.optional_vars)
                self._disturb()
                self._block(node.body)
                self._disturb()
            case ast.AugAssign():
                if isinstance(node.target, ast.Name):
                    self._reject(self._load(node.target.id), SEEN)
                self._see(node.value)
                self._store(node.target)
                self._disturb()
            case ast.Return():
                if node.value is not None:
                    self._see(node.value)
                self._state = None
            case ast.Raise():
                for part in ast.walk(node):  # nothing runs after it but who handles the error
                    if isinstance(part, ast.Name):
                        self._reject(self._state.holds.get(part.id, NOTHING), SEEN)
                self._state = None
            case ast.Expr() | ast.Assert():
                for part in ast.iter_child_nodes(node):
                    self._see(part)
            case ast.Delete():
                for target in node.targets:
                    self._store(target)
            case ast.Pass() | ast.Import() | ast.ImportFrom() | ast.Global() | ast.Nonlocal():
                pass
            case ast.Break() | ast.Continue():
                self._disturb()
                self._exits[-1].append(self._state)
                self._state = None
            case _:
                self._unfollowed(node)

    def _branches(self, *blocks: list[ast.stmt]) -> None:
        before, after = self._state, None
        for block in blocks:
            self._state = before.copy()
            self._block(block)
            if self._state is not None:
                after = self._state.merged(after)
        self._state = after

    def _loop(self, head: Callable[[], None], body: list[ast.stmt], orelse: list[ast.stmt]) -> None:
        while True:
            before = self._state.copy()
            self._exits.append([])
            head()
            self._block(body)
            self._state = before.merged(self._state)
            for state in self._exits.pop():
                self._state = self._state.merged(state)
            if self._state == before:
                break
        self._block(orelse)

    def _unfollowed(self, node: ast.stmt) -> None:
        """A statement whose order is not followed: nothing may wait across it or within it."""
        self._disturb()
        before = self._state
        self._jumps += 1
        for field_ in ("target", "value", "subject"):
            part = getattr(node, field_, None)
            if isinstance(part, ast.expr):
                self._see(part)
                if field_ == "target":
                    self._store(part)
        for blocks in ("body", "handlers", "cases", "orelse", "finalbody"):
            for part in getattr(node, blocks, ()) if not isinstance(node, SCOPES) else ():
                self._state = before.merged(self._state)
                self._block([part] if isinstance(part, ast.stmt) else part.body)
        self._jumps -= 1
        self._state = before.merged(self._state)
        self._disturb()

    def _bind(self, name: str, sites: Sites) -> None:
        if name in self._hidden:
            self._reject(sites, SEEN)
        self._state.holds[name] = sites

    def _store(self, target: ast.expr) -> None:
        match target:
            case ast.Name(id=name):
                self._state.holds[name] = NOTHING
            case ast.Tuple() | ast.List():
                for part in target.elts:
                    self._store(part)
            case ast.Starred():
                self._store(target.value)
            case _:
                for part in ast.iter_child_nodes(target):
                    self._see(part)
                self._disturb()

    # Expressions

    def _see(self, node: ast.AST) -> None:
        self._reject(self._value(node), SEEN)

    def _value(self, node: ast.AST) -> Sites:
        """The sites whose output an expression may be."""
        match node:
            case ast.Name(id=name):
                return self._load(name) if isinstance(node.ctx, ast.Load) else NOTHING
            case ast.Call():
                return self._call(node)
            case ast.BinOp(op=ast.Add()):
                return self._sum(node)
            case ast.BinOp(op=ast.Mult()):
                return self._product(node)
            case ast.NamedExpr():
                self._see(node.value)
                self._store(node.target)
            case ast.Lambda():
                pass
            case _ if isinstance(node, COMPREHENSIONS):
                self._disturb()
            case _:
                for part in ast.iter_child_nodes(node):
                    self._see(part)
        return NOTHING

    def _load(self, name: str) -> Sites:
        sites = self._state.holds.get(name, NOTHING)
        self._reject(sites & self._state.taken, TWICE)
        return sites

    def _call(self, node: ast.Call) -> Sites:
        objects = self._resolve(node.func)
        only_inplace = all(k.arg == "inplace" and isinstance(k.value, ast.Constant) for k in node.keywords)
        argument = node.args[0] if len(node.args) == 1 else None
        if only_inplace and objects and argument is not None and not isinstance(argument, ast.Starred):
            norms = all(isinstance(f, nn.GroupNorm) and why_not_norm(f) is None for f in objects)
            if norms and not node.keywords:
                self._take(node, "norm", self._value(argument), ast.BinOp)
                self._norms[node] = objects
                return self._wait(node)
            if all(type(f) is nn.Sequential and "forward" not in vars(f) for f in objects):
                loose = [norm for f in objects for norm in norms_of_pairs(f)]
                self._loose |= {node: loose} if loose else {}
            takes = [_takes(f) for f in objects]
            if takes[0] is not None and takes.count(takes[0]) == len(takes):
                taken = self._take(node, "act", self._value(argument), takes[0])
                if takes[0] is ast.BinOp:
                    self._norms[node] = tuple(f[0] for f in objects)
                if not taken or type(objects[0]) is nn.Sequential:  # in place, or what follows in there
                    self._disturb()
                return NOTHING
        for part in ast.iter_child_nodes(node):
            self._see(part)
        if not self._only_reads(node, objects):
            self._disturb()
        return NOTHING

    def _only_reads(self, node: ast.Call, objects: tuple) -> bool:
        if isinstance(node.func, ast.Attribute) and node.func.attr in VIEWS:
            return True
        return bool(objects) and all(
            (type(f) is nn.Linear and plain(f))
            or any(f is reader for reader in READERS)
            or (self._testing and isinstance(f, FunctionType))  # as `exists(x)`
            for f in objects
        )

    def _sum(self, node: ast.BinOp) -> Sites:
        left, right = self._value(node.left), self._value(node.right)
        carried = self._carry(node, "shift", (node.left, left), (node.right, right))
        if carried is not None:
            return carried
        self._reject(left | right, SEEN)
        return self._wait(node)

    def _product(self, node: ast.BinOp) -> Sites:
        name = self._swish_of(node)
        if name is not None:
            self._take(node, "swish", self._load(name), ast.Call)
            return NOTHING
        sides = []
        for side in (node.left, node.right):
            gain = gain_of(side)
            sides.append((gain, None) if gain is not None else (side, self._value(side)))
            if gain is not None:
                self._see(gain)
        (a, left), (b, right) = sides
        if (left is None) != (right is None):
            carried = self._carry(node, "scale", (a, left or NOTHING), (b, right or NOTHING))
            if carried is not None:
                return carried
        self._reject((left or NOTHING) | (right or NOTHING), SEEN)
        return NOTHING

    def _carry(self, node: ast.BinOp, kind: str, *sides: tuple[ast.expr, Sites]) -> Sites | None:
        """The norms that one side may be, if the other is no norm and may as well be evaluated after it."""
        (first, left), (_, right) = sides
        norms = [{site for site in sites if isinstance(site, ast.Call)} for sites in (left, right)]
        if bool(norms[0]) == bool(norms[1]):
            return None
        if norms[1] and any(isinstance(part, ast.Call) for part in ast.walk(first)):
            return None
        self._reject((left | right) - norms[0] - norms[1], SEEN)
        self._place(node, kind, left | right)
        return frozenset(norms[0] | norms[1])

    def _swish_of(self, node: ast.BinOp) -> str | None:
        """x, of `x * sigmoid(x)`."""
        for x, gate in ((node.left, node.right), (node.right, node.left)):
            match x, gate:
                case ast.Name(id=a), ast.Call(func=f, args=[ast.Name(id=b)], keywords=[]) if a == b:
                    if self._resolve(f) in ((torch.sigmoid,), (nn.functional.sigmoid,)):
                        return a
                case ast.Name(id=a), ast.Call(ast.Attribute(ast.Name(id=b), "sigmoid"), []) if a == b:
                    return a
        return None

    # Sites

    def _wait(self, site: Site) -> Sites:
        self._sites.add(site)
        if self._jumps:
            self._reject({site}, JUMP)
        self._state.waiting.add(site)
        self._state.taken.discard(site)
        return frozenset([site])

    def _take(self, node: ast.expr, kind: str, sites: Sites, accepted: type[Site]) -> Sites:
        taken = frozenset(site for site in sites if isinstance(site, accepted))
        self._reject(sites - taken, SEEN)
        self._place(node, kind, taken)
        self._served |= taken
        self._state.waiting -= taken
        self._state.taken |= taken
        return taken

    def _place(self, node: ast.expr, kind: str, sites: Sites) -> None:
        _, before = self._places.get(node, (kind, NOTHING))
        self._places[node] = kind, before | sites

    def _reject(self, sites: Any, reason: str) -> None:
        for site in sites:
            self._reasons.setdefault(site, reason)

    def _disturb(self) -> None:
        if self._state is not None:
            self._reject(self._state.waiting, BETWEEN)
            self._state.waiting.clear()


def gain_of(node: ast.expr) -> ast.expr | None:
    """s, of `1 + s`."""
    match node:
        case ast.BinOp(op=ast.Add(), left=ast.Constant(value=1), right=s):
            return s
        case ast.BinOp(op=ast.Add(), left=s, right=ast.Constant(value=1)):
            return s
    return None


def _takes(f: Any) -> type[Site] | None:
    """What may wait for a call of `f`: a norm for SiLU, a sum for a norm; both may begin a Sequential."""
    if type(f) is nn.Sequential and len(f) > 1:
        if isinstance(f[0], nn.GroupNorm):
            return ast.BinOp if why_not_norm(f[0]) is None and is_silu(f[1]) else None
        f = f[0]
    return ast.Call if is_silu(f) else None


def _names_of_inner_scopes(function: ast.FunctionDef) -> set[str]:
    """Variables that others than the function's own statements may read, or bind, at some time."""
    hidden: set[str] = set()
    for node in ast.walk(function):
        if node is not function and isinstance(node, SCOPES + COMPREHENSIONS):
            hidden |= {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
        elif isinstance(node, (ast.Global, ast.Nonlocal)):
            hidden |= set(node.names)
    return hidden
