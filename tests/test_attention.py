"""Attention against float64: every instruction set, edge blocks, chunks of keys; where the U-Net takes it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from instruction_sets import pass_on
from op_cases import check_error_rule
from sanitized import ARRAYS, FLAGS, RUNS, run_sanitized
from torch import Tensor

from ddpm_fast import UNetConfig, ops, reference
from ddpm_fast.ops import _dispatch
from ddpm_fast.unet import Attention

FLOAT, HALF = torch.float32, torch.bfloat16
# (B, N, C, heads, scale of q and k). On AMX float32 goes by digits from 64 tokens and 64 channels a head on.
SHAPES = [
    (1, 256, 256, 1, 1),
    (1, 16, 256, 1, 1),
    (3, 64, 128, 2, 1),
    (2, 70, 66, 1, 2),
    (1, 513, 130, 2, 1),
    (1, 1040, 65, 1, 1),
    (2, 7, 15, 3, 1),
    (5, 33, 40, 1, 6),
    (1, 90, 600, 1, 3),
    (2, 1, 1, 1, 1),
]


@pytest.fixture(autouse=True)
def native():
    if _dispatch.NATIVE_MISSING is not None:
        pytest.skip(_dispatch.NATIVE_MISSING)


def make(shape, dtype, generator) -> Tensor:
    batch, tokens, channels, _, scale = shape
    qkv = torch.randn(batch, tokens, 3 * channels, generator=generator)
    qkv[..., : 2 * channels] *= scale
    return qkv.to(dtype)


def eager(qkv: Tensor, heads: int) -> Tensor:
    q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


# ---- the op ----


@pytest.mark.parametrize("dtype", [FLOAT, HALF], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, dtype, generator, poisoned):
    qkv, heads = make(shape, dtype, generator), shape[3]
    exact = reference.attention(qkv.double(), heads)
    got = ops.attention(qkv, heads, backend="native")
    assert got.dtype == dtype and got.is_contiguous()
    check_error_rule(got, eager(qkv, heads), exact)
    check_error_rule(ops.attention(qkv, heads, backend="reference"), eager(qkv, heads), exact)


@pytest.mark.parametrize("dtype", [FLOAT, HALF], ids=str)
def test_errors_are_of_float32s_size(dtype, generator):
    """In the 2-norm; what bfloat16 adds is the rounding of the result, and on AMX that of the weights."""
    for tokens, channels in ((256, 256), (1024, 64)):
        qkv = make((1, tokens, channels, 1, 1), dtype, generator)
        exact = reference.attention(qkv.double(), 1)
        error = float((ops.attention(qkv, 1, backend="native").double() - exact).norm() / exact.norm())
        assert error < (8e-7 if dtype == FLOAT else 2**-8.5)


@pytest.mark.parametrize("dtype", [FLOAT, HALF], ids=str)
def test_any_batch_and_any_number_of_threads(dtype, generator):
    qkv, threads = make((5, 100, 130, 2, 1), dtype, generator), torch.get_num_threads()
    expected = ops.attention(qkv, 2)
    assert torch.equal(ops.attention(qkv[3:4], 2), expected[3:4])
    assert torch.equal(ops.attention(qkv.transpose(0, 1).contiguous().transpose(0, 1), 2), expected)
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            assert torch.equal(ops.attention(qkv, 2), expected)
            assert torch.equal(ops.attention(qkv[:1], 2), expected[:1])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [FLOAT, HALF], ids=str)
@pytest.mark.parametrize("tokens", [5, 70, 600])
def test_large_scores(tokens, dtype, generator):
    """One key that is far above the others, and scores that are alike, far below that of keys not there."""
    values = torch.randn(1, tokens, 96, generator=generator).to(dtype)
    keys = torch.randn(1, tokens, 96, generator=generator)
    keys = (keys * (96**0.5 / keys.norm(dim=2, keepdim=True))).to(dtype)
    got = ops.attention(torch.cat([1e15 * keys, 1e15 * keys, values], 2), 1)
    torch.testing.assert_close(got, values, rtol=1e-6, atol=1e-6)
    ones = torch.ones_like(values)
    got = ops.attention(torch.cat([1e3 * ones, -1e3 * ones, values], 2), 1).double()
    mean = values.double().mean(1, keepdim=True).expand_as(got)
    torch.testing.assert_close(got, mean, rtol=0, atol=1e-6 if dtype == FLOAT else 4e-3)


@pytest.mark.parametrize("dtype", [FLOAT, HALF], ids=str)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("tokens", [20, 100])
def test_what_is_not_finite_spoils_no_other(tokens, value, dtype, generator):
    qkv = make((2, tokens, 140, 2, 1), dtype, generator)
    expected = ops.attention(qkv, 2)

    def spoiled(channel: int) -> Tensor:
        """Of an element of the second image's tenth token."""
        given = qkv.clone()
        given[1, 9, channel] = value
        got = ops.attention(given, 2)
        assert torch.equal(got[0], expected[0])
        return (got[1] != expected[1]) | got[1].isnan()

    query, key, of_value = (spoiled(70 + 3 + 140 * which) for which in range(3))
    assert query[9, 70:].all() and of_value[:, 73].all() and key[:, 70:].any()
    assert int(query.sum()) == 70 and int(of_value.sum()) == tokens and not key[:, :70].any()
    assert key[:, 70:].all() or value == float("inf")  # a score of -inf is a weight of 0


def test_it_has_no_gradient_but_the_reference_has(generator):
    qkv = make((1, 9, 8, 2, 1), FLOAT, generator).requires_grad_()
    upstream = torch.randn(1, 9, 8, generator=generator)
    found, expected = (torch.autograd.grad(run(qkv, 2), qkv, upstream)[0] for run in (ops.attention, eager))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="qkv asks for a gradient, which backend 'native' does not have"):
        ops.attention(qkv, 2, backend="native")
    with torch.no_grad():
        ops.attention(qkv, 2, backend="native")


def test_opcheck(generator):
    for dtype in (FLOAT, HALF):
        qkv = make((2, 17, 24, 3, 1), dtype, generator)
        torch.library.opcheck(torch.ops.ddpm_fast.attention.default, (qkv, 3))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"qkv": [1.0]}, TypeError, "qkv must be a Tensor, got list"),
        (
            {"qkv": torch.ones(1, 2, 6, dtype=torch.int64)},
            TypeError,
            "qkv must be float32, .* got torch.int64",
        ),
        ({"qkv": torch.ones(2, 6)}, ValueError, "qkv must have at least 3 dimensions"),
        ({"qkv": torch.ones(1, 2, 6, 1)}, ValueError, r"qkv must be \(B, N, 3 C\)"),
        ({"qkv": torch.ones(1, 0, 6)}, ValueError, r"qkv must be \(B, N, 3 C\), not empty"),
        ({"heads": 4}, ValueError, "C a multiple of heads=4"),
        ({"heads": 0}, ValueError, "heads must be an int of at least 1, got 0"),
        ({"heads": 1.0}, ValueError, "heads must be an int of at least 1, got 1.0"),
        ({"backend": "triton"}, RuntimeError, "it has no attention kernel"),
        ({"backend": "fast"}, ValueError, "backend='fast' is not known"),
    ],
)
def test_bad_input_is_named(change, error, match):
    with pytest.raises(error, match=match):
        ops.attention(**{"qkv": torch.ones(1, 2, 6), "heads": 1} | change)


def test_bad_input_of_the_native_kernel():
    run = torch.ops.ddpm_fast.attention
    for qkv, heads in ((torch.ones(2, 6), 1), (torch.ones(1, 2, 6), 0), (torch.ones(1, 2, 7), 1)):
        with pytest.raises(ValueError, match=r"qkv must be \(B, N, 3 C\)"):
            run(qkv, heads)
    with pytest.raises(ValueError, match="qkv must be float32 or bfloat16"):
        run(torch.ones(1, 2, 6).double(), 1)


# ---- the layer ----


@pytest.fixture
def calls(monkeypatch) -> list[torch.Size]:
    """The shapes that the op is given."""
    made: list[torch.Size] = []

    def attention(qkv: Tensor, heads: int) -> Tensor:
        made.append(qkv.shape)
        return eager(qkv, heads)

    monkeypatch.setattr(ops, "attention", attention)
    return made


def layer(generator, output_scale: float = 1.0) -> Attention:
    config = UNetConfig((16,), (False,), (False,), norm_num_groups=4, attention_head_dim=8)
    made = Attention(16, 4, config, output_scale)
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.3, generator=generator)
    return made


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:FutureWarning")
def test_the_layer_takes_it_where_it_may(generator, calls):
    attend = layer(generator)
    x = torch.randn(2, 16, 5, 3, generator=generator)
    with torch.no_grad():
        expected = attend(x)
        assert calls == [(2, 15, 48)]
        attend.bfloat16()(x.bfloat16())
        assert len(calls) == 2
        attend.double()(x.double())
        attend.float()
        torch.jit.trace(attend, x, check_trace=False)
        compiled = torch.compile(attend, fullgraph=True, backend="eager")(x)
    out = attend(x)
    assert len(calls) == 2
    torch.testing.assert_close(compiled, expected, rtol=1e-2, atol=1e-2)  # its weights were in bfloat16
    torch.testing.assert_close(out, compiled, rtol=1e-5, atol=1e-5)
    out.sum().backward()
    assert all(p.grad is not None for p in attend.parameters())


@pytest.mark.parametrize("output_scale", [1, 2**0.5])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_the_layer_adds_its_input_in_its_layout(batch, channels_last, output_scale, generator):
    attend = layer(generator, output_scale)
    x = torch.randn(batch, 16, 5, 3, generator=generator)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    qkv = attend.to_qkv(attend.group_norm(x, act="none").flatten(2).transpose(1, 2))
    expected = (attend.to_out(eager(qkv, 2)).transpose(1, 2).unflatten(2, (5, 3)) + x) / output_scale
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            got = attend(x)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        assert got.stride() == x.stride()


# ---- instruction sets, addresses ----


@pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline"])
def test_every_instruction_set_passes(isa):
    """The best one runs in the other tests; the others are forced, each in its own process."""
    names = "against_float64 or float32s_size or any_batch or large_scores or not_finite"
    pass_on(isa, ("test_attention.py",), names)


PROGRAM = """
#if defined(__AMX_INT8__)
#include "kernels/attention_amx.h"
#else
#include "kernels/attention.h"
#endif
#include "kernels/convert.h"
#include <vector>
ARRAYS
using namespace ddpm_fast;
using namespace ddpm_fast::cpu;

template <typename T>
void check(const AttentionKernels& kernels, Dtype dtype, int64_t tokens, int64_t width, int64_t threads) {
  const AttentionPlan plan = kernels.plan(tokens, width, threads);
  const Array<float> values = floats(3 * tokens * width, 1), got(new float[tokens * width]);
  const Array<T> qkv(new T[3 * tokens * width]), y(new T[tokens * width]);
  for (int64_t k = 0; k < 3 * tokens * width; ++k) values[k] *= 2;
  store_any(dtype, values.get(), qkv.get(), 3 * tokens * width);
  load_any(dtype, qkv.get(), values.get(), 3 * tokens * width);
  const AttentionHead head = {
      qkv.get(), qkv.get() + width, qkv.get() + 2 * width, 3 * width, y.get(), width};
  const Array<float> laid_out(new float[plan.laid_out]), scratch(new float[plan.scratch]);
  kernels.lay_out(plan, head, 0, plan.pieces, laid_out.get(), scratch.get());
  kernels.attend(plan, head, laid_out.get(), 0, plan.blocks, scratch.get());
  load_any(dtype, y.get(), got.get(), tokens * width);
  for (const int64_t query : {int64_t{0}, tokens / 2, tokens - 1}) {
    std::vector<double> exact(width), weights(tokens);
    double total = 0;
    for (int64_t key = 0; key < tokens; ++key) {
      double score = 0;
      for (int64_t c = 0; c < width; ++c) {
        score += double(values[query * 3 * width + c]) * values[(key * 3 + 1) * width + c];
      }
      weights[key] = std::exp(score / std::sqrt(double(width)));
      total += weights[key];
      for (int64_t c = 0; c < width; ++c) exact[c] += weights[key] * values[(key * 3 + 2) * width + c];
    }
    for (int64_t c = 0; c < width; ++c) {
      const float found = got[query * width + c];
      if (!(std::abs(found - exact[c] / total) < (sizeof(T) == 2 ? 2e-2 : 1e-5))) {
        std::printf("%ld %ld: %g, not %g\\n", (long)tokens, (long)width, found, exact[c] / total);
        std::exit(1);
      }
    }
  }
}

int main() {
RUNS
#if defined(__AMX_INT8__)
  const AttentionKernels of_float = AttentionDigits::kKernels;
  const AttentionKernels of_half = Attention<BFloat16Products>::kKernels;
#else
  const AttentionKernels of_float = Attention<FloatProducts<float>>::kKernels;
  const AttentionKernels of_half = Attention<FloatProducts<BFloat16>>::kKernels;
#endif
  const int64_t shapes[][2] = {{1, 1}, {5, 3}, {64, 64}, {70, 67}, {33, 130}, {530, 70}};
  for (const auto& shape : shapes) {
    for (const int64_t threads : {1, 3}) {
      check<float>(of_float, Dtype::kFloat, shape[0], shape[1], threads);
      check<BFloat16>(of_half, Dtype::kBFloat16, shape[0], shape[1], threads);
    }
  }
}
""".replace("ARRAYS", ARRAYS).replace("RUNS", RUNS)


@pytest.mark.parametrize("isa", FLAGS)
def test_under_address_sanitizer(isa, tmp_path):
    run_sanitized(PROGRAM, isa, tmp_path, "-O0")
