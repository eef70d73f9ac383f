"""Rankings of one modality each made into one: what late interaction over all modalities is compared with.

Scores are of one query: (P, M), a video a row and a modality a column, -inf where a video lacks it. Fused scores are (P,).

References
----------
Fox and Shaw, TREC-2, 1994 (CombSUM); Cormack, Clarke and Buettcher, SIGIR 2009 (RRF); MMMORRF, arXiv:2503.20698
(RRF weighted by modality).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]

RRF_K = 60


def weighted_mean(scores: Floats, weights: Floats) -> Floats:
    """Return the weighted mean of scores put between 0 and 1 by modality; a lacking modality counts as 0."""
    return _scaled(scores) @ _shares(weights)


def reciprocal_rank(scores: Floats, weights: Floats) -> Floats:
    """Return the weighted sum of 1 / (60 + rank) over modalities; a lacking modality adds nothing."""
    places = np.argsort(np.argsort(-scores, axis=0, kind="stable"), axis=0, kind="stable") + 1
    gains = np.where(np.isfinite(scores), 1 / (RRF_K + places), 0.0)
    fused: Floats = gains @ _shares(weights)
    return fused


def route(scores: Floats) -> int:
    """Return the modality whose first video stands out most: by standard deviations over the mean of its scores.

    A modality of fewer than three videos, or of equal scores, says nothing and is chosen only if all are so.
    """
    stands_out = np.full(scores.shape[1], -np.inf)
    for modality, column in enumerate(scores.T):
        there = column[np.isfinite(column)]
        if len(there) >= 3 and there.std() > 0:
            stands_out[modality] = (there.max() - there.mean()) / there.std()
    return int(np.argmax(stands_out))


def _scaled(scores: Floats) -> Floats:
    there = np.isfinite(scores)
    low = np.where(there, scores, np.inf).min(axis=0, initial=np.inf)
    high = np.where(there, scores, -np.inf).max(axis=0, initial=-np.inf)
    differ = high > low  # of equal scores all are the best there is
    above = np.where(there & differ, scores, 0.0) - np.where(differ, low, 0.0)
    return np.where(there, np.where(differ, above / np.where(differ, high - low, 1.0), 1.0), 0.0)


def _shares(weights: Floats) -> Floats:
    total = float(np.sum(weights))
    return np.asarray(weights) / total if total > 0 else np.full(len(weights), 1 / max(1, len(weights)))
