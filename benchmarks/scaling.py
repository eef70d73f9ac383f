"""How the cost of a search grows: with clips, with threads and with actors. A table and a picture.

    python benchmarks/scaling.py CORPUS --out DIR [--clips 10000,100000,1000000] [--tokens-per-clip 32]

Clips beyond those of the corpus (a folder that `benchmarks/corpus.py` made) are drawn with its statistics: the centroid
ids of a clip are those of a run of a real document, its scales and levels those of real tokens of the same centroid. Queries
are real. The time is of one query a call at a fixed plan; recall cannot be told of clips that were drawn.

Needs matplotlib for the picture.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import numpy as np

from operators.codec import ResidualCodec
from operators.kmeans import MAX_POINTS, num_centroids
from operators.maxsim import make_scorer
from operators.search import Plan, Searcher
from operators.segment import Segment

SUM = make_scorer("sum_maxsim", ["text"])
PLAN = Plan(4, 256)
K = 10


def drawn(segment: Segment, num_clips: int, length: int, seed: int = 0) -> Segment:
    """Return clips of real runs of tokens, each token's codes replaced by those of another of its centroid."""
    rng = np.random.default_rng(seed)
    first = rng.integers(0, len(segment.scales) - length, num_clips)
    ids = segment.centroid_ids[(first[:, None] + np.arange(length)).ravel()]
    order = np.argsort(segment.centroid_ids, kind="stable")
    bounds = np.searchsorted(segment.centroid_ids[order], np.arange(int(segment.centroid_ids.max()) + 2))
    counts = np.diff(bounds)[ids]
    twin = order[bounds[ids] + (rng.random(len(ids)) * counts).astype(np.int64)]
    return Segment(
        np.full(num_clips, length, np.int64),
        np.arange(num_clips),
        np.zeros(num_clips, np.uint8),
        ids,
        segment.scales[twin],
        segment.residuals[twin],
        num_clips,
    )


class Part:
    """A share of the clips, in an actor."""

    def __init__(self, segment: Segment, codec: ResidualCodec) -> None:
        self.searcher = Searcher([segment], codec)

    def search(self, queries: list[np.ndarray]) -> int:
        """Search one query after another."""
        return sum(len(self.searcher.search([query], K, PLAN, SUM)[0][0]) for query in queries)


def seconds_of(work) -> float:
    work()
    times = []
    for _ in range(3):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return float(np.median(times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--clips", default="10000,100000,1000000")
    parser.add_argument("--tokens-per-clip", type=int, default=32)
    parser.add_argument("--queries", type=int, default=64)
    given = parser.parse_args()
    tokens = np.load(given.corpus / "tokens.npy")
    lengths = np.load(given.corpus / "lengths.npy").astype(np.int64)
    ends = np.cumsum(np.load(given.corpus / "query_lengths.npy"))
    queries = np.split(np.load(given.corpus / "query_tokens.npy").astype(np.float32), ends[:-1])[: given.queries]
    rows = []
    for num_clips in map(int, given.clips.split(",")):
        total = num_clips * given.tokens_per_clip
        sample = tokens[np.sort(np.random.default_rng(0).permutation(len(tokens)))[: len(tokens)]]
        count = num_centroids(total, min(len(tokens), MAX_POINTS * num_centroids(total, total)))
        codec = ResidualCodec.train(sample, tokens[:50_000], 2, count, seed=0, num_threads=2)
        kept = np.searchsorted(np.cumsum(lengths), 1_000_000)
        real = Segment.build(
            tokens[: lengths[:kept].sum()], lengths[:kept], np.arange(kept), np.zeros(kept, np.uint8), kept, codec, 2
        )
        segment = drawn(real, num_clips, given.tokens_per_clip)
        searcher = Searcher([segment], codec)
        row = {"clips": num_clips, "tokens": total, "centroids": count}
        row["memory MB"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        for threads in (1, 2):
            seconds = seconds_of(lambda s=searcher, t=threads: s.search(queries, K, PLAN, SUM, num_threads=t))
            row[f"ms, {threads} thread(s)"] = round(1000 * seconds / len(queries), 3)
        row |= actors(segment, codec, queries)
        rows.append(row)
        print(row, flush=True)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "scaling.json").write_text(json.dumps(rows, indent=1))
    header = list(rows[0])
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(f"{row[name]:,}" for name in header) + " |")
    picture(rows, given.out / "scaling.png")


def actors(segment: Segment, codec: ResidualCodec, queries: list[np.ndarray]) -> dict[str, float]:
    """Return milliseconds a query with the clips spread over 1, 2 and 4 actors, the queries sent as one batch."""
    import ray

    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        found = {}
        for count in (1, 2, 4):
            bounds = np.linspace(0, segment.num_clips, count + 1).astype(int)
            held = [
                ray.remote(Part).options(num_cpus=1).remote(part(segment, a, b), codec)
                for a, b in zip(bounds[:-1], bounds[1:], strict=True)
            ]
            seconds = seconds_of(lambda h=held: ray.get([actor.search.remote(queries) for actor in h]))
            found[f"ms, {count} actor(s)"] = round(1000 * seconds / len(queries), 3)
            for actor in held:
                ray.kill(actor)
        return found
    finally:
        ray.shutdown()


def part(segment: Segment, first: int, last: int) -> Segment:
    a, b = segment.token_of_clip[first], segment.token_of_clip[last]
    return Segment(
        segment.run_lengths[first:last],
        segment.run_clip[first:last] - first,
        segment.run_modality[first:last],
        segment.centroid_ids[a:b],
        segment.scales[a:b],
        segment.residuals[a:b],
        last - first,
    )


def picture(rows: list[dict], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for name in (name for name in rows[0] if name.startswith("ms")):
        axes.plot([row["clips"] for row in rows], [row[name] for row in rows], marker="o", label=name[4:])
    axes.set(xscale="log", yscale="log", xlabel="clips", ylabel="milliseconds a query")
    axes.set_title(f"{PLAN.probes} probes, {PLAN.candidates} candidates, 2 bits")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()
