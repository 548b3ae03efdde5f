"""The cases of every op: inputs, what a user would write in eager PyTorch, and the float64 answer.

A case is a name, the op, and a function of a generator that makes its float64 inputs; the tests and the
benchmarks iterate cases x backends x dtypes x layouts, so a new op needs an entry here and nothing elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm_fast import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    op: str
    name: str
    inputs: Callable[[torch.Generator], dict]
    """Arguments by name; float64 tensors are cast to the dtype under test, tables to the table's dtype."""

    @property
    def id(self) -> str:
        return f"{self.op}-{self.name}"


KEEP = {"table", "clip"}  # float arguments that stay in the dtype that is computed in


def cast(inputs: dict, dtype: torch.dtype, layout: str = "contiguous") -> dict:
    """The inputs as the op gets them: rounded to `dtype`, 4-d ones in `layout`."""
    wide = reference.compute_dtype(dtype)
    cast = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            value = value.to(torch.float32 if name == "clip" else wide if name in KEEP else dtype)
            if layout == "channels_last" and value.dim() == 4:
                value = value.contiguous(memory_format=torch.channels_last)
        cast[name] = value
    return cast


def upcast(inputs: dict) -> dict:
    """The same numbers in float64, for the reference."""
    return {
        name: value.double()
        if isinstance(value, Tensor) and value.is_floating_point() and name != "clip"
        else value
        for name, value in inputs.items()
    }


def tuple_of(value) -> tuple:
    return value if isinstance(value, tuple) else (value,)


def check_error_rule(got, eager, exact, what=""):
    """err(kernel) <= 2 err(eager, same dtype) + eps(dtype) max|ref|; NaN never passes."""
    assert got.shape == exact.shape
    error = (got.double() - exact).abs().max().item()
    allowed = 2 * (eager.double() - exact).abs().max().item()
    allowed += torch.finfo(got.dtype).eps * exact.abs().max().item()
    assert error <= allowed, f"{what} error {error:.3g} > allowed {allowed:.3g}"


# ---- q_sample ----


def _q_inputs(shape, t, T=1000):
    def make(g):
        t_ = torch.tensor(t) if not isinstance(t, str) else torch.randint(0, T, (shape[0],), generator=g)
        alphas_cumprod = torch.cumprod(1 - torch.linspace(1e-4, 0.02, T, dtype=torch.float64), 0)
        return {
            "x0": torch.randn(shape, generator=g, dtype=torch.float64),
            "noise": torch.randn(shape, generator=g, dtype=torch.float64),
            "t": t_,
            "table": torch.stack([alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()], 1),
        }

    return make


def eager_q_sample(x0, noise, t, table):
    weights = table[t].to(x0.dtype)
    a, b = (w.reshape(-1, *[1] * (x0.dim() - 1)) for w in weights.unbind(-1))
    return a * x0 + b * noise


# ---- posterior_step ----


def _step_inputs(shape, *, columns=7, out_factor=1, history=False, noise=True, clip=1.0, i=None, rows=7):
    def make(g):
        def randn(*s):
            return torch.randn(s, generator=g, dtype=torch.float64)

        table = randn(rows, columns)
        table[:, 5] *= history
        table[:, 6] = table[:, 6].abs() * noise
        if columns == 9:
            table[:, 7:] = table[:, 7:].abs() * -2
        out_shape = (shape[0], shape[1] * out_factor, *shape[2:])
        return {
            "x": randn(*shape),
            "out": randn(*out_shape),
            "table": table,
            "i": torch.tensor(3) if i is None else torch.tensor(i),
            "noise": randn(*shape) if noise else None,
            "x0_prev": randn(*shape) if history else None,
            "clip": torch.tensor(clip) if isinstance(clip, list) else clip,
        }

    return make


def eager_posterior_step(x, out, table, i, noise, x0_prev, clip):
    row = [c.reshape(-1, *[1] * (x.dim() - 1)) for c in table[i].to(x.dtype).unbind(-1)]
    p, q, a, b, c, d, s = row[:7]
    if out.shape[1] == 2 * x.shape[1]:
        out, v = out.chunk(2, 1)
        if len(row) == 9:
            frac = (v + 1) / 2
            s = s * torch.exp(0.5 * (frac * row[8] + (1 - frac) * row[7]))
    x0 = p * x + q * out
    if clip is not None:
        bound = clip.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1)) if isinstance(clip, Tensor) else clip
        x0 = x0.clamp(-bound, bound)
    x_next = a * x0 + b * x + c * out
    if x0_prev is not None:
        x_next = x_next + d * x0_prev
    if noise is not None:
        x_next = x_next + s * noise
    return x_next, x0


# ---- group_norm_silu ----


def _norm_inputs(
    shape,
    groups,
    *,
    affine=True,
    add=False,
    film=False,
    act="silu",
    eps=1e-5,
    mean=0.0,
    std=1.0,
    spike=None,
    sky=None,
    tail=None,
):
    def make(g):
        def randn(*s):
            return torch.randn(s, generator=g, dtype=torch.float64)

        b, c = shape[:2]
        x = randn(*shape) * std + mean
        if spike is not None:
            x.view(b, -1)[:, 0] = spike
        if sky is not None:  # the first rows lie far from the rest
            x[:, :, : shape[2] // 4] += sky
        if tail is not None:  # the last pixel alone does: a chunk of its own, perhaps
            x[..., -1] += tail
        return {
            "x": x,
            "num_groups": groups,
            "weight": randn(c) + 0.5 if affine else None,
            "bias": randn(c) if affine else None,
            "eps": eps,
            "add": randn(b, c) if add else None,
            "scale": randn(b, c) if film else None,
            "shift": randn(b, c) if film else None,
            "act": act,
        }

    return make


def eager_group_norm_silu(x, num_groups, weight, bias, eps, add, scale, shift, act):
    def per_channel(v):
        return v.reshape(*v.shape, *[1] * (x.dim() - 2))

    h = x if add is None else x + per_channel(add)
    h = F.group_norm(h, num_groups, weight, bias, eps)
    if scale is not None:
        h = h * (1 + per_channel(scale))
    if shift is not None:
        h = h + per_channel(shift)
    return F.silu(h) if act == "silu" else h


# ---- group_norm_silu_concat ----


def _concat_inputs(shape, skip_channels, groups, *, concat=False, **given):
    """`_norm_inputs` of x and skip together, cut in two."""

    def make(g):
        inputs = _norm_inputs((shape[0], shape[1] + skip_channels, *shape[2:]), groups, **given)(g)
        x, skip = (v.clone() for v in inputs.pop("x").split([shape[1], skip_channels], 1))
        return {"x": x, "skip": skip, **inputs, "concat": concat}

    return make


def eager_group_norm_silu_concat(x, skip, num_groups, weight, bias, eps, add, scale, shift, act, concat):
    both = torch.cat([x, skip], 1)
    y = eager_group_norm_silu(both, num_groups, weight, bias, eps, add, scale, shift, act)
    return (y, both) if concat else y


EAGER = {
    "q_sample": eager_q_sample,
    "posterior_step": eager_posterior_step,
    "group_norm_silu": eager_group_norm_silu,
    "group_norm_silu_concat": eager_group_norm_silu_concat,
}


def _cases() -> list[Case]:
    cases = []

    def add(op, name, inputs):
        cases.append(Case(op, name, inputs))

    add("q_sample", "cifar", _q_inputs((3, 3, 32, 32), "random"))
    add("q_sample", "one", _q_inputs((1, 3, 7, 5), 999))
    add("q_sample", "first-and-last-t", _q_inputs((2, 1, 9, 9), [0, 999]))
    add("q_sample", "points", _q_inputs((130, 2), "random"))
    add("q_sample", "flat", _q_inputs((5,), "random"))
    add("q_sample", "several-spans", _q_inputs((2, 3, 67, 61), "random"))
    add("q_sample", "video", _q_inputs((2, 3, 3, 5, 7), "random"))

    add("posterior_step", "ddpm", _step_inputs((3, 3, 32, 32)))
    add("posterior_step", "one-odd", _step_inputs((1, 3, 7, 5)))
    add("posterior_step", "no-noise", _step_inputs((2, 3, 9, 9), noise=False))
    add("posterior_step", "no-clip", _step_inputs((2, 3, 8, 8), clip=None))
    add("posterior_step", "clip-each", _step_inputs((3, 3, 8, 8), clip=[0.3, float("inf"), 2.0]))
    add("posterior_step", "history", _step_inputs((2, 3, 16, 16), history=True, noise=False))
    add("posterior_step", "history-and-noise", _step_inputs((2, 3, 16, 16), history=True))
    add("posterior_step", "row-each", _step_inputs((4, 3, 8, 8), i=[0, 6, 2, 2], history=True))
    add("posterior_step", "learned", _step_inputs((2, 3, 8, 9), columns=9, out_factor=2))
    add("posterior_step", "learned-several-spans", _step_inputs((2, 3, 37, 41), columns=9, out_factor=2))
    add("posterior_step", "learned-ignored", _step_inputs((2, 3, 8, 8), out_factor=2))
    add("posterior_step", "points", _step_inputs((130, 2)))
    add("posterior_step", "several-spans", _step_inputs((2, 3, 67, 61)))

    add("group_norm_silu", "cifar-128", _norm_inputs((2, 128, 32, 32), 32))
    add("group_norm_silu", "cifar-256-one", _norm_inputs((1, 256, 16, 16), 32, eps=1e-6))
    add("group_norm_silu", "cifar-512-4x4", _norm_inputs((2, 512, 4, 4), 32))
    add("group_norm_silu", "plain", _norm_inputs((3, 32, 8, 8), 8, affine=False))
    add("group_norm_silu", "no-act", _norm_inputs((2, 64, 8, 8), 32, act="none"))
    add("group_norm_silu", "add", _norm_inputs((2, 64, 16, 16), 32, add=True))
    add("group_norm_silu", "film", _norm_inputs((2, 64, 8, 8), 32, film=True))
    add("group_norm_silu", "everything", _norm_inputs((3, 96, 9, 7), 32, add=True, film=True))
    add("group_norm_silu", "odd", _norm_inputs((1, 6, 7, 5), 3, add=True))
    add("group_norm_silu", "odd-groups", _norm_inputs((2, 21, 5, 3), 7, film=True))
    add("group_norm_silu", "one-group", _norm_inputs((2, 20, 6, 6), 1))
    add("group_norm_silu", "instance", _norm_inputs((2, 20, 6, 6), 20))
    add("group_norm_silu", "one-pixel", _norm_inputs((5, 64, 1, 1), 16))
    add("group_norm_silu", "vectors", _norm_inputs((7, 48), 6, add=True))
    add("group_norm_silu", "sequence", _norm_inputs((2, 32, 19), 8))
    add("group_norm_silu", "video", _norm_inputs((2, 16, 3, 5, 7), 4))
    add("group_norm_silu", "large-image", _norm_inputs((1, 64, 96, 96), 32, add=True))
    add("group_norm_silu", "large-mean", _norm_inputs((2, 64, 16, 16), 32, mean=1e4, std=1e-2))
    add("group_norm_silu", "large-mean-add", _norm_inputs((2, 64, 16, 16), 32, mean=1e4, std=1e-2, add=True))
    add("group_norm_silu", "tiny", _norm_inputs((2, 64, 8, 8), 32, std=1e-6, eps=1e-6))
    add("group_norm_silu", "spike", _norm_inputs((2, 64, 32, 32), 32, spike=1e4))
    add("group_norm_silu", "sky", _norm_inputs((1, 32, 64, 64), 8, sky=300.0))
    add("group_norm_silu", "tail", _norm_inputs((1, 4, 49153), 1, tail=1e3))
    add("group_norm_silu", "short-tail", _norm_inputs((1, 2, 2049), 1, tail=1e3))
    add("group_norm_silu", "wide-group", _norm_inputs((1, 3076, 2, 2), 1, add=True))
    add("group_norm_silu", "constant", _norm_inputs((2, 32, 8, 8), 8, std=0.0, mean=3.0))

    def concat(name, *args, **given):
        add("group_norm_silu_concat", name, _concat_inputs(*args, **given))

    concat("cifar-straddling", (2, 256, 16, 16), 128, 32, eps=1e-6)
    concat("built", (2, 256, 8, 8), 128, 32, concat=True)
    concat("halves", (3, 32, 8, 8), 32, 16)
    concat("halves-built", (1, 64, 16, 16), 64, 32, concat=True)
    concat("odd", (1, 5, 7, 5), 7, 3, add=True, concat=True)
    concat("last-register", (2, 2, 5, 3), 62, 4)
    concat("everything", (3, 58, 9, 7), 38, 32, add=True, film=True, concat=True)
    concat("one-group", (2, 13, 6, 6), 7, 1, film=True)
    concat("instance", (2, 13, 6, 6), 7, 20, act="none")
    concat("one-pixel", (5, 40, 1, 1), 24, 16, concat=True)
    concat("vectors", (7, 30), 18, 6, add=True)
    concat("video", (2, 10, 3, 5, 7), 6, 4, concat=True)
    concat("large-image", (1, 40, 96, 96), 24, 16, add=True, concat=True)
    concat("large-mean", (2, 40, 16, 16), 24, 16, mean=1e4, std=1e-2, add=True)
    concat("spike", (2, 40, 16, 16), 24, 16, spike=1e4)
    return cases


CASES = _cases()
