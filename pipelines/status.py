"""Status and failures: what a store holds, what a run would do, what went wrong."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from cluster import lease
from cluster.freshness import Quarantine
from cluster.store import FAILURES, RELEASES, SCHEMAS, VIDEOS, Store, token_table
from operators.errors import StorageError
from pipelines import encode, extract
from pipelines.config import Config
from pipelines.job import open_store
from pipelines.release import open_release


def status(config: Config) -> dict[str, Any]:
    """Return tables, staleness under this configuration, failures by cause, the release and the lease's holder.

    Raises
    ------
    StorageError
        If there is no store.
    """
    store = open_store(config)
    store.open(VIDEOS)
    work = extract.plan(
        store, config.extract, extract.Fingerprints(config.extract), Quarantine.load(store, config.extract.max_attempts)
    )
    clips, _ = encode.plan(store, config.encode)
    failed = list_failures(config)
    return {
        "store": store.uri,
        "tables": _tables(store, config),
        "stale": {"extract": work.rows.num_rows, "encode": clips.num_rows, "quarantined": work.num_quarantined},
        "failures": dict(Counter(f"{failure['stage']}: {failure['error']}" for failure in failed).most_common()),
        "release": _release(store),
        "held_by": _holder(store),
    }


def list_failures(config: Config) -> list[dict[str, Any]]:
    """Return the rows of ``failures``, by video."""
    table = open_store(config).open(FAILURES).to_table().sort_by([("video_id", "ascending"), ("stage", "ascending")])
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def _tables(store: Store, config: Config) -> dict[str, dict[str, int]]:
    names = [*SCHEMAS, token_table(config.encode.encoder)]
    datasets = {name: store.open_or_none(name) for name in names}
    return {
        name: {"rows": dataset.count_rows(), "version": dataset.version}
        for name, dataset in datasets.items()
        if dataset is not None
    }


def _release(store: Store) -> dict[str, Any] | None:
    try:
        release = open_release(store)
    except StorageError:
        return None
    times = store.open(RELEASES).to_table(columns=["release_id", "time"]).to_pylist()
    when = next(row["time"] for row in times if row["release_id"] == release.release_id)
    return {"release_id": release.release_id, "index_id": release.index_id, "time": f"{when:%Y-%m-%d %H:%M} UTC"}


def _holder(store: Store) -> dict[str, Any] | None:
    _, holder = lease.current(store)
    if holder is None or not holder.is_alive(time.time()):
        return None
    return {"run_id": holder.run_id, "job": holder.job, "host": holder.host, "pid": holder.pid}
