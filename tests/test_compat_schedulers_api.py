"""What our schedulers keep of diffusers' around a step: inputs, draws, errors, saving; and `step_table`."""

from __future__ import annotations

import copy
import importlib
import inspect
import pickle
import sys

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install ddpm_fast[test]")

from diffusers.schedulers import scheduling_ddim, scheduling_ddpm  # noqa: E402
from op_cases import check_error_rule  # noqa: E402
from test_graph_safety import Refuse  # noqa: E402

from ddpm_fast import Schedule, ops, steps  # noqa: E402
from ddpm_fast.compat import diffusers as ours  # noqa: E402
from ddpm_fast.compat.diffusers import schedulers as our_module  # noqa: E402
from ddpm_fast.compat.diffusers.tables import NotATable, ddim_rows, step_table  # noqa: E402

# numpy about diffusers, when it lays out sigmas
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

NAMES = ("DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler")
SHAPE = (3, 3, 8, 8)
HALVES = (torch.float16, torch.bfloat16)


def pair(name: str, N: int | None = 10, **config):
    """(ours, diffusers') with one config, and N steps laid out."""
    mine, theirs = getattr(ours, name)(**config), getattr(diffusers, name)(**config)
    if N is not None:
        mine.set_timesteps(N)
        theirs.set_timesteps(N)
    return mine, theirs


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(count: int, shape=SHAPE, dtype=torch.float32, seed: int = 5):
    generator = seeded(seed)
    return tuple(torch.randn(shape, generator=generator).to(dtype) for _ in range(count))


X, OUT = normal(2)


def options(name: str) -> dict:
    return {"eta": 1.0} if name == "DDIMScheduler" else {}


def near(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert got.dtype == expected.dtype and got.shape == expected.shape
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance * max(1.0, expected.abs().max().item()))


@pytest.fixture
def only_ours(monkeypatch):
    """diffusers' own steps refuse to run."""

    def refuse(*args, **kwargs):
        raise AssertionError("diffusers' own code ran")

    for name in NAMES:
        for method in ("step", "add_noise", "get_velocity"):
            if hasattr(getattr(diffusers, name), method):
                monkeypatch.setattr(getattr(diffusers, name), method, refuse)


# A whole run


def run(scheduler, believable: bool, generator=None, **step):
    """A loop over a sample and a network that diffusers' scheduler tests use in spirit: exact, no weights."""
    count = 4 * 3 * 8 * 8
    x = (torch.arange(count).reshape(3, 8, 8, 4) / count).permute(3, 0, 1, 2).contiguous()
    for t in scheduler.timesteps:
        out = x * t / (t + 1) if believable else 0.1 * torch.sin(7 * x)
        x = scheduler.step(out, t, x, generator=generator, **step).prev_sample
    return x


@pytest.mark.parametrize("believable", [True, False])
@pytest.mark.parametrize(
    ("name", "N", "config", "step"),
    [
        ("DDPMScheduler", None, {}, {}),
        ("DDPMScheduler", 50, {"prediction_type": "v_prediction", "variance_type": "fixed_large"}, {}),
        ("DDPMScheduler", 50, {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True,
                               "prediction_type": "v_prediction"}, {}),
        ("DDIMScheduler", 10, {"clip_sample": True}, {"eta": 0.0}),
        ("DDIMScheduler", 50, {"set_alpha_to_one": False, "beta_start": 0.01}, {"eta": 0.7}),
        ("DDIMScheduler", 30, {"timestep_spacing": "linspace"}, {"use_clipped_model_output": True}),
        ("DPMSolverMultistepScheduler", 10, {}, {}),
        ("DPMSolverMultistepScheduler", 25, {"solver_type": "heun", "use_karras_sigmas": True}, {}),
        ("DPMSolverMultistepScheduler", 10, {"solver_order": 3}, {}),
        ("DPMSolverMultistepScheduler", 10, {"algorithm_type": "sde-dpmsolver++"}, {}),
    ],
)  # fmt: skip
def test_a_whole_run(name, N, config, step, believable, one_thread):
    mine, theirs = pair(name, N, **config)
    generators = seeded(), seeded()
    got, expected = (run(s, believable, g, **step) for s, g in zip((mine, theirs), generators, strict=True))
    assert torch.equal(generators[0].get_state(), generators[1].get_state())
    assert abs(got.abs().sum() - expected.abs().sum()) < 1e-2  # diffusers' own tolerances
    assert abs(got.abs().mean() - expected.abs().mean()) < 1e-3
    near(got, expected, 1e-4)


# Inputs of a step


@pytest.mark.parametrize("dtype", [*HALVES, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_other_dtypes_are_nearer_to_the_truth(name, dtype, monkeypatch):
    """Truth is diffusers' step in float64, on the inputs and the noise as they were rounded."""
    x, out, z = normal(3, dtype=dtype)
    for module in (scheduling_ddpm, scheduling_ddim, our_module):
        monkeypatch.setattr(module, "randn_tensor", lambda *_, dtype, **__: z.to(dtype))
    for k in (0, 5, 9):
        mine, theirs = pair(name)
        exact = pair(name)[1]
        if name == NAMES[2]:
            for scheduler in (mine, theirs, exact):
                scheduler._step_index, scheduler.lower_order_nums = k, 2
            mine.model_outputs, theirs.model_outputs, exact.model_outputs = [z, z], [z, z], [z.double()] * 2
        t = theirs.timesteps[k]
        got = mine.step(out, t, x, **options(name)).prev_sample
        eager = theirs.step(out, t, x, **options(name)).prev_sample
        truth = exact.step(out.double(), t, x.double(), **options(name)).prev_sample
        assert got.dtype == eager.dtype == dtype
        if name == NAMES[2] and dtype == torch.float64:  # there diffusers rounds the sample to float32
            near(got, eager, 1e-6)
        else:
            check_error_rule(got, eager, truth)


@pytest.mark.parametrize("name", NAMES[:2])
@pytest.mark.parametrize("count", [1, 3, 2])
def test_a_list_of_generators(name, count):
    x, out = normal(2)
    results = []
    for scheduler in pair(name):
        generators = [seeded(k) for k in range(count)]
        if count == 2:
            with pytest.raises(IndexError):
                scheduler.step(out, scheduler.timesteps[2], x, generator=generators, **options(name))
            return
        step = scheduler.step(out, scheduler.timesteps[2], x, generator=generators, **options(name))
        results.append((step.prev_sample, [g.get_state() for g in generators]))
    (got, states), (expected, their_states) = results
    near(got, expected)
    assert all(map(torch.equal, states, their_states))


@pytest.mark.parametrize("kind", [int, np.int64, torch.tensor, lambda t: torch.tensor([t])])
@pytest.mark.parametrize("name", NAMES[:2])
def test_kinds_of_a_timestep(name, kind, only_ours):
    x, out = normal(2)
    mine = pair(name)[0]
    expected = mine.step(out, mine.timesteps[4], x, generator=seeded(), **options(name))
    got = mine.step(
        out, kind(int(mine.timesteps[4])), x, generator=seeded(), **options(name), return_dict=False
    )
    assert isinstance(got, tuple)
    assert torch.equal(got[0], expected.prev_sample) and torch.equal(got[1], expected.pred_original_sample)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("config", [{}, {"thresholding": True, "sample_max_value": 1.5}])
@pytest.mark.parametrize("name", NAMES[:2])
def test_a_timestep_for_each_sample(name, config, dtype, monkeypatch, only_ours):
    x, out, z = normal(3, dtype=dtype)
    noise = [z]
    monkeypatch.setattr(our_module, "randn_tensor", lambda *_, **__: noise[0])
    mine = pair(name, **config)[0]
    t = mine.timesteps[[0, 4, 9]]
    got = mine.step(out, t, x, **options(name))
    for k in range(3):
        one = slice(k, k + 1)
        noise[0] = z[one]
        expected = mine.step(out[one], t[k], x[one], **options(name))
        assert torch.equal(got.prev_sample[one], expected.prev_sample)
        assert torch.equal(got.pred_original_sample[one], expected.pred_original_sample)
    with pytest.raises(IndexError, match="has no 901"):
        mine.step(out, torch.tensor([900, 901, 0]), x, **options(name))


def test_custom_timesteps(only_ours, monkeypatch):
    x, out = normal(2)
    times = [100, 87, 50, 1, 0]
    mine, theirs = pair("DDPMScheduler", None)
    mine.set_timesteps(timesteps=times)
    theirs.set_timesteps(timesteps=times)
    got = [mine.step(out, t, x, generator=seeded()).prev_sample for t in times]
    monkeypatch.undo()
    for t, mine_at_t in zip(times, got, strict=True):
        near(mine_at_t, theirs.step(out, t, x, generator=seeded()).prev_sample)


def test_of_equal_timesteps_the_first_is_meant():
    mine, theirs = pair("DDPMScheduler", 4)
    for scheduler in (mine, theirs):
        scheduler.timesteps = torch.tensor([900, 500, 500, 100])
    expected = theirs.step(OUT, 500, X, generator=seeded()).prev_sample
    for t in (500, mine.timesteps[1], mine.timesteps[2]):
        near(mine.step(OUT, t, X, generator=seeded()).prev_sample, expected)


@pytest.mark.parametrize("bound", [1.0, 0.7])
def test_a_clipped_x0_is_the_bound_itself(bound, only_ours):
    mine = pair("DDIMScheduler", 1000, clip_sample_range=bound, beta_schedule="scaled_linear")[0]
    for t in mine.timesteps[:600:3]:
        x0 = mine.step(-4 * X.sign(), t, 9 * X.sign()).pred_original_sample
        assert torch.equal(x0, X.sign() * bound)


@pytest.mark.parametrize("scheduler", ["mine", "theirs"])
def test_bad_timesteps_raise_as_in_diffusers(scheduler):
    chosen = dict(zip(("mine", "theirs"), pair("DDPMScheduler", None), strict=True))[scheduler]
    for bad in ({"timesteps": [100, 100, 0]}, {"timesteps": [1000]}, {"num_inference_steps": 1001},
                {"num_inference_steps": 5, "timesteps": [1]}):  # fmt: skip
        with pytest.raises(ValueError):
            chosen.set_timesteps(**bad)


def test_a_gradient_passes():
    for name in NAMES:
        grads = []
        for scheduler in pair(name):
            x, out = (v.requires_grad_() for v in normal(2))
            scheduler.step(
                out, scheduler.timesteps[0], x, generator=seeded()
            ).prev_sample.square().sum().backward()
            grads.append((x.grad, out.grad))
        for got, expected in zip(*grads, strict=True):
            near(got, expected, 1e-4)


def test_a_run_in_inference_mode_leaves_nothing_that_breaks_a_gradient():
    for name in NAMES[:2]:
        with torch.inference_mode():
            mine = pair(name)[0]
            x = mine.step(OUT, mine.timesteps[0], X).prev_sample
            mine.add_noise(x, OUT, torch.tensor([5, 6, 7]))
        x, out = (v.requires_grad_() for v in normal(2))
        loss = (
            mine.step(out, 800, x).prev_sample.sum() + mine.add_noise(x, out, torch.tensor([5, 6, 7])).sum()
        )
        loss.backward()
        assert x.grad.isfinite().all()


def test_a_trace_goes_through():
    mine, theirs = pair("DDIMScheduler")
    times = torch.tensor([5, 6, 7])
    traced = torch.compile(
        lambda x, out: (mine.step(out, 900, x).prev_sample, mine.add_noise(x, out, times)),
        backend="eager", fullgraph=True,
    )  # fmt: skip
    step, noised = traced(X, OUT)
    near(step, theirs.step(OUT, 900, X).prev_sample)
    near(noised, theirs.add_noise(X, OUT, times))


def test_torch_func_and_forward_mode_derive_as_in_diffusers():
    x, dx = normal(2, seed=6)
    times = torch.tensor([5, 6, 7])

    def derivatives(scheduler):
        def step(x):
            out = scheduler.step(OUT, scheduler.timesteps[3], x, generator=seeded(), return_dict=False)
            return out[0].square()

        def noised(x):
            return scheduler.add_noise(x, OUT, times).square()

        for f in (step, noised):
            yield torch.func.jvp(f, (x,), (dx,))[1]
            yield torch.func.grad(lambda x, f=f: f(x).sum())(x)
            with forward_ad.dual_level():
                tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(x, dx))).tangent
            yield tangent
        yield torch.func.vmap(lambda x, out: scheduler.add_noise(x, out, times[:1]))(X[:, None], OUT[:, None])

    for name in NAMES:
        mine, theirs = (derivatives(scheduler) for scheduler in pair(name))
        for got, expected in zip(mine, theirs, strict=True):
            assert expected.any()
            near(got, expected, 1e-4)


# Bad input


BAD = {
    "timestep of no step": ("DDPMScheduler", {}, (OUT, 5, X), {}),
    "timestep past T": ("DDIMScheduler", {}, (OUT, 1000, X), {}),
    "float timestep": ("DDPMScheduler", {}, (OUT, torch.tensor(900.0), X), {}),
    "shapes": ("DDIMScheduler", {}, (OUT[:, :2], 900, X), {}),
    "channels": ("DDPMScheduler", {}, (torch.cat([OUT, OUT], 1), 900, X), {}),
    "no variance": ("DDPMScheduler", {"variance_type": "learned_range"}, (OUT, 900, X), {}),
    "prediction": ("DDPMScheduler", {"prediction_type": "x0"}, (OUT, 900, X), {}),
    "generator and noise": ("DDIMScheduler", {}, (OUT, 900, X),
                            {"eta": 1.0, "generator": seeded(), "variance_noise": OUT}),
    "times of another batch": ("DDIMScheduler", {}, (OUT, torch.tensor([900, 800]), X), {}),
    "solver's shapes": ("DPMSolverMultistepScheduler", {}, (OUT[:, :2], 999, X), {}),
    "solver's prediction": ("DPMSolverMultistepScheduler", {"prediction_type": "x0"}, (OUT, 999, X), {}),
}  # fmt: skip


@pytest.mark.parametrize("name,config,inputs,step", BAD.values(), ids=BAD)
def test_bad_input_raises_as_in_diffusers(name, config, inputs, step):
    mine, theirs = pair(name, **config)
    with pytest.raises(Exception) as expected:
        theirs.step(*inputs, **step)
    with pytest.raises(expected.type):
        mine.step(*inputs, **step)


@pytest.mark.parametrize("name", NAMES[1:])
def test_a_step_before_set_timesteps_raises(name):
    for scheduler in pair(name, None):
        with pytest.raises(ValueError, match="set_timesteps"):
            scheduler.step(OUT, 5, X)


def test_tensors_that_are_not_alike_are_left_to_diffusers():
    half = OUT.half()
    for name in NAMES:
        mine, theirs = pair(name)
        t = theirs.timesteps[3]
        got, expected = (s.step(half, t, X, generator=seeded()).prev_sample for s in (mine, theirs))
        assert torch.equal(got, expected) and got.dtype == expected.dtype


# The forward process


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
@pytest.mark.parametrize("times", [[0, 1, 999], [500], 3])
@pytest.mark.parametrize("name", NAMES)
def test_the_forward_process(name, times, dtype, only_ours, monkeypatch):
    mine, theirs = pair(name, None if name != NAMES[2] else 1000, beta_schedule="scaled_linear")
    x, noise = normal(2, dtype=dtype)
    t = torch.tensor(times, dtype=torch.int32)
    exact = pair(name, None if name != NAMES[2] else 1000, beta_schedule="scaled_linear")[1]
    if name == NAMES[2]:
        t = t.reshape(-1)
    for method in ("add_noise", "get_velocity")[: 1 if name == NAMES[2] else 2]:
        got = getattr(mine, method)(x, noise, t)
        monkeypatch.undo()
        eager = getattr(theirs, method)(x, noise, t.long())
        truth = getattr(exact, method)(x.double(), noise.double(), t.long())
        assert got.dtype == eager.dtype == dtype
        check_error_rule(got, eager, truth)
        if dtype == torch.float32:
            near(got, eager)
        elif dtype in HALVES:  # nearer than a level of half precision allows
            assert (got - truth).abs().max() < 4 * torch.finfo(dtype).eps


def test_dpm_solver_noises_at_its_own_levels():
    x, noise = normal(2)
    for config in ({}, {"use_karras_sigmas": True}, {"use_flow_sigmas": True}, None):
        mine, theirs = pair("DPMSolverMultistepScheduler", 7, **config or {})
        for scheduler in (mine, theirs) if config is None else ():
            scheduler.set_timesteps(timesteps=[900, 500, 500, 500, 100])  # the second of equal ones is meant
            scheduler.sigmas *= torch.arange(6).exp()
        t = torch.tensor([int(theirs.timesteps[0]), int(theirs.timesteps[3]), 998])
        near(mine.add_noise(x, noise, t), theirs.add_noise(x, noise, t))
        for scheduler in (mine, theirs):
            scheduler.set_begin_index(2)
        near(mine.add_noise(x, noise, t), theirs.add_noise(x, noise, t))


def test_bad_input_of_the_forward_process_raises_as_in_diffusers():
    for t in (torch.tensor([0.5, 1.0, 2.0]), torch.tensor([0, 1000, 0])):
        for scheduler in pair("DDPMScheduler"):
            with pytest.raises(IndexError):
                scheduler.add_noise(X, OUT, t)
    for scheduler in pair("DDPMScheduler"):
        with pytest.raises(RuntimeError):
            scheduler.add_noise(X, OUT[:, :2], torch.tensor([0, 1, 2]))
    for scheduler in pair("DPMSolverMultistepScheduler"):
        with pytest.raises(TypeError, match="0-d"):
            scheduler.add_noise(X, OUT, torch.tensor(3))


# Waiting for a device, and what is kept


@pytest.mark.parametrize("name", NAMES)
def test_a_run_asks_the_host_nothing_after_its_first_step(name):
    x, out = normal(2)
    mine = pair(name)[0]
    mine.step(out, mine.timesteps[0], x)
    mine.add_noise(x, out, torch.tensor([5, 6, 7]))
    with Refuse():
        for t in mine.timesteps[1:]:
            x = mine.step(out, t, x, **dict.fromkeys(options(name), 0.0)).prev_sample
        mine.add_noise(x, out, torch.tensor([5, 6, 7]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", NAMES)
def test_a_run_on_a_gpu_waits_for_nothing_after_its_first_step(name):
    mine, theirs = pair(name)
    mine.set_timesteps(10, device="cuda")
    x, out = (v.cuda() for v in normal(2))
    generator = torch.Generator("cuda").manual_seed(0)
    times, got = mine.timesteps, []
    got.append(mine.step(out, times[0], x, generator=generator, **options(name)).prev_sample)
    each = times[[2, 4, 9]]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for t in times[1:]:
            got.append(mine.step(out, t, x, generator=generator, **options(name)).prev_sample)
        if name != NAMES[2]:
            mine.step(out, each, x, generator=generator, **options(name))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    generator.manual_seed(0)
    for t, x_next in zip(theirs.timesteps, got, strict=True):
        near(x_next, theirs.step(out, t, x, generator=generator, **options(name)).prev_sample)
    if name != NAMES[2]:
        stranger = torch.tensor([900, 901, 0], device="cuda")
        x_next = mine.step(out, stranger, x, generator=generator, **options(name)).prev_sample
        assert x_next[1].isnan().all() and x_next[[0, 2]].isfinite().all()
        mine.add_noise(x, out, each)
        torch.cuda.set_sync_debug_mode("error")
        try:
            noised = mine.add_noise(x, out, each)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert mine.alphas_cumprod.is_cuda
        near(noised, theirs.add_noise(x, out, each))


CHANGES = {
    "another run": lambda s: s.set_timesteps(7),
    "timesteps replaced": lambda s: setattr(s, "timesteps", s.timesteps[2:] - 3),
    "timesteps written to": lambda s: s.timesteps.sub_(5),
    "levels replaced": lambda s: setattr(s, "alphas_cumprod", s.alphas_cumprod**1.5),
    "levels written to": lambda s: s.alphas_cumprod.mul_(0.9),
    "config": lambda s: s.register_to_config(prediction_type="v_prediction"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", NAMES[:2])
def test_what_is_kept_follows_every_change(name, change):
    x, out = normal(2)
    mine, theirs = pair(name)
    mine.step(out, mine.timesteps[3], x)
    mine.add_noise(x, out, torch.tensor([5, 6, 7]))
    for scheduler in (mine, theirs):
        CHANGES[change](scheduler)
    t = theirs.timesteps[2]
    got, expected = (
        s.step(out, t, x, generator=seeded(), **options(name)).prev_sample for s in (mine, theirs)
    )
    near(got, expected)
    t = torch.tensor([5, 6, 7])
    near(mine.add_noise(x, out, t), theirs.add_noise(x, out, t))


def test_the_tables_are_made_once():
    mine = pair("DDPMScheduler")[0]
    mine.step(OUT, 900, X)
    mine.add_noise(X, OUT, torch.tensor([1, 2, 3]))
    kept = dict(mine._kept_run[1]), mine._kept_levels[1]
    mine.step(OUT, 800, X)
    mine.get_velocity(X, OUT, torch.tensor([1, 2, 3]))
    assert len(kept[0]) == 1 and kept == (mine._kept_run[1], mine._kept_levels[1])


def test_an_eta_for_each_step_lays_out_few_runs(monkeypatch):
    laid_out = []

    def rows(*args):
        laid_out.append(args)
        return ddim_rows(*args)

    monkeypatch.setattr(our_module, "ddim_rows", rows)
    mine, theirs = pair("DDIMScheduler", 20)
    for _ in range(2):
        for i, t in enumerate(theirs.timesteps):
            for eta in (0.0, i / 20):
                got, expected = (
                    s.step(OUT, t, X, eta=eta, generator=seeded()).prev_sample for s in (mine, theirs)
                )
                near(got, expected)
    assert len(laid_out) == 4
    mine.set_timesteps(20)
    mine.step(OUT, 900, X, eta=0.9)
    assert len(laid_out) == 5


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda s: pickle.loads(pickle.dumps(s))])
@pytest.mark.parametrize("name", NAMES)
def test_a_copy_goes_on_by_itself(name, copied):
    x, out = normal(2)
    mine = pair(name)[0]
    mine.step(out, mine.timesteps[0], x)
    twin = copied(mine)
    assert not any(name.startswith("_kept") for name in vars(twin))
    assert type(twin) is type(mine) and dict(twin.config) == dict(mine.config)
    got, expected = (s.step(out, s.timesteps[1], x, generator=seeded()).prev_sample for s in (twin, mine))
    assert torch.equal(got, expected)


# Quirks and their corrections


def test_fixed_large_log_says_what_is_wrong():
    mine, theirs = pair("DDPMScheduler", variance_type="fixed_large_log")
    assert theirs.step(OUT, 900, X).prev_sample.isnan().all()
    with pytest.raises(ValueError, match=r"fixed_large_log.*NaN.*strict = False"):
        mine.step(OUT, 900, X)
    mine.strict = False
    large = pair("DDPMScheduler", variance_type="fixed_large")[1]
    got, expected = (s.step(OUT, 900, X, generator=seeded()).prev_sample for s in (mine, large))
    near(got, expected)


def test_not_strict_adds_no_noise_to_the_picture():
    mine, theirs = pair("DDPMScheduler", 30, timestep_spacing="trailing", variance_type="fixed_large")
    last, generators = theirs.timesteps[-1], (seeded(), seeded())
    assert last > 0
    quirk = mine.step(OUT, last, X, generator=seeded()).prev_sample
    near(quirk, theirs.step(OUT, last, X, generator=generators[0]).prev_sample)
    mine.strict = False
    got = mine.step(OUT, last, X, generator=generators[1]).prev_sample
    near(got, mine.step(OUT, last, X).pred_original_sample)  # the mean of the last step is x0
    assert (quirk - got).abs().max() > 0.01
    assert torch.equal(generators[0].get_state(), generators[1].get_state())


@pytest.mark.parametrize(("spacing", "N"), [("linspace", 30), ("trailing", 13)])
def test_not_strict_ends_where_the_next_step_starts(spacing, N):
    mine, theirs = pair("DDIMScheduler", N, timestep_spacing=spacing)
    exact = steps.ddim(Schedule.linear(), N, spacing=spacing)
    assert np.abs(step_table(mine)[0].rows - exact.rows).max() > 1e-3
    assert np.array_equal(step_table(mine)[0].rows, step_table(theirs)[0].rows)
    mine.strict = False
    assert np.abs(step_table(mine)[0].rows - exact.rows).max() < 3e-5  # of float32 levels
    i, t = N // 2, mine.timesteps[N // 2]
    near(mine.step(OUT, t, X).prev_sample, ops.posterior_step(X, OUT, exact, i)[0], 3e-5)


def test_a_subclass_with_a_variance_of_its_own_has_it():
    def variance(self, t, predicted_variance=None, variance_type=None):
        return torch.tensor(0.25)

    mine, theirs = (
        type("Own", (base,), {"_get_variance": variance})()
        for base in (ours.DDPMScheduler, diffusers.DDPMScheduler)
    )
    got, expected = (s.step(OUT, 900, X, generator=seeded()).prev_sample for s in (mine, theirs))
    assert torch.equal(got, expected)
    assert mine.__module__ != "diffusers"
    with pytest.raises(NotATable, match="Own has a _get_variance of its own"):
        step_table(mine)


# Their classes and ours


@pytest.mark.parametrize("name", NAMES)
def test_signatures_are_theirs(name):
    mine, theirs = getattr(ours, name), getattr(diffusers, name)
    assert issubclass(mine, theirs) and mine.__name__ == name
    for method in ("__init__", "step", "set_timesteps", "add_noise"):
        got, expected = (inspect.signature(getattr(c, method)).parameters for c in (mine, theirs))
        assert [(p.name, p.default, p.kind) for p in got.values()] == [
            (p.name, p.default, p.kind) for p in expected.values()
        ]


@pytest.mark.parametrize("name", NAMES)
def test_what_either_writes_both_read(name, tmp_path):
    mine, theirs = pair(name, None, beta_schedule="scaled_linear", prediction_type="v_prediction")
    mine.save_pretrained(tmp_path / "mine")
    theirs.save_pretrained(tmp_path / "theirs")
    file = "scheduler_config.json"
    assert (tmp_path / "mine" / file).read_text() == (tmp_path / "theirs" / file).read_text()
    for source in ("mine", "theirs"):
        for module in (ours, diffusers):
            read = getattr(module, name).from_pretrained(tmp_path / source)
            assert type(read) is getattr(module, name)
            assert dict(read.config)["prediction_type"] == "v_prediction"
            assert torch.equal(read.alphas_cumprod, theirs.alphas_cumprod)
    assert type(getattr(ours, name).from_config(theirs.config)) is getattr(ours, name)
    assert type(getattr(diffusers, name).from_config(mine.config)) is getattr(diffusers, name)
    assert type(ours.DDIMScheduler.from_config(mine.config)) is ours.DDIMScheduler


@pytest.mark.parametrize("name", NAMES)
def test_a_pipeline_with_our_scheduler_is_written_for_everyone(name, tmp_path):
    unet = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(8,), down_block_types=("DownBlock2D",), layers_per_block=1,
        up_block_types=("UpBlock2D",), norm_num_groups=4, add_attention=False,
    )  # fmt: skip
    mine, theirs = pair(name, None)
    for scheduler, folder in ((mine, "mine"), (theirs, "theirs")):
        diffusers.DDPMPipeline(unet, scheduler).save_pretrained(tmp_path / folder)
    index = (tmp_path / "mine" / "model_index.json").read_text()
    assert index == (tmp_path / "theirs" / "model_index.json").read_text()
    assert "ddpm_fast" not in index
    read = diffusers.DDPMPipeline.from_pretrained(tmp_path / "mine")
    assert type(read.scheduler) is getattr(diffusers, name)
    kept = diffusers.DDPMPipeline.from_pretrained(tmp_path / "theirs", scheduler=mine)
    assert kept.scheduler is mine


def test_without_diffusers_the_error_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("ddpm_fast.compat.diffusers")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"pip install ddpm_fast\[diffusers\]"):
        importlib.import_module("ddpm_fast.compat.diffusers")


# step_table


RUNS = [
    ("DDPMScheduler", 10, {}, {}),
    ("DDPMScheduler", 30, {"timestep_spacing": "trailing", "variance_type": "fixed_large"}, {}),
    ("DDPMScheduler", 7, {"variance_type": "learned_range", "clip_sample_range": 0.7}, {}),
    ("DDPMScheduler", None, {"num_train_timesteps": 20, "variance_type": "fixed_small_log"}, {}),
    ("DDIMScheduler", 30, {"timestep_spacing": "linspace", "thresholding": True}, {"eta": 0.5}),
    ("DDIMScheduler", 10, {"clip_sample": False}, {}),
    ("DDIMScheduler", 10, {"set_alpha_to_one": False, "steps_offset": 1}, {"use_clipped_model_output": True}),
    ("DPMSolverMultistepScheduler", 10, {}, {}),
    ("DPMSolverMultistepScheduler", 20, {"final_sigmas_type": "sigma_min", "solver_type": "heun"}, {}),
    ("DPMSolverMultistepScheduler", 9, {"solver_order": 1, "prediction_type": "v_prediction"}, {}),
]


@pytest.mark.parametrize(("name", "N", "config", "step"), RUNS)
def test_the_table_of_a_run_is_the_run(name, N, config, step, one_thread):
    mine, theirs = pair(name, N, **config)
    table, clip = step_table(theirs, **step)
    assert np.array_equal(step_table(mine, **step)[0].rows, table.rows)
    assert table.timesteps.tolist() == theirs.timesteps.tolist()
    x, *outs = normal(len(table) + 1)
    expected, x0, generator = x, None, seeded()
    for i, (t, out) in enumerate(zip(theirs.timesteps, outs, strict=True)):
        if table.learned_range:
            out = torch.cat([out, out.tanh()], 1)
        before = generator.get_state()
        noise = torch.randn(SHAPE, generator=generator.clone_state())
        expected = theirs.step(out, t, expected, generator=generator, **step).prev_sample
        assert table.draws[i] == (not torch.equal(before, generator.get_state()))
        x, x0 = ops.posterior_step(x, out, table, i, noise=noise, x0_prev=x0, clip=clip)
        near(x, expected, 5e-5)


REFUSED = {
    "thresholding": ("DDIMScheduler", 5, {"thresholding": True, "sample_max_value": 2.0}),
    "variance_type='learned'": ("DDPMScheduler", 5, {"variance_type": "learned"}),
    "not descend": ("DDPMScheduler", 61, {"timestep_spacing": "trailing"}),
    "t = 999 is not finite": (
        "DDPMScheduler",
        5,
        {"rescale_betas_zero_snr": True, "timestep_spacing": "linspace"},
    ),
    "set_timesteps": ("DDIMScheduler", None, {}),
    "algorithm_type": ("DPMSolverMultistepScheduler", 5, {"algorithm_type": "sde-dpmsolver++"}),
    "solver_order=3": ("DPMSolverMultistepScheduler", 5, {"solver_order": 3}),
    "prediction_type": ("DDPMScheduler", 5, {"prediction_type": "x0"}),
    "none of DDPM, DDIM": ("EulerDiscreteScheduler", 5, {}),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_no_table_says_why(reason):
    name, N, config = REFUSED[reason]
    scheduler = getattr(diffusers, name)(**config)
    if N is not None:
        scheduler.set_timesteps(N)
    with pytest.raises(NotATable, match=reason):
        step_table(scheduler)
