"""`fuse`: GroupNorm and SiLU as one op in any U-Net, in place, and `unfuse`, which undoes it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import FunctionType, MappingProxyType, MethodType

import torch
from torch import nn

from ._flow import Flow
from ._kinds import norms_of_pairs, why_not_norm
from ._pending import sequential
from ._source import Method, Names, Unreadable

__all__ = ["Fusion", "fuse", "unfuse"]

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class Fusion:
    """What `fuse` did.

    Attributes:
        fused: the GroupNorms that run with their SiLU as one op, by name.
        folded: of these, by name, what else the op may take: "add", a sum before the norm, where one term has
            one value per sample and channel; "scale", "shift", FiLM after it.
        left: the GroupNorms that run as before, by name, each with the reason.
    """

    fused: tuple[str, ...]
    folded: Mapping[str, tuple[str, ...]]
    left: Mapping[str, str]

    def __str__(self) -> str:
        lines = [f"fused {len(self.fused)} of {len(self.fused) + len(self.left)} GroupNorms with their SiLU"]
        if self.left:
            lines[0] += "; left:"
        names: dict[str, list[str]] = {}
        for name, reason in self.left.items():
            names.setdefault(reason, []).append(name or "the model itself")
        return "\n".join(lines + [f"  {', '.join(of)}: {reason}" for reason, of in names.items()])


def fuse(model: nn.Module) -> Fusion:
    """Replace each GroupNorm that SiLU follows by `ops.group_norm_silu`, in place.

    With it goes the time embedding that is added before, ``norm(h + emb[:, :, None, None])``, and FiLM after,
    ``norm(h) * (1 + scale) + shift``. It takes any model whose source is in a file or a notebook: its methods
    are read from there, and a norm is fused where the source proves that nothing but SiLU sees its output.
    Everything else runs as it is written, with its branches and arguments; and where something does not fit
    the op at run time (a shape, a dtype, a hook, a module in another's place), the modules themselves run.

    Parameters, buffers and the state dict stay; a copy by ``copy.deepcopy`` is fused, with its own weights,
    and what comes back from a pickle is not. It may be called again, as after a change to the model's
    modules. ``torch.compile`` comes after it. As the op, it is differentiable in reverse mode; to forward
    mode and ``torch.func`` the modules show themselves.

    A fused module refers to itself: a shallow copy, as ``nn.DataParallel`` makes, would run the original's
    parts (`unfuse` it first), and a model that is let go waits for the garbage collector.

    Args:
        model: any module. SiLU may be ``nn.SiLU``, ``F.silu``, ``x * sigmoid(x)``, or a module or function
            that is one of these; GroupNorm may be a subclass that computes in float32 and casts back.

    Returns:
        What was fused and what was left, by name; ``print`` it.

    Raises:
        TypeError: model is no ``nn.Module``, or a compiled or scripted one.
    """
    _check(model)
    unfuse(model)
    work = _Work(model)
    for owner in model.modules():
        if type(owner) is nn.Sequential:
            work.fuse_sequential(owner)
    for owner in model.modules():
        if not isinstance(owner, nn.GroupNorm) and type(owner) not in _CONTAINERS:
            work.fuse_methods(owner)
    return work.report()


def unfuse(model: nn.Module) -> None:
    """Undo `fuse`: every forward is its class's again. A model that is not fused stays as it is.

    Raises:
        TypeError: as `fuse`.
    """
    _check(model)
    for module in model.modules():
        for name in [name for name, value in vars(module).items() if _is_ours(value, module, name)]:
            delattr(module, name)


@dataclass
class _Work:
    model: nn.Module
    names: dict[nn.GroupNorm, str] = field(init=False)
    folded: dict[nn.GroupNorm, set[str]] = field(default_factory=dict)
    reasons: dict[nn.GroupNorm, str] = field(default_factory=dict)
    methods: dict[FunctionType, Method | Unreadable] = field(default_factory=dict)

    def __post_init__(self) -> None:
        modules = self.model.named_modules()
        self.names = {module: name for name, module in modules if isinstance(module, nn.GroupNorm)}
        for norm in self.names:
            reason = why_not_norm(norm)
            if reason is not None:
                self.reasons[norm] = reason

    def fuse_sequential(self, owner: nn.Sequential) -> None:
        norms = norms_of_pairs(owner)
        if norms and "forward" not in vars(owner):
            owner.forward = MethodType(sequential, owner)
            self.folded |= {norm: set() for norm in norms}

    def fuse_methods(self, owner: nn.Module) -> None:
        within = dict(_within(owner))
        for name, function in _methods(owner, set(within.values())):
            try:
                if name in vars(owner):
                    raise Unreadable("it has been replaced")
                self._fuse_method(owner, name, function)
            except Unreadable as reason:
                for norm in within:
                    self.reasons.setdefault(norm, f"{type(owner).__name__}.{name} is left: {reason}")
        for norm in within.keys() - self.folded.keys():
            self.reasons.setdefault(norm, f"no method of {type(owner).__name__} calls it by its name")

    def _fuse_method(self, owner: nn.Module, name: str, function: FunctionType) -> None:
        if function not in self.methods:
            try:
                self.methods[function] = Method(function)
            except Unreadable as reason:
                self.methods[function] = reason
        method = self.methods[function]
        if isinstance(method, Unreadable):
            raise method
        definition = method.definition()
        flow = Flow(definition, Names(owner, definition, method.plain).resolve)
        if flow.rewrites:
            new = method.rewritten(definition, flow)
            new.__ddpm_fast__ = True
            setattr(owner, name, MethodType(new, owner))
        for norm, folded in flow.folded.items():
            self.folded.setdefault(norm, set()).update(folded)
        for norm, reason in flow.left.items():
            self.reasons.setdefault(norm, reason)

    def report(self) -> Fusion:
        fused = {norm: name for norm, name in self.names.items() if norm not in self.reasons}
        order = ("add", "scale", "shift")
        folded = {name: tuple(k for k in order if k in self.folded[norm]) for norm, name in fused.items()}
        left = {name: self.reasons[norm] for norm, name in self.names.items() if norm in self.reasons}
        return Fusion(tuple(fused.values()), MappingProxyType(folded), MappingProxyType(left))


def _within(owner: nn.Module) -> Iterator[tuple[nn.GroupNorm, str]]:
    """The norms that it holds itself or in containers, each with the child's name."""
    for name, child in owner.named_children():
        if isinstance(child, nn.GroupNorm):
            yield child, name
        elif type(child) in _CONTAINERS:
            yield from ((norm, name) for norm, _ in _within(child))


def _methods(owner: nn.Module, children: set[str]) -> Iterator[tuple[str, FunctionType]]:
    """Its class's methods that name one of these children."""
    seen: set[str] = set()
    for cls in type(owner).__mro__:
        if cls.__module__.partition(".")[0] == "torch":
            continue
        for name, function in vars(cls).items():
            if isinstance(function, FunctionType) and name not in seen and not name.startswith("__"):
                code = getattr(inspect.unwrap(function), "__code__", None)
                if code is not None and children.intersection(code.co_names):
                    yield name, function
            seen.add(name)


def _is_ours(value: object, module: nn.Module, name: str) -> bool:
    """Set by `fuse`; or by a pickle of what it set, which comes back as the class's own method."""
    if not isinstance(value, MethodType):
        return False
    function = value.__func__
    if function is sequential or hasattr(function, "__ddpm_fast__"):
        return True
    return value.__self__ is module and function is getattr(type(module), name, None)


def _check(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model must not be scripted or traced: fuse the module that it was made from")
    if hasattr(model, "_orig_mod") or model._compiled_call_impl is not None:
        raise TypeError("model must not be compiled: fuse it first, then compile it")
