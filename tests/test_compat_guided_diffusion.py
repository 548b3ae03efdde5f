"""OpenAI's GaussianDiffusion of ours against the papers' equations written out in float64.

Ho is Ho et al. 2020 (2006.11239), Nichol: Nichol & Dhariwal 2021 (2102.09672), Song: Song et al. 2021
(2010.02502), Dhariwal: Dhariwal & Nichol 2021 (2105.05233), Lu: Lu et al. 2022 (2211.01095).
"""

from __future__ import annotations

import copy
import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from ddpm_fast.compat import guided_diffusion as guided
from ddpm_fast.compat import improved_diffusion as improved
from ddpm_fast.compat.guided_diffusion import (
    GaussianDiffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
    SpacedDiffusion,
    UNetModel,
    get_named_beta_schedule,
    segmentation,
    space_timesteps,
    whole_run,
)
from ddpm_fast.compat.guided_diffusion.gaussian_diffusion import _extract_into_tensor
from ddpm_fast.unet import UNet, UNetConfig

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = (4, 2, 3, 3)
MEANS, VARS, LOSSES = tuple(ModelMeanType), tuple(ModelVarType), tuple(LossType)[:4]
LEARNED = (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE)
RUNS = [
    (T, name, spacing)
    for T, name in itertools.product((50, 1000, 4000), ("linear", "cosine"))
    for spacing in (None, "5,7,9" if T == 50 else "10,15,20", "ddim25", [17])
]


def build(
    T=50, name="linear", spacing=None, mean="EPSILON", var="FIXED_SMALL", loss="MSE", of=guided, **more
):
    kwargs = {
        "betas": get_named_beta_schedule(name, T),
        "model_mean_type": ModelMeanType[getattr(mean, "name", mean)],
        "model_var_type": ModelVarType[getattr(var, "name", var)],
        "loss_type": LossType[getattr(loss, "name", loss)],
        **more,
    }
    if spacing is None:
        return of.GaussianDiffusion(**kwargs)
    return of.SpacedDiffusion(space_timesteps(T, spacing), **kwargs)


class Written:
    """Every number by its equation, float64."""

    def __init__(self, T, name, spacing, mean, var) -> None:
        ends = 1000 / T * 1e-4, 1000 / T * 0.02  # Ho, section 4
        if name == "linear":
            betas = torch.linspace(*ends, T, dtype=torch.float64)
        else:  # Nichol, eq. 17
            u = torch.arange(T + 1, dtype=torch.float64) / T
            f = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
        ab = torch.cumprod(1 - betas, 0)
        if spacing is not None:
            ab = ab[sorted(space_timesteps(T, spacing))]
        before = torch.cat([torch.ones(1, dtype=torch.float64), ab[:-1]])
        beta = 1 - ab / before  # Nichol, eq. 19
        tilde = beta * (1 - before) / (1 - ab)  # Ho, eq. 7
        self.T, self.mean, self.var = len(ab), mean.name, var.name
        self.columns = {
            "ab": ab,
            "before": before,
            "after": torch.cat([ab[1:], torch.zeros(1, dtype=torch.float64)]),
            "beta": beta,
            "tilde": tilde,
            "clipped": torch.cat([tilde[1:2], tilde[1:]]),
            "large": torch.cat([tilde[1:2], beta[1:]]),
        }

    def at(self, t, *names):
        return [self.columns[name][t].reshape(-1, 1, 1, 1) for name in names]

    def q_sample(self, x0, noise, t):  # Ho, eq. 4
        (ab,) = self.at(t, "ab")
        return ab.sqrt() * x0 + (1 - ab).sqrt() * noise

    def posterior(self, x0, x, t):  # Ho, eq. 7
        ab, before, beta = self.at(t, "ab", "before", "beta")
        return (before.sqrt() * beta * x0 + (1 - beta).sqrt() * (1 - before) * x) / (1 - ab)

    def p(self, x, out, t, clip=True, fn=None):
        """(mean, variance, log variance, x0)."""
        C = x.shape[1]
        out, v = out[:, :C], out[:, C:]
        ab, before, beta, clipped = self.at(t, "ab", "before", "beta", "clipped")
        if self.mean == "START_X":
            x0 = out
        elif self.mean == "EPSILON":  # Ho, eq. 4, for x0
            x0 = (x - (1 - ab).sqrt() * out) / ab.sqrt()
        else:  # Ho, eq. 7, for x0
            x0 = ((1 - ab) * out - (1 - beta).sqrt() * (1 - before) * x) / (before.sqrt() * beta)
        x0 = x0 if fn is None else fn(x0)
        x0 = x0.clamp(-1, 1) if clip else x0
        mean = out if self.mean == "PREVIOUS_X" else self.posterior(x0, x, t)
        if self.var == "LEARNED":
            log = v
        elif self.var == "LEARNED_RANGE":  # Nichol, eq. 15
            log = (v + 1) / 2 * beta.log() + (1 - v) / 2 * clipped.log()
        else:
            log = self.at(t, "large" if self.var == "FIXED_LARGE" else "clipped")[0].log()
        variance = self.at(t, "tilde")[0] if self.var == "FIXED_SMALL" else log.exp()
        return mean, variance.expand_as(x), log.expand_as(x), x0

    def p_sample(self, x, out, t, noise, clip=True, fn=None, gradient=0.0):  # Ho, algorithm 2
        mean, variance, log, x0 = self.p(x, out, t, clip, fn)
        mean = mean + variance * gradient  # Dhariwal, algorithm 1
        return mean + (t > 0).reshape(-1, 1, 1, 1) * (0.5 * log).exp() * noise, x0

    def ddim(self, x, out, t, noise, eta, clip=True, fn=None, gradient=0.0):
        ab, before = self.at(t, "ab", "before")
        x0 = self.p(x, out, t, clip, fn)[3]
        eps = (x - ab.sqrt() * x0) / (1 - ab).sqrt() - (1 - ab).sqrt() * gradient  # Dhariwal, algorithm 2
        x0 = (x - (1 - ab).sqrt() * eps) / ab.sqrt()
        sigma = eta * ((1 - before) / (1 - ab)).sqrt() * (1 - ab / before).sqrt()  # Song, eq. 16
        return before.sqrt() * x0 + (1 - before - sigma**2).sqrt() * eps + sigma * noise, x0  # eq. 12

    def reverse(self, x, out, t, clip=True, fn=None):  # Song, eq. 13 backwards
        ab, after = self.at(t, "ab", "after")
        x0 = self.p(x, out, t, clip, fn)[3]
        eps = (x - ab.sqrt() * x0) / (1 - ab).sqrt()
        return after.sqrt() * x0 + (1 - after).sqrt() * eps, x0

    def bound(self, x_start, x, out, t, clip):  # Ho, eq. 5, its terms; eq. 13 at t = 0
        mean, _, log, x0 = self.p(x, out, t, clip)
        (true,) = self.at(t, "clipped")
        apart = self.posterior(x_start, x, t) - mean
        kl = 0.5 * (log - true.log() + true / log.exp() + apart**2 / log.exp() - 1)

        def cdf(x):  # the approximation of Ho's code
            return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

        def below(edge):
            return cdf((x_start + edge - mean) / (0.5 * log).exp())

        p = torch.where(x_start < -0.999, below(1 / 255), below(1 / 255) - below(-1 / 255))
        p = torch.where(x_start > 0.999, 1 - below(-1 / 255), p).clamp(min=1e-12)
        return torch.where(t == 0, -p.log().mean((1, 2, 3)), kl.mean((1, 2, 3))) / math.log(2), x0

    def losses(self, x_start, noise, x, out, t, loss):
        """The dict of training_losses."""
        C, scale = x.shape[1], 1.0
        if loss.is_vb():
            scale = self.T if loss is LossType.RESCALED_KL else 1
            return {"loss": scale * self.bound(x_start, x, out, t, False)[0]}
        target = {"START_X": x_start, "EPSILON": noise, "PREVIOUS_X": self.posterior(x_start, x, t)}
        terms = {"mse": ((out[:, :C] - target[self.mean]) ** 2).mean((1, 2, 3))}  # Ho, eq. 14
        terms["loss"] = terms["mse"]
        if self.var.startswith("LEARNED"):  # Nichol, eq. 16
            scale = self.T / 1000 if loss is LossType.RESCALED_MSE else 1
            frozen = torch.cat([out[:, :C].detach(), out[:, C:]], 1)
            terms["vb"] = scale * self.bound(x_start, x, frozen, t, False)[0]
            terms["loss"] = terms["mse"] + terms["vb"]
        return terms


def close(got, expected, tolerance=1e-5, rounding=0.0):
    """To the tolerance, of each sample's largest value where that is above 1; and to its own rounding."""
    if isinstance(expected, dict):
        assert set(got) == set(expected)
        for key in expected:
            close(got[key], expected[key], tolerance, rounding)
        return
    if isinstance(expected, tuple):
        for one, other in zip(got, expected, strict=True):
            close(one, other, tolerance, rounding)
        return
    assert got.shape == expected.shape and got.dtype == torch.float32
    error, largest = ((value.abs().reshape(len(got), -1).amax(1)) for value in (got - expected, expected))
    excess = error - tolerance * largest.clamp(min=1.0) - rounding
    assert (excess <= 0).all(), f"{error.tolist()} where the largest values are {largest.tolist()}"


def double(values: dict) -> dict:
    return {key: value.double() for key, value in values.items()}


def believable(written: Written, x0, x, t, error, v):
    """What a model of that kind returns whose x0 is right to a third of the noise: float32."""
    ab, clipped = written.at(t, "ab", "clipped")
    x0, x = x0.double(), x.double()
    guess = x0 + 0.3 * (1 - ab).sqrt() * error
    out = {
        "START_X": guess,
        "EPSILON": (x - ab.sqrt() * guess) / (1 - ab).sqrt(),
        "PREVIOUS_X": written.posterior(guess, x, t),
    }[written.mean]
    if written.var.startswith("LEARNED"):
        out = torch.cat([out, (clipped.log() if written.var == "LEARNED" else 0) + v.expand_as(out)], 1)
    return out.float()


def pixels(generator):
    x0 = torch.randint(0, 256, SHAPE, generator=generator) / 127.5 - 1
    x0[:, 0, 0] = torch.tensor([-1.0, 0.0, 1.0])  # the ends have a likelihood of their own
    return x0


class Case:
    """Images, their noise, x_t, and what the model returns."""

    def __init__(self, written: Written, generator) -> None:
        self.t = torch.tensor([0, 1, written.T // 2, written.T - 1])
        self.x0 = pixels(generator)
        self.noise, self.z, error = (torch.randn(SHAPE, generator=generator) for _ in range(3))
        self.x = written.q_sample(self.x0.double(), self.noise.double(), self.t).float()
        v = torch.rand(SHAPE, generator=generator) * 3 - 1.5
        self.out = believable(written, self.x0, self.x, self.t, error, v)
        # What float32 leaves of x0 where it is a small difference of large numbers, a x + b out.
        ab, before, beta = written.at(self.t, "ab", "before", "beta")
        a, b = {
            "START_X": (0 * ab, 0 * ab),
            "EPSILON": (1 / ab.sqrt(), (1 / ab - 1).sqrt()),
            "PREVIOUS_X": ((1 - before) / before.sqrt() / beta, (1 - ab) / before.sqrt() / beta),
        }[written.mean]
        large = a.flatten() * self.x.abs().amax((1, 2, 3)) + b.flatten() * self.out[:, :2].abs().amax(
            (1, 2, 3)
        )
        self.rounding = 2 * 2.0**-24 * large

    def model(self, x, t):
        return self.out

    def drawing(self, monkeypatch):
        """torch.randn_like gives z."""
        monkeypatch.setattr(torch, "randn_like", lambda x: self.z.to(x))


@pytest.mark.parametrize(("T", "name", "spacing"), RUNS, ids=str)
def test_each_method_is_its_equation(T, name, spacing, generator, monkeypatch):
    for mean, var in itertools.product(MEANS, VARS):
        written, mine = Written(T, name, spacing, mean, var), build(T, name, spacing, mean, var)
        case = Case(written, generator)
        x0, x, t, out, z = case.x0.double(), case.x.double(), case.t, case.out.double(), case.z.double()
        ab, tilde, clipped = written.at(t, "ab", "tilde", "clipped")
        case.drawing(monkeypatch)

        variance = (1 - ab).expand_as(x)
        close(mine.q_mean_variance(case.x0, t), (ab.sqrt() * x0, variance, variance.log()))
        close(mine.q_sample(case.x0, t, case.noise), written.q_sample(x0, case.noise.double(), t))
        posterior = written.posterior(x0, x, t), tilde.expand_as(x), clipped.log().expand_as(x)
        close(mine.q_posterior_mean_variance(case.x0, case.x, t), posterior)
        keys = ("mean", "variance", "log_variance", "pred_xstart")
        for clip, fn in (
            (True, None),
            (False, None),
            (True, lambda x0: 0.9 * x0),
            (False, lambda x0: 2 * torch.tanh(x0)),
        ):
            args = case.model, case.x, t, clip, fn
            close(
                mine.p_mean_variance(*args),
                dict(zip(keys, written.p(x, out, t, clip, fn), strict=True)),
                rounding=case.rounding,
            )
            for cond_fn in (None, lambda x, t: torch.sin(3 * x)):
                gradient = 0.0 if cond_fn is None else torch.sin(3 * x)
                expected = written.p_sample(x, out, t, z, clip, fn, gradient)
                close(tuple(mine.p_sample(*args, cond_fn).values()), expected, rounding=case.rounding)
                for eta in (0.0, 0.7, 1.0):
                    expected = written.ddim(x, out, t, z, eta, clip, fn, gradient)
                    close(
                        tuple(mine.ddim_sample(*args, cond_fn, None, eta).values()),
                        expected,
                        rounding=case.rounding,
                    )
            close(
                tuple(mine.ddim_reverse_sample(*args).values()),
                written.reverse(x, out, t, clip, fn),
                rounding=case.rounding,
            )


@pytest.mark.parametrize(("T", "name", "spacing"), RUNS[::3], ids=str)
def test_the_losses_are_their_equations_with_their_gradients(T, name, spacing, generator):
    for mean, var, loss in itertools.product(MEANS, VARS, LOSSES):
        written, mine = Written(T, name, spacing, mean, var), build(T, name, spacing, mean, var, loss)
        case = Case(written, generator)
        out, exact = case.out.requires_grad_(), case.out.detach().double().requires_grad_()
        x0, noise = case.x0.double(), case.noise.double()
        x = written.q_sample(x0, noise, case.t)
        got = mine.training_losses(case.model, case.x0, case.t, noise=case.noise)
        expected = written.losses(x0, noise, x, exact, case.t, loss)
        # KL is a difference of numbers near 1, and is then scaled.
        scale = {LossType.RESCALED_KL: written.T, LossType.RESCALED_MSE: written.T / 1000}.get(loss, 1)
        close(got, expected, rounding=scale * 2.0**-23)
        got["loss"].sum().backward()
        expected["loss"].sum().backward()
        # The gradient by a mean is an error over the variance, with the rounding of the mean, up to 4, in it.
        by_mean = written.columns["clipped"][case.t].reciprocal() if written.mean == "PREVIOUS_X" else 0.0
        close(out.grad, exact.grad, rounding=scale * 2.0**-21 * by_mean / case.x[0].numel())


@pytest.mark.parametrize(("mean", "var"), [*itertools.product(MEANS, VARS)], ids=str)
def test_the_whole_bound(mean, var, generator):
    written, mine = Written(50, "linear", None, mean, var), build(50, "linear", None, mean, var)
    x0, error = pixels(generator), torch.randn(SHAPE, generator=generator)

    def model(x, t):
        return believable(written, x0, x, t, error, torch.tensor(0.5))

    torch.manual_seed(0)
    got = mine.calc_bpd_loop(model, x0)
    torch.manual_seed(0)
    terms = []
    for i in range(50)[::-1]:
        t, noise = torch.full((len(x0),), i), torch.randn_like(x0).double()
        x = written.q_sample(x0.double(), noise, t)
        vb, pred = written.bound(x0.double(), x, model(x, t), t, True)
        (ab,) = written.at(t, "ab")
        eps = (x - ab.sqrt() * pred) / (1 - ab).sqrt()
        errors = [((a - b) ** 2).mean((1, 2, 3)) for a, b in ((pred, x0), (eps, noise))]
        terms.append([vb, *errors])
    ab = written.columns["ab"][-1]
    prior = 0.5 * (-1 - (1 - ab).log() + (1 - ab) + ab * x0.double() ** 2).mean((1, 2, 3)) / math.log(2)
    columns = [torch.stack(column, 1) for column in zip(*terms, strict=True)]
    expected = dict(zip(("vb", "xstart_mse", "mse"), columns, strict=True))
    expected |= {"total_bpd": columns[0].sum(1) + prior, "prior_bpd": prior}
    close(got, expected)


class Net(nn.Module):
    """A small network that says at which times it was called."""

    def __init__(self, learned: bool = False) -> None:
        super().__init__()
        weight = torch.randn(4 if learned else 2, 2, generator=torch.Generator().manual_seed(0))
        self.weight, self.times = nn.Parameter(0.5 * weight), []

    def forward(self, x, t, y=None):
        self.times.append(t[0].item())
        assert t.dtype in (torch.int64, torch.float32)
        mix = torch.einsum(
            "oc,bchw->bohw", self.weight.to(x.dtype), torch.tanh(x + (t / 1000)[:, None, None, None])
        )
        return (mix if y is None else mix + 0.1 * y.to(x.dtype).reshape(-1, 1, 1, 1)).contiguous()


@pytest.fixture
def in_sampler(monkeypatch):
    """Of each whole run, whether it was `Sampler`'s."""
    told, sample = [], whole_run.sample

    def spy(*args):
        result = sample(*args)
        told.append(result is not None)
        return result

    monkeypatch.setattr(whole_run, "sample", spy)
    return told


LOOPS = [(1000, "linear", "25"), (4000, "cosine", "ddim25"), (50, "linear", None)]


@pytest.mark.parametrize("eta", [None, 0.0, 1.0])
@pytest.mark.parametrize("run", LOOPS, ids=str)
def test_a_loop_draws_at_every_step_and_is_its_steps(run, eta, in_sampler):
    kind = "p_sample_loop" if eta is None else "ddim_sample_loop"
    options = {"eta": eta} if eta is not None else {}
    for (mean, var), rescale in zip(itertools.product(MEANS, VARS), itertools.cycle((False, True))):
        mine = build(*run, mean, var, rescale_timesteps=rescale)
        written, model = Written(*run, mean, var), Net(var in LEARNED).eval()
        images, states, times = [], [], []
        for whole in (True, False):
            torch.manual_seed(3)
            if whole:
                images.append(getattr(mine, kind)(model, SHAPE, **options))
            else:
                steps = list(getattr(mine, f"{kind}_progressive")(model, list(SHAPE), **options))
                assert len(steps) == mine.num_timesteps and set(steps[0]) == {"sample", "pred_xstart"}
                images.append(steps[-1]["sample"])
            states.append(torch.get_rng_state())
            times.append(model.times)
            model.times = []
        assert torch.equal(*states) and times[0] == times[1] and in_sampler == [True]
        in_sampler.clear()
        close(images[0], images[1].double(), 1e-4)

        torch.manual_seed(3)
        x = torch.randn(SHAPE)
        for i in range(written.T)[::-1]:
            t, z = torch.full(SHAPE[:1], i), None
            out = model(x.double(), torch.full(SHAPE[:1], times[0][written.T - 1 - i]))
            z = torch.randn(SHAPE).double()
            step = written.p_sample if eta is None else written.ddim
            x = step(x.double(), out, t, z, *([] if eta is None else [eta]))[0]
        assert torch.equal(torch.get_rng_state(), states[0])
        close(images[0], x, 1e-4)
        told = sorted(space_timesteps(run[0], run[2])) if run[2] else range(run[0])
        assert times[0] == pytest.approx(
            [t * (1000 / run[0] if rescale else 1) for t in told][::-1], abs=1e-3
        )


def test_what_sampler_cannot_do_runs_in_the_loop(in_sampler):
    class Guided(SpacedDiffusion):
        def p_mean_variance(self, *args, **kwargs):
            out = super().p_mean_variance(*args, **kwargs)
            return out | {"mean": out["mean"] + 1}

    mine, model = build(spacing="5"), Net().eval()
    forced = copy.copy(mine)
    forced.__class__ = Guided
    patched = copy.copy(mine)
    patched.p_sample = lambda *args, **kwargs: {"sample": torch.ones(SHAPE)}
    half = nn.Sequential(Net()).eval()
    half.register_parameter("first", nn.Parameter(torch.zeros(1, dtype=torch.bfloat16)))
    half.forward = lambda x, t: half[0](x, t)
    torch.manual_seed(0)
    plain = mine.p_sample_loop(model, SHAPE, progress=True)
    assert in_sampler == [True]
    torch.manual_seed(0)
    moved = forced.p_sample_loop(model, SHAPE)
    assert in_sampler == [True] and (moved - plain).abs().max() > 0.5
    assert torch.equal(patched.p_sample_loop(model, SHAPE), torch.ones(SHAPE))
    mine.p_sample_loop(model, SHAPE, denoised_fn=torch.tanh)
    mine.ddim_sample_loop(model, SHAPE, cond_fn=lambda x, t: x)
    assert in_sampler == [True]
    for network, noise in ((Net(), None), (half, None), (model.double(), torch.randn(SHAPE).double())):
        assert mine.p_sample_loop(network, SHAPE, noise).shape == SHAPE
    assert in_sampler == [True, False, False, False]
    assert mine.p_sample_loop(lambda x, t: x, SHAPE, device="cpu").shape == SHAPE
    assert in_sampler[-1]


def test_a_floating_t_is_no_index():
    mine, x, t = build(of=guided), torch.zeros(SHAPE), torch.full(SHAPE[:1], 2.5)
    for method in (mine.q_sample, mine.q_mean_variance, lambda x, t: mine.training_losses(None, x, t)):
        with pytest.raises(IndexError, match="t must be of integers, got"):
            method(x, t)


@pytest.mark.parametrize("name", ["q_posterior_mean_variance", "_predict_xstart_from_eps"])
def test_a_method_that_no_step_would_call_is_refused(name):
    own = type("Own", (SpacedDiffusion,), {name: lambda self, *args, **kwargs: None})
    given = {"model_mean_type": ModelMeanType.EPSILON, "model_var_type": ModelVarType.FIXED_SMALL}
    with pytest.raises(TypeError, match=f"Own has a {name} of its own.*override p_mean_variance"):
        own(range(5), betas=[0.1] * 5, loss_type=LossType.MSE, **given)


def test_a_step_may_be_changed_under_way():
    mine, seen = build(spacing="5"), []
    for out in mine.p_sample_loop_progressive(lambda x, t: seen.append(x) or x, SHAPE, device="cpu"):
        assert torch.is_grad_enabled()
        out["sample"] = torch.full(SHAPE, float(len(seen)))
    assert [x.flatten()[0].item() for x in seen[1:]] == [1, 2, 3, 4]


@pytest.mark.parametrize("T", [1000, 30])
@pytest.mark.parametrize("rescale", [False, True])
def test_a_model_of_ours_takes_its_place(T, rescale, in_sampler):
    off = (False, False)
    config = UNetConfig((8, 8), off, off, sample_size=8, norm_num_groups=4, num_class_embeds=3)
    torch.manual_seed(0)
    fast = UNet(config).eval()
    nn.init.normal_(fast.conv_out.weight, std=0.1)

    class Theirs(nn.Module):
        def __init__(self, ours):
            super().__init__()
            self.unet, self.calls, self.as_ddpm_fast = fast, 0, lambda: ours

        def forward(self, x, t, y):
            self.calls += 1
            return fast(x, t, y)

    mine, images, shape = build(T, spacing="7", rescale_timesteps=rescale), [], (2, 3, 8, 8)
    for model in (Theirs(fast).eval(), Theirs(None).eval()):
        torch.manual_seed(0)
        labels = {"y": torch.tensor([2, 0])}
        images.append(mine.ddim_sample_loop(model, shape, model_kwargs=labels))
        assert model.calls == (0 if model.as_ddpm_fast() is fast else mine.num_timesteps)
    assert in_sampler == [True, True]
    close(images[0], images[1].double(), 1e-4)
    times = []
    fast.register_forward_pre_hook(lambda _, given: times.append(given[1].float()))
    for model in (Theirs(fast).eval(), Theirs(None).eval()):
        mine.p_sample_loop(model, shape, model_kwargs=labels)
    assert torch.equal(*torch.stack(times).chunk(2))
    learned = build(T, spacing="7", var="LEARNED")
    with pytest.raises(AssertionError, match="the model must return"):
        learned.p_sample_loop(Theirs(fast).eval(), shape, model_kwargs=labels)


@pytest.mark.parametrize("y", [None, torch.tensor([1])])
def test_labels_that_do_not_fit_are_refused_as_by_the_model(y):
    model = UNetModel(8, 3, 32, 3, 1, (), channel_mult=(1,), num_classes=3).eval()
    for loop in ("p_sample_loop", "ddim_sample_loop"):
        with pytest.raises(AssertionError, match="y must"):
            getattr(build(spacing="2"), loop)(model, (2, 3, 8, 8), model_kwargs={"y": y})


def sections(T, counts):
    """OpenAI's rule: evenly within each of the sections, the position a running sum, rounded half to even."""
    taken, start = set(), 0
    for k, count in enumerate(counts):
        size = T // len(counts) + (1 if k < T % len(counts) else 0)
        assert count <= size
        position = 0.0
        for _ in range(count):
            taken.add(start + round(position))
            position += (size - 1) / (count - 1) if count > 1 else 1
        start += size
    return taken


def test_space_timesteps_is_the_original_rule():
    for count in range(1, 1001):
        expected = sections(1000, [count])
        assert space_timesteps(1000, [count]) == expected == space_timesteps(1000, str(count))
        strides = [i for i in range(1, 1000) if len(range(0, 1000, i)) == count]
        if strides:
            assert space_timesteps(1000, f"ddim{count}") == set(range(0, 1000, strides[0]))
        else:
            with pytest.raises(ValueError, match="stride"):
                space_timesteps(1000, f"ddim{count}")
    for T, counts in ((300, [10, 15, 20]), (4000, [250, 0, 50]), (7, (2, 2, 2)), (101, [1, 30])):
        assert space_timesteps(T, counts) == sections(T, counts)
        assert space_timesteps(T, ",".join(map(str, counts))) == sections(T, counts)
    with pytest.raises(ValueError, match="section 0 has 10 timesteps, not 11"):
        space_timesteps(20, "11,1")


def test_the_arrays_that_scripts_read():
    written, mine = Written(1000, "cosine", "ddim25", MEANS[2], VARS[1]), build(1000, "cosine", "ddim25")
    ab = written.columns["ab"].numpy()
    expected = {
        "betas": written.columns["beta"],
        "alphas_cumprod": ab,
        "alphas_cumprod_prev": written.columns["before"],
        "alphas_cumprod_next": written.columns["after"],
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / ab - 1),
        "posterior_variance": written.columns["tilde"],
        "posterior_log_variance_clipped": written.columns["clipped"].log(),
    }
    for name, array in expected.items():
        given = getattr(mine, name)
        assert given.dtype == np.float64 and given.flags.writeable
        np.testing.assert_allclose(given, array, rtol=1e-12)
    assert mine.num_timesteps == 25 and mine.original_num_steps == 1000 and mine.model_mean_type is MEANS[2]
    assert mine.timestep_map == list(range(0, 1000, 40)) and mine.use_timesteps == set(mine.timestep_map)
    t = torch.tensor([3, 0])
    assert torch.equal(_extract_into_tensor(ab, t, SHAPE[1:])[:, 0, 0], torch.from_numpy(ab)[t].float())
    assert torch.equal(mine._wrap_model(lambda x, t: t)(None, t), torch.tensor([120, 0]))
    again = pickle.loads(pickle.dumps(copy.deepcopy(mine)))
    assert again.timestep_map == mine.timestep_map
    assert torch.equal(
        again.q_sample(*[torch.ones(SHAPE)] * 1, torch.zeros(4).long(), torch.ones(SHAPE)),
        mine.q_sample(torch.ones(SHAPE), torch.zeros(4).long(), torch.ones(SHAPE)),
    )


def test_a_classifier_guides_at_x_and_may_have_no_kwargs(generator):
    mine, x = build(1000, spacing="10", rescale_timesteps=True), torch.randn(SHAPE, generator=generator)
    seen = []

    def cond_fn(x, t, **kwargs):
        seen.append((x, t, kwargs))
        return torch.ones_like(x)

    t = torch.tensor([9, 5, 1, 0])
    out = mine.p_mean_variance(Net(), x, t, model_kwargs=None)
    assert torch.equal(mine.condition_mean(cond_fn, out, x, t), out["mean"] + out["variance"])
    mine.condition_score(cond_fn, out, x, t, {"y": 1})
    told = torch.tensor([999.0, 555, 111, 0])
    assert all(torch.equal(given, x) and torch.equal(time, told) for given, time, _ in seen)
    assert [kwargs for *_, kwargs in seen] == [{}, {"y": 1}]


def test_improved_diffusion_has_model_kwargs_where_guided_has_cond_fn(in_sampler):
    x, t, y = torch.randn(SHAPE), torch.tensor([3, 2, 1, 0]), {"y": torch.arange(4.0)}
    theirs, mine = (build(spacing="5", of=of) for of in (guided, improved))
    assert isinstance(mine, improved.GaussianDiffusion) and isinstance(mine, GaussianDiffusion)
    for name, arguments, rest in (
        ("p_sample", (x, t, True, None), ()),
        ("ddim_sample", (x, t, True, None), (1.0,)),
        ("p_sample_loop", (SHAPE, None, False, None), ("cpu", False)),
        ("ddim_sample_loop", (SHAPE, None, True, None), ("cpu", False, 1.0)),
        ("p_sample_loop_progressive", (SHAPE, x, True, torch.tanh), ("cpu", False)),
        ("ddim_sample_loop_progressive", (SHAPE, x, True, None), ("cpu", False, 0.5)),
    ):
        results = []
        for diffusion, kwargs in ((theirs, (None, y)), (mine, (y,))):
            torch.manual_seed(0)
            result = getattr(diffusion, name)(Net().eval(), *arguments, *kwargs, *rest)
            result = list(result)[-1] if name.endswith("progressive") else result
            results.append(result if isinstance(result, torch.Tensor) else result["sample"])
        assert torch.equal(*results), name
        with pytest.raises(TypeError, match="cond_fn"):
            getattr(mine, name)(Net(), *arguments, cond_fn=None)
    assert in_sampler == [True] * 4


def test_what_scripts_take_from_nn():
    t, w = torch.tensor([0.0, 3.5, 999.0]), 10000 ** (-torch.arange(4).double() / 4)
    angle = t[:, None].double() * w
    expected = torch.cat([angle.cos(), angle.sin(), torch.zeros(3, 1)], 1)
    assert (guided.nn.timestep_embedding(t, 9) - expected).abs().max() < 1e-4
    target, source = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 0.0])
    guided.nn.update_ema([target], [source], rate=0.75)
    assert torch.equal(target, torch.tensor([1.5, 1.5]))
    layer = guided.nn.scale_module(nn.Linear(2, 2), 0.0)
    assert not any(parameter.any() for parameter in layer.parameters())
    assert torch.equal(guided.nn.mean_flat(torch.arange(8.0).reshape(2, 2, 2)), torch.tensor([1.5, 5.5]))


def test_schedule_samplers():
    diffusion = build(20)
    uniform = guided.create_named_schedule_sampler("uniform", diffusion)
    np.random.seed(0)  # noqa: NPY002
    t, weights = uniform.sample(64, "cpu")
    np.random.seed(0)  # noqa: NPY002
    drawn = np.random.choice(20, size=(64,), p=np.full(20, 1 / 20))  # noqa: NPY002
    assert torch.equal(t, torch.from_numpy(drawn))
    assert t.dtype == torch.int64 and torch.equal(weights, torch.ones(64))
    assert len(guided.create_named_schedule_sampler("uniform", diffusion, maxt=7).weights()) == 7

    sampler = guided.create_named_schedule_sampler("loss-second-moment", diffusion)
    generator, history = np.random.default_rng(0), [[] for _ in range(20)]
    for _ in range(60):
        t, losses = generator.integers(0, 20, 8), generator.random(8)
        sampler.update_with_local_losses(torch.from_numpy(t), torch.from_numpy(losses))
        for one, loss in zip(t, losses, strict=True):
            history[one].append(loss)
        if min(map(len, history)) < 10:
            assert np.array_equal(sampler.weights(), np.ones(20))
    rms = np.array([np.sqrt(np.mean(np.square(last[-10:]))) for last in history])  # Nichol, eq. 18
    np.testing.assert_allclose(sampler.weights(), 0.999 * rms / rms.sum() + 0.001 / 20, rtol=1e-12)
    t, weights = sampler.sample(5, "cpu")
    np.testing.assert_allclose(weights, 1 / (20 * sampler.weights()[t]), rtol=1e-6)
    with pytest.raises(NotImplementedError, match="'other'"):
        guided.create_named_schedule_sampler("other", diffusion)


def test_schedule_samplers_share_losses_of_unequal_batches(monkeypatch):
    dist = guided.resample.dist
    others = iter([torch.tensor([3]), torch.tensor([5, 6, 7]), torch.tensor([0.5, 0.6, 0.7])])

    def all_gather(parts, mine):
        parts[0].copy_(mine)
        parts[1].copy_(next(others))

    for name, value in (
        ("is_initialized", lambda: True),
        ("get_world_size", lambda: 2),
        ("all_gather", all_gather),
    ):
        monkeypatch.setattr(dist, name, value)
    sampler, told = guided.LossSecondMomentResampler(build(20)), []
    monkeypatch.setattr(sampler, "update_with_all_losses", lambda ts, losses: told.append((ts, losses)))
    sampler.update_with_local_losses(torch.tensor([1, 2]), torch.tensor([0.1, 0.2], requires_grad=True))
    assert told[0][0] == [1, 2, 5, 6, 7] and told[0][1] == pytest.approx([0.1, 0.2, 0.5, 0.6, 0.7])


def test_what_is_refused_and_how():
    mine, x, t = build(spacing="5"), torch.zeros(SHAPE), torch.zeros(4, dtype=torch.int64)
    kwargs = {"model_mean_type": MEANS[2], "model_var_type": VARS[1], "loss_type": LOSSES[0]}
    with pytest.raises(AssertionError, match="1-D"):
        GaussianDiffusion(betas=[[0.1]], **kwargs)
    for betas in ([0.0, 0.1], [0.5, 1.1]):
        with pytest.raises(AssertionError, match="in \\(0, 1\\]"):
            GaussianDiffusion(betas=betas, **kwargs)
    for call, error, message in (
        (lambda: mine.p_sample(Net(), x, t[:3]), AssertionError, "t must have shape \\(4,\\)"),
        (lambda: mine.p_mean_variance(Net(True), x, t), AssertionError, "must return \\(4, 2, 3, 3\\)"),
        (lambda: mine.q_sample(x, t, x[:, :1]), AssertionError, "noise must have the shape"),
        (lambda: mine.q_posterior_mean_variance(x[:, :1], x, t), AssertionError, "x_start must have"),
        (lambda: mine.ddim_reverse_sample(Net(), x, t, eta=0.5), AssertionError, "eta"),
        (lambda: mine.ddim_sample(Net(), x, t, eta=1.5), ValueError, "eta"),
        (lambda: mine.p_sample_loop(Net(), 4), AssertionError, "shape"),
        (lambda: mine.p_sample_loop(lambda x, t: x, SHAPE), TypeError, "device"),
        (lambda: mine.p_sample(Net(), x, t + 5), IndexError, "index 5"),
        (lambda: get_named_beta_schedule("cubic", 10), NotImplementedError, "cubic"),
    ):
        with pytest.raises(error, match=message):
            call()
    zero = build()
    zero = GaussianDiffusion(betas=np.append(zero.betas[:-1], 1.0), **kwargs)
    assert zero.q_sample(x, t).shape == SHAPE
    with pytest.raises(ValueError, match="zero terminal SNR"):
        zero.p_sample(Net(), x, t)
    mine.loss_type = LossType.BCE_DICE
    with pytest.raises(NotImplementedError):
        mine.training_losses(Net(), x, t)


def test_half_and_double():
    mine, x, t = build(), torch.randn(SHAPE), torch.tensor([0, 1, 20, 49])
    for dtype, computed in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        given = x.to(dtype)
        assert mine.q_sample(given, t, given).dtype == computed
        out = mine.p_mean_variance(lambda x, t: x, given, t)
        assert {value.dtype for value in out.values()} == {computed}
    written = Written(50, "linear", None, MEANS[2], VARS[1])
    sample = mine.ddim_sample(lambda x, t: torch.sin(x), x.double(), t)["sample"]
    assert (sample - written.ddim(x.double(), torch.sin(x.double()), t, 0.0, 0.0)[0]).abs().max() < 1e-13


# ---- the segmentation forks ----


class MaskNet(nn.Module):
    """(out, cal) of an image of three channels and a state."""

    def __init__(self, learned: bool = False) -> None:
        super().__init__()
        weight = torch.randn(3 if learned else 2, 4, generator=torch.Generator().manual_seed(0))
        self.weight, self.seen = nn.Parameter(0.4 * weight), []

    def forward(self, x, t):
        self.seen.append((x, t))
        mix = torch.einsum(
            "oc,bchw->bohw", self.weight.to(x.dtype), torch.tanh(x + (t / 1000)[:, None, None, None])
        )
        return mix[:, :-1].contiguous(), torch.sigmoid(mix[:, -1:])


@pytest.mark.parametrize("var", VARS, ids=str)
def test_a_mask_is_denoised_beside_its_image(var, generator):
    run = 100, "linear", "20"
    mine, model = build(*run, "EPSILON", var, of=segmentation), MaskNet(var in LEARNED).eval()
    image, t = torch.rand((2, 4, 5, 5), generator=generator), torch.tensor([0, 13])
    alone = build(*run, "EPSILON", var)
    out, cal = model(image, t * 5 + torch.tensor([0, 3]))  # as "20" of 100 spaces them: 0 and 68
    given = (lambda x, t: out), image[:, -1:], t
    for name in ("p_mean_variance", "p_sample", "ddim_sample", "ddim_reverse_sample"):
        results = []
        for call in (lambda: getattr(alone, name)(*given), lambda: getattr(mine, name)(model, image, t)):  # noqa: B023
            torch.manual_seed(0)
            results.append(call())
        expected = results[0] | {"cal": cal}
        assert set(expected) == set(results[1])
        close(results[1], double(expected), 1e-6)
    assert mine.p_mean_variance(lambda x, t: out, image, t)["cal"] == 0

    torch.manual_seed(1)
    x = torch.randn_like(image[:, :1])
    model.seen.clear()
    state = x
    for i in range(20)[::-1]:
        seen = torch.cat([image[:, :-1], state], 1)
        with torch.no_grad():
            out = mine.p_sample(model, seen, torch.full((2,), i))
        state = out["sample"]
    torch.manual_seed(1)
    sample, x_noisy, given, cal, both = mine.p_sample_loop_known(model, (2, 3, 5, 5), image, progress=True)
    assert torch.equal(given, image) and torch.equal(x_noisy, torch.cat([image[:, :-1], x], 1))
    assert torch.equal(sample, state) and torch.equal(cal, out["cal"])
    mask = (sample > 0).float()
    agree = 2 * (mask * cal).sum() / (mask + cal).sum() >= 0.65
    assert torch.equal(both, (0.5 * cal + 0.5 * sample if agree else cal + 0.25 * sample).clamp(0, 1))

    def sure(x, t):
        ones = torch.ones_like(x[:, -1:])
        return ones.repeat(1, 1 + (var in LEARNED), 1, 1) * -50, 0.6 * ones

    sample, *_, both = build(*run, var=var, of=segmentation).p_sample_loop_known(
        sure, (2,), image, device="cpu"
    )
    assert (sample > 0).all() and torch.equal(both, (0.5 * 0.6 + 0.5 * sample).clamp(0, 1))
    few, *_ = mine.p_sample_loop_known(model, (2, 3, 5, 5), image, step=3)
    assert few.shape == (2, 1, 5, 5)
    by_ddim = mine.ddim_sample_loop_known(model, (2, 3, 5, 5), image)
    assert [each.shape[1] for each in by_ddim] == [1, 4, 4]


def solved(betas, image, x, model, N):
    """DPM-Solver++(2M) as Lu writes it (algorithm 2), log alpha interpolated: (x, last call)."""
    T = len(betas)
    times = np.linspace(1, 1 / T, N + 1)
    log_alpha = np.interp(times, np.arange(1, T + 1) / T, 0.5 * np.cumsum(np.log(1 - betas)))
    alpha, sigma = np.exp(log_alpha), np.sqrt(1 - np.exp(2 * log_alpha))
    half_log_snr = np.log(alpha / sigma)
    call = lambda x, i: model(torch.cat([image, x], 1), torch.full((len(x),), (times[i] - 1 / T) * 1000))  # noqa: E731
    predictions, x = [], x.double()
    for i in range(N):
        x0 = (x - sigma[i] * call(x, i)[0]) / alpha[i]
        bound = torch.quantile(x0.abs().flatten(1), 0.995, dim=1).clamp(min=1).reshape(-1, 1, 1, 1)
        predictions.append(x0.clamp(-bound, bound) / bound)
        h, D = half_log_snr[i + 1] - half_log_snr[i], predictions[-1]
        if i > 0 and not (N < 10 and i == N - 1):
            r = (half_log_snr[i] - half_log_snr[i - 1]) / h
            D = (1 + 1 / (2 * r)) * predictions[-1] - 1 / (2 * r) * predictions[-2]
        x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * math.expm1(-h) * D
    return x, call(x, N)


@pytest.mark.parametrize("N", [2, 7, 10, 25])
def test_dpm_solver_draws_a_mask(N, generator):
    image, network = torch.rand((2, 4, 5, 5), generator=generator), MaskNet().eval()

    def faint(x, t):  # whose x0 needs no bound
        network.seen.append(t)
        return x[:, -1:], torch.sigmoid(x[:, :1])

    for T, spacing, model in ((1000, None, network), (100, "50", network), (100, None, faint)):
        mine = build(T, spacing=spacing, of=segmentation, dpm_solver=True)
        for strict in (True, False):
            mine.strict = strict
            torch.manual_seed(2)
            given = model, (2, 3, 5, 5), image
            sample, x_noisy, _, cal, both = mine.p_sample_loop_known(*given, step=N, device="cpu")
            assert len(network.seen) == N + 1
            network.seen.clear()
            exact, (out, exact_cal) = solved(mine.betas, image[:, :-1].double(), x_noisy[:, -1:], model, N)
            network.seen.clear()
            expected = out if strict else exact
            expected = (expected - expected.mean()) / expected.std()
            close(sample, expected.detach(), 1e-4)
            close(cal, exact_cal.detach(), 1e-4)
            close(both, (exact_cal + 0.25 * expected).clamp(0, 1).detach(), 1e-4)
    model = network
    with pytest.raises(ValueError, match="EPSILON"):
        build(mean="START_X", of=segmentation, dpm_solver=True).p_sample_loop_known(
            model, (2, 3, 5, 5), image
        )
    with pytest.raises(ValueError, match="step"):
        mine.p_sample_loop_known(model, (2, 3, 5, 5), image, step=1)
    with pytest.raises(ValueError, match="cond_fn"):
        mine.p_sample_loop_known(model, (2, 3, 5, 5), image, cond_fn=model)


@pytest.mark.parametrize("loss", ["MSE", "RESCALED_MSE", "BCE_DICE"])
@pytest.mark.parametrize("var", ["FIXED_SMALL", "LEARNED_RANGE"])
def test_a_mask_is_trained_beside_its_image(var, loss, generator):
    mine = build(100, mean="EPSILON", var=var, loss=loss, of=segmentation)
    written = Written(100, "linear", None, ModelMeanType.EPSILON, ModelVarType[var])
    image, t = torch.rand((2, 4, 5, 5), generator=generator) - 0.3, torch.tensor([0, 40])
    noise, model = torch.randn((2, 1, 5, 5), generator=generator), MaskNet(var == "LEARNED_RANGE")
    before = image.clone()
    terms, predicted = mine.training_losses_segmentation(model, None, image, t, noise=noise)
    assert torch.equal(image, before)
    mask = (image[:, -1:] > 0).double()
    x = written.q_sample(mask, noise.double(), t)
    assert torch.allclose(model.seen[0][0].double(), torch.cat([image[:, :-1].double(), x], 1), atol=1e-6)
    out, cal = model(torch.cat([image[:, :-1].double(), x], 1), t)
    kind = LossType.MSE if loss == "BCE_DICE" else LossType[loss]
    expected = written.losses(mask, noise.double(), x, out, t, kind)
    expected["loss_diff"] = expected.pop("mse")
    close(terms, expected | {"loss_cal": ((mask - cal) ** 2).mean((1, 2, 3))})
    close(predicted, out[:, :1])
    with pytest.raises(ValueError, match="cal"):
        mine.training_losses_segmentation(lambda x, t: out.float(), None, image, t)
    with pytest.raises(NotImplementedError):
        build(loss="KL", of=segmentation).training_losses_segmentation(model, None, image, t)
