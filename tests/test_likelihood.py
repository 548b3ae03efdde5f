"""Bits a dimension against the equations and in closed form; progressive decoding; interpolation."""

from __future__ import annotations

import itertools
import json
import math
import sys
from functools import partial

import numpy as np
import pytest
import torch
from op_cases import check_error_rule
from PIL import Image
from test_cli import call, tiny  # noqa: F401 a fixture
from test_graph_safety import Refuse
from test_losses import Net

from ddpm_fast import Sampler, Schedule, UNet, UNetConfig, checkpoint, likelihood, losses, ops, steps
from ddpm_fast.bench import plot
from ddpm_fast.likelihood import bits_per_dim, interpolate, progressive
from ddpm_fast.likelihood.reader import Reader
from ddpm_fast.ops import _checks

T = 20
SCHEDULE = Schedule.linear(T, 1e-3, 0.3)
FIELDS = ("total", "prior", "vb", "x0_mse", "mse")
CASES = [
    {"prediction": prediction, "variance": variance, "clip": clip}
    for prediction, variance, clip in itertools.product(losses.PREDICTIONS, losses.VARIANCES, (1.0, None))
]


def name(case) -> str:
    return "-".join(map(str, case.values()))


def written(model, schedule, x0, *, prediction, variance, clip, seed=0, first_image=0):
    """`calc_bpd_loop` by the papers' equations, in x0's dtype: a dict of `FIELDS`."""
    dtype, length = x0.dtype, schedule.T
    ab = torch.tensor(schedule.alphas_cumprod, dtype=torch.float64)
    ab_prev = torch.cat([torch.ones(1, dtype=torch.float64), ab[:-1]])
    beta = 1 - ab / ab_prev
    posterior = beta * (1 - ab_prev) / (1 - ab)  # Ho et al., eq. 7
    small = torch.log(torch.cat([posterior[1:2], posterior[1:]]))
    large = torch.log(torch.cat([posterior[1:2], beta[1:]]))

    def bits(per_element):
        return per_element.mean(list(range(1, x0.dim()))) / math.log(2)

    def kl(mean1, log_var1, mean2, log_var2):
        variance1, variance2 = log_var1.exp(), log_var2.exp()
        return 0.5 * (log_var2 - log_var1 + (variance1 + (mean1 - mean2) ** 2) / variance2 - 1)

    def cdf(z):
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    found = {key: [] for key in ("vb", "x0_mse", "mse")}
    for t in range(length):
        a, a_prev, b, log_true, log_large = (v[t].to(dtype) for v in (ab, ab_prev, beta, small, large))
        noise = ops.counter_normal(x0.shape, seed, first_image, t, stream="step").to(dtype)
        x_t = a.sqrt() * x0 + (1 - a).sqrt() * noise  # eq. 4
        out = model(x_t, torch.full((len(x0),), t))
        log_var = log_large if variance == "fixed_large" else log_true
        if variance == "learned_range":  # Nichol & Dhariwal, eq. 15
            out, v = out.chunk(2, 1)
            fraction = (v + 1) / 2
            log_var = fraction * beta[t].log().to(dtype) + (1 - fraction) * log_true
        of_x0, of_x = b * a_prev.sqrt() / (1 - a), (1 - b).sqrt() * (1 - a_prev) / (1 - a)  # eq. 7
        guess = {
            "epsilon": lambda: (x_t - (1 - a).sqrt() * out) / a.sqrt(),  # noqa: B023 called at once
            "x0": lambda: out,  # noqa: B023
            "v": lambda: a.sqrt() * x_t - (1 - a).sqrt() * out,  # noqa: B023
            "mean": lambda: (out - of_x * x_t) / of_x0,  # noqa: B023
        }[prediction]()
        if clip is not None:
            guess = guess.clamp(-clip, clip)
        mean = out if prediction == "mean" else of_x0 * guess + of_x * x_t
        if t > 0:
            found["vb"].append(bits(kl(of_x0 * x0 + of_x * x_t, log_true, mean, log_var)))  # eq. 5
        else:  # eq. 13
            std = torch.exp(0.5 * torch.as_tensor(log_var))
            upper, lower = cdf((x0 - mean + 1 / 255) / std), cdf((x0 - mean - 1 / 255) / std)
            upper, lower = torch.where(x0 > 0.999, 1.0, upper), torch.where(x0 < -0.999, 0.0, lower)
            found["vb"].append(bits(-(upper - lower).clamp(min=1e-12).log()))
        implied = (x_t - a.sqrt() * guess) / (1 - a).sqrt()
        found["x0_mse"].append(((guess - x0) ** 2).flatten(1).mean(1))
        found["mse"].append(((implied - noise) ** 2).flatten(1).mean(1))
    found = {key: torch.stack(values, 1) for key, values in found.items()}
    a, zero = ab[-1].to(dtype), torch.zeros((), dtype=dtype)
    prior = bits(kl(a.sqrt() * x0, (1 - a).log(), zero, zero))
    return {"prior": prior, "total": prior + found["vb"].sum(1), **found}


@pytest.fixture
def images(generator):
    """Some of their values are the ends of the range."""
    return torch.randn(3, 3, 4, 5, dtype=torch.float64, generator=generator).clamp(-1, 1)


@pytest.mark.parametrize("case", CASES, ids=name)
def test_every_number_is_its_equation(case, images):
    found = {}
    for way, dtype in (("exact", torch.float64), ("ours", torch.float32), ("eager", torch.float32)):
        model, x0 = Net(case["variance"] == "learned_range"), images.to(dtype)
        if way != "ours":
            with torch.no_grad():
                found[way] = written(model, SCHEDULE, x0, **case, seed=3, first_image=7)
    ours = partial(bits_per_dim, model, SCHEDULE, **case, seed=3, first_image=7, batch_size=11)
    exactly, rounded = ours(images), ours(images.float())
    for field in FIELDS:
        exact, got = found["exact"][field], getattr(rounded, field)
        assert got.dtype == torch.float32 and not got.requires_grad
        torch.testing.assert_close(getattr(exactly, field), exact, rtol=1e-8, atol=1e-10)
        if field == "mse":  # of x0's error the noise has sqrt(SNR) times, and of its rounding
            torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=0)
        else:
            check_error_rule(got, found["eager"][field], exact, field)


@pytest.mark.parametrize(
    "schedule", [Schedule.linear(50, 2e-3, 0.4), Schedule.linear(), Schedule.cosine(4000)], ids=repr
)
@pytest.mark.parametrize("variance", ["fixed_large", "learned_range"])
def test_long_schedules(schedule, variance, images):
    """Of a model that is nearly right: the decoder's tails have no digits left in float32, nor have Ho's."""

    def model(x, t):
        near = images[0].to(x.dtype) + 2**-12
        return torch.cat([near.expand_as(x), x], 1) if variance == "learned_range" else near.expand_as(x)

    x0 = images[:1].float()
    options = {"prediction": "x0", "variance": variance, "clip": None}
    bits = bits_per_dim(model, schedule, x0, **options)
    exact = written(model, schedule, x0.double(), **options)
    torch.testing.assert_close(bits.total.double(), exact["total"], rtol=1e-5, atol=0)


# ---- in closed form ----


def closed_form(schedule, s, variance, v=0.3):
    """What each term is on average for data N(m, s^2) and the model that knows it, in bits: (T,).

    Given x_t, x0 is normal with a variance of its own, which is the error of its mean.
    """
    ab = schedule.alphas_cumprod
    error = s**2 * (1 - ab) / (ab * s**2 + 1 - ab)
    true = np.exp(schedule.posterior_log_variance_clipped)
    ends = np.stack([np.append(true[:1], schedule.betas[1:]), true])
    var = {
        "fixed_small": true,
        "fixed_large": ends[0],
        "learned_range": schedule.betas ** ((1 + v) / 2) * true ** ((1 - v) / 2),
    }[variance]
    terms = 0.5 * (np.log(var / true) + (true + schedule.posterior_mean_coef1**2 * error) / var - 1)
    z, weight = np.polynomial.hermite_e.hermegauss(200)
    apart, std = z * math.sqrt(error[0]), math.sqrt(var[0])

    def cdf(x):
        return 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    chance = np.maximum(cdf((apart + 1 / 255) / std) - cdf((apart - 1 / 255) / std), 1e-12)
    terms[0] = -(weight * np.log(chance)).sum() / weight.sum()
    return terms / math.log(2)


def knows(schedule, m, s, variance, v=0.3):
    """The epsilon that is right on average, for data N(m, s^2); the variance between its ends."""
    ab = torch.tensor(schedule.alphas_cumprod)

    def model(x, t):
        a = ab[t].reshape(-1, *[1] * (x.dim() - 1)).to(x.dtype)
        epsilon = (1 - a).sqrt() * (x - a.sqrt() * m) / (a * s**2 + 1 - a)
        return torch.cat([epsilon, torch.full_like(x, v)], 1) if variance == "learned_range" else epsilon

    return model


@pytest.mark.parametrize("variance", losses.VARIANCES)
def test_gaussian_data_in_closed_form(monkeypatch, variance):
    """The mean over x0 and noise by Gauss-Hermite quadrature, each pair of nodes an image of one number."""
    schedule, m, s = Schedule.cosine(1000), 0.2, 0.05
    z, weight = np.polynomial.hermite_e.hermegauss(40)
    z, weight = torch.tensor(z), torch.tensor(weight / weight.sum())
    x0, noise = (m + s * z.repeat_interleave(40))[:, None].float(), z.repeat(40)
    monkeypatch.setattr(ops, "counter_normal", lambda shape, seed, k, t, stream: noise[k][:, None].float())
    model = knows(schedule, m, s, variance)
    bits = bits_per_dim(model, schedule, x0, variance=variance, clip=None, batch_size=100_000)
    weights = (weight[:, None] * weight).flatten()
    expected = closed_form(schedule, s, variance)
    ab = schedule.alphas_cumprod[-1]
    prior = 0.5 * (ab * (m**2 + s**2) - ab - math.log1p(-ab)) / math.log(2)
    torch.testing.assert_close(weights @ bits.vb.double(), torch.tensor(expected), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(float(weights @ bits.prior.double()), prior, rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(
        float(weights @ bits.total.double()), prior + expected.sum(), rtol=0, atol=1e-3
    )
    entropy = math.log2(127.5 * s * math.sqrt(2 * math.pi * math.e))  # of the levels; no code is shorter
    assert entropy < prior + expected.sum() < entropy + 1.5


def test_gaussian_data_by_the_counter_s_own_noise():
    schedule, m, s, count = Schedule.linear(100, 1e-3, 0.2), 0.2, 0.1, 64 * 512
    x0 = m + s * ops.counter_normal((64, 512), 9, 0, 0, stream="x_T")
    bits = bits_per_dim(knows(schedule, m, s, "fixed_small"), schedule, x0, clip=None)
    expected = closed_form(schedule, s, "fixed_small")
    off = bits.vb.mean(0).double() - torch.tensor(expected)
    # A term is its mean times a squared normal number, whose variance is 2; the decoder's varies less.
    assert (off.abs() < 5 * math.sqrt(2 / count) * torch.tensor(expected)).all()
    spread = math.sqrt(2 * (expected**2).sum() / count)
    assert abs(off.sum()) < 4 * spread
    # The noise of one t is not that of another.
    assert torch.corrcoef(bits.vb[:, 1:].T)[0, 1:].abs().max() < 5 / math.sqrt(64)


# ---- the batch, the model ----


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    model = UNet(
        UNetConfig((8, 16), (False, True), (True, False), sample_size=8, norm_num_groups=4, dropout=0.5)
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_an_image_s_bits_do_not_depend_on_the_batch_nor_the_way_the_model_is_called(unet):
    x0 = torch.rand(5, 3, 8, 8) * 2 - 1
    unet.eval()
    wrapped = bits_per_dim(lambda x, t: unet(x, t), SCHEDULE, x0[2:4], seed=5, first_image=12)
    unet.train()
    whole = bits_per_dim(unet, SCHEDULE, x0, seed=5, first_image=10)
    part = bits_per_dim(unet, SCHEDULE, x0[2:4], seed=5, first_image=12, batch_size=3)
    other = bits_per_dim(unet, SCHEDULE, x0[2:4], seed=6, first_image=12)
    assert unet.training
    for field in FIELDS:
        expected = getattr(whole, field)[2:4]
        torch.testing.assert_close(getattr(part, field), expected, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(getattr(wrapped, field), expected, rtol=1e-4, atol=1e-6)
        assert field == "prior" or not torch.allclose(getattr(other, field), expected, rtol=1e-3)


def test_labels_halves_and_zero_terminal_snr(unet):
    x0, labels = torch.rand(4, 3, 4, 5), torch.tensor([0, 1, 0, 1])

    def model(x, t, labels):
        return torch.tanh(x) * labels.reshape(-1, 1, 1, 1)

    bits = bits_per_dim(model, SCHEDULE, x0, prediction="x0", class_labels=labels, batch_size=7)
    for label in (0, 1):
        alone = bits_per_dim(lambda x, t: model(x, t, torch.tensor(label)), SCHEDULE, x0, prediction="x0")  # noqa: B023
        torch.testing.assert_close(bits.vb[label::2], alone.vb[label::2], rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="takes no class_labels"):
        bits_per_dim(unet, SCHEDULE, torch.zeros(2, 3, 8, 8), class_labels=labels[:2])

    x0 = torch.rand(2, 3, 8, 8)
    half = bits_per_dim(UNet(unet.config).bfloat16(), SCHEDULE, x0)
    assert half.total.dtype == torch.float32 and half.total.isfinite().all()
    schedule = SCHEDULE.rescale_zero_terminal_snr()
    bits = bits_per_dim(Net(True), schedule, x0, prediction="v", variance="learned_range")
    assert all(getattr(bits, field).isfinite().all() for field in FIELDS) and not bits.prior.any()
    with pytest.raises(ValueError, match="zero terminal SNR needs"):
        bits_per_dim(Net(False), schedule, x0)


def test_no_batch_asks_the_host(monkeypatch):
    for module in (_checks, sys.modules["ddpm_fast.ops.q_sample"]):  # as on a GPU: no value is at hand
        if hasattr(module, "at_hand"):
            monkeypatch.setattr(module, "at_hand", lambda x: False)
    x0 = torch.rand(3, 3, 4, 5)
    reader = Reader(Net(True), SCHEDULE, x0, "v", "learned_range", 1.0, 0, 0, None, 7, False)
    times, found = torch.arange(T), torch.full((2, T * 3), torch.nan)
    with reader.running(), Refuse():
        for place, t, image in reader.pairs(times, False):
            found[:, place] = torch.stack(reader.terms(t, image))
    assert found.isfinite().all()


# ---- progressive decoding ----


def test_progressive_decoding(images):
    x0 = images.float()
    options = {"prediction": "v", "variance": "fixed_large", "seed": 2, "first_image": 4}
    found = progressive(Net(False), SCHEDULE, x0, [T - 1, 7, 0], batch_size=4, **options)
    bits = found.bits
    assert torch.equal(bits.vb, bits_per_dim(Net(False), SCHEDULE, x0, batch_size=4, **options).vb)
    assert found.timesteps.tolist() == [T - 1, 7, 0] and found.x0.shape == (3, 3, 3, 4, 5)
    # What is seen is what the error is of; the last of it after all bits but the decoder's.
    rms = 127.5 * (found.x0 - x0[:, None]).square().flatten(2).mean(2).sqrt()
    torch.testing.assert_close(bits.distortion[:, found.timesteps], rms, rtol=1e-5, atol=0)
    torch.testing.assert_close(bits.rate[:, 0] + bits.vb[:, 0], bits.total, rtol=1e-6, atol=0)
    torch.testing.assert_close(bits.rate[:, -1], bits.prior, rtol=0, atol=1e-5)
    for t in (0, 7, 18):
        sent = bits.prior + bits.vb[:, t + 1 :].sum(1)
        torch.testing.assert_close(bits.rate[:, t], sent, rtol=1e-5, atol=0)
    assert progressive(Net(False), SCHEDULE, x0).x0.shape == (3, 0, 3, 4, 5)
    perfect = progressive(lambda x, t: torch.zeros_like(x), SCHEDULE, 0 * x0, [0], prediction="x0")
    assert not perfect.bits.distortion.any() and not perfect.bits.vb[:, 1:].any() and not perfect.x0.any()
    with pytest.raises(ValueError, match=r"timesteps\[1\] must be in \[0, 19\], got 20"):
        progressive(Net(False), SCHEDULE, x0, [0, T])


# ---- interpolation ----


def denoiser(x, t):
    time = (t.float() / T).reshape(-1, *[1] * (x.dim() - 1))
    return torch.tanh(x * (0.5 + time)) + 0.1 * x.roll(1, 1)


@pytest.mark.parametrize("method,num_steps", [("ddpm", None), ("ddpm", 4), ("ddim", 1), ("dpm_solver", 5)])
def test_the_ends_are_runs_from_each_image_and_the_middle_from_their_mix(method, num_steps):
    a, b = torch.rand(2, 2, 3, 4, 4) * 2 - 1
    t, options = 12, {"variance": "fixed_large", "prediction": "v", "clip": 0.9}
    mix = partial(interpolate, denoiser, SCHEDULE, method=method, num_steps=num_steps, seed=3, **options)
    found = mix(a, b, t, [0, 0.25, 1], first_image=5)
    assert found.shape == (2, 3, 3, 4, 4) and found.dtype == torch.float32
    timesteps = list(range(t, -1, -1)) if num_steps is None else steps.trailing(t + 1, num_steps)
    assert timesteps[0] == t
    sampler = Sampler(denoiser, SCHEDULE, method=method, spacing=timesteps, **options)
    noise = ops.counter_normal(a.shape, 3, 5, 0, stream="x_T")
    for k, image in enumerate((a, 0.75 * a + 0.25 * b, b)):  # the same noise: mixed before or after
        run = sampler(x_T=ops.q_sample(image, noise, t, SCHEDULE), seed=3, first_image=5)
        torch.testing.assert_close(found[:, k], run, rtol=1e-5, atol=1e-5)
    alone = mix(a[1:], b[1:], t, [0.25], first_image=6)
    torch.testing.assert_close(alone[0, 0], found[1, 1], rtol=1e-5, atol=1e-5)


def test_each_end_s_own_noise_is_half_as_strong_half_way():
    zero = torch.zeros(64, 256)
    seen = []

    def model(x, t):
        seen.append(x.clone())
        return x

    for same in (True, False):
        interpolate(model, SCHEDULE, zero, zero, T - 1, [0.0, 0.5, 1.0], same_noise=same, num_steps=1)
    of_noise = 1 - SCHEDULE.alphas_cumprod[-1]
    same, own = (x.unflatten(0, (64, 3)) for x in seen)
    assert torch.equal(same[:, 0], own[:, 0]) and torch.equal(same[:, 0], same[:, 2])
    for k, share in enumerate((1, 0.5, 1)):  # 5 standard errors of a variance
        assert abs(own[:, k].var() / of_noise - share) < 5 * share * math.sqrt(2 / zero.numel())
    assert abs(torch.corrcoef(own[:, (0, 2)].transpose(0, 1).flatten(1))[0, 1]) < 5 / math.sqrt(zero.numel())


def test_a_pair_s_label_is_that_of_all_its_mixes():
    labels, seen = torch.tensor([3, 5]), []

    def model(x, t, labels):
        seen.append(labels)
        return x

    a = torch.rand(2, 4)
    interpolate(model, SCHEDULE, a, -a, 1, [0, 0.5, 1], class_labels=labels)
    assert [list(map(int, given)) for given in seen] == [[3, 3, 3, 5, 5, 5]] * 2


# ---- bad input ----


def never(*_):
    raise AssertionError("called")


WITH_CLASSES = UNet(UNetConfig((8,), (False,), (False,), norm_num_groups=4, num_class_embeds=3)).eval()


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ({"schedule": [0.1]}, TypeError, "schedule must be a Schedule"),
        ({"model": 3}, TypeError, "model must be callable"),
        ({"prediction": "eps"}, ValueError, "prediction must be one of"),
        ({"variance": "learned"}, ValueError, "variance must be one of"),
        ({"clip": 0}, ValueError, "clip must be None or a positive number"),
        ({"x0": torch.zeros(2, 3, dtype=torch.uint8)}, TypeError, "x0 must be float32 or float64"),
        ({"x0": torch.zeros(3)}, TypeError, "at least two dimensions"),
        ({"x0": torch.zeros(0, 3)}, ValueError, "x0 must not be empty"),
        ({"x0": torch.full((2, 3), 255.0)}, ValueError, r"x0 must be in \[-1, 1\].*got \[255, 255\]"),
        ({"x0": torch.full((2, 3), math.nan)}, ValueError, r"x0 must be in \[-1, 1\]"),
        (
            {"x0": torch.zeros(2, 3, device="meta"), "model": torch.nn.Linear(3, 3)},
            ValueError,
            "x0 must be on cpu",
        ),
        ({"model": WITH_CLASSES}, ValueError, r"the model needs class_labels, in \[0, 2\]"),
        (
            {"model": WITH_CLASSES, "class_labels": torch.tensor([0, 3])},
            ValueError,
            r"class_labels must be in \[0, 2\], got 3",
        ),
        (
            {"class_labels": torch.zeros(3)},
            ValueError,
            r"class_labels must have shape \(2,\), one an image, got",
        ),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"seed": 2**64}, ValueError, "seed must fit in 64 bits"),
        ({"first_image": -1}, ValueError, "first_image must be in"),
        ({"progress": 3}, TypeError, "progress must be True, False or a function"),
    ],
)
def test_bad_input_is_named_before_the_model_runs(given, error, match):
    given = {"model": never, "schedule": SCHEDULE, "x0": torch.zeros(2, 3)} | given
    for function in (bits_per_dim, progressive):
        with pytest.raises(error, match=match):
            function(given["model"], given["schedule"], given["x0"], **dict(list(given.items())[3:]))


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ({"schedule": 3}, TypeError, "schedule must be a Schedule"),
        ({"a": [1]}, TypeError, "a must be a floating Tensor of at least two dimensions, got list"),
        ({"b": torch.zeros(2, 4)}, ValueError, r"a and b must be alike and not empty, got \(2, 3\)"),
        (
            {"model": torch.nn.Linear(3, 3, device="meta")},
            ValueError,
            "a must be on meta, where the model is",
        ),
        ({"t": T}, ValueError, r"t must be in \[0, 19\], got 20"),
        ({"lambdas": []}, ValueError, "lambdas must hold at least one"),
        ({"lambdas": [0, math.inf]}, ValueError, r"lambdas\[1\] must be finite"),
        ({"num_steps": 5}, ValueError, r"num_steps must be in \[1, 4\], got 5"),
        ({"method": "euler"}, ValueError, "method='euler' is not known"),
        (
            {"class_labels": torch.zeros(1)},
            ValueError,
            r"class_labels must have shape \(2,\), one an image, got",
        ),
        ({"first_image": -1}, ValueError, "image_index must be at least 0"),
    ],
)
def test_bad_interpolations_are_named(given, error, match):
    given = {
        "schedule": SCHEDULE,
        "a": torch.zeros(2, 3),
        "b": torch.zeros(2, 3),
        "t": 3,
        "lambdas": [0],
    } | given
    with pytest.raises(error, match=match):
        interpolate(**{"model": never} | given)


def test_an_out_that_does_not_fit_is_named():
    x0 = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"model must return a Tensor of shape \(40, 3\), got \(40, 6\)"):
        bits_per_dim(lambda x, t: torch.cat([x, x], 1), SCHEDULE, x0)
    with pytest.raises(ValueError, match=r"shape \(40, 6\), got tuple"):
        bits_per_dim(lambda x, t: (x, x), SCHEDULE, x0, variance="learned_range")


# ---- the commands ----


@pytest.fixture
def data(tmp_path):
    """Images for `tiny`, in a file of their own."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "data.npz", pixels)
    return tmp_path / "data.npz"


def test_the_bundled_digits(monkeypatch, tmp_path, capsys):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install ddpm_fast[examples]")
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, "bpd", "--n", 2, "--json", "bpd.json") == 0
    assert call(monkeypatch, "progressive", "--n", 1, "--json", "p.json") == 0
    assert call(monkeypatch, "interpolate", "--n", 2, "--steps", 3, "--mixes", 4) == 0
    said = capsys.readouterr()
    bits, sent = (json.loads((tmp_path / file).read_text()) for file in ("bpd.json", "p.json"))
    assert (
        bits["n"] == 2 and bits["prediction"] == "v" and [len(bits[k]) for k in ("total", "vb")] == [2, 1000]
    )
    # On the first digits of those that were held out, within a margin, what all 360 take: 4.3.
    assert all(3.5 < total < 5 for total in bits["total"])
    assert said.out.startswith(f"{np.mean(bits['total']):.4f} bits/dim of 2 images: prior 0.0000, steps ")
    assert sent["total"] == pytest.approx(bits["total"][0], rel=1e-4)
    assert sent["rate"][0] + bits["vb"][0] == pytest.approx(sent["total"], abs=0.2)
    assert sent["distortion"][0] < 1 < 40 < sent["distortion"][-1]
    assert (
        "t  999: 0.0000 bits/dim" in said.out
        and "interpolate.png: 2 pairs with 4 mixes at t = 500" in said.out
    )
    assert "63/63" not in said.err and "16/16" in said.err and "8/8" in said.err and "3/3" in said.err
    assert Image.open("progressive.png").size == (10 * 34 + 2, 34 + 2)
    sheet = Image.open("interpolate.png")
    assert sheet.size == (6 * 34 + 2, 2 * 34 + 2)
    files = {"bpd.json", "p.json", "progressive.png", "interpolate.png"}
    if plot.why_not() is None:
        files |= {"bpd.png", "rate-distortion.png"}
    assert {file.name for file in tmp_path.iterdir()} == files


def test_a_checkpoint_s_own_settings_and_images(monkeypatch, tmp_path, capsys, tiny, data):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plot, "why_not", lambda: "matplotlib is not installed")
    common = ("--checkpoint", tiny, "--data", data)
    assert call(monkeypatch, "bpd", *common, "--n", 3, "--seed", 4, "--batch-size", 7, "--json", "-") == 0
    said = capsys.readouterr()
    model, schedule, _ = checkpoint.load(tiny)
    pixels = torch.from_numpy(np.load(data)["arr_0"]).permute(0, 3, 1, 2)
    x0 = pixels.float() / 127.5 - 1
    options = {"prediction": "v", "variance": "fixed_large"}
    expected = bits_per_dim(model, schedule, x0[:3], seed=4, **options)
    found = json.loads(said.out)
    assert found["total"] == pytest.approx(expected.total.tolist(), rel=1e-4)
    assert found["vb"] == pytest.approx(expected.vb.mean(0).tolist(), rel=1e-4)
    assert "bpd.png is not drawn: matplotlib is not installed" in said.err
    assert {file.name for file in tmp_path.iterdir()} == {"data.npz"}

    options_of = ("--n", 3, "--t", 6, "--mixes", 3, "--seed", 4, "--method", "ddim", "--steps", 2)
    for batch, out in ((8, "a.png"), (2, "b.png")):
        assert (
            call(monkeypatch, "interpolate", *common, *options_of, "--batch-size", batch, "--out", out) == 0
        )
    lambdas, run = [0, 0.5, 1], {"method": "ddim", "num_steps": 2, "seed": 4}
    mixed = interpolate(model, schedule, x0[:3], x0[3:], 6, lambdas, **run, **options)
    whole, parts = (np.asarray(Image.open(tmp_path / file)).astype(int) for file in ("a.png", "b.png"))
    assert np.abs(whole - parts).max() <= 1
    tiles = whole[2:, 2:].reshape(3, 34, 5, 34, 3)[:, :32:4, :, :32:4].transpose(0, 2, 4, 1, 3)
    assert np.abs(tiles[:, 1:4] / 127.5 - 1 - mixed.clamp(-1, 1).numpy()).max() < 1.1 / 127.5
    assert np.array_equal(tiles[:, 0], pixels[:3]) and np.array_equal(tiles[:, 4], pixels[3:])


def test_a_model_with_classes_is_told_the_images_own(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = UNetConfig((8,), (False,), (False,), sample_size=4, norm_num_groups=4, num_class_embeds=3)
    model, schedule, labels = UNet(config).eval(), Schedule.linear(4), torch.tensor([2, 0, 1, 1])
    checkpoint.save("model", model, schedule)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 4, 4, 3), dtype=np.uint8)
    np.savez("data.npz", arr_0=pixels, arr_1=labels.numpy())
    np.savez("plain.npz", pixels)
    x0 = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1

    common = ("--checkpoint", "model", "--data", "data.npz")
    assert call(monkeypatch, "bpd", *common, "--n", 4, "--json", "-", "--out", "a.png") == 0
    found = json.loads(capsys.readouterr().out)
    expected = bits_per_dim(model, schedule, x0, class_labels=labels)
    assert found["total"] == pytest.approx(expected.total.tolist(), rel=1e-4)
    assert found["class_labels"] == labels.tolist()

    given = []
    monkeypatch.setattr(
        likelihood, "interpolate", lambda *_, **options: given.append(options) or x0[:1, None]
    )
    assert call(monkeypatch, "interpolate", *common, "--n", 2, "--batch-size", 1) == 0
    assert [options["class_labels"].tolist() for options in given] == [[2], [0]]
    code = call(monkeypatch, "bpd", "--checkpoint", "model", "--data", "plain.npz", "--n", 1)
    assert code.startswith("error: data: plain.npz must hold labels, or arr_1")


@pytest.mark.parametrize(
    "args,words",
    [
        (("bpd", "--n", 0), "--n must be at least 1, got 0"),
        (("bpd", "--n", 7), "--n 7 takes 7 images, the data has 6"),
        (("interpolate", "--n", 4), "--n 4 takes 8 images, the data has 6"),
        (("progressive", "--batch-size", 0), "--batch-size must be at least 1, got 0"),
        (("bpd", "--device", "foo"), "--device 'foo' cannot be used here"),
        (("bpd", "--n", 1, "--seed", 2**64), "seed must fit in 64 bits"),
        (("bpd", "--json", "/proc/nowhere/a.json"), "/proc/nowhere cannot be written"),
        (("bpd", "--out", "a.jpg"), "--out must end in .png, .svg, .pdf, got a.jpg"),
        (("progressive", "--plot", "a.jpg"), "--plot must end in .png, .svg, .pdf, got a.jpg"),
        (("progressive", "--out", "a.jpg"), "--out a.jpg must end in .png"),
        (("interpolate", "--out", "/proc/nowhere/a.png"), "/proc/nowhere cannot be written"),
        (("interpolate", "--mixes", 1), "--mixes must be at least 2, got 1"),
        (("interpolate", "--n", 1, "--t", 10), "t must be in [0, 9], got 10"),
        (("interpolate", "--n", 1, "--steps", 7), "num_steps must be in [1, 6], got 7"),
        (("interpolate", "--n", 1, "--method", "euler"), "method='euler' is not known"),
        (("bpd", "--data", "nowhere"), "'nowhere' is neither a folder nor an .npz"),
    ],
)
def test_mistakes_are_one_line(monkeypatch, tmp_path, tiny, data, args, words):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.nn.Conv2d, "forward", lambda *_: pytest.fail("work was done"))
    code = call(monkeypatch, args[0], "--checkpoint", tiny, "--data", data, *args[1:])
    assert isinstance(code, str) and code.startswith("error: ") and words in code
    assert [file.name for file in tmp_path.iterdir()] == ["data.npz"]


def test_the_digits_are_for_a_model_of_digits(monkeypatch, tmp_path, tiny):  # noqa: F811
    pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install ddpm_fast[examples]")
    monkeypatch.chdir(tmp_path)
    code = call(monkeypatch, "bpd", "--checkpoint", tiny)
    assert code == "error: --data: the model's images are (3, 8, 8), the held-out digits are (1, 8, 8)"
