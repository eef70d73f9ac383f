"""The morning report as one page that fetches nothing and runs no script: its charts, and the template that it fills."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipelines.page import template
from pipelines.report import OUTCOMES, Json, median_of
from pipelines.report_text import cost_facts, failures_title, index_facts, span, usual
from pipelines.report_words import clock, count, duration, number


@dataclass(frozen=True)
class Mark:
    """One night in a chart: a column from ``y`` down by ``height``, or a point at ``y``. In units of the SVG."""

    x: float
    y: float
    width: float
    height: float
    label: str
    tonight: bool


@dataclass(frozen=True)
class Chart:
    """A small chart of the last nights, ready to draw."""

    width: float
    height: float
    marks: list[Mark]
    lines: list[str]
    limit_y: float | None
    label: str


def columns_chart(values: Sequence[float | None], labels: Sequence[str], title: str) -> Chart:
    """Return one column a night from zero up; a night without a value has none."""
    width, height = 240.0, 56.0
    slot = width / max(len(values), 1)
    highest = max((value for value in values if value is not None), default=0) or 1
    marks = [
        Mark(
            x=round(index * slot + 2, 2),
            # A night with nothing to count still shows, as a line.
            y=round(min(height - 1.5, height * (1 - value / highest)), 2),
            width=round(slot - 4, 2),
            height=round(max(1.5, height * value / highest), 2),
            label=label,
            tonight=index == len(values) - 1,
        )
        for index, (value, label) in enumerate(zip(values, labels, strict=True))
        if value is not None
    ]
    return Chart(width, height, marks, [], None, f"{title}: " + "; ".join(labels))


def line_chart(
    values: Sequence[float | None],
    labels: Sequence[str],
    limit: float | None,
    title: str,
    width: float = 240.0,
    height: float = 56.0,
) -> Chart:
    """Return a line from night to night, broken where a value is missing, and the height of the limit."""
    known = [value for value in (*values, limit) if value is not None]
    low, high = min(known, default=0.0), max(known, default=1.0)
    margin, slot = 5.0, (width - 10.0) / max(len(values) - 1, 1)

    def y_of(value: float) -> float:
        share = (value - low) / (high - low) if high > low else 0.5
        return round(height - margin - share * (height - 2 * margin), 2)

    marks = [
        Mark(round(margin + index * slot, 2), y_of(value), 0, 0, label, index == len(values) - 1)
        for index, (value, label) in enumerate(zip(values, labels, strict=True))
        if value is not None
    ]
    lines = _unbroken([None if value is None else (margin + i * slot, y_of(value)) for i, value in enumerate(values)])
    return Chart(width, height, marks, lines, None if limit is None else y_of(limit), f"{title}: " + "; ".join(labels))


def _unbroken(points: Sequence[tuple[float, float] | None]) -> list[str]:
    """Return the ``points`` attribute of each line of two or more neighbours."""
    runs: list[list[tuple[float, float]]] = [[]]
    for point in points:
        if point is None:
            runs.append([])
        else:
            runs[-1].append(point)
    return [" ".join(f"{x:.2f},{y:.2f}" for x, y in run) for run in runs if len(run) > 1]


@dataclass(frozen=True)
class Trend:
    """A chart with its title and what it reads tonight."""

    title: str
    tonight: str
    chart: Chart
    note: str


def trends(report: Json) -> list[Trend]:
    """Return the charts of total seconds, failures and recall, those that have two nights to show."""
    limit = next((gate["limit"] for gate in report["gates"] if gate["name"] == "recall"), None)
    shown: list[tuple[str, str, Callable[[float | None], str], float | None]] = [
        ("Total time", "total_seconds", duration, None),
        ("Failed videos", "failed", count, None),
        ("Recall", "recall", number, limit),
    ]
    found = []
    for title, key, form, threshold in shown:
        values = [night[key] for night in report["nights"]]
        labels = _night_labels(report, values, form)
        if sum(value is not None for value in values) < 2:
            continue
        drawn = (
            line_chart(values, labels, threshold, title) if key == "recall" else columns_chart(values, labels, title)
        )
        usual = median_of(values[:-1])
        note = f"median {form(usual)}" + (f", limit {number(threshold)} (dashed)" if threshold is not None else "")
        found.append(Trend(title, form(values[-1]), drawn, note))
    return found


def _night_labels(report: Json, values: Sequence[float | None], form: Callable[[float | None], str]) -> list[str]:
    nights = zip(report["nights"], values, strict=True)
    return [f"{clock(night['started'], '%d %b')} {form(value)}" for night, value in nights]


def spark(report: Json, measured: Json, title: str) -> Chart | None:
    """Return the small trend of a gate or of the drift, if there are two nights to show."""
    values = [*measured["earlier"], measured["value"]]
    if sum(value is not None for value in values) < 2:
        return None
    return line_chart(values, _night_labels(report, values, number), measured["limit"], title, 112, 28)


def to_html(report: Json) -> str:
    """Return the report as one page that fetches nothing and runs no script."""
    longest = [stage[key] or 0.0 for stage in report["stages"] for key in ("seconds", "median_seconds")]
    return template("report_page.html.j2").render(
        report=report,
        word=OUTCOMES[report["outcome"]][0],
        span=span(report),
        usual=usual(report),
        trends=trends(report),
        spark=lambda measured, title: spark(report, measured, title),
        index_facts=index_facts(report),
        cost_facts=cost_facts(report),
        failures_title=failures_title(report),
        most_seconds=max(longest, default=0.0) or 1.0,
        outcomes={name: word for name, (word, _) in OUTCOMES.items()},
    )
