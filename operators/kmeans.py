"""Centroids: how many, and where.

Spherical k-means by faiss, on a sample. ColBERT takes 2^floor(log2(16 * sqrt(T))) centroids for T tokens (colbert's
``collection_indexer``); on a small corpus that is more than the tokens can support, so there are never more than one
centroid for every `MIN_POINTS` sampled tokens, about the count below which faiss itself warns (39).
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

MIN_POINTS = 32
ITERATIONS = 10
ASSIGN_BLOCK_BYTES = 64 << 20


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


def train_centroids(sample: Floats, count: int, seed: int, iterations: int = ITERATIONS) -> Floats:
    """Return ``count`` L2-normalised centroids, (C, dim), float32; the same for the same sample and seed.

    Parameters
    ----------
    sample : (N, dim), float32
        At least ``count`` tokens.
    """
    import faiss

    kmeans = faiss.Kmeans(
        sample.shape[1],
        count,
        niter=iterations,
        spherical=True,
        seed=seed,
        min_points_per_centroid=1,
        max_points_per_centroid=256,
    )
    kmeans.train(np.ascontiguousarray(sample, dtype=np.float32))
    centroids: Floats = kmeans.centroids / np.maximum(np.linalg.norm(kmeans.centroids, axis=1, keepdims=True), 1e-12)
    return centroids


def assign(tokens: Floats, centroids: Floats) -> npt.NDArray[np.int32]:
    """Return each token's most similar centroid, (T,), int32, in blocks of bounded memory."""
    block = max(1, ASSIGN_BLOCK_BYTES // (4 * len(centroids)))
    ids = np.empty(len(tokens), dtype=np.int32)
    for first in range(0, len(tokens), block):
        ids[first : first + block] = np.argmax(tokens[first : first + block] @ centroids.T, axis=1)
    return ids
