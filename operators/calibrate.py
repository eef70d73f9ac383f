"""How many probes and candidates reach a recall: measured on the corpus itself, when an index is built.

Queries are runs of tokens drawn from clips; the clip that a query came from counts neither as wanted nor as found. For a
grid of plans, what share of the exact best clips, by float embeddings, each finds is written down, with what it costs.
`choose` then turns a recall into a plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from operators.maxsim import Scorer, score_clips
from operators.search import COARSE_NS, EXHAUSTIVE, FINE_NS, ROW_NS, Plan, Searcher

Floats = npt.NDArray[np.float32]
Tokens = npt.NDArray[np.floating[Any]]

PROBES = (1, 2, 4, 8, 16, 32)
CANDIDATES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
RESCORED = (0, 2, 5, 10)
"""Clips rescored on float embeddings, as multiples of the results asked for."""
DEPTHS = (10, 100)
NUM_QUERIES = 96
QUERY_TOKENS = (8, 32)
RESCORE_NS = 100_000.0
"""To read and score a clip's float embeddings, by local disk."""


@dataclass(frozen=True)
class Point:
    """What a plan found.

    Attributes
    ----------
    probes, candidates
        See `Plan`; 0 probes is scoring every code.
    rescored
        Clips scored again on their float embeddings.
    depth
        Results asked for.
    recall
        Mean share of the exact best ``depth`` clips.
    milliseconds
        Of one core for a query of 32 tokens, estimated from the tokens looked at.
    """

    probes: int
    candidates: int
    rescored: int
    depth: int
    recall: float
    milliseconds: float


def sample_queries(
    tokens: Tokens, token_of_clip: npt.NDArray[np.int64], count: int, seed: int
) -> list[tuple[int, Floats]]:
    """Return up to ``count`` clips, and of each a run of its tokens, (Tq, dim)."""
    rng = np.random.default_rng(seed)
    lengths = np.diff(token_of_clip)
    filled = np.flatnonzero(lengths)
    queries = []
    for clip in rng.choice(filled, min(count, len(filled)), replace=False):
        length = min(int(rng.integers(QUERY_TOKENS[0], QUERY_TOKENS[1] + 1)), int(lengths[clip]))
        first = token_of_clip[clip] + int(rng.integers(0, lengths[clip] - length + 1))
        queries.append((int(clip), tokens[first : first + length].astype(np.float32)))
    return queries


def calibrate(
    searcher: Searcher, tokens: Tokens, scorer: Scorer, seed: int, num_queries: int = NUM_QUERIES
) -> list[dict[str, Any]]:
    """Return the curve of an index: a `Point` for each plan and depth, as plain values.

    Parameters
    ----------
    tokens : (T, dim), float16 or float32
        What the searcher's clips were compressed from.
    """
    segment = searcher.segment
    drawn = sample_queries(tokens, segment.token_of_clip, num_queries, seed)
    if not drawn or segment.num_clips < 2:
        return []
    queries = [query for _, query in drawn]
    exact = _exact_scores(searcher, tokens, queries, scorer)
    everything = searcher.search(queries, segment.num_clips, EXHAUSTIVE, scorer)
    lengths = np.diff(segment.token_of_clip)
    recalls: dict[tuple[int, int, int, int], list[float]] = {}
    costs: dict[tuple[int, int], list[float]] = {}
    table_ns = searcher.codec.num_centroids * ROW_NS
    for (own, query), of_exact, (clips, scores) in zip(drawn, exact, everything, strict=True):
        by_codes = np.full(segment.num_clips, -np.inf, dtype=np.float32)
        by_codes[clips] = scores
        of_exact[own] = by_codes[own] = -np.inf
        best_first = np.argsort(-of_exact, kind="stable")
        best_first = best_first[np.isfinite(of_exact[best_first])]
        if not len(best_first):
            continue
        wanted = {depth: best_first[:depth] for depth in DEPTHS}
        ranked = {0: {0: clips[clips != own]}}
        costs.setdefault((0, 0), []).append(len(tokens) * FINE_NS)
        for probes in PROBES:
            order, met = searcher.candidates(query, probes, scorer)
            order = order[order != own]
            seen = np.cumsum(lengths[order])
            for count in CANDIDATES:
                kept = order[:count]
                ranked.setdefault(probes, {})[count] = kept[np.argsort(-by_codes[kept], kind="stable")]
                fine = seen[min(count, len(seen)) - 1] if len(seen) else 0
                costs.setdefault((probes, count), []).append(table_ns + met * COARSE_NS + fine * FINE_NS)
        for probes, by_count in ranked.items():
            for count, found in by_count.items():
                for depth, best in wanted.items():
                    for times in RESCORED:
                        kept = found[: max(1, times) * depth]
                        share = np.isin(best, kept).mean()
                        recalls.setdefault((probes, count, times * depth, depth), []).append(float(share))
    return [
        asdict(
            Point(
                probes,
                count,
                rescored,
                depth,
                round(float(np.mean(shares)), 4),
                round((float(np.mean(costs[probes, count])) + rescored * RESCORE_NS) / 1e6, 4),
            )
        )
        for (probes, count, rescored, depth), shares in recalls.items()
        if count == 0 or count >= 2 * depth
    ]


def _exact_scores(searcher: Searcher, tokens: Tokens, queries: Sequence[Floats], scorer: Scorer) -> Floats:
    segment = searcher.segment
    scores = np.empty((len(queries), segment.num_clips), dtype=np.float32)
    step = 256
    for first in range(0, segment.num_clips, step):
        last = min(first + step, segment.num_clips)
        runs = slice(segment.run_of_clip[first], segment.run_of_clip[last])
        block = tokens[segment.token_of_clip[first] : segment.token_of_clip[last]].astype(np.float32)
        scores[:, first:last] = score_clips(
            queries,
            block,
            segment.run_lengths[runs],
            segment.run_clip[runs] - first,
            segment.run_modality[runs],
            last - first,
            scorer,
        )
    return scores


def choose(curve: Sequence[Mapping[str, Any]], recall: float, k: int, growth: float = 1.0) -> tuple[Plan, int]:
    """Return the cheapest plan that reached a recall, and how many clips to rescore; else the one that came nearest.

    Parameters
    ----------
    curve
        From `calibrate`.
    k
        Results asked for.
    growth
        How many times more clips are searched together than were for the curve; candidates grow with it.
    """
    depth = next((d for d in DEPTHS if k <= d), DEPTHS[-1])
    points = [Point(**point) for point in curve if point["depth"] == depth]
    if not points:
        return EXHAUSTIVE, 0
    enough = [point for point in points if point.recall >= recall]
    best = (
        min(enough, key=lambda p: p.milliseconds) if enough else max(points, key=lambda p: (p.recall, -p.milliseconds))
    )
    candidates = int(np.ceil(best.candidates * max(1.0, growth) * max(1.0, k / depth)))
    return Plan(best.probes, candidates), int(np.ceil(best.rescored * k / depth))
