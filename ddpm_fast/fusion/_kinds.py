"""Which modules and functions compute exactly a GroupNorm or exactly SiLU, whatever they are called."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

_UPCASTS: dict[type[nn.GroupNorm], bool] = {nn.GroupNorm: False}
"""The classes that are a GroupNorm, and whether each computes in float32 and casts back."""


def swish(x: torch.Tensor) -> torch.Tensor:
    """SiLU, as some write it."""
    return x * torch.sigmoid(x)


_SILUS: set[Callable] = {F.silu, nn.SiLU, swish}
"""The functions, and the classes of modules, that are SiLU."""

_CASTS = ("float", "to", "type", "type_as")
_NORM_STATE = frozenset({*vars(nn.GroupNorm(1, 1)), "weight", "bias"})
_SILU_STATE = frozenset(vars(nn.SiLU()))


def has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def plain(module: nn.Module) -> bool:
    """Whether a call of it runs its class's forward and nothing else."""
    return not has_hooks(module) and "forward" not in module.__dict__


def is_known_norm(f: Any) -> bool:
    """Whether `f` is a module that `why_not_norm` has found to be a GroupNorm, and that is still plain."""
    return isinstance(f, nn.GroupNorm) and _class_of(f, nn.GroupNorm) in _UPCASTS and plain(f)


def upcasts(norm: nn.GroupNorm) -> bool:
    return _UPCASTS[_class_of(norm, nn.GroupNorm)]


def is_known_silu(f: Any) -> bool:
    """Whether `f` is what `is_silu` has found to be SiLU, and still plain."""
    if isinstance(f, nn.Module):
        return _class_of(f, nn.SiLU) in _SILUS and plain(f)
    return isinstance(f, FunctionType) and f in _SILUS


def why_not_norm(module: nn.GroupNorm) -> str | None:
    """Why a GroupNorm cannot be replaced by the op, or None."""
    if has_hooks(module):
        return "it has hooks"
    if not plain(module):
        return "its forward has been replaced"
    kind = _class_of(module, nn.GroupNorm)
    if kind is nn.GroupNorm:
        return None
    if kind not in _UPCASTS and (found := _upcasts(module)) is not None:
        _UPCASTS[kind] = found
    if kind not in _UPCASTS or not _NORM_STATE.issuperset(_state(module)):
        return f"{type(module).__name__} is not known to compute just a GroupNorm"
    return None


def is_silu(f: Any) -> bool:
    """Whether calling `f` on one tensor gives its SiLU: torch's own, or `x * sigmoid(x)` written out."""
    if isinstance(f, nn.Module):
        kind = _class_of(f, nn.SiLU)
        if not plain(f) or (kind is not nn.SiLU and not _SILU_STATE.issuperset(_state(f))):
            return False
    elif isinstance(f, FunctionType):
        kind = f
    else:
        return False
    if kind not in _SILUS and _is_swish(_graph(f)):
        _SILUS.add(kind)
    return kind in _SILUS


def _class_of(module: nn.Module, base: type[nn.Module]) -> type[nn.Module]:
    """What decides a module's forward: torch's own class, if the forward is its, and else the module's."""
    return base if type(module).forward is base.forward else type(module)


def _state(module: nn.Module) -> set[str]:
    """The names of all that a module holds, which might decide what it does."""
    held = (vars(module), module._parameters, module._buffers, module._modules)
    return set().union(*held)


def norms_of_pairs(modules: nn.Sequential) -> list[nn.GroupNorm]:
    """The GroupNorms right before a SiLU."""
    pairs = pairwise(modules)
    return [a for a, b in pairs if isinstance(a, nn.GroupNorm) and why_not_norm(a) is None and is_silu(b)]


def _graph(f: Callable) -> fx.Graph | None:
    try:
        return fx.Tracer().trace(f)
    except Exception:  # whatever a foreign function raises when it is given no tensor
        return None


def _result(graph: fx.Graph | None) -> tuple[fx.Node | None, fx.Node | None]:
    """(its only input, what it returns), where nothing is computed for its effect alone"""
    if graph is None or any(node.op.startswith("call") and not node.users for node in graph.nodes):
        return None, None
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    output = next(iter(reversed(graph.nodes))).args[0]
    return (inputs[0], output) if len(inputs) == 1 and isinstance(output, fx.Node) else (None, None)


def _is_swish(graph: fx.Graph | None) -> bool:
    x, y = _result(graph)
    if x is None:
        return False
    if y.target is F.silu:
        return y.args == (x,) and not set(y.kwargs) - {"inplace"}
    is_product = y.op in ("call_function", "call_method") and y.name.split("_")[0] == "mul"
    if not is_product or len(y.args) != 2 or y.kwargs or x not in y.args:
        return False
    gate = y.args[1] if y.args[0] is x else y.args[0]
    return (
        isinstance(gate, fx.Node)
        and gate.target in (torch.sigmoid, F.sigmoid, "sigmoid")
        and gate.args == (x,)
        and len(graph.nodes) == 4
    )


def _upcasts(module: nn.GroupNorm) -> bool | None:
    """False: ``group_norm(x, ...)``. True: ``group_norm(x.float(), ...).to(x.dtype)``. None: neither."""
    probe = copy.copy(module)
    probe.num_groups, probe.eps = 7919, 0.7919  # to see that these are what it passes on
    x, y = _result(_graph(probe))
    if x is None:
        return None
    back = y.op == "call_method" and y.target in _CASTS
    norm = y.args[0] if back else y
    if norm.target is not F.group_norm or norm.args[1:] != (7919,) or norm.kwargs.get("eps") != 0.7919:
        return None
    for name in ("weight", "bias"):
        value = norm.kwargs[name]
        if value is None or (value.op, value.target) != ("get_attr", name):
            return None
    if not back:
        return False if norm.args[0] is x else None
    return True if _is_float32_of(norm.args[0], x) and _is_dtype_of(y, x) else None


def _is_float32_of(node: fx.Node, x: fx.Node) -> bool:
    if node.op != "call_method" or node.kwargs:
        return False
    return (node.target, node.args) in (
        ("float", (x,)),
        ("to", (x, torch.float32)),
        ("type", (x, torch.float32)),
    )


def _is_dtype_of(node: fx.Node, x: fx.Node) -> bool:
    if node.kwargs or len(node.args) != 2:
        return False
    like = node.args[1]
    if node.target == "type_as":
        return like is x
    is_dtype = isinstance(like, fx.Node) and like.target is getattr and like.args == (x, "dtype")
    return node.target in ("to", "type") and is_dtype
