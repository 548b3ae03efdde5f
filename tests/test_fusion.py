"""`fuse`: what it takes and what it leaves, the error rule on whole models, and that `unfuse` undoes it."""

from __future__ import annotations

import copy
import functools
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from op_cases import check_error_rule
from torch import nn
from torch.autograd import forward_ad

import ddpm_fast
from ddpm_fast import fuse, unfuse
from ddpm_fast.fusion import _pending

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def calls(monkeypatch):
    """What each call of the op was given besides the norm, in order."""
    seen = []

    def spy(*args, **folded):
        seen.append({name for name, value in folded.items() if value is not None})
        return ddpm_fast.ops.group_norm_silu(*args, **folded)

    monkeypatch.setattr(_pending, "group_norm_silu", spy)
    return seen


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights unlike 1 and biases unlike 0, and no zero-initialised outputs."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        scale = 0.3 if parameter.dim() < 2 else 1 / math.sqrt(parameter[0].numel())
        values = torch.randn(parameter.shape, generator=generator) * scale
        parameter.data.copy_(values + (1 if parameter.dim() < 2 and name.endswith("weight") else 0))
    return model


# ---- One method at a time ----


class Block(nn.Module):
    """What the cases below are made of; each defines a forward."""

    def __init__(self, **norm):
        super().__init__()
        self.norm = nn.GroupNorm(2, 4, **norm)
        self.norms = nn.ModuleList([nn.GroupNorm(2, 4), nn.GroupNorm(4, 4)])
        self.pairs = nn.ModuleList([nn.ModuleList([nn.GroupNorm(2, 4), nn.SiLU()]) for _ in range(2)])
        self.body = nn.Sequential(nn.GroupNorm(1, 4), nn.SiLU(), nn.Conv2d(4, 4, 1))
        self.act = nn.SiLU()
        self.gelu = nn.GELU()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.linear = nn.Linear(3, 4)
        self.film = nn.Linear(3, 8)
        self.inplace = nn.ReLU(inplace=True)
        self.flag = True


class Swish(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x)


def nonlinearity(x):
    return torch.sigmoid(x) * x


def exists(x):
    return x is not None


class Nested(Block):
    def forward(self, x, t):
        return self.conv(F.silu(self.norm(x)))


class SameVariable(Block):
    def forward(self, x, t):
        x = self.norm(x)
        x = self.act(x)
        return self.conv(x)


class OtherVariables(Block):
    def forward(self, x, t):
        normal = self.norm(x)
        active = F.silu(normal, inplace=True)
        return self.conv(active) + x


class WrittenOut(Block):
    def forward(self, x, t):
        h = self.norm(x)
        h = h * torch.sigmoid(h)
        y = self.norms[0](h)
        return y.sigmoid() * y


class OwnFunctions(Block):
    def __init__(self):
        super().__init__()
        self.swish = Swish()

    def forward(self, x, t):
        return self.swish(self.norm(nonlinearity(self.norms[1](x))))


class TimeBefore(Block):
    def forward(self, x, t):
        h = self.conv(x)
        h = h + self.linear(t)[:, :, None, None]
        return F.silu(self.norm(h)) + self.act(self.norms[0](self.linear(t)[:, :, None, None] + x))


class Film(Block):
    def forward(self, x, t):
        scale, shift = self.film(t)[:, :, None, None].chunk(2, dim=1)
        h = self.norm(x) * (1 + scale) + shift
        h = self.act(h)
        y = shift + (scale + 1) * self.norms[0](h)
        return self.act(y)


class OptionalFilm(Block):
    """As lucidrains' Block, whose FiLM is a pair or None."""

    def forward(self, x, t):
        return self._block(self._block(x, None), self.film(t)[:, :, None, None].chunk(2, dim=1))

    def _block(self, x, scale_shift=None):
        x = self.norm(x)
        if exists(scale_shift):
            scale, shift = scale_shift
            x = x * (scale + 1) + shift
        x = self.act(x)
        return x


class Branches(Block):
    """As diffusers' ResnetBlock2D: the norm in branches, SiLU after them."""

    def forward(self, x, t):
        if self.flag:
            if t is not None:
                x = x + self.linear(t)[:, :, None, None]
            x = self.norm(x)
        elif t is None:
            raise ValueError(f"no t for {x.shape}")
        else:
            x = self.norms[0](x)
        x = self.act(x)
        return x


class Loops(Block):
    def forward(self, x, t):
        for norm, act in self.pairs:
            x = self.conv(act(norm(x)))
        for i, norm in enumerate(self.norms):
            if i > 5:
                break
            x = norm(x)
            x = self.act(x)
        return x


class Slices(Block):
    """As OpenAI's ResBlock."""

    def forward(self, x, t):
        emb = self.film(t)
        while len(emb.shape) < len(x.shape):
            emb = emb[..., None]
        in_rest, in_conv = self.body[:-1], self.body[-1]
        h = in_conv(in_rest(x))
        scale, shift = torch.chunk(emb, 2, dim=1)
        out_norm, out_rest = self.body[0], self.body[1:]
        h = out_norm(h) * (1 + scale) + shift
        h = out_rest(h)
        h = h + shift
        return self.body(h)


class Base(Block):
    def forward(self, x, *args, gain: float = 2.0, **kwargs):
        return gain * x


class Decorated(Base):
    @torch.no_grad()
    def forward(self, x, t, *, gain: float = 3.0):
        return super().forward(self.act(self.norm(x)), t, gain=gain)


FUSED = {  # the norms that are fused, and what the op takes at each call
    Nested: (["norm"], [set()]),
    SameVariable: (["norm"], [set()]),
    OtherVariables: (["norm"], [set()]),
    WrittenOut: (["norm", "norms.0"], [set(), set()]),
    OwnFunctions: (["norm", "norms.1"], [set(), set()]),
    TimeBefore: (["norm", "norms.0"], [{"add"}, {"add"}]),
    Film: (["norm", "norms.0"], [{"scale", "shift"}, {"scale", "shift"}]),
    OptionalFilm: (["norm"], [set(), {"scale", "shift"}]),
    Branches: (["norm", "norms.0"], [{"add"}]),
    Loops: (["norms.0", "norms.1", "pairs.0.0", "pairs.1.0"], [set()] * 4),
    Slices: ([], [set(), {"scale", "shift"}, {"add"}]),
    Decorated: (["norm"], [set()]),
}


def inputs(generator, *shape):
    return (
        torch.randn(2, 4, *(shape or (6, 5)), generator=generator),
        torch.randn(2, 3, generator=generator),
    )


@pytest.mark.parametrize("case", FUSED, ids=lambda case: case.__name__)
def test_takes(case, calls, generator):
    model = randomise(case())
    x, t = inputs(generator)
    before = model(x, t)
    report = fuse(model)
    names, given = FUSED[case]
    assert list(report.fused) == [*names, "body.0"]  # the Sequential's own forward
    after = model(x, t)
    assert calls == given
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    assert after.requires_grad == before.requires_grad


class UsedTwice(Block):
    def forward(self, x, t):
        y = self.norm(x)
        return self.act(y) + y


class UsedUnderAnotherName(Block):
    def forward(self, x, t):
        y = z = self.norm(x)
        y = self.act(y)
        return y * z


class Looked(Block):
    def forward(self, x, t):
        y = self.norm(x)
        return self.act(y) if y.mean() < 9 else x


class Kept(Block):
    def forward(self, x, t):
        self.last = y = self.norm(x)
        return self.act(y)


class OnOnePath(Block):
    def forward(self, x, t):
        x = self.norm(x)
        if not self.flag:
            x = self.act(x)
        return self.conv(x)


class LeavesTheLoop(Block):
    def forward(self, x, t):
        y = x
        for _ in range(3):
            y = self.norm(x)
            x = self.act(y)
            if self.flag:
                break
            y = x
        return self.conv(y)


class Captured(Block):
    def forward(self, x, t):
        y = self.norm(x)
        later = [lambda: y, y][0]
        return self.act(y) + later()


class Comprehended(Block):
    def forward(self, x, t):
        y = self.norm(x)
        return sum([y for _ in range(2)]) + self.act(y)


class ChangedBetween(Block):
    def forward(self, x, t):
        x = x + 0
        y = self.norm(x)
        x += 1
        return self.act(y) + x


class RunsBetween(Block):
    def forward(self, x, t):
        x = x + 0
        y = self.norm(x)
        z = self.inplace(x)
        return self.act(y) + z


class ChangedWithin(Block):
    def forward(self, x, t):
        x = x + 0
        return self.act(self.norm(x) * (1 + self.inplace(x)) + 1)


class ChangedByTheSum(Block):
    def forward(self, x, t):
        x = x * 2
        y = x + self.linear(t)[:, :, None, None]
        self.inplace(x)
        return self.act(self.norms[0](y)) + self.norm(y)


class ContextBetween(Block):
    def forward(self, x, t):
        with torch.autocast("cpu", torch.bfloat16):
            y = self.norm(x)
        return self.act(y)


class Tried(Block):
    def forward(self, x, t):
        try:
            y = self.norm(x)
            raise KeyError
        except KeyError:
            return self.act(y)


class NoSiLU(Block):
    def forward(self, x, t):
        return self.gelu(self.norm(x + self.linear(t)[:, :, None, None]))


class ActivatesBetween(Block):
    def __init__(self):
        super().__init__()
        self.act = nn.SiLU(inplace=True)

    def forward(self, x, t):
        x = x + 0
        y = self.norm(x)
        z = self.act(x)
        return self.act(y) + z


class GainFirst(Block):
    def forward(self, x, t):
        x = x + 0
        return self.act((1 + self.inplace(x)) * self.norm(x))


class FixedEps(nn.GroupNorm):
    def forward(self, x):
        return F.group_norm(x, self.num_groups, self.weight, self.bias, 1e-5)


class HasFixedEps(Block):
    def __init__(self):
        super().__init__()
        self.norm = FixedEps(2, 4)

    def forward(self, x, t):
        return self.act(self.norm(x))


class Beta(nn.Module):
    def __init__(self):
        super().__init__()
        self.beta = 1

    def forward(self, x):
        return x * torch.sigmoid(x) if self.beta == 1 else x


class HasState(Block):
    def __init__(self):
        super().__init__()
        self.swish = Beta()

    def forward(self, x, t):
        return self.swish(self.norm(x))


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


class Softsign(nn.Module):
    def forward(self, x):
        return x / (1 + x.abs())


class WrapsAnother(Block):
    def __init__(self):
        super().__init__()
        self.first, self.second = Wrapper(Swish()), Wrapper(Softsign())

    def forward(self, x, t):
        h = self.first(self.norms[0](x))
        return self.second(self.norm(h))


class ByClass(nn.Module):
    kind = "silu"

    def forward(self, x):
        return F.silu(x) if self.kind == "silu" else F.relu(x)


class ByItsSubclass(ByClass):
    kind = "relu"


class InheritsAForward(Block):
    def __init__(self):
        super().__init__()
        self.first, self.second = ByClass(), ByItsSubclass()

    def forward(self, x, t):
        h = self.first(self.norms[0](x))
        return self.second(self.norm(h))


class Bounding(nn.Module):
    def forward(self, x):
        x.clamp_(-0.1, 0.1)
        return F.silu(x)


class HasAnEffect(Block):
    def __init__(self):
        super().__init__()
        self.second = Bounding()

    def forward(self, x, t):
        return self.second(self.norm(x))


class Dropped(Block):
    def forward(self, x, t):
        _ = self.norm(x)
        return x


class Unnamed(Block):
    def forward(self, x, t):
        return self.act(getattr(self, "no" + "rm")(x))


class SeesLocals(Block):
    def forward(self, x, t):
        y = self.norm(x)
        return self.act(y) + locals()["y"]


class AnotherNorm(nn.GroupNorm):
    def forward(self, x):
        return super().forward(x) + 1


class HasAnotherNorm(Block):
    def __init__(self):
        super().__init__()
        self.norm = AnotherNorm(2, 4)

    def forward(self, x, t):
        return self.act(self.norm(x))


class Hooked(Block):
    def __init__(self):
        super().__init__()
        self.norm.register_forward_hook(lambda module, args, output: output * 2)

    def forward(self, x, t):
        return self.act(self.norm(x))


class ActHooked(Block):
    def __init__(self):
        super().__init__()
        self.act.register_forward_pre_hook(lambda module, args: (args[0] * 2,))

    def forward(self, x, t):
        return self.act(self.norm(x))


SEEN = "something other than SiLU uses its output"
BETWEEN = "something else runs between it and SiLU"
LEFT = {
    UsedTwice: "its output is used more than once",
    UsedUnderAnotherName: SEEN,
    Looked: SEEN,
    Kept: SEEN,
    OnOnePath: "its output is used more than once",
    LeavesTheLoop: "its output is used more than once",
    Captured: SEEN,
    Comprehended: SEEN,
    ChangedBetween: BETWEEN,
    RunsBetween: BETWEEN,
    ChangedWithin: BETWEEN,
    ChangedByTheSum: SEEN,
    ContextBetween: BETWEEN,
    Tried: "it stands in a try or a match",
    NoSiLU: SEEN,
    ActivatesBetween: BETWEEN,
    GainFirst: SEEN,
    HasFixedEps: "FixedEps is not known to compute just a GroupNorm",
    HasState: SEEN,
    WrapsAnother: SEEN,
    InheritsAForward: SEEN,
    HasAnEffect: SEEN,
    Dropped: "its output does not reach a SiLU",
    Unnamed: "no method of Unnamed calls it by its name",
    SeesLocals: "SeesLocals.forward is left: it calls locals",
    HasAnotherNorm: "AnotherNorm is not known to compute just a GroupNorm",
    Hooked: "it has hooks",
    ActHooked: SEEN,
}


@pytest.mark.parametrize("case", LEFT, ids=lambda case: case.__name__)
def test_leaves(case, generator):
    model = randomise(case())
    x, t = inputs(generator)
    before = model(x.clone(), t)
    report = fuse(model)
    assert report.left["norm"] == LEFT[case]
    assert "norm" not in report.fused and "norm" not in report.folded
    tolerance = 1e-5 if "norms.0" in report.fused else 0
    torch.testing.assert_close(model(x.clone(), t), before, rtol=tolerance, atol=tolerance)
    assert LEFT[case] in str(report) and f"fused {len(report.fused)} of 6 GroupNorms" in str(report)


# ---- What is decided at run time ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(601,), (24, 25), (7, 8, 9)], ids=["1d", "2d", "3d"])
@pytest.mark.parametrize("affine", [True, False])
def test_any_number_of_dimensions(shape, affine, dtype, calls, generator):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.GroupNorm(4, 16, affine=affine)

        def forward(self, x, t):
            return F.silu(self.norm(x + t))

    model = randomise(Plain())
    x = torch.randn(4, 16, *shape, generator=generator)
    t = torch.randn(4, 16, *[1] * len(shape), generator=generator)
    exact = copy.deepcopy(model).double()(x.to(dtype).double(), t.to(dtype).double())
    model, x, t = model.to(dtype), x.to(dtype), t.to(dtype)
    eager = model(x, t)
    assert fuse(model).folded == {"norm": ("add",)}
    check_error_rule(model(x, t), eager, exact)
    assert calls == [{"add"}] and model(x, t).dtype == dtype


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.norm.register_forward_hook(lambda *_: None),
        lambda model: model.norm.register_full_backward_hook(lambda *_: None),
        lambda model: model.act.register_forward_hook(lambda module, args, output: output + 1),
        lambda model: setattr(model, "act", nn.GELU()),
        lambda model: setattr(model, "norm", nn.Identity()),
        lambda model: setattr(model, "norm", AnotherNorm(2, 4)),
        lambda model: setattr(model.norm, "forward", lambda x: x * 2),
    ],
    ids=["hook", "backward-hook", "act-hook", "gelu", "identity", "other-norm", "forward"],
)
def test_a_later_change_is_seen(change, calls, generator):
    fused, plain = randomise(Branches()), randomise(Branches())
    fuse(fused)
    change(fused)
    change(plain)
    x, t = inputs(generator)
    assert torch.equal(fused(x, t), plain(x, t)) and not calls


def test_the_modules_run_where_they_are_watched(calls, generator):
    """By torch.func, by forward mode, and by hooks of all modules."""
    model = randomise(TimeBefore())
    x, t = inputs(generator)
    dx = torch.randn(x.shape, generator=generator)

    def seen():
        yield torch.func.jvp(lambda x: model(x, t), (x,), (dx,))[1]
        yield torch.func.grad(lambda x: model(x, t).square().sum())(x)
        yield torch.func.vmap(model)(x[:, None], t[:, None])
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(model(forward_ad.make_dual(x, dx), t)).tangent
        yield tangent
        double = nn.modules.module.register_module_forward_hook(
            lambda module, args, output: output * 2 if isinstance(module, nn.GroupNorm) else None
        )
        try:
            yield model(x, t)
        finally:
            double.remove()

    before = list(seen())
    assert all(each.any() for each in before)
    assert fuse(model).fused
    for got, expected in zip(seen(), before, strict=True):
        assert torch.equal(got, expected)
    assert not calls
    model(x, t)
    assert calls


@pytest.mark.parametrize(
    "t",
    [
        lambda x: x.roll(1),  # as large as x
        lambda x: x[:1, :, :1, :1],  # for all samples
        lambda x: x[:, :, :1, :1].double(),  # which makes the sum float64
        lambda x: 2,
        lambda x: x[:, :, :1].expand(2, 4, 6, 5)[:, :, :1],
    ],
)
def test_a_sum_that_is_not_per_channel(t, calls, generator):
    class Sums(Block):
        def forward(self, x, t):
            return self.act(self.norm(x + t))

    x = inputs(generator)[0]
    model = Sums().double() if torch.is_tensor(t(x)) and t(x).dtype == torch.float64 else Sums()
    before = model(x, t(x))
    fuse(model)
    after = model(x, t(x))
    assert after.dtype == before.dtype and calls == [set()]
    torch.testing.assert_close(after, before)


def test_arguments_and_branches_stay_live(calls, generator):
    model = randomise(Branches())
    x, t = inputs(generator)

    def run(flag, **arguments):
        model.flag = flag
        return model(**arguments)

    cases = [(True, {"x": x, "t": t}), (True, {"x": x, "t": None}), (False, {"x": x, "t": t})]
    before = [run(flag, **arguments) for flag, arguments in cases]
    fuse(model)
    for (flag, arguments), expected in zip(cases, before, strict=True):
        torch.testing.assert_close(run(flag, **arguments), expected, rtol=1e-5, atol=1e-5)
    assert calls == [{"add"}, set(), set()]
    with pytest.raises(ValueError, match="no t for"):
        run(False, x=x, t=None)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 't'"):
        model(x)


@pytest.mark.parametrize(
    "x",
    [torch.zeros(0, 4, 6, 5), torch.randn(1, 4, 1, 1), torch.randn(2, 3, 4, 4), torch.ones(2, 4, 2, 2).int()],
)
def test_what_the_norm_refuses_it_still_refuses(x):
    plain, fused = Nested(), Nested()
    plain.norm = fused.norm = nn.GroupNorm(4, 4)
    plain.conv = fused.conv = nn.Identity()
    fuse(fused)
    try:
        expected = plain(x, None)
    except Exception as error:
        with pytest.raises(type(error)) as raised:
            fused(x, None)
        assert str(raised.value) == str(error)
    else:
        assert torch.equal(fused(x, None), expected)


# ---- Whole models ----


class GroupNorm32(nn.GroupNorm):
    """OpenAI's: in float32 whatever the model's dtype."""

    def forward(self, x):
        return super().forward(x.float()).type(x.dtype)


class OpenAIResBlock(nn.Module):
    """In the manner of OpenAI's: FiLM or a sum, up and down within, a checkpoint around it all."""

    def __init__(self, channels, out_channels, *, film=False, up=False, checkpointed=False):
        super().__init__()
        self.film, self.up, self.checkpointed = film, up, checkpointed
        self.in_layers = nn.Sequential(
            GroupNorm32(4, channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(16, out_channels * (1 + film)))
        self.out_layers = nn.Sequential(
            GroupNorm32(4, out_channels),
            nn.SiLU(),
            nn.Dropout(0.0),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        self.skip_connection = nn.Conv2d(channels, out_channels, 1)

    def forward(self, x, emb):
        if self.checkpointed:
            return torch.utils.checkpoint.checkpoint(self._forward, x, emb, use_reentrant=False)
        return self._forward(x, emb)

    def _forward(self, x, emb):
        if self.up:
            in_rest, in_conv = self.in_layers[:-1], self.in_layers[-1]
            h = F.interpolate(in_rest(x), scale_factor=2)
            x = F.interpolate(x, scale_factor=2)
            h = in_conv(h)
        else:
            h = self.in_layers(x)
        emb_out = self.emb_layers(emb).type(h.dtype)
        while len(emb_out.shape) < len(h.shape):
            emb_out = emb_out[..., None]
        if self.film:
            out_norm, out_rest = self.out_layers[0], self.out_layers[1:]
            scale, shift = torch.chunk(emb_out, 2, dim=1)
            h = out_norm(h) * (1 + scale) + shift
            h = out_rest(h)
        else:
            h = h + emb_out
            h = self.out_layers(h)
        return self.skip_connection(x) + h


class OpenAIUNet(nn.Module):
    sample = (2, 3, 8, 8)

    def __init__(self, **options):
        super().__init__()
        self.time_embed = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 16))
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.down = nn.ModuleList([OpenAIResBlock(8, 8, **options), OpenAIResBlock(8, 16, **options)])
        self.middle = OpenAIResBlock(16, 16, **options)
        self.up = OpenAIResBlock(32, 8, up=True, **options)
        self.attention = nn.Sequential(GroupNorm32(4, 8), nn.Conv2d(8, 8, 1))
        self.out = nn.Sequential(GroupNorm32(4, 8), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1))

    def forward(self, x, t):
        angles = t.to(x.dtype)[:, None] * torch.logspace(0, -3, 4, dtype=x.dtype)
        emb = self.time_embed(torch.cat([angles.cos(), angles.sin()], -1))
        h = self.first(x)
        hs = []
        for block in self.down:
            h = block(h, emb)
            hs.append(h)
        h = self.middle(h, emb)
        h = self.up(torch.cat([h, hs.pop()], 1), emb)
        return self.out(h + self.attention(h))


class UserBlock(nn.Module):
    def __init__(self, channels, out_channels):
        super().__init__()
        self.proj = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm = nn.GroupNorm(4, out_channels)
        self.act = nn.SiLU()

    def forward(self, x, scale_shift=None):
        x = self.proj(x)
        x = self.norm(x)
        if exists(scale_shift):
            scale, shift = scale_shift
            x = x * (scale + 1) + shift
        return self.act(x)


class UserResBlock(nn.Module):
    def __init__(self, channels, out_channels):
        super().__init__()
        self.mlp = nn.Linear(16, out_channels * 2)
        self.block1, self.block2 = UserBlock(channels, out_channels), UserBlock(out_channels, out_channels)
        self.norm = nn.GroupNorm(4, out_channels)
        self.conv = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.proj_t = nn.Linear(16, out_channels)

    def forward(self, x, t):
        scale_shift = self.mlp(nonlinearity(t))[..., None, None].chunk(2, dim=1)
        h = self.block2(self.block1(x, scale_shift))
        h = h + self.proj_t(t)[:, :, None, None]
        return self.conv(nonlinearity(self.norm(h)))


class UserUNet(nn.Module):
    """As people write one by hand."""

    sample = (2, 3, 12, 8)

    def __init__(self):
        super().__init__()
        self.time = nn.Linear(1, 16)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.downs = nn.ModuleList([nn.ModuleList([UserResBlock(8, 8), nn.Conv2d(8, 8, 3, 2, 1)])])
        self.mid_norm = nn.GroupNorm(2, 8)
        self.mid = UserResBlock(8, 8)
        self.ups = nn.ModuleList([nn.ModuleList([UserResBlock(16, 8), nn.Upsample(scale_factor=2)])])
        self.norm_out = nn.GroupNorm(4, 8)
        self.head = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x, t):
        if isinstance(t, int):
            t = torch.full((len(x),), t)
        emb = self.time(t.to(x.dtype)[:, None] / 10)
        h, skips = self.stem(x), []
        for block, down in self.downs:
            h = block(h, emb)
            skips.append(h)
            h = down(h)
        h = h + self.mid(self.mid_norm(h), emb)
        for block, up in self.ups:
            h = block(torch.cat([up(h), skips.pop()], 1), emb)
        h = self.norm_out(h)
        h = h * torch.sigmoid(h)
        return self.head(h)


def unet_2d(diffusers, down="DownBlock2D", up="UpBlock2D", **options):
    settings = {
        "sample_size": 8,
        "block_out_channels": (32, 32),
        "down_block_types": (down, down),
        "up_block_types": (up, up),
        "norm_num_groups": 8,
        "layers_per_block": 1,
    }
    torch.manual_seed(0)
    return diffusers.UNet2DModel(**settings | options)


def run(model, x, *conditions, backward=True):
    """The output and, as one tensor, every parameter's gradient and x's, in the order of the parameters."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_(backward)
    out = model(x, *conditions)
    out = out if torch.is_tensor(out) else out.sample
    if not backward:
        return out.detach(), None
    model.zero_grad()
    (out.double() * torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)).sum().backward()
    used = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return out.detach(), [x.grad, *used]


def exact_copy(model):
    """In float64, with norms that compute in it."""
    model = copy.deepcopy(model).double()
    for module in model.modules():
        if isinstance(module, GroupNorm32):
            module.__class__ = nn.GroupNorm
    return model


def check(model, x, *conditions, backward=True):
    """The error rule on the output and on all gradients, each in units of its largest value; the report."""
    wide = [c.double() if torch.is_tensor(c) and c.is_floating_point() else c for c in (x, *conditions)]
    exact, exact_grads = run(exact_copy(model), *wide, backward=backward)
    eager, eager_grads = run(model, x, *conditions, backward=backward)
    report = fuse(model)
    got, grads = run(model, x, *conditions, backward=backward)
    assert got.dtype == eager.dtype and got.stride() == eager.stride()
    check_error_rule(got, eager, exact, "output")
    if backward:
        units = [g.abs().max() for g in exact_grads]
        units = [max(unit, 1e-2 * max(units)) for unit in units]  # a key's bias has rounding for a gradient
        check_error_rule(
            *(
                torch.cat([(g / unit).flatten() for g, unit in zip(each, units, strict=True)])
                for each in (grads, eager_grads, exact_grads)
            ),
            "gradients",
        )
    return report


BLOCKS = {  # fused; left with an attention and without one in the middle, which scale_shift leaves out
    ("DownBlock2D", "UpBlock2D"): (17, 1),
    ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"): (21, 1),
    ("AttnDownBlock2D", "AttnUpBlock2D"): (17, 7),
    ("SkipDownBlock2D", "SkipUpBlock2D"): (22, 1),
    ("AttnSkipDownBlock2D", "AttnSkipUpBlock2D"): (22, 5),
    ("KDownBlock2D", "KUpBlock2D"): (5, 1),
}


@pytest.mark.parametrize("shift", ["default", "scale_shift"])
@pytest.mark.parametrize("blocks", BLOCKS, ids=lambda blocks: blocks[0])
def test_unet_2d(blocks, shift, diffusers, calls, generator):
    model = randomise(unet_2d(diffusers, *blocks, resnet_time_scale_shift=shift))
    fused, left = BLOCKS[blocks]
    report = check(model, torch.randn(2, 3, 8, 8, generator=generator), 5)
    assert (len(report.fused), len(report.left)) == (fused, left - (shift == "scale_shift"))
    assert set(report.left.values()) <= {"no method of Attention calls it by its name"}
    given = {"add"} if shift == "default" else {"scale", "shift"}
    assert len(calls) == fused  # every one of them, once
    assert calls.count(given) == sum(name.endswith("norm2") for name in report.fused)


def test_unet_2d_condition(diffusers, calls, generator):
    model = randomise(
        diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=12,
            attention_head_dim=8,
            norm_num_groups=8,
            layers_per_block=1,
        )
    )
    text = torch.randn(2, 5, 12, generator=generator)
    report = check(model, torch.randn(2, 4, 8, 8, generator=generator), 5, text)
    assert len(report.fused) == len(calls) == 17 and "conv_norm_out" in report.fused
    assert set(report.left) == {
        f"{block}.attentions.{k}.norm"
        for block, count in (("down_blocks.0", 1), ("mid_block", 1), ("up_blocks.1", 2))
        for k in range(count)
    }


def test_a_resnet_without_time(diffusers, calls, generator):
    """As in a VAE: temb is None."""
    blocks = {
        f"{way}_block_types": [f"{way.title()}{name}Block2D"] * 2
        for way, name in (("down", "Encoder"), ("up", "Decoder"))
    }
    vae = diffusers.AutoencoderKL(block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4, **blocks)
    decoder = randomise(vae).decoder
    report = check(decoder, torch.randn(1, 4, 4, 4, generator=generator))
    assert len(calls) == len(report.fused) == 13 and not any(calls)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("film", [False, True])
def test_openai(film, checkpointed, calls, generator):
    model = randomise(OpenAIUNet(film=film, checkpointed=checkpointed))
    report = check(model, torch.randn(2, 3, 8, 8, generator=generator), torch.tensor([3, 700]))
    assert len(report.fused) == 9 and list(report.left) == ["attention.0"]
    assert len(calls) == 9 + 8 * checkpointed  # the blocks run again in the backward pass
    assert calls.count({"scale", "shift"} if film else {"add"}) == 4 * (1 + checkpointed)


def test_user_unet(calls, generator):
    model = randomise(UserUNet())
    report = check(model, torch.randn(2, 3, 12, 8, generator=generator), 3)
    assert len(calls) == len(report.fused) == 10 and list(report.left) == ["mid_norm"]
    assert calls.count({"scale", "shift"}) == calls.count({"add"}) == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["diffusers", "openai"])
def test_halves(name, dtype, request, calls, generator):
    if name == "diffusers":
        options = {"resnet_time_scale_shift": "scale_shift"}
        model = randomise(unet_2d(request.getfixturevalue("diffusers"), **options)).to(dtype)
    else:
        model = randomise(OpenAIUNet(film=True)).to(dtype)
        for module in model.modules():
            if isinstance(module, nn.GroupNorm):
                module.float()
    x = torch.randn(2, 3, 8, 8, generator=generator).to(dtype)
    check(model, x, torch.tensor([3, 70]), backward=False)
    assert {"scale", "shift"} in calls


def test_upcast_in_float64(generator):
    """Where GroupNorm32 computes in less, ours does as well."""
    model = randomise(OpenAIUNet()).double()
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            module.float()
    x = torch.randn(2, 3, 8, 8, generator=generator).double()
    before = model(x, torch.tensor([3, 70]))
    fuse(model)
    assert torch.equal(model(x, torch.tensor([3, 70])), before)


def test_channels_last(diffusers, calls, generator):
    model = randomise(unet_2d(diffusers)).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 8, 8, generator=generator).contiguous(memory_format=torch.channels_last)
    check(model, x, 5)
    assert len(calls) == 17


def test_large_batches_of_the_upsampler(diffusers, calls, generator):
    model = randomise(unet_2d(diffusers, "ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"))
    check(model, torch.randn(64, 3, 4, 4, generator=generator), 5, backward=False)
    assert len(calls) == 21


def test_autocast(diffusers, calls, generator):
    model = randomise(unet_2d(diffusers))
    x = torch.randn(2, 3, 8, 8, generator=generator)
    exact = exact_copy(model)(x.double(), 5).sample
    with torch.autocast("cpu", torch.bfloat16):
        eager = model(x, 5).sample
        fuse(model)
        check_error_rule(model(x, 5).sample, eager, exact)
    assert len(calls) == 17


def test_gradient_checkpointing(diffusers, calls, generator):
    model = randomise(unet_2d(diffusers))
    x = torch.randn(2, 3, 8, 8, generator=generator)
    fuse(model)
    out, grads = run(model.train(), x, 5)
    plain = len(calls)
    model.enable_gradient_checkpointing()
    again, checkpointed = run(model, x, 5)
    assert torch.equal(out, again) and all(map(torch.equal, grads, checkpointed))
    assert len(calls) > 2 * plain


# ---- The model stays the model ----


def test_unfuse_restores(diffusers):
    for model in (unet_2d(diffusers, "SkipDownBlock2D", "SkipUpBlock2D"), OpenAIUNet(), UserUNet()):
        attributes = {name: dict(vars(module)) for name, module in model.named_modules()}
        keys, parameters = list(model.state_dict()), list(model.parameters())
        report = fuse(model)
        assert {name: vars(module) for name, module in model.named_modules()} != attributes
        assert fuse(model) == report  # again: the same
        assert list(model.state_dict()) == keys
        assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
        for _ in range(2):
            unfuse(model)
            assert {name: vars(module) for name, module in model.named_modules()} == attributes


def test_copies(diffusers, calls, generator):
    for model in (randomise(unet_2d(diffusers)), randomise(OpenAIUNet()), randomise(UserUNet())):
        x, t = torch.randn(2, 3, 8, 8, generator=generator), torch.tensor([3, 70])
        report = fuse(model)
        before, _ = run(model, x, t, backward=False)
        calls.clear()
        twin = copy.deepcopy(model)
        pickled = pickle.loads(pickle.dumps(model))
        for parameter in model.parameters():
            parameter.data.zero_()
        assert torch.equal(run(twin, x, t, backward=False)[0], before)
        assert len(calls) == len(report.fused)
        torch.testing.assert_close(run(pickled, x, t, backward=False)[0], before, rtol=1e-5, atol=1e-5)
        assert len(calls) == len(report.fused)  # unfused, until
        assert fuse(pickled) == report
        assert torch.equal(run(pickled, x, t, backward=False)[0], before)
        unfuse(twin)
        assert not any("forward" in vars(module) for module in twin.modules())


def fused_ops(graph):
    return sum("ddpm_fast.group_norm_silu" in str(node.target) for node in graph.graph.nodes)


@pytest.mark.parametrize("name", ["diffusers", "openai", "user"])
def test_compiles_whole(name, request, generator):
    if name == "diffusers":
        model = unet_2d(
            request.getfixturevalue("diffusers"),
            block_out_channels=(8,),
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
        )
    else:
        model = OpenAIUNet(film=True) if name == "openai" else UserUNet()
    report = fuse(randomise(model))
    x, t = torch.randn(2, 3, 8, 8, generator=generator), torch.tensor([3, 70])
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    expected, grads = run(model, x, t)
    got, compiled_grads = run(torch.compile(model, fullgraph=True, backend=backend), x, t)
    assert len(graphs) == 1 and fused_ops(graphs[0]) == len(report.fused)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(compiled_grads, grads)


def test_compiles_with_inductor(generator):
    model = randomise(Film())
    x, t = inputs(generator)
    expected = model(x, t)
    fuse(model)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x, t), expected, rtol=1e-4, atol=1e-5)


# ---- What is refused ----


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("function", [fuse, unfuse])
def test_bad_input(function):
    block = nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU())
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got str"):
        function("unet")
    with pytest.raises(TypeError, match="must not be scripted or traced"):
        function(torch.jit.trace(block, torch.randn(1, 4, 2, 2)))
    with pytest.raises(TypeError, match="must not be compiled: fuse it first"):
        function(torch.compile(block))
    block.compile()
    with pytest.raises(TypeError, match="must not be compiled: fuse it first"):
        function(block)


def test_source_that_is_not_at_hand_or_is_not_what_runs(tmp_path, monkeypatch):
    space = {"Block": Block, "__name__": "nowhere"}
    exec(
        compile("class A(Block):\n def forward(self, x):\n  return self.act(self.norm(x))", "<none>", "exec"),
        space,
    )
    assert fuse(space["A"]()).left["norm"] == "A.forward is left: its source is not at hand"

    wrapped = Nested.forward
    monkeypatch.setattr(Nested, "forward", lambda self, x, t: wrapped(self, x, t))
    assert fuse(Nested()).left["norm"] == "no method of Nested calls it by its name"

    monkeypatch.setattr(Film, "forward", functools.wraps(Film.forward)(lambda self, x, t: x))
    assert "wrapped by more, or by less, than its source shows" in fuse(Film()).left["norm"]

    for then, left in (("", None), (" + 1", "A.forward is left: its source is not what runs")):
        file = tmp_path / f"model{then}.py"
        source = "class A(Block):\n def forward(self, x):\n  return self.act(self.norm(x))"
        exec(compile(source, str(file), "exec", dont_inherit=True), space)
        file.write_text(source + then)
        assert fuse(space["A"]()).left.get("norm") == left


def test_replaced_forwards_are_left():
    model = Nested()
    model.forward = lambda x, t: x
    own = model.forward
    assert fuse(model).left["norm"] == "Nested.forward is left: it has been replaced"
    unfuse(model)
    assert model.forward is own
