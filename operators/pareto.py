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


WORTH_OF_A_DOUBLING = 0.02
"""Of the best quality: what a doubling of a cost must buy."""


def knee(goodness: Doubles, names: Sequence[str]) -> int:
    """Return the point from which on a doubling of a cost buys less than 2 % of the best quality.

    That is where the Pareto set is touched by a line of that slope. Scaling costs to the range that they happen to have
    would not do: where all settings answer in 3 to 5 ms, half of the quality would go for 2 ms. Of equals, the first by
    name.

    Parameters
    ----------
    goodness : (P, G)
        Of the points of the set only, P > 0: quality, negative where less is better, then negative binary logarithms of
        costs.
    names
        Of the points.
    """
    best = np.abs(goodness[np.argmax(goodness[:, 0]), 0])
    worth = goodness[:, 0] / (best or 1) + WORTH_OF_A_DOUBLING * goodness[:, 1:].sum(axis=1)
    worth = worth.round(9)  # so that equal points are equal
    return min(range(len(worth)), key=lambda i: (-worth[i], names[i]))
