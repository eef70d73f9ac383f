"""Whether late interaction looks where it should: CLaMR's modality selection.

In the relevant video each query token is won by the token of some modality. The modality that wins most of a query's tokens
is the one predicted; the one that the query is meant for is right.

References
----------
CLaMR, arXiv:2506.06144, and its published evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def selection(wins: Sequence[tuple[str | None, Sequence[int]]], modalities: Sequence[str]) -> dict[str, Any] | None:
    """Return how often the modality that a query is meant for wins its tokens; None if nothing is known.

    Parameters
    ----------
    wins
        Of each query and relevant video: the modality meant, and how many query tokens each modality won.
    modalities
        Names, in the order of the counts.

    Returns
    -------
    pairs that were looked at, accuracy (won the most tokens), any_accuracy (won at least one), macro precision, recall and
    F1 over the modalities that are meant, and the share of pairs that each modality is predicted for.
    """
    known = [(modalities.index(meant), np.asarray(counts)) for meant, counts in wins if meant in modalities]
    if not known:
        return None
    meant = np.array([modality for modality, _ in known])
    counts = np.array([of_pair for _, of_pair in known])
    predicted = counts.argmax(axis=1)
    right = predicted == meant
    precisions, recalls, f1s = [], [], []
    for modality in np.unique(meant):
        hits = float(np.sum(right & (meant == modality)))
        precisions.append(hits / max(1, np.sum(predicted == modality)))
        recalls.append(hits / np.sum(meant == modality))
        f1s.append(2 * hits / (np.sum(predicted == modality) + np.sum(meant == modality)))
    return {
        "pairs": len(known),
        "accuracy": float(right.mean()),
        "any_accuracy": float((counts[np.arange(len(meant)), meant] > 0).mean()),
        "macro_precision": float(np.mean(precisions)),
        "macro_recall": float(np.mean(recalls)),
        "macro_f1": float(np.mean(f1s)),
        "predicted": {name: float(np.mean(predicted == i)) for i, name in enumerate(modalities)},
    }
