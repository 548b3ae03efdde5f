"""Guidance: both halves in one call are two calls in a loop; a classifier's steps are the paper's."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from ddpm_fast import Sampler, Schedule, UNet, UNetConfig, ops, steps
from ddpm_fast.cuda_graph import CAPTURED, Graphs

SCHEDULE = Schedule.linear()
NULL = 3


def unet(out_channels: int = 3) -> UNet:
    torch.manual_seed(0)
    config = UNetConfig(
        (8, 16),
        (False, True),
        (False, False),
        out_channels=out_channels,
        sample_size=8,
        norm_num_groups=4,
        layers_per_block=1,
        num_class_embeds=NULL + 1,
    )
    model = UNet(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.08)
    nn.init.normal_(model.class_embedding.weight)  # so that labels matter
    return model.eval()


class Described(nn.Module):
    """A model whose third argument is (B, 2, 3): what a text encoder returns, say."""

    sample_shape = (3, 4, 4)

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((3, 1, 1), 0.5))
        self.calls: list[int] = []

    def forward(self, x, t, described):
        self.calls.append(len(x))
        time = (t / 1000).reshape(-1, 1, 1, 1)
        return torch.tanh(x * (self.gain + time) + described.mean(1)[:, :, None, None])


def two_calls(model, table, x, labels, null, scale, clip=1.0):
    """The loop that anybody would write, with seed 5 and images from 0."""
    x0, weight = None, torch.as_tensor(scale).reshape(-1, 1, 1, 1)
    with torch.no_grad():
        for i, t in enumerate(table.timesteps_tensor()):
            cond, uncond = model(x, t.expand(len(x)), labels), model(x, t.expand(len(x)), null)
            guided = uncond + weight * (cond - uncond)
            guided[:, x.shape[1] :] = cond[:, x.shape[1] :]
            x, x0 = ops.posterior_step(x, guided, table, i, seed=5, image_index=0, x0_prev=x0, clip=clip)
    return x


@pytest.mark.parametrize("scale", [3.0, 0, torch.tensor([0.0, 1.0, -2.5])], ids=["3", "0", "each"])
@pytest.mark.parametrize(
    "options",
    [
        {"method": "ddpm"},
        {"method": "ddim", "eta": 0.5},
        {"method": "dpm_solver"},
        {"method": "ddpm", "variance": "learned_range"},
    ],
    ids=["ddpm", "ddim", "dpm_solver", "learned"],
)
def test_one_call_with_both_is_two_calls(options, scale):
    model = unet(6 if options.get("variance") else 3)
    sampler = Sampler(model, SCHEDULE, num_steps=8, **options)
    labels = torch.tensor([0, 2, 1])
    x_T = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = two_calls(model, sampler.table, x_T, labels, torch.full((3,), NULL), scale)
    guided = {"seed": 5, "x_T": x_T, "class_labels": labels, "guidance_scale": scale, "null_label": NULL}
    got = sampler(**guided)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    assert (got - sampler(seed=5, x_T=x_T, class_labels=labels)).abs().max() > 1e-2
    *_, (_, _, last, _) = sampler.trajectory(**guided)
    assert torch.equal(last, got)
    eager = Sampler(model, SCHEDULE, num_steps=8, graph=False, **options)
    assert torch.equal(eager(**guided), got)  # which was recorded and replayed


@pytest.mark.parametrize("whole", [False, True])
def test_any_third_argument(whole):
    model = Described()
    sampler = Sampler(model, SCHEDULE, num_steps=6, channels_last=True)
    described, null = torch.randn(2, 2, 3), torch.randn(2, 3)
    x_T = torch.randn(2, 3, 4, 4)
    expected = two_calls(model, sampler.table, x_T, described, null.expand(2, -1, -1), 2.0)
    model.calls.clear()
    null = null.expand(2, -1, -1) if whole else null
    got = sampler(x_T=x_T, seed=5, class_labels=described, guidance_scale=2.0, null_label=null)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    assert sampler.model.calls == [4] * 6


def test_a_scale_of_one_is_half_a_call():
    model = Described()
    sampler = Sampler(model, SCHEDULE, num_steps=3)
    described = torch.randn(2, 2, 3)
    expected = sampler(class_labels=described)
    for scale in (1, torch.ones(2)):
        model.calls.clear()
        guided = sampler(class_labels=described, guidance_scale=scale, null_label=torch.zeros(2, 3))
        assert torch.equal(guided, expected) and model.calls == [2] * 3


LABELS = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"guidance_scale": 2.0, "class_labels": LABELS}, ValueError, "needs null_label"),
        ({"null_label": 1, "class_labels": LABELS}, ValueError, "null_label is of guidance_scale"),
        ({"guidance_scale": 2.0, "null_label": 9}, ValueError, r"null_label must be in \[0, 3\], got 9"),
        ({"guidance_scale": 2.0, "null_label": 0.5}, TypeError, "null_label must be a Tensor of torch.int64"),
        ({"guidance_scale": 2.0, "null_label": torch.zeros(3, dtype=torch.int64)}, ValueError, "shape"),
        ({"guidance_scale": "2", "null_label": 3}, TypeError, "guidance_scale must be a number"),
        ({"guidance_scale": math.nan, "null_label": 3}, ValueError, "must be finite"),
        ({"guidance_scale": torch.ones(3), "null_label": 3}, ValueError, r"\(2,\), one an image"),
        ({"guidance_scale": torch.ones(2).long(), "null_label": 3}, ValueError, "floating"),
        ({"cond_fn": 3}, TypeError, "cond_fn must be callable"),
        ({"cond_fn": lambda x, t: x[:, :1]}, ValueError, r"cond_fn must return a floating \(2, 3, 8, 8\)"),
    ],
)
def test_bad_input(given, error, message):
    sampler = Sampler(unet(), SCHEDULE, num_steps=2)
    with pytest.raises(error, match=message):
        sampler(2, **{"class_labels": LABELS} | given)


def test_guidance_of_a_model_without_classes():
    sampler = Sampler(lambda x, t: x, SCHEDULE, num_steps=2)
    with pytest.raises(ValueError, match="guidance_scale needs class_labels"):
        sampler(2, shape=(3, 4, 4), guidance_scale=2.0, null_label=0)


# ---- by a classifier ----


def network(x, t):
    """Anything that is smooth; in x's dtype."""
    return torch.tanh(x * (0.3 + t.to(x.dtype).reshape(-1, 1, 1, 1) / 1000)) + 0.1 * x.roll(1, 1)


def cond_fn(x, t):
    """The gradient of a smooth log-probability, by autograd, as a classifier's."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        log_probability = -(x - 0.3).square().sum() * 0.05 + x.cos().sum() * 0.02
        return torch.autograd.grad(log_probability * (1 + t[0] / 1000), x)[0]


def levels(table):
    """ab and the next one of the run's own, float64, for each step."""
    ab = torch.tensor(SCHEDULE.alphas_cumprod[table.timesteps])
    return ab, torch.cat([ab[1:], torch.ones(1, dtype=torch.float64)])


def algorithm_1(table, x, variance):
    """x_prev ~ N(mu + var g, var), of Dhariwal & Nichol 2021; mu and var by Ho et al. 2020, eq. 7."""
    ab, ab_prev = levels(table)
    for i, t in enumerate(table.timesteps_tensor()):
        t = t.expand(len(x))
        beta = 1 - ab[i] / ab_prev[i]
        small = (beta * (1 - ab_prev[i]) / (1 - ab[i])).clamp(min=1e-20)
        out = network(x, t)
        eps, var = out, {"fixed_small": small, "fixed_large": beta}.get(variance)
        if var is None:
            fraction = (torch.sin(3 * x) + 1) / 2
            var = (fraction * beta.log() + (1 - fraction) * small.log()).exp()
        mean = (x - beta / (1 - ab[i]).sqrt() * eps) / (1 - beta).sqrt()
        last = i == len(table) - 1  # which adds nothing to its mean
        noise = ops.counter_normal(x.shape, 5, torch.arange(len(x)), i).double()
        x = mean if last else mean + var * cond_fn(x, t) + torch.as_tensor(var).sqrt() * noise
    return x


def algorithm_2(table, x, prediction):
    """eps - sqrt(1 - ab) g in DDIM's step."""
    ab, ab_prev = levels(table)
    for i, t in enumerate(table.timesteps_tensor()):
        t = t.expand(len(x))
        alpha, sigma = ab[i].sqrt(), (1 - ab[i]).sqrt()
        out = network(x, t)
        eps = {"epsilon": out, "x0": (x - alpha * out) / sigma, "v": sigma * x + alpha * out}[prediction]
        eps = eps - sigma * cond_fn(x, t)
        x = ab_prev[i].sqrt() * (x - sigma * eps) / alpha + (1 - ab_prev[i]).sqrt() * eps
    return x


def start():
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_algorithm_1(variance):
    def model(x, t):
        out = network(x, t)
        return torch.cat([out, torch.sin(3 * x)], 1) if variance == "learned_range" else out

    sampler = Sampler(model, SCHEDULE, num_steps=10, variance=variance, clip=None)
    expected = algorithm_1(sampler.table, start().double(), variance)
    got = sampler(x_T=start(), seed=5, cond_fn=cond_fn)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max())
    assert sampler.stats.eager_because == "cond_fn may do anything"
    *_, (_, _, last, _) = sampler.trajectory(x_T=start(), seed=5, cond_fn=cond_fn)
    assert torch.equal(last, got) and not torch.equal(sampler(x_T=start(), seed=5), got)


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
def test_algorithm_2(prediction):
    sampler = Sampler(network, SCHEDULE, method="ddim", num_steps=10, prediction=prediction, clip=None)
    expected = algorithm_2(sampler.table, start().double(), prediction)
    got = sampler(x_T=start(), cond_fn=cond_fn)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max())


@pytest.mark.parametrize("method", ["ddpm", "ddim"])
def test_a_classifier_s_gradient_within_inference_mode(method):
    classifier = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 1))
    times = torch.nn.Embedding(SCHEDULE.T, 1)

    def gradient(x, t):
        assert not torch.is_grad_enabled()
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad((classifier(x) * times(t)).sum(), x)[0]

    sampler = Sampler(network, SCHEDULE, method=method, num_steps=4)
    expected = sampler(x_T=start(), cond_fn=gradient)
    with torch.inference_mode():
        assert torch.equal(sampler(x_T=start(), cond_fn=gradient), expected)


@pytest.mark.parametrize(
    ("labels", "error", "match"),
    [
        (1, TypeError, "class_labels must be an int64 Tensor, got int"),
        (torch.tensor(1), ValueError, r"class_labels must have shape \(1,\), one an image, got \(\)"),
    ],
)
def test_labels_that_are_no_batch_are_named(labels, error, match):
    with pytest.raises(error, match=match):
        Sampler(unet(), SCHEDULE)(class_labels=labels)


def test_a_classifier_may_write_to_its_x():
    sampler = Sampler(network, SCHEDULE, num_steps=4)
    expected = sampler(x_T=start(), cond_fn=lambda x, t: torch.zeros_like(x))
    assert torch.equal(sampler(x_T=start(), cond_fn=lambda x, t: x.zero_()), expected)


def test_a_classifier_beside_a_scale():
    """The classifier's gradient moves what the scale has made."""
    sampler = Sampler(Described(), SCHEDULE, method="ddim", num_steps=4)
    guided = {"class_labels": torch.ones(2, 2, 3), "guidance_scale": 2.0, "null_label": torch.zeros(2, 3)}
    plain = sampler(seed=1, **guided)
    assert torch.equal(sampler(seed=1, cond_fn=lambda x, t: torch.zeros_like(x), **guided), plain)
    assert not torch.equal(sampler(seed=1, cond_fn=cond_fn, **guided), plain)


def test_where_there_is_no_classifier_guidance():
    def run(table, **options):
        Sampler(network, table, **options)(1, shape=(3, 4, 4), cond_fn=cond_fn)

    with pytest.raises(ValueError, match="for the methods ddpm and ddim, not 'dpm_solver'"):
        run(SCHEDULE, method="dpm_solver")
    with pytest.raises(ValueError, match="cond_fn with ddim needs a Schedule"):
        run(steps.ddim(SCHEDULE, 4))
    run(steps.ddpm(SCHEDULE, 4))
    zero_snr = Schedule.linear().rescale_zero_terminal_snr()
    with pytest.raises(ValueError, match="alphas_cumprod is 0 at t = 999"):
        run(zero_snr, method="ddim", prediction="v", spacing="trailing", num_steps=4)
    with pytest.raises(ValueError, match="graph=True, but a step cannot be captured: cond_fn"):
        Graphs(network, True).refuse("cond_fn may do anything")


# ---- in a captured step ----


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("method", ["ddpm", "dpm_solver"])
def test_other_labels_and_scales_replay_the_same_capture(method):
    CAPTURED.clear()
    model = unet().cuda()
    sampler = Sampler(model, SCHEDULE, method=method, num_steps=4)
    eager = Sampler(model, SCHEDULE, method=method, num_steps=4, graph=False)
    results = []
    for labels, scale, null in (
        ([0, 1], 2.0, NULL),
        ([2, 1], 2.0, NULL),
        ([2, 1], torch.tensor([4.0, 0.5]), NULL),
        ([2, 1], torch.tensor([4.0, 0.5]).cuda(), 0),
    ):
        guided = {"class_labels": torch.tensor(labels), "guidance_scale": scale, "null_label": null}
        results.append(sampler(seed=3, **guided))
        assert torch.equal(results[-1], eager(seed=3, **guided))
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(results))
    assert (sampler.stats.captures, sampler.stats.replays) == (1, 16)
    sampler(seed=3, class_labels=torch.tensor([0, 1]), guidance_scale=1.0, null_label=NULL)
    assert sampler.stats.captures == 2  # of half the call
    sampler(2, seed=3, class_labels=torch.tensor([0, 1]), cond_fn=cond_fn) if method == "ddpm" else None
    assert sampler.stats.captures == 2
    CAPTURED.clear()
