"""The one idea that carries everything: which rows are missing or stale.

A row names what made it (its fingerprint). What should be there is a table of keys and fingerprints; what is there is
read from Lance with row ids. First run, nightly re-index, resume after a crash, a new OCR engine and a new encoder are
all this one comparison, which runs in Arrow: the driver holds keys and fingerprints, nothing more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from cluster.store import FAILURES, Store


@dataclass(frozen=True)
class Difference:
    """What to do so that a table holds what it should.

    Attributes
    ----------
    missing
        The rows of ``expected`` that have no complete match.
    surplus_row_ids
        Lance row ids of rows that are stale, incomplete, doubled or no longer expected.
    num_fresh
        How many expected keys are there and complete.
    """

    missing: pa.Table
    surplus_row_ids: list[int]
    num_fresh: int


def compare(expected: pa.Table, existing: pa.Table, keys: Sequence[str]) -> Difference:
    """Return what is missing and what is surplus.

    Parameters
    ----------
    expected
        ``keys`` (unique together), ``fingerprint``, and anything else.
    existing
        ``keys``, ``fingerprint``, ``rows_per_key`` (how many rows make this key complete: a video's clips) and
        ``_rowid``.
    """
    keys = list(keys)
    wanted = expected.select([*keys, "fingerprint"]).rename_columns([*keys, "wanted"])
    joined = existing.join(wanted, keys)
    matching = joined.filter(pc.fill_null(pc.equal(joined["fingerprint"], joined["wanted"]), False))
    groups = matching.group_by(keys).aggregate([("_rowid", "count"), ("rows_per_key", "max")])
    complete = groups.filter(pc.equal(groups["_rowid_count"], groups["rows_per_key_max"])).select(keys)

    # Joined by position: Arrow's join carries no list columns.
    numbered = expected.select(keys).append_column("position", pa.array(range(expected.num_rows), pa.int64()))
    missing = expected.take(numbered.join(complete, keys, join_type="left anti").sort_by("position")["position"])
    stale_keys = existing.join(complete, keys, join_type="left anti")["_rowid"]
    other_versions = joined.filter(pc.invert(pc.fill_null(pc.equal(joined["fingerprint"], joined["wanted"]), False)))
    surplus = set(stale_keys.to_pylist()) | set(other_versions["_rowid"].to_pylist())
    return Difference(missing, sorted(surplus), complete.num_rows)


@dataclass(frozen=True)
class Work:
    """What a job has to do: its items, and how many videos it leaves out, for good or until later."""

    rows: pa.Table
    difference: Difference
    num_quarantined: int
    num_waiting: int


@dataclass(frozen=True)
class Quarantine:
    """The failures known so far: what not to try again until its source or settings change."""

    by_key: Mapping[tuple[str, str], tuple[str, int, bool, float]]
    max_attempts: int
    wait_seconds: float

    @classmethod
    def load(cls, store: Store, max_attempts: int, wait_seconds: float) -> Quarantine:
        """Read the ``failures`` table.

        Parameters
        ----------
        wait_seconds
            Before a first second attempt; each further one waits twice as long.
        """
        columns = ["video_id", "stage", "fingerprint", "attempts", "final", "time"]
        by_key = {
            (r["video_id"], r["stage"]): (r["fingerprint"], r["attempts"], r["final"], r["time"].timestamp())
            for r in store.rows(FAILURES, columns).to_pylist()
        }
        return cls(by_key, max_attempts, wait_seconds)

    def holds(self, video_id: str, fingerprints: Mapping[str, str]) -> bool:
        """Return whether one of these stages failed at this very fingerprint, for good or often enough."""
        return any(self.is_out(video_id, stage, fingerprint) for stage, fingerprint in fingerprints.items())

    def is_out(self, video_id: str, stage: str, fingerprint: str) -> bool:
        """Return whether one stage of a video failed at this fingerprint, for good or often enough."""
        known, attempts, final, _ = self.by_key.get((video_id, stage), ("", 0, False, 0.0))
        return known == fingerprint and (final or attempts >= self.max_attempts)

    def waits(self, video_id: str, fingerprints: Mapping[str, str], now: float) -> bool:
        """Return whether it is too early to try one of these stages again; ``now`` is in Unix seconds."""
        for stage, fingerprint in fingerprints.items():
            known, attempts, _, failed = self.by_key.get((video_id, stage), ("", 0, False, 0.0))
            if known == fingerprint and now < failed + self.wait_seconds * 2 ** (attempts - 1):
                return True
        return False

    def attempts(self) -> dict[tuple[str, str], tuple[str, int]]:
        """Return what a `Committer` needs to go on counting."""
        return {key: (fingerprint, attempts) for key, (fingerprint, attempts, *_) in self.by_key.items()}
