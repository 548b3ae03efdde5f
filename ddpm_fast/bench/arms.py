"""The plain kind of table: a row an arm, its time, and against ours."""

from __future__ import annotations

from collections.abc import Collection

from .measure import Case, measure
from .report import Column, Picture, Table
from .settings import Settings


def table(
    settings: Settings, name: str, title: str, cases: Collection[Case], rounds: int, base: str
) -> Table:
    """Measure the cases. ``base``: the arm, which is in each of them, that the others are compared with."""
    columns = [Column(key, key, "text") for key in next(iter(cases)).labels]
    columns += [
        Column("arm", "", "text"),
        Column("time", "time", "time"),
        Column("ratio", f"this / {base}", "ratio"),
    ]
    found = Table(name, title, columns)
    for case in settings.progress(cases, name):
        runs, skipped = case.built()
        found.skipped |= skipped
        timing = measure(runs, settings.rounds_or(rounds), device=settings.device)
        for arm in runs:
            row = {**case.labels, "arm": arm, "time": timing.time(arm, case.calls)}
            if arm != base:
                row["ratio"] = timing.ratio(arm, base)
            found.rows.append(row)
        what = ", ".join(f"{key} {value}" for key, value in case.labels.items())
        found.pictures.append(Picture("bars", f"{name}: {what}", "arm", "time", case.labels))
    return found
