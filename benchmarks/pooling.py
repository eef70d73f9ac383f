"""What token pooling costs in quality, by budget, beside simpler ways to keep as few tokens.

    python -m benchmarks.pooling CORPUS [--documents 600]

A corpus is a folder that `benchmarks/corpus.py` made. Documents longer than a budget are cut down to it by the pooling of
``encode`` (Ward clusters), by means of neighbours of equal number, by tokens drawn at random, and to their first tokens.
Scores are exact, so that what is lost is lost to pooling. Prints Markdown: nDCG@10 with the 95 % interval of a bootstrap
over queries, the paired difference from all tokens, the share of their first ten that is found, and processor time.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.quality import exact_ranking, interval, ndcg, overlap
from operators.encoders import TokenEmbeddings
from operators.pooling import pool

BUDGETS = (256, 128, 64, 32, 16, 8)


def hierarchical(tokens: np.ndarray, budget: int) -> np.ndarray:
    return pool(TokenEmbeddings(tokens, np.zeros(len(tokens), np.int32)), budget).embeddings


def neighbours(tokens: np.ndarray, budget: int) -> np.ndarray:
    means = np.stack([part.mean(axis=0) for part in np.array_split(tokens, budget)])
    return means / np.linalg.norm(means, axis=1, keepdims=True)


def at_random(tokens: np.ndarray, budget: int) -> np.ndarray:
    return tokens[np.sort(np.random.default_rng(len(tokens)).permutation(len(tokens))[:budget])]


def first(tokens: np.ndarray, budget: int) -> np.ndarray:
    return tokens[:budget]


WAYS: tuple[Callable[[np.ndarray, int], np.ndarray], ...] = (hierarchical, neighbours, at_random, first)


def measure(folder: Path, max_documents: int) -> None:
    lengths = np.load(folder / "lengths.npy").astype(np.int64)[:max_documents]
    tokens = np.load(folder / "tokens.npy", mmap_mode="r")[: lengths.sum()].astype(np.float32)
    documents = np.split(tokens, np.cumsum(lengths)[:-1])
    ends = np.cumsum(np.load(folder / "query_lengths.npy"))
    queries = np.split(np.load(folder / "query_tokens.npy").astype(np.float32), ends[:-1])
    qrels = {int(q): found for q, found in json.loads((folder / "qrels.json").read_text()).items()}
    relevant = {q: kept for q, found in qrels.items() if (kept := [d for d in found if d < len(lengths)])}
    queries = [queries[q] for q in relevant]
    exact = exact_ranking(tokens, lengths, queries, 10)
    whole = np.array([ndcg(found, relevant[q]) for found, q in zip(exact, relevant, strict=True)])
    print(f"\n## {folder.name}: {len(lengths):,} documents of {lengths.mean():.0f} tokens, {len(queries)} queries\n")
    print("| tokens kept | way | a document | nDCG@10 [95 %] | less all [95 %] | R@10 | ms a document |")
    print(f"|---|---|---|---|---|---|---|\n| all | | {lengths.mean():.0f} | {interval(whole)} | | 1 | |")
    for budget in BUDGETS:
        for way in WAYS:
            started = time.process_time()
            kept = [way(of_one, budget) if len(of_one) > budget else of_one for of_one in documents]
            milliseconds = 1e3 * (time.process_time() - started) / len(documents)
            sizes = np.array([len(of_one) for of_one in kept])
            found = exact_ranking(np.concatenate(kept), sizes, queries, 10)
            ours = np.array([ndcg(f, relevant[q]) for f, q in zip(found, relevant, strict=True)])
            share = np.mean([overlap(f, e, 10) for f, e in zip(found, exact, strict=True)])
            cost = f"{milliseconds:.1f}" if way is hierarchical else ""
            print(
                f"| {budget} | {way.__name__.replace('_', ' ')} | {sizes.mean():.0f} | {interval(ours)} | "
                f"{interval(ours - whole)} | {share:.3f} | {cost} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpora", nargs="+", type=Path)
    parser.add_argument("--documents", type=int, default=1_000_000, help="only the first so many")
    arguments = parser.parse_args()
    for folder in arguments.corpora:
        measure(folder, arguments.documents)


if __name__ == "__main__":
    main()
