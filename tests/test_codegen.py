"""The Triton kernels compiled for four architectures, with no GPU, against the committed budget."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent
BUDGET = json.loads((ROOT / "tests" / "codegen_budget.json").read_text())


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    """The report, from a process of its own: this one may have Triton's interpreter for its compiler."""
    path = tmp_path_factory.mktemp("codegen") / "report.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.codegen", "--json", str(path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(path.read_text())


def rows(report: dict):
    for name, by_arch in report["kernels"].items():
        for arch, row in by_arch.items():
            yield f"{name} sm_{arch}", name, arch, row


def test_the_budget_lists_what_is_compiled(found):
    assert [label for label, *_ in rows(found)] == [label for label, *_ in rows(BUDGET)], (
        "run `python -m benchmarks.codegen --write-budget` and read the difference"
    )


def test_nothing_is_spilled(found):
    assert not {label: row["spilled"] for label, *_, row in rows(found) if row["spilled"]}


def test_accesses_are_128_bits_wide(found):
    floors = found["wide"]
    narrow = {
        label: row["wide"] for label, name, _, row in rows(found) if row["wide"] < floors.get(name, 0.9)
    }
    assert not narrow


@pytest.mark.parametrize("figure", ["registers", "shared", "barriers", "wide"])
def test_no_figure_is_worse_than_the_budget(figure, found):
    if found["triton"] != BUDGET["triton"]:
        pytest.skip(f"the budget is of triton {BUDGET['triton']}, this is {found['triton']}")
    worse = {}
    for label, name, arch, row in rows(found):
        was = BUDGET["kernels"].get(name, {}).get(arch, row)[figure]
        if row[figure] < was if figure == "wide" else row[figure] > was:
            worse[label] = f"{was} -> {row[figure]}"
    assert not worse
