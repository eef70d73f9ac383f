"""Search over segments held by actors, and the exact path over shards of token embeddings.

A batch of encoded queries goes out once; every actor or task returns its best videos, and the lists are merged. Ties are
broken by video id, so that the result does not depend on how many shards there are or which answers first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray

from cluster.index_store import LoadedSegment, read_codec, read_segment
from cluster.shards import Shard, read_tokens
from cluster.store import Store
from operators.maxsim import score_clips
from operators.segment import search

Floats = npt.NDArray[np.float32]


class Hit(NamedTuple):
    """A video found, by its best clip."""

    video_id: str
    score: float
    clip: int
    start_seconds: float
    stop_seconds: float


@dataclass(frozen=True)
class SearchOptions:
    """How to search: result count, scorer, and the two knobs of the index."""

    k: int
    scorer: str
    probes: int
    candidates: int


class SegmentHolder:
    """Holds segments of an index in memory and searches them; an actor, or used in place.

    Parameters
    ----------
    entries
        Of the manifest: the segments to hold.
    """

    def __init__(self, store: Store, index_id: str, entries: Sequence[Mapping[str, Any]]) -> None:
        self._codec = read_codec(store, index_id)
        self._segments = [read_segment(store, index_id, entry) for entry in entries]

    def search(self, queries: Sequence[Floats], options: SearchOptions) -> list[list[Hit]]:
        """Return the best ``k`` videos of each query."""
        return merge([self._search(held, queries, options) for held in self._segments], len(queries), options.k)

    def _search(self, held: LoadedSegment, queries: Sequence[Floats], options: SearchOptions) -> list[list[Hit]]:
        # k clips may be fewer than k videos: go deeper until there are k, or no more clips.
        depth = options.k
        while True:
            found = search(
                held.segment, self._codec, queries, depth, options.scorer, options.probes, options.candidates
            )
            hits = [best_videos(held.clips, ordinals, scores) for ordinals, scores in found]
            if all(len(h) >= options.k or len(f[0]) < depth for h, f in zip(hits, found, strict=True)):
                return hits
            depth *= 4


def search_exactly(
    shard: Shard, queries: Sequence[Floats], store: Store, table: str, version: int, k: int, scorer: str
) -> list[list[Hit]]:
    """Return the best ``k`` videos of a shard for each query, scored on its float16 token embeddings. A Ray task."""
    tokens = read_tokens(store, table, version, shard.rows["_rowid"])
    scores = score_clips(queries, tokens, shard.run_lengths, shard.run_clip, shard.clips.num_rows, scorer)
    order = [np.lexsort((np.arange(len(of_query)), -of_query)) for of_query in scores]
    hits = [
        best_videos(shard.clips, ranked[np.isfinite(of_query[ranked])], of_query[ranked][np.isfinite(of_query[ranked])])
        for ranked, of_query in zip(order, scores, strict=True)
    ]
    return [of_query[:k] for of_query in hits]


def best_videos(clips: pa.Table, ordinals: npt.NDArray[np.int64], scores: Floats) -> list[Hit]:
    """Return one hit a video, its best clip, from clips ranked best first."""
    best: dict[str, Hit] = {}
    rows = clips.take(pa.array(ordinals)).to_pylist()
    for row, score in zip(rows, scores.tolist(), strict=True):
        best.setdefault(
            row["video_id"], Hit(row["video_id"], score, row["clip"], row["start_seconds"], row["stop_seconds"])
        )
    return list(best.values())


def merge(lists: Iterable[Sequence[Sequence[Hit]]], num_queries: int, k: int) -> list[list[Hit]]:
    """Return the best ``k`` videos of each query over several searchers; a video in two of them counts once."""
    best: list[dict[str, Hit]] = [{} for _ in range(num_queries)]
    for of_searcher in lists:
        for of_query, hits in zip(best, of_searcher, strict=True):
            for hit in hits:
                known = of_query.get(hit.video_id)
                if known is None or (hit.score, -hit.clip) > (known.score, -known.clip):
                    of_query[hit.video_id] = hit
    return [sorted(hits.values(), key=lambda hit: (-hit.score, hit.video_id))[:k] for hits in best]


class Fleet:
    """Segments of an index spread over Ray actors by size.

    Parameters
    ----------
    entries
        All segments of the index.
    num_actors
        How many actors hold them; no more than there are segments.
    num_cpus
        That each actor asks for.
    """

    def __init__(
        self, store: Store, index_id: str, entries: Sequence[Mapping[str, Any]], num_actors: int, num_cpus: float
    ) -> None:
        holder = ray.remote(SegmentHolder).options(num_cpus=num_cpus, max_restarts=2, max_task_retries=2)
        self._actors = [holder.remote(store, index_id, share) for share in spread(entries, num_actors)]

    def search(self, queries: Sequence[Floats], options: SearchOptions) -> list[list[Hit]]:
        """Return the best ``k`` videos of each query."""
        sent = ray.put(list(queries))
        return merge(ray.get([actor.search.remote(sent, options) for actor in self._actors]), len(queries), options.k)


def spread(entries: Sequence[Mapping[str, Any]], num_actors: int) -> list[list[Mapping[str, Any]]]:
    """Return segments dealt to actors, largest first, each to the one that holds the fewest tokens."""
    shares: list[list[Mapping[str, Any]]] = [[] for _ in range(min(num_actors, len(entries)))]
    loads = [0] * len(shares)
    for entry in sorted(entries, key=lambda e: (-e["num_tokens"], e["name"])):
        lightest = loads.index(min(loads))
        shares[lightest].append(entry)
        loads[lightest] += entry["num_tokens"]
    return shares
