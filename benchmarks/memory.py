"""Whether memory stays flat over a long run: the resident size of the driver and of each actor, first against last.

    python benchmarks/memory.py MANIFEST [--repeat 20] [--set a.b=c ...]

Lists the corpus ``--repeat`` times under new ids, extracts frames and metadata only (decoding is what leaks, if anything
does), and samples the resident memory of the driver, of every Ray actor and of every decoder process twice a second.
Prints, for each process that lived through most of the run, the median of its second and of its last fifth.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path

from pipelines import manifest as manifests
from pipelines.config import load
from pipelines.extract import extract
from pipelines.ingest import ingest
from pipelines.job import open_job

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
SAMPLE_SECONDS = 0.5


def sample(stop: threading.Event, sizes: dict[int, list[tuple[float, float]]], names: dict[int, str]) -> None:
    while not stop.wait(SAMPLE_SECONDS):
        for process in Path("/proc").glob("[0-9]*"):
            try:
                name = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                pages = int((process / "statm").read_text().split()[1])
            except (OSError, IndexError):
                continue
            pid = int(process.name)
            if pid == os.getpid():
                name = "driver"
            is_decoder = "operators.decode_child" in name
            if name == "driver" or is_decoder or name.startswith("ray::"):
                if pid not in names or name.startswith("ray::MapWorker"):  # a worker's title changes with its work
                    names[pid] = "decoder process" if is_decoder else name
                sizes[pid].append((time.monotonic(), pages * PAGE_BYTES / 1e6))


def repeated(source: str, target: Path, times: int) -> None:
    entries = [entry for chunk in manifests.read(source, "stat", 1000) for entry in chunk]
    with target.open("w") as stream:
        for n in range(times):
            for entry in entries:
                row = {"video_id": f"{entry.video_id}~{n}", "uri": entry.uri, "title": entry.title}
                stream.write(json.dumps(row) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest")
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--set", action="append", default=[], dest="assignments", metavar="A.B=C")
    arguments = parser.parse_args()
    sizes: dict[int, list[tuple[float, float]]] = defaultdict(list)
    names: dict[int, str] = {}
    stop = threading.Event()
    sampler = threading.Thread(target=sample, args=(stop, sizes, names))
    with tempfile.TemporaryDirectory() as folder:
        long = Path(folder, "long.jsonl")
        repeated(arguments.manifest, long, arguments.repeat)
        assignments = ["extract.modalities=[frame,metadata]", *arguments.assignments]
        with open_job(load([], assignments, f"{folder}/store"), "extract") as job:
            ingest(job, str(long))
            sampler.start()
            started = time.monotonic()
            extract(job)
            stop.set()
            sampler.join()
        total = time.monotonic() - started
    print(f"{job.summary.counts['extract']} videos in {total:.0f} s")
    print(f"{'process':45} {'2nd fifth':>10} {'last fifth':>11} {'ratio':>6}   (MB resident)")
    for pid, points in sorted(sizes.items(), key=lambda item: names[item[0]]):
        name = names[pid]
        early = [size for at, size in points if 0.2 <= (at - started) / total < 0.4]
        late = [size for at, size in points if (at - started) / total >= 0.8]
        if not early or not late:
            continue  # did not live through most of the run
        first, last = statistics.median(early), statistics.median(late)
        print(f"{name:45} {first:10.0f} {last:11.0f} {last / first:6.2f}")


if __name__ == "__main__":
    main()
