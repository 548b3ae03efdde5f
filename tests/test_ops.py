"""Every op, backend, dtype and layout against the float64 reference, by one error rule."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from op_cases import CASES, DTYPES, EAGER, cast, check_error_rule, tuple_of, upcast
from torch.autograd import forward_ad

from ddpm_fast import ops, reference
from ddpm_fast.ops import _dispatch

LAYOUTS = ("contiguous", "channels_last")
ALL = list(itertools.product(CASES, DTYPES, LAYOUTS))
FIRSTS = {op: next(c for c in CASES if c.op == op) for op in EAGER}


def names(value) -> str:
    return getattr(value, "id", None) or str(value).removeprefix("torch.")


def skip_unless_taken(op, backend, dtype):
    if reason := _dispatch.why_not(op, backend, "cpu", dtype):
        pytest.skip(reason)


@pytest.mark.parametrize("case,dtype,layout", ALL, ids=names)
def test_against_float64(case, dtype, layout, backend, generator, poisoned):
    inputs = cast(case.inputs(generator), dtype, layout)
    exact = tuple_of(getattr(reference, case.op)(**upcast(inputs)))
    eager = tuple_of(EAGER[case.op](**inputs))
    got = tuple_of(getattr(ops, case.op)(**inputs, backend=backend))
    for g, e, x in zip(got, eager, exact, strict=True):
        assert g.dtype == dtype
        check_error_rule(g, e, x)
    if case.op != "posterior_step":
        x = inputs["x0" if case.op == "q_sample" else "x"]
        for g in got:
            assert g.stride() == g.contiguous(memory_format=reference.memory_format(x)).stride()


@pytest.mark.parametrize("case", [c for c in CASES if c.op in ("q_sample", "posterior_step")], ids=names)
def test_float64_is_exact(case, backend, generator):
    skip_unless_taken(case.op, backend, torch.float64)
    inputs = case.inputs(generator)
    got = tuple_of(getattr(ops, case.op)(**cast(inputs, torch.float64), backend=backend))
    for g, e in zip(got, tuple_of(getattr(reference, case.op)(**inputs)), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16])
def test_float32_state_takes_half_out_in_any_layout(out_dtype, backend, generator):
    inputs = cast(next(c for c in CASES if c.name == "learned").inputs(generator), torch.float32)
    inputs["out"] = inputs["out"].to(out_dtype)
    exact = reference.posterior_step(**upcast(inputs))
    inputs["out"] = inputs["out"].contiguous(memory_format=torch.channels_last)
    got = ops.posterior_step(**inputs, backend=backend)
    for g, e in zip(got, exact, strict=True):
        torch.testing.assert_close(g.double(), e, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", [c for c in CASES if c.op == "posterior_step"], ids=names)
@pytest.mark.parametrize("stores_x0", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=names)
def test_step_in_place_is_the_step(case, stores_x0, dtype, backend, generator):
    inputs = cast(case.inputs(generator), dtype)
    x_next, x0_next = ops.posterior_step(**inputs, backend=backend)
    x, x0_prev = inputs.pop("x").clone(), inputs.pop("x0_prev")
    x0 = torch.zeros_like(x) if x0_prev is None else x0_prev.clone()
    if not stores_x0 and x0_prev is not None:
        pytest.skip("a history needs the buffer")
    assert ops.posterior_step_(x, x0=x0 if stores_x0 else None, **inputs, backend=backend) is x
    assert torch.equal(x, x_next)
    assert not stores_x0 or torch.equal(x0, x0_next)


def test_unused_operands_may_hold_anything(backend, generator):
    inputs = cast(FIRSTS["posterior_step"].inputs(generator), torch.float32)
    inputs["table"][:, 4:7] = 0
    nan = torch.full_like(inputs["x"], float("nan"))
    x_next, _ = ops.posterior_step(**inputs | {"noise": nan, "x0_prev": nan}, backend=backend)
    assert x_next.isfinite().all()
    inputs["out"].view(-1)[0] = float("inf")
    x_next, x0 = ops.posterior_step(**inputs, backend=backend)
    assert x_next.isfinite().all() and x0.view(-1)[0].abs() == 1


def test_nan_stays(backend, generator):
    inputs = cast(FIRSTS["posterior_step"].inputs(generator), torch.float32)
    inputs["out"].view(-1)[5] = float("nan")
    x_next, x0 = ops.posterior_step(**inputs, backend=backend)
    assert x_next.view(-1)[5].isnan() and x0.view(-1)[5].isnan() and x_next.isnan().sum() == 1
    norm = cast(FIRSTS["group_norm_silu"].inputs(generator), torch.float32)
    norm["x"][0, 0, 0, 0] = float("nan")
    y = ops.group_norm_silu(**norm, backend=backend)
    assert y[0, :4].isnan().all() and y[0, 4:].isfinite().all() and y[1].isfinite().all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["large-mean", "large-mean-add"])
def test_a_large_mean_cancels_nowhere(name, layout, generator):
    """Mean 1e4, standard deviation 1e-2: eager PyTorch is off by 4e-2 or more, the kernel not by 1e-4."""
    if _dispatch.NATIVE_MISSING is not None:
        pytest.skip(_dispatch.NATIVE_MISSING)
    case = next(c for c in CASES if c.name == name)
    inputs = cast(case.inputs(generator), torch.float32, layout)
    exact = reference.group_norm_silu(**upcast(inputs))
    error = (ops.group_norm_silu(**inputs, backend="native") - exact).abs().max()
    assert error <= 1e-4 * exact.abs().max()


CONCATENATED = next(c for c in CASES if c.op == "group_norm_silu_concat" and c.name == "odd")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_skip_in_any_layout(layout, backend, generator):
    inputs = cast(CONCATENATED.inputs(generator), torch.float32, layout)
    skip = inputs.pop("skip")
    expected = ops.group_norm_silu_concat(**inputs, skip=skip, backend=backend)
    assert torch.equal(expected[1], torch.cat([inputs["x"], skip], 1))
    channels_last = skip.contiguous(memory_format=torch.channels_last)
    for other in (skip.contiguous(), channels_last, skip.mT.contiguous().mT):
        got = ops.group_norm_silu_concat(**inputs, skip=other, backend=backend)
        for g, e in zip(got, expected, strict=True):
            assert torch.equal(g, e) and g.stride() == e.stride()


def test_the_poison_is_in_every_output(poisoned, monkeypatch):
    """An output of each native op that its kernel had not written would be NaN."""
    assert torch.empty(5).isnan().all() and torch.empty_like(torch.zeros(2, 3, 4, 5)).isnan().all()
    if _dispatch.NATIVE_MISSING is not None:
        pytest.skip(_dispatch.NATIVE_MISSING)
    source = (Path(__file__).parents[1] / "csrc" / "layout.h").read_text()
    assert "aoti_torch_empty_strided" not in source  # it takes memory as it finds it


@pytest.mark.parametrize("layout", LAYOUTS)
def test_silu_of_huge_numbers(layout, backend):
    """Finite and exact far past where e^-x leaves float32's range."""
    shift = torch.tensor([[1e3, 1e15, 1e16, 3e38, -1e2, -1e4, -1e16, -3e38]])
    x = torch.zeros(1, 8, 6, 5).contiguous(
        memory_format=getattr(torch, layout.replace("contiguous", "contiguous_format"))
    )
    y = ops.group_norm_silu(x, 4, shift=shift, backend=backend)[0, :, 0, 0]
    torch.testing.assert_close(y[:4], shift[0, :4])
    assert (y[4:].abs() <= 1e-30).all()


def test_a_learned_variance_past_float32_leaves_the_last_step_alone(backend, generator):
    inputs = cast(next(c for c in CASES if c.name == "learned").inputs(generator), torch.float32)
    inputs["table"][3, 6] = 0
    inputs["table"][3, 7:] = torch.tensor([-46.0, 300.0])
    inputs["out"][:, 3:] = 12.0
    assert ops.posterior_step(**inputs, backend=backend)[0].isfinite().all()


def test_a_step_in_place_is_seen_by_autograd(backend, generator):
    inputs = cast(FIRSTS["posterior_step"].inputs(generator), torch.float32)
    del inputs["x0_prev"]
    x = inputs.pop("x")
    weight = torch.ones_like(x, requires_grad=True)
    product = (weight * x).sum()
    ops.posterior_step_(x, **inputs, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    with pytest.raises(ValueError, match="x asks for a gradient, which a step in place does not have"):
        ops.posterior_step_(weight, **inputs, backend=backend)


# ---- gradients ----

NORMS = [c for c in CASES if c.op.startswith("group_norm_silu")]


@pytest.mark.parametrize("case", NORMS, ids=names)
@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_norm_gradients_against_float64_autograd(case, dtype, layout, backend, generator):
    """To x, skip, weight, bias, add, scale, shift, through `torch.nn.functional.group_norm` in float64."""
    if case.name in ("constant", "tiny"):
        pytest.skip("the gradient is divided by a standard deviation that rounding has made")
    inputs = cast(case.inputs(generator), dtype, layout)
    tensors = [k for k, v in inputs.items() if isinstance(v, torch.Tensor)]

    def gradients(run, inputs):
        leaves = {k: inputs[k].detach().clone().requires_grad_() for k in tensors}
        outputs, g = tuple_of(run(**inputs | leaves)), torch.Generator().manual_seed(0)
        upstream = [torch.randn(y.shape, generator=g, dtype=torch.float64).to(y.dtype) for y in outputs]
        return torch.autograd.grad(outputs, list(leaves.values()), upstream)

    exact = gradients(EAGER[case.op], upcast(inputs))
    eager = gradients(EAGER[case.op], inputs)
    got = gradients(lambda **k: getattr(ops, case.op)(**k, backend=backend), inputs)
    for name, g, e, x in zip(tensors, got, eager, exact, strict=True):
        assert g.dtype == dtype and g.shape == x.shape
        check_error_rule(g, e, x, name)


def test_gradients_through_the_concatenation_alone(backend, generator):
    inputs = cast(CONCATENATED.inputs(generator), torch.float32)
    leaves = [inputs[k].requires_grad_() for k in ("x", "skip")]
    _, both = ops.group_norm_silu_concat(**inputs, backend=backend)
    upstream = torch.randn(both.shape, generator=generator)
    got = torch.autograd.grad(both, leaves, upstream)
    for g, e in zip(got, upstream.split([5, 7], 1), strict=True):
        assert torch.equal(g, e)


def test_norm_gradcheck(generator):
    names = ("x", "weight", "bias", "add", "scale", "shift")
    inputs = next(c for c in CASES if c.name == "odd-groups").inputs(generator)
    inputs["add"] = torch.randn(2, 21, generator=generator, dtype=torch.float64)
    leaves = [inputs[n][..., :2] if n == "x" else inputs[n] for n in names]
    leaves = [v.detach().clone().requires_grad_() for v in leaves]
    op = torch.ops.ddpm_fast.group_norm_silu.default
    if _dispatch.NATIVE_MISSING is None:  # float64 is the reference's: call its registered backward by hand
        from ddpm_fast.ops.group_norm_silu import _reference_backward

        y = ops.group_norm_silu(leaves[0], 7, *leaves[1:3], add=leaves[3], scale=leaves[4], shift=leaves[5])
        upstream = torch.randn(y.shape, generator=generator, dtype=torch.float64)
        exact = torch.autograd.grad(y, leaves, upstream)
        got = _reference_backward(upstream, leaves[0], 7, *leaves[1:3], 1e-5, *leaves[3:], True)
        for g, e in zip(got, exact, strict=True):
            torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-9)
    else:
        assert torch.autograd.gradcheck(lambda x, w, b, *rest: op(x, 7, w, b, 1e-5, *rest, True), leaves)


def test_q_sample_gradients(backend, generator):
    inputs = cast(FIRSTS["q_sample"].inputs(generator), torch.float32)
    x0, noise = (inputs[k].requires_grad_() for k in ("x0", "noise"))
    upstream = torch.randn(x0.shape, generator=generator)
    got = torch.autograd.grad(ops.q_sample(**inputs, backend=backend), (x0, noise), upstream)
    weights = inputs["table"][inputs["t"]]
    for k in range(2):
        torch.testing.assert_close(got[k], weights[:, k, None, None, None] * upstream)
    x_t, drawn = ops.q_sample_counter(x0, inputs["t"], inputs["table"], 1, 0, backend=backend)
    assert not drawn.requires_grad
    torch.testing.assert_close(
        torch.autograd.grad(x_t, x0, upstream)[0], weights[:, 0, None, None, None] * upstream
    )


def test_step_gradients_come_from_the_reference(generator):
    inputs = cast(FIRSTS["posterior_step"].inputs(generator), torch.float64)
    x, out = (inputs[k].requires_grad_() for k in ("x", "out"))
    x_next, _ = ops.posterior_step(**inputs)
    expected = torch.autograd.grad(reference.posterior_step(**inputs)[0].sum(), (x, out))
    for g, e in zip(torch.autograd.grad(x_next.sum(), (x, out)), expected, strict=True):
        assert torch.equal(g, e)
    if _dispatch.NATIVE_MISSING is None:
        with pytest.raises(ValueError, match="asks for a gradient"):
            ops.posterior_step(**inputs, backend="native")


@pytest.mark.parametrize("op", ["q_sample", "posterior_step", "group_norm_silu", "conv3x3"])
def test_forward_mode_derivatives(op, generator):
    """Of a kernel alone `torch.func.jvp` would find zero, and say nothing."""
    x, v, n = (torch.randn(2, 8, 4, 4, dtype=torch.float64, generator=generator) for _ in range(3))
    t, table = torch.tensor([3, 9]), torch.rand(10, 7, dtype=torch.float64, generator=generator)
    weight = torch.randn(8, 8, 3, 3, dtype=torch.float64, generator=generator)

    def run(x):
        return {
            "q_sample": lambda: ops.q_sample(x, n, t, table[:, :2]),
            "posterior_step": lambda: ops.posterior_step(x, n, table, t, noise=n, x0_prev=n, clip=None)[0],
            "group_norm_silu": lambda: ops.group_norm_silu(x, 4),
            "conv3x3": lambda: ops.conv3x3(x, weight),
        }[op]()

    step = 1e-6
    expected = (run(x + step * v) - run(x - step * v)) / (2 * step)
    _, slope = torch.func.jvp(run, (x,), (v,))
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(run(forward_ad.make_dual(x, v))).tangent
    for tangent in (slope, dual):
        torch.testing.assert_close(tangent, expected, rtol=0, atol=1e-7)
    assert slope.abs().max() > 0.1


# ---- registration and tracing ----


def registered(op, inputs):
    """The arguments of the registered op, as the public function passes them."""
    if op == "posterior_step":
        from ddpm_fast.ops.posterior_step import _arguments

        seed = image_index = None
        return _arguments(
            *(inputs[k] for k in ("x", "out", "table", "i", "noise")),
            seed,
            image_index,
            inputs["x0_prev"],
            inputs["clip"],
        )
    if op.startswith("group_norm_silu"):
        return tuple((inputs | {"act": inputs["act"] == "silu"}).values())
    return tuple(inputs.values())


OPCHECKED = [c for c in CASES if c.name in ("one", "everything", "odd", "row-each", "learned", "clip-each")]


@pytest.mark.parametrize("case", OPCHECKED, ids=names)
def test_opcheck(case, generator):
    inputs = cast(case.inputs(generator), torch.float32, "channels_last")
    if case.op != "posterior_step":
        for value in inputs.values():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                value.requires_grad_()
        inputs.get("table", inputs.get("x")).requires_grad_("x" in inputs)
    args = registered(case.op, inputs)
    torch.library.opcheck(getattr(torch.ops.ddpm_fast, case.op).default, args)
    if case.op == "posterior_step":
        x = args[0].contiguous()
        x0 = None if args[7] is None else args[7].contiguous()
        torch.library.opcheck(torch.ops.ddpm_fast.posterior_step_.default, (x, *args[1:7], x0, *args[8:]))


def test_opcheck_noise(generator):
    seed, images = torch.tensor(5), torch.arange(3)
    torch.library.opcheck(
        torch.ops.ddpm_fast.counter_normal.default, ((3, 2, 5), seed, images, torch.tensor(1), 1)
    )
    q = cast(FIRSTS["q_sample"].inputs(generator), torch.float32)
    x0 = q["x0"].requires_grad_()
    torch.library.opcheck(
        torch.ops.ddpm_fast.q_sample_counter.default, (x0, q["t"], q["table"], seed, images)
    )
    words = torch.arange(24).reshape(-1, 4)
    torch.library.opcheck(torch.ops.ddpm_fast.philox4x32_10.default, (words, words[:, :2].contiguous()))


@pytest.mark.parametrize("op", EAGER)
def test_traces_whole(op, backend, generator):
    torch.compiler.reset()  # one lambda for every op and backend would reach the limit of recompilations
    inputs = cast(FIRSTS[op].inputs(generator), torch.float32)
    run = getattr(ops, op)
    compiled = torch.compile(
        lambda inputs: run(**inputs, backend=backend), backend="aot_eager", fullgraph=True
    )
    for g, e in zip(tuple_of(compiled(inputs)), tuple_of(run(**inputs, backend=backend)), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-6, atol=1e-6)


def test_traces_whole_with_noise_inside(backend, generator):
    inputs = cast(FIRSTS["posterior_step"].inputs(generator), torch.float32)
    q = cast(FIRSTS["q_sample"].inputs(generator), torch.float32)

    def run(x, out, table, i):
        x_t, noise = ops.q_sample_counter(x, q["t"], q["table"], 7, 0, backend=backend)
        ops.posterior_step_(x, out, table, i, seed=3, image_index=10, backend=backend)
        return x_t, noise, x

    args = [inputs[k] for k in ("x", "out", "table", "i")]
    expected = run(args[0].clone(), *args[1:])
    got = torch.compile(run, backend="aot_eager", fullgraph=True)(args[0].clone(), *args[1:])
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-6, atol=1e-6)


class NoSync(torch.utils._python_dispatch.TorchDispatchMode):
    """Refuses what would make the host wait for a GPU, or a graph capture fail."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal"), f"{name} waits"
        return func(*args, **(kwargs or {}))


def test_step_is_safe_in_a_graph(backend, generator):
    inputs = cast(FIRSTS["posterior_step"].inputs(generator), torch.float32)
    seed, images = torch.tensor(1), torch.arange(3)
    with NoSync():
        if backend == "native":
            ops.posterior_step_(
                *(inputs[k] for k in ("x", "out", "table", "i")), seed=seed, image_index=images
            )
        else:
            reference.posterior_step(**inputs)


# ---- bad input ----


def bad(op, error, match, **changes):
    return pytest.param(op, error, match, changes, id=f"{op}-{'-'.join(changes)}-{match[:24]}")


z = torch.zeros
BAD = [
    bad("q_sample", ValueError, "noise must be like x0", noise=z(3, 3, 32, 31)),
    bad("q_sample", ValueError, "noise must be like x0", noise=z(3, 3, 32, 32, dtype=torch.float64)),
    bad("q_sample", TypeError, "x0 must be float32", x0=z(3, 3, 32, 32, dtype=torch.int64)),
    bad("q_sample", TypeError, "t must be an int or an int64", t=z(3, dtype=torch.int32)),
    bad("q_sample", TypeError, "t must be an int or an int64", t=z(3)),
    bad("q_sample", TypeError, "t must be an int or an int64", t=1.5),
    bad("q_sample", ValueError, "one per sample", t=z(2, dtype=torch.int64)),
    bad("q_sample", IndexError, r"t must be in \[0, 999\], got 1000", t=torch.tensor([0, 5, 1000])),
    bad("q_sample", IndexError, r"t must be in \[0, 999\], got -1", t=torch.tensor([0, -1, 5])),
    bad("q_sample", ValueError, "table must have shape", table=z(1000, 3)),
    bad("q_sample", ValueError, "table must be torch.float32", table=z(1000, 2, dtype=torch.float64)),
    bad("q_sample", TypeError, "a Schedule or a StepTable", table=[1, 2]),
    bad("posterior_step", ValueError, "out must have x's shape", out=z(3, 4, 32, 32)),
    bad("posterior_step", ValueError, "out must have x's shape", out=z(2, 3, 32, 32)),
    bad("posterior_step", TypeError, "out must be torch.float32", out=z(3, 3, 32, 32, dtype=torch.float64)),
    bad("posterior_step", ValueError, "learned range needs out with 6", table=z(7, 9)),
    bad("posterior_step", ValueError, "table must have shape", table=z(7, 8)),
    bad("posterior_step", IndexError, r"i must be in \[0, 6\], got 7", i=torch.tensor(7)),
    bad("posterior_step", IndexError, r"i must be in \[0, 6\], got -1", i=-1),
    bad("posterior_step", TypeError, "i must be an int or an int64", i=2.0),
    bad("posterior_step", ValueError, "noise or seed is missing", noise=None),
    bad("posterior_step", ValueError, "x0_prev is missing", table=torch.ones(7, 7)),
    bad("posterior_step", ValueError, "noise or seed, not both", seed=1, image_index=0),
    bad("posterior_step", ValueError, "seed and image_index go together", noise=None, seed=1),
    bad("posterior_step", ValueError, "noise must be like x", noise=z(3, 3, 32, 31)),
    bad("posterior_step", ValueError, "clip must be", clip=0),
    bad("posterior_step", ValueError, "clip must be", clip=-1.0),
    bad("posterior_step", ValueError, "clip must be", clip=float("nan")),
    bad("posterior_step", ValueError, "clip must be", clip=z(2)),
    bad("posterior_step", ValueError, "clip must be", clip="1"),
    bad("group_norm_silu", ValueError, "num_groups must divide x's 128 channels, got 33", num_groups=33),
    bad("group_norm_silu", ValueError, "num_groups must divide", num_groups=0),
    bad("group_norm_silu", ValueError, r"weight must have shape \(128,\)", weight=z(127)),
    bad("group_norm_silu", ValueError, r"add must have shape \(2, 128\)", add=z(128)),
    bad("group_norm_silu", ValueError, "act='relu' is not known; allowed: silu, none", act="relu"),
    bad("group_norm_silu", ValueError, "eps must be at least 0", eps=-1e-5),
    bad("group_norm_silu", ValueError, "x must not be empty", x=z(0, 128, 4, 4)),
    bad("group_norm_silu", ValueError, "at least 2 dimensions", x=z(128)),
    bad("group_norm_silu", TypeError, "x must be a Tensor", x=3.0),
    bad("group_norm_silu_concat", TypeError, "skip must be a Tensor", skip=None),
    bad("group_norm_silu_concat", TypeError, "skip must be float32", skip=z(2, 128, 16, 16).int()),
    bad("group_norm_silu_concat", ValueError, r"skip must be like x, \(2, 256", skip=z(2, 128, 16, 15)),
    bad("group_norm_silu_concat", ValueError, "skip must be like x", skip=z(1, 128, 16, 16)),
    bad("group_norm_silu_concat", ValueError, "skip must be like x", skip=z(2, 128, 256)),
    bad("group_norm_silu_concat", ValueError, "skip must be like x", skip=z(2, 0, 16, 16)),
    bad("group_norm_silu_concat", ValueError, "skip must be like x", skip=z(2, 128, 16, 16).bfloat16()),
    bad("group_norm_silu_concat", ValueError, "divide x and skip's 384 channels, got 33", num_groups=33),
    bad("group_norm_silu_concat", ValueError, r"weight must have shape \(384,\)", weight=z(256)),
    bad("group_norm_silu_concat", ValueError, r"add must have shape \(2, 384\)", add=z(2, 256)),
    bad("group_norm_silu_concat", ValueError, "x must not be empty", x=z(2, 0, 16, 16)),
]


@pytest.mark.parametrize("op,error,match,changes", BAD)
def test_bad_input_is_named(op, error, match, changes, backend, generator):
    if backend == "triton" and (error is IndexError or "is missing" in match):
        pytest.skip("a value on the device is not asked: the result is NaN, see test_triton_pointwise.py")
    inputs = cast(FIRSTS[op].inputs(generator), torch.float32)
    before = {k: v.clone() for k, v in inputs.items() if isinstance(v, torch.Tensor)}
    with pytest.raises(error, match=match):
        getattr(ops, op)(**inputs | changes, backend=backend)
    assert all(torch.equal(inputs[k], v) for k, v in before.items())


def test_backend_names(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = torch.zeros(2, 4, 3, 3)
    with pytest.raises(ValueError, match="backend='cuda' is not known; allowed: native, triton, reference"):
        ops.group_norm_silu(x, 2, backend="cuda")
    with pytest.raises(RuntimeError, match=r"'triton' cannot run group_norm_silu here: .* cpu tensors"):
        ops.group_norm_silu(x, 2, backend="triton")
    with pytest.raises(RuntimeError, match="'native' cannot run group_norm_silu here"):
        ops.group_norm_silu(x.double(), 2, backend="native")
    assert ops.group_norm_silu(x.double(), 2).dtype == torch.float64
