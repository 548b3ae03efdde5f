"""Schedule: its constructors against diffusers and the papers' formulas, its derived arrays, its errors."""

import copy
import math
import pickle
import warnings

import numpy as np
import pytest
import torch

from ddpm_fast.schedule import Schedule

DERIVED = (
    "alphas",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "snr",
)


@pytest.mark.parametrize("T", [1, 2, 100, 1000])
@pytest.mark.parametrize(
    ("ours", "name", "ends"),
    [
        (Schedule.linear, "linear", {}),
        (Schedule.linear, "linear", {"beta_start": 1e-3, "beta_end": 0.2}),
        (Schedule.scaled_linear, "scaled_linear", {"beta_start": 0.00085, "beta_end": 0.012}),
        (Schedule.cosine, "squaredcos_cap_v2", {}),
        (Schedule.sigmoid_betas, "sigmoid", {"beta_start": 1e-5, "beta_end": 0.5e-2}),
    ],
)
def test_betas_are_those_of_diffusers(diffusers, ours, name, ends, T):
    theirs = diffusers.DDPMScheduler(T, beta_schedule=name, **ends)
    schedule = ours(T, **ends)
    # diffusers' ends and roots are float32, so a small beta inherits the rounding of its large neighbours
    np.testing.assert_allclose(schedule.betas, theirs.betas.double(), rtol=2e-6, atol=1e-8)
    np.testing.assert_allclose(schedule.alphas_cumprod, theirs.alphas_cumprod.double(), rtol=1e-4, atol=1e-9)


def test_defaults():
    assert [len(s) for s in (Schedule.linear(), Schedule.scaled_linear(), Schedule.cosine())] == [1000] * 3
    assert Schedule.sigmoid().T == 1000
    assert Schedule.sigmoid_betas().T == 100
    assert Schedule.linear().betas[[0, -1]] == pytest.approx([1e-4, 0.02], rel=1e-15)
    assert Schedule.scaled_linear().betas[[0, -1]] == pytest.approx([0.00085, 0.012], rel=1e-14)
    assert Schedule.cosine().betas[-1] == 0.999
    assert Schedule.sigmoid().betas[-1] == 0.999
    curve = Schedule.sigmoid_betas().betas  # the S-curve tutorial's ends, at sigmoid(-6) and sigmoid(6)
    assert curve[[0, -1]] == pytest.approx(
        [1e-5 + 4.99e-3 / (1 + math.exp(6)), 5e-3 - 4.99e-3 / (1 + math.exp(6))]
    )


def test_sigmoid_is_that_of_denoising_diffusion_pytorch():
    """Golden: its sigmoid_beta_schedule(8) and (8, 0, 3, tau=0.7), whose ends are float32."""
    golden = [0.05294557, 0.10157904, 0.17970009, 0.28362152, 0.39591016, 0.506211, 0.64500948, 0.999]
    np.testing.assert_allclose(Schedule.sigmoid(8).betas, golden, rtol=3e-6)
    golden = [0.26893233, 0.32072829, 0.36491064, 0.40405183, 0.44573663, 0.50555854, 0.62480352, 0.999]
    np.testing.assert_allclose(Schedule.sigmoid(8, 0, 3, tau=0.7).betas, golden, rtol=3e-6)


def test_a_steep_sigmoid_keeps_its_digits():
    T, tau = 50, 0.3
    u = np.arange(T + 1) / T
    rise = 1 / (1 + np.exp(-(3 - 6 * u) / tau, dtype=np.longdouble))
    ab = (rise - rise[-1]) / (rise[0] - rise[-1])
    ab = (ab[1:] / ab[0]).astype(np.float64)
    np.testing.assert_allclose(Schedule.sigmoid(T, tau=tau).alphas_cumprod[:-1], ab[:-1], rtol=1e-10)


def test_derived_arrays_are_the_papers():
    schedule = Schedule.linear(50)
    ab = np.array([np.prod(1 - schedule.betas[: t + 1]) for t in range(50)])
    prev = np.array([1.0, *ab[:-1]])
    beta = schedule.betas
    expected = {
        "alphas_cumprod": ab,
        "alphas": 1 - beta,
        "alphas_cumprod_prev": prev,
        "sqrt_alphas_cumprod": ab**0.5,
        "sqrt_one_minus_alphas_cumprod": (1 - ab) ** 0.5,
        "sqrt_recip_alphas_cumprod": ab**-0.5,
        "sqrt_recipm1_alphas_cumprod": ((1 - ab) / ab) ** 0.5,
        "log_one_minus_alphas_cumprod": np.log1p(-ab),
        "posterior_variance": beta * (1 - prev) / (1 - ab),
        "posterior_mean_coef1": beta * prev**0.5 / (1 - ab),
        "posterior_mean_coef2": (1 - beta) ** 0.5 * (1 - prev) / (1 - ab),
        "snr": ab / (1 - ab),
    }
    for name, values in expected.items():
        np.testing.assert_allclose(getattr(schedule, name), values, rtol=1e-11, err_msg=name)
    # x0 and x_t at their own means: the posterior mean must be that of q(x_{t-1} | x0)
    mean = schedule.posterior_mean_coef1 + schedule.posterior_mean_coef2 * ab**0.5
    np.testing.assert_allclose(mean, prev**0.5, rtol=1e-11)


def test_posterior_log_variance_is_clipped_as_openai_does():
    schedule = Schedule.linear()
    logs = schedule.posterior_log_variance_clipped
    assert schedule.posterior_variance[0] == 0
    assert logs[0] == logs[1] == pytest.approx(-9.817, abs=1e-3)
    np.testing.assert_allclose(np.exp(logs[1:]), schedule.posterior_variance[1:], rtol=1e-12)
    assert Schedule.linear(1).posterior_log_variance_clipped == pytest.approx([math.log(1e-20)])


def test_arrays_are_read_only_float64_and_copied():
    betas = np.linspace(1e-4, 0.02, 10, dtype=np.float32)
    schedule = Schedule.from_betas(betas)
    betas[:] = 0.5
    assert schedule.betas[0] == np.float32(1e-4)
    for name in ("betas", "alphas_cumprod", *DERIVED):
        array = getattr(schedule, name)
        assert array.dtype == np.float64, name
        assert array.shape == (10,), name
        assert array is getattr(schedule, name), name
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
    with pytest.raises(AttributeError):
        schedule.betas = betas


def test_from_alphas_cumprod_keeps_the_values(diffusers):
    theirs = diffusers.DDPMScheduler().alphas_cumprod
    schedule = Schedule.from_alphas_cumprod(theirs)
    assert (schedule.alphas_cumprod == theirs.double().numpy()).all()
    np.testing.assert_array_equal(schedule.betas, 1 - schedule.alphas_cumprod / schedule.alphas_cumprod_prev)
    flat = Schedule.from_alphas_cumprod([0.9, 0.9, 0.5])
    assert flat.betas == pytest.approx([0.1, 0.0, 4 / 9])
    assert all(np.isfinite(getattr(flat, name)).all() for name in DERIVED)


def test_zero_terminal_snr_is_that_of_diffusers(diffusers):
    for name, ours in (
        ("linear", Schedule.linear()),
        ("scaled_linear", Schedule.scaled_linear(1000, 1e-4, 0.02)),
    ):
        theirs = diffusers.DDPMScheduler(beta_schedule=name, rescale_betas_zero_snr=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            schedule = ours.rescale_zero_terminal_snr()
            for array in DERIVED:
                assert not np.isnan(getattr(schedule, array)).any(), array
        assert (schedule.alphas_cumprod[-1], schedule.betas[-1], schedule.snr[-1]) == (0.0, 1.0, 0.0)
        assert schedule.alphas_cumprod[0] == pytest.approx(ours.alphas_cumprod[0], rel=1e-14)
        np.testing.assert_allclose(schedule.alphas_cumprod, theirs.alphas_cumprod.double(), atol=2e-6)
        np.testing.assert_allclose(schedule.betas, theirs.betas.double(), atol=2e-6, rtol=2e-4)
        again = schedule.rescale_zero_terminal_snr()
        np.testing.assert_allclose(again.alphas_cumprod, schedule.alphas_cumprod, rtol=1e-14)


def test_tensor_is_the_table_of_q_sample():
    schedule = Schedule.linear(20)
    table = schedule.tensor()
    assert (table.dtype, table.shape, table.device.type) == (torch.float32, (20, 2), "cpu")
    assert (table[:, 0].numpy() == schedule.sqrt_alphas_cumprod.astype(np.float32)).all()
    assert (table[:, 1].numpy() == schedule.sqrt_one_minus_alphas_cumprod.astype(np.float32)).all()
    assert schedule.tensor("cpu") is table
    exact = schedule.tensor(dtype=torch.float64)
    assert (exact[:, 1].numpy() == schedule.sqrt_one_minus_alphas_cumprod).all()
    assert schedule.tensor("meta").device.type == "meta"
    with pytest.raises(TypeError, match=r"dtype must be a floating type, got torch\.int64"):
        schedule.tensor(dtype=torch.int64)


def test_a_tensor_first_asked_for_while_sampling_can_train_later():
    schedule = Schedule.linear(20)
    with torch.inference_mode():
        schedule.tensor()
    x0 = torch.ones(2, requires_grad=True)
    (x0 * schedule.tensor()[0]).sum().backward()
    assert x0.grad is not None


def test_copies_are_whole_and_read_only():
    schedule = Schedule.cosine(30).rescale_zero_terminal_snr()
    schedule.tensor()
    for twin in (copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule))):
        assert (twin.betas == schedule.betas).all()
        assert (twin.alphas_cumprod == schedule.alphas_cumprod).all()
        assert not twin.betas.flags.writeable
    assert repr(schedule).startswith("Schedule(T=30, ")


@pytest.mark.parametrize("constructor", [Schedule.from_betas, Schedule.from_alphas_cumprod])
@pytest.mark.parametrize(
    ("values", "error", "words"),
    [
        ([0.1, math.nan, 0.2], ValueError, r"finite, got \w+\[1\] = nan"),
        ([math.inf], ValueError, "finite"),
        ([], ValueError, r"1-D and not empty, got shape \(0,\)"),
        (0.1, ValueError, r"1-D and not empty, got shape \(\)"),
        ([[0.1, 0.05]], ValueError, r"1-D and not empty, got shape \(1, 2\)"),
        ([0.1, -0.1], ValueError, r"\w+\[1\] = -0.1"),
        ([1.5, 0.1], ValueError, r"\w+\[0\] = 1.5"),
        ([1.0, 0.1], ValueError, r"\w+\[0\] = 1.0"),
        ([0.0, 0.0], ValueError, r"\w+\[0\] = 0.0"),
        (["0.1"], TypeError, "real numbers"),
        ([True], TypeError, "real numbers"),
        ([0.1 + 1j], TypeError, "real numbers"),
        (None, TypeError, "real numbers"),
        ([[0.1], [0.1, 0.2]], TypeError, "real numbers"),
        (torch.tensor([0.1], requires_grad=True), TypeError, "real numbers"),
    ],
)
def test_bad_arrays_are_refused_by_name(constructor, values, error, words):
    with pytest.raises(error, match=f"^{constructor.__name__.removeprefix('from_')}.*{words}"):
        constructor(values)


def test_a_rise_of_alphas_cumprod_is_refused():
    with pytest.raises(
        ValueError, match=r"alphas_cumprod must be non-increasing, got alphas_cumprod\[2\] = 0.85"
    ):
        Schedule.from_alphas_cumprod([0.9, 0.8, 0.85])


def test_only_the_last_beta_may_be_one():
    assert Schedule.from_betas([0.1, 1.0]).alphas_cumprod[-1] == 0
    with pytest.raises(ValueError, match="or 1 as the last"):
        Schedule.from_betas([0.1, 1.0, 0.1])
    with pytest.raises(ValueError, match="or 0 as the last"):
        Schedule.from_alphas_cumprod([0.9, 0.0, 0.0])


def test_arrays_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="betas has length 2 but alphas_cumprod has 1"):
        Schedule(np.array([0.1, 0.2]), np.array([0.9]))


@pytest.mark.parametrize(
    "constructor",
    [Schedule.linear, Schedule.scaled_linear, Schedule.cosine, Schedule.sigmoid, Schedule.sigmoid_betas],
)
@pytest.mark.parametrize(
    ("T", "error"),
    [(0, ValueError), (-5, ValueError), (10.0, TypeError), ("10", TypeError), (True, TypeError)],
)
def test_a_bad_T_is_refused(constructor, T, error):
    with pytest.raises(error, match=r"^T must be"):
        constructor(T)
    assert constructor(np.int64(3)).T == 3


@pytest.mark.parametrize(
    ("constructor", "arguments", "error"),
    [
        (Schedule.linear, {"beta_start": 0.0}, ValueError),
        (Schedule.linear, {"beta_end": 1.0}, ValueError),
        (Schedule.linear, {"beta_end": math.nan}, ValueError),
        (Schedule.linear, {"beta_end": "0.02"}, TypeError),
        (Schedule.scaled_linear, {"beta_start": -1e-4}, ValueError),
        (Schedule.sigmoid_betas, {"beta_end": 2}, ValueError),
        (Schedule.cosine, {"s": -0.1}, ValueError),
        (Schedule.cosine, {"max_beta": 1.1}, ValueError),
        (Schedule.cosine, {"max_beta": 0}, ValueError),
        (Schedule.sigmoid, {"tau": 0}, ValueError),
        (Schedule.sigmoid, {"end": -3}, ValueError),
        (Schedule.sigmoid, {"start": math.inf}, ValueError),
        (Schedule.sigmoid, {"tau": None}, TypeError),
    ],
)
def test_bad_numbers_are_refused_by_name(constructor, arguments, error):
    (name,) = arguments
    with pytest.raises(error, match=f"^{name} must be"):
        constructor(10, **arguments)


def test_a_flat_schedule_cannot_be_rescaled():
    for flat in (Schedule.linear(1), Schedule.from_alphas_cumprod([0.9, 0.9])):
        with pytest.raises(ValueError, match="needs alphas_cumprod to fall"):
            flat.rescale_zero_terminal_snr()
