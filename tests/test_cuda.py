"""What only a CUDA device shows: the ops and the sampler there, against the CPU."""

from __future__ import annotations

import pytest
import torch
from op_cases import CASES, EAGER, cast, check_error_rule, tuple_of, upcast

from ddpm_fast import Sampler, Schedule, checkpoint, ops, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_ops_against_float64(case, generator):
    inputs = cast(case.inputs(generator), torch.float32)
    there = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    exact = tuple_of(getattr(reference, case.op)(**upcast(inputs)))
    eager = tuple_of(EAGER[case.op](**inputs))
    for g, e, x in zip(tuple_of(getattr(ops, case.op)(**there)), eager, exact, strict=True):
        assert g.is_cuda
        check_error_rule(g.cpu(), e, x)


@pytest.mark.parametrize("method", ["ddpm", "ddim", "dpm_solver"])
@pytest.mark.parametrize("noise", ["counter", "torch"])
def test_digits_equal_the_cpus(method, noise):
    model, schedule, _ = checkpoint.load(checkpoint.DIGITS)
    run = {"method": method, "num_steps": 10, "prediction": "v"}
    expected = Sampler(model, schedule, **run)(3, noise=noise)
    got = Sampler(model.cuda(), schedule, **run)(3, noise=noise)
    assert got.is_cuda
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-3, atol=1e-3)


def test_a_step_never_waits_for_the_device():
    sampler = Sampler(lambda x, t: x, Schedule.linear(), num_steps=10)
    x_T = torch.randn(2, 3, 8, 8, device="cuda")
    sampler(x_T=x_T)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run = sampler._start(2, None, 0, 0, x_T, None, "counter", False)
        with torch.inference_mode():
            for i in range(10):
                run.step(i)
    finally:
        torch.cuda.set_sync_debug_mode("default")
