"""The CUDA kernels on the host, every CUDA thread a fibre, under AddressSanitizer and UBSan.

All cases run in two processes, one for each order of threads and blocks; the tests look at what they left.
"""

from __future__ import annotations

import functools
import itertools
import math
import mmap
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from op_cases import CASES, DTYPES, EAGER, Case, _norm_inputs, cast, check_error_rule, upcast
from torch import Tensor

from ddpm_fast import reference

HERE = Path(__file__).parent / "cuda_host"
CUDA = Path(__file__).parents[1] / "csrc" / "cuda"
LAYOUTS = ("contiguous", "channels_last")
ALIGNMENTS = ("aligned", "unaligned")
ORDERS = ("ascending", "descending")
DTYPE_NUMBERS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # csrc/dtype.h


def names(value) -> str:
    return getattr(value, "id", None) or str(value).removeprefix("torch.")


def cases_of(op: str) -> list[Case]:
    return [c for c in CASES if c.op == op]


def case_named(op: str, name: str) -> Case:
    return next(c for c in cases_of(op) if c.name == name)


# ---- building and running ----

SANITIZED = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
OPTIONS = {"ASAN_OPTIONS": "detect_leaks=0"}  # the process is its only owner of what it leaves behind


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """Where programs are built, if they can be."""
    folder = tmp_path_factory.mktemp("cuda_host")
    probe = ["g++", *SANITIZED, "-x", "c++", "-", "-o", str(folder / "probe")]
    try:
        subprocess.run(
            probe,
            input="int main() { return static_cast<int>(_Float16(0)); }",
            text=True,
            check=True,
            capture_output=True,
        )
        subprocess.run([folder / "probe"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"g++ builds no program with AddressSanitizer and _Float16: {error}")
    return folder


def build(folder: Path, name: str, sources: list[Path]) -> Path:
    """A program of `sources` and the runtime."""

    def compile_one(source: Path) -> str:
        to = folder / f"{source.name}.o"
        flags = ["-O2"] if source.name == "runtime.cpp" else SANITIZED  # it switches the stacks
        command = ["g++", "-x", "c++", "-std=c++20", "-g1", "-w", *flags, f"-I{HERE}", f"-I{CUDA}"]
        done = subprocess.run([*command, "-c", str(source), "-o", str(to)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return str(to)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, [*sources, HERE / "runtime.cpp"]))
    subprocess.run(["g++", *SANITIZED, *objects, "-o", str(folder / name)], check=True)
    return folder / name


@pytest.fixture(scope="session")
def kernels(folder) -> Path:
    sources = sorted(CUDA.glob("*.cu"), key=lambda path: -path.stat().st_size)  # the longest first
    return build(folder, "kernels", [*sources, HERE / "main.cpp"])


@pytest.fixture(scope="session")
def faults(folder) -> Path:
    return build(folder, "faults", [HERE / "faults.cu"])


@dataclass
class Run:
    """One call of a kernel: what cuda_host/main.cpp reads."""

    id: str
    op: str
    numbers: dict[str, float] = field(default_factory=dict)
    given: dict[str, Tensor] = field(default_factory=dict)
    """In the order of memory: their bytes are taken as they lie."""
    filled: dict[str, tuple[int, torch.dtype]] = field(default_factory=dict)
    """Elements and dtype of what the kernel writes; a name that is also `given` is written in place."""
    same: dict[str, str] = field(default_factory=dict)
    last: dict[str, str] = field(default_factory=dict)
    """Tensors of the run before this one, by this one's names."""
    unaligned: bool | str = False
    """Whether floating tensors lie one element off, or the name of the one that does."""

    def write(self, to) -> None:
        to.write(f"case {self.id} {self.op}\n".encode())
        for name, value in self.numbers.items():
            to.write(f"number {name} {float(value).hex() if math.isfinite(value) else value}\n".encode())
        for name, (elements, dtype) in self.filled.items():
            if name not in self.given:
                where = f"{self.offset(name, dtype)} {elements * dtype.itemsize}"
                to.write(f"out {name} {where}\n".encode())
        for name, value in self.given.items():
            kind = "inout" if name in self.filled else "in"
            where = f"{self.offset(name, value.dtype)} {value.nbytes}"
            to.write(f"{kind} {name} {where}\n".encode())
            to.write(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        for kind, others in (("same", self.same), ("last", self.last)):
            for name, other in others.items():
                to.write(f"{kind} {name} {other}\n".encode())
        to.write(b"end\n")

    def offset(self, name: str, dtype: torch.dtype) -> int:
        off = self.unaligned is True or self.unaligned == name
        return dtype.itemsize if off and dtype.is_floating_point else 0


class Results:
    """What a process left, by run and name."""

    def __init__(self, path: Path, status: int):
        self.status = status
        self.log = path.with_suffix(".log").read_text()
        self.where: dict[str, dict[str, tuple[int, int]]] = {}
        with path.open("rb") as file:
            self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # outlives the file
            while line := file.readline().split():
                assert line[0] == b"case"
                run = self.where[line[1].decode()] = {}
                while (line := file.readline().split()) != [b"end"]:
                    run[line[0].decode()] = (file.tell(), int(line[1]))
                    file.seek(int(line[1]), os.SEEK_CUR)
        path.unlink()

    def why_missing(self, run: str) -> str:
        if run in self.log.splitlines():
            return f"{run} ended the process:\n{self.log[self.log.index(run) :][:6000]}"
        return f"{run} was not reached: another one ended the process"

    def get(self, run: str, name: str, like: Tensor, layout: str = "contiguous") -> Tensor:
        """The tensor of `like`'s shape and dtype that a run left."""
        if run not in self.where:
            pytest.fail(self.why_missing(run), pytrace=False)
        start, size = self.where[run][name]
        flat = torch.frombuffer(bytearray(self.bytes[start : start + size]), dtype=like.dtype)
        if layout == "channels_last" and like.dim() == 4:
            return flat.reshape(like.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)
        return flat.reshape(like.shape)


@pytest.fixture(scope="session")
def both_orders(folder, kernels) -> tuple[Results, Results]:
    """All runs with threads and blocks in ascending order, and in descending order."""
    cases = folder / "cases"
    with cases.open("wb") as file:
        for run in all_runs():
            run.write(file)
    processes = []
    for order in ORDERS:
        command = [kernels, cases, folder / order, order]
        with (folder / f"{order}.log").open("w") as log:
            processes.append(subprocess.Popen(command, stderr=log, env=os.environ | OPTIONS))
    if [process.wait() for process in processes] == [0, 0]:
        cases.unlink()
    return tuple(Results(process.args[2], process.returncode) for process in processes)


@pytest.fixture
def results(both_orders) -> Results:
    return both_orders[0]


def test_the_order_of_threads_and_blocks_does_not_matter(both_orders):
    ascending, descending = both_orders
    for order in both_orders:
        assert order.status == 0, order.log[-6000:]
    assert ascending.where == descending.where
    for run, outputs in ascending.where.items():
        for name, (start, size) in outputs.items():
            bits = ascending.bytes[start : start + size]
            assert bits == descending.bytes[start : start + size], f"{run}: {name} depends on the order"


# ---- from an op's arguments to runs ----


def in_memory(x: Tensor | None, layout: str) -> Tensor | None:
    """The elements in the order of memory."""
    return x.permute(0, 2, 3, 1) if x is not None and x.dim() == 4 and layout == "channels_last" else x


def present(tensors: dict[str, Tensor | None]) -> dict[str, Tensor]:
    return {name: value for name, value in tensors.items() if value is not None}


def layout_numbers(x: Tensor, layout: str) -> dict[str, int]:
    last = layout == "channels_last" and x.dim() == 4
    return {
        "layout_pixels": x[0, 0].numel() if last else 0,
        "layout_channels": x.shape[1] if last else 0,
    }


def run_id(*parts) -> str:
    return "-".join(map(names, parts))


def inputs_of(case: Case, dtype: torch.dtype) -> dict:
    """As the op of one tensor has them: of a concatenation, `split_of` says where it is cut."""
    inputs = cast(case.inputs(torch.Generator().manual_seed(0)), dtype)
    if case.op == "group_norm_silu_concat":
        inputs["x"] = torch.cat([inputs["x"], inputs.pop("skip")], 1)
        inputs.pop("concat")
    return inputs


def split_of(case: Case) -> int:
    """The channels of x, before those of skip."""
    return case.inputs(torch.Generator())["x"].shape[1]


def sizes(x: Tensor) -> dict[str, int]:
    return {"batch": x.shape[0], "elements": x[0].numel()}


def q_sample_run(id: str, inputs: dict, layout: str, **changes) -> Run:
    x0, table = inputs["x0"], inputs["table"]
    given = {name: in_memory(value, layout) for name, value in inputs.items()}
    numbers = {"dtype": DTYPE_NUMBERS[x0.dtype], **sizes(x0), "rows": table.shape[0]}
    return Run(id, "q_sample", numbers, given, {"x_t": (x0.numel(), x0.dtype)}, **changes)


def posterior_step_run(id: str, inputs: dict, layout: str, **changes) -> Run:
    x, out, table, clip = (inputs[name] for name in ("x", "out", "table", "clip"))
    given = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    given["out"] = in_memory(out, layout)
    each = given.pop("clip", None)
    numbers = {
        "dtype": DTYPE_NUMBERS[x.dtype],
        "out_dtype": DTYPE_NUMBERS[out.dtype],
        **sizes(x),
        "out_elements": out[0].numel(),
        **layout_numbers(out, layout),
        "rows": table.shape[0],
        "columns": table.shape[1],
        "clip": math.inf if clip is None or each is not None else clip,
    }
    filled = {name: (x.numel(), x.dtype) for name in ("x_next", "x0")}
    return Run(
        id,
        "posterior_step",
        numbers,
        present(given | {"clip_each": each}),
        changes.pop("filled", filled),
        **changes,
    )


def group_norm_run(id: str, op: str, inputs: dict, layout: str, split: int | None = None, **changes) -> Run:
    """`split`: the channels of x, where the rest of inputs["x"] goes in as skip."""
    x = inputs["x"]
    operands = {name: inputs[name] for name in ("weight", "bias", "add", "scale", "shift")}
    numbers = {
        "dtype": DTYPE_NUMBERS[x.dtype],
        "channels_last": layout == "channels_last" and x.dim() == 4,
        "batch": x.shape[0],
        "channels": x.shape[1],
        "pixels": x[0, 0].numel(),
        "groups": inputs["num_groups"],
        "x_channels": split or x.shape[1],
        "eps": inputs["eps"],
        "silu": inputs["act"] == "silu",
    }
    for name, value in present(operands).items():
        numbers[f"{name}_dtype"] = DTYPE_NUMBERS[value.dtype]
        numbers[f"{name}_stride"] = value.stride(0) if value.dim() == 2 else 0
        if value.dim() == 2:  # with what lies between its rows
            operands[name] = value.as_strided(((len(value) - 1) * value.stride(0) + value.shape[1],), (1,))
    given = {"x": x if split is None else x[:, :split], "skip": None if split is None else x[:, split:]}
    given |= {"grad": inputs.get("grad")}
    given = {name: in_memory(value, layout) for name, value in given.items()} | operands
    return Run(id, op, numbers, present(given), **changes)


# ---- q_sample ----

Q_SAMPLE = list(itertools.product(cases_of("q_sample"), DTYPES, LAYOUTS, ALIGNMENTS))


def q_sample_runs():
    for case, dtype, layout, alignment in Q_SAMPLE:
        unaligned = alignment == "unaligned"
        id = run_id(case, dtype, layout, alignment)
        yield q_sample_run(id, inputs_of(case, dtype), layout, unaligned=unaligned)
    inputs = inputs_of(case_named("q_sample", "cifar"), torch.bfloat16)
    for name in ("x0", "noise", "x_t"):
        yield q_sample_run(f"q_sample-{name}-unaligned", inputs, "contiguous", unaligned=name)
    inputs["t"] = torch.tensor([1000, 5, -1])
    yield q_sample_run("q_sample-outside", inputs, "contiguous")


@pytest.mark.parametrize("case,dtype,layout,alignment", Q_SAMPLE, ids=names)
def test_q_sample(case, dtype, layout, alignment, results):
    inputs = inputs_of(case, dtype)
    x_t = results.get(run_id(case, dtype, layout, alignment), "x_t", inputs["x0"], layout)
    check_error_rule(x_t, EAGER["q_sample"](**inputs), reference.q_sample(**upcast(inputs)))


@pytest.mark.parametrize("name", ["x0", "noise", "x_t"])
def test_q_sample_with_one_tensor_unaligned(name, results):
    case = case_named("q_sample", "cifar")
    x0 = inputs_of(case, torch.bfloat16)["x0"]
    aligned = results.get(run_id(case, torch.bfloat16, "contiguous", "aligned"), "x_t", x0)
    assert torch.equal(results.get(f"q_sample-{name}-unaligned", "x_t", x0), aligned)


def test_q_sample_outside_the_table_is_nan(results):
    x0 = inputs_of(case_named("q_sample", "cifar"), torch.bfloat16)["x0"]
    x_t = results.get("q_sample-outside", "x_t", x0)
    assert x_t[0].isnan().all() and x_t[1].isfinite().all() and x_t[2].isnan().all()


# ---- posterior_step ----

STEP_CASES = cases_of("posterior_step")
STEPS = list(itertools.product(STEP_CASES, DTYPES, LAYOUTS, ALIGNMENTS))
HALF_OUTS = list(itertools.product(STEP_CASES, (torch.bfloat16, torch.float16), LAYOUTS))
STEPS_IN_PLACE = list(itertools.product(STEP_CASES, DTYPES, ("keeps_x0", "drops_x0")))
STEP_TENSORS = ("x", "out", "noise", "x0_prev", "x_next", "x0")


def half_out_inputs(case: Case, out_dtype: torch.dtype) -> dict:
    inputs = inputs_of(case, torch.float32)
    return inputs | {"out": inputs["out"].to(out_dtype)}


def posterior_step_runs():
    for case, dtype, layout, alignment in STEPS:
        unaligned = alignment == "unaligned"
        id = run_id(case, dtype, layout, alignment)
        yield posterior_step_run(id, inputs_of(case, dtype), layout, unaligned=unaligned)
    for case, out_dtype, layout in HALF_OUTS:
        yield posterior_step_run(
            run_id(case, "float32", out_dtype, layout), half_out_inputs(case, out_dtype), layout
        )
    for case, dtype, keeps in STEPS_IN_PLACE:
        inputs = inputs_of(case, dtype)
        x = inputs["x"]
        like_x = (x.numel(), x.dtype)
        run = posterior_step_run(run_id(case, dtype, keeps), inputs, "contiguous", filled={"x": like_x})
        run.same["x_next"] = "x"
        if keeps == "keeps_x0":
            where = "x0" if inputs["x0_prev"] is None else "x0_prev"
            run.filled[where] = like_x
            if where != "x0":
                run.same["x0"] = where
        yield run
    case = case_named("posterior_step", "history-and-noise")
    for name in STEP_TENSORS:
        inputs = inputs_of(case, torch.bfloat16)
        yield posterior_step_run(f"posterior_step-{name}-unaligned", inputs, "contiguous", unaligned=name)
    inputs = inputs_of(case, torch.float32) | {"i": torch.tensor([-1, 7])}
    yield posterior_step_run("posterior_step-outside", inputs, "contiguous")
    inputs = inputs_of(case, torch.float32)
    inputs["table"][:, 4:7] = 0
    inputs |= dict.fromkeys(("noise", "x0_prev"), torch.full_like(inputs["x"], math.nan))
    yield posterior_step_run("posterior_step-unused", inputs, "contiguous")


def check_step(got: tuple, inputs: dict):
    exact = reference.posterior_step(**upcast(inputs))
    eager = EAGER["posterior_step"](**inputs)
    for g, e, x in zip(got, eager, exact, strict=True):
        check_error_rule(g, e, x)


def step_of(results: Results, run: str, x: Tensor) -> tuple[Tensor, Tensor]:
    return results.get(run, "x_next", x), results.get(run, "x0", x)


@pytest.mark.parametrize("case,dtype,layout,alignment", STEPS, ids=names)
def test_posterior_step(case, dtype, layout, alignment, results):
    inputs = inputs_of(case, dtype)
    check_step(step_of(results, run_id(case, dtype, layout, alignment), inputs["x"]), inputs)


@pytest.mark.parametrize("case,out_dtype,layout", HALF_OUTS, ids=names)
def test_posterior_step_of_a_half_out(case, out_dtype, layout, results):
    inputs = half_out_inputs(case, out_dtype)
    got = step_of(results, run_id(case, "float32", out_dtype, layout), inputs["x"])
    check_step(got, inputs | {"out": inputs["out"].float()})


@pytest.mark.parametrize("case,dtype,keeps", STEPS_IN_PLACE, ids=names)
def test_posterior_step_in_place_is_the_step(case, dtype, keeps, results):
    inputs = inputs_of(case, dtype)
    x_next, x0 = step_of(results, run_id(case, dtype, "contiguous", "aligned"), inputs["x"])
    run = run_id(case, dtype, keeps)
    assert torch.equal(results.get(run, "x", x0), x_next)
    if keeps == "keeps_x0":
        assert torch.equal(results.get(run, "x0" if inputs["x0_prev"] is None else "x0_prev", x0), x0)


@pytest.mark.parametrize("name", STEP_TENSORS)
def test_posterior_step_with_one_tensor_unaligned(name, results):
    case = case_named("posterior_step", "history-and-noise")
    x = inputs_of(case, torch.bfloat16)["x"]
    aligned = step_of(results, run_id(case, torch.bfloat16, "contiguous", "aligned"), x)
    for got, expected in zip(step_of(results, f"posterior_step-{name}-unaligned", x), aligned, strict=True):
        assert torch.equal(got, expected)


def test_posterior_step_outside_the_table_is_nan(results):
    x = inputs_of(case_named("posterior_step", "history-and-noise"), torch.float32)["x"]
    assert all(value.isnan().all() for value in step_of(results, "posterior_step-outside", x))


def test_posterior_step_leaves_what_it_does_not_need(results):
    x = inputs_of(case_named("posterior_step", "history-and-noise"), torch.float32)["x"]
    assert all(value.isfinite().all() for value in step_of(results, "posterior_step-unused", x))


# ---- noise ----

SEEDS = (0, 1, 2**63 + 12345, 2**64 - 1)
SHAPES = ((3, 3, 32, 32), (2, 7), (1, 1), (5, 3, 17, 13), (4, 130))
NORMALS = list(itertools.product(SHAPES, SEEDS, ALIGNMENTS))
DRAWN_STEPS = list(itertools.product(("ddpm", "row-each", "learned", "points"), DTYPES, ALIGNMENTS))
DRAWN_SAMPLES = list(itertools.product(cases_of("q_sample"), DTYPES, LAYOUTS, ALIGNMENTS))


def whose(batch: int, seed: int = 8) -> dict[str, Tensor]:
    """A seed of 64 bits and image indexes across 2^32."""
    return {
        "seed": torch.tensor(seed - 2**64 if seed >= 2**63 else seed),
        "image_index": torch.arange(batch) + 2**32 - 1,
    }


def normal_arguments(shape: tuple[int, ...], seed: int) -> dict[str, Tensor]:
    return whose(shape[0], seed) | {"step": torch.arange(shape[0]) * 17}


def philox_arguments() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {k: torch.randint(0, 2**32, (1001, n), generator=g) for k, n in (("counter", 4), ("key", 2))}


def noise_runs():
    yield Run("philox", "philox4x32_10", {"n": 1001}, philox_arguments(), {"out": (4004, torch.int64)})
    for shape, seed, alignment in NORMALS:
        numbers = {"batch": shape[0], "elements": math.prod(shape[1:]), "stream": reference.STREAM_STEP}
        yield Run(
            run_id("normal", *shape, seed, alignment),
            "counter_normal",
            numbers,
            normal_arguments(shape, seed),
            {"out": (math.prod(shape), torch.float32)},
            unaligned=alignment == "unaligned",
        )
    empty = {"batch": 2, "elements": 0, "stream": reference.STREAM_STEP}
    yield Run("normal-empty", "counter_normal", empty, normal_arguments((2,), 0), {"out": (0, torch.float32)})
    for name, dtype, alignment in DRAWN_STEPS:
        unaligned = alignment == "unaligned"
        id = run_id("drawn", name, dtype, alignment)
        inputs = inputs_of(case_named("posterior_step", name), dtype)
        x = inputs["x"]
        who = whose(len(x))
        yield Run(
            f"{id}-noise",
            "counter_normal",
            {**sizes(x), "stream": reference.STREAM_STEP},
            who | {"step": inputs["i"]},
            {"out": (x.numel(), torch.float32)},
            unaligned=unaligned,
        )
        inputs["noise"] = None
        if dtype == torch.float32:
            given = posterior_step_run(f"{id}-given", inputs, "contiguous", unaligned=unaligned)
            given.last["noise"] = "out"
            yield given
        drawn = posterior_step_run(id, inputs, "contiguous", unaligned=unaligned)
        drawn.given |= who
        yield drawn
    for case, dtype, layout, alignment in DRAWN_SAMPLES:
        unaligned = alignment == "unaligned"
        id = run_id("drawn", case, dtype, layout, alignment)
        inputs = inputs_of(case, dtype)
        x0 = inputs["x0"]
        inputs.pop("noise")
        given = q_sample_run(f"{id}-given", inputs, layout, unaligned=unaligned)
        drawn = q_sample_run(id, inputs, layout, unaligned=unaligned)
        drawn.op = "q_sample_counter"
        drawn.numbers |= layout_numbers(x0, layout)
        drawn.given |= whose(len(x0))
        drawn.filled["noise"] = (x0.numel(), dtype)
        given.last["noise"] = "noise"
        yield Run(
            f"{id}-noise",
            "counter_normal",
            {**sizes(x0), "stream": reference.STREAM_TRAINING},
            whose(len(x0)) | {"step": torch.tensor(0)},
            {"out": (x0.numel(), torch.float32)},
        )
        yield drawn
        yield given


def test_philox_is_the_reference(results):
    arguments = philox_arguments()
    expected = reference.philox4x32_10(**arguments)
    assert torch.equal(results.get("philox", "out", expected), expected)


@pytest.mark.parametrize("shape,seed,alignment", NORMALS, ids=names)
def test_counter_normal(shape, seed, alignment, results):
    expected = reference.counter_normal(shape, **normal_arguments(shape, seed))
    got = results.get(run_id("normal", *shape, seed, alignment), "out", expected)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name,dtype,alignment", DRAWN_STEPS, ids=names)
def test_noise_inside_the_step_is_the_noise_outside(name, dtype, alignment, results):
    inputs = inputs_of(case_named("posterior_step", name), dtype)
    x, id = inputs["x"], run_id("drawn", name, dtype, alignment)
    got = step_of(results, id, x)
    if dtype == torch.float32:
        for value, given in zip(got, step_of(results, f"{id}-given", x), strict=True):
            assert torch.equal(value, given)
    inputs["noise"] = results.get(f"{id}-noise", "out", x.float())
    exact = reference.posterior_step(**upcast(inputs))
    eager = EAGER["posterior_step"](**inputs | {"noise": inputs["noise"].to(dtype)})
    for g, e, wanted in zip(got, eager, exact, strict=True):
        check_error_rule(g, e, wanted)


@pytest.mark.parametrize("case,dtype,layout,alignment", DRAWN_SAMPLES, ids=names)
def test_q_sample_counter_is_q_sample_of_its_noise(case, dtype, layout, alignment, results):
    x0, id = inputs_of(case, dtype)["x0"], run_id("drawn", case, dtype, layout, alignment)
    noise = results.get(f"{id}-noise", "out", x0.float())
    step = torch.tensor(0)
    expected = reference.counter_normal(
        x0.shape, **whose(len(x0)), step=step, stream=reference.STREAM_TRAINING
    )
    torch.testing.assert_close(noise, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(results.get(id, "noise", x0, layout), noise.to(dtype))
    given = results.get(f"{id}-given", "x_t", x0, layout)
    assert torch.equal(results.get(id, "x_t", x0, layout), given)


# ---- group_norm_silu ----

# Ways to cut a tensor that the cases of all backends do not reach.
CUTS = [
    Case("group_norm_silu", name, _norm_inputs(shape, groups, add=True))
    for name, shape, groups in (
        ("some-pixels", (1, 4, 40, 40), 2),
        ("some-channels", (1, 64, 20, 10), 1),
        ("more-channels", (1, 64, 20, 20), 1),
        ("wide-split", (1, 4, 128, 160), 1),
    )
]
NORM_CASES = cases_of("group_norm_silu") + CUTS
NORMS = list(itertools.product(NORM_CASES, DTYPES, LAYOUTS, ALIGNMENTS))
CONCAT_CASES = cases_of("group_norm_silu_concat")
CONCATS = list(itertools.product(CONCAT_CASES, DTYPES, LAYOUTS, ALIGNMENTS))
WIDE_PARAMETERS = list(itertools.product(DTYPES, (torch.float32, torch.float64), LAYOUTS))
PARAMETERS = ("weight", "bias", "add", "scale", "shift")


def wide_parameters(dtype: torch.dtype, parameters: torch.dtype) -> dict:
    """Parameters of another dtype than x, FiLM's two in the halves of one tensor."""
    case = case_named("group_norm_silu", "everything")
    inputs = case.inputs(torch.Generator().manual_seed(0))
    inputs = cast({"x": inputs.pop("x")}, dtype) | {
        k: v.to(parameters) if isinstance(v, Tensor) else v for k, v in inputs.items()
    }
    inputs["scale"], inputs["shift"] = torch.cat([inputs["scale"], inputs["shift"]], 1).chunk(2, 1)
    return inputs


def forward_run(id: str, inputs: dict, layout: str, concat: bool = False, **changes) -> Run:
    run = group_norm_run(id, "group_norm_silu", inputs, layout, **changes)
    x = inputs["x"]
    run.filled = dict.fromkeys(("y", "concat") if concat else ("y",), (x.numel(), x.dtype))
    return run


def norm_runs():
    for case, dtype, layout, alignment in NORMS:
        id = run_id(case, dtype, layout, alignment)
        yield forward_run(id, inputs_of(case, dtype), layout, unaligned=alignment == "unaligned")
    for case, dtype, layout, alignment in CONCATS:
        inputs, split, unaligned = inputs_of(case, dtype), split_of(case), alignment == "unaligned"
        for concat in (False, True):
            id = run_id(case, dtype, layout, alignment, concat)
            yield forward_run(id, inputs, layout, split=split, concat=concat, unaligned=unaligned)
    for dtype, parameters, layout in WIDE_PARAMETERS:
        id = run_id("norm-with", dtype, parameters, layout)
        yield forward_run(id, wide_parameters(dtype, parameters), layout)
    inputs = inputs_of(case_named("group_norm_silu", "cifar-512-4x4"), torch.bfloat16)
    for name, layout in itertools.product(("x", "skip", "y", "concat"), LAYOUTS):
        yield forward_run(
            run_id("norm", name, layout), inputs, layout, split=256, concat=True, unaligned=name
        )


def check_norm(y: Tensor, inputs: dict):
    check_error_rule(y, EAGER["group_norm_silu"](**inputs), reference.group_norm_silu(**upcast(inputs)))


@pytest.mark.parametrize("case,dtype,layout,alignment", NORMS, ids=names)
def test_group_norm_silu(case, dtype, layout, alignment, results):
    inputs = inputs_of(case, dtype)
    check_norm(results.get(run_id(case, dtype, layout, alignment), "y", inputs["x"], layout), inputs)


@pytest.mark.parametrize("case,dtype,layout,alignment", CONCATS, ids=names)
def test_group_norm_silu_of_a_virtual_concat(case, dtype, layout, alignment, results):
    inputs = inputs_of(case, dtype)
    runs = [run_id(case, dtype, layout, alignment, concat) for concat in (False, True)]
    y, with_concat = (results.get(run, "y", inputs["x"], layout) for run in runs)
    check_norm(y, inputs)
    assert torch.equal(with_concat, y)
    assert torch.equal(results.get(runs[1], "concat", inputs["x"], layout), inputs["x"])


@pytest.mark.parametrize("dtype,parameters,layout", WIDE_PARAMETERS, ids=names)
def test_group_norm_silu_with_parameters_of_another_dtype(dtype, parameters, layout, results):
    inputs = wide_parameters(dtype, parameters)
    y = results.get(run_id("norm-with", dtype, parameters, layout), "y", inputs["x"], layout)
    eager = reference.group_norm_silu(**inputs)  # eager PyTorch takes no mixture
    check_error_rule(y, eager, reference.group_norm_silu(**upcast(inputs)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["x", "skip", "y", "concat"])
def test_group_norm_silu_with_one_tensor_unaligned(name, layout, results):
    inputs = inputs_of(case_named("group_norm_silu", "cifar-512-4x4"), torch.bfloat16)
    run = run_id("norm", name, layout)
    check_norm(results.get(run, "y", inputs["x"], layout), inputs)
    assert torch.equal(results.get(run, "concat", inputs["x"], layout), inputs["x"])


# ---- its gradients ----

BACKWARD_CASES = [c for c in NORM_CASES if c.name not in ("constant", "tiny")]
"""Without those whose gradient is divided by a standard deviation that rounding has made."""
BACKWARDS = list(itertools.product(BACKWARD_CASES, DTYPES, LAYOUTS, ALIGNMENTS))
ASKED = ("x", "skip", "weight", "add")


def backward_inputs(case: Case, dtype: torch.dtype) -> dict:
    inputs = inputs_of(case, dtype)
    g = torch.Generator().manual_seed(1)
    return inputs | {"grad": torch.randn(inputs["x"].shape, generator=g, dtype=torch.float64).to(dtype)}


def backward_run(
    id: str, inputs: dict, layout: str, split: int | None = None, asked: tuple | None = None, **changes
) -> Run:
    """`asked`: the gradients to give, all of them unless it says so."""
    run = group_norm_run(id, "group_norm_silu_backward", inputs, layout, split=split, **changes)
    x = inputs["x"]
    filled = {"x": (x[:, :split].numel(), x.dtype)}
    if split is not None:
        filled["skip"] = (x[:, split:].numel(), x.dtype)
    filled |= {k: (x.shape[0] * x.shape[1], torch.float32) for k in PARAMETERS if inputs[k] is not None}
    run.filled = {f"grad_{k}": v for k, v in filled.items() if asked is None or k in asked}
    return run


def backward_runs():
    for case, dtype, layout, alignment in BACKWARDS:
        id = run_id("backward", case, dtype, layout, alignment)
        yield backward_run(id, backward_inputs(case, dtype), layout, unaligned=alignment == "unaligned")
    for case, dtype, layout, alignment in CONCATS:
        id = run_id("backward", case, dtype, layout, alignment)
        unaligned = alignment == "unaligned"
        yield backward_run(id, backward_inputs(case, dtype), layout, split_of(case), unaligned=unaligned)
    for name, layout in itertools.product(ASKED, LAYOUTS):
        case = case_named("group_norm_silu_concat", "everything")
        inputs = backward_inputs(case, torch.bfloat16)
        yield backward_run(run_id("backward-only", name, layout), inputs, layout, split_of(case), (name,))
    for name, layout in itertools.product(("x", "skip", "grad", "grad_x", "grad_skip"), LAYOUTS):
        inputs = backward_inputs(case_named("group_norm_silu", "cifar-512-4x4"), torch.bfloat16)
        yield backward_run(run_id("backward", name, layout), inputs, layout, 256, unaligned=name)


@functools.lru_cache(maxsize=2)
def gradients_of(case: Case, dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
    """Eager PyTorch's, and the float64 ones, by name."""
    inputs = backward_inputs(case, dtype)
    grad = inputs.pop("grad")
    tensors = [k for k, v in inputs.items() if isinstance(v, Tensor)]

    def run(inputs):
        leaves = {k: inputs[k].detach().clone().requires_grad_() for k in tensors}
        y = EAGER["group_norm_silu"](**inputs | leaves)
        return torch.autograd.grad(y, list(leaves.values()), grad.to(y.dtype))

    return dict(zip(tensors, zip(run(inputs), run(upcast(inputs)), strict=True), strict=True))


def check_gradients(results: Results, run: str, case: Case, dtype, layout: str, split: int | None = None):
    for name, (eager, exact) in gradients_of(case, dtype).items():
        if name == "x":
            parts = {"x": eager[:, :split], "skip": eager[:, split:]} if split else {"x": eager}
            got = torch.cat([results.get(run, f"grad_{k}", v, layout) for k, v in parts.items()], 1)
        else:
            batch = inputs_of(case, dtype)["x"].shape[0]
            got = results.get(run, f"grad_{name}", torch.empty(batch, exact.shape[-1]))
            got = (got.sum(0) if exact.dim() == 1 else got).to(dtype)
        check_error_rule(got, eager, exact, name)


@pytest.mark.parametrize("case,dtype,layout,alignment", BACKWARDS, ids=names)
def test_group_norm_silu_gradients(case, dtype, layout, alignment, results):
    check_gradients(results, run_id("backward", case, dtype, layout, alignment), case, dtype, layout)


@pytest.mark.parametrize("case,dtype,layout,alignment", CONCATS, ids=names)
def test_gradients_of_a_virtual_concat(case, dtype, layout, alignment, results):
    id = run_id("backward", case, dtype, layout, alignment)
    check_gradients(results, id, case, dtype, layout, split_of(case))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ASKED)
def test_a_gradient_alone_is_that_gradient(name, layout, results):
    case = case_named("group_norm_silu_concat", "everything")
    x, split = inputs_of(case, torch.bfloat16)["x"], split_of(case)
    like = {"x": x[:, :split], "skip": x[:, split:]}.get(name, torch.empty(x.shape[:2]))
    whole = run_id("backward", case, torch.bfloat16, layout, "aligned")
    alone = results.get(run_id("backward-only", name, layout), f"grad_{name}", like, layout)
    assert torch.equal(alone, results.get(whole, f"grad_{name}", like, layout))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["x", "skip", "grad", "grad_x", "grad_skip"])
def test_gradients_with_one_tensor_unaligned(name, layout, results):
    case = case_named("group_norm_silu", "cifar-512-4x4")
    check_gradients(results, run_id("backward", name, layout), case, torch.bfloat16, layout, 256)


# ---- the whole ----


def all_runs():
    for runs in (q_sample_runs, posterior_step_runs, noise_runs, norm_runs, backward_runs):
        yield from runs()


# ---- the tools catch what they are for ----

FAULTS = {
    "global": "heap-buffer-overflow",
    "shared": "heap-buffer-overflow",
    "misaligned": "misaligned address",
    "divergent": "deadlock: thread (0,0,0) is in __syncthreads, thread (34,0,0) is in __syncwarp",
    "caller": "thread (5,0,0) in __shfl_xor_sync: its own lane is not in the mask 0xffff0000",
    "mask": "thread (16,0,0) is in __shfl_xor_sync with mask 0xfffffffe: each waits for the other",
    "operation": "thread (9,0,0) is in __shfl_sync with mask 0xffffffff: each waits for the other",
    "source": "with mask 0x55555555: it reads lane 1, which takes no part",
    "returned": "with mask 0xffffffff: it reads lane 7, which takes no part",
}


def run_fault(faults: Path, *words: str) -> subprocess.CompletedProcess:
    return subprocess.run([faults, *words], capture_output=True, text=True, env=os.environ | OPTIONS)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_ends_the_run(fault, order, faults):
    done = run_fault(faults, fault, order)
    assert done.returncode != 0 and FAULTS[fault] in done.stderr


def test_a_missing_barrier_shows_in_either_order(faults):
    ascending, descending = (run_fault(faults, "barrier", order) for order in ORDERS)
    assert ascending.returncode == descending.returncode == 0
    assert "nan" in ascending.stdout and "nan" in descending.stdout
    assert ascending.stdout != descending.stdout


@pytest.mark.parametrize("order", ORDERS)
def test_without_a_fault_all_is_right(order, faults):
    done = run_fault(faults, "none", order)
    assert done.returncode == 0, done.stderr
    copied, backwards, sums, *launches = done.stdout.splitlines()
    assert [float(word) for word in copied.split()] == list(range(70))
    assert [float(word) for word in backwards.split()] == [*range(34, -1, -1), *range(69, 34, -1)]
    assert [float(word) for word in sums.split()][:32] == [k + (k ^ 1) for k in range(32)]
    configuration, shared = "invalid configuration argument: 9", "invalid argument: 1"
    assert launches == [*(f"CUDA kernel not launched: {e}" for e in 3 * [configuration] + [shared]), "0 1"]
