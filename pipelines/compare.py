"""What changed between two evaluations: which queries are better and worse, and for one query both rankings and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from operators.errors import ConfigError
from operators.measures import ranking, rises
from operators.significance import compare
from pipelines.evaluation_folder import Saved, load

MOST = 10
"""Queries listed as better, and as worse."""

DEPTH = 10
"""Of both rankings, that a query's comparison shows; relevant videos are always shown."""


def diff(a: Path, b: Path, query_id: str | None = None) -> dict[str, Any]:
    """Return how evaluation ``b`` differs from ``a``, over the queries that both have; or how one query does.

    Raises
    ------
    ConfigError
        If a folder holds no evaluation, the two share no query, or neither has the one asked for.
    """
    was, now = load(a), load(b)
    names = [name for name in was.document["measures"]["all"] if name in now.document["measures"]["all"]]
    names = [name for name in names if name not in ("queries", "MdR")]  # a median has no mean difference
    shared = [unit for unit in was.values if unit in now.values]
    if not shared or not names:
        raise ConfigError(
            f"{a} and {b} share no {'measure' if shared else 'judged query'}: there is nothing to compare"
        )
    labels = {"a": was.name, "b": now.name if now.name != was.name else str(b)}
    if query_id is not None:
        return labels | _one(was, now, query_id, names)
    first = was.document["primary_measure"] if was.document["primary_measure"] in names else names[0]
    changes = sorted(
        ((now.values[unit][first] - was.values[unit][first]) * (1 if rises(first) else -1), unit)
        for unit in shared
        if first in was.values[unit] and first in now.values[unit]
    )
    listed = {
        "better": [change for change in reversed(changes) if change[0] > 0][:MOST],
        "worse": [change for change in changes if change[0] < 0][:MOST],
    }
    return (
        labels
        | {
            "queries": len(shared),
            "only_in_one": len(was.values.keys() ^ now.values.keys()),
            "measures": {name: _measure(was, now, shared, name) for name in names},
        }
        | {
            title: [{"query_id": unit, "difference": change, "text": was.texts.get(unit)} for change, unit in found]
            for title, found in listed.items()
        }
    )


def _measure(was: Saved, now: Saved, shared: list[str], name: str) -> dict[str, Any]:
    units = [unit for unit in shared if name in was.values[unit] and name in now.values[unit]]
    before, after = (np.array([saved.values[unit][name] for unit in units]) for saved in (was, now))
    found = asdict(compare(after, before, rises=rises(name)))
    return {"a": float(before.mean()), "b": float(after.mean())} | found


def _one(was: Saved, now: Saved, query_id: str, names: list[str]) -> dict[str, Any]:
    if query_id not in was.values and query_id not in now.values:
        raise ConfigError(f"neither evaluation has a judged query {query_id!r}")
    grades = was.judgements.get(query_id) or now.judgements.get(query_id) or {}
    found = {side: _ranks(saved.run.get(query_id, {})) for side, saved in (("a", was), ("b", now))}
    shown = {video_id for video_id, grade in grades.items() if grade > 0}
    shown |= {video_id for ranks in found.values() for video_id, entry in ranks.items() if entry["rank"] <= DEPTH}
    rows: list[dict[str, Any]] = [
        {"video_id": video_id, "grade": grades.get(video_id)}
        | {side: ranks.get(video_id) for side, ranks in found.items()}
        for video_id in shown
    ]
    rows.sort(key=lambda row: (row["b"]["rank"] if row["b"] else np.inf, row["a"]["rank"] if row["a"] else np.inf))
    values = {side: saved.values.get(query_id, {}) for side, saved in (("a", was), ("b", now))}
    return {
        "query": {"query_id": query_id, "text": was.texts.get(query_id) or now.texts.get(query_id)},
        "measures": {name: {side: of[name] for side, of in values.items()} for name in names if _both(values, name)},
        "videos": [row | {"why": _why(row, was, now, query_id)} for row in rows],
    }


def _both(values: Mapping[str, Mapping[str, float]], name: str) -> bool:
    return all(name in of_side for of_side in values.values())


def _ranks(found: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    return {video_id: {"rank": rank, "score": found[video_id]} for rank, video_id in enumerate(ranking(found), start=1)}


def _why(row: Mapping[str, Any], was: Saved, now: Saved, query_id: str) -> str:
    """Return what moved a video: how each modality's share of its score changed, where both were explained."""
    before, after = (saved.shares.get((query_id, row["video_id"])) for saved in (was, now))
    if not row["a"] or not row["b"]:
        missing, side = (was, "a") if not row["a"] else (now, "b")
        return f"not among the first {missing.document['depth']} of {side}"
    if not before or not after:
        return ""
    parts = {
        modality: row["b"]["score"] * after.get(modality, 0.0) - row["a"]["score"] * before.get(modality, 0.0)
        for modality in {**before, **after}
    }
    moved = sorted(
        ((abs(change), modality) for modality, change in parts.items() if abs(change) >= 0.005), reverse=True
    )
    return " · ".join(f"{modality} {parts[modality]:+.2f}" for _, modality in moved) or "the same"
