"""What a night costs against what changed: ten nights of churn on a large store. Prints a table, a night a row.

    python benchmarks/churn.py FOLDER [--clips 200000] [--nights 10] [--fresh-every 1]

Each night 2 % of the videos are new, 1 % changed and 1 % gone, and `pipelines.nightly` runs as `maxreel nightly` does, with
its gates and its garbage collection. Videos are of metadata only, a clip each, of words drawn by Zipf's law; the `lexical`
encoder stands in for a model (a word a token, 64 dimensions). ``gate`` is the recall that the night's gate measured: queries
drawn from clips, over a sample of the videos. After every ``--fresh-every`` nights an index is built from nothing of the
same token embeddings, and it and the grown one are asked the same new queries at the same search settings: the share of
the exact first ten that each finds, exact being the scores of every token embedding.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np

from cluster.session import session
from cluster.shards import plan_shards
from operators.encoders import Query
from pipelines.build_index import update_index
from pipelines.config import Config, load
from pipelines.evaluate import open_fleet, overlap, search_all, search_fleet
from pipelines.job import Job, open_job
from pipelines.nightly import nightly
from pipelines.release import open_release

NEW, CHANGED, GONE = 0.02, 0.01, 0.01
NUM_WORDS = 50_000
WORDS_EACH = (8, 24)
NUM_QUERIES = 64
STEPS = ("ingest", "extract", "encode", "update index", "gates", "gc")


class Corpus:
    """Videos of words, changed from night to night."""

    def __init__(self, num_videos: int) -> None:
        self.rng = np.random.default_rng(0)
        weights = 1 / np.arange(10, NUM_WORDS + 10)
        self.chances = np.cumsum(weights / weights.sum())
        self.made = 0
        self.texts: dict[str, str] = {}
        self.add(num_videos)

    def add(self, count: int) -> None:
        """Make videos."""
        self.texts |= {f"v{self.made + i:08d}": text for i, text in enumerate(self.draw(count))}
        self.made += count

    def draw(self, count: int) -> list[str]:
        """Return texts."""
        lengths = self.rng.integers(*WORDS_EACH, count)
        words = np.searchsorted(self.chances, self.rng.random(int(lengths.sum())))
        return [" ".join(f"w{w}" for w in part) for part in np.split(words, np.cumsum(lengths)[:-1])]

    def churn(self, num_videos: int) -> None:
        """Take away, change and add."""
        gone, changed, new = (int(share * num_videos) for share in (GONE, CHANGED, NEW))
        chosen = self.rng.choice(list(self.texts), gone + changed, replace=False).tolist()
        for video_id in chosen[:gone]:
            del self.texts[video_id]
        self.texts |= dict(zip(chosen[gone:], self.draw(changed), strict=True))
        self.add(new)

    def write(self, path: Path) -> None:
        """Write the manifest."""
        with path.open("w") as stream:
            for video_id, text in self.texts.items():
                stream.write(json.dumps({"video_id": video_id, "title": text}) + "\n")


def recalls(config: Config, queries: list[str], releases: list[int], job: Job) -> list[float]:
    """Return the share of the exact first ten that each of some releases of the same token embeddings finds."""
    opened = [open_release(job.store, release_id) for release_id in releases]
    embedded = opened[0].load_encoder(1).encode_queries([Query(text=text) for text in queries])
    shards = plan_shards(job.store, opened[0].token_table, opened[0].manifest["version"], 1_000_000)
    exact = search_all(config, job.store, opened[0], shards, embedded, 10)
    return [overlap(search_fleet(config, open_fleet(config, job.store, r), embedded, 10), exact, 10) for r in opened]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--clips", type=int, default=200_000)
    parser.add_argument("--nights", type=int, default=10)
    parser.add_argument("--fresh-every", type=int, default=1, help="nights between indices built from nothing")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    manifest, store = arguments.folder / "manifest.jsonl", arguments.folder / "store"
    settings = [
        f"manifest={manifest}",
        "extract.modalities=[metadata]",
        "encode.encoder=lexical",
        "encode.resources.batch_clips=512",
        "gc.keep_releases=2",
        "gc.keep_hours=0",
    ]
    config = load([], settings, str(store))
    corpus = Corpus(arguments.clips)
    columns = [
        "night",
        "clips",
        "new/changed/gone",
        *STEPS,
        "seconds",
        "segments",
        "dead",
        "drift",
        "gate",
        "grown",
        "fresh",
        "MB",
    ]
    print(" | ".join(columns), flush=True)
    ray = config.ray
    with session(ray.address, ray.num_cpus, ray.object_store_bytes, ray.no_progress_seconds):
        for night in range(arguments.nights + 1):
            if night:
                corpus.churn(arguments.clips)
            corpus.write(manifest)
            started = time.perf_counter()
            with open_job(config, "nightly") as job:
                nightly(job)
            seconds = time.perf_counter() - started
            megabytes = sum(file.stat().st_size for file in store.rglob("*") if file.is_file()) / 1e6
            summary, found = job.summary, [float("nan")] * 2
            made = summary.index or {}
            if night and night % arguments.fresh_every == 0:
                live = open_release(job.store).release_id
                with open_job(config, "fresh") as other:
                    fresh = update_index(other, full=True)
                    found = recalls(config, corpus.draw(NUM_QUERIES), [live, fresh], other)
            counts = summary.counts
            cells = [
                f"{night}",
                f"{made['clips']}",
                f"{counts['new']}/{counts['changed']}/{counts['gone']}",
                *(f"{summary.seconds.get(step, 0):.1f}" for step in STEPS),
                f"{seconds:.1f}",
                f"{made['segments']}",
                f"{made['dead_clips']}",
                "" if made["drift"] is None else f"{made['drift']:+.1%}",
                next((f"{gate['value']:.3f}" for gate in summary.gates if gate["name"] == "recall"), ""),
                *(f"{value:.3f}" for value in found),
                f"{megabytes:.0f}",
            ]
            print(" | ".join(cells), flush=True)


if __name__ == "__main__":
    main()
