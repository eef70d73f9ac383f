"""Garbage collection: what no release that is kept, no reader and no run needs any more is deleted.

Kept are the newest releases that were published, all that readers could open within the last hours, what open readers
marked, and the newest draft. First the log says that the others can no longer be opened, then their files go; a kill in
between leaves files that the next collection finds. The store is held meanwhile, so what no table refers to is an orphan
of a run that died. The tables of a row a run are compacted on the way.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import lance
import obstore

from cluster.commits import compact
from cluster.index_store import list_objects, parts, read_manifest
from cluster.readers import being_read
from cluster.store import FAILURES, RELEASES, RUNS, Store
from operators.errors import StorageError
from pipelines.job import Job
from pipelines.release import COLLECTED, PUBLISHED, collect, live_id, read_log

Log = Sequence[Mapping[str, Any]]


def gc(job: Job, dry_run: bool = False) -> dict[str, Any]:
    """Delete what is no longer needed and return what that was: releases, versions, files, bytes."""
    started = time.perf_counter()
    store, log = job.store, read_log(job.store)
    kept = to_keep(log, being_read(store), job.config.gc.keep_releases, job.config.gc.keep_hours, datetime.now(UTC))
    there = {row["release_id"] for row in log} - {row["release_id"] for row in log if row["state"] == COLLECTED}
    drop = sorted(there - kept)
    newest = {row["release_id"]: row for row in log}
    manifests = [read_manifest(store, newest[release_id]["index_id"]) for release_id in sorted(kept)]
    if drop and not dry_run:
        collect(job, drop)
    for name in (FAILURES, RUNS, RELEASES) if not dry_run else ():
        compact(store, name, job.lease)
    freed = _collect_index(job, manifests, dry_run)
    for name, versions in _pinned(store, manifests, [newest[release_id] for release_id in kept]).items():
        for what, count in _collect_table(job, name, versions, dry_run).items():
            freed[what] += count
    job.summary.seconds["gc"] = time.perf_counter() - started
    return {"releases": drop, "kept": sorted(kept), "dry_run": dry_run, **freed}


def to_keep(log: Log, read: set[int], keep_releases: int, keep_hours: float, now: datetime) -> set[int]:
    """Return the releases to keep."""
    collected = {row["release_id"] for row in log if row["state"] == COLLECTED}
    published = [row for row in log if row["state"] == PUBLISHED]
    newest_first = list(dict.fromkeys(row["release_id"] for row in reversed(published)))
    kept = set([number for number in newest_first if number not in collected][:keep_releases]) | read
    since = now - timedelta(hours=keep_hours)
    for row, following in zip(published, [*published[1:], None], strict=True):
        if following is None or following["time"] > since:  # readers could open it until then
            kept.add(row["release_id"])
    kept |= {row["release_id"] for row in log if row["time"] > since}
    if log:
        kept.add(max(row["release_id"] for row in log))
    if (live := live_id(log)) is not None:
        kept.add(live)
    return kept - collected


def _pinned(
    store: Store, manifests: Sequence[Mapping[str, Any]], releases: Sequence[Mapping[str, Any]]
) -> dict[str, set[int]]:
    """Return the versions that kept releases read, by table; every table of the store is named."""
    pinned: dict[str, set[int]] = defaultdict(set)
    for prefix in obstore.list_with_delimiter(store.objects)["common_prefixes"]:
        if prefix.endswith(".lance"):
            pinned[prefix.removesuffix(".lance")] = set()
    for release in releases:
        for name, version in json.loads(release["tables"]).items():
            pinned[name].add(version)
    for manifest in manifests:
        pinned[manifest["table"]].add(manifest["version"])
    return pinned


def _collect_table(job: Job, name: str, pinned: set[int], dry_run: bool) -> dict[str, int]:
    """Delete the versions of a table that nobody reads, and the files that no version refers to."""
    dataset = job.store.open(name)
    old = [v["version"] for v in dataset.versions() if v["version"] not in pinned | {dataset.version}]
    needed = {
        file.path
        for version in pinned | {dataset.version}
        for fragment in _at(job.store, name, version).get_fragments()
        for file in fragment.data_files()
    }
    listed = [e for batch in obstore.list(job.store.objects, f"{name}.lance/data/") for e in batch]
    surplus = [entry for entry in listed if entry["path"].rpartition("/")[2] not in needed]
    if not dry_run and old:
        job.lease.check()
        dataset.cleanup_old_versions(
            older_than=timedelta(0), versions=old, delete_unverified=True, error_if_tagged_old_versions=False
        )
    elif not dry_run and surplus:  # Lance looks for orphans only where a version goes
        job.lease.check()
        obstore.delete(job.store.objects, [entry["path"] for entry in surplus])
    return {"versions": len(old), "files": len(surplus), "bytes": sum(entry["size"] for entry in surplus)}


def _at(store: Store, name: str, version: int) -> lance.LanceDataset:
    try:
        return store.open(name, version)
    except StorageError as error:
        raise StorageError(f"{error} A release that is kept reads it; nothing was collected from {name}.") from error


def _collect_index(job: Job, manifests: Sequence[Mapping[str, Any]], dry_run: bool) -> dict[str, int]:
    """Delete the parts of indices that no kept release names: merged segments, and what runs that died left."""
    _, surplus = list_objects(job.store, {path for manifest in manifests for path in parts(manifest)})
    if not dry_run and surplus:
        job.lease.check()
        obstore.delete(job.store.objects, [entry["path"] for entry in surplus])
    return {"versions": 0, "files": len(surplus), "bytes": sum(entry["size"] for entry in surplus)}
