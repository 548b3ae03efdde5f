"""denoising-diffusion-pytorch's class: beside its equations in float64, and beside itself where installed."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ddpm_fast import UNet, UNetConfig
from ddpm_fast.compat import lucidrains
from ddpm_fast.compat.lucidrains import GaussianDiffusion

OBJECTIVES = ("pred_noise", "pred_x0", "pred_v")
SCHEDULES = ("linear", "cosine", "sigmoid")
RUNS = ((100, None, 0.0), (1000, 7, 0.0), (1000, 12, 0.7), (50, 49, 1.0))
"""(timesteps, sampling_timesteps, eta)."""
STEP, IMAGE = 1e-5, 1e-4

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def package():
    return pytest.importorskip(
        "denoising_diffusion_pytorch",
        reason="denoising-diffusion-pytorch is not installed: pip install ddpm_fast[peers]",
    )


class Denoiser(nn.Module):
    """Something that a network may be: most of what it predicts of x, and a little that is wild."""

    channels = out_dim = 3

    def __init__(self, objective: str = "pred_v", self_condition: bool = False) -> None:
        super().__init__()
        self.self_condition = self_condition
        self.of_x = {"pred_noise": 0.98, "pred_x0": 0.3, "pred_v": -0.2}[objective]
        self.conv = nn.Conv2d(3, 3, 1)
        self.given = []

    def forward(self, x, t, x_self_cond):
        self.given.append(x_self_cond)
        out = self.of_x * x + 0.1 * self.conv(torch.sin(3 * x)) * torch.cos(t / 300)[:, None, None, None]
        return out if x_self_cond is None else out + 0.1 * x_self_cond


def build(objective="pred_v", schedule="sigmoid", *, cls=GaussianDiffusion, model=None, **given):
    torch.manual_seed(0)
    model = Denoiser(objective).eval() if model is None else model
    return cls(model, image_size=8, objective=objective, beta_schedule=schedule, **given).eval()


def seeded(call, *args, **given):
    """What a call returns from seed 1, and the generator's state after it."""
    torch.manual_seed(1)
    result = call(*args, **given)
    return result, torch.get_rng_state()


# The equations, in float64


class Equations:
    """Ho et al. 2020 (eq. 4, 7), Salimans & Ho 2022 (v) and Song et al. 2021 (eq. 12), number by number."""

    def __init__(self, objective, schedule, T):
        u = torch.arange(T + 1, dtype=torch.float64) / T
        if schedule == "linear":
            self.beta = torch.linspace(0.1 / T, 20 / T, T, dtype=torch.float64)
        else:
            ab = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
            if schedule == "sigmoid":  # whose ends are float32 in the package
                low, high = (float(torch.tensor(edge).sigmoid()) for edge in (-3.0, 3.0))
                ab = (high - torch.sigmoid(6 * u - 3)) / (high - low)
            self.beta = (1 - ab[1:] / ab[:-1]).clamp(max=0.999)
        self.objective, self.T = objective, T
        self.ab = (1 - self.beta).cumprod(0)

    def x0_and_eps(self, x, out, t):
        a, s = self.ab[t].sqrt(), (1 - self.ab[t]).sqrt()
        x0 = {"pred_noise": (x - s * out) / a, "pred_x0": out, "pred_v": a * x - s * out}[self.objective]
        x0 = x0.clamp(-1, 1)
        return x0, (x - a * x0) / s

    def ddpm(self, x, out, t, noise):
        ab, beta = self.ab[t], self.beta[t]
        before = self.ab[t - 1] if t > 0 else torch.ones(())
        x0, _ = self.x0_and_eps(x, out, t)
        mean = before.sqrt() * beta / (1 - ab) * x0 + (1 - beta).sqrt() * (1 - before) / (1 - ab) * x
        return mean + (beta * (1 - before) / (1 - ab)).sqrt() * noise

    def ddim(self, x, out, t, t_next, eta, noise):
        x0, eps = self.x0_and_eps(x, out, t)
        if t_next < 0:
            return x0
        ab, after = self.ab[t], self.ab[t_next]
        sigma = eta * ((1 - after) / (1 - ab) * (1 - ab / after)).sqrt()
        return after.sqrt() * x0 + (1 - after - sigma**2).sqrt() * eps + sigma * noise

    def rounding(self, x, t, t_next):
        """What float32 loses of x0, a difference of large numbers where little signal is left."""
        lost = 4 * torch.finfo(torch.float32).eps * x.abs().max() / self.ab[t].sqrt()
        return 0.0 if self.objective != "pred_noise" else float(lost * self.ab[max(t_next, 0)].sqrt())


def walk(equations, model, S, eta, shape):
    """The draws of a loop and its steps: ``(start, [step(x) -> (x in float64, tolerance)])``."""
    if S is None:
        times = [(t, t - 1) for t in range(equations.T)[::-1]]
    else:
        spaced = torch.linspace(-1, equations.T - 1, S + 1).int().tolist()[::-1]
        times = list(itertools.pairwise(spaced))
    start, wide = torch.randn(shape), copy.deepcopy(model).double()

    def taker(t, t_next):
        noise = torch.randn(shape).double() if t_next >= 0 else torch.zeros(shape).double()

        def take(x):
            x = x.double()
            out = wide(x, torch.full((len(x),), t), None)
            step = equations.ddpm if S is None else equations.ddim
            given = (t, noise) if S is None else (t, t_next, eta, noise)
            return step(x, out, *given), STEP + equations.rounding(x, t, t_next)

        return take

    return start, [taker(*pair) for pair in times]


@torch.no_grad()
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("T", "S", "eta"), RUNS)
def test_a_loop_takes_the_steps_of_the_papers(objective, schedule, T, S, eta):
    ours = build(objective, schedule, timesteps=T, sampling_timesteps=S, ddim_sampling_eta=eta)
    found, state = seeded(ours.sample, 3, return_all_timesteps=True)
    assert ours._sampler[1] is not None
    (start, steps), expected_state = seeded(
        walk, Equations(objective, schedule, T), ours.model, S, eta, (3, 3, 8, 8)
    )
    assert torch.equal(state, expected_state)
    xs = (2 * found - 1).unbind(1)
    assert len(xs) == len(steps) + 1
    torch.testing.assert_close(xs[0], start, rtol=0, atol=1e-6)
    for k, take in enumerate(steps):
        expected, tolerance = take(xs[k])
        assert (xs[k + 1] - expected).abs().max() <= tolerance, f"step {k}"
    last, _ = seeded(ours.sample, 3)
    torch.testing.assert_close(last, found[:, -1], rtol=0, atol=0)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_levels_are_those_of_the_equations(schedule):
    for T in (1000, 50):
        equations, ours = Equations("pred_v", schedule, T), build("pred_v", schedule, timesteps=T)
        torch.testing.assert_close(ours.betas.double(), equations.beta, rtol=1e-7, atol=0)
        torch.testing.assert_close(ours.alphas_cumprod.double(), equations.ab, rtol=1e-7, atol=0)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_loss_is_that_of_the_equations(schedule):
    x0, t = torch.rand(6, 3, 8, 8), torch.tensor([0, 3, 20, 50, 98, 99])
    noise, offset = torch.randn(6, 3, 8, 8), 0.1
    for objective, gamma in itertools.product(OBJECTIVES, (None, 2.0)):
        equations = Equations(objective, schedule, 100)
        ours = build(
            objective,
            schedule,
            timesteps=100,
            offset_noise_strength=offset,
            min_snr_loss_weight=gamma is not None,
            min_snr_gamma=gamma or 5,
        )
        found, _ = seeded(ours, x0, noise, times=t, loss_reduction="none")
        eps = (noise + offset * seeded(torch.randn, 6, 3, 1, 1)[0]).double()
        ab, signed = equations.ab[t][:, None, None, None], x0.double() * 2 - 1
        a, s = ab.sqrt(), (1 - ab).sqrt()
        x = a * signed + s * eps
        target = {"pred_noise": eps, "pred_x0": signed, "pred_v": a * eps - s * signed}[objective]
        out = copy.deepcopy(ours.model).double()(x, t, None)
        snr = (equations.ab / (1 - equations.ab))[t]
        weight = snr if gamma is None else snr.clamp(max=gamma)
        weight = weight / {"pred_noise": snr, "pred_x0": 1.0, "pred_v": snr + 1}[objective]
        expected = weight * (out - target).square().flatten(1).mean(1)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


# The package itself


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("min_snr", [False, True])
def test_the_state_dict_is_the_packages(package, objective, min_snr):
    kwargs = {"linear": {}, "cosine": {"s": 0.02}, "sigmoid": {"start": -2, "end": 4, "tau": 0.8}}
    for (schedule, own), T in itertools.product(kwargs.items(), (1000, 50)):
        for given in ({}, {"schedule_fn_kwargs": own}):
            given |= {"timesteps": T, "min_snr_loss_weight": min_snr}
            ours = build(objective, schedule, **given)
            theirs = build(objective, schedule, cls=package.GaussianDiffusion, model=ours.model, **given)
            assert list(ours.state_dict()) == list(theirs.state_dict())
            torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=2e-7, atol=0)
    assert set(vars(theirs)) <= set(vars(ours))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_its_pictures_are_the_packages(package, objective, schedule):
    x1, x2 = torch.rand(2, 2, 3, 8, 8) * 2 - 1
    for T, S, eta in RUNS:
        given = {"timesteps": T, "sampling_timesteps": S, "ddim_sampling_eta": eta}
        ours = build(objective, schedule, **given)
        theirs = build(objective, schedule, cls=package.GaussianDiffusion, model=ours.model, **given)
        for call in (
            lambda diffusion: diffusion.sample(2, return_all_timesteps=True),
            lambda diffusion: diffusion.interpolate(x1, x2, 20, lam=0.3),
        ):
            (found, state), (expected, expected_state) = (seeded(call, each) for each in (ours, theirs))
            torch.testing.assert_close(found, expected, rtol=0, atol=IMAGE)
            assert torch.equal(state, expected_state)


def test_where_little_signal_is_left_it_rounds_as_the_package(package):
    """A network that knows its noise well leaves x0 a small difference of large numbers."""
    for schedule in SCHEDULES:
        given = {"timesteps": 1000, "sampling_timesteps": 4, "model": Denoiser("pred_noise").eval()}
        ours = build("pred_noise", schedule, **given)
        theirs = build("pred_noise", schedule, cls=package.GaussianDiffusion, **given)
        a, s = ours.sqrt_alphas_cumprod.double(), ours.sqrt_one_minus_alphas_cumprod.double()

        def knowing(x, t, x_self_cond, a=a, s=s):
            x, (a, s) = x.double(), (level[t][:, None, None, None] for level in (a, s))
            return ((x - a * torch.sin(3 * x)) / s).float()

        ours.model.forward = knowing
        (found, _), (expected, _) = (
            seeded(each.sample, 4, return_all_timesteps=True) for each in (ours, theirs)
        )
        torch.testing.assert_close(found, expected, rtol=0, atol=STEP)


def test_its_methods_are_the_packages(package):
    x, noise, t = torch.randn(3, 3, 8, 8), torch.randn(3, 3, 8, 8), torch.tensor([0, 40, 99])
    for objective in OBJECTIVES:
        ours = build(objective, timesteps=100)
        theirs = build(objective, timesteps=100, cls=package.GaussianDiffusion, model=ours.model)
        for call in (
            lambda each: each.q_sample(x, t, noise),
            lambda each: each.q_sample(x.double(), t, noise.double()),
            lambda each: each.predict_v(x, t, noise),
            lambda each: each.predict_start_from_noise(x, t, noise),
            lambda each: each.predict_noise_from_start(x, t, noise),
            lambda each: each.predict_start_from_v(x, t, noise),
            lambda each: each.q_posterior(x, noise, t),
            lambda each: tuple(each.model_predictions(x, t)),
            lambda each: tuple(each.model_predictions(x, t, clip_x_start=True, rederive_pred_noise=True)),
            lambda each: each.p_mean_variance(x, t),
            lambda each: each.p_mean_variance(x, t, clip_denoised=False),
            lambda each: each.p_sample(x, 7),
            lambda each: each.p_sample(x, 0),
            lambda each: each.random_times(9),
            lambda each: each.normalize(x) - each.unnormalize(x),
            lambda each: each.noise_assignment(x, noise),
        ):
            (found, state), (expected, expected_state) = (seeded(call, each) for each in (ours, theirs))
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
            assert torch.equal(state, expected_state)


@pytest.mark.parametrize("self_condition", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_over_its_own_unet(package, objective, self_condition):
    """In training mode, as its users sample; pictures, losses and gradients."""
    import random

    assert lucidrains.Unet is package.Unet
    torch.manual_seed(0)
    unet = package.Unet(8, dim_mults=(1, 2), channels=1, attn_dim_head=4, self_condition=self_condition)
    given = {"image_size": 8, "timesteps": 12, "objective": objective, "offset_noise_strength": 0.1}
    given |= {"min_snr_loss_weight": True, "immiscible": True, "ddim_sampling_eta": 0.5}
    img, results = torch.rand(4, 1, 8, 8), []
    for cls in (GaussianDiffusion, package.GaussianDiffusion):
        diffusion = cls(copy.deepcopy(unet), **given)
        torch.manual_seed(1)
        random.seed(1)
        losses = torch.stack([diffusion(img) for _ in range(4)])
        losses.sum().backward()
        grads = [parameter.grad for parameter in diffusion.parameters()]
        steps = [*diffusion.sample(2, return_all_timesteps=True).unbind(1)]
        diffusion.is_ddim_sampling, diffusion.sampling_timesteps = True, 5
        steps.append(diffusion.sample(2))
        assert all(part.training for part in diffusion.modules())
        results.append((losses.detach(), grads, steps, torch.get_rng_state()))
    (losses, grads, steps, state), (their_losses, their_grads, their_steps, their_state) = results
    torch.testing.assert_close(losses, their_losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grads, their_grads, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(steps, their_steps, rtol=0, atol=IMAGE)
    assert torch.equal(state, their_state)


# What forbids the table


def test_self_conditioning_hands_on_x0():
    ours = build(timesteps=5, model=Denoiser(self_condition=True).eval())
    ours.sample(2)
    first, *others = ours.model.given
    assert first is None and all(x0.abs().max() <= 1 for x0 in others) and len(others) == 4
    assert ours._sampler[1] is None


def test_a_layout_that_the_network_gives_to_x_is_drawn_in(package):
    """Where x0 is the output as it is, randn_like fills memory in the output's order."""

    class Permuted(Denoiser):
        def forward(self, x, t, x_self_cond):
            out = super().forward(x, t, x_self_cond)
            return out.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)

    pictures = []
    for cls in (GaussianDiffusion, package.GaussianDiffusion):
        diffusion = build("pred_x0", timesteps=20, cls=cls, model=Permuted("pred_x0").eval())
        diffusion.model.load_state_dict(build("pred_x0", timesteps=20).model.state_dict())
        pictures.append(seeded(diffusion.sample, 2))
    torch.testing.assert_close(*pictures, rtol=0, atol=IMAGE)


def test_steps_that_are_replaced_are_taken():
    class Emptied(GaussianDiffusion):
        def model_predictions(self, *args, **given):
            eps, x0 = super().model_predictions(*args, **given)
            return lucidrains.ModelPrediction(eps, x0 * 0)

    inherited = build(timesteps=10)
    for S in (None, 5):
        emptied = build(timesteps=10, sampling_timesteps=S, cls=Emptied)
        assert emptied.sample(2).eq(0.5).all() and not inherited.sample(2).eq(0.5).any()
    inherited.p_sample = lambda x, t, x_self_cond: (x * 0, x)
    assert inherited.sample(2).eq(0.5).all()


@pytest.mark.parametrize("training", [False, True])
def test_dropout_is_drawn_where_the_network_trains(training):
    class Dropping(Denoiser):
        def forward(self, x, t, x_self_cond):
            return super().forward(F.dropout(x, 0.5, self.training), t, x_self_cond)

    ours = build(timesteps=10, model=Dropping()).train(training)
    draws = [torch.empty(2, 3, 8, 8)] * (10 + 10 * training)
    _, state = seeded(ours.sample, 2)
    _, expected = seeded(
        lambda: [F.dropout(x + 1) if training and k % 2 else torch.randn_like(x) for k, x in enumerate(draws)]
    )
    assert torch.equal(state, expected) and ours.model.training == training


@pytest.mark.parametrize("case", ["double", "autocast", "half weights"])
def test_other_dtypes_run_as_they_are_written(case):
    ours = build(timesteps=10)
    if case == "double":
        torch.set_default_dtype(torch.float64)
        try:
            assert ours.double().sample(2).dtype == torch.float64
        finally:
            torch.set_default_dtype(torch.float32)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            if case == "half weights":
                ours.model.bfloat16()
            assert ours.sample(2).isfinite().all()
    assert ours._sampler[1] is None


# What a module does


def test_a_loaded_schedule_is_what_is_sampled_with():
    ours, other = build(timesteps=30), build(schedule="cosine", timesteps=30)
    before = seeded(ours.sample, 2)[0]
    ours.load_state_dict(other.state_dict())
    found, expected = (seeded(each.sample, 2)[0] for each in (ours, other))
    assert torch.equal(found, expected) and not torch.equal(found, before)


def test_copies_sample_with_their_own_weights():
    ours = build(timesteps=10)
    expected = seeded(ours.sample, 2)[0]
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(seeded(other.sample, 2)[0], expected)
        with torch.no_grad():
            other.model.conv.bias += 3
        assert not torch.equal(seeded(other.sample, 2)[0], expected)
    ours.model = copy.deepcopy(other.model)
    assert torch.equal(seeded(ours.sample, 2)[0], seeded(other.sample, 2)[0])


def test_over_our_unet():
    config = UNetConfig((32,), (False,), (False,), sample_size=8, in_channels=1, out_channels=1)
    torch.manual_seed(0)
    ours = build(timesteps=10, model=UNet(config).train())
    found = seeded(ours.sample, 2)[0]
    ours.p_sample = ours.p_sample  # replaced, by itself
    torch.testing.assert_close(seeded(ours.sample, 2)[0], found, rtol=0, atol=IMAGE)
    assert found.shape == (2, 1, 8, 8) and ours(found).isfinite()


def test_in_inference_mode():
    ours = build(timesteps=10)
    expected = seeded(ours.sample, 2)[0]
    with torch.inference_mode():
        assert torch.equal(seeded(ours.sample, 2)[0], expected)
    assert torch.equal(seeded(ours.sample, 2)[0], expected)


def test_the_package_is_not_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "denoising_diffusion_pytorch", None)
    for name in [name for name in sys.modules if name.startswith("ddpm_fast.compat.lucidrains")]:
        monkeypatch.delitem(sys.modules, name)
    from ddpm_fast.compat import lucidrains as anew

    assert anew.GaussianDiffusion(Denoiser(), image_size=8, timesteps=3).sample(1).shape == (1, 3, 8, 8)
    with pytest.raises(ImportError, match="pip install denoising-diffusion-pytorch"):
        _ = anew.Unet
    with pytest.raises(AttributeError, match="Trainer"):
        _ = anew.Trainer


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"objective": "eps"}, AssertionError, "objective must be one of .* got 'eps'"),
        ({"image_size": (8, 8, 8)}, AssertionError, "image_size must be"),
        ({"timesteps": 10, "sampling_timesteps": 11}, AssertionError, "at most timesteps 10, got 11"),
        ({"sampling_timesteps": 0}, ValueError, "at least 1, got 0"),
        ({"timesteps": 0}, ValueError, "timesteps"),
        ({"beta_schedule": "squared"}, ValueError, "unknown beta schedule 'squared'; allowed: linear"),
        ({"schedule_fn_kwargs": {"s": 1}}, TypeError, "'s'"),
        ({"timesteps": 10, "beta_schedule": "linear"}, ValueError, "betas must be in"),
        ({"model": nn.Conv2d(3, 3, 1)}, TypeError, "no channels and no self_condition"),
    ],
)
def test_bad_arguments(given, error, words):
    model = given.pop("model", None) or Denoiser()
    with pytest.raises(error, match=words):
        GaussianDiffusion(model, **{"image_size": 8, **given})


def test_bad_calls():
    ours = build(timesteps=10, sampling_timesteps=5, ddim_sampling_eta=4.0)
    images = torch.rand(2, 3, 8, 8)
    for call, error, words in (
        (lambda: ours.sample(2), ValueError, "ddim_sampling_eta .* got 4.0"),
        (lambda: ours(images[..., :7]), AssertionError, r"img must be of \(8, 8\)"),
        (lambda: ours(images, loss_reduction="sum"), ValueError, "loss_reduction must be"),
        (lambda: ours.interpolate(images, images[:1]), AssertionError, "must be alike"),
        (lambda: ours.interpolate(images, images, 10), ValueError, r"t must be in \[0, 9\], got 10"),
        (lambda: ours.p_losses(images, torch.tensor([0, 10])), IndexError, "t"),
    ):
        with pytest.raises(error, match=words):
            call()
    model = Denoiser()
    model.out_dim = 6
    with pytest.raises(AssertionError, match="3 channels, not 6"):
        build(model=model)
