"""Status and failures: what a store holds, what a run would do, what went wrong."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cluster import lease
from cluster.freshness import Quarantine
from cluster.store import FAILURES, RUNS, SCHEMAS, VIDEOS, Store, token_table
from operators import schema
from operators.errors import ConfigError
from pipelines import encode, extract
from pipelines.config import Config
from pipelines.job import open_store
from pipelines.release import PUBLISHED, live_id, read_log


def status(config: Config) -> dict[str, Any]:
    """Return tables, staleness under this configuration, failures by cause, the release and the lease's holder.

    Raises
    ------
    StorageError
        If there is no store.
    """
    store = open_store(config)
    store.open(VIDEOS)
    quarantine = Quarantine.load(store, config.retries.max_attempts, config.retries.wait_seconds)
    videos = extract.plan(store, config.extract, extract.Fingerprints(config.extract), quarantine)
    clips = encode.plan(store, config.encode, quarantine)
    quarantined = videos.num_quarantined + clips.num_quarantined
    failed = list_failures(config)
    return {
        "store": store.uri,
        "tables": _tables(store, config),
        "stale": {"extract": videos.rows.num_rows, "encode": clips.rows.num_rows, "quarantined": quarantined},
        "failures": dict(Counter(f"{failure['stage']}: {failure['error']}" for failure in failed).most_common()),
        "release": _release(store),
        "held_by": _holder(store),
    }


def list_failures(config: Config, run: str | None = None) -> list[dict[str, Any]]:
    """Return the rows of ``failures``, by video; only those that a run met last, if one is named."""
    table = select_failures(open_store(config), run, [])
    rows: list[dict[str, Any]] = table.drop_columns(["_rowid"]).to_pylist()
    return rows


def select_failures(store: Store, run: str | None, video_ids: Sequence[str]) -> pa.Table:
    """Return failures with their row ids, by video: of a run, of videos, or all.

    Raises
    ------
    ConfigError
        If a run or video is named that has none.
    """
    store.open(FAILURES)
    rows = store.rows(FAILURES, schema.FAILURES.names)
    if run is not None:
        rows = rows.filter(pc.equal(rows["run_id"], run))
    if video_ids:
        rows = rows.filter(pc.is_in(rows["video_id"], value_set=pa.array(video_ids, pa.string())))
    if not rows.num_rows and (run is not None or video_ids):
        raise ConfigError(f"no failures of {run or ', '.join(video_ids)}; `maxreel failures` lists those there are")
    return rows.sort_by([("video_id", "ascending"), ("stage", "ascending")])


def list_runs(config: Config) -> list[dict[str, Any]]:
    """Return the rows of ``runs``, newest first, with what each came to."""
    store = open_store(config)
    store.open(RUNS)
    columns = ["run_id", "job", "status", "exit_code", "started", "stopped", "summary"]
    rows = store.rows(RUNS, columns).drop_columns(["_rowid"]).sort_by([("started", "descending")]).to_pylist()
    return [{name: row[name] for name in columns[:-1]} | _essence(json.loads(row["summary"])) for row in rows]


def _essence(summary: Mapping[str, Any]) -> dict[str, Any]:
    return {"headline": summary["headline"], "counts": summary["counts"]}


def _tables(store: Store, config: Config) -> dict[str, dict[str, int]]:
    names = [*SCHEMAS, token_table(config.encode.encoder)]
    datasets = {name: store.open_or_none(name) for name in names}
    return {
        name: {"rows": dataset.count_rows(), "version": dataset.version}
        for name, dataset in datasets.items()
        if dataset is not None
    }


def _release(store: Store) -> dict[str, Any] | None:
    log = read_log(store)
    live = live_id(log)
    row = next((row for row in reversed(log) if row["release_id"] == live and row["state"] == PUBLISHED), None)
    if row is None:
        return None
    return {"release_id": live, "index_id": row["index_id"], "time": f"{row['time']:%Y-%m-%d %H:%M} UTC"}


def _holder(store: Store) -> dict[str, Any] | None:
    _, holder = lease.current(store)
    if holder is None or not holder.is_alive(time.time()):
        return None
    return {"run_id": holder.run_id, "job": holder.job, "host": holder.host, "pid": holder.pid}
