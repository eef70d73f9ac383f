"""What compression and pruning cost in quality: relevance, fidelity and codec error by bits, recall by probes.

    python benchmarks/quality.py CORPUS [CORPUS ...]

A corpus is a folder that `benchmarks/corpus.py` made. Prints Markdown. nDCG@10 is against the corpus's judgements, with
the 95 % interval of a bootstrap over queries, and beside it the interval of the paired difference from exact scoring.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from operators.codec import ALLOWED_BITS, ResidualCodec
from operators.kmeans import MAX_POINTS, num_centroids
from operators.maxsim import make_scorer, score_clips
from operators.search import EXHAUSTIVE, Plan, Searcher
from operators.segment import Segment

SUM = make_scorer("sum_maxsim", ["text"])
HELDOUT_TOKENS = 50_000
BLOCK_DOCUMENTS = 200
RESAMPLES = 10_000
PLANS = [Plan(p, c) for p, c in ((1, 256), (2, 256), (4, 512), (8, 1024), (16, 2048), (32, 4096))]


def ndcg(found: np.ndarray, relevant: list[int], cutoff: int = 10) -> float:
    discounts = 1 / np.log2(np.arange(cutoff) + 2)
    gains = np.isin(found[:cutoff], relevant)
    return float(discounts[: len(gains)][gains].sum() / discounts[: min(cutoff, len(relevant))].sum())


def interval(values: np.ndarray) -> str:
    draws = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.quantile(values[draws].mean(axis=1), [0.025, 0.975])
    return f"{values.mean():.4f} [{low:.4f}, {high:.4f}]"


def exact_ranking(tokens: np.ndarray, lengths: np.ndarray, queries: list[np.ndarray], depth: int) -> list[np.ndarray]:
    starts = np.concatenate([[0], np.cumsum(lengths)])
    parts = []
    for first in range(0, len(lengths), BLOCK_DOCUMENTS):
        of_block = lengths[first : first + BLOCK_DOCUMENTS]
        block = tokens[starts[first] : starts[first] + of_block.sum()].astype(np.float32)
        ordinals, modality = np.arange(len(of_block)), np.zeros(len(of_block), np.uint8)
        parts.append(score_clips(queries, block, of_block, ordinals, modality, len(of_block), SUM))
    return [np.argsort(-scores, kind="stable")[:depth] for scores in np.concatenate(parts, axis=1)]


def overlap(found: np.ndarray, exact: np.ndarray, depth: int) -> float:
    return len(np.intersect1d(found[:depth], exact[:depth])) / depth


def measure(folder: Path) -> None:
    tokens, lengths = np.load(folder / "tokens.npy"), np.load(folder / "lengths.npy").astype(np.int64)
    ends = np.cumsum(np.load(folder / "query_lengths.npy"))
    queries = np.split(np.load(folder / "query_tokens.npy").astype(np.float32), ends[:-1])
    relevant = {int(q): documents for q, documents in json.loads((folder / "qrels.json").read_text()).items()}
    judged = [q for q in relevant if relevant[q]]
    queries = [queries[q] for q in judged]
    exact = exact_ranking(tokens, lengths, queries, 100)
    of_exact = np.array([ndcg(found, relevant[q]) for found, q in zip(exact, judged, strict=True)])
    print(f"\n## {folder.name}: {len(lengths):,} documents, {len(tokens):,} tokens, {len(queries)} judged queries\n")
    print("| bits | cosine | nDCG@10 [95 %] | less exact [95 %] | R@10 | R@100 |\n|---|---|---|---|---|---|")
    print(f"| exact | 1 | {interval(of_exact)} | | 1 | 1 |")
    count = num_centroids(len(tokens), len(tokens))
    drawn = np.random.default_rng(0).permutation(len(tokens))[: MAX_POINTS * count + HELDOUT_TOKENS]
    heldout, sample = tokens[np.sort(drawn[:HELDOUT_TOKENS])], tokens[np.sort(drawn[HELDOUT_TOKENS:])]
    count = num_centroids(len(tokens), len(sample))
    centroids = ResidualCodec.train(sample, heldout, 4, count, seed=0).centroids.floats
    curves = []
    for nbits in ALLOWED_BITS:
        codec = ResidualCodec.fit(centroids, heldout, nbits, seed=0)
        ordinals, modality = np.arange(len(lengths)), np.zeros(len(lengths), np.uint8)
        segment = Segment.build(tokens, lengths, ordinals, modality, len(lengths), codec)
        decoded = codec.decode(segment.codes_of(0, 100_000))
        of_token = np.einsum("td,td->t", decoded, tokens[:100_000].astype(np.float32)) / np.linalg.norm(decoded, axis=1)
        searcher = Searcher([segment], codec)
        found = [ordinals for ordinals, _ in searcher.search(queries, 100, EXHAUSTIVE, SUM)]
        ours = np.array([ndcg(f, relevant[q]) for f, q in zip(found, judged, strict=True)])
        shares = [np.mean([overlap(f, e, k) for f, e in zip(found, exact, strict=True)]) for k in (10, 100)]
        print(
            f"| {nbits} | {of_token.mean():.4f} | {interval(ours)} | {interval(ours - of_exact)} | "
            f"{shares[0]:.3f} | {shares[1]:.3f} |",
            flush=True,
        )
        for plan in PLANS:
            some = [ordinals for ordinals, _ in searcher.search(queries, 100, plan, SUM)]
            shares = [np.mean([overlap(f, e, k) for f, e in zip(some, exact, strict=True)]) for k in (10, 100)]
            curves.append(f"| {nbits} | {plan.probes} | {plan.candidates} | {shares[0]:.3f} | {shares[1]:.3f} |")
    print("\n| bits | probes | candidates | R@10 | R@100 |\n|---|---|---|---|---|")
    print("\n".join(curves))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpora", nargs="+", type=Path)
    for folder in parser.parse_args().corpora:
        measure(folder)


if __name__ == "__main__":
    main()
