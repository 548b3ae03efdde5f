"""How far repeated runs of the suite agree: python benchmarks/spread.py run1.json run2.json run3.json

Each file is what `ddpm-fast bench --json` wrote. A row is one that all of them have; a ratio or time is the
median of the runs' medians, with the least and the greatest. Under it, run by run: each op's geometric mean.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ddpm_fast.bench.report import Column, Row, Table

MEASURED = ("time", "ratio")
"""Forms of the columns whose values differ from run to run."""


def spread(runs: list[dict[str, Any]]) -> list[Table]:
    """The tables that every run has, each of the rows that every run has.

    Raises:
        ValueError: no run, or no table that all of them have.
    """
    by_name = [{table["name"]: table for table in run["tables"]} for run in runs]
    names = [name for name in (by_name[0] if by_name else ()) if all(name in run for run in by_name)]
    if not names:
        raise ValueError("the files have no table in common")
    return [_of_one([run[name] for run in by_name]) for name in names]


def _of_one(tables: list[dict[str, Any]]) -> Table:
    columns = [Column(**column) for column in tables[0]["columns"]]
    told = [column for column in columns if column.form == "text"]
    measured = [column for column in columns if column.form in MEASURED]
    found = Table(tables[0]["name"], f"{tables[0]['title']}: {len(tables)} runs", told + measured)

    def key(row: Row) -> tuple[Any, ...]:
        return tuple(row.get(column.key) for column in told)

    by_key = [{key(row): row for row in table["rows"]} for table in tables]
    common = [name for name in by_key[0] if all(name in run for run in by_key)]
    for name in common:
        rows = [run[name] for run in by_key]
        merged = {column.key: _range(row.get(column.key) for row in rows) for column in measured}
        found.rows.append({column.key: rows[0].get(column.key) for column in told} | merged)
    found.remarks = _means([[run[name] for name in common] for run in by_key])
    return found


def _range(values: Iterable[Any]) -> list[float] | None:
    """Least, median and greatest of the runs' medians; None where a run has none."""
    medians = [value[1] if isinstance(value, list) else value for value in values]
    if None in medians:
        return None
    return [min(medians), statistics.median(medians), max(medians)]


def _means(runs: list[list[Row]]) -> list[str]:
    lines = []
    for group in dict.fromkeys((row["op"], row["backend"]) for row in runs[0] if "best" in row):
        ratios = [[row["best"][1] for row in run if (row["op"], row["backend"]) == group] for run in runs]
        means = " ".join(f"{statistics.geometric_mean(one):.2f}x" for one in ratios)
        worst = " ".join(f"{min(one):.2f}x" for one in ratios)
        lines.append(
            f"- {', '.join(group)}: geometric mean {means}, worst {worst} of the best peer's, by run"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="what `ddpm-fast bench --json` wrote")
    for table in spread([json.loads(path.read_text()) for path in parser.parse_args().runs]):
        print(table.markdown(), end="\n\n")


if __name__ == "__main__":
    main()
