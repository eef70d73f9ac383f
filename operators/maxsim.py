"""MaxSim over packed token embeddings, never padded: padding's zeros would outscore a negative best similarity.

A clip's tokens stand together, one run a modality. `run_maxima` gives, for each query token and each run, the best
similarity in that run; scorers turn those into one score a clip. An empty run scores -inf, and so does a clip without
tokens. All similarities of a block are held, no more than `BLOCK_BYTES` whatever the corpus: that costs a second pass over
them, which a fused kernel would save.

References
----------
ColBERT, arXiv:2004.12832, sec. 3.3 (MaxSim); CLaMR, arXiv:2506.06144 (modality-wise late interaction, LI_mw, which it
trains with; it ranks with MaxSim over all modalities, LI).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from operators.errors import ShapeError

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


def sum_maxsim(maxima: Floats, run_clip: Ints, num_clips: int) -> Floats:
    """Return the sum over query tokens of the best similarity in the whole clip, (D,). LI; CLaMR at inference.

    Parameters
    ----------
    maxima : (Tq, R), float32
        Of one query, Tq > 0, from `run_maxima`.
    run_clip : (R,), int64
        Clip of each run, not falling.
    num_clips
        D. A clip without tokens scores -inf.
    """
    scores: Floats = _best_run(maxima, run_clip, num_clips).sum(axis=0)
    return scores


def modality_max(maxima: Floats, run_clip: Ints, num_clips: int) -> Floats:
    """Return the best modality's own sum over query tokens, (D,). LI_mw; CLaMR in training.

    Never more than `sum_maxsim`, which is therefore a safe bound for pruning. An absent modality is -inf before the
    outer maximum. Parameters as there.
    """
    scores: Floats = _best_run(maxima.sum(axis=0, keepdims=True), run_clip, num_clips)[0]
    return scores


def _best_run(values: Floats, run_clip: Ints, num_clips: int) -> Floats:
    """Return the maximum over each clip's runs, (rows, D); -inf for a clip without runs."""
    best = np.full((len(values), num_clips), -np.inf, dtype=np.float32)
    if len(run_clip):
        starts = np.flatnonzero(np.diff(run_clip, prepend=-1))
        best[:, run_clip[starts]] = np.maximum.reduceat(values, starts, axis=1)
    return best


Scorer = Callable[[Floats, Ints, int], Floats]

SCORERS: dict[str, Scorer] = {"sum_maxsim": sum_maxsim, "modality_max": modality_max}


def score_clips(
    queries: Sequence[Floats], tokens: Floats, run_lengths: Ints, run_clip: Ints, num_clips: int, scorer: str
) -> Floats:
    """Return the score of every clip for each query, (Q, D), float32.

    Parameters
    ----------
    queries
        (Tq, dim) each; all go through one multiplication a block. One without tokens scores -inf everywhere.
    tokens, run_lengths, run_clip, num_clips
        Packed clips, as for `run_maxima` and the scorers.
    scorer
        A name in `SCORERS`.

    Raises
    ------
    ShapeError
        As `run_maxima`, or if the clips of runs do not fit the run lengths.
    """
    scores = np.full((len(queries), num_clips), -np.inf, dtype=np.float32)
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
        for of_query, score in zip(np.split(maxima, query_ends[:-1]), scores, strict=True):
            if len(of_query):
                score[first:last] = SCORERS[scorer](of_query, run_clip[runs] - first, last - first)
    return scores


def blocks(sizes: Ints, budget: int) -> Iterator[tuple[int, int]]:
    """Yield ranges [first, last) of items whose sizes add up to at most ``budget``, or of one item that is larger."""
    ends = np.concatenate([[0], np.cumsum(sizes)])
    first = 0
    while first < len(sizes):
        last = max(first + 1, int(np.searchsorted(ends, ends[first] + budget, side="right")) - 1)
        yield first, last
        first = last
