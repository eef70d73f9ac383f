"""The commit protocol: workers write fragments, the driver alone commits them.

A worker writes rows it holds in memory as Lance fragments, which no reader sees, and returns a small receipt. The driver
collects receipts and commits them every N rows or M seconds in one transaction, whose properties carry the run and a
commit id. When a commit's answer is lost, the next attempt first looks for that id in the table's latest transactions,
so that the same fragments are never appended twice. A crash loses at most what was not committed yet; its fragments are
orphans that nothing refers to.

Ray Data's own sinks and checkpoints are not used: a checkpoint beside a deferred commit lost 16 of 32 rows, and
lance-ray's retry of a consumed reader lost 10 of 30.
"""

from __future__ import annotations

import json
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import lance
import pyarrow as pa
from lance.fragment import FragmentMetadata, write_fragments

from cluster.lease import Lease
from cluster.retries import retried
from cluster.store import FAILURES, STORAGE_VERSION, Store
from operators import schema

COMPACT_FRAGMENTS = 64
"""A table with more small fragments than this is compacted when a job ends."""

COMPACT_ROWS = 16_384
"""A fragment of so many rows is not small: it is left alone until a tenth of it is deleted. So a night's compaction
costs what the nights since the last one wrote, not what the table holds."""

COMPACT_BATCH_ROWS = 256
"""Held in memory while compacting: a row may hold half a megabyte of frames."""


@dataclass
class StageTime:
    """What one stage cost, summed over all workers."""

    rows: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0


@dataclass
class Tally:
    """What the committed receipts add up to."""

    rows: int = 0
    items: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    failures: list[dict[str, Any]] = field(default_factory=list)
    stages: dict[str, StageTime] = field(default_factory=dict)

    def add(self, receipt: Mapping[str, Any]) -> None:
        """Add one receipt."""
        self.rows += receipt["num_rows"]
        self.items += receipt["num_items"]
        self.counts.update(json.loads(receipt["counts"]))
        for timing in receipt["timings"]:
            stage = self.stages.setdefault(timing["stage"], StageTime())
            stage.rows += 1
            stage.seconds += timing["seconds"]
            stage.cpu_seconds += timing["cpu_seconds"]


RECEIPT = pa.schema(
    [
        ("fragments", pa.list_(pa.string())),
        ("num_rows", pa.int64()),
        ("num_items", pa.int64()),
        ("counts", pa.string()),
        ("failures", pa.list_(pa.struct([*schema.FAILURE, ("video_id", pa.string()), ("fingerprint", pa.string())]))),
        ("timings", pa.list_(schema.TIMING)),
    ]
)


def write_receipt(
    batch: pa.Table,
    store: Store,
    table: str,
    table_schema: pa.Schema,
    to_rows: Callable[[pa.Table], pa.Table],
    count: Callable[[pa.Table], Mapping[str, int]],
) -> pa.Table:
    """Write a batch's rows as fragments and return the receipt, one row. Runs on the workers.

    Parameters
    ----------
    batch
        What the operators made: one item (video or clip) a row, with ``failures``, ``timings`` and ``fingerprints``.
    to_rows
        Turns the batch into rows of the table. Items that failed give none.
    count
        Gives what the summary adds up, for example tokens by modality, from those rows.
    """
    started, cpu_started = time.perf_counter(), time.process_time()
    rows = to_rows(batch).cast(table_schema)
    fragments = write_rows(rows, store, table) if rows.num_rows else []
    timing = {
        "stage": "write",
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu_started,
    }
    receipt = {
        "fragments": [json.dumps(fragment.to_json()) for fragment in fragments],
        "num_rows": rows.num_rows,
        "num_items": batch.num_rows,
        "counts": json.dumps(dict(count(rows))),
        "failures": list(_failures(batch)),
        "timings": [*_timings(batch), timing],
    }
    return pa.Table.from_pylist([receipt], schema=RECEIPT)


def write_rows(rows: pa.Table, store: Store, table: str) -> list[FragmentMetadata]:
    """Write rows as fragments that no version of the table has yet, and return what to commit. Runs on the workers."""

    def write() -> list[FragmentMetadata]:
        # The rows are in memory, so a write that Lance gives up on can simply be done again.
        written: list[FragmentMetadata] = write_fragments(
            rows,
            store.table_uri(table),
            schema=rows.schema,
            data_storage_version=STORAGE_VERSION,
            storage_options=dict(store.options) or None,
        )
        return written

    return retried(write, f"writing fragments of {table}")


def _failures(batch: pa.Table) -> Iterable[dict[str, Any]]:
    if "fingerprints" not in batch.column_names:
        return  # a stage that records no failures of items
    columns = batch.select(["video_id", "failures", "fingerprints"]).to_pylist()
    for row in columns:
        fingerprints = {entry["stage"]: entry["fingerprint"] for entry in row["fingerprints"]}
        for failure in row["failures"] or []:
            yield failure | {"video_id": row["video_id"], "fingerprint": fingerprints.get(failure["stage"], "")}


def _timings(batch: pa.Table) -> list[dict[str, Any]]:
    return [timing for timings in batch["timings"].to_pylist() for timing in timings or []]


class Committer:
    """The only writer of a table: commits what receipts bring, every N rows or M seconds.

    Parameters
    ----------
    store, table
        What is written.
    lease
        Checked before every commit.
    run_id
        Recorded in every transaction and failure.
    attempts
        ``{(video_id, stage): (fingerprint, attempts)}`` of the failures known so far.
    every_rows, every_seconds
        How often to commit. A crash loses at most this much.
    """

    def __init__(
        self,
        store: Store,
        table: str,
        lease: Lease,
        run_id: str,
        attempts: Mapping[tuple[str, str], tuple[str, int]],
        every_rows: int,
        every_seconds: float,
    ) -> None:
        self._store, self._table, self._lease, self._run_id = store, table, lease, run_id
        self._attempts = dict(attempts)
        self._every_rows, self._every_seconds = every_rows, every_seconds
        self._pending: list[FragmentMetadata] = []
        self._pending_rows = 0
        self._pending_failures: list[dict[str, Any]] = []
        self._last_commit = time.monotonic()
        self.tally = Tally()

    def add(self, receipt: Mapping[str, Any]) -> None:
        """Take a receipt, and commit if it is time."""
        self._pending += [FragmentMetadata.from_json(fragment) for fragment in receipt["fragments"]]
        self._pending_rows += receipt["num_rows"]
        self._pending_failures += receipt["failures"]
        self.tally.add(receipt)
        waited = time.monotonic() - self._last_commit
        if self._pending_rows >= self._every_rows or waited >= self._every_seconds:
            self.flush()

    def flush(self) -> None:
        """Commit all that is pending."""
        self._lease.check()
        if self._pending:
            self._commit(lance.LanceOperation.Append(self._pending), commit_id=uuid.uuid4().hex)
        self._record_failures()
        self._pending, self._pending_rows = [], 0
        self._last_commit = time.monotonic()

    def _commit(self, operation: lance.LanceOperation.BaseOperation, commit_id: str) -> None:
        properties = {"maxreel.run": self._run_id, "maxreel.commit": commit_id}
        tried = False

        def commit() -> None:
            nonlocal tried
            dataset = self._store.open(self._table)
            if tried and was_committed(dataset, commit_id):
                return  # the last attempt went through; only its answer was lost
            self._lease.check()
            transaction = lance.Transaction(dataset.version, operation, transaction_properties=properties)
            tried = True
            lance.LanceDataset.commit(dataset.uri, transaction, storage_options=dict(self._store.options) or None)

        retried(commit, f"commit to {self._table}")

    def _record_failures(self) -> None:
        if not self._pending_failures:
            return
        rows: dict[tuple[str, str], dict[str, Any]] = {}
        for failure in self._pending_failures:
            key = (failure["video_id"], failure["stage"])
            fingerprint, attempts = self._attempts.get(key, ("", 0))
            already_counted = key in rows  # several clips of one video
            attempts = attempts if already_counted else attempts + 1 if fingerprint == failure["fingerprint"] else 1
            self._attempts[key] = (failure["fingerprint"], attempts)
            rows[key] = failure | {"attempts": attempts, "run_id": self._run_id, "time": datetime.now(UTC)}
        table = pa.Table.from_pylist(list(rows.values()), schema=schema.FAILURES)
        self._store.upsert(FAILURES, table, ["video_id", "stage"])
        self.tally.failures += list(rows.values())
        self._pending_failures = []


def was_committed(dataset: lance.LanceDataset, commit_id: str, recent: int = 20) -> bool:
    """Return whether one of the latest transactions carries a commit id."""
    for transaction in dataset.get_transactions(recent):
        if transaction is not None and transaction.transaction_properties.get("maxreel.commit") == commit_id:
            return True
    return False


def compact(store: Store, table: str, lease: Lease) -> None:
    """Merge small fragments, so that a table written by many small commits still scans fast."""
    dataset = store.open(table)
    if sum(part.physical_rows < COMPACT_ROWS for part in dataset.get_fragments()) > COMPACT_FRAGMENTS:
        lease.check()
        dataset.optimize.compact_files(target_rows_per_fragment=COMPACT_ROWS, batch_size=COMPACT_BATCH_ROWS)


def batch_rows(num_rows: int) -> int:
    """Return how many items one fragment gets: few in a small job, so that progress and commits are frequent.

    A job of a million gives about 4,000 fragments, which `compact` then merges.
    """
    return min(256, max(4, num_rows // 256))
