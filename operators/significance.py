"""Whether two systems differ over the same queries: paired, without assuming how measures are distributed.

A difference of means says nothing alone. Its p-value is that of a randomisation test: were the systems alike, each query's
difference might as well have had the other sign. Its interval, and that of a mean, are bootstrap percentiles over queries.
All of it is drawn from a seed, so that figures repeat.

References
----------
Smucker, Allan and Carterette, "A comparison of statistical significance tests for information retrieval evaluation",
CIKM 2007 (randomisation); Holm, 1979 (several systems against one).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]

ROUNDS = 10_000
EXACT_QUERIES = 12
"""Up to so many queries that differ, all signs are tried: 4,096."""

BLOCK = 1 << 22
"""Numbers drawn at a time."""

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """How a system compares with another, in one measure.

    Attributes
    ----------
    difference, low, high
        Mean over queries of ours less theirs, and its 95 % interval.
    p
        Of the two-sided sign-flip test.
    wins, ties, losses
        Queries on which ours is better, equal and worse.
    """

    difference: float
    low: float
    high: float
    p: float
    wins: int
    ties: int
    losses: int


def compare(ours: Floats, theirs: Floats, seed: int = 0, rises: bool = True) -> Difference:
    """Return how ours, (Q,), compares with theirs, (Q,), query by query; where less is better, ``rises`` is false."""
    differences = np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)
    low, high = bootstrap(differences, seed=seed)
    better = differences if rises else -differences
    return Difference(
        float(differences.mean()) if len(differences) else 0.0,
        low,
        high,
        sign_flip(differences, seed=seed),
        int((better > 0).sum()),
        int((better == 0).sum()),
        int((better < 0).sum()),
    )


def sign_flip(differences: Floats, rounds: int = ROUNDS, seed: int = 0) -> float:
    """Return the share of random signs under which the mean difference, (Q,), is at least as far from 0 as it is.

    Exact up to `EXACT_QUERIES` that differ; beyond, of ``rounds`` draws, with what was observed as one more, so that it is
    never 0.
    """
    apart = np.asarray(differences, np.float64)
    apart = apart[apart != 0]
    if not len(apart):
        return 1.0
    observed = abs(apart.sum()) * (1 - 1e-12)  # sums of the same numbers in another order are equal
    if len(apart) <= EXACT_QUERIES:
        flips = 1 - 2.0 * ((np.arange(2 ** len(apart))[:, None] >> np.arange(len(apart))) & 1)
        return float(np.mean(np.abs(flips @ apart) >= observed))
    rng = np.random.default_rng(seed)
    extreme = 0
    for count in _in_blocks(rounds, len(apart)):
        flips = 1 - 2.0 * rng.integers(0, 2, (count, len(apart)), dtype=np.int8)
        extreme += int(np.count_nonzero(np.abs(flips @ apart) >= observed))
    return (extreme + 1) / (rounds + 1)


def bootstrap(values: Floats, rounds: int = 2_000, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % interval of the mean of values, (Q,), by resampling queries; (nan, nan) of none."""
    values = np.asarray(values, np.float64)
    if not len(values):
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    means = [
        values[rng.integers(0, len(values), (count, len(values)))].mean(axis=1)
        for count in _in_blocks(rounds, len(values))
    ]
    low, high = np.quantile(np.concatenate(means), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for being several, none above 1, in the order given."""
    order = np.argsort(p_values, kind="stable")
    adjusted = np.empty(len(p_values))
    running = 0.0
    for rank, place in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = running
    return [float(value) for value in adjusted]


def _in_blocks(rounds: int, width: int) -> list[int]:
    size = max(1, BLOCK // width)
    return [min(size, rounds - first) for first in range(0, rounds, size)]
