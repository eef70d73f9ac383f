"""Releases: consistent sets of table versions and an index. What readers open is the one that was published last.

``releases`` is a log: a draft, its publication or refusal, every later publication (a rollback is one), and its
collection are a row each. Publishing is one atomic append; nothing is copied, and a reader that is open keeps what it
opened.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from cluster.index_store import read_manifest
from cluster.store import MODALITIES, RELEASES, VIDEOS, Store
from operators import schema
from operators.encoders import Encoder
from operators.errors import ConfigError, ModelError, StorageError
from pipelines.config import EncodeConfig
from pipelines.encode import ENCODERS, encoder_fingerprint
from pipelines.job import Job

DRAFT, REFUSED, PUBLISHED, COLLECTED = "draft", "refused", "published", "collected"


@dataclass(frozen=True)
class Release:
    """What a reader opens."""

    release_id: int
    index_id: str
    tables: dict[str, int]
    encode: EncodeConfig
    encoder_fingerprint: str
    gates: list[dict[str, Any]]
    manifest: dict[str, Any]

    @property
    def token_table(self) -> str:
        """The token embedding table that the index was made from."""
        return str(self.manifest["table"])

    def load_encoder(self, num_threads: int, device: str = "cpu") -> Encoder:
        """Load the encoder that made the index, to encode queries with.

        Raises
        ------
        ModelError
            If the model on this machine is not the one that made the index.
        """
        here = encoder_fingerprint(self.encode)
        if here != self.encoder_fingerprint:
            raise ModelError(
                f"the {self.encode.encoder} encoder here is not the one that made index {self.index_id} "
                f"(fingerprint {here}, wanted {self.encoder_fingerprint}): scores would mean nothing. "
                "Install the same model revision, or encode and build the index again."
            )
        parameters = self.encode.parameters() | {"num_threads": num_threads, "device": device}
        encoder: Encoder = ENCODERS[self.encode.encoder](**parameters)
        return encoder


def open_release(store: Store, release_id: int | None = None) -> Release:
    """Return a release, that which readers see unless told otherwise.

    Raises
    ------
    StorageError
        If nothing was released yet, or the release's index is gone.
    ConfigError
        If there is no such release.
    """
    store.check_format()
    log = read_log(store)
    if release_id is not None:
        row = _newest(log, release_id)
    elif (live := live_id(log)) is not None:
        row = _newest(log, live)
    else:
        raise StorageError(f"{store.uri} has no published index yet; run `maxreel build-index --store {store.uri}`")
    encode = json.loads(row["encode"])
    return Release(
        release_id=row["release_id"],
        index_id=row["index_id"],
        tables=json.loads(row["tables"]),
        encode=EncodeConfig.model_validate(encode["config"]),
        encoder_fingerprint=encode["fingerprint"],
        gates=json.loads(row["gates"]),
        manifest=read_manifest(store, row["index_id"]),
    )


def find_live(store: Store) -> Release | None:
    """Return the release that readers see, or None before the first."""
    return None if live_id(read_log(store)) is None else open_release(store)


def read_log(store: Store) -> list[dict[str, Any]]:
    """Return what was done with releases, oldest first."""
    rows: list[dict[str, Any]] = store.rows(RELEASES, schema.RELEASES.names).sort_by("event").to_pylist()
    return rows


def live_id(log: Sequence[Mapping[str, Any]]) -> int | None:
    """Return the release that readers see."""
    return next((row["release_id"] for row in reversed(log) if row["state"] == PUBLISHED), None)


def list_releases(store: Store) -> list[dict[str, Any]]:
    """Return each release with its state, when it was made and when it was published last; newest first."""
    log = read_log(store)
    live = live_id(log)
    found: dict[int, dict[str, Any]] = {}
    for row in log:
        release = found.setdefault(
            row["release_id"],
            {"release_id": row["release_id"], "made": row["time"], "published": None, "index_id": row["index_id"]},
        )
        release |= {"state": row["state"], "reason": row["reason"], "run_id": row["run_id"]}
        if row["state"] == PUBLISHED:
            release["published"] = row["time"]
    for release_id, release in found.items():
        release["live"] = release_id == live
    return sorted(found.values(), key=lambda release: -release["release_id"])


def is_current(store: Store, release: Release) -> bool:
    """Return whether videos and modalities are still those of a release."""
    return all(store.open(name).version == release.tables[name] for name in (VIDEOS, MODALITIES))


def add_draft(job: Job, manifest: Mapping[str, Any]) -> int:
    """Write down a release of the tables as they are now and an index, and return its number. Readers do not see it."""
    log = read_log(job.store)
    tables = {name: job.store.open(name).version for name in (VIDEOS, MODALITIES)}
    encode = job.config.encode
    return _append(
        job,
        log,
        {
            "release_id": max((row["release_id"] for row in log), default=0) + 1,
            "state": DRAFT,
            "index_id": manifest["index_id"],
            "tables": json.dumps(tables | {manifest["table"]: manifest["version"]}),
            "encode": json.dumps({"config": encode.model_dump(), "fingerprint": encoder_fingerprint(encode)}),
            "gates": "[]",
            "reason": "",
        },
    )


def publish(job: Job, release_id: int, reason: str, gates: Sequence[Mapping[str, Any]] | None = None) -> None:
    """Make a release the one that readers open: one row, one atomic commit."""
    log = read_log(job.store)
    row = _newest(log, release_id)
    read_manifest(job.store, row["index_id"])
    judged = {} if gates is None else {"gates": json.dumps(list(gates))}
    _append(job, log, row | judged | {"state": PUBLISHED, "reason": reason})


def refuse(job: Job, release_id: int, reason: str, gates: Sequence[Mapping[str, Any]]) -> None:
    """Write down that a draft is not to be published, and why."""
    log = read_log(job.store)
    row = _newest(log, release_id)
    _append(job, log, row | {"gates": json.dumps(list(gates)), "state": REFUSED, "reason": reason})


def collect(job: Job, release_ids: Sequence[int]) -> None:
    """Write down that releases can no longer be opened."""
    for release_id in release_ids:
        log = read_log(job.store)
        _append(job, log, _newest(log, release_id) | {"state": COLLECTED, "reason": "collected"})


def to_publish(store: Store, release_id: int | None) -> int:
    """Return the release to publish: the one named, else the newest, which must be a draft.

    Raises
    ------
    ConfigError
        If there is none, it was collected, or it was refused and not named.
    """
    log = read_log(store)
    if release_id is not None:
        _newest(log, release_id)
        return release_id
    newest = max((row["release_id"] for row in log), default=None)
    if newest is None:
        raise ConfigError(f"{store.uri} has no releases; run `maxreel build-index --store {store.uri}` first")
    row = _newest(log, newest)
    if row["state"] == REFUSED:
        raise ConfigError(
            f"release {newest}, the newest, was refused: {row['reason']}. "
            f"To publish it all the same, name it: `maxreel publish {newest} --store {store.uri}`."
        )
    return int(newest)


def to_roll_back_to(store: Store, release_id: int | None) -> int:
    """Return the release to go back to: the one named, else the one that was live before.

    Raises
    ------
    ConfigError
        If there is none, or it was never published, or is no longer there.
    """
    log = read_log(store)
    published = {row["release_id"] for row in log if row["state"] == PUBLISHED}
    there = sorted(published - {row["release_id"] for row in log if row["state"] == COLLECTED})
    live = live_id(log) or 0
    older = [number for number in there if number < live]
    wanted = release_id if release_id is not None else older[-1] if older else None
    if wanted is None or wanted not in there:
        what = (
            "there is no older release to go back to" if wanted is None else f"release {wanted} cannot be gone back to"
        )
        raise ConfigError(f"{what}; published and still there are: {', '.join(map(str, there)) or 'none'}")
    return wanted


def _newest(log: Sequence[Mapping[str, Any]], release_id: int) -> dict[str, Any]:
    rows = [row for row in log if row["release_id"] == release_id]
    if not rows:
        known = sorted({row["release_id"] for row in log})
        raise ConfigError(f"there is no release {release_id}; known are {', '.join(map(str, known)) or 'none'}")
    if rows[-1]["state"] == COLLECTED:
        raise ConfigError(f"release {release_id} was collected by `maxreel gc` and is no longer there")
    return dict(rows[-1])


def _append(job: Job, log: Sequence[Mapping[str, Any]], row: Mapping[str, Any]) -> int:
    event = max((known["event"] for known in log), default=0) + 1
    stamped = dict(row) | {"event": event, "run_id": job.run_id, "time": datetime.now(UTC)}
    job.lease.check()
    job.store.append(RELEASES, pa.Table.from_pylist([stamped], schema=schema.RELEASES))
    return int(row["release_id"])
