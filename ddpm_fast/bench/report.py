"""Rows to a Markdown table and to JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from .. import files

Row = dict[str, Any]
"""A value is text, a number, three quartiles, or None where it is not measured."""


@dataclass(frozen=True)
class Column:
    """A key of the rows, and how a table has it.

    ``form``: "text"; "time", seconds; "ratio"; "error"; "number"; "bytes".
    """

    key: str
    title: str
    form: str


@dataclass(frozen=True)
class Picture:
    """Rows as bars of ``y`` named by ``x``, or as lines or points or one curve of ``y`` over ``x``.

    ``where``: what the rows of this picture have; ``series``: the columns that tell its colours apart.
    """

    kind: Literal["bars", "lines", "points", "curve"]
    title: str
    x: str
    y: str
    where: Row = field(default_factory=dict)
    series: tuple[str, ...] = ()

    def rows(self, table: Table) -> list[Row]:
        """Those of the table that belong here and have something to show."""
        here = [row for row in table.rows if self.where.items() <= row.items()]
        return [row for row in here if row.get(self.y) is not None]


@dataclass
class Table:
    """What one part of the suite found.

    ``skipped``: by the name of what was not measured, why; ``remarks``: sentences under the table.
    """

    name: str
    title: str
    columns: list[Column]
    rows: list[Row] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)

    def markdown(self) -> str:
        """The table with its remarks and what is missing, for a terminal and for a README."""
        heads = [column.title for column in self.columns]
        cells = [[FORMS[c.form](row.get(c.key)) for c in self.columns] for row in self.rows]
        widths = [max(len(text) for text in column) for column in zip(heads, *cells, strict=True)]
        left = [column.form == "text" for column in self.columns]

        def line(texts: list[str]) -> str:
            aligned = [
                text.ljust(w) if is_left else text.rjust(w)
                for text, w, is_left in zip(texts, widths, left, strict=True)
            ]
            return f"| {' | '.join(aligned)} |"

        rule = ["-" * w if is_left else "-" * (w - 1) + ":" for w, is_left in zip(widths, left, strict=True)]
        lines = [f"**{self.title}**", "", line(heads), line(rule), *map(line, cells)]
        if self.remarks:
            lines += ["", *self.remarks]
        if self.skipped:
            lines += ["", "Not measured:"]
        for why in dict.fromkeys(self.skipped.values()):
            lines.append(
                f"- {'; '.join(name for name, reason in self.skipped.items() if reason == why)}: {why}"
            )
        return "\n".join(lines)


def _time(value: Any) -> str:
    if value is None:
        return ""
    seconds = value[1] if isinstance(value, list) else value
    for unit, size in (("s", 1), ("ms", 1e-3)):
        if seconds >= size:
            return f"{_three(seconds / size)} {unit}"
    return f"{_three(seconds * 1e6)} us"


def _three(value: float) -> str:
    """With three digits or more."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _ratio(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        low, median, high = value
        return f"{median:.2f}x ({low:.2f}-{high:.2f})"
    return f"{value:.2f}x"


def _bytes(value: Any) -> str:
    return "" if value is None else f"{value / 2**20:.1f} MiB"


FORMS: dict[str, Callable[[Any], str]] = {
    "text": lambda value: "" if value is None else str(value),
    "time": _time,
    "ratio": _ratio,
    "error": lambda value: "" if value is None else f"{value:.1e}",
    "number": lambda value: "" if value is None else _three(value),
    "bytes": _bytes,
}


def as_json(about: dict[str, Any], tables: list[Table]) -> str:
    """All that was found: what is true of the whole run, and each table with its rows."""
    return json.dumps(about | {"tables": [asdict(table) for table in tables]}, indent=1) + "\n"


def check_writable(path: Path) -> None:
    """Refuse a place that `write` could not write to; makes the folders that are missing.

    Raises:
        OSError: it is a folder, or its folder cannot be written.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, not a file")
    files.check_folder(path.parent)


def write(path: Path, data: bytes) -> None:
    files.replace(path, lambda file: file.write(data))
