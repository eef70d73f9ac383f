"""What every writing job shares: the lease, the row in ``runs``, the Ray session, and the summary at the end."""

from __future__ import annotations

import json
import logging
import os
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

import pipelines
from cluster.commits import Committer, StageTime, Tally
from cluster.freshness import Quarantine
from cluster.lease import Lease
from cluster.session import Pool, cluster_resources, session
from cluster.store import FAILURES, RUNS, SCHEMAS, Store, check_location
from operators import schema
from operators.errors import TooManyFailuresError
from pipelines.config import Config

log = logging.getLogger("maxreel")


@dataclass
class Summary:
    """What a job did, printed at its end and kept in ``runs``."""

    job: str
    run_id: str
    counts: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    failures: list[dict[str, Any]] = field(default_factory=list)
    stages: dict[str, StageTime] = field(default_factory=dict)
    actors: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    next_commands: list[str] = field(default_factory=list)

    def bottleneck(self) -> str | None:
        """Return the stage whose actors were busy the longest."""
        if not self.stages:
            return None
        return max(self.stages, key=lambda name: self.stages[name].seconds / self.actors.get(name, 1))

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
            "counts": dict(self.counts),
            "tokens": dict(self.tokens),
            "failures": [
                {key: failure[key] for key in ("video_id", "stage", "error", "message", "attempts")}
                for failure in self.failures
            ],
            "stages": {name: asdict(cost) | {"actors": self.actors.get(name, 1)} for name, cost in self.stages.items()},
            "bottleneck": self.bottleneck(),
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
            "next": self.next_commands,
        }


class Job:
    """One run of the chain: holds the store, starts Ray when there is work, and knows what failed before."""

    def __init__(self, config: Config, name: str, store: Store, lease: Lease, run_id: str, stack: ExitStack) -> None:
        self.config, self.store, self.lease, self.run_id = config, store, lease, run_id
        self.summary = Summary(name, run_id)
        self._stack = stack
        self._ray_started = False

    def start_ray(self) -> dict[str, float]:
        """Start or join the cluster, once, and return its resources."""
        if not self._ray_started:
            ray = self.config.ray
            started = time.perf_counter()
            self._stack.enter_context(
                session(ray.address, ray.num_cpus, ray.object_store_bytes, ray.no_progress_seconds)
            )
            self.summary.seconds["ray start-up"] = time.perf_counter() - started
            self._ray_started = True
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
        return Quarantine.load(self.store, self.config.extract.max_attempts)

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
def open_job(config: Config, name: str) -> Iterator[Job]:
    """Hold the store for one run and record it in ``runs``.

    Raises
    ------
    StoreHeldError
        If another run holds the store.
    TooManyFailuresError
        On leaving, if more videos failed than ``max_failure_rate`` allows.
    """
    store, run_id = open_store(config), new_run_id()
    with ExitStack() as stack:
        lease = stack.enter_context(Lease(store, run_id, name, config.storage.lease_seconds))
        for table in SCHEMAS:
            store.create(table)
        job = Job(config, name, store, lease, run_id, stack)
        started = datetime.now(UTC)
        _record(job, "running", started)
        begun = time.perf_counter()
        try:
            yield job
        except BaseException as error:
            _record(job, f"failed: {type(error).__name__}", started)
            raise
        job.summary.seconds["total"] = time.perf_counter() - begun
        _record(job, "ok", started)


def check_failure_rate(job: Job) -> None:
    """Do nothing if few enough of the videos that this run tried failed for the first time.

    A file that has been missing for a week does not fail every night; a decoder that breaks today does.

    Raises
    ------
    TooManyFailuresError
        With the figures and what to type.
    """
    failed = len({failure["video_id"] for failure in job.summary.failures if failure["attempts"] == 1})
    worked_on = job.summary.counts["worked_on"]
    limit = job.config.max_failure_rate
    if failed > limit * worked_on:
        raise TooManyFailuresError(
            f"{failed} of {worked_on} videos failed for the first time, more than max_failure_rate {limit:g} allows; "
            "the others are done. "
            f"See `maxreel failures --store {job.store.uri}`."
        )


def forget_failures(job: Job, resolved: set[tuple[str, str]]) -> None:
    """Delete the failures of (video_id, stage) pairs that have since succeeded."""
    dataset = job.store.open(FAILURES)
    rows = dataset.scanner(columns=["video_id", "stage"], with_row_id=True).to_table().to_pylist()
    gone = [row["_rowid"] for row in rows if (row["video_id"], row["stage"]) in resolved]
    if gone:
        job.lease.check()
        job.store.delete_rows(FAILURES, gone)


def _record(job: Job, status: str, started: datetime) -> None:
    summary = job.summary.to_json()
    row = {
        "run_id": job.run_id,
        "job": job.summary.job,
        "status": status,
        "started": started,
        "stopped": None if status == "running" else datetime.now(UTC),
        "config": job.config.model_dump_json(),
        "code_version": pipelines.__version__,
        "counts": json.dumps(summary["counts"] | {"tokens": summary["tokens"], "failures": len(summary["failures"])}),
        "stages": json.dumps(summary["stages"]),
    }
    job.store.upsert(RUNS, pa.Table.from_pylist([row], schema=schema.RUNS), ["run_id"])
