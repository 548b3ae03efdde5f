"""The Triton ops' registration, without a GPU: `torch.library.opcheck` over Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from op_cases import CASES, cast

from ddpm_fast.ops import _dispatch

if reason := _dispatch.why_not("q_sample", "triton", "cpu", torch.float32):
    pytest.skip(reason, allow_module_level=True)

TRITON = torch.ops.ddpm_fast
SEED, IMAGES = torch.tensor(5), torch.arange(3)


def inputs_of(op: str, name: str, generator) -> dict:
    case = next(c for c in CASES if c.op == op and c.name == name)
    return cast(case.inputs(generator), torch.float32, "channels_last")


def test_noise():
    torch.library.opcheck(TRITON.counter_normal_triton.default, ((3, 2, 5), SEED, IMAGES, torch.tensor(1), 1))
    words = torch.arange(24).reshape(-1, 4)
    torch.library.opcheck(TRITON.philox4x32_10_triton.default, (words, words[:, :2].contiguous()))


def test_q_sample(generator):
    q = inputs_of("q_sample", "cifar", generator)
    x0, noise = q["x0"].requires_grad_(), q["noise"].requires_grad_()
    torch.library.opcheck(TRITON.q_sample_triton.default, (x0, noise, q["t"], q["table"]))
    torch.library.opcheck(TRITON.q_sample_counter_triton.default, (x0, q["t"], q["table"], SEED, IMAGES))


@pytest.mark.parametrize("name", ["row-each", "learned"])
def test_posterior_step(name, generator):
    x, out, table, i, noise, x0_prev, clip = inputs_of("posterior_step", name, generator).values()
    args = out, table, i, noise, None, None
    torch.library.opcheck(TRITON.posterior_step_triton.default, (x, *args, x0_prev, clip, None))
    x, x0 = x.contiguous(), None if x0_prev is None else x0_prev.contiguous()
    torch.library.opcheck(TRITON.posterior_step__triton.default, (x, *args, x0, clip, None))


@pytest.mark.parametrize("name", ["everything", "odd"])
def test_group_norm_silu(name, generator):
    inputs = inputs_of("group_norm_silu", name, generator)
    args = [v.requires_grad_() if isinstance(v, torch.Tensor) else v for k, v in inputs.items() if k != "act"]
    torch.library.opcheck(TRITON.group_norm_silu_triton.default, (*args, True))
    x, num_groups, *rest = args
    both = (x, x.detach().clone().requires_grad_(), num_groups)
    wide = [None] * 2, rest[2], [None] * 3
    for concat in (False, True):
        torch.library.opcheck(
            TRITON.group_norm_silu_concat_triton.default,
            (*both, *wide[0], wide[1], *wide[2], True, concat),
        )
