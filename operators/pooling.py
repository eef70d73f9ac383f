"""Token pooling: fewer token embeddings a modality, by merging the most alike (arXiv:2409.14683, hierarchical pooling).

Neighbouring frames are near copies, and 1,860 tokens a video are 476 GB per million videos in float16, where 64 are
16 GB. Ward clustering of L2-normalised tokens, one mean per cluster, normalised again. Each pooled token keeps the span
of the member nearest to the mean, and pooled tokens stay in the order of their content.
"""

from __future__ import annotations

import numpy as np

from operators.encoders import TokenEmbeddings

VERSION = "1"

LINKAGE_TOKENS = 2048
"""Ward's linkage needs all pairwise distances: longer modalities are pooled in consecutive pieces of this many tokens."""


def pool(tokens: TokenEmbeddings, max_tokens: int) -> TokenEmbeddings:
    """Return at most ``max_tokens`` token embeddings; the same object where it already fits.

    Parameters
    ----------
    tokens
        Of one modality of one clip.
    max_tokens
        The budget; 0 keeps all.
    """
    num_tokens = len(tokens.embeddings)
    if not max_tokens or num_tokens <= max_tokens:
        return tokens
    num_pieces = min(-(-num_tokens // LINKAGE_TOKENS), max_tokens)
    budgets = np.diff(np.linspace(0, max_tokens, num_pieces + 1).astype(int))
    pieces = np.array_split(np.arange(num_tokens), num_pieces)
    labels = np.concatenate(
        [
            _cluster(tokens.embeddings[piece], budget) + first
            for piece, budget, first in zip(pieces, budgets, np.cumsum(budgets) - budgets, strict=True)
        ]
    )
    return _means(tokens, labels)


def _cluster(embeddings: np.ndarray, num_clusters: int) -> np.ndarray:
    from scipy.cluster.hierarchy import fcluster, linkage

    if num_clusters >= len(embeddings):
        return np.arange(len(embeddings))
    labels: np.ndarray = fcluster(linkage(embeddings, method="ward"), num_clusters, criterion="maxclust") - 1
    return labels


def _means(tokens: TokenEmbeddings, labels: np.ndarray) -> TokenEmbeddings:
    _, labels = np.unique(labels, return_inverse=True)
    sums = np.zeros((labels.max() + 1, tokens.embeddings.shape[1]), dtype=np.float64)
    np.add.at(sums, labels, tokens.embeddings)
    means = sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)
    closeness = np.einsum("td,td->t", tokens.embeddings, means[labels])
    order = np.lexsort((-closeness, labels))
    nearest = order[np.unique(labels[order], return_index=True)[1]]  # of each cluster, its member nearest to the mean
    in_order = np.argsort(nearest)
    return TokenEmbeddings(means[in_order].astype(np.float32), tokens.span_index[nearest[in_order]])
