"""Search over the compressed clips of an index, on the CPU.

For each query token the ``probes`` nearest centroids are looked up, and the clips on their inverted lists are scored with
every token replaced by its centroid (PLAID's centroid interaction), on a table of bytes. The best ``candidates`` are then
scored on their residual codes, which are decoded a few tokens at a time and never written to memory. Where that would
cost more than scoring every code, every code is scored, for many queries at once.

All products are of bytes. A query token is rounded to 8 bits with a step of its own, centroids and levels are of 8 bits
already, so the similarity of a decoded token of norm n is wrong by at most ``n * sqrt(dim) / 2 * step``, with
``step = max |q| / 127``, and the rounding of the int16 table, 3e-5 of the largest possible.

References
----------
PLAID, arXiv:2205.09707, sec. 4.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from operators import kernels
from operators.codec import ResidualCodec
from operators.errors import ShapeError
from operators.kernels import CHUNK, aligned
from operators.kmeans import in_threads
from operators.maxsim import Scorer, blocks
from operators.segment import Segment

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Result = tuple[Ints, Floats]

BATCH_LANES = 8 * CHUNK
"""Query tokens that share one decoding of the codes."""

ROW_NS, COARSE_NS, FINE_NS = 17.8, 1.0, 20.0
"""Measured for 32 query tokens of 128 dimensions on one core: a centroid, a token by its centroid, a token by its code."""

SCAN_BYTES = 64 << 20
"""Of scores, and of codes read from disk, that a thread holds while it scores every code."""

TAIL = 64
"""Bytes that kernels may read past the last code."""

Fetch = Callable[[Ints], npt.NDArray[np.uint8]]


@dataclass(frozen=True)
class Plan:
    """How much of an index a query looks at.

    Attributes
    ----------
    probes
        Centroids looked up for each query token; 0 scores every code.
    candidates
        Clips whose codes are scored; never fewer than twice the results asked for.
    """

    probes: int
    candidates: int


EXHAUSTIVE = Plan(0, 0)


class Fate(NamedTuple):
    """How far the best of some clips came in a search: the last stage that it reached, and its place there, from 1.

    Attributes
    ----------
    stage
        ``not probed``: no probe met it. ``pruned``: met, but not among the candidates by its centroids. ``scored``: on its
        codes.
    place, among
        By the scores of that stage, of so many clips; 0 of those met where it was not.
    limit
        Candidates that were kept.
    """

    stage: Literal["not probed", "pruned", "scored"]
    place: int
    among: int
    limit: int


class _Lanes:
    """Query tokens packed for the kernels: those of several queries stand densely after one another."""

    def __init__(self, queries: Sequence[Floats], codec: ResidualCodec, largest_norm: float) -> None:
        tokens = np.ascontiguousarray(np.concatenate(queries), dtype=np.float32)
        if tokens.shape[1] != codec.dim:
            raise ShapeError(f"query tokens of width {tokens.shape[1]}; the index has {codec.dim}")
        if not np.isfinite(tokens).all():
            raise ShapeError("a query token is not finite; it has no similarities")
        dim = codec.padded_dim
        self.used = len(tokens)
        self.chunks = -(-self.used // CHUNK)
        self.bytes = aligned(self.chunks * CHUNK * dim, np.int8)
        steps = np.zeros(self.chunks * CHUNK, dtype=np.float32)
        sums = np.zeros(self.chunks * CHUNK, dtype=np.int32)
        kernels.pack_lanes(tokens, 0, self.used, dim, self.bytes, steps, sums)
        # Similarities are kept in units in which an int16 holds the largest possible.
        self.units = np.float32(32767 / (127 * 1.1 * np.sqrt(codec.dim) * largest_norm))
        self.factors = steps / self.units
        self.centroid_start = codec.centroids.start_of(sums)
        self.residual_start = np.rint(sums * (codec.level_low / codec.level_step)).astype(np.int32)
        self.query = np.zeros(self.chunks * CHUNK, dtype=np.int32)
        self.query[: self.used] = np.repeat(np.arange(len(queries)), [len(query) for query in queries])


class _Scratch:
    """What one thread writes to while it searches; kept between queries."""

    def __init__(self, num_clips: int) -> None:
        self.marks = np.zeros(num_clips, dtype=np.uint32)
        self.found = np.empty(num_clips, dtype=np.int64)
        self.epoch = 0
        self._arrays: dict[str, npt.NDArray[Any]] = {}

    def array(self, name: str, shape: tuple[int, ...], dtype: type) -> npt.NDArray[Any]:
        """Return an array of what was written before, made anew only when it must grow."""
        size = int(np.prod(shape))
        if name not in self._arrays or len(self._arrays[name]) < size:
            self._arrays[name] = aligned(size, dtype)
        return self._arrays[name][:size].reshape(shape)


class Searcher:
    """Holds an index, or a part of it, ready to be searched. Its methods may be called from several threads.

    Parameters
    ----------
    segments
        They become one: results do not depend on how clips were cut into segments.
    fetch
        Where segments have no residual codes: returns those of rising clips after one another, (T, code_bytes).
    """

    def __init__(self, segments: Sequence[Segment], codec: ResidualCodec, fetch: Fetch | None = None) -> None:
        self.segment, self.codec = Segment.join(segments), codec
        self._fetch = fetch
        self._rows = codec.centroids.rows(codec.padded_dim)
        self._num_rows = len(self._rows) // codec.padded_dim
        self._levels = np.tile(np.resize(codec.level_bytes, 16) if codec.nbits < 8 else np.zeros(16, np.uint8), 4)
        self._offsets, self._lists = self._invert()
        floats = codec.centroids.floats
        self._largest_norm = float(np.sqrt(np.einsum("cd,cd->c", floats, floats).max()))
        self._local = threading.local()

    def _invert(self) -> tuple[Ints, npt.NDArray[np.uint32]]:
        segment = self.segment
        offsets = np.zeros(self._num_rows + 1, dtype=np.int64)
        ids, runs, tokens = segment.centroid_ids, segment.run_of_clip, segment.token_of_run
        kernels.invert(ids, self._num_rows, runs, tokens, offsets, np.empty(0, np.uint32))
        lists = np.empty(offsets[-1], dtype=np.uint32)
        if len(lists):
            kernels.invert(ids, self._num_rows, runs, tokens, offsets, lists)
        return offsets, lists

    def _tail(self, codes: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.uint8], int]:
        """Return the last codes with room after them, and the first of them: kernels read up to `TAIL` bytes more."""
        code_bytes = self.codec.code_bytes
        first = max(0, len(codes) - -(-TAIL // code_bytes))
        tail = np.zeros((len(codes) - first) * code_bytes + TAIL, dtype=np.uint8)
        tail[: -TAIL or None] = codes[first:].ravel()
        return tail, first

    @property
    def _scratch(self) -> _Scratch:
        if not hasattr(self._local, "scratch"):
            self._local.scratch = _Scratch(self.segment.num_clips)
        scratch: _Scratch = self._local.scratch
        return scratch

    def search(
        self,
        queries: Sequence[Floats],
        k: int,
        plan: Plan,
        scorer: Scorer,
        allowed: npt.NDArray[np.bool_] | None = None,
        num_threads: int = 1,
    ) -> list[Result]:
        """Return for each query the ordinals and scores of its best clips, at most ``k``, best first.

        Parameters
        ----------
        queries
            (Tq, dim) each.
        allowed : (D,)
            Clips that may be found; all if None.
        """
        if plan.probes == 0 or self._scans_cheaper(plan, queries, allowed):
            return self._scan(queries, k, scorer, allowed, num_threads)
        results: list[Result] = [(np.empty(0, np.int64), np.empty(0, np.float32))] * len(queries)

        def work(first: int, last: int) -> None:
            for i in range(first, last):
                if len(queries[i]):
                    results[i] = self._probe_and_score(queries[i], k, plan, scorer, allowed)

        in_threads(len(queries), 1, num_threads, work)
        return results

    def _scans_cheaper(self, plan: Plan, queries: Sequence[Floats], allowed: npt.NDArray[np.bool_] | None) -> bool:
        """Whether scoring every code costs less than probing, by the figures measured."""
        segment = self.segment
        num_clips = segment.num_clips if allowed is None else int(np.count_nonzero(allowed))
        tokens = len(segment.centroid_ids) * num_clips / max(1, segment.num_clips)
        mean = tokens / max(1, num_clips)
        share = min(1.0, CHUNK * plan.probes / max(1, self.codec.num_centroids))
        met = min(num_clips, share * len(self._lists) * num_clips / max(1, segment.num_clips))
        density = np.mean([len(query) / (CHUNK * -(-len(query) // CHUNK)) for query in queries if len(query)] or [1])
        probing = met * mean * COARSE_NS + min(met, plan.candidates) * mean * FINE_NS
        return bool(tokens * FINE_NS * (density if len(queries) > 1 else 1) <= probing)

    def _probe_and_score(
        self, query: Floats, k: int, plan: Plan, scorer: Scorer, allowed: npt.NDArray[np.bool_] | None
    ) -> Result:
        lanes = _Lanes([query], self.codec, self._largest_norm)
        table, cells = self._table(lanes, plan.probes)
        found = self._gather(cells, allowed)
        limit = max(plan.candidates, 2 * k)
        if len(found) > limit:
            approximate = self._score_by_centroids(lanes, table, found, scorer)
            found = found[np.sort(_largest(approximate, limit))]
        return _top(found, self._score_by_codes(lanes, table, found, scorer, 1)[:, 0], k)

    def trace(
        self,
        query: Floats,
        clips: Ints,
        k: int,
        plan: Plan,
        scorer: Scorer,
        allowed: npt.NDArray[np.bool_] | None = None,
    ) -> Fate:
        """Return how far the best of some clips comes in the search that `search` would make; otherwise as there."""
        if plan.probes == 0 or self._scans_cheaper(plan, [query], allowed):
            [(ranked, _)] = self._scan([query], self.segment.num_clips, scorer, allowed, 1)
            return Fate("scored", _place(ranked, clips), len(ranked), len(ranked))
        lanes = _Lanes([query], self.codec, self._largest_norm)
        table, cells = self._table(lanes, plan.probes)
        found = self._gather(cells, allowed)
        limit = max(plan.candidates, 2 * k)
        if not np.isin(clips, found).any():
            return Fate("not probed", 0, len(found), limit)
        if len(found) > limit:
            approximate = self._score_by_centroids(lanes, table, found, scorer)
            kept = found[np.sort(_largest(approximate, limit))]
            if not np.isin(clips, kept).any():
                ranked = found[np.argsort(-approximate, kind="stable")]
                return Fate("pruned", _place(ranked, clips), len(found), limit)
            found = kept
        ranked, _ = _top(found, self._score_by_codes(lanes, table, found, scorer, 1)[:, 0], len(found))
        return Fate("scored", _place(ranked, clips), len(found), limit)

    def candidates(self, query: Floats, probes: int, scorer: Scorer) -> tuple[Ints, int]:
        """Return the clips that probing finds, best first by their centroids, and how many tokens they have."""
        lanes = _Lanes([query], self.codec, self._largest_norm)
        table, cells = self._table(lanes, probes)
        found = self._gather(cells, None)
        met = int((self.segment.token_of_clip[found + 1] - self.segment.token_of_clip[found]).sum())
        return found[np.argsort(-self._score_by_centroids(lanes, table, found, scorer), kind="stable")], met

    def _table(self, lanes: _Lanes, probes: int) -> tuple[npt.NDArray[np.int16], Ints]:
        """Return similarities of centroids and lanes, (chunks, C, 32), and the best centroids of each lane; -1 for none."""
        scratch, dim = self._scratch, self.codec.padded_dim
        probes = min(probes, self._num_rows)
        table = scratch.array("table", (lanes.chunks, self._num_rows, CHUNK), np.int16)
        cells = scratch.array("cells", (lanes.chunks, CHUNK, probes), np.int64)
        values = scratch.array("values", (CHUNK, probes), np.int32)
        floors = scratch.array("floors", (CHUNK,), np.int32)
        for chunk in range(lanes.chunks):
            kernels.centroid_table(
                self._rows,
                self._num_rows,
                dim,
                lanes.bytes[chunk * CHUNK * dim :],
                lanes.centroid_start[chunk * CHUNK : (chunk + 1) * CHUNK],
                min(CHUNK, lanes.used - chunk * CHUNK),
                np.float32(self.codec.centroids.step * lanes.units),
                table[chunk],
                probes,
                cells[chunk],
                values,
                floors,
            )
        return table, cells.reshape(-1, probes)

    def _gather(self, cells: Ints, allowed: npt.NDArray[np.bool_] | None) -> Ints:
        """Return the allowed clips that hold one of the centroids, rising."""
        scratch = self._scratch
        scratch.epoch += 1
        mask = np.empty(0, np.bool_) if allowed is None else allowed
        count = kernels.gather(cells, self._offsets, self._lists, mask, scratch.marks, scratch.epoch, scratch.found)
        return np.sort(scratch.found[:count])

    def _score_by_centroids(self, lanes: _Lanes, table: npt.NDArray[np.int16], clips: Ints, scorer: Scorer) -> Floats:
        """Return the scores of clips with each token replaced by its centroid, on a table of bytes."""
        scratch, segment = self._scratch, self.segment
        ranges = [
            kernels.table_range(table[c], self._num_rows, lanes.factors[c * CHUNK :]) for c in range(lanes.chunks)
        ]
        low, high = min(r[0] for r in ranges), max(r[1] for r in ranges)
        scale = np.float32(255 / max(high - low, 1e-6))
        coarse = scratch.array("coarse", (self._num_rows, CHUNK), np.uint8)
        groups = len(scorer.weights)
        sums = scratch.array("sums", (len(clips), groups), np.int32)
        sums[:] = -1
        for chunk in range(lanes.chunks):
            factors = lanes.factors[chunk * CHUNK : (chunk + 1) * CHUNK]
            kernels.coarse_table(table[chunk], self._num_rows, factors, np.float32(low), scale, coarse)
            kernels.score_centroids(
                clips,
                len(clips),
                segment.run_of_clip,
                segment.token_of_run,
                segment.run_modality,
                np.array(scorer.group_of, np.int32),
                groups,
                segment.centroid_ids,
                coarse,
                sums,
            )
        similarities = np.where(sums >= 0, sums / scale + np.float32(low * lanes.used), -np.inf).astype(np.float32)
        return scorer.score(similarities)

    def _score_by_codes(
        self, lanes: _Lanes, table: npt.NDArray[np.int16], clips: Ints, scorer: Scorer, num_queries: int
    ) -> Floats:
        """Return the scores of rising clips on their codes, (len(clips), num_queries)."""
        scratch, segment, codec = self._scratch, self.segment, self.codec
        groups = len(scorer.weights)
        if self._fetch is None:
            codes, code_of_clip = segment.residuals, segment.token_of_clip[clips]
        else:
            codes = self._fetch(clips)
            lengths = segment.token_of_clip[clips + 1] - segment.token_of_clip[clips]
            code_of_clip = np.cumsum(lengths) - lengths
        tail, tail_from = self._tail(codes)
        scores = scratch.array("scores", (len(clips), num_queries, groups), np.float32)
        kernels.score_residuals(
            clips,
            len(clips),
            segment.run_of_clip,
            segment.token_of_run,
            segment.run_modality,
            np.array(scorer.group_of, np.int32),
            groups,
            segment.centroid_ids,
            segment.scales,
            codes,
            tail,
            tail_from,
            code_of_clip,
            codec.code_bytes,
            codec.nbits,
            self._levels,
            codec.scale_of_byte * np.float32(codec.level_step * lanes.units),
            codec.padded_dim,
            lanes.bytes,
            lanes.used,
            lanes.residual_start,
            table,
            lanes.factors,
            lanes.query,
            scores,
            scratch.array("decoded", (4 * (codec.padded_dim + TAIL) + TAIL,), np.uint8),
            scratch.array("best", (lanes.chunks, groups, CHUNK), np.float32),
        )
        return scorer.score(np.where(scores == kernels.NEVER, np.float32(-np.inf), scores))

    def _scan(
        self,
        queries: Sequence[Floats],
        k: int,
        scorer: Scorer,
        allowed: npt.NDArray[np.bool_] | None,
        num_threads: int,
    ) -> list[Result]:
        """Score every allowed clip for all queries, in batches that share a decoding."""
        clips = np.arange(self.segment.num_clips) if allowed is None else np.flatnonzero(allowed)
        results: list[Result] = [(np.empty(0, np.int64), np.empty(0, np.float32))] * len(queries)
        batches: list[list[int]] = [[]]
        room = BATCH_LANES
        for i, query in enumerate(queries):
            if not len(query):
                continue
            if batches[-1] and len(query) > room:
                batches.append([])
                room = BATCH_LANES
            batches[-1].append(i)
            room -= len(query)

        def work(first: int, last: int) -> None:
            for batch in batches[first:last]:
                if not batch:
                    continue
                lanes = _Lanes([queries[i] for i in batch], self.codec, self._largest_norm)
                table, _ = self._table(lanes, 1)
                best: list[list[Result]] = [[] for _ in batch]
                for a, b in self._scan_blocks(clips, len(batch) * len(scorer.weights)):
                    scores = self._score_by_codes(lanes, table, clips[a:b], scorer, len(batch))
                    for column, tops in enumerate(best):
                        tops.append(_top(clips[a:b], scores[:, column], k))
                for i, tops in zip(batch, best, strict=True):
                    results[i] = _merged(tops, k)

        in_threads(len(batches), 1, num_threads, work)
        return results

    def _scan_blocks(self, clips: Ints, scores_of_clip: int) -> Iterator[tuple[int, int]]:
        """Yield ranges of clips whose scores, and codes where they must be read, stay within `SCAN_BYTES`."""
        sizes = np.full(len(clips), 4 * scores_of_clip, dtype=np.int64)
        if self._fetch is not None:
            first = self.segment.token_of_clip
            sizes += (first[clips + 1] - first[clips]) * self.codec.code_bytes
        return blocks(sizes, SCAN_BYTES)


def _place(ranked: Ints, clips: Ints) -> int:
    """Return the place, from 1, of the first of some clips; 0 if none is ranked."""
    places = np.flatnonzero(np.isin(ranked, clips))
    return int(places[0]) + 1 if len(places) else 0


def _merged(tops: Sequence[Result], k: int) -> Result:
    """Return the ``k`` best of several results, of equals the lower ordinal first."""
    if len(tops) == 1:
        return tops[0]
    ordinals = np.concatenate([np.empty(0, np.int64), *(ordinals for ordinals, _ in tops)])
    scores = np.concatenate([np.empty(0, np.float32), *(scores for _, scores in tops)])
    order = np.lexsort((ordinals, -scores))[:k]
    return ordinals[order], scores[order]


def _largest(scores: Floats, count: int) -> Ints:
    """Return the places of the ``count`` largest, fewer than there are; of equals the first."""
    floor = np.partition(scores, len(scores) - count)[len(scores) - count]
    above = np.flatnonzero(scores > floor)
    return np.concatenate([above, np.flatnonzero(scores == floor)[: count - len(above)]])


def _top(clips: Ints, scores: Floats, k: int) -> Result:
    """Return the ``k`` best of rising clips and their scores, best first, the lower ordinal first among equals."""
    if len(clips) > k:
        chosen = np.sort(_largest(scores, k))
        clips, scores = clips[chosen], scores[chosen]
    order = np.argsort(-scores, kind="stable")
    order = order[np.isfinite(scores[order])]
    return clips[order], scores[order]
