"""What every writing job shares: the lease, the row in ``runs``, the Ray session, and the summary at the end."""

from __future__ import annotations

import json
import logging
import os
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from itertools import islice
from typing import Any

import pyarrow as pa

import pipelines
from cluster.commits import Committer, StageTime, Tally
from cluster.freshness import Quarantine
from cluster.lease import Lease
from cluster.session import Pool, cluster_resources, session
from cluster.store import FAILURES, RUNS, VIDEOS, Store, check_location
from operators import schema
from operators.errors import GateFailedError, MaxreelError, TooManyFailuresError
from pipelines.config import Config

log = logging.getLogger("maxreel")

SAMPLES = 5
"""Videos named of each kind."""

SHOWN_FAILURES = 200
"""Kept in a run's summary; all are in ``failures``."""


@dataclass
class Summary:
    """What a job did, printed at its end and kept in ``runs``."""

    job: str
    run_id: str
    max_attempts: int
    counts: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    failures: list[dict[str, Any]] = field(default_factory=list)
    samples: dict[str, list[str]] = field(default_factory=dict)
    headline: str = ""
    index: dict[str, Any] | None = None
    gates: list[dict[str, Any]] = field(default_factory=list)
    release: dict[str, Any] | None = None
    resources: dict[str, float] = field(default_factory=dict)
    store_bytes: int = 0
    estimate: dict[str, Any] | None = None
    stages: dict[str, StageTime] = field(default_factory=dict)
    actors: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    next_commands: list[str] = field(default_factory=list)

    def bottleneck(self) -> str | None:
        """Return the stage whose actors were busy the longest."""
        if not self.stages:
            return None
        return max(self.stages, key=lambda name: self.stages[name].seconds / self.actors.get(name, 1))

    def sample(self, kind: str, video_ids: Iterable[str]) -> None:
        """Keep the first few videos of a kind, to be shown."""
        shown = self.samples.setdefault(kind, [])
        shown += list(islice(video_ids, SAMPLES - len(shown)))

    def add(self, tally: Tally) -> None:
        """Add what a stage's receipts came to."""
        self.failures += tally.failures
        for name, cost in tally.stages.items():
            total = self.stages.setdefault(name, StageTime())
            total.rows += cost.rows
            total.seconds += cost.seconds
            total.cpu_seconds += cost.cpu_seconds

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return {
            "job": self.job,
            "run_id": self.run_id,
            "headline": self.headline,
            "counts": dict(self.counts) | {"failed": len({failure["video_id"] for failure in self.failures})},
            "samples": self.samples,
            "tokens": dict(self.tokens),
            "failures": [
                {key: failure[key] for key in ("video_id", "stage", "error", "message", "attempts", "final")}
                | {"quarantined": failure["final"] or failure["attempts"] >= self.max_attempts}
                for failure in self.failures[:SHOWN_FAILURES]
            ],
            "stages": {name: asdict(cost) | {"actors": self.actors.get(name, 1)} for name, cost in self.stages.items()},
            "bottleneck": self.bottleneck(),
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
            "resources": self.resources,
            "store_bytes": self.store_bytes,
            "index": self.index,
            "gates": self.gates,
            "release": self.release,
            "estimate": self.estimate,
            "next": self.next_commands,
        }


class Job:
    """One run of the chain: holds the store, starts Ray when there is work, and knows what failed before."""

    def __init__(self, config: Config, name: str, store: Store, lease: Lease, run_id: str, stack: ExitStack) -> None:
        self.config, self.store, self.lease, self.run_id = config, store, lease, run_id
        self.summary = Summary(name, run_id, config.retries.max_attempts)
        self._stack = stack

    def start_ray(self) -> dict[str, float]:
        """Start or join the cluster, once, and return its resources."""
        if not self.summary.resources:
            ray = self.config.ray
            started = time.perf_counter()
            self._stack.enter_context(
                session(ray.address, ray.num_cpus, ray.object_store_bytes, ray.no_progress_seconds)
            )
            self.summary.seconds["ray start-up"] = time.perf_counter() - started
            self.summary.resources = cluster_resources()
        return cluster_resources()

    def committer(self, table: str) -> Committer:
        """Return the writer of a table."""
        storage = self.config.storage
        attempts = self.quarantine().attempts()
        return Committer(
            self.store, table, self.lease, self.run_id, attempts, storage.commit_rows, storage.commit_seconds
        )

    def quarantine(self) -> Quarantine:
        """Return the failures known by now."""
        return Quarantine.load(self.store, self.config.retries.max_attempts, self.config.retries.wait_seconds)

    def limit_failures(self) -> None:
        """Do nothing if few enough of the videos that this run tried failed for the first time.

        A file that has been missing for a week does not fail every night; a decoder that breaks today does.

        Raises
        ------
        TooManyFailuresError
            With the figures and what to type.
        """
        failed = len({failure["video_id"] for failure in self.summary.failures if failure["attempts"] == 1})
        worked_on, limit = self.summary.counts["worked_on"], self.config.max_failure_rate
        if failed > max(limit * worked_on, self.config.allowed_failures):
            raise TooManyFailuresError(
                f"{failed} of {worked_on} videos failed for the first time, more than max_failure_rate {limit:g} allows; "
                f"the others are done. See `maxreel failures --store {self.store.uri}`."
            )

    def use(self, pools: list[Pool]) -> None:
        """Remember how many actors each stage has, for the summary."""
        self.summary.actors.update({pool.name: pool.num_actors for pool in pools})

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Record the wall time of a step."""
        started = time.perf_counter()
        yield
        self.summary.seconds[step] = time.perf_counter() - started


def open_store(config: Config) -> Store:
    """Return the configured store."""
    return Store.at(check_location(config.store), config.storage.to_options())


def new_run_id() -> str:
    """Return the id of this run: the submitted Ray job's, or the time and four random digits."""
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
    return os.environ.get("RAY_JOB_SUBMISSION_ID") or f"{stamp}-{uuid.uuid4().hex[:4]}"


@contextmanager
def open_job(config: Config, name: str, dry_run: bool = False, creates: bool = True) -> Iterator[Job]:
    """Hold the store for one run and record it in ``runs``; a dry run does neither, and writes nothing.

    Parameters
    ----------
    creates
        Make the store where there is none.

    Raises
    ------
    StoreHeldError
        If another run holds the store.
    StorageError
        If the store is of another format, or there is none.
    """
    store, run_id = open_store(config), new_run_id()
    if not creates:
        store.open(VIDEOS)
    with ExitStack() as stack:
        lease = Lease(store, run_id, name, config.storage.lease_seconds)
        job = Job(config, name, store, lease, run_id, stack)
        if dry_run:
            store.check_format()
            yield job
            return
        stack.enter_context(lease)
        store.prepare()
        _bury_the_dead(job)
        started = datetime.now(UTC)
        _record(job, "running", None, started)
        begun = time.perf_counter()
        try:
            yield job
        except BaseException as error:
            job.summary.seconds["total"] = time.perf_counter() - begun
            if isinstance(error, (TooManyFailuresError, GateFailedError)):
                error.result = job.summary.to_json()
            with suppress(Exception):  # the error that ended the run is the one to tell
                _record(job, "failed", _exit_code(error), started)
            raise
        job.summary.seconds["total"] = time.perf_counter() - begun
        _record(job, "ok", 0, started)


def _exit_code(error: BaseException) -> int:
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    return error.exit_code if isinstance(error, MaxreelError) else 1


def _bury_the_dead(job: Job) -> None:
    """Mark runs that still claim to be running: we hold the store, so they are not."""
    rows = job.store.open(RUNS).to_table(filter="status = 'running'").to_pylist()
    if rows:
        died = [row | {"status": "died"} for row in rows]
        job.store.upsert(RUNS, pa.Table.from_pylist(died, schema=schema.RUNS), ["run_id"])


def forget_failures(job: Job, resolved: set[tuple[str, str]]) -> None:
    """Delete the failures of (video_id, stage) pairs that have since succeeded."""
    rows = job.store.rows(FAILURES, ["video_id", "stage"])
    keys = zip(rows["video_id"].to_pylist(), rows["stage"].to_pylist(), strict=True)
    forget(job, rows.filter(pa.array([key in resolved for key in keys], pa.bool_())))


def forget(job: Job, failures: pa.Table) -> None:
    """Delete failures, rows with ``_rowid``."""
    if failures.num_rows:
        job.lease.check()
        job.store.delete_rows(FAILURES, failures["_rowid"].to_pylist())


def _record(job: Job, status: str, exit_code: int | None, started: datetime) -> None:
    summary = job.summary
    if status == "failed" and not summary.headline:
        summary.headline = f"ended with code {exit_code}; readers see what they saw before"
    row = {
        "run_id": job.run_id,
        "job": summary.job,
        "status": status,
        "exit_code": exit_code,
        "started": started,
        "stopped": None if status == "running" else datetime.now(UTC),
        "config": job.config.model_dump_json(),
        "code_version": pipelines.__version__,
        "summary": json.dumps(summary.to_json()),
    }
    job.lease.check()
    job.store.upsert(RUNS, pa.Table.from_pylist([row], schema=schema.RUNS), ["run_id"])
