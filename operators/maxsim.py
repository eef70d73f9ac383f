"""MaxSim over packed token embeddings, never padded: a document's score cannot depend on its batch mates.

A clip's tokens stand together, one run a modality. `run_maxima` gives, for each query token and each run, the best
similarity in that run; scorers turn those into one score a clip. An empty run scores -inf, so padding's trap (a document
whose true maximum is -1 scoring 0) cannot occur.

References
----------
ColBERT, arXiv:2004.12832, sec. 3.3 (MaxSim); CLaMR, arXiv:2506.06144 (modality-wise late interaction).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from operators.errors import ShapeError

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

BLOCK_BYTES = 64 << 20
"""Similarities held at a time; one block of runs after the other."""


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
    _check(queries, tokens, run_lengths)
    maxima = np.full((len(queries), len(run_lengths)), -np.inf, dtype=np.float32)
    ends = np.cumsum(run_lengths)
    budget = max(1, BLOCK_BYTES // (4 * max(1, len(queries))))
    filled = np.flatnonzero(run_lengths)
    first = 0
    while first < len(filled):
        start = ends[filled[first]] - run_lengths[filled[first]]
        last = max(first + 1, int(np.searchsorted(ends[filled], start + budget, side="right")))
        block = filled[first:last]
        similarities = queries @ tokens[start : ends[block[-1]]].T
        # Empty runs are left out: reduceat would give them the first token of the next run.
        maxima[:, block] = np.maximum.reduceat(similarities, ends[block] - run_lengths[block] - start, axis=1)
        first = last
    return maxima


def _check(queries: Floats, tokens: Floats, run_lengths: Ints) -> None:
    if queries.ndim != 2 or tokens.ndim != 2 or queries.shape[1] != tokens.shape[1]:
        raise ShapeError(f"queries {queries.shape} and tokens {tokens.shape} must be (Tq, dim) and (T, dim) of one dim")
    if run_lengths.sum() != len(tokens):
        raise ShapeError(f"run lengths add up to {run_lengths.sum()}, but there are {len(tokens)} tokens")


def sum_maxsim(maxima: Floats, run_clip: Ints, num_clips: int) -> Floats:
    """Return the sum over query tokens of the best similarity in the whole clip, (D,). CLaMR at inference.

    Parameters
    ----------
    maxima : (Tq, R), float32
        Of one query, from `run_maxima`.
    run_clip : (R,), int64
        Clip of each run, not falling.
    num_clips
        D. A clip without tokens scores -inf.
    """
    return _best_run(maxima, run_clip, num_clips).sum(axis=0)


def modality_max(maxima: Floats, run_clip: Ints, num_clips: int) -> Floats:
    """Return the best modality's own sum over query tokens, (D,). CLaMR's modality-wise interaction (training).

    Never more than `sum_maxsim`, which is therefore a safe bound for pruning. Parameters as there.
    """
    return _best_run(maxima.sum(axis=0, keepdims=True), run_clip, num_clips)[0]


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
) -> list[Floats]:
    """Return the score of every clip for each query, (D,) each.

    Parameters
    ----------
    queries
        (Tq, dim) each; all go through one multiplication a block.
    tokens, run_lengths, run_clip, num_clips
        Packed clips, as for `run_maxima` and the scorers.
    scorer
        A name in `SCORERS`.
    """
    if not queries:
        return []
    maxima = run_maxima(np.concatenate(queries), tokens, run_lengths)
    ends = np.cumsum([len(query) for query in queries])
    return [SCORERS[scorer](of_query, run_clip, num_clips) for of_query in np.split(maxima, ends[:-1])]
