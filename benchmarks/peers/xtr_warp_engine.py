"""xtr-warp-rs on the CPU. Without settings it chooses its own from the index and the query."""

import torch
from xtr_warp.search import XTRWarp


def build(corpus, folder, threads, nbits, sample_documents=None):
    documents = [torch.from_numpy(document).float() for document in corpus.documents()]
    XTRWarp(folder).create(documents, device="cpu", nbits=nbits, n_samples_kmeans=sample_documents, show_progress=False)


def load(corpus, folder, threads):
    index = XTRWarp(folder).load("cpu")

    def search(query, k, **settings):
        found = index.search(torch.from_numpy(query), top_k=k, num_threads=threads, show_progress=False, **settings)
        return [number for number, _ in found[0]]

    return search
