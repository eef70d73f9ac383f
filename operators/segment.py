"""A segment: an immutable, self-contained part of an index."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from operators.codec import Codes, ResidualCodec
from operators.errors import ShapeError
from operators.maxsim import Scorer, check_clips, check_lengths, run_winners

Floats = npt.NDArray[np.float32]
Tokens = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.int64]


ERROR_TOKENS = 50_000
"""Looked at to measure the error of a segment's codes."""


@dataclass(frozen=True, eq=False)
class Segment:
    """Compressed clips. Inverted lists are not kept: a searcher makes them from the centroid ids.

    Attributes
    ----------
    run_lengths, run_clip, run_modality : (R,), int64, int64, uint8
        Tokens, clip ordinal and modality of each run; clips do not fall.
    centroid_ids, scales, residuals : (T,) uint16 or uint32, (T,) uint8, (T, code_bytes) uint8
        The tokens, in run order; see `Codes`. Where codes stay on disk there are no residuals: (0, code_bytes).
    num_clips
        D.
    """

    run_lengths: Ints
    run_clip: Ints
    run_modality: npt.NDArray[np.uint8]
    centroid_ids: npt.NDArray[Any]
    scales: npt.NDArray[np.uint8]
    residuals: npt.NDArray[np.uint8]
    num_clips: int

    @classmethod
    def build(
        cls,
        tokens: Tokens,
        run_lengths: Ints,
        run_clip: Ints,
        run_modality: npt.NDArray[np.uint8],
        num_clips: int,
        codec: ResidualCodec,
        num_threads: int = 1,
        ids: npt.NDArray[np.int32] | None = None,
    ) -> Segment:
        """Return a segment of packed token embeddings, (T, dim), float16 or float32; ``ids`` as `ResidualCodec.encode`.

        Raises
        ------
        ShapeError
            If tokens, runs and clips do not fit together, or a token is not finite or zero; the clip is named by its
            ordinal.
        """
        # The checksum covers types: those of the caller must not change it.
        run_lengths, run_clip = np.asarray(run_lengths, np.int64), np.asarray(run_clip, np.int64)
        run_modality = np.asarray(run_modality, np.uint8)
        check_lengths(tokens, run_lengths)
        check_clips(run_lengths, run_clip, num_clips)
        if run_modality.shape != run_lengths.shape:
            raise ShapeError(f"{run_modality.shape} modalities for {run_lengths.shape} run lengths; each run has one")
        if (token := first_unusable(tokens)) is not None:
            run = int(np.searchsorted(np.cumsum(run_lengths), token, side="right"))
            raise ShapeError(f"token {token}, of clip {run_clip[run]}, is zero or not finite; it has no direction")
        codes = codec.encode(tokens, num_threads, ids)
        narrow = codes.centroid_ids.astype(id_type(codec.num_centroids))
        return cls(run_lengths, run_clip, run_modality, narrow, codes.scales, codes.residuals, num_clips)

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return everything by name, ``num_clips`` as a scalar array."""
        return {field.name: np.asarray(getattr(self, field.name)) for field in fields(self)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> Segment:
        """Return the segment that `to_arrays` took apart."""
        return cls(
            **{name: value for name, value in arrays.items() if name != "num_clips"}, num_clips=int(arrays["num_clips"])
        )

    @classmethod
    def join(cls, segments: Sequence[Segment], residuals: npt.NDArray[np.uint8] | None = None) -> Segment:
        """Return one segment of the clips of several, after one another.

        Parameters
        ----------
        residuals
            Theirs, where they already lie after one another in memory.
        """
        if len(segments) == 1:
            return segments[0]
        before = np.concatenate([[0], np.cumsum([segment.num_clips for segment in segments])])
        joined = {
            name: np.concatenate([getattr(segment, name) for segment in segments])
            for name in ("run_lengths", "run_modality", "centroid_ids", "scales")
        }
        if residuals is None:
            residuals = np.concatenate([segment.residuals for segment in segments])
        clips = [segment.run_clip + first for segment, first in zip(segments, before[:-1], strict=True)]
        return cls(run_clip=np.concatenate(clips), residuals=residuals, num_clips=int(before[-1]), **joined)

    def keep(self, clips: npt.NDArray[np.bool_]) -> Segment:
        """Return the segment of some of its clips, (D,)."""
        runs = clips[self.run_clip]
        tokens = np.repeat(runs, self.run_lengths)
        return Segment(
            run_lengths=self.run_lengths[runs],
            run_clip=(np.cumsum(clips) - 1)[self.run_clip[runs]],
            run_modality=self.run_modality[runs],
            centroid_ids=self.centroid_ids[tokens],
            scales=self.scales[tokens],
            residuals=self.residuals[tokens],
            num_clips=int(np.count_nonzero(clips)),
        )

    def error(self, tokens: Tokens, codec: ResidualCodec) -> float:
        """Return the mean squared distance of the token embeddings it was built from to what their codes decode to.

        Of at most `ERROR_TOKENS` tokens, evenly spread; 0 where there are none. It rises when new material is unlike
        what the codec was trained on.
        """
        step = -(-len(tokens) // ERROR_TOKENS) or 1
        every = slice(None, None, step)
        ids = self.centroid_ids[every].astype(np.int32)
        decoded = codec.decode(Codes(ids, self.scales[every], self.residuals[every]))
        difference = tokens[every].astype(np.float32) - decoded
        return float(np.einsum("td,td->t", difference, difference).mean()) if len(difference) else 0.0

    @cached_property
    def run_of_clip(self) -> Ints:
        """First run of each clip, and the number of runs at the end, (D + 1,)."""
        return np.searchsorted(self.run_clip, np.arange(self.num_clips + 1)).astype(np.int64)

    @cached_property
    def token_of_run(self) -> Ints:
        """First token of each run, and the number of tokens at the end, (R + 1,)."""
        return np.concatenate([[0], np.cumsum(self.run_lengths)]).astype(np.int64)

    @cached_property
    def token_of_clip(self) -> Ints:
        """First token of each clip, and the number of tokens at the end, (D + 1,)."""
        return self.token_of_run[self.run_of_clip]

    def codes_of(self, first: int, last: int) -> Codes:
        """Return the codes of tokens [first, last)."""
        ids = self.centroid_ids[first:last].astype(np.int32)
        return Codes(ids, self.scales[first:last], self.residuals[first:last])


def checksum(arrays: Mapping[str, npt.NDArray[Any]]) -> str:
    """Return the SHA-256 of names, types, shapes and bytes of arrays."""
    digest = hashlib.sha256()
    for name, array in arrays.items():
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).data.cast("B") if array.size else b"")
    return digest.hexdigest()


def id_type(num_centroids: int) -> type[np.uint16] | type[np.uint32]:
    """Return what centroid ids are kept as in memory."""
    return np.uint16 if num_centroids <= 1 << 16 else np.uint32


def first_unusable(tokens: Tokens) -> int | None:
    """Return the first token, of (T, dim), that is zero or not finite, if any."""
    for first in range(0, len(tokens), 65_536):
        block = tokens[first : first + 65_536].astype(np.float32)
        squares = np.einsum("td,td->t", block, block)
        wrong = np.flatnonzero(~((squares > 0) & np.isfinite(squares)))
        if len(wrong):
            return first + int(wrong[0])
    return None


class Winners(NamedTuple):
    """What each query token matched: token of the clip, its modality, and the similarity; (Tq,) each."""

    token: Ints
    modality: npt.NDArray[np.uint8]
    score: Floats


def explain(
    query: Floats, tokens: Tokens, run_lengths: Ints, run_modality: npt.NDArray[np.uint8], scorer: Scorer
) -> tuple[Winners, dict[int, float]]:
    """Return the winning token of each query token in one clip, and each modality's share of the score.

    Each query token has one winner: under ``max`` in the winning group, under ``sum`` in the group where its weighted
    similarity is largest. Shares are of the winners' similarities and add up to 1; where similarities are
    negative, one may be below 0 and another above 1, and where they add up to 0 all are 0.

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
        If the clip has no tokens that count, or tokens and runs do not fit.
    """
    groups = np.asarray(scorer.group_of)[run_modality]
    if not np.any((groups >= 0) & (run_lengths > 0)):
        raise ShapeError("a clip without tokens has no winners to explain")
    token, maxima = run_winners(query, tokens, run_lengths)
    maxima[:, groups < 0] = -np.inf
    weights = np.where(groups >= 0, np.asarray(scorer.weights)[groups], 0)
    if scorer.combine == "max":
        sums = [maxima[:, groups == group].max(axis=1, initial=-np.inf).sum() for group in range(len(scorer.weights))]
        maxima[:, groups != int(np.argmax(sums))] = -np.inf
    present = np.isfinite(maxima)
    best = np.argmax(np.where(present, np.where(present, maxima, 0) * weights, -np.inf), axis=1)
    rows = np.arange(len(query))
    winners = Winners(token[rows, best], run_modality[best], maxima[rows, best])
    total = float(winners.score.sum())
    return winners, {
        int(modality): float(winners.score[winners.modality == modality].sum()) / total if total else 0.0
        for modality in np.unique(run_modality)
    }
