"""What the two code generation reports share: a kernel's figures, how they are printed and kept."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ARCHITECTURES = (80, 90, 100, 120)
BUDGET = Path(__file__).parent.parent / "tests" / "codegen_budget.json"


@dataclass
class Figures:
    registers: int
    spilled: int
    shared: int
    barriers: int
    wide: float


Rows = dict[str, dict[str, Figures]]
"""Row name -> architecture -> figures."""


def wide_share(ptx: str, threads: int) -> float:
    """The share of a program's global bytes that accesses of at least 128 bits move."""
    instructions = re.findall(r"^\s*(?:@!?%p\d+\s+)?([a-z][\w.:]*)\s+([^;]+);", ptx, re.M)
    by_thread: set[str] = set()  # registers that depend on the thread's index
    known = -1
    while known != len(by_thread):  # loops carry registers backwards: until nothing is added
        known = len(by_thread)
        for op, operands in instructions:
            if op.startswith("st."):
                continue  # writes no register
            written, _, read = operands.partition(", ")
            if operands.startswith("{"):
                written, _, read = operands.partition("},")
            if "%tid" in read or any(r in by_thread for r in re.findall(r"%\w+", read)):
                by_thread.update(re.findall(r"%\w+", written))
    moved = {True: 0, False: 0}
    for op, operands in instructions:
        if op.startswith(("ld.global", "st.global")):
            address = operands[operands.index("[") : operands.index("]")]
            lanes, bits = re.search(r"(?:\.v(\d))?\.[busf](\d+)$", op).groups()
            size = int(lanes or 1) * int(bits) // 8
        elif op.startswith("cp.async.c"):
            _, address, size = (part.strip() for part in operands.split(",")[:3])
            size = int(size)
        else:
            continue
        each = any(r in by_thread for r in re.findall(r"%\w+", address))
        moved[size >= 16] += size * (threads if each else 1)
    return moved[True] / max(1, sum(moved.values()))


def show(rows: Rows) -> None:
    print(f"{'kernel':66s}  sm  registers  spilled  shared  barriers  128-bit")
    for name, by_arch in rows.items():
        for arch, row in by_arch.items():
            print(
                f"{name:66s} {arch:>3s} {row.registers:10d} {row.spilled:8d} {row.shared:7d} "
                f"{row.barriers:9d} {row.wide:8.1%}"
            )


def as_json(rows: Rows) -> dict[str, dict[str, dict[str, Any]]]:
    return {name: {arch: asdict(row) for arch, row in rows[name].items()} for name in rows}


def write(found: dict[str, Any], path: Path) -> None:
    text = json.dumps(found, indent=1)
    text = re.sub(r'\{\s+("registers"[^}]*?)\s+\}', lambda m: f"{{{' '.join(m[1].split())}}}", text)
    path.write_text(text + "\n")  # a row a line


def write_budget(found: dict[str, Any]) -> None:
    """Replace those of the budget's sections that were found: Triton's are at the top, nvcc's in "cuda"."""
    write(json.loads(BUDGET.read_text()) | found, BUDGET)
