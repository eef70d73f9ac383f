"""Search over segments held by actors.

A batch of encoded queries goes out once; every actor returns its best videos, and the lists are merged. Ties are
broken by video id, so that the result does not depend on how many shards there are or which answers first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import ray

from cluster.index_store import LoadedIndex, read_codec, read_index, read_tombstones
from cluster.shards import embeddings_of
from cluster.store import Store
from operators.calibrate import choose
from operators.codec import ResidualCodec
from operators.errors import ConfigError
from operators.maxsim import Scorer, score_clips
from operators.schema import MODALITIES
from operators.search import Fate, Plan, Result, Searcher

if TYPE_CHECKING:
    from operators.search_gpu import GpuSearcher

Floats = npt.NDArray[np.float32]

ACTOR_RETRIES = 3
"""How often a search is sent again to an actor that died of it; one that dies each time must end the job."""


class Hit(NamedTuple):
    """A video found, by its best clip."""

    video_id: str
    score: float
    clip: int
    start_seconds: float
    stop_seconds: float


@dataclass(frozen=True)
class Filter:
    """Which clips may be found; candidates are never drawn from others.

    Attributes
    ----------
    video_ids
        Only these videos; all if None.
    start_seconds, stop_seconds
        Only clips that overlap this part of their video.
    """

    video_ids: frozenset[str] | None = None
    start_seconds: float = 0.0
    stop_seconds: float = math.inf

    def allowed(self, clips: pa.Table) -> npt.NDArray[np.bool_] | None:
        """Return which clips may be found, (D,); None if all."""
        if self == Filter():
            return None
        starts, stops = clips["start_seconds"].to_numpy(), clips["stop_seconds"].to_numpy()
        # A video without a file is one clip of no length, at 0.
        reaches = (stops > self.start_seconds) | ((starts == stops) & (stops >= self.start_seconds))
        allowed: npt.NDArray[np.bool_] = (starts < self.stop_seconds) & reaches
        if self.video_ids is not None:
            wanted = pa.array(sorted(self.video_ids), pa.string())
            allowed &= pc.is_in(clips["video_id"], value_set=wanted).to_numpy()
        return allowed


@dataclass(frozen=True)
class SearchOptions:
    """How to search.

    Attributes
    ----------
    k
        Videos asked for.
    recall
        Share of the exact result to find; the index's own curve turns it into a plan.
    probes, candidates, rescored
        Each, where given, instead of what the recall asks for; 0 probes score every code.
    threads
        Of each holder.
    """

    k: int
    scorer: Scorer
    recall: float = 0.95
    probes: int | None = None
    candidates: int | None = None
    rescored: int | None = None
    filter: Filter = Filter()
    threads: int = 1

    def plan(self, manifest: Mapping[str, Any], num_clips: int) -> tuple[Plan, int]:
        """Return the plan for a holder of so many clips, and how many of them to rescore on float embeddings."""
        curve = manifest["curve"]
        chosen, rescored = choose(curve["points"], self.recall, self.k, num_clips / max(1, curve["num_clips"]))
        return (
            Plan(
                chosen.probes if self.probes is None else self.probes,
                chosen.candidates if self.candidates is None else self.candidates,
            ),
            rescored if self.rescored is None else self.rescored,
        )


@dataclass(frozen=True)
class Trace:
    """At which stage a video was lost, and what is known of it there.

    Attributes
    ----------
    stage
        ``not indexed``, ``without tokens``, ``tombstoned``, ``filtered out``, ``not probed``, ``pruned``, ``outscored``, or
        ``found``.
    plan, fate
        Of the search, where it came so far.
    rank, hit
        Where it was found or outscored.
    last
        The last video that was returned.
    probes_needed
        That would have met it.
    """

    stage: str
    plan: Plan | None = None
    fate: Fate | None = None
    rank: int = 0
    hit: Hit | None = None
    last: Hit | None = None
    probes_needed: int = 0


class SegmentHolder:
    """Holds segments of an index and searches them; an actor, or used in place.

    Parameters
    ----------
    entries
        Of the manifest: the segments to hold.
    codes_on_disk
        See `cluster.index_store.read_index`.
    device
        ``cpu``, or a GPU as torch names it.

    Raises
    ------
    ConfigError
        If codes are to stay on disk while a GPU searches, or there is no such device.
    """

    def __init__(
        self,
        store: Store,
        manifest: Mapping[str, Any],
        entries: Sequence[Mapping[str, Any]],
        codes_on_disk: bool = False,
        device: str = "cpu",
    ) -> None:
        if device != "cpu" and codes_on_disk:
            raise ConfigError(
                "search.codes_on_disk is for search.device=cpu; a GPU holds all codes. Unset one of them."
            )
        codec = read_codec(store, manifest["codec"])
        loaded = read_index(store, entries, codec, read_tombstones(store, manifest), codes_on_disk)
        self._store, self._manifest, self._clips, self._alive = store, manifest, loaded.clips, loaded.alive
        self._searcher = _searcher(loaded, codec, device)

    def search(self, queries: Sequence[Floats], options: SearchOptions) -> list[list[Hit]]:
        """Return the best ``k`` videos of each query."""
        return self._search(queries, options)[0]

    def _search(self, queries: Sequence[Floats], options: SearchOptions) -> tuple[list[list[Hit]], int]:
        """Return the best ``k`` videos of each query, and how many clips were asked for to find them."""
        plan, rescored = options.plan(self._manifest, self._clips.num_rows)
        allowed = self._allowed(options)
        # k clips may be fewer than k videos: go deeper until there are k, or no more clips.
        depth = options.k
        while True:
            num_clips = max(depth, rescored)
            found = self._searcher.search(queries, num_clips, plan, options.scorer, allowed, options.threads)
            exhausted = [len(clips) < num_clips for clips, _ in found]
            if rescored:
                found = self._rescore(queries, found, options.scorer)
            hits = [best_videos(self._clips, clips, scores)[: options.k] for clips, scores in found]
            if all(len(h) >= options.k or done for h, done in zip(hits, exhausted, strict=True)):
                return hits, num_clips
            depth *= 4

    def _allowed(self, options: SearchOptions) -> npt.NDArray[np.bool_] | None:
        allowed = options.filter.allowed(self._clips)
        if self._alive is None:
            return allowed
        return self._alive if allowed is None else allowed & self._alive

    def trace(self, query: Floats, options: SearchOptions, video_id: str) -> Trace:
        """Return at which stage of a search a video was lost. On the CPU only."""
        if not isinstance(self._searcher, Searcher):
            raise ConfigError("a search can be traced with search.device=cpu only")
        clips = np.flatnonzero(pc.equal(self._clips["video_id"], video_id).to_numpy(zero_copy_only=False))
        if not len(clips):
            return Trace("not indexed")
        clips = clips[np.diff(self._searcher.segment.token_of_clip)[clips] > 0]
        if not len(clips):
            return Trace("without tokens")
        if self._alive is not None:
            clips = clips[self._alive[clips]]
        if not len(clips):
            return Trace("tombstoned")
        allowed = self._allowed(options)
        if allowed is not None:
            clips = clips[allowed[clips]]
        if not len(clips):
            return Trace("filtered out")
        [hits], num_clips = self._search([query], options)
        rank = next((rank for rank, hit in enumerate(hits, start=1) if hit.video_id == video_id), None)
        if rank is not None:
            return Trace("found", rank=rank, hit=hits[rank - 1], last=hits[-1])
        plan, _ = options.plan(self._manifest, self._clips.num_rows)
        fate = self._searcher.trace(query, clips, num_clips, plan, options.scorer, allowed)
        if fate.stage != "scored":
            needed = self._probes_needed(query, clips, num_clips, plan, options, allowed) if not fate.place else 0
            return Trace(fate.stage, plan=plan, fate=fate, probes_needed=needed)
        everything = replace(options, k=self._clips.num_rows)
        [ranked] = self.search([query], everything)
        rank = next((rank for rank, hit in enumerate(ranked, start=1) if hit.video_id == video_id), 0)
        return Trace("outscored", plan, fate, rank=rank, hit=ranked[rank - 1] if rank else None, last=hits[-1])

    def _probes_needed(
        self,
        query: Floats,
        clips: npt.NDArray[np.int64],
        k: int,
        plan: Plan,
        options: SearchOptions,
        allowed: npt.NDArray[np.bool_] | None,
    ) -> int:
        """Return the first doubling of the probes that meets one of some clips."""
        assert isinstance(self._searcher, Searcher)
        probes = plan.probes
        while probes < self._manifest["num_centroids"]:
            probes *= 2
            more = Plan(probes, plan.candidates)
            if self._searcher.trace(query, clips, k, more, options.scorer, allowed).stage != "not probed":
                break
        return probes

    def _rescore(self, queries: Sequence[Floats], found: Sequence[Result], scorer: Scorer) -> list[Result]:
        """Return results scored again on the float16 embeddings that the index was made from; each clip is read once."""
        clips = np.unique(np.concatenate([ordinals for ordinals, _ in found]))
        if not len(clips):
            return list(found)
        rows = self._clips["row_ids"].take(pa.array(clips)).combine_chunks()
        table, version = self._manifest["table"], self._manifest["version"]
        columns = ["modality", "num_tokens", "embeddings"]
        read = self._store.take(table, version, rows.flatten().to_pylist(), columns)
        lengths = read["num_tokens"].to_numpy().astype(np.int64)
        modality = pc.index_in(read["modality"], value_set=pa.array(MODALITIES)).to_numpy().astype(np.uint8)
        run_clip = np.repeat(np.arange(len(clips)), pc.list_value_length(rows).to_numpy())
        first_run = np.searchsorted(run_clip, np.arange(len(clips) + 1))
        first_token = np.concatenate([[0], np.cumsum(lengths)])[first_run]
        tokens = embeddings_of(read["embeddings"])
        results = []
        for query, (ordinals, _) in zip(queries, found, strict=True):
            exact = np.full(len(ordinals), -np.inf, dtype=np.float32)
            for i, at in enumerate(np.searchsorted(clips, ordinals)):
                runs = slice(first_run[at], first_run[at + 1])
                of_clip = tokens[first_token[at] : first_token[at + 1]].astype(np.float32)
                first = np.zeros(runs.stop - runs.start, np.int64)
                exact[i] = score_clips([query], of_clip, lengths[runs], first, modality[runs], 1, scorer)[0, 0]
            order = np.lexsort((ordinals, -exact))
            results.append((ordinals[order], exact[order]))
        return results


def _searcher(loaded: LoadedIndex, codec: ResidualCodec, device: str) -> Searcher | GpuSearcher:
    if device == "cpu":
        return Searcher([loaded.segment], codec, loaded.fetch)
    from operators.search_gpu import GpuSearcher  # brings torch

    return GpuSearcher([loaded.segment], codec, device)


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

    An actor that dies is started again, loads its segments again, and answers the query that it was asked.

    Parameters
    ----------
    manifest
        Of the index, all of whose segments are held.
    num_actors
        How many actors hold them; no more than there are segments.
    num_cpus, num_gpus
        That each actor asks for.
    codes_on_disk, device
        See `SegmentHolder`.
    """

    def __init__(
        self,
        store: Store,
        manifest: Mapping[str, Any],
        num_actors: int,
        num_cpus: float,
        codes_on_disk: bool = False,
        device: str = "cpu",
        num_gpus: float = 0,
    ) -> None:
        holder = ray.remote(SegmentHolder).options(
            num_cpus=num_cpus, num_gpus=num_gpus, max_restarts=-1, max_task_retries=ACTOR_RETRIES
        )
        shares = spread(manifest["segments"], num_actors)
        self.actors = [holder.remote(store, manifest, share, codes_on_disk, device) for share in shares]

    def search(self, queries: Sequence[Floats], options: SearchOptions) -> list[list[Hit]]:
        """Return the best ``k`` videos of each query."""
        sent = ray.put(list(queries))
        return merge(ray.get([actor.search.remote(sent, options) for actor in self.actors]), len(queries), options.k)


def spread(entries: Sequence[Mapping[str, Any]], num_actors: int) -> list[list[Mapping[str, Any]]]:
    """Return segments dealt to actors, largest first, each to the one that holds the fewest tokens."""
    shares: list[list[Mapping[str, Any]]] = [[] for _ in range(min(num_actors, len(entries)))]
    loads = [0] * len(shares)
    for entry in sorted(entries, key=lambda e: (-e["num_tokens"], e["path"])):
        lightest = loads.index(min(loads))
        shares[lightest].append(entry)
        loads[lightest] += entry["num_tokens"]
    # Of equal clips the first is found first: that must not depend on sizes.
    return [sorted(share, key=lambda entry: str(entry["path"])) for share in shares]
