"""An evaluation folder as one page: what was measured, how sure it is, and what each query found.

The page shows what lies in the folder and measures nothing. Every difference stands beside its interval, its corrected
p-value and its wins, ties and losses. A part whose figures are missing is left out.
"""

from __future__ import annotations

import base64
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet

from operators.errors import ConfigError
from operators.schema import MODALITIES
from pipelines.page import Axis, load_json, short_time, template
from pipelines.report import clean
from pipelines.report_words import count, num_bytes, rate

Json = Mapping[str, Any]

SCHEMA = "maxreel-evaluation/1"
ABLATIONS = ("primary", "ablation", "single modality")

NUM_COLUMNS = 4
"""Measures that a row of the queries has room for."""

PREFIX_CHARACTERS = 4
"""A query token of this many letters also marks the words that begin with it."""

SHORT_WORDS = 3
"""A match of so few words is highlighted as a whole where the query token itself does not occur in it."""

EXCERPT_CHARACTERS = 80

_WORD = re.compile(r"\w+(?:['’]\w+)*")


def evaluation_page(folder: Path) -> str:
    """Return the page of a folder that ``maxreel evaluate --out`` wrote.

    Raises
    ------
    ConfigError
        If a file of it cannot be read, or ``metrics.json`` has another schema.
    """
    metrics = load_json(folder / "metrics.json", SCHEMA)
    names = [name for name in metrics["measures"]["all"] if name != "queries"]
    primary = metrics.get("primary_measure") or names[0]
    clips = _clips(_rows(folder / "details.parquet"))
    others = _others(folder / "systems.parquet", metrics, primary)
    leaderboard = _leaderboard(metrics, primary)
    queries = _queries(_rows(folder / "per_query.parquet"), primary, clips, others)
    return template("evaluation_page.html.j2").render(
        metrics=metrics,
        name=metrics.get("system") or "the system",
        primary=primary,
        names=names,
        interval=_interval(metrics, "all", primary),
        leaderboard=leaderboard,
        ablation=[row for row in leaderboard if row["kind"] in ABLATIONS],
        axis=Axis.over(end for row in leaderboard for end in (row["value"], *(row["interval"] or ()))),
        from_zero=Axis(0.0, max([1.0, *(row["value"] for row in leaderboard)])),
        groups=_groups(metrics, primary, leaderboard),
        costs=_costs(metrics.get("cost") or {}),
        queries=queries,
        # Some measures, such as the median rank, are of all queries and not of one.
        shown=[name for name in names if queries and name in queries[0]["measures"]][:NUM_COLUMNS],
        colours={name: index % 6 for index, name in enumerate(_modalities(metrics, clips))},
    )


def _rows(path: Path, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Return the rows of a table, their texts cleaned; none if it was not written."""
    if not path.exists():
        return []
    try:
        rows = pyarrow.parquet.read_table(path, columns=columns).to_pylist()
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    return [clean(row) for row in rows]


def _interval(measured: Json, group: str, measure: str) -> list[float] | None:
    interval: list[float] | None = (measured.get("intervals") or {}).get(group, {}).get(measure)
    return interval


# Systems


def _leaderboard(metrics: Json, primary: str) -> list[dict[str, Any]]:
    """Return a row a system, in the order of the file."""
    return [
        {
            "name": name,
            "label": system.get("label") or name,
            "kind": system.get("kind") or "",
            "measures": system["measures"],
            "intervals": system.get("intervals") or {},
            "value": system["measures"]["all"][primary],
            "interval": _interval(system, "all", primary),
            "against": {
                measure: found for measure, found in (system.get("against") or {}).items() if _is_paired(found)
            },
        }
        for name, system in (metrics.get("systems") or {}).items()
    ]


def _is_paired(against: Json) -> bool:
    """Return whether a difference has what it must be shown with."""
    return all(
        against.get(name) is not None for name in ("difference", "low", "high", "p_holm", "wins", "ties", "losses")
    )


def _groups(metrics: Json, primary: str, leaderboard: Sequence[Json]) -> list[dict[str, Any]]:
    """Return a row a target modality, with the other system that does best there."""
    found = []
    for group, measures in metrics["measures"].items():
        others = [row for row in leaderboard if row["kind"] != "primary" and group in row["measures"]]
        best = max(others, key=lambda row: row["measures"][group][primary], default=None)
        found.append(
            {
                "name": group,
                "measures": measures,
                "interval": _interval(metrics, group, primary),
                "best": best
                and (best["label"], best["measures"][group][primary], best["intervals"].get(group, {}).get(primary)),
            }
        )
    return found


def _costs(cost: Json) -> list[tuple[str, str, str]]:
    """Return title, figure and note of what is known of the cost."""
    cores, clips = cost.get("cores"), cost.get("clips")
    shown = [
        ("Index a video", "index_bytes_per_video", num_bytes, ""),
        ("Tokens a video", "tokens_per_video", count, ""),
        ("Median latency", "p50_seconds", short_time, "half of the queries are faster"),
        ("p99 latency", "p99_seconds", short_time, "1 query in 100 is slower"),
        ("Queries a second", "queries_per_second", rate, f"on {cores} cores" if cores else ""),
        ("Videos", "videos", count, f"{clips:,} clips" if clips is not None else ""),
    ]
    return [(title, form(cost[key]), note) for title, key, form, note in shown if cost.get(key) is not None]


# Queries


def _others(path: Path, metrics: Json, primary: str) -> dict[str, list[tuple[str, float]]]:
    """Return, for each query, label and value of the systems beside the primary one."""
    labels = {name: system.get("label") or name for name, system in (metrics.get("systems") or {}).items()}
    found: dict[str, list[tuple[str, float]]] = defaultdict(list)
    for row in _rows(path, ["system", "query_id", primary]):
        if row["system"] != metrics.get("system"):
            found[row["query_id"]].append((labels.get(row["system"], row["system"]), row[primary] or 0.0))
    return found


def _queries(
    rows: Iterable[Json],
    primary: str,
    clips: Mapping[str, list[dict[str, Any]]],
    others: Mapping[str, list[tuple[str, float]]],
) -> list[dict[str, Any]]:
    """Return the queries, those that the primary measure likes least first."""
    found = []
    for row in rows:
        value, beside = row[primary] or 0.0, others.get(row["query_id"], [])
        better = sorted((entry for entry in beside if entry[1] > value + 1e-9), key=lambda entry: -entry[1])
        worse = sorted((entry for entry in beside if entry[1] < value - 1e-9), key=lambda entry: entry[1])
        found.append(
            {
                "id": row["query_id"],
                "text": row.get("text") or row["query_id"],
                "target": row.get("target_modality"),
                "value": value,
                "measures": row,
                "better": better,
                "worse": worse,
                "same": len(beside) - len(better) - len(worse),
                "image": next((clip["query_picture"] for clip in clips.get(row["query_id"], [])), None),
                "clips": clips.get(row["query_id"], []),
            }
        )
    return sorted(found, key=lambda query: (query["value"], query["id"]))


def _clips(rows: Iterable[Json]) -> dict[str, list[dict[str, Any]]]:
    """Return, for each query, what it retrieved, by rank and ready to show."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row["rank"]):
        winners = sorted(row["winners"] or [], key=lambda winner: -winner["score"])
        found[row["query_id"]].append(
            {
                **row,
                "picture": _base64(row["thumbnail"]),
                "query_picture": _base64(row.get("query_image")),
                "shares": sorted(row["shares"] or [], key=lambda share: -share["share"]),
                "winners": [winner | {"pieces": _excerpt(winner)} for winner in winners],
                "spans": [_span(span, winners) for span in row["spans"] or []],
            }
        )
    return found


def _base64(picture: bytes | None) -> str | None:
    return base64.b64encode(picture).decode() if picture else None


def _modalities(metrics: Json, clips: Mapping[str, list[dict[str, Any]]]) -> list[str]:
    """Return every modality that is shown, the usual ones first so that they keep their colours."""
    parts = (
        part
        for found in clips.values()
        for clip in found
        for key in ("shares", "winners", "spans")
        for part in clip[key]
    )
    shown = {part["modality"] for part in parts} | set((metrics.get("modality_selection") or {}).get("predicted") or ())
    return [*MODALITIES, *sorted(shown - set(MODALITIES))]


# Words that won


def _span(span: Json, winners: Iterable[Json]) -> dict[str, Any]:
    """Return a span with its text in pieces, and the query tokens that found their best match in it."""
    won = [winner for winner in winners if _lies_in(winner, span)]
    words = {word for winner in won for word in _winning_words(winner)}
    tokens = list(dict.fromkeys(winner["token"] for winner in won))
    return {**span, "pieces": highlighted(span["text"], words), "tokens": tokens}


def _lies_in(winner: Json, span: Json) -> bool:
    if winner["modality"] != span["modality"] or not winner["text"] or winner["text"] not in span["text"]:
        return False
    times = (span["start_seconds"], winner["start_seconds"], span["stop_seconds"])
    return None in times or times[0] <= times[1] <= times[2]


def _winning_words(winner: Json) -> set[str]:
    """Return the words of a match to highlight: the query token where it occurs, else all of a short match.

    None of a long one: it won by its meaning, and which of its words meant it is not known.
    """
    token = winner["token"].strip("▁Ġ# ").casefold()
    words = {word.group().casefold() for word in _WORD.finditer(winner["text"] or "")}
    same = {word for word in words if word == token or (len(token) >= PREFIX_CHARACTERS and word.startswith(token))}
    return same or (words if len(words) <= SHORT_WORDS else set())


def highlighted(text: str, words: set[str]) -> list[tuple[str, bool]]:
    """Return a text in pieces, and whether each is one of ``words`` (in lower case)."""
    return list(_pieces(text, words))


def _pieces(text: str, words: set[str]) -> Iterator[tuple[str, bool]]:
    done = 0
    for word in _WORD.finditer(text):
        if word.group().casefold() in words:
            if word.start() > done:
                yield text[done : word.start()], False
            yield word.group(), True
            done = word.end()
    if done < len(text):
        yield text[done:], False


def _excerpt(winner: Json) -> list[tuple[str, bool]]:
    """Return the part of a match around its first winning word, in pieces."""
    text, words = winner["text"] or "", _winning_words(winner)
    first = next((word.start() for word in _WORD.finditer(text) if word.group().casefold() in words), 0)
    start = 0 if len(text) <= EXCERPT_CHARACTERS else max(0, text.rfind(" ", 0, max(0, first - 20)) + 1)
    shown = text[start : start + EXCERPT_CHARACTERS]
    before, after = "… " if start else "", " …" if start + EXCERPT_CHARACTERS < len(text) else ""
    return highlighted(before + shown + after, words)
