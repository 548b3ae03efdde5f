"""What is fastest is measured once, kept, and believed only where it is clear."""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Iterator
from itertools import cycle, repeat
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ddpm_fast import Sampler, Schedule, UNet, UNetConfig, convolution, tuning
from ddpm_fast.convolution import Conv2d, allowed_conv3x3, can_pack, measured_batch, packing
from ddpm_fast.ops import _dispatch
from ddpm_fast.tuning import Call, fastest  # before a fixture puts the prior in its place

NAMES = ("a", "b", "c")
NATIVE = pytest.mark.skipif(_dispatch.NATIVE_MISSING is not None, reason="there is no compiled library")


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path) -> Path:
    """A new process, in a home of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    new_process(monkeypatch)
    return tmp_path


def new_process(monkeypatch) -> None:
    monkeypatch.setattr(tuning, "_FASTEST", {})
    monkeypatch.setattr(tuning, "_busy_until", 0.0)


def kept(home: Path) -> Path:
    (file,) = (home / "ddpm_fast").iterdir()
    return file


class Ways:
    """What `fastest` makes, counted; each call takes the next of a way's times, in ms."""

    def __init__(self, monkeypatch, **times: float | Iterator[float]) -> None:
        self.times = {name: repeat(t) if isinstance(t, (int, float)) else t for name, t in times.items()}
        self.made: list[str] = []
        self.timed: list[str] = []
        monkeypatch.setattr(tuning, "_time", self.time)

    def make(self, name: str) -> Call:
        self.made.append(name)
        return Call(lambda: None, name)

    def time(self, call: Call, others: torch.Tensor) -> float:
        self.timed.append(call.weight)
        return 1e-3 * next(self.times[call.weight])

    def fastest(self, of: str = "of", names: tuple[str, ...] = NAMES, prior: str = "a") -> str:
        return fastest((of,), names, prior, self.make)


@NATIVE
def test_it_is_the_one_that_takes_the_least_time(one_thread):
    def burning(milliseconds: float) -> Call:
        def run() -> None:
            end = time.thread_time() + milliseconds / 1e3
            while time.thread_time() < end:
                pass

        return Call(run, torch.ones(1000))

    took = {"a": 1.0, "b": 0.4, "c": 2.0}
    assert fastest(("one",), NAMES, "a", lambda name: burning(took[name])) == "b"
    assert fastest(("other",), NAMES, "b", lambda name: burning(took[name])) == "b"


@pytest.mark.parametrize(
    "b,expected",
    [
        (0.85, "b"),
        (0.92, "a"),  # not by a tenth
        (cycle([1.0, 1.0, 0.2]), "a"),  # by the least time, not by the median
        (cycle([0.6, 0.6, 1.1]), "b"),
        (iter([0.5] * 10 + [0.95] * 10), "a"),  # the first time, and not the second
    ],
)
def test_the_prior_stays_unless_another_is_clearly_faster(b, expected, monkeypatch):
    ways = Ways(monkeypatch, a=1.0, b=b, c=1.5)
    assert ways.fastest() == expected
    assert ways.made == ["a", "b", "c"] and ways.timed.count("c") == 1  # clearly slower at once
    assert ways.timed.count("a") > 3


def test_where_a_call_takes_no_time_to_speak_of_nothing_else_is_tried(monkeypatch):
    ways = Ways(monkeypatch, a=0.04, b=0.01, c=0.01)
    assert ways.fastest() == "a" and ways.made == ["a"]


def test_it_is_measured_once(monkeypatch, home):
    ways = Ways(monkeypatch, a=1.0, b=0.5, c=2.0)
    monkeypatch.setattr(os, "umask", None)  # to ask for it is to set it, for every thread
    assert [ways.fastest(), ways.fastest()] == ["b", "b"] and len(ways.made) == 3
    assert json.loads(kept(home).read_text())["machine"] == tuning.machine()
    new_process(monkeypatch)
    assert ways.fastest() == "b" and len(ways.made) == 3
    assert kept(home).stat().st_mode & 0o077 == 0o644 & 0o077  # as any other file


def test_what_else_is_measured_anew(monkeypatch, one_thread):
    ways = Ways(monkeypatch, a=1.0, b=0.5, c=2.0)

    def makes() -> int:
        new_process(monkeypatch)
        before = len(ways.made)
        ways.fastest(of, names)
        return len(ways.made) - before

    of, names = "of", NAMES
    assert [makes(), makes()] == [3, 0]
    of = "another shape"
    assert [makes(), makes()] == [3, 0]
    names = ("a", "b")
    assert [makes(), makes()] == [2, 0]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert [makes(), makes()] == [2, 0]
    here = tuning.machine()
    for part in ("processor", "kernels", "library", "torch"):
        monkeypatch.setattr(tuning, "machine", lambda part=part: here | {part: "another"})
        assert [makes(), makes()] == [2, 0], part
    monkeypatch.setattr(tuning, "machine", lambda: here)
    assert makes() == 0  # each has a file of its own


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "null",
        "[]",
        "{}",
        '{"machine": 3}',
        "deep",
        "unknown",
        "foreign",
        "a list",
        "lists",
        b"\xff\xfe",
    ],
)
def test_a_file_that_is_not_ours_is_measured_anew(content, monkeypatch, home):
    ways = Ways(monkeypatch, a=1.0, b=0.5, c=2.0)
    ways.fastest()
    file = kept(home)
    good = json.loads(file.read_text())
    (key,) = good["fastest"]
    edited = {
        "unknown": good | {"fastest": {key: "d"}},
        "foreign": good | {"machine": good["machine"] | {"torch": "1.0"}},
        "a list": good | {"fastest": {key: ["b"]}},
        "lists": good | {"fastest": [key]},
    }
    content = json.dumps(edited[content]) if content in edited else content
    content = "[" * 10**5 if content == "deep" else content
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    new_process(monkeypatch)
    assert ways.fastest() == "b" and len(ways.made) == 6
    assert json.loads(file.read_text()) == good and [*file.parent.iterdir()] == [file]


def test_two_processes_lose_nothing_but_time(monkeypatch, home):
    """Another one measures the same and something else meanwhile."""
    ways = Ways(monkeypatch, a=1.0, b=0.5, c=2.0)

    def make(name: str) -> Call:
        if name == "a":
            here = tuning._FASTEST
            new_process(monkeypatch)
            assert {ways.fastest("of"), ways.fastest("other")} == {"b"}
            monkeypatch.setattr(tuning, "_FASTEST", here)
        return ways.make(name)

    assert fastest(("of",), NAMES, "a", make) == "b"
    assert [*json.loads(kept(home).read_text())["fastest"].values()] == ["b", "b"]


def test_a_folder_that_cannot_be_written_in_is_no_error(monkeypatch, tmp_path):
    ways = Ways(monkeypatch, a=1.0, b=0.5, c=2.0)
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    assert ways.fastest() == "b"
    assert ways.fastest() == "b" and len(ways.made) == 3

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.delenv("XDG_CACHE_HOME")
    new_process(monkeypatch)
    assert ways.fastest() == "b" and len(ways.made) == 6


def test_without_xdg_cache_home_it_is_the_home_s(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which the standard says to ignore
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    Ways(monkeypatch, a=1.0, b=0.5, c=2.0).fastest()
    assert kept(tmp_path / ".cache").suffix == ".json"


def test_deterministic_algorithms_are_the_prior(monkeypatch, home):
    """Also where a faster way is known."""
    ways = Ways(monkeypatch, a=1.0, b=0.5, c=2.0)
    try:
        torch.use_deterministic_algorithms(True)
        assert ways.fastest() == "a" and not ways.made and not [*home.iterdir()]
        torch.use_deterministic_algorithms(False)
        assert ways.fastest() == "b"
        torch.use_deterministic_algorithms(True)
        assert ways.fastest() == "a"
    finally:
        torch.use_deterministic_algorithms(False)


def test_nothing_is_measured_where_somebody_looks_on(monkeypatch):
    ways = Ways(monkeypatch, a=1.0, b=0.5, c=2.0)
    with FlopCounterMode(display=False):
        assert ways.fastest() == "a" and not ways.made
    assert ways.fastest() == "b"
    with FlopCounterMode(display=False):
        assert ways.fastest() == "b"


def test_a_busy_machine_is_not_measured(monkeypatch, home):
    """It is the prior as long as this process runs, so that its results stay the same; nothing is kept."""
    ways = Ways(monkeypatch, a=1.0, b=0.5, c=2.0)

    def busy(call: Call, others: torch.Tensor) -> float:
        raise tuning._Busy

    monkeypatch.setattr(tuning, "_time", busy)
    assert ways.fastest() == "a" and ways.made == ["a"]
    monkeypatch.setattr(tuning, "_time", ways.time)
    assert ways.fastest("other") == "a" and ways.made == ["a"]  # nor tried again at once
    monkeypatch.setattr(tuning, "_busy_until", 0.0)
    assert ways.fastest() == "a" and ways.fastest("a third") == "b"
    assert len(json.loads(kept(home).read_text())["fastest"]) == 1


@NATIVE
def test_a_time_in_which_threads_waited_is_none(monkeypatch, one_thread):
    waited = iter(range(100))
    monkeypatch.setattr(tuning, "_waited", lambda: next(waited))
    others, call = torch.empty(2**18, dtype=torch.uint8), Call(lambda: None, torch.ones(8))
    assert tuning._time(call, others) < 1  # one thread's own time
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.raises(tuning._Busy):
        tuning._time(call, others)
    monkeypatch.setattr(tuning, "_waited", lambda: 5.0)
    others = torch.ones(2**18, dtype=torch.uint8)
    assert tuning._time(call, others) < 1 and others[: 2**17].sum() == 0  # which wakes threads
    monkeypatch.setattr(tuning, "_evict", lambda: lambda address, size: False)
    assert tuning._time(call, others) < 1 and others.sum() == 0  # in place of what was in the caches


@NATIVE
def test_a_weight_is_as_it_was(generator):
    weight = torch.randn(33, 7, 3, 3, generator=generator)
    before = weight.clone()
    tuning._flush(weight.flatten()[1:])
    assert torch.equal(weight, before)
    if can_pack(torch.float32):
        window = [1, 1], [1, 1], [1, 1], 1
        laid_out = torch.ops.mkldnn._reorder_convolution_weight(weight, *window, [1, 7, 8, 8])
        tuning._flush(laid_out)
        assert torch.equal(laid_out.to_dense(), before)


# ---- the convolutions ----


@pytest.mark.parametrize(
    "batch,side,threads,expected",
    [
        (1, 32, 1, 1),
        (3, 4, 1, 4),
        (5, 8, 1, 8),
        (8, 8, 1, 8),
        (9, 8, 1, 16),
        (8, 16, 1, 4),
        (8, 32, 2, 2),
        (1, 256, 1, 1),
    ],
)
def test_batches_that_are_measured(batch, side, threads, expected, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert measured_batch(batch, side, side) == expected


@pytest.fixture
def packs():
    if _dispatch.NATIVE_MISSING is not None or not can_pack(torch.float32):
        pytest.skip("there is nothing to choose from")
    packs = {}
    with packing(packs), torch.no_grad():
        yield packs


@pytest.mark.parametrize("amx", [False, True])
def test_a_layer_takes_what_is_fastest(amx, packs, generator, monkeypatch, one_thread):
    monkeypatch.setattr(convolution, "has_amx", lambda: amx)
    assert ("f4" in allowed_conv3x3(torch.float32)) != amx  # which errs too much there
    conv = Conv2d(32, 48, 3, padding=1)
    asked = set()
    for name in allowed_conv3x3(torch.float32):

        def choose(of, names, prior, make, name=name):
            asked.add((of, names, prior))
            call = make(name)
            call.run()
            assert (name == "oneDNN") == call.weight.is_mkldnn and convolution._TRIED.get() is None
            return name

        monkeypatch.setattr(tuning, "fastest", choose)
        for batch in (5, 8):
            x = torch.randn(batch, 32, 8, 8, generator=generator)
            got = conv(x.contiguous(memory_format=torch.channels_last))
            expected = torch.nn.functional.conv2d(x, conv.weight, conv.bias, padding=1)
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
            assert getattr(packs[conv].weight, "algorithm", "oneDNN") == name
    priors = {convolution.fastest_conv3x3(batch, 32, 8, 8) for batch in (5, 8)}
    (of,) = {of for of, *_ in asked}
    assert of[0] == "conv3x3" and of[-6:] == (torch.float32, 8, 32, 8, 8, 48)
    assert asked == {(of, allowed_conv3x3(torch.float32), prior) for prior in priors}
    with packing({}, low_memory=True):
        conv(x.contiguous(memory_format=torch.channels_last))  # is oneDNN's, and nobody is asked
    assert len(asked) == len(priors)


def test_a_measurement_leaves_no_trace_of_a_layer(packs, generator, monkeypatch, one_thread):
    """What was packed to be timed is gone, what a run has kept is not, and a wrapper sees nothing."""

    def measured(of, names, prior, make):
        for name in names:
            make(name).run()
        return chosen

    chosen, conv, seen = "oneDNN", Conv2d(32, 48, 3, padding=1), []
    monkeypatch.setattr(tuning, "fastest", measured)
    conv.forward = lambda x, **given: seen.append(x) or Conv2d.forward(conv, x, **given)
    x = torch.randn(3, 32, 8, 8, generator=generator).contiguous(memory_format=torch.channels_last)
    conv(x)
    assert len(seen) == 1 and conv not in convolution._KEPT
    chosen = "f2"
    conv(x)
    kept, chosen = convolution._KEPT[conv], "oneDNN"
    conv(x[:1])
    assert convolution._KEPT[conv] is kept


def test_whatever_is_fastest_a_network_is_as_exact(packs, generator, monkeypatch):
    """Relative to float64, in the 2-norm: 5e-6, with the same way in every layer."""
    model = UNet(UNetConfig((64, 128), (False, True), (True, False), sample_size=16)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:  # some start at zero
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5, generator=generator)
    x = torch.randn(2, 3, 16, 16, generator=generator).contiguous(memory_format=torch.channels_last)
    exact = copy.deepcopy(model).double()(x.double(), 500)
    for name in allowed_conv3x3(torch.float32):

        def choose(of, names, prior, make, name=name):
            return name if name in names else prior

        monkeypatch.setattr(tuning, "fastest", choose)
        assert (model(x, 500) - exact).norm() <= 5e-6 * exact.norm(), name


def test_a_run_measures_in_its_first_step(packs, home, monkeypatch, one_thread):
    """And is the same the next time, in this process and in another, replayed or not."""
    monkeypatch.setattr(tuning, "fastest", fastest)
    config = UNetConfig((64,), (False,), (False,), sample_size=32, layers_per_block=1)
    model = UNet(config).eval()
    sampler = Sampler(model, Schedule.linear(), num_steps=4)
    first = sampler(1)
    chosen = json.loads(kept(home).read_text())["fastest"]
    assert any("torch.float32 1 64 32 32 64, 1 threads: " in key for key in chosen)
    assert set(chosen.values()) <= {*allowed_conv3x3(torch.float32)}
    assert torch.equal(sampler(1), first)
    new_process(monkeypatch)
    monkeypatch.setattr(tuning, "_measured", None)
    assert torch.equal(Sampler(model, Schedule.linear(), num_steps=4, graph=False)(1), first)
