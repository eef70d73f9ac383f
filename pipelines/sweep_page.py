"""A sweep folder as one page: quality against latency and bytes, the Pareto set and its knee, and every setting's figures.

Both charts show the same cells and draw the third objective as the size of a dot. The line joins those cells of the Pareto
set that lead in the two objectives of its chart; the rest of the set is worth its third.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from operators.errors import ConfigError
from pipelines.page import UNKNOWN, Axis, between, load_json, short_time, template
from pipelines.report import clean
from pipelines.report_words import count, num_bytes, number, rate

Json = Mapping[str, Any]
Form = Callable[[float | None], str]

SCHEMA = "maxreel-sweep/1"
NUM_COLOURS = 6
LOG_FROM = 10
"""An axis whose ends differ by this factor is logarithmic."""

SMALLEST_DOT, LARGEST_DOT = 4.0, 13.0

FIGURES: tuple[tuple[str, str, Form], ...] = (
    ("recall_exact", "Overlap with exact", number),
    ("p50_seconds", "Median latency", short_time),
    ("p99_seconds", "p99 latency", short_time),
    ("queries_per_second", "Queries/s", rate),
    ("bytes_per_video", "Bytes a video", num_bytes),
    ("tokens_per_video", "Tokens a video", count),
)


def sweep_page(folder: Path) -> str:
    """Return the page of a folder that ``maxreel sweep --out`` wrote.

    Raises
    ------
    ConfigError
        If its ``sweep.json`` or ``best.yaml`` cannot be read, or the schema is another one.
    """
    sweep = load_json(folder / "sweep.json", SCHEMA)
    primary = sweep["primary_measure"]
    cells = [cell for cell in sweep["cells"] if (cell.get("measures") or {}).get(primary) is not None]
    cells.sort(key=lambda cell: -cell["measures"][primary])
    names = _short_names(sweep["axes"])
    varied = {name: short for name, short in names.items() if len(sweep["axes"][name]) > 1}
    coloured = [name for name in varied if len(sweep["axes"][name]) <= NUM_COLOURS]
    coloured.sort(key=lambda name: varied[name] != "nbits")
    best = folder / "best.yaml"
    return template("sweep_page.html.j2").render(
        sweep=sweep,
        primary=primary,
        cells=cells,
        knee=next((cell for cell in cells if cell.get("knee")), None),
        failed=[(", ".join(_settings(cell, names)), cell["error"]) for cell in sweep["cells"] if cell.get("error")],
        fixed=[(short, written(sweep["axes"][name][0])) for name, short in names.items() if name not in varied],
        colours=[(varied[name], [written(value) for value in sweep["axes"][name]]) for name in coloured],
        scatters=_scatters(sweep, cells, primary, varied, coloured),
        columns=_columns(cells, primary, varied),
        best=_read(best) if best.exists() else None,
        best_path=shlex.quote(str(best)),
    )


def _read(path: Path) -> str:
    try:
        return "\n".join(clean(line) for line in path.read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error


def written(value: Any) -> str:
    """Return the value of a setting as YAML has it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _short_names(axes: Json) -> dict[str, str]:
    """Return the last part of each setting's name, or all of it where two end alike."""
    last = [name.rpartition(".")[2] for name in axes]
    return {name: short if last.count(short) == 1 else name for name, short in zip(axes, last, strict=True)}


def _settings(cell: Json, names: Mapping[str, str]) -> list[str]:
    """Return the settings of a cell that have a name here."""
    return [f"{names[name]} {written(value)}" for name, value in cell["settings"].items() if name in names]


# Charts


@dataclass(frozen=True)
class Dot:
    """A cell in a chart: its place and reach in percent of the chart from the upper left, its radius in pixels."""

    row: int
    x: float
    y: float
    top: float
    bottom: float
    radius: float
    label: str
    colours: list[int]
    pareto: bool
    knee: bool


@dataclass(frozen=True)
class Scatter:
    """Quality against one cost, with the other one as the size of the dots."""

    name: str
    title: str
    x_title: str
    size_title: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    dots: list[Dot]
    front: list[tuple[Dot, Dot]]


def _scatters(
    sweep: Json, cells: Sequence[Json], primary: str, varied: Mapping[str, str], coloured: Sequence[str]
) -> list[Scatter]:
    """Return the charts that have at least two cells to show."""
    latency = ("p50_seconds", "median latency", short_time)
    size = ("bytes_per_video", "bytes a video", num_bytes)
    charts = (("latency", latency, size), ("bytes", size, latency))
    found = [_scatter(sweep, cells, primary, varied, coloured, *chart) for chart in charts]
    return [scatter for scatter in found if len(scatter.dots) > 1]


def _scatter(
    sweep: Json,
    cells: Sequence[Json],
    primary: str,
    varied: Mapping[str, str],
    coloured: Sequence[str],
    name: str,
    across: tuple[str, str, Form],
    size: tuple[str, str, Form],
) -> Scatter:
    (key, title, form), (size_key, size_title, _) = across, size
    placed = [(row, cell) for row, cell in enumerate(cells) if cell.get(key) is not None]
    costs = [cell[key] for _, cell in placed]
    x = Axis.over(costs, log=bool(costs) and min(costs) > 0 and max(costs) >= LOG_FROM * min(costs))
    y = Axis.over(end for _, cell in placed for end in _reach(cell, primary))
    largest = max((cell.get(size_key) or 0.0 for _, cell in placed), default=0.0) or 1.0
    dots = []
    for row, cell in placed:
        low, high = _reach(cell, primary)
        dots.append(
            Dot(
                row=row,
                x=x.share(cell[key]),
                y=round(100 - y.share(cell["measures"][primary]), 2),
                top=round(100 - y.share(high), 2),
                bottom=round(100 - y.share(low), 2),
                radius=round(max(SMALLEST_DOT, LARGEST_DOT * math.sqrt((cell.get(size_key) or 0.0) / largest)), 1),
                label=_label(cell, primary, varied),
                colours=[_colour(cell, axis, sweep["axes"][axis]) for axis in coloured],
                pareto=bool(cell.get("pareto")),
                knee=bool(cell.get("knee")),
            )
        )
    # The set is drawn over what it dominates, and small dots over large ones.
    dots.sort(key=lambda dot: (dot.knee, dot.pareto, -dot.radius))
    return Scatter(
        name=name,
        title=f"{primary} against {title}",
        x_title=title + (", logarithmic" if x.log else ""),
        size_title=size_title,
        x_ticks=[(x.share(tick), form(tick).replace(".0 ", " ")) for tick in x.ticks(5)],
        y_ticks=[(round(100 - y.share(tick), 2), f"{tick:g}") for tick in y.ticks()],
        dots=dots,
        front=_front([dot for dot in dots if dot.pareto]),
    )


def _reach(cell: Json, primary: str) -> tuple[float, float]:
    value = cell["measures"][primary]
    low, high = (cell.get("intervals") or {}).get(primary) or (value, value)
    return low, high


def _colour(cell: Json, axis: str, values: Sequence[Any]) -> int:
    value = cell["settings"].get(axis)
    return values.index(value) if value in values else 0


def _front(dots: Sequence[Dot]) -> list[tuple[Dot, Dot]]:
    """Return the lines between the dots that are higher than all dots on their left."""
    leading: list[Dot] = []
    for dot in sorted(dots, key=lambda dot: (dot.x, dot.y)):
        if not leading or dot.y < leading[-1].y:
            leading.append(dot)
    return list(zip(leading, leading[1:], strict=False))


def _label(cell: Json, primary: str, varied: Mapping[str, str]) -> str:
    """Return what is read out and shown of a dot, a line each between semicolons."""
    interval = (cell.get("intervals") or {}).get(primary)
    place = "the knee" if cell.get("knee") else ("in the Pareto set" if cell.get("pareto") else "")
    lines = [
        f"{primary} {number(cell['measures'][primary])}" + (f" ({between(interval)})" if interval else ""),
        f"{short_time(cell.get('p50_seconds'))} median, {num_bytes(cell.get('bytes_per_video'))} a video",
        *_settings(cell, varied),
        place,
    ]
    return "; ".join(line for line in lines if line)


# The table


@dataclass(frozen=True)
class Column:
    """A column of the table of cells: for each cell, what it is sorted by and what is shown."""

    title: str
    numeric: bool
    entries: list[tuple[Any, str]]
    notes: list[str] | None = None


def _columns(cells: Sequence[Json], primary: str, varied: Mapping[str, str]) -> list[Column]:
    """Return the columns of settings, measures and costs that any cell has a value for."""
    columns = [_setting_column(cells, name, short) for name, short in varied.items()]
    for measure in dict.fromkeys(
        [primary, *(name for cell in cells for name in cell["measures"] if name != "queries")]
    ):
        values = [cell["measures"].get(measure) for cell in cells]
        intervals = [(cell.get("intervals") or {}).get(measure) for cell in cells]
        notes = [between(interval) if interval else "" for interval in intervals]
        columns.append(
            Column(measure, True, [(value, number(value)) for value in values], notes if any(notes) else None)
        )
    for key, title, form in FIGURES:
        values = [cell.get(key) for cell in cells]
        if any(value is not None for value in values):
            columns.append(Column(title, True, [(value, form(value)) for value in values]))
    return columns


def _setting_column(cells: Sequence[Json], name: str, short: str) -> Column:
    values = [cell["settings"].get(name) for cell in cells]
    numeric = all(isinstance(value, int | float) for value in values)
    shown = [UNKNOWN if value is None else written(value) for value in values]
    return Column(
        short, numeric, [(value if numeric else text, text) for value, text in zip(values, shown, strict=True)]
    )
