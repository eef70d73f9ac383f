"""Ray sessions, and the check that a job fits its cluster before it starts.

A pool whose CPU requests leave less than the tasks beside it need does not fail: it waits, silently. So a job names its
stages and their requests, and `check_schedule` adds them up first. Where sizes are left open, `plan_actors` spreads the
cores so that the sum always fits.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise

import pyarrow as pa
import ray
import ray.data

from operators.errors import ScheduleError

log = logging.getLogger("maxreel")

TASK_CPUS = 0.1
"""CPU request of each small task stage (reading keys, shaping rows, writing fragments)."""

RESERVED_CPUS = 0.5
"""Left to those task stages when actor pools are sized."""


@dataclass(frozen=True)
class Pool:
    """An actor pool: how many actors, and what each of them asks for."""

    name: str
    num_actors: int
    num_cpus: float
    num_gpus: float = 0.0


@contextmanager
def session(
    address: str | None, num_cpus: int | None, object_store_bytes: int | None, no_progress_seconds: float
) -> Iterator[None]:
    """Connect to a cluster, or start one on this machine, for as long as the block runs.

    Parameters
    ----------
    address
        Of a running cluster; None starts a local one unless ``RAY_ADDRESS`` is set (as in a submitted job).
    num_cpus, object_store_bytes
        Of the local cluster; None lets Ray decide.
    no_progress_seconds
        A job in which nothing finishes for this long ends with an error that names the waiting operator.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    local = (
        {} if address else {"num_cpus": num_cpus, "object_store_memory": object_store_bytes, "include_dashboard": False}
    )
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # the coming default; silences its warning
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # its errors reach us as exceptions
    if not address:
        # A cluster of our own on this machine needs no token; making one would leave ~/.ray/auth_token behind, which
        # later clusters of the same user then demand.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    # We start processes with fork and exec, never by forking alone; and Ray is pinned below the named removal.
    warnings.filterwarnings("ignore", message="lance is not fork-safe")
    warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
    started_here = not ray.is_initialized()
    if started_here:
        with _own_sigterm():
            # Without "local", ray.init joins whatever cluster `ray start` left running on this machine.
            where = address or "local"
            ray.init(address=where, log_to_driver=False, logging_level=logging.ERROR, configure_logging=False, **local)
    _configure_ray_data(no_progress_seconds)
    try:
        yield
    finally:
        if started_here:
            ray.shutdown()


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep our handler of SIGTERM, if there is one: Ray installs its own, which ends a driver with code 1 or 15."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    if callable(handler) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def _configure_ray_data(no_progress_seconds: float) -> None:
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # its errors are raised, too, with all that it would log
    logging.getLogger("ray").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = int(no_progress_seconds)


def even_sizes(num_rows: int, num_blocks: int) -> list[int]:
    """Return the rows of each of ``num_blocks`` blocks of about one size."""
    edges = [num_rows * i // num_blocks for i in range(num_blocks + 1)] if num_blocks else []
    return [b - a for a, b in pairwise(edges)]


def blocks(work: pa.Table, sizes: Sequence[int]) -> ray.data.Dataset:
    """Return a dataset of blocks of so many rows each, cut here: Ray's own ``repartition`` asks for a whole CPU a task.

    On a small cluster whose pools hold most of the CPUs that request is never met, and the job waits for ever.
    """
    starts = accumulate(sizes, initial=0)
    pieces = [work.slice(start, size).combine_chunks() for start, size in zip(starts, sizes, strict=False)]
    return ray.data.from_arrow(pieces)


def cluster_resources() -> dict[str, float]:
    """Return CPU and GPU totals of the connected cluster; no CPUs where none of its nodes is there."""
    return {"CPU": 0.0} | {kind: amount for kind, amount in ray.cluster_resources().items() if kind in ("CPU", "GPU")}


def plan_actors(
    shares: Mapping[str, float], num_cpus: float, fixed: Mapping[str, int | None], num_items: int
) -> list[Pool]:
    """Return actor pools that together fit the cluster's CPUs.

    Parameters
    ----------
    shares
        Of the work, by stage: the slower stage gets more actors. Each stage gets at least one.
    num_cpus
        Of the cluster.
    fixed
        Pool sizes that the config sets; None where it leaves them open.
    num_items
        Of work. No pool gets more actors.

    Notes
    -----
    On few cores the pools hold more processes than cores, each asking for a fraction of one: decoding waits for disks
    and short stages wait for long ones, so that cores stay busy.
    """
    total = sum(shares.values())
    sizes = {
        name: fixed.get(name) or max(1, min(num_items, math.ceil(share / total * num_cpus)))
        for name, share in shares.items()
    }
    cpus_each = min(1.0, math.floor(100 * (num_cpus - RESERVED_CPUS) / sum(sizes.values())) / 100)
    return [Pool(name, size, max(cpus_each, 0.01)) for name, size in sizes.items()]


def check_schedule(pools: Sequence[Pool], num_task_stages: int, resources: Mapping[str, float]) -> None:
    """Do nothing if a job fits the cluster.

    Raises
    ------
    ScheduleError
        If it would wait for ever, with each stage's request.
    """
    wanted = {
        "CPU": sum(pool.num_actors * pool.num_cpus for pool in pools) + num_task_stages * TASK_CPUS,
        "GPU": sum(pool.num_actors * pool.num_gpus for pool in pools),
    }
    for kind, amount in wanted.items():
        available = resources.get(kind, 0.0)
        if amount > available + 1e-6:
            parts = ", ".join(
                f"{pool.name} {pool.num_actors} x {pool.num_cpus if kind == 'CPU' else pool.num_gpus:g}"
                for pool in pools
            )
            raise ScheduleError(
                f"the job asks for {amount:.2f} {kind}s ({parts}"
                + (f", tasks {num_task_stages} x {TASK_CPUS:g}" if kind == "CPU" else "")
                + f"), the cluster has {available:g}; it would wait for ever. Use fewer actors or a larger cluster."
            )
