"""Centroids: how many, and where.

Spherical k-means by faiss, on a sample. ColBERT takes 2^floor(log2(16 * sqrt(T))) centroids for T tokens (colbert's
``collection_indexer``); on a small corpus that is more than the tokens can support, so there is never more than one
centroid for every `MIN_POINTS` sampled tokens.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from operators.errors import ConfigError, ShapeError

Floats = npt.NDArray[np.float32]

MIN_POINTS = 32
"""Rounding down makes it 32 to 64 on small corpora. On 3,000 and on 30,000 tokens of CACM (384 dimensions, 2 bits) more
centroids fit the tokens they saw ever better but not those of other documents: at 14 a centroid, cosine 0.965 against
0.914; at 56, 0.945 against 0.918. And each costs 4 * dim bytes. faiss warns below 39."""

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


def train_centroids(
    sample: Floats, count: int, seed: int, iterations: int = ITERATIONS, num_threads: int | None = None
) -> Floats:
    """Return ``count`` L2-normalised centroids, (C, dim), float32; the same for the same sample and seed.

    Parameters
    ----------
    sample : (N, dim), float32
        At least ``count`` tokens; faiss draws 256 a centroid where there are more.
    num_threads
        Of faiss, in the whole process while this runs; None leaves it to OpenMP.

    Raises
    ------
    ConfigError
        If there are fewer sampled tokens than centroids.
    """
    if not 1 <= count <= len(sample):
        raise ConfigError(f"{count} centroids need as many tokens, and one at least; the sample has {len(sample)}")
    import faiss

    kmeans = faiss.Kmeans(
        sample.shape[1],
        count,
        niter=iterations,
        spherical=True,
        seed=seed,
        min_points_per_centroid=1,  # silences a warning: `num_centroids` decides
        max_points_per_centroid=256,
    )
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(num_threads or before)
    try:
        kmeans.train(np.ascontiguousarray(sample, dtype=np.float32))
    finally:
        faiss.omp_set_num_threads(before)
    found = np.asarray(kmeans.centroids, dtype=np.float32)
    centroids: Floats = found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)
    return centroids


def assign(tokens: Floats, centroids: Floats) -> npt.NDArray[np.int32]:
    """Return each token's most similar centroid, (T,), int32, in blocks of bounded memory; the first of equals.

    Raises
    ------
    ShapeError
        If tokens, (T, dim), and centroids, (C, dim), are not of one width.
    """
    if tokens.ndim != 2 or tokens.shape[1] != centroids.shape[1]:
        raise ShapeError(f"tokens of shape {tokens.shape}; the centroids want (T, {centroids.shape[1]})")
    block = max(1, ASSIGN_BLOCK_BYTES // (4 * len(centroids)))
    ids = np.empty(len(tokens), dtype=np.int32)
    for first in range(0, len(tokens), block):
        ids[first : first + block] = np.argmax(tokens[first : first + block] @ centroids.T, axis=1)
    return ids
