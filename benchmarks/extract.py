"""How close extract comes to the machine: wall time against CPU seconds over cores, and against a plain loop.

    python benchmarks/extract.py MANIFEST [--set a.b=c ...]

Runs ingest and extract into a temporary store, then the same operators over the same videos in one process, one after
another. Prints

- start-up: what extract takes for the shortest video alone, less the work of that video (actors and models are loaded);
- wall / (CPU seconds of the operators / cores), start-up aside: 1 is the physical limit, 1.25 our target;
- the loop's wall time over extract's, start-up aside: at most the number of cores.

Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time

import pyarrow as pa

from cluster.session import session
from cluster.store import VIDEOS, Store
from pipelines.config import Config, load
from pipelines.extract import Fingerprints, extract, operators, plan, read_videos
from pipelines.ingest import ingest
from pipelines.job import Job, open_job

STAGES = ("decode", "speech", "screen_text")


def run_extract(manifest: str, store: str, assignments: list[str], only: str | None = None) -> Job:
    with open_job(load([], assignments, store), "extract") as job:
        ingest(job, manifest)
        if only:
            others = job.store.open(VIDEOS).scanner(columns=["video_id"], with_row_id=True).to_table().to_pylist()
            job.store.delete_rows(VIDEOS, [row["_rowid"] for row in others if row["video_id"] != only])
        extract(job)
    return job


def run_loop(config: Config, store: Store) -> float:
    work = plan(store, config.extract, Fingerprints(config.extract), no_quarantine()).rows
    videos = read_videos(work, store, store.open(VIDEOS).version)
    decode, *others = [operator(**parameters) for _, operator, parameters in operators(config.extract)]
    started = time.perf_counter()
    for index in range(videos.num_rows):
        for clip in decode(videos.slice(index, 1)):
            for operator in others:
                clip = operator(clip)
            assert isinstance(clip, pa.Table)
    return time.perf_counter() - started


def no_quarantine():
    from cluster.freshness import Quarantine

    return Quarantine({}, max_attempts=1, wait_seconds=0)


def shortest(store: Store) -> str:
    rows = store.open(VIDEOS).to_table(columns=["video_id", "duration_seconds"]).to_pylist()
    return str(
        min((row for row in rows if row["duration_seconds"]), key=lambda row: row["duration_seconds"])["video_id"]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest")
    parser.add_argument("--set", action="append", default=[], dest="assignments", metavar="A.B=C")
    arguments = parser.parse_args()
    cores = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as folder, session(None, cores, 1_000_000_000, 900):
        job = run_extract(arguments.manifest, f"{folder}/all", arguments.assignments)
        one = run_extract(arguments.manifest, f"{folder}/one", arguments.assignments, only=shortest(job.store))
        empty = Store.at(f"{folder}/empty")
        with open_job(load([], arguments.assignments, empty.uri), "ingest") as ingested:
            ingest(ingested, arguments.manifest)
        loop = run_loop(load([], arguments.assignments, empty.uri), empty)
    busy = {name: cost for name, cost in job.summary.stages.items() if name in STAGES}
    startup = one.summary.seconds["extract"] - sum(one.summary.stages[name].seconds for name in busy)
    wall = job.summary.seconds["extract"] - startup
    limit = sum(cost.cpu_seconds for cost in busy.values()) / cores
    for name, cost in busy.items():
        print(f"{name:12} {cost.rows:5} clips  {cost.cpu_seconds:8.1f} CPU s  {job.summary.actors[name]} actors")
    print(f"start-up     {startup:.1f} s")
    print(f"extract      {wall:.1f} s on {cores} cores; limit {limit:.1f} s; ratio {wall / limit:.2f}")
    print(f"plain loop   {loop:.1f} s; {loop / wall:.2f} times as long")


if __name__ == "__main__":
    main()
