"""StepTable: every row against diffusers' schedulers in float64, the closed forms, and every refusal."""

import copy
import math
import pickle
import warnings

import numpy as np
import pytest
import torch

from ddpm_fast import steps
from ddpm_fast.schedule import Schedule
from ddpm_fast.steps import StepTable, ddim, ddpm, dpm_solver

HF_PREDICTION = {"epsilon": "epsilon", "x0": "sample", "v": "v_prediction"}
SPACINGS = ("leading", "linspace", "trailing")
LINEAR = Schedule.linear()
ZERO_SNR = LINEAR.rescale_zero_terminal_snr()


def apply_row(row, x, out, noise=0.0, x0_prev=0.0, clip=None):
    """The update of one row, or of N rows given as (9 or 7, N, 1), to x (..., C); out has 2C if learned."""
    p, q, a, b, c, d, s = row[:7]
    if len(row) == 9:
        out, v = np.split(out, 2, axis=-1)
        s = s * np.exp(0.5 * ((v + 1) / 2 * row[8] + (1 - v) / 2 * row[7]))
    x0 = p * x + q * out
    x0 = x0 if clip is None else np.clip(x0, -clip, clip)
    return a * x0 + b * x + c * out + d * x0_prev + s * noise, x0


def apply_all(table, *operands, **options):
    return apply_row(table.rows.T[..., None], *operands, **options)


def worst(ours, theirs):
    """The largest |difference| over all rows, relative to the row's scale or to 1 if that is smaller."""
    scale = np.maximum(np.abs(theirs).max(axis=1, keepdims=True), 1.0)
    assert np.isfinite(theirs).all()
    return float((np.abs(ours - theirs) / scale).max())  # a NaN in ours fails any comparison


def scheduler_in_float64(kind, **config):
    """A diffusers scheduler, its float32 tables promoted to float64, and our Schedule of the same values."""
    scheduler = kind(**config)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    if hasattr(scheduler, "one"):
        scheduler.one = scheduler.one.double()
    if hasattr(scheduler, "final_alpha_cumprod"):
        scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    return scheduler, Schedule.from_alphas_cumprod(scheduler.alphas_cumprod)


def operands(num_steps, learned=False, seed=0):
    """x, out and noise for each step, shape (N, C): independent, so that x0 is often clipped."""
    random = np.random.default_rng(seed)
    x, noise = random.standard_normal((2, num_steps, 4))
    return x, random.standard_normal((num_steps, 8 if learned else 4)), noise


def steps_of_diffusers(scheduler, table, x, out, noise, monkeypatch=None, **options):
    """One `step` of diffusers for every row, each from that row's own x, with that row's noise.

    DDPMScheduler takes no noise: `monkeypatch` puts it where the scheduler draws.
    """
    x, out, noise = (torch.from_numpy(a) for a in (x, out, noise))
    ddim_options = [{}] * len(table)
    drawn = None
    if monkeypatch is not None:
        module = "diffusers.schedulers.scheduling_ddpm.randn_tensor"
        monkeypatch.setattr(module, lambda *args, **kwargs: drawn)
    else:
        ddim_options = [{"variance_noise": z[None]} if options.get("eta", 0) > 0 else {} for z in noise]
    x_next, x0 = [], []
    for i, t in enumerate(table.timesteps.tolist()):
        drawn = noise[i : i + 1]
        after, clean = scheduler.step(
            out[i : i + 1], t, x[i : i + 1], return_dict=False, **ddim_options[i], **options
        )
        x_next.append(after)
        x0.append(clean)
    return torch.cat(x_next).numpy(), torch.cat(x0).numpy()


# Against diffusers, row by row


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
def test_ddpm_rows_are_the_steps_of_diffusers(diffusers, prediction, variance, clip, monkeypatch):
    config = {
        "variance_type": variance,
        "prediction_type": HF_PREDICTION[prediction],
        "clip_sample": clip is not None,
    }
    for num_steps, spacing in ((1000, "leading"), (30, "leading"), (50, "linspace")):
        scheduler, schedule = scheduler_in_float64(
            diffusers.DDPMScheduler, timestep_spacing=spacing, **config
        )
        scheduler.set_timesteps(num_steps)
        table = ddpm(schedule, num_steps, variance=variance, prediction=prediction, spacing=spacing)
        assert table.learned_range == (variance == "learned_range")
        x, out, noise = operands(num_steps, table.learned_range)
        theirs = steps_of_diffusers(scheduler, table, x, out, noise, monkeypatch)
        ours = apply_all(table, x, out, noise, clip=clip)
        assert worst(ours[0], theirs[0]) <= 1e-12
        assert worst(ours[1], theirs[1]) <= 1e-12
        assert table.draws.tolist() == [True] * (num_steps - 1) + [False]


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("use_clipped_out", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
def test_ddim_rows_are_the_steps_of_diffusers(diffusers, prediction, eta, use_clipped_out, clip):
    # Spacings whose list is that of t - T // N, so that diffusers' prev_t is right
    runs = ((1000, "leading", 0, True), (30, "leading", 1, False), (50, "trailing", 0, True))
    for num_steps, spacing, steps_offset, to_one in runs:
        scheduler, schedule = scheduler_in_float64(
            diffusers.DDIMScheduler,
            prediction_type=HF_PREDICTION[prediction],
            clip_sample=clip is not None,
            timestep_spacing=spacing,
            steps_offset=steps_offset,
            set_alpha_to_one=to_one,
        )
        scheduler.set_timesteps(num_steps)
        table = ddim(
            schedule,
            num_steps,
            eta=eta,
            use_clipped_out=use_clipped_out,
            prediction=prediction,
            spacing=spacing,
            steps_offset=steps_offset,
            final_alpha_cumprod=1.0 if to_one else schedule.alphas_cumprod[0],
        )
        x, out, noise = operands(num_steps)
        theirs = steps_of_diffusers(
            scheduler, table, x, out, noise, eta=eta, use_clipped_model_output=use_clipped_out
        )
        ours = apply_all(table, x, out, noise, clip=clip)
        assert worst(ours[0], theirs[0]) <= 1e-12
        assert worst(ours[1], theirs[1]) <= 1e-12
        assert table.draws.tolist() == [eta > 0] * num_steps
        assert table.column("x_from_out").any() == (not use_clipped_out)


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
@pytest.mark.parametrize("method", ["ddpm", "ddim"])
def test_float32_rows_are_the_float32_steps_of_diffusers(diffusers, method, prediction, monkeypatch):
    """Within 1e-5: DDPM by diffusers' own float32 arithmetic, without which it is off by 8e-5 at t <= 10.

    x and out are a model's here: out is near the noise that x holds, or what that noise makes of x0 and v.
    """
    kind = {"ddpm": diffusers.DDPMScheduler, "ddim": diffusers.DDIMScheduler}[method]
    scheduler = kind(prediction_type=HF_PREDICTION[prediction])
    schedule = Schedule.from_alphas_cumprod(scheduler.alphas_cumprod)
    for num_steps in (1000, 50):
        scheduler.set_timesteps(num_steps)
        table = getattr(steps, method)(schedule, num_steps, prediction=prediction)
        ab = schedule.alphas_cumprod[table.timesteps][:, None]
        x0, error, noise = operands(num_steps)
        x0, eps = np.tanh(x0), noise + 0.1 * error
        x = np.sqrt(ab) * x0 + np.sqrt(1 - ab) * noise
        x0 = (x - np.sqrt(1 - ab) * eps) / np.sqrt(ab)
        out = {"epsilon": eps, "x0": x0, "v": np.sqrt(ab) * eps - np.sqrt(1 - ab) * x0}[prediction]
        x, out, noise = (a.astype(np.float32) for a in (x, out, error))

        patch = monkeypatch if method == "ddpm" else None
        theirs = steps_of_diffusers(scheduler, table, x, out, noise, patch)
        ours = apply_row(table.tensor().numpy().T[..., None], x, out, noise, clip=1.0)
        exact = apply_all(table, *(a.astype(np.float64) for a in (x, out, noise)), clip=1.0)
        assert ours[0].dtype == np.float32
        if method == "ddpm":
            same = ddpm(schedule, num_steps, prediction=prediction, arithmetic="float32")
            like_theirs = apply_row(same.tensor().numpy().T[..., None], x, out, noise, clip=1.0)
            loose = table.timesteps <= 10
            assert worst(ours[0][~loose], theirs[0][~loose]) <= 1e-5
            assert worst(ours[0], theirs[0]) <= 1e-4
        else:
            like_theirs = ours
        assert worst(like_theirs[0], theirs[0]) <= 1e-5
        assert worst(ours[0], exact[0]) <= 1e-6
        # From epsilon, x0 is a difference of numbers up to 157 times its size, in any float32 code
        condition = np.maximum(table.column("x0_from_x"), 1.0)[:, None]
        assert worst(ours[1] / condition, theirs[1] / condition) <= 1e-6


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_dpm_solver_runs_as_diffusers_does(diffusers, spacing, order, prediction):
    for num_steps in (1, 2, 3, 10, 20, 50):
        scheduler = diffusers.DPMSolverMultistepScheduler(
            solver_order=order, prediction_type=HF_PREDICTION[prediction], timestep_spacing=spacing
        )
        scheduler.set_timesteps(num_steps)
        schedule = Schedule.from_alphas_cumprod(scheduler.alphas_cumprod)
        table = dpm_solver(schedule, num_steps, order=order, prediction=prediction, spacing=spacing)
        assert table.timesteps.tolist() == scheduler.timesteps.tolist()
        assert table.uses_x0_prev == (order == 2 and num_steps > 2)
        assert not table.draws.any()

        x = np.random.default_rng(1).standard_normal((1, 16))
        x_hf, x0 = torch.from_numpy(x).float(), np.zeros_like(x)
        for i, t in enumerate(table.timesteps):
            x_hf = scheduler.step(
                gaussian_denoiser(schedule, prediction, t, x_hf).float(), t, x_hf, return_dict=False
            )[0]
            out = gaussian_denoiser(schedule, prediction, t, torch.from_numpy(x)).numpy()
            x, x0 = apply_row(table.rows[i], x, out, x0_prev=x0)
            assert np.abs(x - x_hf.numpy()).max() <= 1e-4, (num_steps, i)


def gaussian_denoiser(schedule, prediction, t, x, mean=0.3, std=0.5):
    """What the ideal network predicts at t when the data are N(mean, std^2)."""
    ab = schedule.alphas_cumprod[t]
    x = x.double()
    x0 = mean + std**2 * ab**0.5 / (std**2 * ab + 1 - ab) * (x - ab**0.5 * mean)
    eps = (x - ab**0.5 * x0) / (1 - ab) ** 0.5
    return {"x0": x0, "epsilon": eps, "v": ab**0.5 * eps - (1 - ab) ** 0.5 * x0}[prediction]


# Timesteps


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps_offset", [0, 1])
def test_timesteps_are_those_of_diffusers(diffusers, spacing, steps_offset):
    for num_steps in (1, 2, 7, 13, 30, 50, 100, 333, 500, 501, 999, 1000):
        for kind, ours in (
            (diffusers.DDPMScheduler, ddpm),
            (diffusers.DDIMScheduler, ddim),
            (diffusers.DPMSolverMultistepScheduler, dpm_solver),
        ):
            scheduler = kind(timestep_spacing=spacing, steps_offset=steps_offset)
            scheduler.set_timesteps(num_steps)
            theirs = scheduler.timesteps.tolist()
            arguments = {"spacing": spacing, "steps_offset": steps_offset if spacing == "leading" else 0}
            if theirs[0] >= 1000 or len(set(theirs)) < num_steps:  # no timestep of the model, or one twice
                with pytest.raises(ValueError, match=r"num_steps must be|steps_offset must keep t below"):
                    ours(LINEAR, num_steps, **arguments)
            else:
                assert ours(LINEAR, num_steps, **arguments).timesteps.tolist() == theirs, (kind, num_steps)


def test_trailing_leaves_out_the_minus_one_of_diffusers(diffusers):
    for num_steps in (61, 103, 201):
        scheduler = diffusers.DDPMScheduler(timestep_spacing="trailing")
        scheduler.set_timesteps(num_steps)
        assert scheduler.timesteps[num_steps:].tolist() == [-1]  # else diffusers is mended: drop this test
        table = ddpm(LINEAR, num_steps, spacing="trailing")
        assert table.timesteps.tolist() == scheduler.timesteps[:num_steps].tolist()


def test_ddim_reads_its_own_list_where_diffusers_does_not():
    table = ddim(LINEAR, 50, spacing="linspace", eta=1.0)
    ab = LINEAR.alphas_cumprod[table.timesteps]
    np.testing.assert_array_equal(table.column("x_from_x0"), np.sqrt([*ab[1:], 1.0]))


@pytest.mark.parametrize(
    ("T", "counts", "expected"),
    [
        (10, "10", [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]),
        (10, "3,2", [9, 5, 4, 2, 0]),
        (11, "3,2,1", [8, 7, 4, 3, 2, 0]),  # sections of 4, 4 and 3; 1.5 rounds to 2
        (11, [3, 2, 1], [8, 7, 4, 3, 2, 0]),
        (6, "3", [5, 2, 0]),  # 2.5 rounds to even
        (8, "3", [7, 4, 0]),  # 3.5 rounds to even
        (10, "0,1", [5]),
        (10, "1", [0]),
        (10, "ddim5", [8, 6, 4, 2, 0]),
        (10, "ddim4", [9, 6, 3, 0]),
        (10, "ddim2", [5, 0]),
    ],
)
def test_openai_spacing_by_hand(T, counts, expected):
    assert steps.space_timesteps(T, counts).tolist() == expected
    if isinstance(counts, str):
        assert ddpm(Schedule.linear(T), spacing=counts).timesteps.tolist() == expected


def test_openai_spacing_of_1000():
    fifty = steps.space_timesteps(1000, "50").tolist()
    assert (len(fifty), fifty[:3], fifty[-2:]) == (50, [999, 979, 958], [20, 0])
    assert steps.space_timesteps(1000, "ddim30").tolist() == list(range(986, -1, -34))
    assert steps.space_timesteps(1000, "ddim50").tolist() == list(range(980, -1, -20))
    sections = steps.space_timesteps(300, "10,15,20").tolist()
    assert sections[-10:] == list(range(99, -1, -11))
    assert sections[20:35] == [199, 192, 185, 178, 171, 164, 157, 149, 142, 135, 128, 121, 114, 107, 100]
    assert sections[:5] == [299, 294, 289, 283, 278]
    # The running sum and the rounding of the whole differ for 278 of the counts
    different = sum(
        steps.space_timesteps(1000, str(n)).tolist() != steps.linspace(1000, n).tolist()
        for n in range(2, 1001)
    )
    assert different == 278


@pytest.mark.parametrize(
    "given",
    [
        [999, 500, 0],
        (999, 500, 0),
        np.array([999, 500, 0]),
        torch.tensor([999, 500, 0]),
        range(900, -1, -300),
    ],
)
def test_explicit_timesteps(given):
    for method in (ddpm, ddim, dpm_solver):
        table = method(LINEAR, spacing=given)
        assert table.timesteps.tolist() == [int(t) for t in given]
        assert table.timesteps.dtype == np.int64
        assert len(method(LINEAR, len(given), spacing=given)) == len(given)


def test_custom_timesteps_step_as_diffusers_does(diffusers, monkeypatch):
    given = [999, 700, 350, 349, 20, 0]
    scheduler, schedule = scheduler_in_float64(diffusers.DDPMScheduler)
    scheduler.set_timesteps(timesteps=given)
    table = ddpm(schedule, spacing=given)
    x, out, noise = operands(len(given))
    theirs = steps_of_diffusers(scheduler, table, x, out, noise, monkeypatch)
    assert worst(apply_all(table, x, out, noise, clip=1.0)[0], theirs[0]) <= 1e-12


def test_the_last_ddpm_step_adds_no_noise_where_diffusers_does(diffusers, monkeypatch):
    """With "trailing" the last t is 19: diffusers draws, and adds sqrt(beta) of it. All other rows agree."""
    config = {"timestep_spacing": "trailing", "variance_type": "fixed_large"}
    scheduler, schedule = scheduler_in_float64(diffusers.DDPMScheduler, **config)
    scheduler.set_timesteps(50)
    table = ddpm(schedule, 50, variance="fixed_large", spacing="trailing")
    x, out, noise = operands(50)
    ours = apply_all(table, x, out, noise, clip=1.0)[0]
    theirs = steps_of_diffusers(scheduler, table, x, out, noise, monkeypatch)[0]
    assert worst(ours[:-1], theirs[:-1]) <= 1e-12
    noise[-1] = 0
    theirs = steps_of_diffusers(scheduler, table, x, out, noise, monkeypatch)[0]
    assert worst(ours, theirs) <= 1e-12
    assert table.draws.all()


# Closed forms


def composed(table):
    """What x and out weigh in x_next when nothing is clipped."""
    p, q, a, b, c, _, _ = table.rows.T[:7]
    return a * p + b, a * q + c


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
def test_the_samplers_meet(prediction):
    """DDIM with eta 1 is DDPM (Song et al. 2021, section 4.1); DPM-Solver++ of order 1 is DDIM."""
    for spacing in ("linspace", "17,3"):
        arguments = {"prediction": prediction, "spacing": spacing, "num_steps": 20}
        stochastic, ancestral = ddim(LINEAR, eta=1.0, **arguments), ddpm(LINEAR, **arguments)
        np.testing.assert_allclose(composed(stochastic), composed(ancestral), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(
            stochastic.column("x_from_noise"), ancestral.column("x_from_noise"), rtol=1e-12
        )
    given = {"prediction": prediction, "spacing": [999, 600, 300, 100, 0]}
    first_order = dpm_solver(LINEAR, order=1, **given)
    np.testing.assert_allclose(composed(first_order), composed(ddim(LINEAR, **given)), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        (ddpm, {}),
        (ddpm, {"variance": "fixed_large"}),
        (ddim, {}),
        (ddim, {"eta": 0.7, "use_clipped_out": True}),
        (ddim, {"eta": 0.7, "final_alpha_cumprod": LINEAR.alphas_cumprod[0]}),
        (dpm_solver, {"spacing": "trailing"}),
    ],
)
def test_all_predictions_of_one_x0_take_the_same_step(method, arguments):
    table = method(LINEAR, 25, prediction="x0", **arguments)
    ab = LINEAR.alphas_cumprod[table.timesteps][:, None]
    prev = np.append(ab[1:], [[1.0]], axis=0)
    x, x0, noise = operands(25)
    expected = apply_all(table, x, x0, noise, x0_prev=noise)
    eps = (x - np.sqrt(ab) * x0) / np.sqrt(1 - ab)
    mean = np.sqrt(prev) * (1 - ab / prev) / (1 - ab) * x0
    mean = mean + np.sqrt(ab / prev) * (1 - prev) / (1 - ab) * x
    outs = {"epsilon": eps, "v": np.sqrt(ab) * eps - np.sqrt(1 - ab) * x0, "mean": mean}
    for prediction, out in outs.items():
        ours = apply_all(method(LINEAR, 25, prediction=prediction, **arguments), x, out, noise, x0_prev=noise)
        assert worst(ours[0], expected[0]) <= 1e-10, prediction
        assert worst(ours[1], expected[1]) <= 1e-10, prediction


def test_a_predicted_mean_is_the_mean_whatever_is_clipped():
    """OpenAI's PREVIOUS_X: x0 = (out - coef2 x) / coef1 is reported clipped, and x_next = out + std noise."""
    table = ddpm(LINEAR, prediction="mean", variance="fixed_large")
    x, out, noise = operands(1000)
    x_next, x0 = apply_all(table, x, out, noise, clip=1.0)
    std = np.sqrt(LINEAR.betas[::-1]) * (np.arange(1000) < 999)
    np.testing.assert_allclose(x_next, out + std[:, None] * noise, rtol=1e-9)
    coef1, coef2 = LINEAR.posterior_mean_coef1[::-1, None], LINEAR.posterior_mean_coef2[::-1, None]
    np.testing.assert_allclose(x0, np.clip((out - coef2 * x) / coef1, -1, 1), rtol=1e-9)


def test_ddpm_rows_of_the_whole_schedule_are_its_posterior():
    table = ddpm(LINEAR)
    np.testing.assert_allclose(table.column("x_from_x0"), LINEAR.posterior_mean_coef1[::-1], rtol=1e-9)
    np.testing.assert_allclose(table.column("x_from_x"), LINEAR.posterior_mean_coef2[::-1], rtol=1e-9)
    variance = LINEAR.posterior_variance[::-1]
    np.testing.assert_allclose(table.column("x_from_noise")[:-1] ** 2, variance[:-1], rtol=1e-9)
    assert table.column("x_from_noise")[-1] == 0
    learned = ddpm(LINEAR, variance="learned_range")
    assert learned.column("x_from_noise").tolist() == [1.0] * 999 + [0.0]
    np.testing.assert_allclose(np.exp(learned.column("max_log")), LINEAR.betas[::-1], rtol=1e-9)
    np.testing.assert_allclose(np.exp(learned.column("min_log"))[:-1], variance[:-1], rtol=1e-9)


def test_the_last_step_of_each_sampler_is_x0():
    for method in (ddpm, ddim, dpm_solver):
        last = method(LINEAR, 20).rows[-1]
        assert last[2:].tolist() == [1.0, 0.0, 0.0, 0.0, 0.0], method
        assert len(method(LINEAR, 1)) == 1


# Zero terminal SNR


@pytest.mark.parametrize("prediction", ["v", "x0", "mean"])
def test_zero_terminal_snr_is_finite(prediction):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for table in (
            ddpm(ZERO_SNR, prediction=prediction),
            ddpm(ZERO_SNR, 7, prediction=prediction, variance="learned_range", spacing="trailing"),
            ddim(ZERO_SNR, 50, prediction=prediction, spacing="trailing", eta=1.0, use_clipped_out=True),
            dpm_solver(ZERO_SNR, 20, prediction=prediction),
            dpm_solver(ZERO_SNR, prediction=prediction, spacing=[999]),
        ):
            assert table.timesteps[0] == 999
            assert np.isfinite(table.rows).all()


@pytest.mark.parametrize("method", [ddpm, ddim, dpm_solver])
def test_zero_terminal_snr_refuses_epsilon_where_it_is_visited(method):
    with pytest.raises(
        ValueError, match=r"'epsilon' cannot give x0 at t = 999.* needs prediction 'v' or 'x0'"
    ):
        method(ZERO_SNR, 50, spacing="trailing")
    assert method(ZERO_SNR, 50, spacing="leading").timesteps[0] < 999


@pytest.mark.parametrize("prediction", ["v", "x0"])
def test_zero_terminal_snr_steps_as_diffusers_does(diffusers, prediction, monkeypatch):
    config = {"prediction_type": HF_PREDICTION[prediction], "rescale_betas_zero_snr": True}
    config["timestep_spacing"] = "trailing"
    x, out, noise = operands(50)
    scheduler, schedule = scheduler_in_float64(diffusers.DDPMScheduler, **config)
    assert schedule.alphas_cumprod[-1] == 0
    scheduler.set_timesteps(50)
    table = ddpm(schedule, 50, prediction=prediction, spacing="trailing")
    theirs = steps_of_diffusers(scheduler, table, x, out, noise, monkeypatch)
    # Row 0 too; the last is left out because diffusers adds 1e-10 of noise to it
    assert worst(apply_all(table, x, out, noise, clip=1.0)[0][:-1], theirs[0][:-1]) <= 1e-12

    scheduler, schedule = scheduler_in_float64(diffusers.DDIMScheduler, **config)
    scheduler.set_timesteps(50)
    table = ddim(schedule, 50, eta=0.5, prediction=prediction, spacing="trailing")
    theirs = steps_of_diffusers(scheduler, table, x, out, noise, eta=0.5)
    assert worst(apply_all(table, x, out, noise, clip=1.0)[0], theirs[0]) <= 1e-12


def test_dpm_solver_at_zero_terminal_snr_is_the_limit():
    given = {"prediction": "v", "spacing": [999, 800, 600, 400, 200, 0]}
    exact = dpm_solver(ZERO_SNR, **given)
    assert not exact.column("x_from_x0_prev")[:2].any()
    assert exact.column("x_from_x0_prev")[2:5].all()
    apart = []
    for last in (1e-9, 1e-32, 1e-128, 1e-300):
        near = dpm_solver(Schedule.from_alphas_cumprod([*ZERO_SNR.alphas_cumprod[:-1], last]), **given)
        apart.append(np.abs(near.rows - exact.rows).max(axis=1))
    apart = np.array(apart)
    assert (apart[:, 3:] == 0).all()
    assert (np.diff(apart[:, :2], axis=0) <= 0).all()  # row 0 by sqrt(ab), row 1 by 1 / log(ab)
    assert apart[-1, 0] <= 1e-12
    assert apart[-1, 1] < 0.01 < apart[0, 1]


def test_two_steps_at_one_noise_level_stay_finite():
    flat = Schedule.from_alphas_cumprod([0.9, 0.5, 0.5, 0.5, 0.2])
    for table in (
        ddpm(flat, variance="learned_range"),
        ddim(flat, eta=1.0),
        dpm_solver(flat, spacing="trailing"),
    ):
        assert np.isfinite(table.rows).all()
    assert ddpm(flat).column("x_from_noise")[1] == pytest.approx(1e-10)  # diffusers' clamp of a variance of 0
    row = dpm_solver(flat, spacing="trailing").rows[2]
    assert row[2:].tolist() == [0.0, 1.0, 0.0, 0.0, 0.0]  # nothing to do
    with pytest.raises(ValueError, match=r"'mean' cannot give x0 at t = 3, where beta is 0"):
        ddpm(flat, prediction="mean")


# The table itself


def test_table_is_read_only_and_named():
    table = ddpm(LINEAR, 50)
    assert (len(table), table.num_steps, table.method, table.learned_range) == (50, 50, "ddpm", False)
    assert (table.timesteps.dtype, table.rows.dtype, table.draws.dtype) == (np.int64, np.float64, np.bool_)
    assert table.columns == (
        "x0_from_x",
        "x0_from_out",
        "x_from_x0",
        "x_from_x",
        "x_from_out",
        "x_from_x0_prev",
        "x_from_noise",
    )
    assert ddpm(LINEAR, 50, variance="learned_range").columns == (*table.columns, "min_log", "max_log")
    assert (table.column("x_from_noise") == table.rows[:, 6]).all()
    with pytest.raises(ValueError, match=r"column must be one of 'x0_from_x', .*got 'min_log'"):
        table.column("min_log")
    for array in (table.rows, table.timesteps, table.draws):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
    assert repr(table) == "StepTable('ddpm', num_steps=50, timesteps=980..0)"


def test_tensors_are_kept_per_device_and_dtype():
    table = ddim(LINEAR, 50)
    rows = table.tensor()
    assert (rows.dtype, rows.shape) == (torch.float32, (50, 7))
    assert (rows.numpy() == table.rows.astype(np.float32)).all()
    assert table.tensor("cpu", torch.float32) is rows
    assert (table.tensor(dtype=torch.float64).numpy() == table.rows).all()
    t = table.timesteps_tensor()
    assert t is table.timesteps_tensor("cpu")
    assert (t.dtype, t.tolist()) == (torch.int64, table.timesteps.tolist())
    assert table.timesteps_tensor("meta").device.type == table.tensor("meta").device.type == "meta"
    with pytest.raises(TypeError, match="dtype must be a floating type"):
        table.tensor(dtype=torch.int32)
    for twin in (copy.deepcopy(table), pickle.loads(pickle.dumps(table))):
        assert (twin.rows == table.rows).all()
        assert not twin.rows.flags.writeable
        assert twin.method == "ddim"


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"timesteps": [0, 5]}, "descend strictly"),
        ({"timesteps": [5, 5]}, "descend strictly"),
        ({"timesteps": [5, -1]}, "end at 0 or above"),
        ({"timesteps": [5]}, "a StepTable needs"),
        ({"timesteps": [], "rows": np.zeros((0, 7)), "draws": []}, "a StepTable needs"),
        ({"rows": np.zeros((2, 8))}, r"a StepTable needs.*\(2, 8\)"),
        ({"draws": [True]}, "a StepTable needs"),
        ({"rows": [[0.0] * 7, [math.nan] * 7]}, "finite, the row at t = 0 is not"),
    ],
)
def test_a_table_that_cannot_be_run_is_refused(changed, words):
    fields = {"timesteps": [5, 0], "rows": np.zeros((2, 7)), "draws": [True, False], **changed}
    with pytest.raises(ValueError, match=words):
        StepTable("mine", **fields)


# Errors


@pytest.mark.parametrize("method", [ddpm, ddim, dpm_solver])
@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"num_steps": 0}, ValueError, r"num_steps must be in \[1, 1000\], got 0"),
        ({"num_steps": -3}, ValueError, "num_steps must be"),
        ({"num_steps": 1001}, ValueError, r"num_steps must be in \[1, 1000\], got 1001"),
        ({"num_steps": 50.0}, TypeError, r"num_steps must be an integer, got 50.0 \(float\)"),
        ({"num_steps": True}, TypeError, "num_steps must be an integer"),
        ({"num_steps": "50"}, TypeError, "num_steps must be an integer"),
        (
            {"prediction": "sample"},
            ValueError,
            "prediction must be one of 'epsilon', 'x0', 'v', 'mean', got 'sample'",
        ),
        ({"prediction": None}, ValueError, "prediction must be one of"),
        (
            {"spacing": "even"},
            ValueError,
            "spacing must be one of 'leading', 'linspace', 'trailing', OpenAI's",
        ),
        ({"spacing": ""}, ValueError, "spacing must be one of"),
        ({"spacing": "50x"}, ValueError, "section_counts must be"),
        ({"spacing": "10,,5"}, ValueError, "section_counts must be"),
        ({"spacing": "0"}, ValueError, "section_counts must be"),
        ({"spacing": "10,-5"}, ValueError, "section_counts must be"),
        ({"spacing": "ddim"}, ValueError, "section_counts must be"),
        ({"spacing": "ddim10,10"}, ValueError, "section_counts must be"),
        ({"spacing": "ddim51"}, ValueError, "no integer stride takes exactly 51 of 1000"),
        ({"spacing": "600,1"}, ValueError, "section 0 has 500 timesteps, not 600"),
        ({"spacing": "50", "num_steps": 49}, ValueError, "num_steps is 49 but spacing '50' has 50"),
        ({"spacing": [3, 2, 1], "num_steps": 2}, ValueError, r"num_steps is 2 but spacing \[3, 2, 1\] has 3"),
        ({"spacing": 50}, TypeError, "a count belongs in num_steps"),
        ({"spacing": None}, TypeError, "spacing must be a name or"),
        ({"spacing": {3, 2, 1}}, TypeError, "spacing must be a name or"),
        ({"spacing": []}, ValueError, "at least one timestep"),
        ({"spacing": [1, 2, 3]}, ValueError, "strictly descending, got 1 then 2 from entry 0"),
        ({"spacing": [10, 15, 20]}, ValueError, "section counts are given as one string"),
        ({"spacing": [5, 5]}, ValueError, "strictly descending"),
        ({"spacing": [1000, 5]}, ValueError, r"spacing\[0\] must be in \[0, 999\], got 1000"),
        ({"spacing": [5, -1]}, ValueError, r"spacing\[1\] must be in \[0, 999\], got -1"),
        ({"spacing": [5.0, 1.0]}, TypeError, r"spacing\[0\] must be an integer"),
        ({"spacing": [True, False]}, TypeError, r"spacing\[0\] must be an integer"),
        ({"spacing": np.array([5.0, 1.0])}, TypeError, r"spacing\[0\] must be an integer"),
        ({"spacing": np.array([[5, 1]])}, TypeError, r"spacing\[0\] must be an integer"),
        ({"steps_offset": -1}, ValueError, "steps_offset must be at least 0"),
        ({"steps_offset": 1, "spacing": "trailing"}, ValueError, "steps_offset is for 'leading' spacing"),
        ({"steps_offset": 1, "spacing": "50"}, ValueError, "steps_offset is for 'leading' spacing"),
        ({"steps_offset": 0.5}, TypeError, "steps_offset must be an integer"),
        (
            {"steps_offset": 20, "spacing": "leading", "num_steps": 999},
            ValueError,
            "steps_offset must keep t below",
        ),
        (
            {"schedule": np.linspace(1e-4, 0.02, 10)},
            TypeError,
            "schedule must be a ddpm_fast Schedule, got ndarray",
        ),
    ],
)
def test_bad_arguments_are_refused_by_name(method, arguments, error, words):
    with pytest.raises(error, match=words):
        method(**{"schedule": LINEAR, **({} if "spacing" in arguments else {"num_steps": 50}), **arguments})


@pytest.mark.parametrize(
    ("method", "arguments", "error", "words"),
    [
        (
            ddpm,
            {"variance": "learned"},
            ValueError,
            "variance must be one of 'fixed_small', 'fixed_large', 'learned_range'",
        ),
        (ddim, {"eta": -0.1}, ValueError, r"eta must be in \[0, 1\], got -0.1"),
        (ddim, {"eta": 1.1}, ValueError, r"eta must be in \[0, 1\]"),
        (ddim, {"eta": math.nan}, ValueError, r"eta must be in \[0, 1\], got nan"),
        (ddim, {"eta": "0"}, TypeError, "eta must be a number"),
        (ddim, {"eta": True}, TypeError, "eta must be a number"),
        (ddim, {"use_clipped_out": 1}, TypeError, "use_clipped_out must be a bool"),
        (ddim, {"final_alpha_cumprod": 0.5}, ValueError, r"final_alpha_cumprod must be in \[0.9999, 1\]"),
        (ddim, {"final_alpha_cumprod": 1.5}, ValueError, "final_alpha_cumprod must be in"),
        (ddim, {"final_alpha_cumprod": math.nan}, ValueError, "final_alpha_cumprod must be in"),
        (dpm_solver, {"order": 3}, ValueError, r"order must be in \[1, 2\], got 3"),
        (dpm_solver, {"order": 2.0}, TypeError, "order must be an integer"),
        (dpm_solver, {"num_steps": 1000}, ValueError, r"num_steps must be in \[1, 999\] for dpm_solver"),
    ],
)
def test_bad_options_are_refused_by_name(method, arguments, error, words):
    with pytest.raises(error, match=words):
        method(**{"schedule": LINEAR, "num_steps": 50, **arguments})


def test_unknown_arithmetic_is_refused():
    with pytest.raises(ValueError, match="arithmetic must be one of 'float64', 'float32', got 'float16'"):
        ddpm(LINEAR, 50, arithmetic="float16")
