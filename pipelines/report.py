"""The morning report: what the night's run did, whether readers see it, and what to type next.

`make_report` turns rows of ``runs`` into one document of plain JSON values; ``report_text`` and ``report_page`` show that
document and look nowhere else, so the three forms never disagree. A part that the run ended before is null, never 0. Text
from videos (ids, messages) is cleaned once, when the document is made: no control characters, no credentials, no query
strings.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from statistics import median
from typing import Any

from operators.errors import without_credentials
from pipelines.report_words import count_nights, number, rate

Json = Mapping[str, Any]

SCHEMA = "maxreel.report/1"
NUM_NIGHTS = 7
SLOW_RATIO = 1.5
"""A stage is flagged when a row takes this many times as long as the median night's."""

NUM_SAMPLES = 3
MESSAGE_CHARACTERS = 1000

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

_SPACE = re.compile(r"[\t\n\r\u2028\u2029]")
# Terminals obey control characters, bidirectional marks reorder what is read, and a lone surrogate is not UTF-8.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


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


def _shown_store(store: str) -> str:
    """Return the store without credentials: the whole text is one URI, which white space does not end."""
    return without_credentials(store).partition("?")[0] if "://" in store else store


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
        "store": _shown_store(store),
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
        "commands": _commands(tonight, _shown_store(store)),
    }
    cleaned: dict[str, Any] = clean(report)
    return cleaned


def clean(value: Any) -> Any:
    """Return plain values whose texts have no control characters, no credentials and no query strings."""
    if isinstance(value, str):
        return without_credentials(_CONTROL.sub("\ufffd", _SPACE.sub(" ", value)))
    if isinstance(value, Mapping):
        return {clean(str(key)): clean(entry) for key, entry in value.items()}
    return [clean(entry) for entry in value] if isinstance(value, list) else value


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


def median_of(values: Sequence[float | None]) -> float | None:
    """Return the median of what is known."""
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
        f"median of {count_nights(num_nights)} {rate(stage['median_rows_per_second'])}."
        for stage in stages
        if stage["slow"]
    ]
    if rebuilt := tonight.part("index").get("rebuilt"):
        notes.append(f"The index was rebuilt: {rebuilt}.")
    return notes


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
                "message": _cut_characters(clean(str(failure.get("message") or "")), MESSAGE_CHARACTERS),
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
        usual = median_of([night["rows_per_second"] for night in earlier])
        times_slower = _divided(usual, times["rows_per_second"])
        stages.append(
            {"name": name}
            | times
            | {
                "median_seconds": median_of([night["seconds"] for night in earlier]),
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
        usual = median_of(
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
