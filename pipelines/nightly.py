"""Nightly: the whole chain under one lease, from the manifest to what readers see.

Ingest, extract and encode do what changed; the index is brought up to date as a draft; the gates decide whether readers
move to it; what nobody needs any more is collected. A run that is killed anywhere leaves readers where they were, and the
next does the rest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import obstore

from cluster.store import RUNS
from operators import schema
from operators.errors import ConfigError, GateFailedError, TooManyFailuresError
from pipelines import gates
from pipelines.build_index import update_index
from pipelines.config import Config
from pipelines.encode import encode
from pipelines.extract import extract
from pipelines.gc import gc
from pipelines.ingest import ingest
from pipelines.job import Job, open_store
from pipelines.release import Release, find_live, open_release, publish, refuse
from pipelines.report import Prices, make_report
from pipelines.report_page import to_html

NIGHTS = 7
"""Earlier runs that an estimate and a report look at."""


def nightly(job: Job, dry_run: bool = False) -> None:
    """Bring store and index up to date with the manifest, and publish the release if it passes every gate.

    Raises
    ------
    ConfigError
        If no manifest is configured, or it cannot be read.
    TooManyFailuresError
        If more videos failed than ``max_failure_rate`` allows; nothing was published.
    GateFailedError
        If a gate failed; the release is written down as refused, and readers stay where they are.
    """
    if job.config.manifest is None:
        raise ConfigError("no manifest was given. Set `manifest:` in the config, or pass --set manifest=FILE")
    live = find_live(job.store)
    stays = f"release {live.release_id} stays live" if live else "there is no live release"
    try:
        ingest(job, job.config.manifest, remove_gone=True, dry_run=dry_run)
        extract(job, dry_run)
        encode(job, dry_run)
        if dry_run:
            estimate(job)
            return
        job.limit_failures()
        _release(job, live, stays)
    except (TooManyFailuresError, GateFailedError) as error:
        job.summary.headline = job.summary.headline or f"NOT PUBLISHED: {error} ({stays})"
        raise
    if job.config.gc.after_nightly:
        gc(job)
    job.summary.store_bytes = job.store.num_bytes()


def _release(job: Job, live: Release | None, stays: str) -> None:
    summary = job.summary
    release_id = update_index(job)
    if live and release_id == live.release_id:
        summary.headline = f"nothing changed: {stays}"
        summary.release = {"release_id": release_id, "state": "unchanged", "live_before": release_id}
        return
    draft = open_release(job.store, release_id)
    with job.timed("gates"):
        summary.gates = gates.judge(job, draft, live)
    summary.release = {"release_id": release_id, "live_before": live.release_id if live else None}
    if wrong := gates.failed(summary.gates):
        first, more = wrong[0], len(wrong) - 1
        reason = f"gate {first['name']} is {first['value']:.3g}, limit {first['limit']:.3g}"
        reason += f", and {more} more failed" if more else ""
        refuse(job, release_id, reason, summary.gates)
        summary.release["state"] = "refused"
        summary.headline = f"NOT PUBLISHED: {reason}; {stays}"
        raise GateFailedError(
            f"release {release_id} was refused: {reason}; {stays}. "
            f"To publish it all the same: `maxreel publish {release_id} --store {job.store.uri}`."
        )
    publish(job, release_id, "nightly", summary.gates)
    summary.release["state"] = "published"
    counts = summary.counts
    changes = ", ".join(f"{counts[name]} {name}" for name in ("new", "changed", "gone"))
    summary.headline = (
        f"published release {release_id}: {changes}, {len({f['video_id'] for f in summary.failures})} failed"
    )


def report_of(config: Config, run: str) -> dict[str, Any]:
    """Return the report of a run, ``last`` for the last night, against the nights before it.

    Raises
    ------
    ConfigError
        If there is no such run.
    """
    store = open_store(config)
    store.open(RUNS)
    rows = store.rows(RUNS, schema.RUNS.names).sort_by("started").to_pylist()
    wanted = [row for row in rows if row["run_id"] == run or (run == "last" and row["job"] == "nightly")]
    if not wanted:
        raise ConfigError(f"there is no run {run!r}; `maxreel runs --store {store.uri}` lists those there are")
    row = wanted[-1]
    earlier = [night for night in rows if night["job"] == row["job"] and night["started"] < row["started"]]
    prices = Prices(**config.prices.model_dump()) if config.prices else None
    return make_report(row, earlier, store.uri, prices)


def keep_report(config: Config, run_id: str) -> dict[str, Any]:
    """Return the report of a run, and keep it in the store as ``reports/<run>.html`` and ``.json``."""
    report, store = report_of(config, run_id), open_store(config)
    store.put_json(f"reports/{run_id}.json", report)
    obstore.put(store.objects, f"reports/{run_id}.html", to_html(report).encode())
    return report


def save_report(report: Mapping[str, Any], folder: Path) -> None:
    """Write a report to a folder, as ``report.html`` and ``report.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.html").write_text(to_html(report), encoding="utf-8")
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def estimate(job: Job) -> None:
    """Estimate what the run would take, from the wall time of earlier nights; stale rows, new and changed videos."""
    counts = job.summary.counts
    counts["extract"] += counts["new"] + counts["changed"]
    rows = job.store.rows(RUNS, ["job", "status", "started", "summary"]).sort_by("started").to_pylist()
    nights = [
        json.loads(row["summary"]) for row in rows if row["job"] in ("nightly", "index") and row["status"] == "ok"
    ]
    nights = nights[-NIGHTS:]
    seconds = {
        "extract": _rate(nights, "extract") * counts["extract"],
        "encode": _rate(nights, "encode") * (counts["encode"] + _clips_per_video(nights) * counts["extract"]),
    }
    for step in ("update index", "gates", "gc"):
        known = [night["seconds"][step] for night in nights if step in night["seconds"]]
        seconds[step] = sum(known) / len(known) if known else 0.0
    total = sum(seconds.values())
    resources: Mapping[str, float] = next((night["resources"] for night in reversed(nights) if night["resources"]), {})
    prices, cost = job.config.prices, None
    if prices is not None:
        hourly = resources.get("CPU", 0) * prices.cpu_hour + resources.get("GPU", 0) * prices.gpu_hour
        cost = {"currency": prices.currency, "amount": total / 3600 * hourly}
    job.summary.estimate = {"from_nights": len(nights), "seconds": seconds | {"total": total}, "cost": cost}


def _rate(nights: Sequence[Mapping[str, Any]], step: str) -> float:
    done = sum(night["counts"].get(step, 0) for night in nights)
    return sum(night["seconds"].get(step, 0.0) for night in nights if night["counts"].get(step)) / done if done else 0.0


def _clips_per_video(nights: Sequence[Mapping[str, Any]]) -> float:
    videos = sum(night["counts"].get("extract", 0) for night in nights)
    return sum(night["counts"].get("encode", 0) for night in nights) / videos if videos else 1.0
