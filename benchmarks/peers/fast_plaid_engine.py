"""fast-plaid on the CPU. It rescores a fourth of ``n_full_scores`` documents; its defaults are 8 and 4096."""

import torch
from fast_plaid.search import FastPlaid


def build(corpus, folder, threads, nbits):
    documents = [torch.from_numpy(document) for document in corpus.documents()]
    FastPlaid(folder, device="cpu").create(documents, nbits=nbits)


def load(corpus, folder, threads):
    index = FastPlaid(folder, device="cpu")

    def search(query, k, **settings):
        found = index.search(torch.from_numpy(query)[None], top_k=k, show_progress=False, **settings)
        return [number for number, _ in found[0]]

    return search
