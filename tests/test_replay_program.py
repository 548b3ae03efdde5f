"""What a recording becomes: places in an arena, and our own ops past the dispatcher, with the same bits."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm_fast import ops
from ddpm_fast.ops._dispatch import NATIVE_MISSING, PROGRAM_OPS, direct
from ddpm_fast.replay import Replayed
from ddpm_fast.replay.arena import LINE, Lifetime, plan

CPU = Path(__file__).parent.parent / "csrc" / "cpu"
LAYOUTS = [torch.contiguous_format, torch.channels_last]
native = pytest.mark.skipif(not PROGRAM_OPS, reason=f"no calls past the dispatcher: {NATIVE_MISSING}")


def test_what_lives_at_one_time_lies_apart(generator):
    def number(most: int) -> int:
        return int(torch.randint(most, (), generator=generator))

    for _ in range(30):
        firsts = [number(40) for _ in range(40)]
        lifetimes = tuple(Lifetime(number(3000), first, first + number(12)) for first in firsts)
        begins, total = plan(lifetimes)
        places = [(b, b + life.bytes, life) for b, life in zip(begins, lifetimes, strict=True)]
        for k, (begin, end, life) in enumerate(places):
            assert begin % LINE == 0 and begin >= 0 and end <= total
            for other_begin, other_end, other in places[:k]:
                together = life.first <= other.last and other.first <= life.last
                assert not together or end <= other_begin or other_end <= begin


def test_tensors_share_bytes():
    chain = tuple(Lifetime(1000, k, k + 1) for k in range(50))  # each is made of the one before
    assert plan(chain)[1] == 2 * 1024
    skips = tuple(Lifetime(640, k, 20 - k) for k in range(10))
    assert plan(chain + skips)[1] == 2 * 1024 + 10 * 640


def variables(replayed: Replayed) -> int:
    """How many tensors the replay makes anew, in Python, besides its argument."""
    return len(replayed.replay.__code__.co_varnames) - 1


def fill_arena(replayed: Replayed) -> None:
    """With NaN, whatever the dtype."""
    for value in replayed.replay.__globals__.values():
        if isinstance(value, Tensor) and value.is_inference():
            with torch.inference_mode():
                torch.empty(0, dtype=torch.uint8).set_(value.untyped_storage()).fill_(255)


def check(call, *inputs: Tensor) -> Replayed:
    """Each replay as the call, with nothing left in the arena of the one before."""
    replayed = Replayed(call)
    with torch.no_grad():
        expected = [call(given) for given in inputs]
        results = []
        for given in inputs:
            if replayed.replay is not None:
                fill_arena(replayed)
            results.append(replayed(given))
    assert replayed.replay is not None
    for got, wanted in zip(results, expected, strict=True):
        assert torch.equal(got, wanted) and got.stride() == wanted.stride() and got.dtype == wanted.dtype
    return replayed


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pytorchs_ops_are_told_where_to_write(layout, generator):
    def call(x: Tensor) -> Tensor:
        x = (2 * x - 1).to(torch.bfloat16).float().contiguous(memory_format=layout)
        up = F.interpolate(x, scale_factor=2.0, mode="nearest") + F.interpolate(x, (8, 12))
        down = F.avg_pool2d(up, 2).clone() / 3
        both = torch.cat([F.pad(down, (0, 1, 2, 1)), F.pad(x, (1, 0, 0, 3))], 1)
        pixels = both.permute(0, 2, 3, 1).flatten(0, 2)
        rows = torch.addmm(pixels, pixels, weight.t()).index_select(0, index)
        return torch.baddbmm(rows[None], rows[None].mT @ rows[None], rows[None].mT).mT - 1

    weight, index = torch.randn(6, 6, generator=generator), torch.arange(0, 70, 12)
    inputs = torch.randn(4, 2, 3, 4, 6, generator=generator).contiguous().unbind()
    replayed = check(call, *inputs)
    assert variables(replayed) == 2 + (layout == torch.contiguous_format)  # of @, the result; of flatten


def network(layout: torch.memory_format):
    """Our own ops, one after another, and what they read of others."""
    torch.manual_seed(0)
    weights = torch.randn(32, 32, 3, 3) / 17, torch.randn(32, 32) / 6
    conv, linear = ops.pack_conv3x3(weights[0], "f2"), ops.pack_linear(weights[1])
    scale, bias = torch.rand(32), torch.randn(32)
    time = torch.randn(2, 32)

    def call(x: Tensor) -> Tensor:
        foreign = x.sigmoid().contiguous(memory_format=layout)
        h = ops.group_norm_silu(foreign, 8, scale, bias, add=time)
        h = ops.conv3x3_packed(h, conv, bias, plus=foreign)
        h, both = ops.group_norm_silu_concat(h, foreign, 8, act="none", concat=True)
        h = ops.group_norm_silu_concat(h[:, :32].sigmoid(), both[:, 16:48].tanh(), 4)[:, 8:40].exp()
        rows = ops.linear_packed(h.permute(0, 2, 3, 1).reshape(-1, 32), linear, bias).tanh()
        rows = ops.linear_packed(rows, linear, plus=rows)
        return rows.unflatten(0, (2, 5, 6)).permute(0, 3, 1, 2) * 2

    return call, (scale, bias, time)


@native
@pytest.mark.parametrize("layout", LAYOUTS)
def test_our_own_ops(layout, generator):
    call, values = network(layout)
    inputs = torch.randn(4, 2, 32, 5, 6, generator=generator).contiguous().unbind()
    replayed = check(call, *inputs)
    programs = [v for v in replayed.replay.__globals__.values() if getattr(v, "__name__", "") == "run"]
    assert len(programs) == 4
    before = replayed(inputs[0])
    with torch.no_grad():
        for value in values:
            value.mul_(0.5)
        assert torch.equal(replayed(inputs[0]), call(inputs[0])) and not torch.equal(
            replayed(inputs[0]), before
        )
        threads = torch.get_num_threads()
        for other in (1, 2, 3):
            torch.set_num_threads(other)
            try:
                assert torch.equal(replayed(inputs[1]), call(inputs[1]))
            finally:
                torch.set_num_threads(threads)


def test_loops_are_the_teams():
    """In a team, a loop of torch's would be run by one thread, without a word."""
    files = [file for file in CPU.glob("*.cpp") if "runs_in_programs<" in file.read_text()]
    assert len(files) >= 2
    assert all("torch::stable::parallel_for" not in file.read_text() for file in files)


@native
@pytest.mark.parametrize("threads", [2, 5])
def test_a_team_cuts_as_torch_does(threads, generator):
    x = torch.randn(1, 64, 64, 40, generator=generator).contiguous(memory_format=torch.channels_last)
    packed = ops.pack_conv3x3(torch.randn(48, 64, 3, 3, generator=generator), "f2")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y, z = torch.empty_like(x), torch.empty(1, 48, 64, 40).contiguous(memory_format=torch.channels_last)
        norm = (x, 4, None, None, 1e-5, None, None, None, True)
        conv = (packed.weight, None, None, 48, 2, 2, 0, 0, None, None)
        calls = ("group_norm_silu_forward", (*norm, y)), ("conv3x3_packed", (y, *conv, z))
        program = direct("program")(tuple((f"ddpm_fast::{name}", given) for name, given in calls * 3), 0)
        expected = torch.ops.ddpm_fast.group_norm_silu_forward(*norm)
        for _ in range(20):
            program()
            assert torch.equal(y, expected)
        assert torch.equal(z, torch.ops.ddpm_fast.conv3x3_packed(expected, *conv))
    finally:
        torch.set_num_threads(before)


@native
def test_two_calls_at_once_do_not_share_the_arena():
    call, _ = network(torch.channels_last)
    replayed = Replayed(call)
    inputs = [torch.randn(2, 32, 5, 6) for _ in range(8)]
    with torch.no_grad():
        expected = [call(given) for given in inputs]

    def work(k: int) -> bool:
        with torch.no_grad():
            return all(torch.equal(replayed(inputs[k]), expected[k]) for _ in range(100))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(8)))
    assert replayed.replay is not None


@native
def test_an_op_that_fails_says_so_and_the_next_call_runs():
    scale = torch.nn.Parameter(torch.ones(8), requires_grad=False)
    replayed = Replayed(lambda x: ops.group_norm_silu(x, 4, scale) * 1)
    x = torch.randn(1, 8, 4, 4)
    expected = [replayed(x) for _ in range(3)][-1]
    whole, scale.data = scale.data, torch.ones(4)
    with pytest.raises(RuntimeError, match="weight must have 8 elements"):
        replayed(x)
    scale.data = whole.clone()  # lies elsewhere now
    assert torch.equal(replayed(x), expected)


@native
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_transforms_and_tracers_see_the_call(generator):
    """To them a program is nothing."""
    replayed = Replayed(lambda x: ops.group_norm_silu(x + 1, 4) * 2)
    x, *others = torch.randn(5, 1, 8, 4, 4, generator=generator).unbind()
    with torch.no_grad():
        assert torch.equal(replayed(x), [replayed(x) for _ in range(3)][-1])
        traced = torch.jit.trace(lambda x: replayed(x), x, check_trace=False)
        together = torch.vmap(replayed)(torch.stack(others))
        for k, other in enumerate(others):
            assert torch.equal(traced(other), replayed(other))
            torch.testing.assert_close(together[k], replayed(other))


@native
def test_what_no_program_can_be_made_of():
    program, x = direct("program"), torch.ones(1, 8)
    for name, arguments in (
        ("aten::add", (x, x)),
        ("ddpm_fast::linear_packed", (x, x)),
        ("ddpm_fast::linear_packed", (x, x, None, None, 8, (1,))),
        ("ddpm_fast::linear_packed", (x, "weight", None, None, 8, x)),
    ):
        with pytest.raises(ValueError):
            program(((name, arguments),), 1)
    with pytest.raises(ValueError, match="count of tensors"):
        program((), 1)()
    with pytest.raises(ValueError, match="no tensor"):
        program((), 1)(1)
