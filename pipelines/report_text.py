"""The morning report as text, of at most 100 columns."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from pipelines.report import OUTCOMES, Json
from pipelines.report_words import (
    UNKNOWN,
    again,
    amount,
    clock,
    count,
    count_nights,
    duration,
    fate,
    longer,
    num_bytes,
    number,
    passed,
    rate,
    seconds,
    speed,
)

TEXT_COLUMNS = 100

_WORD = re.compile(r"(?:'[^']*'|\"[^\"]*\"|[^\s'\"])+")


def to_text(report: Json) -> str:
    """Return the report as plain text of at most 100 columns; only a longer argument of a command is left whole."""
    sections = [
        _text_top(report),
        _section("Needs a look", _bullets(report["attention"])),
        _section("Videos", _text_counts(report)),
        _section(failures_title(report), _text_failures(report)),
        _section(f"Stages{usual(report)}", _text_stages(report)),
        _section(f"Steps, wall seconds{usual(report)}", _text_steps(report)),
        _section("Tokens", _text_tokens(report)),
        _section("Quality", _text_quality(report)),
        _section("Index", _text_index(report)),
        _section("Cost", _table(cost_facts(report), "lrl")),
        _section("Next", _text_commands(report)),
    ]
    return "\n\n".join("\n".join(lines) for lines in sections if lines) + "\n"


def _section(title: str, body: Sequence[str]) -> list[str]:
    return [title.upper(), *(f"  {line}" for line in body)] if body else []


def _wrapped(text: str, columns: int) -> list[str]:
    """Return a text on as many lines as it needs, a word that is too long broken."""
    lines = Text(text).wrap(Console(width=columns, file=io.StringIO()), columns, overflow="fold")
    return [line.plain.rstrip() for line in lines]


def _bullets(texts: Sequence[str]) -> list[str]:
    lines = []
    for text in texts:
        first, *others = _wrapped(text, TEXT_COLUMNS - 4)
        lines += [f"- {first}", *(f"  {line}" for line in others)]
    return lines


def _table(rows: Sequence[Sequence[str]], alignment: str) -> list[str]:
    """Return the lines of a table that is indented by two. The last column is cut where space is short, and only that.

    Parameters
    ----------
    rows
        The cells, of the header too.
    alignment
        A letter a column, ``l`` or ``r``.
    """
    widths = [max(map(cell_len, cells)) for cells in zip(*rows, strict=True)]
    left = TEXT_COLUMNS - 2 - sum(widths[:-1]) - 2 * len(widths[:-1])
    lines = []
    for row in rows:
        cells = [*row[:-1], _cut(row[-1], left)]
        padded = [
            " " * (width - cell_len(cell)) + cell if letter == "r" else cell + " " * (width - cell_len(cell))
            for cell, width, letter in zip(cells, widths, alignment, strict=True)
        ]
        lines.append("  ".join(padded).rstrip())
    return lines


def _cut(text: str, columns: int) -> str:
    cut = Text(text)
    cut.truncate(columns, overflow="ellipsis")
    return cut.plain


def usual(report: Json) -> str:
    """Return what figures are compared with, for a title."""
    earlier = len(report["nights"]) - 1
    return f", against the median of {count_nights(earlier)}" if earlier else ""


def _text_top(report: Json) -> list[str]:
    run = report["run"]
    facts = {
        "run": f"{run['run_id']} ({run['job']}), {OUTCOMES[report['outcome']][0].lower()}",
        "time": span(report),
        "code": f"maxreel {run['code_version'] or UNKNOWN}",
        "store": report["store"],
    }
    lines = _wrapped(report["headline"].removesuffix(".") + ". " + report["readers"], TEXT_COLUMNS) + [""]
    for name, fact in facts.items():
        first, *others = _wrapped(fact, TEXT_COLUMNS - 8)
        lines += [f"{name:<8}{first}", *(f"{'':<8}{line}" for line in others)]
    return lines


def span(report: Json) -> str:
    """Return when the run started and ended."""
    run, took = report["run"], duration(report["run"]["total_seconds"])
    begun = clock(run["started"])
    if run["stopped"] is None:
        return f"{begun} UTC, no end recorded"
    same_day = begun[:10] == clock(run["stopped"])[:10]
    return f"{begun} to {clock(run['stopped'], '%H:%M' if same_day else '%Y-%m-%d %H:%M')} UTC, {took}"


def _text_counts(report: Json) -> list[str]:
    samples = {name: ", ".join(_cut(video_id, 24) for video_id in ids) for name, ids in report["samples"].items()}
    return _table([(name, count(value), samples.get(name, "")) for name, value in report["counts"].items()], "lrl")


def failures_title(report: Json) -> str:
    """Return how many videos failed, and how many of them are shown."""
    failures = report["failures"]
    title = f"Failures: {count(failures['videos'])} {'video' if failures['videos'] == 1 else 'videos'}"
    return f"{title}, {failures['listed']} of them below" if failures["listed"] < (failures["videos"] or 0) else title


def _text_failures(report: Json) -> list[str]:
    lines = []
    for cause in report["failures"]["causes"]:
        lines.append(f"{cause['videos']} x {_cut(cause['stage'], 24)}: {_cut(cause['error'], 40)} ({fate(cause)})")
        for failure in cause["samples"]:
            lines.append(f"    {_cut(failure['video_id'], 48)} ({again(failure)})")
            lines += [f"      {line}" for line in _wrapped(_cut(failure["message"], 180), TEXT_COLUMNS - 8)]
    return lines


def _text_stages(report: Json) -> list[str]:
    if not report["stages"]:
        return []
    header = ("stage", "rows", "actors", "seconds", "median", "rows/s", "median", "speed")
    rows = [
        (
            _cut(stage["name"], 16),
            count(stage["rows"]),
            count(stage["actors"]),
            seconds(stage["seconds"]),
            seconds(stage["median_seconds"]),
            rate(stage["rows_per_second"]),
            rate(stage["median_rows_per_second"]),
            _text_speed(stage),
        )
        for stage in report["stages"]
    ]
    return _table([header, *rows], "lrrrrrrl")


def _text_speed(stage: Json) -> str:
    compared = speed(stage["times_slower"])
    compared = compared.replace("slower", "SLOWER") if stage["slow"] else compared
    return f"{compared}, bottleneck" if stage["bottleneck"] else compared


def _text_steps(report: Json) -> list[str]:
    rows = [
        (_cut(step["name"], 40), seconds(step["seconds"]), seconds(step["median_seconds"]), longer(step["ratio"]))
        for step in report["steps"]
    ]
    return _table([("step", "seconds", "median", "ratio"), *rows], "lrrr")


def _text_tokens(report: Json) -> list[str]:
    rows = [(_cut(row["modality"], 40), count(row["written"]), count(row["in_index"])) for row in report["tokens"]]
    return _table([("modality", "this night", "in the index"), *rows], "lrr") if rows else []


def _text_quality(report: Json) -> list[str]:
    measured = [(gate["name"], passed(gate["passed"]), gate) for gate in report["gates"]]
    if drift := report["drift"]:
        measured.append(("codec drift", {None: "not measured", True: "within", False: "ABOVE"}[drift["within"]], drift))
    rows = [
        (_cut(name, 20), verdict, number(of["value"]), number(of["limit"]), " ".join(map(number, of["earlier"])))
        for name, verdict, of in measured
    ]
    return _table([("gate", "verdict", "value", "limit", "nights before"), *rows], "llrrl") if rows else []


def _text_index(report: Json) -> list[str]:
    return [f"{name:<12}{line}" for name, value in index_facts(report) for line in _wrapped(value, TEXT_COLUMNS - 14)]


def index_facts(report: Json) -> list[tuple[str, str]]:
    """Return what there is to say of the index, name and value."""
    index = report["index"]
    if index is None:
        return []
    new, merged = count(index["new_segments"]), count(index["merged_segments"])
    per_token = UNKNOWN if index["bytes_per_token"] is None else f"{index['bytes_per_token']:.1f}"
    return [
        ("index", str(index["index_id"])),
        ("size", f"{num_bytes(index['bytes'])}, {per_token} bytes a token"),
        ("tokens", f"{count(index['tokens'])} in {count(index['clips'])} clips"),
        ("segments", f"{count(index['segments'])} ({new} new, {merged} merged)"),
        ("dead clips", count(index["dead_clips"])),
        ("rebuilt", index["rebuilt"] or "no"),
    ]


def cost_facts(report: Json) -> list[tuple[str, str, str]]:
    """Return what the night and the store cost: name, amount and how it comes about."""
    cost = report["cost"]
    if cost is None:
        return []
    hours = "the run ended before it recorded what it used"
    if cost["run"] is not None:
        hours = f"{cost['cpu_hours']:.2f} CPU hours, {cost['gpu_hours']:.2f} GPU hours"
    stored = "not recorded" if cost["store_bytes"] is None else num_bytes(cost["store_bytes"])
    return [
        ("this run", amount(cost["run"], cost["currency"]), hours),
        ("store, a month", amount(cost["store_month"], cost["currency"]), stored),
    ]


def _text_commands(report: Json) -> list[str]:
    lines = []
    for entry in report["commands"]:
        command = _continued(entry["command"], TEXT_COLUMNS - 6)
        lines += [*_wrapped(f"{entry['purpose']}:", TEXT_COLUMNS - 2), *(f"    {line}" for line in command)]
    return lines


def _continued(command: str, columns: int) -> list[str]:
    """Return a command on as many lines as it needs, as a shell reads them. A word is never broken."""
    lines = [""]
    for word in _WORD.findall(command):
        joined = f"{lines[-1]} {word}".lstrip()
        if len(joined) > columns - 2 and lines[-1]:
            lines[-1] += " \\"
            lines.append(f"  {word}")
        else:
            lines[-1] = joined if not lines[-1].startswith("  ") else f"{lines[-1]} {word}"
    return lines
