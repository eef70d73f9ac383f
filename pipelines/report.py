"""The morning report: what the night's run did, whether readers see it, and what to type next.

`make_report` turns rows of ``runs`` into one document of plain JSON values; `to_text` and `to_html` show that document and
look nowhere else, so the three forms never disagree. A part that the run ended before is null, never 0. Text from videos
(ids, messages) is cleaned once, when the document is made: no control characters, no credentials, no query strings.
"""

from __future__ import annotations

import io
import json
import math
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from pipelines.render import size

if TYPE_CHECKING:
    from jinja2 import Template

Json = Mapping[str, Any]

SCHEMA = "maxreel.report/1"
NUM_NIGHTS = 7
SLOW_RATIO = 1.5
"""A stage is flagged when a row takes this many times as long as the median night's."""

NUM_SAMPLES = 3
MESSAGE_CHARACTERS = 1000
TEXT_COLUMNS = 100
UNKNOWN = "–"

COUNTS = ("listed", "new", "changed", "gone", "unchanged", "failed", "quarantined", "waiting")
GB = 10**9
EXIT_CODES = {
    1: "it crashed",
    2: "the configuration or the command is wrong",
    3: "more videos failed than max_failure_rate allows",
    4: "a quality gate failed",
    5: "the store is held by another run",
}
OUTCOMES = {
    "published": ("Published", "good"),
    "unchanged": ("Nothing to publish", "good"),
    "finished": ("Finished", "good"),
    "draft": ("Draft, not published", "warn"),
    "running": ("Still running", "warn"),
    "refused": ("Not published", "bad"),
    "failed": ("Failed", "bad"),
    "died": ("Died", "bad"),
}

# A password may hold "/" or "?" as they are (AWS secrets do); a host's port is digits and no password.
_USER = re.compile(r"([a-z][a-z0-9+.-]*://)(?:[^\s/?#]*@|[^\s/:@]*:(?!\d+(?:[/?#\s]|$))\S*@)", re.IGNORECASE)
_QUERY = re.compile(r"([a-z][a-z0-9+.-]*://[^\s?]*)\?\S*?([\"')\]}>.,;:]*)(?=\s|$)", re.IGNORECASE)
_SPACE = re.compile(r"[\t\n\r\u2028\u2029]")
# Terminals obey control characters, bidirectional marks reorder what is read, and a lone surrogate is not UTF-8.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_WORD = re.compile(r"(?:'[^']*'|\"[^\"]*\"|[^\s'\"])+")


@dataclass(frozen=True)
class Prices:
    """What the machines and the storage cost.

    Parameters
    ----------
    currency
        Shown before every amount, for example ``EUR``.
    cpu_hour, gpu_hour
        One CPU or one GPU for an hour.
    gb_month
        10^9 bytes stored for a month.
    """

    currency: str
    cpu_hour: float
    gpu_hour: float = 0.0
    gb_month: float = 0.0


@dataclass(frozen=True)
class Night:
    """A row of ``runs`` with its summary parsed. A part that is missing, null or malformed is empty."""

    row: Json
    summary: Json

    @classmethod
    def of(cls, row: Json) -> Night:
        """Return the night of a row."""
        try:
            summary = json.loads(row.get("summary") or "{}")
        except ValueError:
            summary = {}
        return cls(row, summary if isinstance(summary, dict) else {})

    def part(self, name: str) -> Json:
        """Return a part of the summary that is an object."""
        return _mapping(self.summary.get(name))

    def rows(self, name: str) -> list[Json]:
        """Return a part of the summary that is a list of objects."""
        value = self.summary.get(name)
        return [row for row in value if isinstance(row, Mapping)] if isinstance(value, list) else []

    def count(self, name: str) -> int | None:
        """Return a count. A run that came to its end counted from zero: a name that is missing there is 0."""
        counts = self.part("counts")
        if name == "failed" and name not in counts and self.rows("failures"):
            return len({failure.get("video_id") for failure in self.rows("failures")})
        if name not in counts and "listed" in counts and (self.row.get("status") == "ok" or self.part("release")):
            return 0
        value = _number(counts.get(name))
        return None if value is None else int(value)

    def total_seconds(self, now: datetime) -> float | None:
        """Return how long the run took, or has taken so far."""
        recorded = _number(self.part("seconds").get("total"))
        if recorded is not None:
            return recorded
        started, stopped = self.row.get("started"), self.row.get("stopped")
        if self.row.get("status") == "running":
            stopped = now
        return (stopped - started).total_seconds() if started and stopped else None

    def outcome(self) -> str:
        """Return one of ``OUTCOMES``. What a release came to counts for more than how the process ended."""
        state, status = self.part("release").get("state"), self.row.get("status")
        if state in ("published", "refused"):
            return str(state)
        if status in ("failed", "died", "running"):
            return str(status)
        return str(state) if state in OUTCOMES else "finished"

    def gate_values(self) -> dict[str, float | None]:
        """Return what each gate measured."""
        return {str(gate.get("name")): _number(gate.get("value")) for gate in self.rows("gates")}


def redact(text: str) -> str:
    """Return a text whose URIs have lost their user, password and query string.

    What follows ``?`` up to white space goes, but for closing quotes and punctuation at its end.
    """
    return _QUERY.sub(r"\1\2", _USER.sub(r"\1", text))


def _redact_store(store: str) -> str:
    """Return the store without credentials: the whole text is one URI, which white space does not end."""
    return _USER.sub(r"\1", store).partition("?")[0] if "://" in store else store


def make_report(
    run: Json,
    earlier: Sequence[Json],
    store: str,
    prices: Prices | None = None,
    now: datetime | None = None,
) -> dict[str, Any]:
    """Return the document, of plain JSON values.

    Parameters
    ----------
    run
        A row of ``runs``.
    earlier
        The rows of earlier nights, oldest first. The last seven of the same job that ended by themselves are compared with.
    store
        Path or URI of the store.
    prices
        Without them the report says nothing of cost.
    now
        When the report is written; the clock's time by default.
    """
    now, tonight = now or datetime.now(UTC), Night.of(run)
    before = _comparable(tonight, earlier)
    stages, gates, drift = _stages(tonight, before), _gates(tonight, before), _drift(tonight, before)
    report = {
        "schema": SCHEMA,
        "written": _iso(now),
        "store": _redact_store(store),
        "run": _run(tonight, now),
        "outcome": tonight.outcome(),
        "tone": _tone(tonight),
        "headline": _headline(tonight),
        "readers": _readers(tonight),
        "attention": _attention(tonight, stages, gates, drift, len(before)),
        "counts": {name: tonight.count(name) for name in COUNTS},
        "samples": {name: _texts(tonight.part("samples").get(name)) for name in ("new", "changed", "gone")},
        "failures": _failures(tonight),
        "stages": stages,
        "steps": _steps(tonight, before, now),
        "tokens": _tokens(tonight),
        "gates": gates,
        "drift": drift,
        "index": _index(tonight),
        "cost": _cost(tonight, prices, now) if prices else None,
        "nights": [_night(night, now) for night in (*before, tonight)],
        "commands": _commands(tonight, _redact_store(store)),
    }
    cleaned: dict[str, Any] = _clean(report)
    return cleaned


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return redact(_CONTROL.sub("\ufffd", _SPACE.sub(" ", value)))
    if isinstance(value, Mapping):
        return {_clean(str(key)): _clean(entry) for key, entry in value.items()}
    return [_clean(entry) for entry in value] if isinstance(value, list) else value


def _mapping(value: Any) -> Json:
    return value if isinstance(value, Mapping) else {}


def _number(value: Any) -> float | None:
    """Return a finite number, or None: NaN is not JSON."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def _texts(value: Any) -> list[str]:
    return [str(entry) for entry in value] if isinstance(value, list) else []


def _iso(time: datetime | None) -> str | None:
    return time.astimezone(UTC).isoformat(timespec="seconds") if time else None


def _comparable(tonight: Night, earlier: Sequence[Json]) -> list[Night]:
    """Return the last nights of the same job that ended by themselves: one that died has no figures."""
    ended = [
        Night.of(row)
        for row in earlier
        if row.get("status") in ("ok", "failed")
        and row.get("job") == tonight.row.get("job")
        and row.get("run_id") != tonight.row.get("run_id")
    ]
    return ended[-NUM_NIGHTS:]


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _divided(numerator: float | None, denominator: float | None) -> float | None:
    return numerator / denominator if numerator is not None and denominator else None


def _run(tonight: Night, now: datetime) -> dict[str, Any]:
    row = tonight.row
    return {
        "run_id": row.get("run_id"),
        "job": row.get("job"),
        "status": row.get("status"),
        "exit_code": row.get("exit_code"),
        "started": _iso(row.get("started")),
        "stopped": _iso(row.get("stopped")),
        "total_seconds": tonight.total_seconds(now),
        "code_version": row.get("code_version"),
    }


def _tone(tonight: Night) -> str:
    tone = OUTCOMES[tonight.outcome()][1]
    return "warn" if tone == "good" and _ended_badly(tonight) else tone


def _ended_badly(tonight: Night) -> bool:
    return tonight.row.get("status") in ("failed", "died") or bool(tonight.row.get("exit_code"))


def _headline(tonight: Night) -> str:
    recorded = tonight.summary.get("headline")
    if isinstance(recorded, str) and recorded.strip():
        return recorded.strip()
    code, release_id = tonight.row.get("exit_code"), tonight.part("release").get("release_id")
    exited = f" with exit code {code}, {EXIT_CODES[code]}" if code in EXIT_CODES else ""
    return {
        "published": f"published release {release_id}",
        "unchanged": "nothing to publish: no video changed",
        "finished": "finished; nothing was to be published",
        "draft": f"NOT PUBLISHED: release {release_id} is a draft",
        "running": "STILL RUNNING: nothing is published yet",
        "refused": f"NOT PUBLISHED: a gate refused release {release_id}",
        "failed": f"FAILED{exited}: nothing was published",
        "died": "DIED: the run stopped before its end, nothing was published",
    }[tonight.outcome()]


def _readers(tonight: Night) -> str:
    """Return the sentence that says what readers see this morning, as far as this run knows."""
    release = tonight.part("release")
    if release.get("state") == "published":
        return f"Readers see release {release.get('release_id')}."
    if release.get("live_before") is not None:
        return f"Readers see release {release['live_before']}."
    if release.get("state") in ("refused", "draft"):
        return "Readers have no release yet."
    return "Readers see what they saw before."


def _attention(
    tonight: Night, stages: Sequence[Json], gates: Sequence[Json], drift: Json | None, num_nights: int
) -> list[str]:
    """Return what an engineer should look at, the gravest first."""
    code = tonight.row.get("exit_code")
    notes = [f"Exit code {code}: {EXIT_CODES.get(code, 'not one of ours')}."] if code else []
    if tonight.row.get("status") == "died":
        notes.append("The run died: figures that it had not recorded by then are missing.")
    notes += [
        f"Gate {gate['name']} failed: {number(gate['value'])}, limit {number(gate['limit'])}"
        + (f" ({gate['detail']})." if gate["detail"] else ".")
        for gate in gates
        if gate["passed"] is False
    ]
    if drift and drift["within"] is False:
        notes.append(
            f"Codec drift is {number(drift['value'])}, limit {number(drift['limit'])}: the codec no longer fits."
        )
    notes += [
        f"{stage['name']} is {stage['times_slower']:.2f}x slower than usual: {rate(stage['rows_per_second'])} rows/s, "
        f"median of {_nights(num_nights)} {rate(stage['median_rows_per_second'])}."
        for stage in stages
        if stage["slow"]
    ]
    if rebuilt := tonight.part("index").get("rebuilt"):
        notes.append(f"The index was rebuilt: {rebuilt}.")
    return notes


def _nights(num_nights: int) -> str:
    return "1 night" if num_nights == 1 else f"{num_nights} nights"


def _failures(tonight: Night) -> dict[str, Any]:
    """Return the failures by cause, the most frequent first."""
    groups: dict[tuple[str, str], dict[str, Json]] = {}
    for failure in tonight.rows("failures"):
        cause = (str(failure.get("stage")), str(failure.get("error")))
        groups.setdefault(cause, {}).setdefault(str(failure.get("video_id")), failure)
    causes = [_cause(stage, error, list(videos.values())) for (stage, error), videos in groups.items()]
    return {
        "videos": tonight.count("failed"),
        "listed": len({video_id for videos in groups.values() for video_id in videos}),
        "causes": sorted(causes, key=lambda cause: (-cause["videos"], cause["stage"], cause["error"])),
    }


def _cause(stage: str, error: str, failures: Sequence[Json]) -> dict[str, Any]:
    return {
        "stage": stage,
        "error": error,
        "videos": len(failures),
        "quarantined": sum(bool(failure.get("quarantined")) for failure in failures),
        "samples": [
            {
                "video_id": str(failure.get("video_id")),
                # Cleaned before it is cut: a cut URI might keep the half of a credential.
                "message": _cut_characters(_clean(str(failure.get("message") or "")), MESSAGE_CHARACTERS),
                "attempts": _number(failure.get("attempts")),
                "final": bool(failure.get("final")),
                "quarantined": bool(failure.get("quarantined")),
            }
            for failure in failures[:NUM_SAMPLES]
        ],
    }


def _cut_characters(text: str, characters: int) -> str:
    return text if len(text) <= characters else text[: characters - 1] + "…"


def _stage_times(night: Night) -> dict[str, dict[str, float | None]]:
    """Return each stage's rows, seconds of wall time (its actors' busy seconds shared among them) and rows a second."""
    times = {}
    for name, cost in night.part("stages").items():
        cost = _mapping(cost)
        rows, busy, actors = (_number(cost.get(key)) for key in ("rows", "seconds", "actors"))
        seconds = _divided(busy, actors or 1)
        times[name] = {
            "rows": rows,
            "actors": actors,
            "busy_seconds": busy,
            "cpu_seconds": _number(cost.get("cpu_seconds")),
            "seconds": seconds,
            # A night on which a stage had nothing to do says nothing of its speed.
            "rows_per_second": _divided(rows or None, seconds),
        }
    return times


def _stages(tonight: Night, before: Sequence[Night]) -> list[dict[str, Any]]:
    """Return the stages against the median of the nights before. Speed is compared a row: a busy night is not a slow one."""
    history = [_stage_times(night) for night in before]
    stages = []
    for name, times in _stage_times(tonight).items():
        earlier = [night[name] for night in history if name in night]
        usual = _median([night["rows_per_second"] for night in earlier])
        times_slower = _divided(usual, times["rows_per_second"])
        stages.append(
            {"name": name}
            | times
            | {
                "median_seconds": _median([night["seconds"] for night in earlier]),
                "median_rows_per_second": usual,
                "times_slower": times_slower,
                "slow": times_slower is not None and times_slower >= SLOW_RATIO,
                "bottleneck": name == tonight.summary.get("bottleneck"),
            }
        )
    return stages


def _steps(tonight: Night, before: Sequence[Night], now: datetime) -> list[dict[str, Any]]:
    """Return the wall seconds of each step, the total last."""
    seconds = {name: _number(value) for name, value in tonight.part("seconds").items() if name != "total"}
    steps = []
    for name, value in (seconds | {"total": tonight.total_seconds(now)}).items():
        usual = _median(
            [night.total_seconds(now) if name == "total" else _step_seconds(night, name) for night in before]
        )
        steps.append({"name": name, "seconds": value, "median_seconds": usual, "ratio": _divided(value, usual)})
    return steps


def _step_seconds(night: Night, name: str) -> float | None:
    return _number(night.part("seconds").get(name))


def _tokens(tonight: Night) -> list[dict[str, Any]]:
    """Return the tokens of each modality, written this night and in the whole index, the most in the index first."""
    written, index = tonight.part("tokens"), _mapping(tonight.part("index").get("tokens_by_modality"))
    rows = [
        {
            "modality": name,
            "written": _number(written.get(name, 0)) if written else None,
            "in_index": _number(index.get(name, 0)) if index else None,
        }
        for name in sorted({*written, *index})
    ]
    return sorted(rows, key=lambda row: -(row["in_index"] or 0))


def _gates(tonight: Night, before: Sequence[Night]) -> list[dict[str, Any]]:
    history = [night.gate_values() for night in before]
    return [
        {
            "name": str(gate.get("name")),
            "value": _number(gate.get("value")),
            "limit": _number(gate.get("limit")),
            "passed": gate.get("passed") if isinstance(gate.get("passed"), bool) else None,
            "detail": str(gate.get("detail") or ""),
            "earlier": [values.get(str(gate.get("name"))) for values in history],
        }
        for gate in tonight.rows("gates")
    ]


def _drift(tonight: Night, before: Sequence[Night]) -> dict[str, Any] | None:
    index = tonight.part("index")
    value, limit = _number(index.get("drift")), _number(index.get("drift_limit"))
    if value is None and limit is None:
        return None
    within = value <= limit if value is not None and limit is not None else None
    earlier = [_number(night.part("index").get("drift")) for night in before]
    return {"value": value, "limit": limit, "within": within, "earlier": earlier}


def _index(tonight: Night) -> dict[str, Any] | None:
    index = tonight.part("index")
    if not index:
        return None
    names = ("clips", "tokens", "segments", "bytes", "bytes_per_token", "new_segments", "merged_segments", "dead_clips")
    return {
        "index_id": index.get("index_id"),
        **{name: _number(index.get(name)) for name in names},
        "rebuilt": index.get("rebuilt"),
    }


def _cost(tonight: Night, prices: Prices, now: datetime) -> dict[str, Any]:
    """Return what the run cost, and what the store costs a month: a night's work and a month's rent are not added up."""
    resources, took = tonight.part("resources"), tonight.total_seconds(now)
    cpus, gpus = _number(resources.get("CPU")), _number(resources.get("GPU")) or 0.0
    stored = _number(tonight.summary.get("store_bytes"))
    cost: dict[str, Any] = {"currency": prices.currency, "cpu_hours": None, "gpu_hours": None, "run": None}
    if cpus is not None and took is not None:
        cpu_hours, gpu_hours = cpus * took / 3600, gpus * took / 3600
        amount_due = cpu_hours * prices.cpu_hour + gpu_hours * prices.gpu_hour
        cost |= {"cpu_hours": cpu_hours, "gpu_hours": gpu_hours, "run": amount_due}
    month = None if stored is None else stored / GB * prices.gb_month
    return cost | {"store_bytes": stored, "store_month": month}


def _night(night: Night, now: datetime) -> dict[str, Any]:
    return {
        "run_id": night.row.get("run_id"),
        "started": _iso(night.row.get("started")),
        "outcome": night.outcome(),
        **{name: night.count(name) for name in ("new", "changed", "gone", "failed")},
        "total_seconds": night.total_seconds(now),
        "recall": night.gate_values().get("recall"),
    }


def _commands(tonight: Night, store: str) -> list[dict[str, str]]:
    """Return what to type next, with what it is for."""
    release, at = tonight.part("release"), f"--store {shlex.quote(store)}"
    run_id, release_id, live = tonight.row.get("run_id"), release.get("release_id"), release.get("live_before")
    commands = []
    if release.get("state") == "published" and live is not None:
        purpose = f"Show readers release {live} again"
        commands.append((purpose, f'maxreel rollback --to {shlex.quote(str(live))} {at} --reason "..."'))
    if release.get("state") in ("refused", "draft"):
        purpose = f"Publish release {release_id} all the same"
        commands.append((purpose, f"maxreel publish {shlex.quote(str(release_id))} {at}"))
    if tonight.count("failed") or tonight.rows("failures"):
        commands.append(("See every failure of this run", f"maxreel failures --run {shlex.quote(str(run_id))} {at}"))
    if tonight.row.get("status") in ("failed", "died") and not release:
        commands.append(("See what the store holds now", f"maxreel status {at}"))
    return [{"purpose": purpose, "command": command} for purpose, command in commands]


def count(value: float | None) -> str:
    """Return a whole number with its thousands apart."""
    return UNKNOWN if value is None else f"{value:,.0f}"


def number(value: float | None) -> str:
    """Return a measure: three decimals, none where it counts something."""
    if value is None:
        return UNKNOWN
    return f"{value:,.0f}" if abs(value) >= 1000 or (abs(value) >= 2 and float(value).is_integer()) else f"{value:.3f}"


def seconds(value: float | None) -> str:
    """Return seconds with one decimal."""
    return UNKNOWN if value is None else f"{value:,.1f}"


def rate(value: float | None) -> str:
    """Return rows a second, with more decimals where they are few."""
    if value is None:
        return UNKNOWN
    return f"{value:.2f}" if value < 10 else (f"{value:.1f}" if value < 100 else f"{value:,.0f}")


def duration(value: float | None) -> str:
    """Return seconds as a person says them."""
    if value is None:
        return UNKNOWN
    if value < 60:
        return f"{value:.1f} s"
    if value < 600:
        minutes, rest = divmod(round(value), 60)
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(round(value / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def amount(value: float | None, currency: str) -> str:
    """Return an amount of money."""
    return UNKNOWN if value is None else f"{currency} {value:,.2f}"


def num_bytes(value: float | None) -> str:
    """Return a number of bytes in the unit that suits it."""
    return UNKNOWN if value is None else size(value)


def speed(times_slower: float | None) -> str:
    """Return a stage's speed against the median."""
    if times_slower is None:
        return UNKNOWN
    if times_slower >= 1.1:
        return f"{times_slower:.2f}x slower"
    return f"{1 / times_slower:.2f}x faster" if times_slower <= 1 / 1.1 else "as usual"


def longer(ratio: float | None) -> str:
    """Return a step's time as a multiple of the median."""
    return UNKNOWN if ratio is None else f"{ratio:.2f}x"


def clock(iso: str | None, pattern: str = "%Y-%m-%d %H:%M") -> str:
    """Return a time, in UTC."""
    return UNKNOWN if iso is None else datetime.fromisoformat(iso).strftime(pattern)


def passed(verdict: bool | None) -> str:
    """Return a gate's verdict as a word."""
    return "not measured" if verdict is None else ("passed" if verdict else "FAILED")


def again(failure: Json) -> str:
    """Return how often a video was tried, and whether it will be again."""
    tried = {None: "attempts unknown", 1: "1 attempt"}.get(failure["attempts"], f"{failure['attempts']} attempts")
    if failure["quarantined"]:
        return f"{tried}, quarantined"
    return f"{tried}, final" if failure["final"] else f"{tried}, tried again next run"


def fate(cause: Json) -> str:
    """Return how many of a cause's videos are in quarantine."""
    if not cause["quarantined"]:
        return "not quarantined"
    return "quarantined" if cause["quarantined"] == cause["videos"] else f"{cause['quarantined']} quarantined"


def to_text(report: Json) -> str:
    """Return the report as plain text of at most 100 columns; only a longer argument of a command is left whole."""
    sections = [
        _text_top(report),
        _section("Needs a look", _bullets(report["attention"])),
        _section("Videos", _text_counts(report)),
        _section(_failures_title(report), _text_failures(report)),
        _section(f"Stages{_usual(report)}", _text_stages(report)),
        _section(f"Steps, wall seconds{_usual(report)}", _text_steps(report)),
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


def _usual(report: Json) -> str:
    earlier = len(report["nights"]) - 1
    return f", against the median of {_nights(earlier)}" if earlier else ""


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


def _failures_title(report: Json) -> str:
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
        usual = _median(values[:-1])
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


@cache
def _template() -> Template:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (count, number, seconds, rate, duration, num_bytes, speed, longer, clock, passed, again, fate)
    environment.filters.update({form.__name__: form for form in filters})
    return environment.get_template("report_page.html.j2")


def to_html(report: Json) -> str:
    """Return the report as one page that fetches nothing and runs no script."""
    longest = [stage[key] or 0.0 for stage in report["stages"] for key in ("seconds", "median_seconds")]
    return _template().render(
        report=report,
        word=OUTCOMES[report["outcome"]][0],
        span=span(report),
        usual=_usual(report),
        trends=trends(report),
        spark=lambda measured, title: spark(report, measured, title),
        index_facts=index_facts(report),
        cost_facts=cost_facts(report),
        failures_title=_failures_title(report),
        most_seconds=max(longest, default=0.0) or 1.0,
        outcomes={name: word for name, (word, _) in OUTCOMES.items()},
    )
