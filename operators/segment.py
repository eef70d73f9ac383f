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
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from operators.codec import ResidualCodec
from operators.maxsim import run_maxima, score_clips, sum_maxsim

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


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
        """Return a segment of packed token embeddings, (T, dim)."""
        ids, codes = codec.encode(tokens)
        clip_of_token = np.repeat(run_clip, run_lengths)
        pairs = np.unique(ids.astype(np.int64) * num_clips + clip_of_token)  # (centroid, clip), each once, sorted
        offsets = np.searchsorted(pairs // max(1, num_clips), np.arange(len(codec.centroids) + 1)).astype(np.int64)
        clips = (pairs % max(1, num_clips)).astype(np.uint32)
        return cls(run_lengths, run_clip, run_modality, ids, codes, offsets, clips, num_clips)

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return everything by name, ``num_clips`` as a scalar array."""
        return {name: np.asarray(value) for name, value in vars(self).items() if name in self.__dataclass_fields__}

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
    return [_search_one(segment, codec, query, k, scorer, probes, max(candidates, 2 * k)) for query in queries]


def _search_one(
    segment: Segment, codec: ResidualCodec, query: Floats, k: int, scorer: str, probes: int, candidates: int
) -> tuple[Ints, Floats]:
    similarities = query @ codec.centroids.T
    clips = _probe(segment, similarities, probes)
    if len(clips) > candidates:
        # Plain MaxSim bounds the modality-wise score from above, so it ranks candidates for every scorer.
        approximate = _score_by_centroids(segment, similarities, clips)
        clips = np.sort(clips[np.argsort(-approximate, kind="stable")[:candidates]])
    scores = _score_exactly(segment, codec, query, clips, scorer)
    found = np.isfinite(scores)
    clips, scores = clips[found], scores[found]
    order = np.lexsort((clips, -scores))[:k]
    return clips[order], scores[order]


def _probe(segment: Segment, similarities: Floats, probes: int) -> Ints:
    """Return the clips that hold one of the ``probes`` best centroids of a query token, rising."""
    num_centroids = similarities.shape[1]
    if probes < num_centroids:
        nearest = np.unique(np.argpartition(-similarities, probes - 1, axis=1)[:, :probes])
    else:
        nearest = np.arange(num_centroids)
    lists = [segment.ivf_clips[segment.ivf_offsets[c] : segment.ivf_offsets[c + 1]] for c in nearest]
    return np.unique(np.concatenate(lists)).astype(np.int64)


def _score_by_centroids(segment: Segment, similarities: Floats, clips: Ints) -> Floats:
    runs, tokens = _members(segment, clips)
    of_tokens = similarities[:, segment.centroid_ids[tokens]]
    lengths = segment.run_lengths[runs]
    filled = lengths > 0
    starts = (np.cumsum(lengths) - lengths)[filled]
    maxima = np.full((len(similarities), len(runs)), -np.inf, dtype=np.float32)
    maxima[:, filled] = np.maximum.reduceat(of_tokens, starts, axis=1)
    return sum_maxsim(maxima, np.searchsorted(clips, segment.run_clip[runs]), len(clips))


def _score_exactly(segment: Segment, codec: ResidualCodec, query: Floats, clips: Ints, scorer: str) -> Floats:
    runs, tokens = _members(segment, clips)
    decoded = codec.decode(segment.centroid_ids[tokens], segment.codes[tokens])
    run_clip = np.searchsorted(clips, segment.run_clip[runs])
    return score_clips([query], decoded, segment.run_lengths[runs], run_clip, len(clips), scorer)[0]


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
    """What each query token matched: token of the clip, and similarity; (Tq,) each."""

    token: Ints
    score: Floats


def explain(
    query: Floats, tokens: Floats, run_lengths: Ints, run_modality: npt.NDArray[np.uint8], scorer: str
) -> tuple[Winners, dict[int, float]]:
    """Return the winning token of each query token in one clip, and each modality's share of the score.

    Under ``modality_max`` only tokens of the winning modality can win.

    Parameters
    ----------
    query : (Tq, dim), float32
    tokens : (T, dim), float32
        All tokens of the clip, T > 0.
    run_lengths, run_modality : (R,)
        Its modality runs.
    """
    modality = np.repeat(run_modality, run_lengths)
    similarities = query @ tokens.T
    if scorer == "modality_max":
        by_run = run_maxima(query, tokens, run_lengths).sum(axis=0)
        similarities = np.where(modality == run_modality[np.argmax(by_run)], similarities, -np.inf)
    winners = Winners(np.argmax(similarities, axis=1), similarities.max(axis=1))
    total = float(winners.score.sum())
    shares = {int(m): float(winners.score[modality[winners.token] == m].sum()) / total for m in np.unique(run_modality)}
    return winners, shares
