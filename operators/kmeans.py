"""Centroids: how many, where, and which is nearest.

Spherical k-means whose assignment runs on bytes (`operators.kernels`): tokens and centroids are rounded to 8 bits for the
comparison only. Of 1,024 random tokens of 128 dimensions, 97 % got the one of 16,384 random centroids that float32 gives,
the others one nearly as near, and the residual holds the difference.

One iteration is `cluster_sums` on any part of the sample, and `next_centroids` on their total: a sample that exceeds one
worker's memory is clustered by several (`pipelines.build_index`), with the same result but for the order of additions.

ColBERT takes 2^floor(log2(16 * sqrt(T))) centroids for T tokens (colbert's ``collection_indexer``); on a small corpus
that is more than the tokens can support, so there is never more than one centroid for every `MIN_POINTS` sampled tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from operators import kernels
from operators.errors import ConfigError, ShapeError

Floats = npt.NDArray[np.float32]
Tokens = npt.NDArray[np.floating[Any]]
Doubles = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int32]

MIN_POINTS = 32
"""Rounding down makes it 32 to 64 on small corpora. On 3,000 and on 30,000 tokens of CACM (384 dimensions, 2 bits) more
centroids fit the tokens they saw ever better but not those of other documents: at 14 a centroid, cosine 0.965 against
0.914; at 56, 0.945 against 0.918."""

MAX_POINTS = 32
"""Tokens a centroid that k-means looks at. On 1.86 million tokens 64 of them and 8 iterations took 87 s where 32 and 6 took
34, and found 0.967 of the exact first 10 where those found 0.963 (4 bits, every code scored)."""

ITERATIONS = 6
BLOCK_TOKENS = 16 * kernels.CHUNK
SUM_TOKENS = 1 << 16
TWO_LEVEL_FROM = 1 << 16
"""Centroids from which tokens are compared in two steps: first with means of centroids."""
VISITED_GROUPS = 8
TWO_LEVEL_BLOCK_TOKENS = 1 << 17


def num_centroids(num_tokens: int, num_sampled: int) -> int:
    """Return how many centroids suit a corpus: a power of two, at least 1.

    Parameters
    ----------
    num_tokens
        Of the whole corpus.
    num_sampled
        That k-means will see.
    """
    wanted = 16 * math.sqrt(max(1, num_tokens))
    return int(2 ** math.floor(math.log2(max(1.0, min(wanted, num_sampled / MIN_POINTS)))))


@dataclass(frozen=True, eq=False)
class Centroids:
    """Centroids of 8 bits a dimension: ``low + step * codes``. What rounding costs, the residual makes good.

    Attributes
    ----------
    codes : (C, dim), uint8
    low, step
        One range for all dimensions.
    """

    codes: npt.NDArray[np.uint8]
    low: float
    step: float

    @classmethod
    def round(cls, centroids: Floats) -> Centroids:
        """Return float centroids, (C, dim), rounded to bytes."""
        low, high = float(centroids.min()), float(centroids.max())
        step = float(np.float32(max(high - low, 1e-6) / 255))
        codes = np.clip(np.rint((centroids - np.float32(low)) / np.float32(step)), 0, 255).astype(np.uint8)
        return cls(codes, low, step)

    @cached_property
    def floats(self) -> Floats:
        """As float32, (C, dim)."""
        return np.float32(self.low) + self.codes * np.float32(self.step)

    def rows(self, padded_dim: int) -> npt.NDArray[np.uint8]:
        """Return the bytes for the kernels, flat: dimensions padded, and rows to a multiple of 4 with the last one."""
        count, dim = self.codes.shape
        num_rows = -(-count // 4) * 4
        rows = kernels.aligned(num_rows * padded_dim, np.uint8).reshape(num_rows, padded_dim)
        rows[:count, :dim] = self.codes
        rows[count:] = rows[count - 1]
        return rows.ravel()

    def start_of(self, sums: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """Return what ``low`` adds to products of bytes, from the sums of the lanes' bytes."""
        start: Ids = np.rint(sums * (self.low / self.step)).astype(np.int32)
        return start


def train_centroids(
    sample: Tokens, count: int, seed: int, num_threads: int = 1, iterations: int = ITERATIONS
) -> Floats:
    """Return ``count`` L2-normalised centroids, (C, dim), float32; the same for the same sample and seed.

    Parameters
    ----------
    sample : (N, dim), float16 or float32
        At least ``count`` tokens, in any order.

    Raises
    ------
    ConfigError
        If there are fewer sampled tokens than centroids.
    """
    check_count(len(sample), count)
    rng = np.random.default_rng(seed)
    if len(sample) > MAX_POINTS * count:
        sample = sample[np.sort(rng.choice(len(sample), MAX_POINTS * count, replace=False))]
    centroids = sample[first_tokens(len(sample), count, seed)].astype(np.float32)
    for _ in range(iterations):
        centroids = next_centroids(*cluster_sums(sample, centroids, num_threads), seed)
    return centroids


def check_count(num_sampled: int, count: int) -> None:
    """Raise ConfigError unless a sample has a token for each centroid."""
    if not 1 <= count <= num_sampled:
        raise ConfigError(f"{count} centroids need as many tokens, and one at least; the sample has {num_sampled}")


def first_tokens(num_sampled: int, count: int, seed: int) -> npt.NDArray[np.int64]:
    """Return which tokens of a sample k-means starts from, rising."""
    return np.sort(np.random.default_rng(seed).choice(num_sampled, count, replace=False))


def cluster_sums(tokens: Tokens, centroids: Floats, num_threads: int = 1) -> tuple[Doubles, npt.NDArray[np.int64]]:
    """Return the sum, (C, dim), and the number, (C,), of the tokens nearest to each centroid."""
    ids = assign(tokens, Centroids.round(centroids), num_threads)
    sums = np.zeros(centroids.shape, dtype=np.float64)
    counts = np.zeros(len(centroids), dtype=np.int64)
    for first in range(0, len(tokens), SUM_TOKENS):
        block = slice(first, first + SUM_TOKENS)
        kernels.sum_by_centroid(np.ascontiguousarray(tokens[block], np.float32), ids[block], sums, counts)
    return sums, counts


def next_centroids(sums: Doubles, counts: npt.NDArray[np.int64], seed: int) -> Floats:
    """Return L2-normalised means, (C, dim); centroids without tokens split the largest cluster, as in faiss."""
    means = sums / np.maximum(counts, 1)[:, None]
    rng = np.random.default_rng(seed)
    sizes = counts.astype(np.float64)
    for empty in np.flatnonzero(counts == 0):
        largest = int(np.argmax(sizes))
        means[empty] = means[largest] + rng.normal(size=means.shape[1]) * np.linalg.norm(means[largest]) / 64
        sizes[empty] = sizes[largest] = sizes[largest] / 2
    centroids: Floats = (means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)).astype(np.float32)
    return centroids


def assign(tokens: Tokens, centroids: Centroids, num_threads: int = 1) -> Ids:
    """Return each token's most similar centroid, (T,), int32.

    Beyond `TWO_LEVEL_FROM` centroids a token is compared with those of the nearest groups only.

    Raises
    ------
    ShapeError
        If tokens, (T, dim), and centroids are not of one width.
    """
    count, dim = centroids.codes.shape
    if tokens.ndim != 2 or tokens.shape[1] != dim:
        raise ShapeError(f"tokens of shape {tokens.shape}; the centroids want (T, {dim})")
    if count > TWO_LEVEL_FROM:
        return _assign_in_two_steps(tokens, centroids, num_threads)
    ids = np.empty(len(tokens), dtype=np.int32)
    nearest = _Nearest(centroids)
    in_threads(len(tokens), BLOCK_TOKENS, num_threads, lambda first, last: nearest(tokens[first:last], ids[first:last]))
    return ids


class _Nearest:
    """The most similar of some centroids, by blocks of tokens."""

    def __init__(self, centroids: Centroids) -> None:
        self._centroids = centroids
        self._padded_dim = -(-centroids.codes.shape[1] // 4) * 4
        self._rows = centroids.rows(self._padded_dim)

    def __call__(self, tokens: Tokens, ids: Ids, best: Floats | None = None) -> None:
        """Fill the ids, and on request the similarities, of up to `BLOCK_TOKENS` tokens."""
        dim, chunks = self._padded_dim, -(-len(tokens) // kernels.CHUNK)
        lanes = kernels.aligned(chunks * kernels.CHUNK * dim, np.int8)
        steps = np.empty(chunks * kernels.CHUNK, dtype=np.float32)
        sums = np.empty(len(steps), dtype=np.int32)
        kernels.pack_lanes(np.ascontiguousarray(tokens, np.float32), 0, len(tokens), dim, lanes, steps, sums)
        start = self._centroids.start_of(sums)
        products = np.full(len(steps), kernels.LEAST, dtype=np.int32)
        winner = np.zeros(len(steps), dtype=np.int32)
        kernels.assign_lanes(self._rows, len(self._rows) // dim, dim, lanes, chunks, start, products, winner)
        ids[:] = np.minimum(winner[: len(tokens)], len(self._centroids.codes) - 1)
        if best is not None:
            best[:] = (products * steps)[: len(tokens)] * np.float32(self._centroids.step)


def _assign_in_two_steps(tokens: Tokens, centroids: Centroids, num_threads: int) -> Ids:
    """Compare with means of centroids first, then with the centroids of the `VISITED_GROUPS` nearest groups."""
    num_groups = 2 ** round(math.log2(len(centroids.codes)) / 2)
    means = train_centroids(centroids.floats, num_groups, 0, num_threads, iterations=4)
    group_of = assign(centroids.floats, Centroids.round(means), num_threads)
    members = [np.flatnonzero(group_of == group) for group in range(num_groups)]
    nearest = [
        _Nearest(Centroids(centroids.codes[own], centroids.low, centroids.step)) if len(own) else None
        for own in members
    ]
    ids = np.zeros(len(tokens), dtype=np.int32)

    def work(first: int, last: int) -> None:
        block = np.asarray(tokens[first:last], np.float32)
        groups = np.argpartition(-(block @ means.T), VISITED_GROUPS, axis=1)[:, :VISITED_GROUPS].ravel()
        order = np.argsort(groups, kind="stable")
        visits = np.searchsorted(groups[order], np.arange(num_groups + 1))
        best = np.full(len(block), -np.inf, dtype=np.float32)
        for group, (own, find) in enumerate(zip(members, nearest, strict=True)):
            visitors = order[visits[group] : visits[group + 1]] // VISITED_GROUPS
            if find is None or not len(visitors):
                continue
            found, similarity = np.empty(len(visitors), np.int32), np.empty(len(visitors), np.float32)
            find(block[visitors], found, similarity)
            better = similarity > best[visitors]
            ids[first + visitors[better]] = own[found[better]]
            best[visitors[better]] = similarity[better]

    in_threads(len(tokens), TWO_LEVEL_BLOCK_TOKENS, num_threads, work)
    return ids


def in_threads(count: int, block: int, num_threads: int, work: Callable[[int, int], object]) -> None:
    """Call ``work(first, last)`` on consecutive blocks of [0, count), in threads."""
    ranges = [(first, min(first + block, count)) for first in range(0, count, block)]
    if num_threads == 1 or len(ranges) == 1:
        for first, last in ranges:
            work(first, last)
        return
    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(lambda bounds: work(*bounds), ranges))
