"""Trade-offs: which settings no other setting beats, and the one to start from.

Goodness is larger-is-better in every column; costs go in as their negative logarithm, so that a step is a ratio.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.floating[Any]]


def pareto_set(goodness: Doubles) -> npt.NDArray[np.bool_]:
    """Return which of some points no other point dominates, (P,).

    A point dominates another that is nowhere better and somewhere worse; equal points do not dominate each other.

    Parameters
    ----------
    goodness : (P, G)
        Finite; larger is better in each of G objectives.
    """
    dominated = [bool(((goodness >= point).all(axis=1) & (goodness > point).any(axis=1)).any()) for point in goodness]
    return ~np.array(dominated, dtype=bool)


def knee(goodness: Doubles, names: Sequence[str]) -> int:
    """Return the point of a Pareto set that gives up least of everything.

    Each objective is scaled to 0 for the worst of the set and 1 for the best; the knee is the point farthest, towards the
    best of all, from the plane on which these add up to 1: where they add up to the most. An objective in which all
    are equal counts for nothing. Of equals, the first by name.

    Parameters
    ----------
    goodness : (P, G)
        Of the points of the set only, P > 0.
    names
        Of the points.

    References
    ----------
    Das, On characterizing the "knee" of the Pareto curve, Structural Optimization 18, 1999.
    """
    low, high = goodness.min(axis=0), goodness.max(axis=0)
    scaled = (goodness - low) / np.where(high > low, high - low, 1)
    sums = scaled.sum(axis=1).round(9)  # so that equal points are equal
    return min(range(len(sums)), key=lambda i: (-sums[i], names[i]))
