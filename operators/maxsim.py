"""MaxSim over packed token embeddings, never padded: padding's zeros would outscore a negative best similarity.

A clip's tokens stand together, one run a modality. `run_maxima` gives, for each query token and each run, the best
similarity in that run; a `Scorer` turns those into one score a clip. An empty run scores -inf, and so does a clip
without tokens. This is the exact path, and what the kernels of the index are tested against. No more similarities are
held than `BLOCK_BYTES`, whatever the corpus.

References
----------
ColBERT, arXiv:2004.12832, sec. 3.3 (MaxSim); CLaMR, arXiv:2506.06144 (modality-wise late interaction, LI_mw, which it
trains with; it ranks with MaxSim over all modalities, LI).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from operators.errors import ConfigError, ShapeError

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

BLOCK_BYTES = 16 << 20
"""Of similarities, and of run maxima; two blocks of each live at a time."""


def run_maxima(queries: Floats, tokens: Floats, run_lengths: Ints) -> Floats:
    """Return the best similarity of each query token in each run, (Tq, R), float32; -inf for empty runs.

    Parameters
    ----------
    queries : (Tq, dim), float32
        Token embeddings of one query, or of several after one another.
    tokens : (T, dim), float32
        Token embeddings of all runs after one another.
    run_lengths : (R,), int64
        Tokens of each run; they add up to T. A run may be empty.

    Raises
    ------
    ShapeError
        If the widths differ or the lengths do not add up.
    """
    _check_tokens(queries, tokens, run_lengths)
    maxima = np.full((len(queries), len(run_lengths)), -np.inf, dtype=np.float32)
    # Empty runs are left out: reduceat would give them the first token of the next run.
    filled = np.flatnonzero(run_lengths)
    starts = (np.cumsum(run_lengths) - run_lengths)[filled]
    num_tokens = max(1, BLOCK_BYTES // (4 * max(1, len(queries))))
    for first in range(0, len(tokens), num_tokens):
        last = min(first + num_tokens, len(tokens))
        similarities = queries @ tokens[first:last].T
        # A run may reach over several blocks.
        met = slice(np.searchsorted(starts, first, side="right") - 1, np.searchsorted(starts, last))
        best = np.maximum.reduceat(similarities, np.maximum(starts[met] - first, 0), axis=1)
        maxima[:, filled[met]] = np.maximum(maxima[:, filled[met]], best)
    return maxima


def run_winners(query: Floats, tokens: Floats, run_lengths: Ints) -> tuple[Ints, Floats]:
    """Return the winning token of each query token in each run, and its similarity, (Tq, R) each.

    Meant for the few runs of a clip to be explained: all similarities are held at once.

    Returns
    -------
    winners : (Tq, R), int64
        Index into ``tokens``, the first of equals; -1 for empty runs.
    maxima : (Tq, R), float32
        As `run_maxima`.

    Raises
    ------
    ShapeError
        As `run_maxima`.
    """
    _check_tokens(query, tokens, run_lengths)
    similarities = query @ tokens.T
    winners = np.full((len(query), len(run_lengths)), -1, dtype=np.int64)
    maxima = np.full(winners.shape, -np.inf, dtype=np.float32)
    ends = np.cumsum(run_lengths)
    for run in np.flatnonzero(run_lengths):
        of_run = similarities[:, ends[run] - run_lengths[run] : ends[run]]
        winners[:, run] = ends[run] - run_lengths[run] + np.argmax(of_run, axis=1)
        maxima[:, run] = of_run.max(axis=1)
    return winners, maxima


def _check_tokens(queries: Floats, tokens: Floats, run_lengths: Ints) -> None:
    if queries.ndim != 2 or tokens.ndim != 2 or queries.shape[1] != tokens.shape[1]:
        raise ShapeError(f"queries {queries.shape} and tokens {tokens.shape} must be (Tq, dim) and (T, dim) of one dim")
    check_lengths(tokens, run_lengths)


def check_lengths(tokens: Floats, run_lengths: Ints) -> None:
    """Raise ShapeError unless no run length is negative and they add up to the tokens, (T, dim)."""
    if np.any(run_lengths < 0):
        raise ShapeError(f"a run length is {run_lengths.min()}; 0 is the least")
    if run_lengths.sum() != len(tokens):
        raise ShapeError(f"run lengths add up to {run_lengths.sum()}, but there are {len(tokens)} tokens")


def check_clips(run_lengths: Ints, run_clip: Ints, num_clips: int) -> None:
    """Raise ShapeError unless each run has a clip, below ``num_clips``, and clips do not fall."""
    if run_clip.shape != run_lengths.shape:
        raise ShapeError(f"{run_clip.shape} clips of runs for {run_lengths.shape} run lengths; each run has one clip")
    if len(run_clip) and (run_clip[0] < 0 or run_clip[-1] >= num_clips or np.any(np.diff(run_clip) < 0)):
        raise ShapeError(f"clips of runs must not fall and lie in [0, {num_clips})")


@dataclass(frozen=True)
class Scorer:
    """How the best similarities in a clip become its score.

    Each modality belongs to one group or to none. For each group, the best similarities of the query tokens in its
    modalities are added up; the groups' sums are weighted, and then added or the largest is taken. A group that a clip
    lacks adds nothing; a clip that lacks all scores -inf.

    Attributes
    ----------
    group_of
        Group of each modality; -1 leaves it out.
    weights
        Of each group.
    combine
        ``sum`` or ``max``.
    """

    group_of: tuple[int, ...]
    weights: tuple[float, ...]
    combine: Literal["sum", "max"] = "sum"

    def score(self, sums: Floats) -> Floats:
        """Return scores, (...), of sums of groups, (..., G); an absent group is -inf."""
        weighted = sums * np.asarray(self.weights, dtype=np.float32)
        if self.combine == "max":
            largest: Floats = weighted.max(axis=-1)
            return largest
        present = np.isfinite(sums)
        added = np.where(present, weighted, np.float32(0)).sum(axis=-1, dtype=np.float32)
        return np.where(present.any(axis=-1), added, np.float32(-np.inf))


def make_scorer(
    name: str,
    modalities: Sequence[str],
    weights: Mapping[str, float] | None = None,
    groups: Sequence[Sequence[str]] | None = None,
    only: Sequence[str] | None = None,
) -> Scorer:
    """Return a scorer by name.

    ``sum_maxsim``
        Sum over query tokens of the best similarity in the whole clip: LI; CLaMR at inference, ColBERT.
    ``modality_max``
        The best modality's own sum: LI_mw; CLaMR in training. Never more than ``sum_maxsim``.
    ``modality_weighted``
        The sums of all modalities, by ``weights``; 1 where none is given.
    ``group_sum``
        The sums of named groups of modalities (Video-ColBERT adds a frame's and a video's sum).

    Parameters
    ----------
    modalities
        All there are, in the order of their numbers.
    only
        Modalities that count; all if None.

    Raises
    ------
    ConfigError
        If a name is unknown, or a modality is in two groups.
    """
    chosen = list(modalities if only is None else only)
    named = [*chosen, *(weights or {}), *(m for group in groups or () for m in group)]
    if unknown := sorted(set(named) - set(modalities)):
        raise ConfigError(f"no such modality: {', '.join(unknown)}; allowed are {', '.join(modalities)}")
    if name == "sum_maxsim":
        members = [chosen]
    elif name in ("modality_max", "modality_weighted"):
        members = [[m] for m in chosen]
    elif name == "group_sum":
        members = [[m for m in group if m in chosen] for group in groups or ()]
        flat = [m for group in members for m in group]
        if not flat or len(flat) != len(set(flat)):
            raise ConfigError(f"group_sum takes groups of modalities, each in one group at most; got {groups}")
    else:
        raise ConfigError(f"no such scorer: {name}; allowed are {', '.join(SCORERS)}")
    group_of = {m: number for number, group in enumerate(members) for m in group}
    factors = [float((weights or {}).get(group[0], 1.0)) if name == "modality_weighted" else 1.0 for group in members]
    return Scorer(
        tuple(group_of.get(m, -1) for m in modalities), tuple(factors), "max" if name == "modality_max" else "sum"
    )


SCORERS = ("sum_maxsim", "modality_max", "modality_weighted", "group_sum")


def score_clips(
    queries: Sequence[Floats],
    tokens: Floats,
    run_lengths: Ints,
    run_clip: Ints,
    run_modality: npt.NDArray[np.uint8],
    num_clips: int,
    scorer: Scorer,
) -> Floats:
    """Return the score of every clip for each query, (Q, D), float32; otherwise as `score_clips_by`."""
    scores: Floats = score_clips_by(queries, tokens, run_lengths, run_clip, run_modality, num_clips, [scorer])[0]
    return scores


def score_clips_by(
    queries: Sequence[Floats],
    tokens: Floats,
    run_lengths: Ints,
    run_clip: Ints,
    run_modality: npt.NDArray[np.uint8],
    num_clips: int,
    scorers: Sequence[Scorer],
) -> Floats:
    """Return the score of every clip for each query by several scorers, (S, Q, D), float32.

    The similarities, nearly all of the work, are shared: a scorer more costs a twentieth of the first.

    Parameters
    ----------
    queries
        (Tq, dim) each; all go through one multiplication a block. One without tokens scores -inf everywhere.
    tokens, run_lengths
        Packed clips, as for `run_maxima`.
    run_clip, run_modality : (R,)
        Clip of each run, not falling, and its modality.
    num_clips
        D. A clip without tokens scores -inf.

    Raises
    ------
    ShapeError
        As `run_maxima`, or if the clips of runs do not fit the run lengths.
    """
    scores = np.full((len(scorers), len(queries), num_clips), -np.inf, dtype=np.float32)
    if not queries:
        return scores
    stacked = np.concatenate(queries)
    _check_tokens(stacked, tokens, run_lengths)
    check_clips(run_lengths, run_clip, num_clips)
    query_ends = np.cumsum([len(query) for query in queries])
    run_of_clip = np.searchsorted(run_clip, np.arange(num_clips + 1))
    token_of_run = np.concatenate([[0], np.cumsum(run_lengths)])
    for first, last in blocks(np.diff(run_of_clip), BLOCK_BYTES // (4 * max(1, len(stacked)))):
        runs = slice(run_of_clip[first], run_of_clip[last])
        of_block = tokens[token_of_run[runs.start] : token_of_run[runs.stop]]
        maxima = run_maxima(stacked, of_block, run_lengths[runs])
        for i, of_query in enumerate(np.split(maxima, query_ends[:-1])):
            if len(of_query):
                best = _modality_maxima(of_query, run_clip[runs] - first, run_modality[runs], last - first)
                scores[:, i, first:last] = [_score(best, last - first, scorer) for scorer in scorers]
    return scores


def _modality_maxima(
    maxima: Floats, run_clip: Ints, run_modality: npt.NDArray[np.uint8], num_clips: int
) -> dict[int, Floats]:
    """Return the best similarities in each modality that occurs, (D, Tq), from those in each run, (Tq, R)."""
    best: dict[int, Floats] = {}
    for modality in np.unique(run_modality).tolist():
        chosen = run_modality == modality
        best[modality] = np.full((num_clips, len(maxima)), -np.inf, dtype=np.float32)
        np.maximum.at(best[modality], run_clip[chosen], maxima.T[chosen])
    return best


def _score(best: Mapping[int, Floats], num_clips: int, scorer: Scorer) -> Floats:
    """Return the scores of clips, (D,), from the best similarities in each modality, (D, Tq)."""
    sums = np.full((num_clips, len(scorer.weights)), -np.inf, dtype=np.float32)
    for group in range(len(scorer.weights)):
        members = [of_modality for m, of_modality in best.items() if scorer.group_of[m] == group]
        if members:
            sums[:, group] = np.maximum.reduce(members).sum(axis=1)
    return scorer.score(sums)


def blocks(sizes: Ints, budget: int) -> Iterator[tuple[int, int]]:
    """Yield ranges [first, last) of items whose sizes add up to at most ``budget``, or of one item that is larger."""
    ends = np.concatenate([[0], np.cumsum(sizes)])
    first = 0
    while first < len(sizes):
        last = max(first + 1, int(np.searchsorted(ends, ends[first] + budget, side="right")) - 1)
        yield first, last
        first = last
