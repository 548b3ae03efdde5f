"""Continuous batching: every request's image is that of a run of its own, whatever runs beside it."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from ddpm_fast import Request, Sampler, Schedule, UNet, UNetConfig

SCHEDULE = Schedule.linear()
KINDS = [
    {"method": "ddpm", "variance": "fixed_large"},
    {"method": "ddim"},
    {"method": "ddim", "eta": 1.0},
    {"method": "dpm_solver"},
]
IDS = ["ddpm", "ddim", "ddim-eta", "dpm_solver"]


def denoiser(x, t):
    time = (t.float() / 1000).reshape(-1, 1, 1, 1)
    return torch.tanh(x * (0.5 + time)) + 0.1 * x.roll(1, 1)


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    model = UNet(UNetConfig((16, 32), (False, True), (True, False), sample_size=8, norm_num_groups=8))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.08)
    return model.eval()


def mixed(count: int) -> list[Request]:
    """Requests of several lengths, seeds, indices, starts and bounds, in no order."""
    choose = random.Random(0)
    return [
        Request(
            seed=choose.choice([0, 5, 2**64 - 1]),
            image_index=choose.choice([0, 3, 2**40]) + k,
            num_steps=choose.choice([None, 1, 2, 5, 9]),
            x_T=None if k % 4 else torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(k)),
            clip=None if k % 3 else choose.choice([0.5, float("inf")]),
        )
        for k in range(count)
    ]


def alone(model, request: Request, num_steps: int, kind: dict) -> torch.Tensor:
    clip = 1.0 if request.clip is None else None if request.clip == float("inf") else request.clip
    sampler = Sampler(model, SCHEDULE, num_steps=request.num_steps or num_steps, clip=clip, **kind)
    x_T = None if request.x_T is None else request.x_T[None]
    return sampler(1, shape=(3, 8, 8), seed=request.seed, first_image=request.image_index, x_T=x_T)[0]


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_each_is_its_solo_run(unet, kind, one_thread):
    requests = mixed(14)
    sampler = Sampler(unet, SCHEDULE, num_steps=4, **kind)
    served = list(sampler.stream(requests, batch_size=4))
    assert sorted(map(id, requests)) == sorted(id(request) for request, _ in served)
    for request, image in served:
        assert image.dtype == torch.float32 and image.shape == (3, 8, 8)
        torch.testing.assert_close(image, alone(unet, request, 4, kind), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
@pytest.mark.parametrize("batch_size", [1, 3, 20])
def test_noise_and_rows_are_exact(kind, batch_size):
    """With a model that treats every sample alike there is no rounding to hide behind."""
    requests = mixed(9)
    sampler = Sampler(denoiser, SCHEDULE, num_steps=4, **kind)
    served = list(sampler.stream(iter(requests), batch_size=batch_size, shape=(3, 8, 8)))
    assert len(served) == len(requests)
    for request, image in served:
        torch.testing.assert_close(image, alone(denoiser, request, 4, kind), rtol=0, atol=2e-6)


def test_requests_join_as_places_fall_free_and_leave_when_done():
    asked, seen = [], []

    def model(x, t):
        seen.append(t.tolist())
        return denoiser(x, t)

    def requests():
        for k, num_steps in enumerate((4, 1, 2, 1)):
            asked.append((k, len(seen)))
            yield Request(image_index=k, num_steps=num_steps)

    sampler = Sampler(model, SCHEDULE, method="ddim")
    done = [
        (request.image_index, len(seen))
        for request, _ in sampler.stream(requests(), batch_size=2, shape=(3, 4, 4))
    ]
    assert done == [(1, 1), (2, 3), (0, 4), (3, 4)]
    assert asked == [(0, 0), (1, 0), (2, 1), (3, 3)]
    assert [len(times) for times in seen] == [2, 2, 2, 2]
    assert seen == [[750, 0], [500, 500], [250, 0], [0, 0]]


def test_the_last_ones_run_in_a_smaller_batch():
    sizes = []

    def model(x, t):
        sizes.append(len(x))
        return denoiser(x, t)

    sampler = Sampler(model, SCHEDULE, method="ddim")
    requests = [Request(image_index=k, num_steps=n) for k, n in enumerate((1, 4, 2, 3))]
    list(sampler.stream(requests, batch_size=8, shape=(3, 4, 4)))
    assert sizes == [4, 3, 2, 1]


def test_a_stream_never_ends_while_requests_come():
    sampler = Sampler(denoiser, SCHEDULE, method="ddim", num_steps=3)
    endless = (Request(image_index=k) for k in itertools.count())
    served = itertools.islice(sampler.stream(endless, batch_size=2, shape=(3, 4, 4)), 9)
    assert [request.image_index for request, _ in served] == list(range(9))


def test_an_image_is_the_callers():
    sampler = Sampler(denoiser, SCHEDULE, method="ddim", num_steps=2)
    requests = [Request(image_index=k) for k in range(4)]
    served = [(image, image.clone()) for _, image in sampler.stream(requests, batch_size=1, shape=(3, 4, 4))]
    assert all(torch.equal(image, then) for image, then in served)
    assert torch.is_grad_enabled()


def test_a_module_is_in_eval_mode_only_while_it_runs(unet):
    unet.train()
    for _ in Sampler(unet, SCHEDULE, method="ddim", num_steps=2).stream([Request()]):
        assert unet.training and torch.is_grad_enabled()
    assert unet.training
    unet.eval()


def test_requests_are_asked_for_lazily_and_none_is_no_work():
    assert list(Sampler(denoiser, SCHEDULE).stream([], shape=(3, 4, 4))) == []

    def never():
        raise AssertionError("asked before the first image was")
        yield

    Sampler(denoiser, SCHEDULE).stream(never(), shape=(3, 4, 4))


@pytest.mark.parametrize(
    ("request_", "error", "match"),
    [
        (5, TypeError, "requests must hold Request, got int"),
        (None, TypeError, "requests must hold Request, got NoneType"),
        (Request(seed=2**64), ValueError, "seed must fit in 64 bits"),
        (Request(seed=0.5), TypeError, "seed must be an int"),
        (Request(image_index=-1), ValueError, "image_index must be .*got -1"),
        (Request(num_steps=0), ValueError, "request's num_steps must be at least 1, got 0"),
        (Request(num_steps=2.0), TypeError, "request's num_steps must be an integer"),
        (Request(num_steps=1001), ValueError, "num_steps must be"),
        (
            Request(x_T=torch.zeros(1, 3, 4, 4)),
            ValueError,
            r"x_T must be a floating Tensor of shape \(3, 4, 4\), got",
        ),
        (Request(x_T=0), ValueError, "x_T must be a floating Tensor of shape"),
        (Request(clip=0), ValueError, "clip must be None or a positive number, got 0"),
        (Request(clip=True), ValueError, "clip must be None or a positive number, got True"),
    ],
)
def test_bad_requests_are_named(request_, error, match):
    with pytest.raises(error, match=match):
        list(Sampler(denoiser, SCHEDULE, num_steps=3).stream([request_], shape=(3, 4, 4)))


def test_bad_arguments_are_named_at_once():
    sampler = Sampler(denoiser, SCHEDULE, num_steps=3)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        sampler.stream([], batch_size=0, shape=(3, 4, 4))
    with pytest.raises(ValueError, match="shape must be given"):
        sampler.stream([])
    with pytest.raises(TypeError, match="requests must be iterable, got int"):
        sampler.stream(3, shape=(3, 4, 4))
