"""Groups of tables, and one run over some of them."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from . import growth, ops, plot, report, sampling, steps, training, waterfall
from .machine import machine, summary
from .measure import ceilings
from .report import Table
from .settings import Settings

Part = Callable[[Settings], list[Table]]

GROUPS: dict[str, dict[str, Part]] = {
    "ops": {"ops": lambda s: [ops.table(s)]},
    "steps": {"steps": lambda s: [steps.step_table(s)], "overhead": lambda s: [steps.loop_table(s)]},
    "sampling": {
        "waterfall": lambda s: [waterfall.table(s)],
        "networks": sampling.tables,
        "growth": lambda s: [growth.table(s)],
        "stream": lambda s: [sampling.stream_table(s)],
    },
    "training": {"training": lambda s: [training.table(s)]},
}


def choose(group: str | None, only: str | None) -> list[Part]:
    """What makes the tables of a group, or of all; or of that part alone that is named.

    Raises:
        ValueError: an unknown name, with those that are known.
    """
    if group is not None and group not in GROUPS:
        raise ValueError(f"{group!r} is no group of benchmarks; allowed: {', '.join(GROUPS)}")
    parts = {name: make for key in ([group] if group else GROUPS) for name, make in GROUPS[key].items()}
    if only is not None and only not in parts:
        raise ValueError(f"--only {only!r} is not known here; allowed: {', '.join(parts)}")
    return [make for name, make in parts.items() if only in (None, name)]


def run(
    parts: list[Part],
    settings: Settings,
    *,
    command: str,
    json_to: Path | None = None,
    plot_to: Path | None = None,
    show: Callable[[str], object] = print,
) -> None:
    """Measure the parts and show each table, as Markdown, when it is there.

    Args:
        command: how this run was asked for: it heads the tables.
        json_to: a file for everything that was found; written again after each part.
        plot_to: a file for the pictures, written at the end.

    Raises:
        ValueError: a picture's ending, or no matplotlib; before any work.
        OSError: a file that cannot be written; before any work.
    """
    form = None if plot_to is None else plot.form_of(plot_to, "--plot")
    for path in (json_to, plot_to):
        if path is not None:
            report.check_writable(path)
    about = {
        "command": command,
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "quick": settings.quick,
        "machine": machine(settings.device),
        "ceilings": ceilings(settings.device, settings.rounds_or(10)),
    }
    show(_heading(about))
    tables: list[Table] = []
    for make in parts:
        with torch.no_grad():
            found = make(settings)
        tables += found
        for table in found:
            show("\n" + table.markdown())
        if json_to is not None:
            report.write(json_to, report.as_json(about, tables).encode())
    if plot_to is not None:
        report.write(plot_to, plot.draw(tables, form))


def _heading(about: dict[str, Any]) -> str:
    best = []
    for name, (_, median, _) in about["ceilings"].items():
        what, unit = name.rsplit(" ", 1)
        best.append(f"{what} {median:.0f} {unit}")
    quick = " **--quick: to see that it runs, not figures.**" if about["quick"] else ""
    return f"`{about['command']}`: {summary(about['machine'])}; {', '.join(best)}.{quick}"
