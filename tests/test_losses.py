"""Losses against the equations written out in float64, and how t is drawn."""

from __future__ import annotations

import itertools
import math
import sys

import numpy as np
import pytest
import torch
from op_cases import check_error_rule
from test_graph_safety import Refuse
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_fast import Schedule, losses, ops, steps
from ddpm_fast.losses import Loss, SecondMomentSampler, antithetic, uniform
from ddpm_fast.ops import _checks

T = 20
SCHEDULE = Schedule.linear(T, 1e-3, 0.3)
SHAPE = (3, 4, 5)
CASES = [
    {"prediction": prediction, "kind": kind, "variance": variance, "min_snr_gamma": gamma}
    for prediction, kind, variance, gamma in itertools.product(
        losses.PREDICTIONS, losses.KINDS, losses.VARIANCES, (None, 2.0)
    )
    if not (kind == "rescaled_mse" and variance != "learned_range")
    and not (gamma and kind.endswith("kl"))
    and not (kind == "mse" and variance == "fixed_large")  # there the variance has no part
]


def name(case) -> str:
    return "-".join(str(value) for value in case.values() if value is not None)


class Net(nn.Module):
    """A network with a gradient everywhere; its v reaches past [-1, 1]."""

    def __init__(self, learned: bool) -> None:
        super().__init__()
        self.mix = nn.Parameter(
            torch.randn(6 if learned else 3, 3, generator=torch.Generator().manual_seed(0))
        )

    def forward(self, x, t):
        time = (t.to(x.dtype) / T).reshape(-1, 1, 1, 1)
        return torch.einsum("oc,bchw->bohw", self.mix.to(x.dtype), torch.tanh(x + time))


def written(schedule, x0, noise, t, model, *, prediction, kind, variance, min_snr_gamma):
    """Every number by its equation, in x0's dtype: (B,)."""
    per = (-1, 1, 1, 1)
    dtype = x0.dtype
    betas = torch.tensor(schedule.betas, dtype=dtype)
    ab = torch.tensor(schedule.alphas_cumprod, dtype=dtype)
    ab_prev = torch.cat([torch.ones(1, dtype=dtype), ab[:-1]])
    posterior = betas * (1 - ab_prev) / (1 - ab)  # Ho et al., eq. 7
    small = torch.log(torch.cat([posterior[1:2], posterior[1:]]))
    large = torch.log(torch.cat([posterior[1:2], betas[1:]]))
    a, a_prev, beta = (table[t].reshape(per) for table in (ab, ab_prev, betas))
    x_t = a.sqrt() * x0 + (1 - a).sqrt() * noise
    of_x0, of_x = beta * a_prev.sqrt() / (1 - a), (1 - a_prev) * (1 - beta).sqrt() / (1 - a)
    true_mean = of_x0 * x0 + of_x * x_t
    out = model(x_t, t)
    v = None
    if variance == "learned_range":
        out, v = out.chunk(2, 1)

    v_target = a.sqrt() * noise - (1 - a).sqrt() * x0
    target = {"epsilon": noise, "x0": x0, "v": v_target, "mean": true_mean}[prediction]
    snr = ab / (1 - ab)
    mse = ((out - target) ** 2).mean((1, 2, 3))
    if min_snr_gamma is not None:  # Hang et al., section 3.4; of the mean: its weight of x0, squared
        clipped = snr.clamp(max=min_snr_gamma)
        of_x0_squared = betas**2 * ab_prev / (1 - ab) ** 2
        weight = {
            "epsilon": clipped / snr,
            "x0": clipped,
            "v": clipped / (snr + 1),
            "mean": clipped / of_x0_squared,
        }[prediction]
        mse = mse * weight[t]

    def bound(out):
        pred_x0 = {
            "epsilon": lambda: (x_t - (1 - a).sqrt() * out) / a.sqrt(),
            "x0": lambda: out,
            "v": lambda: a.sqrt() * x_t - (1 - a).sqrt() * out,
        }
        mean = out if prediction == "mean" else of_x0 * pred_x0[prediction]() + of_x * x_t
        log_true = small[t].reshape(per)
        log_var = (large if variance == "fixed_large" else small)[t].reshape(per)
        if v is not None:  # Nichol & Dhariwal, eq. 15
            fraction = (v + 1) / 2
            log_var = fraction * torch.log(beta) + (1 - fraction) * log_true
        kl = 0.5 * (
            -1
            + log_var
            - log_true
            + torch.exp(log_true - log_var)
            + (true_mean - mean) ** 2 * torch.exp(-log_var)
        )

        def cdf(z):
            return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

        std = torch.exp(0.5 * log_var)
        upper, lower = cdf((x0 - mean + 1 / 255) / std), cdf((x0 - mean - 1 / 255) / std)
        upper = torch.where(x0 > 0.999, 1.0, upper)  # Ho et al., eq. 13
        lower = torch.where(x0 < -0.999, 0.0, lower)
        decoder = -(upper - lower).clamp(min=1e-12).log()
        return torch.where((t == 0).reshape(per), decoder, kl).mean((1, 2, 3)) / math.log(2)

    if kind == "kl":
        return bound(out)
    if kind == "rescaled_kl":
        return bound(out) * schedule.T
    if v is None:
        return mse
    return mse + bound(out.detach()) * (schedule.T / 1000 if kind == "rescaled_mse" else 1)


@pytest.fixture
def batch(generator):
    x0 = (torch.randn(2 * T, *SHAPE, dtype=torch.float64, generator=generator) / 2).clamp(-1, 1)
    noise = torch.randn(x0.shape, dtype=torch.float64, generator=generator)
    return x0, noise, torch.arange(2 * T) % T


@pytest.mark.parametrize("case", CASES, ids=name)
def test_values_and_gradients_are_the_equations(case, batch):
    x0, noise, t = batch
    found = {}
    for way, dtype in (("ours64", torch.float64), ("ours", torch.float32), ("eager", torch.float32)):
        model = Net(case["variance"] == "learned_range")
        given = (x0.to(dtype), noise.to(dtype))
        if way == "eager":
            values = written(SCHEDULE, *given, t, model, **case)
        else:
            values = Loss(SCHEDULE, dtype=dtype, **case)(model, given[0], t, noise=given[1])
        assert values.shape == (2 * T,) and values.dtype == dtype
        found[way] = (values.detach(), torch.autograd.grad(values.mean(), model.mix)[0])
    model = Net(case["variance"] == "learned_range").double()
    exact = written(SCHEDULE, x0, noise, t, model, **case)
    exact = (exact.detach(), torch.autograd.grad(exact.mean(), model.mix)[0])
    for k in range(2):
        # The means of a posterior are differences: float64 loses a few digits too.
        torch.testing.assert_close(found["ours64"][k].double(), exact[k], rtol=1e-6 if k else 1e-9, atol=1e-9)
        check_error_rule(found["ours"][k], found["eager"][k], exact[k])


@pytest.mark.parametrize("kind, gamma", [("mse", 2.0), ("kl", None), ("rescaled_kl", None)])
def test_what_is_predicted_does_not_matter(kind, gamma, batch):
    """Networks that know the same x0 have the same loss, if it weighs x0's error and not their own."""
    x0, noise, t = batch
    ab = torch.tensor(SCHEDULE.alphas_cumprod)[t].reshape(-1, 1, 1, 1)
    guess = (x0 + 0.1 * noise.roll(1, 0)).clamp(-1, 1)

    def predicting(prediction):
        def model(x, t):
            epsilon = (x - ab.sqrt() * guess) / (1 - ab).sqrt()
            of_x0, of_x = (
                torch.tensor(table)[t].reshape(-1, 1, 1, 1)
                for table in (SCHEDULE.posterior_mean_coef1, SCHEDULE.posterior_mean_coef2)
            )
            return {
                "epsilon": epsilon,
                "x0": guess,
                "v": ab.sqrt() * epsilon - (1 - ab).sqrt() * guess,
                "mean": of_x0 * guess + of_x * x,
            }[prediction]

        loss = Loss(SCHEDULE, prediction, kind=kind, min_snr_gamma=gamma, dtype=torch.float64)
        return loss(model, x0, t, noise=noise)

    expected = predicting("x0")
    for prediction in losses.PREDICTIONS:
        torch.testing.assert_close(predicting(prediction), expected, rtol=1e-9, atol=1e-12)


def test_a_perfect_model_has_no_loss(batch):
    x0, noise, t = batch
    assert Loss(SCHEDULE, "x0", dtype=torch.float64)(lambda x, t: x0, x0, t, noise=noise).max() == 0
    kl = Loss(SCHEDULE, "x0", kind="kl", dtype=torch.float64)(lambda x, t: x0, x0, t, noise=noise)
    assert kl[t > 0].max() == 0 and (kl[t == 0] > 0).all()


def test_names_are_those_of_the_steps():
    assert (losses.PREDICTIONS, losses.VARIANCES) == (steps.PREDICTIONS, steps.VARIANCES)


def test_zero_terminal_snr():
    schedule = SCHEDULE.rescale_zero_terminal_snr()
    x0, t = torch.rand(T, *SHAPE), torch.arange(T)
    for prediction in ("epsilon", "x0", "v", "mean"):
        assert Loss(schedule, prediction, min_snr_gamma=5.0)(Net(False), x0, t).isfinite().all()
    for prediction in ("x0", "v", "mean"):
        assert Loss(schedule, prediction, kind="kl")(Net(False), x0, t).isfinite().all()
    with pytest.raises(ValueError, match="zero terminal SNR"):
        Loss(schedule, kind="kl")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_model_has_a_float32_loss(dtype):
    x0, t = torch.rand(4, *SHAPE, dtype=dtype), torch.tensor([0, 3, 9, 19])
    for variance in ("fixed_small", "learned_range"):
        values = Loss(SCHEDULE, variance=variance)(Net(variance == "learned_range"), x0, t)
        assert values.dtype == torch.float32 and values.isfinite().all()


# ---- noise ----


def test_noise_by_the_counter_is_that_of_the_op_and_does_not_depend_on_the_batch():
    x0, t = torch.rand(6, *SHAPE), torch.arange(6)
    noise = ops.counter_normal(x0.shape, 5, 100, 0, stream="training")
    for offset in (0.0, 0.3):
        loss = Loss(SCHEDULE, offset_noise=offset)
        whole = loss(Net(False), x0, t, seed=5, image_index=100)
        part = loss(Net(False), x0[2:4], t[2:4], seed=torch.tensor(5), image_index=torch.tensor([102, 103]))
        torch.testing.assert_close(part, whole[2:4], rtol=1e-6, atol=0)
        if offset == 0:
            assert torch.equal(whole, loss(Net(False), x0, t, noise=noise))


@pytest.mark.parametrize("counted", [True, False])
def test_offset_noise_shifts_whole_channels(counted):
    seen = {}

    def model(x, t):
        seen["x"] = x
        return torch.zeros_like(x)

    torch.manual_seed(0)
    x0, t = torch.zeros(2000, 3, 8, 8), torch.full((2000,), T - 1)
    loss = Loss(SCHEDULE, offset_noise=0.5)
    given = {"seed": 1, "image_index": 0} if counted else {}
    values = loss(model, x0, t, **given)
    noise = seen["x"] / SCHEDULE.sqrt_one_minus_alphas_cumprod[-1]
    torch.testing.assert_close(values, noise.square().flatten(1).mean(1))  # the target is the shifted noise
    shift = noise.mean((2, 3))  # variance 0.25, and 1/64 of the mean of 64 normals; 6000 of them
    assert abs(shift.var() - (0.25 + 1 / 64)) < 5 * 0.27 * math.sqrt(2 / 6000)
    assert abs(noise.sub(shift[..., None, None]).var() - 63 / 64) < 5 * math.sqrt(2 / 384000)
    assert abs(torch.corrcoef(shift.T)[0, 1]) < 5 / math.sqrt(2000)  # each channel has its own
    rest = (noise - shift[..., None, None])[:, 0, 0, :3]  # what the counter would draw first once more
    assert torch.corrcoef(torch.cat([shift, rest], 1).T)[:3, 3:].abs().max() < 5 / math.sqrt(2000)


def test_labels_reach_the_model():
    def model(x, t, labels):
        return x * labels.reshape(-1, 1)

    x0, t, labels = torch.rand(4, 2), torch.arange(4), torch.tensor([0, 1, 0, 1])
    values = Loss(SCHEDULE)(model, x0, t, noise=torch.ones(4, 2), class_labels=labels)
    assert torch.equal(values[::2], torch.ones(2)) and (values[1::2] < 1).all()


# ---- how t is drawn ----


def test_uniform_and_antithetic(generator):
    for batch in (1, 2, 7, 128):
        t = antithetic(batch, T, generator=generator)
        half = (batch + 1) // 2
        assert t.shape == (batch,) and t.dtype == torch.int64 and t.min() >= 0 and t.max() < T
        assert torch.equal(t[half:], T - 1 - t[: batch - half])
    for draw in (uniform, antithetic):
        counts = draw(20_000, T, generator=generator).bincount(minlength=T)
        assert ((counts - 1000).abs() < 5 * math.sqrt(2 * 1000)).all()  # a pair counts twice


def test_the_sampler_keeps_the_last_losses(generator):
    """As if they came one after another; a t may come more often than its history is long."""
    history = 3
    sampler = SecondMomentSampler(5, history=history)
    kept: list[list[float]] = [[] for _ in range(5)]
    for _ in range(30):
        t = torch.randint(5, (8,), generator=generator) * torch.randint(2, (8,), generator=generator)
        values = torch.rand(8, generator=generator)
        sampler.update(t, values)
        for k, value in zip(t.tolist(), values.tolist(), strict=True):
            kept[k] = [*kept[k], value][-history:]
        filled = (
            [np.sqrt(np.mean(np.square(k))) for k in kept] if all(len(k) == history for k in kept) else None
        )
        expected = np.full(5, 0.2)
        if filled is not None:
            expected = np.array(filled) / sum(filled) * 0.999 + 0.001 / 5
        np.testing.assert_allclose(sampler.probabilities().numpy(), expected, rtol=1e-6)
    assert filled is not None


def test_no_place_in_a_history_is_written_twice():
    """Which of two would stay is left to chance on a GPU."""
    sampler, written = SecondMomentSampler(3, history=2), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket.__name__ == "index_copy_":
                written.extend(args[2].tolist())
            return func(*args, **(kwargs or {}))

    with Watch():
        sampler.update(torch.tensor([1, 1, 0, 1, 1, 1]), torch.arange(6.0))
    assert sorted(written) == [0, 2, 3, 6, 6, 6]
    assert sampler.squares[:-1].tolist() == [4, 0, 25, 16, 0, 0]


def test_the_sampler_draws_what_it_says(generator):
    sampler = SecondMomentSampler(4, history=1)
    t, weight = sampler(1000, generator=generator)
    assert torch.equal(weight, torch.ones(1000))
    values = torch.tensor([1.0, 2.0, 3.0, 10.0])
    sampler.update(torch.arange(4), values)
    t, weight = sampler(40_000, generator=generator)
    p = sampler.probabilities()
    assert ((t.bincount(minlength=4) / 40_000 - p).abs() < 5 * (p * (1 - p) / 40_000).sqrt()).all()
    torch.testing.assert_close(weight.double(), 1 / (4 * p[t]), rtol=1e-6, atol=0)
    # Unbiased, and of a loss in proportion to p almost without variance: 0.001 of the draws are uniform.
    assert abs((weight * values[t]).mean() - 4.0) < 5 * (weight * values[t]).std() / 200
    assert (weight * values[t]).std() < 0.1


def test_the_sampler_lives_in_a_checkpoint():
    sampler, other = SecondMomentSampler(4, history=1), SecondMomentSampler(4, history=1)
    sampler.update(torch.arange(4), torch.arange(1.0, 5.0))
    other.load_state_dict(sampler.state_dict())
    assert torch.equal(other.probabilities(), sampler.probabilities()) and other.probabilities()[0] < 0.2


# ---- nothing waits for the host ----


def test_a_whole_update_asks_the_host_nothing(monkeypatch):
    for module in (_checks, sys.modules["ddpm_fast.ops.q_sample"]):  # as on a GPU: no value is at hand
        if hasattr(module, "at_hand"):
            monkeypatch.setattr(module, "at_hand", lambda x: False)
    sampler, x0 = SecondMomentSampler(T), torch.rand(8, *SHAPE)
    seed, images = torch.tensor(0), torch.arange(8)
    for case in CASES:
        model = Net(case["variance"] == "learned_range")
        loss = Loss(SCHEDULE, offset_noise=0.1, **case)
        optimizer = torch.optim.Adam(model.parameters(), fused=True)
        with Refuse():
            antithetic(8, T)
            t, weight = sampler(8)
            values = loss(model, x0, t, seed=seed, image_index=images)
            (weight * values).mean().backward()
            sampler.update(t, values.detach())
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()


@pytest.mark.parametrize("case", CASES[::3], ids=name)
def test_a_whole_update_is_one_graph(case, batch):
    x0, _, t = batch
    x0, images = x0.float(), torch.arange(len(x0))
    loss, model = Loss(SCHEDULE, **case), Net(case["variance"] == "learned_range")
    sampler = SecondMomentSampler(T)

    def update(x0, t, seed, images):
        drawn = torch.cat([antithetic(8, T), uniform(8, T), sampler(8)[0]])
        values = loss(model, x0, t, seed=seed, image_index=images)
        sampler.update(t, values.detach())
        return values, drawn

    torch._dynamo.reset()
    given = (x0, t, torch.tensor(3), images)
    values, drawn = torch.compile(update, fullgraph=True, backend="aot_eager")(*given)
    assert drawn.shape == (24,) and drawn.min() >= 0 and drawn.max() < T
    expected = loss(model, x0, t, seed=3, image_index=0)
    torch.testing.assert_close(values, expected, rtol=1e-6, atol=1e-6)
    got = torch.autograd.grad(values.mean(), model.mix)[0]
    torch.testing.assert_close(got, torch.autograd.grad(expected.mean(), model.mix)[0], rtol=1e-5, atol=1e-6)


# ---- bad input ----


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ({"prediction": "eps"}, ValueError, "prediction must be one of"),
        ({"kind": "l1"}, ValueError, "kind must be one of"),
        ({"variance": "learned"}, ValueError, "variance must be one of"),
        ({"kind": "rescaled_mse"}, ValueError, "needs variance 'learned_range'"),
        ({"kind": "kl", "min_snr_gamma": 5.0}, ValueError, "min_snr_gamma weighs the squared error"),
        ({"min_snr_gamma": 0.0}, ValueError, "min_snr_gamma must be finite and above 0"),
        ({"min_snr_gamma": "5"}, TypeError, "min_snr_gamma must be a number"),
        ({"offset_noise": -0.1}, ValueError, "offset_noise must be finite and at least 0"),
        ({"dtype": torch.float16}, ValueError, "dtype must be float32 or float64"),
        ({"schedule": [0.1]}, TypeError, "schedule must be a Schedule"),
    ],
)
def test_a_bad_loss_is_named(given, error, match):
    with pytest.raises(error, match=match):
        Loss(**{"schedule": SCHEDULE} | given)


def never(x, t):
    raise AssertionError("called")


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ({"x0": torch.zeros(4, 2, dtype=torch.uint8)}, TypeError, "x0 must be a floating Tensor"),
        ({"x0": torch.zeros(4)}, TypeError, "at least two dimensions"),
        ({"x0": torch.zeros(4, 2, device="meta")}, ValueError, "x0 must be on cpu, where the loss is"),
        ({"t": torch.zeros(3, dtype=torch.int64)}, TypeError, r"t must be an int64 Tensor of shape \(4,\)"),
        ({"t": torch.zeros(4)}, TypeError, "t must be an int64 Tensor"),
        ({"t": 3}, TypeError, "t must be an int64 Tensor"),
        ({"t": torch.tensor([0, 1, 2, T])}, IndexError, "t"),
        ({"noise": torch.zeros(4, 3)}, ValueError, "noise must be like x0"),
        ({"noise": torch.zeros(4, 2), "seed": 0, "image_index": 0}, ValueError, "give noise, or both"),
        ({"seed": 0}, ValueError, "both seed and image_index"),
    ],
)
def test_a_bad_argument_is_named_before_the_model_runs(given, error, match):
    given = {"x0": torch.zeros(4, 2), "t": torch.zeros(4, dtype=torch.int64)} | given
    with pytest.raises(error, match=match):
        Loss(SCHEDULE)(never, **given)


def test_an_out_that_does_not_fit_is_named():
    x0, t = torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"model must return a Tensor of shape \(4, 2\), got \(4, 4\)"):
        Loss(SCHEDULE)(lambda x, t: torch.cat([x, x], 1), x0, t)
    with pytest.raises(ValueError, match=r"shape \(4, 4\), got tuple"):
        Loss(SCHEDULE, variance="learned_range")(lambda x, t: (x, x), x0, t)


def test_a_bad_draw_is_named():
    for draw in (uniform, antithetic):
        with pytest.raises(ValueError, match="batch must be at least 1"):
            draw(0, T)
    with pytest.raises(ValueError, match="T must be at least 1"):
        SecondMomentSampler(0)
    with pytest.raises(ValueError, match="uniform_probability must be in"):
        SecondMomentSampler(T, uniform_probability=0.0)
    with pytest.raises(ValueError, match="t and losses must be"):
        SecondMomentSampler(T).update(torch.zeros(3, dtype=torch.int64), torch.zeros(2))
