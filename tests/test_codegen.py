"""The GPU kernels compiled for four architectures, with no GPU, against the committed budget."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BUDGET = json.loads((ROOT / "tests" / "codegen_budget.json").read_text())

# Compiler -> the module that reports on it, and its part of the budget.
REPORTS = {"triton": ("codegen", BUDGET), "nvcc": ("codegen_nvcc", BUDGET["cuda"])}


@pytest.fixture(scope="module", params=REPORTS)
def compiler(request) -> str:
    if request.param == "triton" and find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if request.param == "nvcc" and shutil.which("nvcc") is None:
        pytest.skip("there is no nvcc on the PATH")
    return request.param


@pytest.fixture(scope="module")
def found(compiler, tmp_path_factory) -> dict:
    """The report, from a process of its own: this one may have Triton's interpreter for its compiler."""
    path = tmp_path_factory.mktemp("codegen") / "report.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    module = f"benchmarks.{REPORTS[compiler][0]}"
    command = [sys.executable, "-m", module, "--json", str(path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(path.read_text())


@pytest.fixture
def budget(compiler) -> dict:
    return REPORTS[compiler][1]


def rows(report: dict):
    for name, by_arch in report["kernels"].items():
        for arch, row in by_arch.items():
            yield f"{name} sm_{arch}", name, arch, row


def test_the_budget_lists_what_is_compiled(found, budget, compiler):
    assert [label for label, *_ in rows(found)] == [label for label, *_ in rows(budget)], (
        f"run `python -m benchmarks.{REPORTS[compiler][0]} --write-budget` and read the difference"
    )


def test_nothing_is_spilled(found):
    assert not {label: row["spilled"] for label, *_, row in rows(found) if row["spilled"]}
    assert not found.get("spilling")


def test_accesses_are_128_bits_wide(found):
    floors = found["wide"]
    narrow = {
        label: row["wide"] for label, name, _, row in rows(found) if row["wide"] < floors.get(name, 0.9)
    }
    assert not narrow


@pytest.mark.parametrize("figure", ["registers", "shared", "barriers", "wide"])
def test_no_figure_is_worse_than_the_budget(figure, found, budget, compiler):
    if found[compiler] != budget[compiler]:
        pytest.skip(f"the budget is of {compiler} {budget[compiler]}, this is {found[compiler]}")
    worse = {}
    for label, name, arch, row in rows(found):
        was = budget["kernels"].get(name, {}).get(arch, row)[figure]
        if row[figure] < was if figure == "wide" else row[figure] > was:
            worse[label] = f"{was} -> {row[figure]}"
    assert not worse
