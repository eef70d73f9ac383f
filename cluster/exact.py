"""The exact path: every token embedding is scored, by several scorers at once. The oracle of an index's recall.

Shards of whole videos are scored by tasks. Each returns, for each query, the videos that are among the best by any of the
scorers, with their scores by all of them: a `Pool`. Pools are joined as they come and cut again, so that no more is held
than ``scorers * k`` videos a query, and neither the number of shards nor the order of their answers changes a result.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import ray

from cluster.searchers import Hit
from cluster.shards import Shard, read_tokens
from cluster.store import Store
from operators.maxsim import Scorer, blocks, run_maxima, score_clips_by
from operators.schema import MODALITIES

Floats = npt.NDArray[np.float32]

SCORE_BYTES = 128 << 20
"""Of scores that a task holds at a time: a shard of short clips has many."""

TASKS_AHEAD = 4
"""For each core: enough to keep it busy, few enough that results do not pile up."""


@dataclass(frozen=True, eq=False)
class Pool:
    """Videos found for one query, with their scores by S scorers. A video's score is that of its best clip.

    Attributes
    ----------
    video_ids : (P,), object
        Rising.
    scores : (P, S), float32
        -inf where a scorer finds nothing in a video.
    clips, starts, stops : (P, S)
        The best clip by each scorer, and its bounds in seconds.
    """

    video_ids: npt.NDArray[Any]
    scores: Floats
    clips: npt.NDArray[np.int32]
    starts: npt.NDArray[np.float64]
    stops: npt.NDArray[np.float64]

    def best(self, scorer: int, k: int) -> list[Hit]:
        """Return the best ``k`` videos by a scorer; of equals the lower id first."""
        scores = self.scores[:, scorer]
        order = np.argsort(-scores, kind="stable")[:k]
        return [
            Hit(
                self.video_ids[i],
                float(scores[i]),
                int(self.clips[i, scorer]),
                float(self.starts[i, scorer]),
                float(self.stops[i, scorer]),
            )
            for i in order
            if np.isfinite(scores[i])
        ]

    def take(self, places: npt.NDArray[Any]) -> Pool:
        """Return the pool of some videos."""
        columns = (self.video_ids, self.scores, self.clips, self.starts, self.stops)
        return Pool(*(column[places] for column in columns))

    @staticmethod
    def join(pools: Sequence[Pool], k: int) -> Pool:
        """Return what is among the best ``k`` by any scorer in pools of different videos."""
        columns = zip(*((p.video_ids, p.scores, p.clips, p.starts, p.stops) for p in pools), strict=True)
        joined = Pool(*(np.concatenate(column) for column in columns))
        joined = joined.take(np.argsort(joined.video_ids, kind="stable"))
        return joined.take(_among_best(joined.scores, k))


def _among_best(scores: Floats, k: int) -> npt.NDArray[np.intp]:
    """Return the rows, rising, that are among the best ``k`` of a column, of equals the first; never one of -inf only."""
    if len(scores) > k:
        kept = np.argsort(-scores, axis=0, kind="stable")[:k]
        rows = np.unique(kept[np.isfinite(np.take_along_axis(scores, kept, axis=0))])
        return rows
    return np.flatnonzero(np.isfinite(scores).any(axis=1))


@dataclass(frozen=True)
class Wins:
    """How many of a query's tokens each modality of a video won.

    Attributes
    ----------
    video_id
        Of a relevant video.
    counts
        Of each of `operators.schema.MODALITIES`.
    """

    video_id: str
    counts: tuple[int, ...]


def search_exactly(
    store: Store,
    table: str,
    version: int,
    shards: Iterable[Shard],
    queries: Sequence[Floats],
    k: int,
    scorers: Sequence[Scorer],
    relevant: Sequence[frozenset[str]] | None = None,
    num_cpus: int = 1,
) -> tuple[list[Pool], list[list[Wins]]]:
    """Return the pool of each query, and which modalities won its tokens in each of its relevant videos.

    Parameters
    ----------
    shards
        Of whole videos, as `cluster.shards.cut` gives them.
    relevant
        Videos of each query whose winners are wanted, at the best clip by the first scorer; none if None.
    num_cpus
        Of the cluster: so many shards are scored at a time, and a few wait.
    """
    nothing = np.empty(0, object), np.empty((0, len(scorers)), np.float32), np.empty((0, len(scorers)), np.int32)
    empty = Pool(*nothing, np.empty((0, len(scorers))), np.empty((0, len(scorers))))
    pools, wins = [empty] * len(queries), [list[Wins]() for _ in queries]
    task = ray.remote(_search_shard).options(num_cpus=1, max_retries=3)
    sent = ray.put(list(queries))
    sent_relevant = ray.put(list(relevant) if relevant is not None else None)
    waiting: list[Any] = []

    def finished() -> Iterator[tuple[list[Pool], list[list[Wins]]]]:
        nonlocal waiting
        for shard in shards:
            waiting.append(task.remote(shard, sent, store, table, version, k, scorers, sent_relevant))
            if len(waiting) >= TASKS_AHEAD * num_cpus:
                done, waiting = ray.wait(waiting)
                yield from ray.get(done)
        while waiting:
            done, waiting = ray.wait(waiting)
            yield from ray.get(done)

    for of_shard, won in finished():
        pools = [Pool.join([pool, more], k) for pool, more in zip(pools, of_shard, strict=True)]
        for of_query, more_wins in zip(wins, won, strict=True):
            of_query += more_wins
    return pools, [sorted(of_query, key=lambda w: w.video_id) for of_query in wins]


def _search_shard(
    shard: Shard,
    queries: Sequence[Floats],
    store: Store,
    table: str,
    version: int,
    k: int,
    scorers: Sequence[Scorer],
    relevant: Sequence[frozenset[str]] | None,
) -> tuple[list[Pool], list[list[Wins]]]:
    """Score a shard, some videos at a time. A Ray task."""
    max_clips = SCORE_BYTES // (4 * len(scorers) * max(1, len(queries)))
    pieces = [_score(piece, queries, store, table, version, k, scorers, relevant) for piece in _cut(shard, max_clips)]
    pools = [Pool.join(of_query, k) for of_query in zip(*(found for found, _ in pieces), strict=True)]
    wins = [[w for won in of_query for w in won] for of_query in zip(*(won for _, won in pieces), strict=True)]
    return pools, wins


def _cut(shard: Shard, max_clips: int) -> Iterator[Shard]:
    """Yield shards of whole videos, of at most so many clips or one video."""
    firsts = np.append(shard.first_clip_of_video, shard.clips.num_rows)
    for first, last in blocks(np.diff(firsts), max_clips):
        start, stop = np.searchsorted(shard.run_clip, firsts[[first, last]])
        yield Shard(shard.rows.slice(start, stop - start))


def _score(
    shard: Shard,
    queries: Sequence[Floats],
    store: Store,
    table: str,
    version: int,
    k: int,
    scorers: Sequence[Scorer],
    relevant: Sequence[frozenset[str]] | None,
) -> tuple[list[Pool], list[list[Wins]]]:
    tokens = read_tokens(store, table, version, shard.rows["_rowid"]).astype(np.float32)
    runs = shard.run_lengths, shard.run_clip, shard.run_modality
    scores = score_clips_by(queries, tokens, *runs, shard.clips.num_rows, scorers)
    pools = [_pool(shard, scores[:, i].T, k) for i in range(len(queries))]
    if relevant is None:
        return pools, [[] for _ in queries]
    place = {video_id: i for i, video_id in enumerate(shard.video_ids)}
    wins = [
        [
            Wins(video_id, counts)
            for video_id in sorted(wanted & place.keys())
            if (counts := _wins(shard, tokens, query, scores[0, i], place[video_id], scorers[0]))
        ]
        for i, (query, wanted) in enumerate(zip(queries, relevant, strict=True))
    ]
    return pools, wins


def _pool(shard: Shard, scores: Floats, k: int) -> Pool:
    """Return the best videos of a shard by scores of its clips, (D, S)."""
    first_clips, video_ids = shard.first_clip_of_video, shard.video_ids
    best = np.maximum.reduceat(scores, first_clips, axis=0)
    rows = _among_best(best, k)
    starts, stops = shard.clips["start_seconds"].to_numpy(), shard.clips["stop_seconds"].to_numpy()
    numbers = shard.clips["clip"].to_numpy()
    ends = np.append(first_clips[1:], len(scores))
    at = np.array([first_clips[v] + np.argmax(scores[first_clips[v] : ends[v]], axis=0) for v in rows], np.int64)
    at = at.reshape(-1, scores.shape[1])
    return Pool(video_ids[rows], best[rows], numbers[at], starts[at], stops[at])


def _wins(
    shard: Shard, tokens: Floats, query: Floats, scores: Floats, video: int, scorer: Scorer
) -> tuple[int, ...] | None:
    """Return the wins in a video of a shard, at its best clip by scores, (D,); None if the scorer finds nothing in it."""
    firsts = np.append(shard.first_clip_of_video, len(scores))
    clip = firsts[video] + int(np.argmax(scores[firsts[video] : firsts[video + 1]]))
    if not np.isfinite(scores[clip]):
        return None
    counted = np.array([group >= 0 for group in scorer.group_of])
    runs = np.arange(*np.searchsorted(shard.run_clip, [clip, clip + 1]))
    runs = runs[counted[shard.run_modality[runs]]]
    token_of_run = np.concatenate([[0], np.cumsum(shard.run_lengths)])
    of_clip = np.concatenate([tokens[token_of_run[run] : token_of_run[run + 1]] for run in runs])
    winners = run_maxima(query, of_clip, shard.run_lengths[runs]).argmax(axis=1)
    return tuple(np.bincount(shard.run_modality[runs][winners], minlength=len(MODALITIES)).tolist())
