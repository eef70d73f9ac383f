"""Every document, by torch in float32: what the others' recall is measured against."""

import numpy as np
import torch

CHUNK_TOKENS = 8192


def build(corpus, folder, threads):
    """Nothing: the index is the token embeddings, of which the float16 in the corpus are counted."""


def load(corpus, folder, threads):
    tokens = torch.from_numpy(corpus.tokens.astype(np.float32))
    ends = corpus.starts + corpus.lengths
    firsts = [0]  # documents at which chunks of tokens begin
    while firsts[-1] < len(ends):
        full = np.searchsorted(ends, corpus.starts[firsts[-1]] + CHUNK_TOKENS, side="right")
        firsts.append(max(int(full), firsts[-1] + 1))
    chunks = [(corpus.starts[a], ends[b - 1], corpus.starts[a:b]) for a, b in zip(firsts, firsts[1:], strict=False)]

    def search(query, k):
        of_query = torch.from_numpy(query).T
        scores = [
            np.maximum.reduceat((tokens[first:last] @ of_query).numpy(), starts - first, axis=0).sum(axis=1)
            for first, last, starts in chunks
        ]
        return best(np.concatenate(scores), k)

    return search


def best(scores, k):
    """Return the positions of the ``k`` highest scores, highest first."""
    k = min(k, len(scores))
    top = np.argpartition(-scores, k - 1)[:k]
    return top[np.lexsort((top, -scores[top]))]
