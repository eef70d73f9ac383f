"""Marks of open readers, so that `maxreel gc` leaves what they read.

A reader writes ``_readers/<id>.json`` with the release it opened, renews it while it reads and removes it at its end. One
that may not write leaves no mark; the hours that gc keeps everything for are for those.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

import obstore

from cluster.lease import Holder, process_started
from cluster.store import Store

log = logging.getLogger("maxreel")

PREFIX = "_readers"

MARK_SECONDS = 3600.0
"""How long a silent reader is believed to read on."""


@contextmanager
def reading(store: Store, release_id: int) -> Iterator[None]:
    """Mark a release as being read for as long as the block runs."""
    path = f"{PREFIX}/{uuid.uuid4().hex}.json"
    stop = threading.Event()

    def mark() -> None:
        pid, expires = os.getpid(), time.time() + MARK_SECONDS
        holder = Holder(str(release_id), "read", socket.gethostname(), pid, process_started(pid), expires)
        obstore.put(store.objects, path, json.dumps(asdict(holder)).encode())

    def renew() -> None:
        while not stop.wait(MARK_SECONDS / 4):
            try:
                mark()
            except (obstore.exceptions.BaseError, OSError):
                continue

    try:
        mark()
    except (obstore.exceptions.BaseError, OSError) as error:
        log.debug("no mark of this reader, as the store cannot be written: %s", error)
        yield
        return
    thread = threading.Thread(target=renew, name="reader", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        try:
            obstore.delete(store.objects, path)
        except (obstore.exceptions.BaseError, OSError) as error:
            log.debug("the mark of this reader stays until it expires: %s", error)


def being_read(store: Store) -> set[int]:
    """Return the releases that open readers read; marks of readers that died are removed."""
    releases = set()
    for entry in [entry for batch in obstore.list(store.objects, f"{PREFIX}/") for entry in batch]:
        try:
            holder = Holder(**json.loads(bytes(obstore.get(store.objects, entry["path"]).bytes())))
        except (FileNotFoundError, ValueError, TypeError):
            continue  # just closed, or being written this moment: its release is live, which gc keeps
        if holder.is_alive(time.time()):
            releases.add(int(holder.run_id))
        else:
            obstore.delete(store.objects, entry["path"])
    return releases
