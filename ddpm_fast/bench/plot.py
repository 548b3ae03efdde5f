"""The pictures of the tables, on one sheet."""

from __future__ import annotations

import math
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

from .report import Picture, Row, Table

FORMATS = ("png", "svg", "pdf")
UNITS = {"time": ("ms", 1e3), "memory": ("MiB", 2**-20)}
"""By column: what an axis has it in, and how many of those one is."""
OURS, PEERS = "tab:blue", "silver"
WIDTH = 3
"""Pictures side by side."""


def why_not() -> str | None:
    """The reason that nothing can be drawn."""
    if find_spec("matplotlib") is None:
        return "matplotlib is not installed: pip install ddpm_fast[bench]"
    return None


def form_of(path: Path, option: str) -> str:
    """What a picture's file asks for, one of `FORMATS`.

    Raises ValueError for another ending, or where nothing can be drawn, naming the ``option``.
    """
    form = path.suffix.lower().removeprefix(".")
    if form not in FORMATS:
        raise ValueError(f"{option} must end in .{', .'.join(FORMATS)}, got {path}")
    if reason := why_not():
        raise ValueError(f"{option} cannot draw: {reason}")
    return form


def draw(tables: list[Table], form: str) -> bytes:
    """A file with a picture for each that has rows, in one of `FORMATS`.

    Raises ValueError where no table has anything to draw.
    """
    from matplotlib.figure import Figure

    pictures = [(p, rows) for table in tables for p in table.pictures if (rows := p.rows(table))]
    if not pictures:
        raise ValueError("no table that was measured has a picture")
    columns = min(WIDTH, len(pictures))
    height = math.ceil(len(pictures) / columns)
    figure = Figure(figsize=(6 * columns, 4.2 * height), layout="constrained")
    grid = [*figure.subplots(height, columns, squeeze=False).flat]
    for axes, (picture, rows) in zip(grid, pictures, strict=False):
        axes.set_title(picture.title, fontsize=10)
        {"bars": _bars, "curve": _curve}.get(picture.kind, _curves)(axes, picture, rows)
    for axes in grid[len(pictures) :]:
        axes.remove()
    file = BytesIO()
    figure.savefig(file, format=form, dpi=110)
    return file.getvalue()


def _by_series(picture: Picture, rows: list[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(", ".join(str(row[key]) for key in picture.series), []).append(row)
    return found


def _quartiles(picture: Picture, row: Row) -> list[float]:
    value = row[picture.y]
    low, median, high = value if isinstance(value, list) else [value] * 3
    scale = UNITS.get(picture.y, ("", 1))[1]
    return [low * scale, median * scale, high * scale]


def _bars(axes: Any, picture: Picture, rows: list[Row]) -> None:
    """The first row on top; whiskers from quartile to quartile."""
    places = {id(row): -k for k, row in enumerate(rows)}
    for name, group in _by_series(picture, rows).items():
        values = [_quartiles(picture, row) for row in group]
        middle = [median for _, median, _ in values]
        reach = [[m - low for low, m, _ in values], [high - m for _, m, high in values]]
        colour = PEERS if name == "peers" else OURS
        bars = axes.barh([places[id(row)] for row in group], middle, xerr=reach, label=name, color=colour)
        axes.bar_label(bars, fmt=lambda value: f"{value:.3g}", padding=3, fontsize=8)
    axes.set_yticks([*places.values()], [row[picture.x] for row in rows], fontsize=8)
    axes.set_xlabel(UNITS[picture.y][0])
    axes.margins(x=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    if picture.series:
        axes.legend(fontsize=8)


def _curves(axes: Any, picture: Picture, rows: list[Row]) -> None:
    """Both axes logarithmic, so that what is linear has the slope of the grid; but memory from zero."""
    for name, group in _by_series(picture, rows).items():
        x = [row[picture.x] for row in group]
        y = [_quartiles(picture, row)[1] for row in group]
        axes.plot(x, y, "o" if picture.kind == "points" else "o-", label=name, markersize=4)
    axes.set_xscale("log", base=2 if picture.kind == "lines" else 10)
    if picture.y == "memory":
        axes.set_ylim(bottom=0)
    else:
        axes.set_yscale("log")
    if picture.kind == "points":
        axes.axhline(1, color="grey", linewidth=0.8)
    axes.set_xlabel(picture.x)
    axes.set_ylabel(UNITS.get(picture.y, ("", 1))[0])
    axes.grid(alpha=0.3)
    if picture.series:
        axes.legend(fontsize=8)


def _curve(axes: Any, picture: Picture, rows: list[Row]) -> None:
    """Linear, but for a y that spans three decades."""
    y = [row[picture.y] for row in rows]
    axes.plot([row[picture.x] for row in rows], y, color=OURS, linewidth=1.2)
    if 0 < 1000 * min(y) < max(y):
        axes.set_yscale("log")
    axes.set_xlabel(picture.x)
    axes.set_ylabel(picture.y)
    axes.grid(alpha=0.3)
