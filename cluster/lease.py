"""One writer a store: a lease that survives crashes, on any store that can create an object only if it is absent.

A lease is a numbered object, ``_lease/<generation>.json``. The highest generation is the lease in force; taking over an
expired one means creating the next number, which the store lets exactly one contender do. The holder renews by
overwriting its own object, and knows that it lost when a higher number exists. No conditional update is needed, so local
folders, S3, GCS and Azure behave alike.

A holder killed on this machine is recognised by its process id and start time and taken over at once; elsewhere the
lease has to expire first.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType

import obstore

from cluster.objects import describe, storage_error
from cluster.store import Store
from operators.errors import LeaseLostError, StorageError, StoreHeldError

log = logging.getLogger("maxreel")

PREFIX = "_lease"


@dataclass(frozen=True)
class Holder:
    """Who holds a store, and until when (Unix seconds)."""

    run_id: str
    job: str
    host: str
    pid: int
    process_started: str
    expires: float
    released: bool = False

    def is_alive(self, now: float) -> bool:
        """Return whether the lease still binds others."""
        if self.released or now >= self.expires:
            return False
        on_this_host = self.host == socket.gethostname()
        return not on_this_host or process_started(self.pid) == self.process_started


class Lease:
    """Holds a store for one run; use as a context manager.

    Parameters
    ----------
    store
        What to hold.
    run_id, job
        Told to whoever finds the store held.
    lease_seconds
        How long a silent holder is believed. Renewed every quarter of it by a thread.

    Raises
    ------
    StoreHeldError
        On entry, if another run holds the store.
    StorageError
        On entry, if the store cannot be reached, or refuses.
    """

    def __init__(self, store: Store, run_id: str, job: str, lease_seconds: float = 60.0) -> None:
        self._store = store
        self._seconds = lease_seconds
        pid = os.getpid()
        self._holder = Holder(run_id, job, socket.gethostname(), pid, process_started(pid), expires=0.0)
        self._generation = 0
        self._lost = ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew_until_stopped, name="lease", daemon=True)

    def __enter__(self) -> Lease:
        try:
            self._take()
        except (obstore.exceptions.BaseError, OSError) as error:
            raise storage_error("take the lease on", self._store.uri, error) from error
        self._thread.start()
        return self

    def _take(self) -> None:
        generation, holder = current(self._store)
        if holder is not None and holder.is_alive(time.time()):
            raise StoreHeldError(_held_message(self._store.uri, holder))
        self._generation = generation + 1
        try:
            self._write(create=True)
        except obstore.exceptions.AlreadyExistsError as error:
            _, holder = current(self._store)
            if holder is None or replace(holder, expires=0.0) != self._holder:
                raise StoreHeldError(
                    f"{self._store.uri} was taken by another run this very moment; try again"
                ) from error
            self._holder = holder  # it is ours: the answer to the first attempt was lost, and obstore made a second
        # Whoever slept between reading and writing may have made a number that was used and forgotten in the meantime.
        if current(self._store)[0] != self._generation:
            raise StoreHeldError(f"{self._store.uri} was taken by another run this very moment; try again")
        _forget_before(self._store, self._generation)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        if not self._lost:
            self._holder = replace(self._holder, released=True)
            try:
                self._write()
            except (
                obstore.exceptions.BaseError,
                OSError,
            ) as failure:  # the job's own error, or its success, matters more
                log.warning("the lease was not released (%s); it ends in %.0f s", describe(failure), self._seconds)

    def check(self) -> None:
        """Do nothing while the lease is ours; called before every commit.

        Raises
        ------
        LeaseLostError
            If it expired unrenewed or another run took over.
        """
        if not self._lost and time.time() >= self._holder.expires:
            self._lost = f"it expired unrenewed {time.time() - self._holder.expires:.0f} s ago"
        if self._lost:
            raise LeaseLostError(
                f"the lease on {self._store.uri} was lost: {self._lost}. Nothing more was committed; run the command again."
            )

    def _renew_until_stopped(self) -> None:
        while not self._stop.wait(self._seconds / 4):
            try:
                generation, holder = current(self._store)
                if generation != self._generation:
                    self._lost = f"run {holder.run_id if holder else '?'} took over"
                    return
                self._write()
            except (obstore.exceptions.BaseError, OSError, StorageError):
                continue  # a store out of reach for longer than the lease is found by check()

    def _write(self, create: bool = False) -> None:
        holder = replace(self._holder, expires=time.time() + self._seconds)
        obstore.put(
            self._store.objects,
            f"{PREFIX}/{self._generation:012d}.json",
            json.dumps(asdict(holder)).encode(),
            mode="create" if create else "overwrite",
        )
        self._holder = holder


def current(store: Store) -> tuple[int, Holder | None]:
    """Return the generation in force (0 where there never was one) and its holder."""
    paths = sorted(_paths(store))
    if not paths:
        return 0, None
    generation = int(Path(paths[-1]).stem)
    try:
        raw = bytes(obstore.get(store.objects, paths[-1]).bytes())
    except FileNotFoundError:  # its successor removed it between the two calls
        return current(store)
    try:
        return generation, Holder(**json.loads(raw))
    except (ValueError, TypeError):
        return generation, None  # cut short by a crash while it was written: nobody holds it


def _paths(store: Store) -> list[str]:
    return [entry["path"] for batch in obstore.list(store.objects, f"{PREFIX}/") for entry in batch]


def _forget_before(store: Store, generation: int) -> None:
    for path in _paths(store):
        if int(Path(path).stem) < generation:
            obstore.delete(store.objects, path)


def _held_message(uri: str, holder: Holder) -> str:
    return (
        f"{uri} is held by run {holder.run_id} ({holder.job}) on {holder.host}, process {holder.pid}, "
        f"for another {max(0.0, holder.expires - time.time()):.0f} s unless renewed. "
        "Wait for it to end, or stop it; a killed run frees the store by itself."
    )


def process_started(pid: int) -> str:
    """Return a process's start time in clock ticks, or "" where it is gone (or the system has no /proc)."""
    try:
        # Fields 3 (state) and 22 (start time), counted after the name, which may itself hold spaces and brackets.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]
