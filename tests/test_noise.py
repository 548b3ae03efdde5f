"""Counter noise: Random123's vectors, the layout of the counter, and independence of the batch."""

from __future__ import annotations

import pytest
import torch
from op_cases import CASES, cast

from ddpm_fast import ops, reference
from ddpm_fast.ops import _dispatch

# Random123, tests/kat_vectors, philox4x32 10
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> torch.Tensor:
    return torch.tensor([int(word, 16) for word in text.split()])


@pytest.mark.parametrize("counter,key,expected", KNOWN)
def test_known_answers(counter, key, expected, backend):
    got = ops.philox4x32_10(words(counter)[None], words(key)[None], backend=backend)
    assert torch.equal(got[0], words(expected))


def test_first_normals_come_from_the_known_words(backend):
    """Seed, image, stream and step zero, element zero: Box-Muller of Random123's first vector."""
    u = (words(KNOWN[0][2]).float() + 0.5) * 2.0**-32
    radius = (-2 * u[0::2].double().log()).sqrt()
    angle = 2 * torch.pi * u[1::2].double()
    expected = torch.stack([radius * angle.cos(), radius * angle.sin()], 1).reshape(-1).float()
    got = ops.counter_normal((1, 4), 0, 0, 0, stream="x_T", backend=backend)
    torch.testing.assert_close(got[0], expected, rtol=1e-6, atol=1e-6)


def test_native_words_equal_the_reference(backend, generator):
    counter = torch.randint(0, 2**32, (1000, 4), generator=generator)
    key = torch.randint(0, 2**32, (1000, 2), generator=generator)
    assert torch.equal(
        ops.philox4x32_10(counter, key, backend=backend), reference.philox4x32_10(counter, key)
    )


@pytest.mark.parametrize("shape", [(3, 3, 32, 32), (2, 7), (1, 1), (5, 3, 67, 61), (4, 130), (2, 3, 0)])
@pytest.mark.parametrize("seed", [0, 1, 2**63 + 12345, -1])
def test_matches_the_reference(shape, seed, backend, poisoned):
    signed = seed - 2**64 if seed >= 2**63 else seed
    images = torch.arange(shape[0]) + 2**32 - 1  # the index's high word counts too
    step = torch.arange(shape[0]) * 17
    expected = reference.counter_normal(shape, torch.tensor(signed), images, step, reference.STREAM_STEP)
    got = ops.counter_normal(shape, seed, images, step, backend=backend)
    assert got.is_contiguous() and got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_every_lane_of_many_agrees_to_1e_6(backend):
    """A million draws (of the interpreter a few): the radius's tails and every quadrant of the angle."""
    count = 16 if backend == "triton" else 256
    images = torch.arange(count)
    expected = reference.counter_normal((count, 4096), torch.tensor(9), images, torch.tensor(4))
    got = ops.counter_normal((count, 4096), 9, images, 4, backend=backend)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    error = 4 / got.numel() ** 0.5
    assert abs(got.mean()) < error and abs(got.var() - 1) < 2**0.5 * error


def test_streams_steps_images_and_seeds_differ(backend):
    base = {"seed": 1, "image_index": 5, "step": 2, "stream": "step"}
    draws = [ops.counter_normal((1, 64), **base, backend=backend)]
    for change in ({"seed": 2}, {"image_index": 6}, {"step": 3}, {"stream": "x_T"}, {"seed": 1 + 2**32}):
        draws.append(ops.counter_normal((1, 64), **base | change, backend=backend))
    for a in range(len(draws)):
        for b in range(a):
            assert (draws[a] - draws[b]).abs().min() > 0


def test_an_image_does_not_depend_on_its_batch(backend):
    whole = ops.counter_normal((64, 3, 9, 7), 3, 0, 11, backend=backend)
    for first, last in ((0, 1), (5, 8), (63, 64), (10, 64)):
        part = ops.counter_normal((last - first, 3, 9, 7), 3, first, 11, backend=backend)
        assert torch.equal(part, whole[first:last])
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ops.counter_normal((64, 3, 9, 7), 3, order, 11, backend=backend), whole[order])


def test_noise_inside_the_step_is_the_noise_outside(backend, generator):
    for name in ("ddpm", "row-each", "learned-several-spans", "points"):
        case = next(c for c in CASES if c.op == "posterior_step" and c.name == name)
        inputs = cast(case.inputs(generator), torch.float32)
        images = torch.arange(inputs["x"].shape[0]) + 40
        noise = ops.counter_normal(inputs["x"].shape, 8, images, inputs["i"], backend=backend)
        given = ops.posterior_step(**inputs | {"noise": noise}, backend=backend)
        drawn = ops.posterior_step(**inputs | {"noise": None}, seed=8, image_index=images, backend=backend)
        assert all(torch.equal(g, d) for g, d in zip(given, drawn, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_q_sample_counter_is_q_sample_of_its_noise(dtype, backend, generator):
    if reason := _dispatch.why_not("q_sample", backend, "cpu", dtype):
        pytest.skip(reason)
    for name in ("cifar", "points", "several-spans"):
        case = next(c for c in CASES if c.op == "q_sample" and c.name == name)
        inputs = cast(case.inputs(generator), dtype, "channels_last")
        x0, t, table = (inputs[k] for k in ("x0", "t", "table"))
        x_t, noise = ops.q_sample_counter(x0, t, table, 4, 100, backend=backend)
        drawn = ops.counter_normal(x0.shape, 4, 100, 0, stream="training", backend=backend)
        assert torch.equal(noise, drawn.to(dtype))
        assert torch.equal(x_t, ops.q_sample(x0, noise, t, table, backend=backend))
        assert x_t.stride() == noise.stride() == x0.stride()


@pytest.mark.parametrize(
    "error,match,args",
    [
        (ValueError, "64 bits", ((1, 4), 2**64, 0, 0)),
        (TypeError, "seed must be an int", ((1, 4), 1.0, 0, 0)),
        (TypeError, "seed must be an int", ((1, 4), True, 0, 0)),
        (ValueError, "image_index must be at least 0", ((1, 4), 0, -1, 0)),
        (ValueError, r"image_index must be .*shape \(2,\)", ((2, 4), 0, torch.arange(3), 0)),
        (IndexError, "step must be in", ((1, 4), 0, 0, 2**28)),
        (IndexError, "step must be in", ((1, 4), 0, 0, torch.tensor(-1))),
        (TypeError, "step must be an int", ((1, 4), 0, 0, 0.5)),
        (ValueError, "batch dimension", ((), 0, 0, 0)),
    ],
)
def test_bad_input_is_named(error, match, args, backend):
    with pytest.raises(error, match=match):
        ops.counter_normal(*args, backend=backend)


def test_unknown_stream():
    with pytest.raises(ValueError, match="stream='steps' is not known; allowed: x_T, step, training"):
        ops.counter_normal((1, 4), 0, 0, 0, stream="steps")
