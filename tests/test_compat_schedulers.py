"""Our schedulers against diffusers' own, step by step: the same numbers, dtypes, draws and errors."""

from __future__ import annotations

import itertools

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install ddpm_fast[test]")

from ddpm_fast.compat import diffusers as ours  # noqa: E402

# numpy about diffusers, when it lays out sigmas
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SHAPE = (2, 3, 8, 8)
STEPS = (1, 2, 7, 10, 30, 50, 999, 1000)
TOLERANCE = 1e-5


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pair(name: str, **config):
    """(ours, diffusers') with one config."""
    return getattr(ours, name)(**config), getattr(diffusers, name)(**config)


def inputs(prediction: str, alpha: float, sigma: float, believable: bool, generator: torch.Generator):
    """(x, out): unrelated, or a noised picture and an output that says x0 to a few tenths."""
    x, out, error = (torch.randn(SHAPE, generator=generator) for _ in range(3))
    if believable:
        x0 = torch.rand(SHAPE, generator=generator) * 2 - 1
        x = alpha * x0 + sigma * x
        guess = x0 + 0.3 * error
        out = {
            "epsilon": (x - alpha * guess) / sigma,
            "v_prediction": (alpha * x - guess) / sigma,
            "flow_prediction": (x - guess) / sigma,
        }.get(prediction, guess)
    return x, out


def picks(timesteps) -> list[int]:
    """The first two steps, three of the middle, the last two."""
    N = len(timesteps)
    return sorted({k for k in (0, 1, N // 3, N // 2, 2 * N // 3, N - 2, N - 1) if 0 <= k < N})


def close(mine: torch.Tensor, theirs: torch.Tensor) -> None:
    assert mine.dtype == theirs.dtype and mine.device == theirs.device and mine.shape == theirs.shape
    assert torch.equal(mine.isnan(), theirs.isnan())
    finite = theirs.isfinite()
    bound = TOLERANCE * max(1.0, theirs[finite].abs().max().item() if finite.any() else 0.0)
    assert torch.equal(mine[~finite & ~theirs.isnan()], theirs[~finite & ~theirs.isnan()])
    error = (mine - theirs)[finite].abs().max().item() if finite.any() else 0.0
    assert error <= bound, f"{error:.2e} over {bound:.2e}"


def cycle(options: dict[str, tuple], crossed: tuple[str, ...], times: int):
    """Every combination of the `crossed` options, `times` times, each with other values of the rest."""
    rest = {name: itertools.cycle(values) for name, values in options.items() if name not in crossed}
    for _ in range(times):
        for values in itertools.product(*(options[name] for name in crossed)):
            yield dict(zip(crossed, values, strict=True)) | {name: next(it) for name, it in rest.items()}


CLIPS = (
    {},
    {"clip_sample": False},
    {"clip_sample_range": 0.5},
    {"thresholding": True},
    {"thresholding": True, "sample_max_value": 1.7, "dynamic_thresholding_ratio": 0.9},
)
SHARED = {
    "prediction_type": ("epsilon", "sample", "v_prediction"),
    "clip": CLIPS,
    "N": (*STEPS, 1000, 30, 13),
    "timestep_spacing": ("leading", "linspace", "trailing", "trailing", "linspace"),
    "beta_schedule": (
        "linear",
        "linear",
        "scaled_linear",
        "squaredcos_cap_v2",
        "linear",
        "scaled_linear",
        "linear",
    ),
    "rescale_betas_zero_snr": (False, False, True),
    "steps_offset": (0, 1),
}
DDPM = [
    *cycle(
        SHARED
        | {"variance_type": ("fixed_small", "fixed_small_log", "fixed_large", "learned_range", "learned")},
        ("variance_type", "prediction_type", "clip"),
        2,
    )
]
DDIM = [
    *cycle(
        SHARED
        | {
            "eta": (0.0, 0.5, 1.0),
            "use_clipped_model_output": (False, True),
            "set_alpha_to_one": (True, False),
        },
        ("prediction_type", "clip", "eta", "use_clipped_model_output"),
        2,
    )
]


def build(name, case):
    case = dict(case)
    N, clip, run = case.pop("N"), case.pop("clip"), {}
    for key in ("eta", "use_clipped_model_output"):
        if key in case:
            run[key] = case.pop(key)
    mine, theirs = pair(name, **case, **clip)
    if N == 1000 and case["timestep_spacing"] == "leading" and case["steps_offset"]:
        N = 999  # 1000 would start at t = 1000, and diffusers raises
    for scheduler in (mine, theirs):
        scheduler.set_timesteps(N)
    return mine, theirs, run


@pytest.mark.parametrize(
    ("name", "case"), [("DDPMScheduler", c) for c in DDPM] + [("DDIMScheduler", c) for c in DDIM]
)
def test_each_step_is_diffusers(name, case, one_thread):
    mine, theirs, run = build(name, case)
    channels = 2 if case.get("variance_type", "").startswith("learned") else 1
    generators = seeded(1), seeded(1)
    for believable in (False, True):
        data = seeded(2)
        for k in picks(theirs.timesteps):
            t = theirs.timesteps[k]
            alpha = theirs.alphas_cumprod[t].sqrt().item()
            x, out = inputs(case["prediction_type"], alpha, (1 - alpha**2) ** 0.5, believable, data)
            if channels == 2:
                out = torch.cat([out, torch.rand(SHAPE, generator=data) * 2 - 1], 1)
            expected = theirs.step(out, t, x, generator=generators[1], **run)
            got = mine.step(out, int(t) if k % 2 else mine.timesteps[k], x, generator=generators[0], **run)
            assert type(got) is type(expected)
            close(got.prev_sample, expected.prev_sample)
            close(got.pred_original_sample, expected.pred_original_sample)
    assert torch.equal(generators[0].get_state(), generators[1].get_state())


SIGMAS = (
    {},
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"use_lu_lambdas": True},
    {"use_flow_sigmas": True},
    {"final_sigmas_type": "sigma_min"},
    {"euler_at_final": True, "final_sigmas_type": "sigma_min"},
)
SOLVER = [
    *cycle(
        {
            "prediction_type": ("epsilon", "sample", "v_prediction", "flow_prediction"),
            "algorithm_type": (*["dpmsolver++"] * 12, "dpmsolver", *["dpmsolver++"] * 12, "sde-dpmsolver++"),
            "solver_order": (2, 1, 2, 2, 1, 2, 2, 1, 2, 3),
            "solver_type": ("midpoint", "heun"),
            "sigmas": SIGMAS,
            "N": (1, 2, 7, 10, 14, 30, 50, 999, 20),
            "timestep_spacing": ("linspace", "leading", "trailing"),
            "beta_schedule": ("linear", "scaled_linear", "linear", "squaredcos_cap_v2", "linear"),
            "lower_order_final": (True, False, True),
            "rescale_betas_zero_snr": (False, False, False, True),
            "variance_type": (None, None, "learned_range"),
            "clip": (
                *[{}] * 4,
                {"thresholding": True},
                *[{}] * 2,
                {"thresholding": True, "sample_max_value": 1.5},
            ),
        },
        ("prediction_type", "solver_type", "sigmas"),
        3,
    )
]


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
@pytest.mark.parametrize("case", SOLVER)
def test_each_step_of_dpm_solver_is_diffusers(case, one_thread):
    config = dict(case)
    N, sigmas, clip = config.pop("N"), config.pop("sigmas"), config.pop("clip")
    config |= sigmas | clip
    if config["prediction_type"] == "flow_prediction":
        config |= {"use_flow_sigmas": True, "algorithm_type": "dpmsolver++"}
    if config["algorithm_type"] == "dpmsolver":
        config["final_sigmas_type"] = "sigma_min"
    mine, theirs = pair("DPMSolverMultistepScheduler", **config)
    generators = seeded(1), seeded(1)
    for believable in (False, True):
        for scheduler in (mine, theirs):
            scheduler.set_timesteps(N)
        data = seeded(2)
        count = len(theirs.timesteps)
        for k in range(count):
            if 4 <= k < count - 3:  # the same jump in both
                mine._step_index = theirs._step_index = k + 1
                continue
            alpha, sigma = theirs._sigma_to_alpha_sigma_t(theirs.sigmas[k])
            x, out = inputs(config["prediction_type"], alpha.item(), sigma.item(), believable, data)
            if config["variance_type"] == "learned_range" and config["prediction_type"] == "epsilon":
                out = torch.cat([out, out], 1)
            try:
                expected = theirs.step(out, theirs.timesteps[k], x, generator=generators[1])
            except IndexError:  # of timesteps that repeat the first, diffusers starts at the second
                with pytest.raises(IndexError):
                    mine.step(out, mine.timesteps[k], x)
                break
            got = mine.step(out, mine.timesteps[k], x, generator=generators[0])
            assert type(got) is type(expected)
            close(got.prev_sample, expected.prev_sample)
            close(mine.model_outputs[-1], theirs.model_outputs[-1])
            assert mine.step_index == theirs.step_index
            assert mine.lower_order_nums == theirs.lower_order_nums
    assert torch.equal(generators[0].get_state(), generators[1].get_state())
