"""Keeps an index up to date without building it again: what is new, what is gone, and which segments to merge.

A clip of a segment names the rows of the token embedding table that it was made from. Row ids are stable and never come
again, so a clip is still there if all its rows are, and the clip has no others. All else are tombstones; clips that no
segment holds become new segments under the same codec.

Small segments are merged by size, as log-structured stores do: four of about one size become one. So every token is
written again only a logarithmic number of times, and a store keeps a logarithmic number of small segments.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.index_store import LOAD_THREADS, Tombstones, read_made_from
from cluster.store import Store

Entry = Mapping[str, Any]

MERGE_WIDTH = 4
"""So many segments of one size class, each four times the last, are merged."""

MAX_DEAD_SHARE = 0.25
"""Of a segment's tokens; one with more is written again without them."""


@dataclass(frozen=True)
class Upkeep:
    """How an index differs from the token embeddings as they are now.

    Attributes
    ----------
    new
        Rows, as `cluster.shards.clip_rows` gives them, of the clips that no segment holds.
    segments
        The index's entries, with the dead clips and tokens of today.
    tombstones
        Clips that are no longer there, those known before among them.
    num_dead
        Clips that were there when the index was made and now are not.
    """

    new: pa.Table
    segments: list[dict[str, Any]]
    tombstones: Tombstones
    num_dead: int


def examine(store: Store, manifest: Mapping[str, Any], rows: pa.Table) -> Upkeep:
    """Return how an index differs from the token embeddings, whose rows are as `cluster.shards.clip_rows` gives them."""
    ordinals = rows["clip_ordinal"].to_numpy()
    row_ids = rows["_rowid"].to_numpy()
    order = np.argsort(row_ids)
    sorted_ids, clip_of_id = row_ids[order], ordinals[order]
    rows_of_clip = np.bincount(ordinals)
    held = np.zeros(len(rows_of_clip), dtype=bool)
    segments, tombstones = [], {}
    with ThreadPoolExecutor(LOAD_THREADS) as pool:
        made_from = pool.map(lambda entry: read_made_from(store, entry), manifest["segments"])
        for entry, (ids, rows_each, tokens_each) in zip(manifest["segments"], made_from, strict=True):
            at = np.minimum(np.searchsorted(sorted_ids, ids), max(0, len(sorted_ids) - 1))
            there = sorted_ids[at] == ids if len(sorted_ids) else np.zeros(len(ids), dtype=bool)
            alive = np.ones(len(rows_each), dtype=bool)
            alive[np.repeat(np.arange(len(rows_each)), rows_each)[~there]] = False
            clips = np.flatnonzero(alive)
            now = clip_of_id[at[np.cumsum(rows_each)[clips] - 1]]
            whole = rows_of_clip[now] == rows_each[clips]
            alive[clips[~whole]] = False
            held[now[whole]] = True
            dead = np.flatnonzero(~alive).astype(np.uint32)
            segments.append(
                dict(entry) | {"num_dead_clips": len(dead), "num_dead_tokens": int(tokens_each[dead].sum())}
            )
            if len(dead):
                tombstones[entry["path"]] = dead
    before = sum(entry["num_dead_clips"] for entry in manifest["segments"])
    num_dead = sum(entry["num_dead_clips"] for entry in segments) - before
    return Upkeep(rows.filter(pa.array(~held[ordinals])), segments, tombstones, num_dead)


def live_tokens(entry: Entry) -> int:
    """Return the tokens of a segment that have no tombstone."""
    return int(entry["num_tokens"] - entry["num_dead_tokens"])


def plan_merges(entries: Sequence[Entry], segment_tokens: int) -> list[list[Entry]]:
    """Return which segments to write again as one: small ones of one size, and those of which much is dead.

    Parameters
    ----------
    segment_tokens
        Of a full segment. None larger is made, and one of at least half of it is not small.
    """
    small = [[entry] for entry in entries if live_tokens(entry) < segment_tokens / 2]
    merged: list[list[Entry]] = []
    while group := next((g for g in _by_size(small) if len(g) >= MERGE_WIDTH), None):
        bins = _bins(group, segment_tokens)
        small = [item for item in small if item not in group] + [b for b in bins if _size(b) < segment_tokens / 2]
        merged += [b for b in bins if _size(b) >= segment_tokens / 2]
    merged = [item for item in (*merged, *small) if len(item) > 1]
    taken = {entry["path"] for item in merged for entry in item}
    decayed = [e for e in entries if e["num_dead_tokens"] > MAX_DEAD_SHARE * e["num_tokens"] and e["path"] not in taken]
    return merged + [[entry] for entry in decayed]


def _size(item: Sequence[Entry]) -> int:
    return sum(live_tokens(entry) for entry in item)


def _by_size(items: Sequence[list[Entry]]) -> list[list[list[Entry]]]:
    classes: dict[int, list[list[Entry]]] = {}
    for item in items:
        classes.setdefault(int(math.log(max(1, _size(item)), MERGE_WIDTH)), []).append(item)
    return list(classes.values())


def _bins(items: Sequence[list[Entry]], segment_tokens: int) -> list[list[Entry]]:
    """Return items joined in their order, none larger than a full segment."""
    bins: list[list[Entry]] = []
    for item in items:
        if bins and _size(bins[-1]) + _size(item) <= segment_tokens:
            bins[-1] = bins[-1] + item
        else:
            bins.append(item)
    return bins
