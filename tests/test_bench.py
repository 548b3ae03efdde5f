"""The suite measures what it says: arms compute the same, techniques switch, the clock is fair."""

from __future__ import annotations

import gc
import json
import os
import runpy
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ddpm_fast import cli
from ddpm_fast.bench import (
    growth,
    machine,
    measure,
    networks,
    ops,
    plot,
    report,
    sampling,
    suite,
    training,
    waterfall,
)
from ddpm_fast.bench.measure import Case
from ddpm_fast.bench.report import Column, Picture, Table
from ddpm_fast.bench.settings import Settings
from ddpm_fast.compat import peers
from ddpm_fast.compat.peers import Missing, attempt
from ddpm_fast.compat.peers import diffusers as diffusers_peer
from ddpm_fast.ops import _dispatch
from ddpm_fast.unet import UNet

QUICK = Settings(quick=True)
ROOT = Path(__file__).parents[1]
PEERS = ("diffusers", "openvino", "onnxruntime", "onnxscript", "denoising_diffusion_pytorch", "matplotlib")

pytestmark = pytest.mark.usefixtures("one_thread")


class Clock:
    """A clock that only moves when an arm moves it."""

    def __init__(self, monkeypatch) -> None:
        self.now, self.calls = 0.0, []
        monkeypatch.setattr(measure.time, "perf_counter", lambda: self.now)

    def arm(self, name, seconds):
        def run():
            self.calls.append(name)
            self.now += seconds() if callable(seconds) else seconds

        return run


# measure


def test_arms_take_turns_without_garbage_collection(monkeypatch):
    clock, collecting = Clock(monkeypatch), []
    arms = {name: clock.arm(name, 1.0) for name in "abc"}
    arms["c"] = lambda run=arms["c"]: (collecting.append(gc.isenabled()), run())[1]
    rounds = []
    measure.measure(arms, 4, on_round=lambda: rounds.append(1))
    assert clock.calls[:6] == list("aabbcc")  # once for the check, once for the repeats
    assert clock.calls[6:] == list("abcbcacababc")
    assert not any(collecting[2:]) and gc.isenabled() and len(rounds) == 4


def test_ratios_are_of_a_round_so_that_a_drift_falls_on_all_arms(monkeypatch):
    clock = Clock(monkeypatch)
    fast, slow = clock.arm("fast", lambda: 1 + len(clock.calls)), clock.arm("slow", lambda: 3 + clock.now * 0)
    timing = measure.measure({"a": fast, "b": slow}, 2)
    assert timing.seconds["b"] == [3, 3] and timing.seconds["a"][0] < timing.seconds["a"][1]
    drifting = measure.Timing({"ours": [1.0, 2.0, 8.0], "theirs": [3.0, 6.0, 24.0]})
    assert drifting.ratio("theirs", "ours") == [3, 3, 3]
    assert drifting.time("ours", calls=2) == [0.75, 1, 2.5]
    assert drifting.fastest("theirs", "ours", "none") == "ours" and drifting.fastest("none") is None


def test_a_short_arm_is_repeated_and_stated_by_the_call(monkeypatch):
    clock = Clock(monkeypatch)
    timing = measure.measure({"a": clock.arm("a", measure.A_ROUND / 8)}, 2)
    assert len(clock.calls) == 2 + 2 * 8
    assert timing.time("a") == pytest.approx([measure.A_ROUND / 8] * 3)


@pytest.mark.parametrize(
    "arms,rounds,error,words",
    [
        ({}, 2, ValueError, "arms must not be empty"),
        ({"a": lambda: None}, 1, ValueError, "rounds must be at least 2, got 1"),
        ({"a": lambda: torch.zeros(3)}, 2, ValueError, "a gives zeros only"),
        ({"a": lambda: (torch.ones(3), torch.tensor(float("nan")))}, 2, ValueError, "a gives .* not finite"),
        ({"a": lambda: torch.set_num_threads(2)}, 2, RuntimeError, "changed torch's threads from 1 to 2"),
    ],
)
def test_what_is_not_timed(arms, rounds, error, words):
    with pytest.raises(error, match=words):
        measure.measure(arms, rounds)


def test_ceilings_and_machine():
    found = measure.ceilings(torch.device("cpu"), 2)
    assert [*found] == ["copy_ GB/s", "matmul float32 GFLOP/s", "matmul bfloat16 GFLOP/s"]
    assert all(0 < low <= middle <= high for low, middle, high in found.values())
    about = machine.machine(torch.device("cpu"))
    text = json.dumps(about)
    assert about["threads"] == 1 and about["processor"] and str(ROOT) not in text
    if torch.backends.mkldnn.is_available() and about["onednn"]:  # it says nothing where it was built not to
        assert {"version", "isa", "float32 convolution"} <= about["onednn"].keys()
    assert about["versions"]["torch"] in machine.summary(about)


# report


def table(**given):
    columns = [Column("name", "", "text"), Column("time", "time", "time"), Column("ratio", "a / b", "ratio")]
    rows = [
        {"name": "a", "time": [1.2e-5, 1.25e-5, 1.3e-5], "ratio": [1.0, 2.0, 3.0], "n": 1, "whose": "ours"},
        {"name": "b", "time": 0.25, "n": 2, "whose": "peers", "memory": 2**20},
    ]
    return Table("t", "A title", columns, rows, **given)


def test_markdown_and_json():
    found = table(skipped={"x": "no", "y": "no", "z": "never"}, remarks=["A remark."])
    assert found.markdown().splitlines() == [
        "**A title**",
        "",
        "|   |    time |             a / b |",
        "| - | ------: | ----------------: |",
        "| a | 12.5 us | 2.00x (1.00-3.00) |",
        "| b |  250 ms |                   |",
        "",
        "A remark.",
        "",
        "Not measured:",
        "- x; y: no",
        "- z: never",
    ]
    back = json.loads(report.as_json({"quick": True}, [found]))
    assert back["quick"] is True and back["tables"][0]["rows"] == found.rows
    assert back["tables"][0]["skipped"] == found.skipped


def test_a_file_is_whole_or_as_it_was(tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    report.write(file, b"old")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        report.write(file, b"new")
    assert file.read_bytes() == b"old" and list(tmp_path.iterdir()) == [file]
    with pytest.raises(IsADirectoryError):
        report.check_writable(tmp_path)


def test_every_picture_is_drawn():
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install ddpm_fast[bench]")
    pictures = [
        Picture("bars", "bars", "name", "time", series=("whose",)),
        Picture("bars", "one bar", "name", "ratio", where={"name": "b"}),  # which has no ratio
        *(Picture(kind, kind, "n", "time", series=("whose",)) for kind in ("lines", "points")),
        Picture("lines", "memory", "n", "memory"),
    ]
    assert plot.draw([table(pictures=pictures)], "png").startswith(b"\x89PNG")
    svg = plot.draw([table(pictures=pictures)], "svg").decode()
    assert svg.count('id="axes_') == 4  # none for the one without rows, nor for what is left of the sheet
    with pytest.raises(ValueError, match="no table that was measured has a picture"):
        plot.draw([table()], "png")


# what the arms compute


OP_CASES = list(ops.cases(QUICK))


@pytest.mark.parametrize(
    "k", range(len(OP_CASES)), ids=lambda k: " ".join(map(str, OP_CASES[k].labels.values()))
)
def test_the_arms_of_an_op_compute_the_same_and_its_bytes_are_counted(k):
    """How exact each is, `test_ops` says; of noise that an arm draws itself, the spread is compared."""
    case = OP_CASES[k]
    op = case.labels["op"]
    with torch.no_grad():
        torch.manual_seed(0)
        runs, skipped = case.built()
        assert {"eager", "reference", "copy_"} <= runs.keys()
        assert skipped["inductor"] == "--quick compiles nothing"
        first = (
            op != "posterior_step_, noise given"
        )  # in place: a second arm starts where the first has ended
        for name in ("native", "reference") if first else ("native",):
            for ours, eager in zip(
                *map(tree_leaves, (runs.get(name, runs["eager"])(), runs["eager"]())), strict=True
            ):
                assert ours.shape == eager.shape and ours.dtype == eager.dtype
                if op in ("q_sample_counter", "counter_normal", "posterior_step_, noise drawn"):
                    assert ours.float().std().item() == pytest.approx(eager.float().std().item(), rel=0.1)
                elif first:
                    assert (ours - eager).abs().max() <= 8 * torch.finfo(ours.dtype).eps * eager.abs().max()
    size = case.labels["elements"] * getattr(torch, case.labels["dtype"]).itemsize
    assert case.copied == 2 * size
    passes = {
        "group_norm_silu": 2,  # x; y
        "group_norm_silu and backward": 5,  # x; y; x and its gradient; that of y
        "group_norm_silu_concat": 3,  # x and skip; y and the concatenation
        "q_sample": 3,
        "q_sample_counter": 3,  # x0; x_t and the noise
        "posterior_step_, noise given": 4,
        "posterior_step_, noise drawn": 3,
        "counter_normal": 1,
    }
    assert case.bytes == passes[op] * size


def test_a_step_of_the_formula_is_ours():
    """`plain.p_sample`, OpenAI's, against the table's row at the same time, the noise given."""
    with torch.no_grad():
        torch.manual_seed(0)
        made = ops._step((2, 3, 8), torch.float32, torch.contiguous_format, torch.device("cpu"), drawn=False)
        expected = made.run(made.eager)()
        got = made.run(lambda *args: made.ours(*args, backend="reference"))()
    assert (got - expected).abs().max() <= 1e-5


def test_the_whole_table_of_ops_states_bandwidth_and_ratios():
    found = ops.table(replace(QUICK, rounds=2))
    native = [row for row in found.rows if row["backend"] == "native"]
    if _dispatch.NATIVE_MISSING is None:
        assert {row["op"] for row in native} == {case.labels["op"] for case in OP_CASES}
    for row in found.rows:
        seconds = row["time"][1]
        case = next(c for c in OP_CASES if c.labels.items() <= row.items())
        assert row["gb_s"] == pytest.approx(case.bytes / seconds / 1e9)
        assert row["best"] == row["eager"] and row["of_copy"] > 0
    assert any(remark.startswith("- group_norm_silu, reference: geometric mean") for remark in found.remarks)


@pytest.fixture(scope="module")
def model():
    return networks.network(networks.SMALL)


class Seen(TorchDispatchMode):
    """The ops that a call dispatches, and the layouts and dtypes of what is convolved."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()
        self.inputs: set[tuple[bool, torch.dtype]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.ops["fused norm" if name.startswith("group_norm_") else name] += 1
        if "conv" in name and isinstance(args[0], torch.Tensor) and args[0].dim() == 4:
            x = args[0]
            self.inputs.add((x.is_contiguous(memory_format=torch.channels_last), x.dtype))
        return func(*args, **(kwargs or {}))


def seen(network, x) -> Seen:
    network(x, networks.TIME)  # lays out what it lays out once
    with Seen() as found:
        network(x, networks.TIME)
    return found


def test_each_row_of_the_waterfall_switches_one_technique_on(model):
    if reason := _dispatch.why_not("conv3x3", "native", "cpu", torch.float32):
        pytest.skip(reason)
    if not networks.can_pack(torch.float32):
        pytest.skip("this torch has no oneDNN")
    made, runs, missing = waterfall._arms(QUICK, model, 2)
    x = sampling.noise(model, 2)
    rows = {name: seen(made[name], x) for name in waterfall.TECHNIQUES if name in made}
    assert missing["compile"] == "--quick compiles nothing"
    assert missing["CUDA graph"] == "it needs a CUDA device"
    plain, last = rows["the same in our modules"], {}
    assert plain.ops["native_group_norm"] and plain.inputs == {(False, torch.float32)}
    on = {
        "channels_last": lambda row: row.inputs == {(True, torch.float32)},
        "prepacked weights": lambda row: row.ops["_convolution_pointwise"] > 0 == row.ops["convolution"],
        "fused ops": lambda row: row.ops["fused norm"] > 0 == row.ops["native_group_norm"],
        "time tables": lambda row: row.ops["index_select"] > 0 == row.ops["sin"],
        "own kernels": lambda row: row.ops["conv3x3_packed"] > 0,
        "bfloat16": lambda row: row.inputs == {(True, torch.bfloat16)},
    }
    for name, row in rows.items():
        last |= {technique: holds(row) for technique, holds in on.items()}
        so_far = [*waterfall.TECHNIQUES][: [*waterfall.TECHNIQUES].index(name) + 1]
        expected = {technique: technique in so_far for technique in on}
        if "bfloat16" in so_far:  # float32's layout, and its kernels: bfloat16 has another
            expected |= {"channels_last": False, "own kernels": last["own kernels"]}
        assert last == expected, name
    exact = made["the same in our modules"](x, networks.TIME)
    for name in rows:
        bound = 2e-2 if name == "bfloat16" else 5e-6
        assert sampling.error(made[name](x, networks.TIME), exact) <= bound, name
    for run in runs.values():
        assert run().shape == x.shape


def test_a_replayed_network_leaves_its_modules_alone(model, monkeypatch):
    calls, forward_rows = [], UNet.forward_rows
    monkeypatch.setattr(UNet, "forward_rows", lambda *given: calls.append(1) or forward_rows(*given))
    x = sampling.noise(model, 2)
    for replayed, expected in ((True, 2), (False, 4)):
        calls.clear()
        network = networks.ours(model, replayed=replayed)
        for _ in range(4):
            network(x, networks.TIME)
        assert len(calls) == expected


def test_our_network_is_the_model(model):
    x = sampling.noise(model, 2)
    with torch.no_grad():
        expected = model(x, networks.TIME)
    assert expected.abs().max() > 0.1  # not an untrained U-Net's zeros
    assert sampling.error(networks.ours(model)(x, networks.TIME), expected) <= 5e-6


def test_diffusers_twin_is_the_model(diffusers, model):
    x = sampling.noise(model, 2)
    twin = diffusers_peer.unet(model)
    with torch.no_grad():
        assert sampling.error(twin(x, networks.TIME).sample, model(x, networks.TIME)) <= 5e-6
    assert not twin.training


@pytest.mark.parametrize("fused", [True, False])
def test_a_training_step_trains(fused):
    """Gradients reach every parameter, and the optimizer moves it."""
    kept = {}

    def build(model):
        kept["module"], loss = training._our_loss(model, fused=fused, channels_last=True)
        kept["before"] = [p.detach().clone() for p in kept["module"].parameters()]
        return kept["module"], loss

    loss = training._arm(QUICK, 2, torch.float32, "ours", build)()
    assert 0.1 < loss < 10
    moved = zip(kept["before"], kept["module"].parameters(), strict=True)
    assert all((before != after).any() for before, after in moved)


def test_the_trainer_s_arm_trains():
    step = training._trainer(QUICK, 2, torch.float32)
    with torch.no_grad():  # as arms are measured
        losses = [float(step()) for _ in range(3)]
    assert all(0.1 < loss < 10 for loss in losses) and len(set(losses)) == 3


def test_a_gpu_s_part_is_asked_for_on_a_gpu_only():
    device = torch.device("cuda")
    assert sampling.batches(Settings(device)) == (1, 8, 64, 256)
    assert sampling.batches(Settings()) == (1, 8)
    assert sampling.batches(Settings(network="ddpm-celebahq-256")) == (1,)
    assert max(b for b, *_ in ops._shapes(Settings(device))[0]) == 256


# peers


def test_what_fails_elsewhere_is_a_reason():
    def fails():
        raise RuntimeError("first line\nsecond line")

    with pytest.raises(Missing, match=r"^failed: RuntimeError: first line$"):
        attempt(fails)
    with pytest.raises(Missing, match=r"^failed: RuntimeError"):
        attempt(lambda: fails)
    with pytest.raises(Missing, match=r"^nothing_of_this_name is not installed$"):
        attempt(lambda: peers.require("nothing_of_this_name"))
    case = Case({}, {"a": lambda: len, "b": lambda: peers.require("nothing_of_this_name")})
    assert case.built() == ({"a": len}, {"b": "nothing_of_this_name is not installed"})


def test_arms_that_are_left_out():
    settings = Settings(quick=True, skip=("autotune", "OpenVINO"))
    settings.check("diffusers, as shipped")
    for name in ("OpenVINO, bfloat16", "bfloat16, max-autotune"):
        with pytest.raises(Missing, match="left out by --skip"):
            settings.check(name, compiles=True)
    with pytest.raises(Missing, match="--quick compiles nothing"):
        settings.check("diffusers, compiled", compiles=True)


def test_peers_talk_is_not_shown(capsys):
    attempt(lambda: lambda: print("hello"))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("peer", peers.peers(), ids=lambda peer: peer.name)
def test_each_peer_computes_the_network(model, peer):
    if peer.compiles:
        pytest.skip("it compiles for a minute: ddpm-fast bench sampling")
    x = sampling.noise(model, 2)
    try:
        network = attempt(lambda: peer.build(model, x), x, networks.TIME)
    except Missing as reason:
        assert "is not installed" in str(reason) or "processor" in str(reason)
        pytest.skip(str(reason))
    out = network(x, networks.TIME)
    assert out.shape == x.shape and out.is_floating_point()
    if peer.converts:
        bound = 5e-6 if peer.dtype == torch.float32 else 4e-2
        with torch.no_grad():
            assert sampling.error(out, model(x, networks.TIME)) <= bound


# growth


def rows(seconds, peaks):
    counts = (10, 100, 1000)
    return [
        {"steps": n, "time": [s] * 3, "memory": m} for n, s, m in zip(counts, seconds, peaks, strict=True)
    ]


def test_growth_is_judged():
    flat = rows([0.11, 1.01, 10.01], [2**30] * 3)
    assert "10.00 ms a step and 10.0 ms a run; 3 points are within 0.0%" in growth._linear("float32", flat)
    assert "does not grow" in growth._flat("float32", flat)
    grows = rows([0.1, 1.0, 20.0], [2**30, 2**30, 2**30 + 5 * 2**20])
    off = float(growth._linear("float32", grows).split("within ")[1].split("%")[0])
    assert off > 20
    assert "GROWS with the steps: 1000 take +5.0 MiB" in growth._flat("float32", grows)
    assert "not measured" in growth._flat("float32", rows([1, 2, 3], [None, 1, 2]))


def test_a_point(monkeypatch):
    """`test_the_whole_suite_runs_with_none_of_the_peers` runs it in a process of its own."""
    point = growth.Point(2, 16, 3, "float32", "cpu", 1, True, "ddpm-cifar10-32")
    found = growth.run(point)
    assert found["time"][1] > 0
    assert found["each"][1] == pytest.approx(found["time"][1] / 6)
    if sys.platform.startswith("linux"):
        assert 0 <= found["above"] < found["memory"]  # 0 where what earlier tests freed is enough
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="Traceback\nOutOfMemory: none is left")
    monkeypatch.setattr(growth.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RuntimeError, match=r"growth: Point\(batch=2.* failed: OutOfMemory: none is left"):
        growth._in_its_own_process(point)


# the command


def call(monkeypatch, capsys, *args):
    monkeypatch.setattr(sys, "argv", ["ddpm-fast", "bench", *map(str, args)])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    return exit_.value.code, capsys.readouterr()


@pytest.mark.parametrize(
    "args,words",
    [
        (("networks",), "'networks' is no group of benchmarks; allowed: ops, steps, sampling, training"),
        (("ops", "--only", "waterfall"), "--only 'waterfall' is not known here; allowed: ops"),
        (
            ("ops", "--network", "cifar"),
            "--network 'cifar' is not known; allowed: ddpm-cifar10-32, ddpm-celebahq-256",
        ),
        (("--device", "gpu"), "--device 'gpu' cannot be used here"),
        (("--device", "meta"), "--device 'meta' is not measured; allowed: cpu, cuda"),
        (("--threads", 0), "--threads must be at least 1, got 0"),
        (("--rounds", 1), "--rounds must be at least 2, got 1"),
        (("--plot", "a.jpg"), "--plot must end in .png, .svg, .pdf, got a.jpg"),
        (("--json", "/proc/none/a.json"), "cannot be written"),
    ],
)
def test_bad_arguments_are_one_line_before_any_work(monkeypatch, capsys, args, words):
    monkeypatch.setattr(suite, "machine", None)  # what all work begins with
    monkeypatch.setattr(plot, "why_not", lambda: None)
    code, output = call(monkeypatch, capsys, *args)
    assert words in str(code) and str(code).startswith("error: ") and not output.out


def test_a_plot_without_matplotlib_is_an_error_before_any_work(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _ = call(monkeypatch, capsys, "--plot", tmp_path / "a.png")
    assert code == "error: --plot cannot draw: matplotlib is not installed: pip install ddpm_fast[bench]"


def test_the_command(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(machine, "onednn", dict)  # which takes a process
    file, picture = tmp_path / "deep" / "a.json", tmp_path / "a.svg"
    args = ["steps", "--quick", "--rounds", 2, "--threads", 1, "--device", "cpu", "--json", file]
    if plot.why_not() is None:
        args += ["--plot", picture]
    code, output = call(monkeypatch, capsys, *args)
    assert code == 0
    assert output.out.startswith("`ddpm-fast bench steps --quick --rounds 2") and "1 threads" in output.out
    assert "**A scheduler's step**" in output.out and "--quick: to see that it runs" in output.out
    assert "3/3" in output.err  # the bar
    found = json.loads(file.read_text())
    assert [t["name"] for t in found["tables"]] == ["steps", "overhead"] and found["machine"]["threads"] == 1
    assert found["ceilings"]["copy_ GB/s"] and [*file.parent.iterdir()] == [file]
    if plot.why_not() is None:
        assert picture.read_text().count('id="axes_') == 5


BLOCKED = f"""
import sys
for name in {PEERS!r}:
    sys.modules[name] = None
from ddpm_fast.cli import main
main()
"""


def test_the_whole_suite_runs_with_none_of_the_peers(tmp_path):
    args = ["bench", "--quick", "--rounds", "2", "--threads", "1", "--json", "a.json"]
    command = [sys.executable, "-c", BLOCKED, *args]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    tables = {table["name"]: table for table in json.loads((tmp_path / "a.json").read_text())["tables"]}
    assert [*tables] == [
        *("ops", "steps", "overhead", "waterfall", "forward", "runs", "growth", "stream", "training")
    ]
    assert all(table["rows"] for table in tables.values())
    for name in ("steps", "overhead", "forward", "runs", "training"):
        skipped = tables[name]["skipped"]
        assert any(why == "diffusers is not installed" for why in skipped.values()), name
    skipped = tables["forward"]["skipped"]
    assert skipped["OpenVINO"] == "openvino is not installed"
    assert skipped["ONNX Runtime"] == "onnxruntime is not installed"
    assert skipped["denoising-diffusion-pytorch"] == "denoising_diffusion_pytorch is not installed"
    assert {row["arm"] for row in tables["forward"]["rows"]} == {"ours", "ours, bfloat16"}
    if sys.platform.startswith("linux"):
        assert all(0 < row["above"] < row["memory"] for row in tables["growth"]["rows"])
        assert "does not grow" in done.stdout
    assert "- OpenVINO" in done.stdout


def test_pytest_runs_the_suite_too(tmp_path):
    """One arm of it; the whole is for a quiet machine."""
    options = ["--quick", "-k", "overhead and ddim and ours", "-p", "no:cacheprovider"]
    options += ["--benchmark-max-time=0.01", "--benchmark-min-rounds=2"]
    command = [sys.executable, "-m", "pytest", str(ROOT / "benchmarks"), *options]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout and "overhead, ddim, 50" in done.stdout


def test_the_spread_of_runs():
    """Rows and tables that every run has; of each ratio the runs' medians."""
    spread = runpy.run_path(str(ROOT / "benchmarks" / "spread.py"))["spread"]

    def run(*rows, also=()):
        columns = [Column("op", "op", "text"), Column("backend", "backend", "text")]
        columns += [Column("best", "best / ours", "ratio"), Column("gb_s", "GB/s", "number")]
        rows = [
            {"op": op, "backend": "native", "best": [ratio - 1, ratio, ratio + 9], "gb_s": 7}
            for op, ratio in rows
        ]
        tables = [Table("ops", "Ops", columns, rows), *(Table(name, name, []) for name in also)]
        return json.loads(report.as_json({}, tables))

    runs = [
        run(("a", 2), ("b", 8), ("c", 1), also=["steps"]),
        run(("b", 9), ("a", 4)),
        run(("a", 3), ("b", 2)),
    ]
    (table,) = spread(runs)
    assert [row["op"] for row in table.rows] == ["a", "b"]
    assert [row["best"] for row in table.rows] == [[2, 3, 4], [2, 8, 9]]
    assert "gb_s" not in table.rows[0]
    assert table.remarks[0].startswith(
        "- a, native: geometric mean 2.00x 4.00x 3.00x, worst 2.00x 4.00x 3.00x"
    )
    with pytest.raises(ValueError, match="no table in common"):
        spread([runs[0], {"tables": []}])
