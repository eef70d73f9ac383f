"""A segment: an immutable, self-contained part of an index, held in memory, and how it is searched.

Candidates come from the inverted lists of the centroids nearest to each query token; centroid similarities alone then
give an approximate score (PLAID's centroid interaction), and the best of those are decoded and scored exactly.

References
----------
PLAID, arXiv:2205.09707, sec. 4.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from operators.codec import ResidualCodec
from operators.errors import ShapeError
from operators.maxsim import blocks, check_clips, check_lengths, run_winners, score_clips

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

BLOCK_BYTES = 16 << 20
"""Decoded token embeddings, or centroid similarities, held at a time."""


@dataclass(frozen=True, eq=False)
class Segment:
    """Compressed clips and the inverted lists over them.

    Attributes
    ----------
    run_lengths, run_clip, run_modality : (R,), int64, int64, uint8
        Tokens, clip ordinal and modality of each run; clips do not fall.
    centroid_ids, codes : (T,) int32, (T, code_bytes) uint8
        The tokens, in run order.
    ivf_offsets, ivf_clips : (C + 1,) int64, uint32
        For each centroid, the clips that hold it, rising.
    num_clips
        D.
    """

    run_lengths: Ints
    run_clip: Ints
    run_modality: npt.NDArray[np.uint8]
    centroid_ids: npt.NDArray[np.int32]
    codes: npt.NDArray[np.uint8]
    ivf_offsets: Ints
    ivf_clips: npt.NDArray[np.uint32]
    num_clips: int

    @classmethod
    def build(
        cls,
        tokens: Floats,
        run_lengths: Ints,
        run_clip: Ints,
        run_modality: npt.NDArray[np.uint8],
        num_clips: int,
        codec: ResidualCodec,
    ) -> Segment:
        """Return a segment of packed token embeddings, (T, dim).

        Raises
        ------
        ShapeError
            If tokens, runs and clips do not fit together.
        """
        # The checksum covers types: those of the caller must not change it.
        run_lengths, run_clip = np.asarray(run_lengths, np.int64), np.asarray(run_clip, np.int64)
        run_modality = np.asarray(run_modality, np.uint8)
        check_lengths(tokens, run_lengths)
        check_clips(run_lengths, run_clip, num_clips)
        if run_modality.shape != run_lengths.shape:
            raise ShapeError(f"{run_modality.shape} modalities for {run_lengths.shape} run lengths; each run has one")
        ids, codes = codec.encode(tokens)
        clip_of_token = np.repeat(run_clip, run_lengths)
        pairs = np.unique(ids.astype(np.int64) * num_clips + clip_of_token)  # (centroid, clip), each once, sorted
        offsets = np.searchsorted(pairs // max(1, num_clips), np.arange(len(codec.centroids) + 1)).astype(np.int64)
        clips = (pairs % max(1, num_clips)).astype(np.uint32)
        return cls(run_lengths, run_clip, run_modality, ids, codes, offsets, clips, num_clips)

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return everything by name, ``num_clips`` as a scalar array."""
        return {field.name: np.asarray(getattr(self, field.name)) for field in fields(self)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> Segment:
        """Return the segment that `to_arrays` took apart."""
        return cls(
            **{name: value for name, value in arrays.items() if name != "num_clips"}, num_clips=int(arrays["num_clips"])
        )

    def checksum(self) -> str:
        """Return the SHA-256 of names, types, shapes and bytes of everything."""
        digest = hashlib.sha256()
        for name, array in self.to_arrays().items():
            digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    @cached_property
    def run_of_clip(self) -> Ints:
        """First run of each clip, and the number of runs at the end, (D + 1,)."""
        return np.searchsorted(self.run_clip, np.arange(self.num_clips + 1)).astype(np.int64)

    @cached_property
    def num_tokens(self) -> Ints:
        """Tokens of each clip, (D,)."""
        return np.diff(self.token_of_run[self.run_of_clip])

    @cached_property
    def token_of_run(self) -> Ints:
        """First token of each run, and the number of tokens at the end, (R + 1,)."""
        return np.concatenate([[0], np.cumsum(self.run_lengths)]).astype(np.int64)


def search(
    segment: Segment,
    codec: ResidualCodec,
    queries: Sequence[Floats],
    k: int,
    scorer: str,
    probes: int,
    candidates: int,
) -> list[tuple[Ints, Floats]]:
    """Return for each query the ordinals and scores of its best clips, at most ``k``, best first.

    Parameters
    ----------
    queries
        (Tq, dim) each.
    scorer
        A name in `maxsim.SCORERS`.
    probes
        Centroids looked up for each query token.
    candidates
        Clips whose residuals are decoded; never fewer than ``2 * k``. With every centroid probed and every clip a
        candidate the result is exact scoring of the decoded tokens.
    """
    candidates = max(candidates, 2 * k)
    return [_search_one(segment, codec, query, k, scorer, probes, candidates) for query in queries]


def exhaustive(
    segment: Segment, codec: ResidualCodec, queries: Sequence[Floats], k: int, scorer: str
) -> list[tuple[Ints, Floats]]:
    """Return what `search` does with everything probed, decoding each token once for all queries."""
    clips = np.arange(segment.num_clips)
    return [_top(clips, scores, k) for scores in _score_exactly(segment, codec, queries, clips, scorer)]


def _search_one(
    segment: Segment, codec: ResidualCodec, query: Floats, k: int, scorer: str, probes: int, candidates: int
) -> tuple[Ints, Floats]:
    similarities = query @ codec.centroids.T
    clips = _probe(segment, similarities, probes)
    if len(clips) > candidates:
        # Plain MaxSim bounds the modality-wise score from above, so it ranks candidates for every scorer.
        approximate = _score_by_centroids(segment, similarities, clips)
        clips = np.sort(clips[np.argsort(-approximate, kind="stable")[:candidates]])
    return _top(clips, _score_exactly(segment, codec, [query], clips, scorer)[0], k)


def _top(clips: Ints, scores: Floats, k: int) -> tuple[Ints, Floats]:
    """Return the ``k`` best of rising clips and their scores, best first, the lower ordinal first among equals."""
    order = np.argsort(-scores, kind="stable")[:k]
    order = order[np.isfinite(scores[order])]
    return clips[order], scores[order]


def _probe(segment: Segment, similarities: Floats, probes: int) -> Ints:
    """Return the clips that hold one of the ``probes`` best centroids of a query token, rising."""
    if probes < similarities.shape[1]:
        nearest = np.unique(np.argpartition(-similarities, probes - 1, axis=1)[:, :probes])
    else:
        nearest = np.arange(similarities.shape[1])
    met = np.zeros(segment.num_clips, dtype=np.bool_)
    for centroid in nearest:
        met[segment.ivf_clips[segment.ivf_offsets[centroid] : segment.ivf_offsets[centroid + 1]]] = True
    return np.flatnonzero(met)


def _score_by_centroids(segment: Segment, similarities: Floats, clips: Ints) -> Floats:
    """Return MaxSim with each token replaced by its centroid, for clips that have tokens."""
    by_centroid = np.ascontiguousarray(similarities.T)  # rows are gathered 5 times faster than columns
    scores = np.empty(len(clips), dtype=np.float32)
    sizes = segment.num_tokens[clips]
    for first, last in blocks(sizes, BLOCK_BYTES // by_centroid[0].nbytes):
        _, tokens = _members(segment, clips[first:last])
        starts = np.cumsum(sizes[first:last]) - sizes[first:last]
        best = np.maximum.reduceat(by_centroid[segment.centroid_ids[tokens]], starts, axis=0)
        scores[first:last] = best.sum(axis=1)
    return scores


def _score_exactly(
    segment: Segment, codec: ResidualCodec, queries: Sequence[Floats], clips: Ints, scorer: str
) -> Floats:
    """Return the scores of rising clips on their decoded tokens, (Q, len(clips))."""
    scores = np.empty((len(queries), len(clips)), dtype=np.float32)
    for first, last in blocks(segment.num_tokens[clips], BLOCK_BYTES // (4 * codec.dim)):
        of_block = clips[first:last]
        runs, tokens = _members(segment, of_block)
        decoded = codec.decode(segment.centroid_ids[tokens], segment.codes[tokens])
        run_clip = np.searchsorted(of_block, segment.run_clip[runs])
        scores[:, first:last] = score_clips(
            queries, decoded, segment.run_lengths[runs], run_clip, len(of_block), scorer
        )
    return scores


def _members(segment: Segment, clips: Ints) -> tuple[Ints, Ints]:
    """Return the runs of clips, and the tokens of those runs, in order."""
    runs = _ranges(segment.run_of_clip[clips], segment.run_of_clip[clips + 1])
    return runs, _ranges(segment.token_of_run[runs], segment.token_of_run[runs + 1])


def _ranges(starts: Ints, stops: Ints) -> Ints:
    """Return the integers of several half-open ranges after one another."""
    lengths = stops - starts
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(lengths.sum())


class Winners(NamedTuple):
    """What each query token matched: token of the clip, its modality, and the similarity; (Tq,) each."""

    token: Ints
    modality: npt.NDArray[np.uint8]
    score: Floats


def explain(
    query: Floats, tokens: Floats, run_lengths: Ints, run_modality: npt.NDArray[np.uint8], scorer: str
) -> tuple[Winners, dict[int, float]]:
    """Return the winning token of each query token in one clip, and each modality's share of the score.

    Under ``modality_max`` only tokens of the winning modality can win. Shares add up to 1; where similarities are
    negative, one may be below 0 and another above 1, and where the score is 0 all are 0.

    Parameters
    ----------
    query : (Tq, dim), float32
    tokens : (T, dim), float32
        All tokens of the clip, T > 0.
    run_lengths, run_modality : (R,)
        Its modality runs.

    Raises
    ------
    ShapeError
        If the clip has no tokens, or tokens and runs do not fit.
    """
    if len(tokens) == 0:
        raise ShapeError("a clip without tokens has no winners to explain")
    token, maxima = run_winners(query, tokens, run_lengths)
    if scorer == "modality_max":
        run = np.argmax(maxima.sum(axis=0))
        maxima[:, np.arange(len(run_lengths)) != run] = -np.inf
    best = np.argmax(maxima, axis=1)
    rows = np.arange(len(query))
    winners = Winners(token[rows, best], run_modality[best], maxima[rows, best])
    total = float(winners.score.sum())
    return winners, {
        int(modality): float(winners.score[winners.modality == modality].sum()) / total if total else 0.0
        for modality in np.unique(run_modality)
    }
