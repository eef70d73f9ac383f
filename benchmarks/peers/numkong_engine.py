"""Every document, by NumKong's MaxSim (once SimSIMD's), on float16 packed in memory. It runs on one thread.

It picks the nearest document token by int8 and scores that pair in full, so its ranking is not quite exact.
"""

import numkong
import numpy as np
from exact_engine import best


def build(corpus, folder, threads):
    """Nothing: there is no form of it on disk."""


def load(corpus, folder, threads):
    documents = [numkong.maxsim_pack(document, "f16") for document in corpus.documents()]

    def search(query, k):
        packed = numkong.maxsim_pack(query.astype(np.float16), "f16")
        distances = np.fromiter((numkong.maxsim_packed(packed, d) for d in documents), np.float64, len(documents))
        return best(-distances, k)

    return search
