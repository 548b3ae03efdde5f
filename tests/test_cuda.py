"""What only a CUDA device shows: each backend's kernels there, and the sampler, against the CPU."""

from __future__ import annotations

import itertools

import pytest
import torch
from op_cases import CASES, DTYPES, EAGER, cast, check_error_rule, tuple_of, upcast

from ddpm_fast import Sampler, Schedule, checkpoint, ops, reference
from ddpm_fast.ops import _dispatch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

LAYOUTS = ("contiguous", "channels_last")
ALL = list(itertools.product(CASES, DTYPES, LAYOUTS))
FIRSTS = {op: next(c for c in CASES if c.op == op) for op in EAGER}


def names(value) -> str:
    return getattr(value, "id", None) or str(value).removeprefix("torch.")


def there(inputs: dict) -> dict:
    return {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}


@pytest.fixture(params=["native", "triton"])
def backend(request) -> str:
    reason = _dispatch.why_not("group_norm_silu", request.param, "cuda", torch.float32)
    if reason is not None:
        pytest.skip(f"backend {request.param!r}: {reason}")
    return request.param


@pytest.mark.parametrize("case,dtype,layout", ALL, ids=names)
def test_ops_against_float64(case, dtype, layout, backend, generator, poisoned):
    inputs = cast(case.inputs(generator), dtype, layout)
    exact = tuple_of(getattr(reference, case.op)(**upcast(inputs)))
    eager = tuple_of(EAGER[case.op](**inputs))
    got = tuple_of(getattr(ops, case.op)(**there(inputs), backend=backend))
    for g, e, x in zip(got, eager, exact, strict=True):
        assert g.is_cuda and g.dtype == dtype
        check_error_rule(g.cpu(), e, x)
    if case.op != "posterior_step":
        x = next(v for v in inputs.values() if isinstance(v, torch.Tensor))
        layout = reference.memory_format(x)
        assert all(g.cpu().is_contiguous(memory_format=layout) for g in got)


@pytest.mark.parametrize("case", [c for c in CASES if c.op == "posterior_step"], ids=names)
@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("stores_x0", [True, False])
def test_step_in_place_is_the_step(case, dtype, stores_x0, backend, generator):
    inputs = there(cast(case.inputs(generator), dtype))
    x_next, x0_next = ops.posterior_step(**inputs, backend=backend)
    x, x0_prev = inputs.pop("x").clone(), inputs.pop("x0_prev")
    if not stores_x0 and x0_prev is not None:
        pytest.skip("a history needs the buffer")
    x0 = torch.zeros_like(x) if x0_prev is None else x0_prev.clone()
    assert ops.posterior_step_(x, x0=x0 if stores_x0 else None, **inputs, backend=backend) is x
    assert torch.equal(x, x_next)
    assert not stores_x0 or torch.equal(x0, x0_next)


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", ["ddpm", "learned", "learned-several-spans"])
def test_float32_state_takes_half_out_in_any_layout(name, layout, out_dtype, backend, generator):
    inputs = cast(next(c for c in CASES if c.name == name).inputs(generator), torch.float32)
    inputs["out"] = inputs["out"].to(out_dtype)
    exact = reference.posterior_step(**upcast(inputs))
    inputs["out"] = inputs["out"].contiguous(memory_format=layout)
    for g, e in zip(ops.posterior_step(**there(inputs), backend=backend), exact, strict=True):
        torch.testing.assert_close(g.cpu().double(), e, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", [c for c in CASES if c.op.startswith("group_norm_silu")], ids=names)
@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_norm_gradients_against_float64_autograd(case, dtype, layout, backend, generator, poisoned):
    if case.name in ("constant", "tiny"):
        pytest.skip("the gradient is divided by a standard deviation that rounding has made")
    inputs = cast(case.inputs(generator), dtype, layout)
    tensors = [k for k, v in inputs.items() if isinstance(v, torch.Tensor)]

    def gradients(run, inputs):
        leaves = {k: inputs[k].detach().clone().requires_grad_() for k in tensors}
        ys = tuple_of(run(**inputs | leaves))
        g = torch.Generator().manual_seed(0)
        upstream = [torch.randn(y.shape, generator=g, dtype=torch.float64).to(y.device, y.dtype) for y in ys]
        return torch.autograd.grad(ys, list(leaves.values()), upstream)

    exact = gradients(EAGER[case.op], upcast(inputs))
    eager = gradients(EAGER[case.op], inputs)
    got = gradients(lambda **k: getattr(ops, case.op)(**k, backend=backend), there(inputs))
    for name, g, e, x in zip(tensors, got, eager, exact, strict=True):
        assert g.is_cuda and g.dtype == dtype and g.shape == x.shape
        check_error_rule(g.cpu(), e, x, name)


def test_q_sample_gradients(backend, generator):
    inputs = there(cast(FIRSTS["q_sample"].inputs(generator), torch.float32))
    x0, noise = (inputs[k].requires_grad_() for k in ("x0", "noise"))
    upstream = torch.randn(x0.shape, generator=generator).cuda()
    got = torch.autograd.grad(ops.q_sample(**inputs, backend=backend), (x0, noise), upstream)
    weights = inputs["table"][inputs["t"]]
    for k in range(2):
        torch.testing.assert_close(got[k], weights[:, k, None, None, None] * upstream)
    x_t, drawn = ops.q_sample_counter(x0, inputs["t"], inputs["table"], 1, 0, backend=backend)
    assert not drawn.requires_grad
    (got_x0,) = torch.autograd.grad(x_t, x0, upstream)
    torch.testing.assert_close(got_x0, weights[:, 0, None, None, None] * upstream)


# ---- registration ----


def registered(op: str, inputs: dict) -> tuple:
    """The arguments of the registered op, as the public function passes them."""
    if op == "posterior_step":
        x, out, table, i, noise, x0_prev, clip = inputs.values()
        each = clip if isinstance(clip, torch.Tensor) else None
        return x, out, table, i, noise, None, None, x0_prev, 2.0 if each is not None else clip, each
    if op.startswith("group_norm_silu"):
        return tuple(v == "silu" if k == "act" else v for k, v in inputs.items())
    return tuple(inputs.values())


OPCHECKED = [c for c in CASES if c.name in ("one", "everything", "odd", "row-each", "learned", "clip-each")]


@pytest.mark.parametrize("case", OPCHECKED, ids=names)
def test_opcheck(case, backend, generator):
    suffix = "" if backend == "native" else "_triton"
    inputs = there(cast(case.inputs(generator), torch.float32, "channels_last"))
    if case.op != "posterior_step":
        for name, value in inputs.items():
            if isinstance(value, torch.Tensor) and value.is_floating_point() and name != "table":
                value.requires_grad_()
    args = registered(case.op, inputs)
    torch.library.opcheck(getattr(torch.ops.ddpm_fast, case.op + suffix).default, args)
    if case.op == "posterior_step":
        x0 = None if args[7] is None else args[7].contiguous()
        step = getattr(torch.ops.ddpm_fast, "posterior_step_" + suffix)
        torch.library.opcheck(step.default, (args[0].contiguous(), *args[1:7], x0, *args[8:]))


def test_opcheck_noise(backend, generator):
    packet = {
        name: getattr(torch.ops.ddpm_fast, name + ("" if backend == "native" else "_triton")).default
        for name in ("counter_normal", "q_sample_counter", "philox4x32_10")
    }
    seed, images, step = torch.tensor(5).cuda(), torch.arange(3).cuda(), torch.tensor(1).cuda()
    torch.library.opcheck(packet["counter_normal"], ((3, 2, 5), seed, images, step, 1))
    q = there(cast(FIRSTS["q_sample"].inputs(generator), torch.float32))
    args = (q["x0"].requires_grad_(), q["t"], q["table"], seed, images)
    torch.library.opcheck(packet["q_sample_counter"], args)
    words = torch.arange(24).reshape(-1, 4).cuda()
    torch.library.opcheck(packet["philox4x32_10"], (words, words[:, :2].contiguous()))


def test_operands_elsewhere_are_refused(generator):
    """The registered op by itself: a pointer of the host would be an illegal access on the device."""
    if reason := _dispatch.why_not("q_sample", "native", "cuda", torch.float32):
        pytest.skip(reason)
    q = cast(FIRSTS["q_sample"].inputs(generator), torch.float32)
    for name in q:
        mixed = there(q) | {name: q[name]}
        with pytest.raises(ValueError, match="must be on"):
            torch.ops.ddpm_fast.q_sample(*mixed.values())
    with pytest.raises(ValueError, match="x0 must be float32, bfloat16 or float16 on a CUDA device"):
        torch.ops.ddpm_fast.q_sample(*there(cast(q, torch.float64)).values())


# ---- the sampler ----


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
        run = sampler._start(2, None, 0, 0, x_T, None, "counter", False, *[None] * 4)
        with torch.inference_mode():
            for i in range(10):
                run.step(i)
    finally:
        torch.cuda.set_sync_debug_mode("default")
