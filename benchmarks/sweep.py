"""A sweep of many settings over a large store, killed and resumed, against running each setting alone.

    python -m benchmarks.sweep FOLDER [--clips 200000] [--queries 500] [--kills 2] [--alone 3] [--seed 0]

Videos are of metadata only, a clip each, of words drawn by Zipf's law (`benchmarks/churn.py`); the ``lexical`` encoder
stands in for a model. A query is three words of a clip and one of another, and that clip is what it is to find. `maxreel
sweep` runs as a process of its own, is killed with SIGKILL when a random number of its files has appeared and a random
moment has passed, and is started again, until one ends by itself; what was finished before a kill must still be the same
file.

Then settings drawn at random are run alone, as a person would: ``maxreel build-index --full`` and ``maxreel evaluate``, with
the exact path (which measures recall, as the sweep does, but also every fusion baseline) and without. Their mean is taken
for that of all settings. Settings that pool tokens would have to encode the store again, too: none of these is drawn, and
what that would take is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

from benchmarks.churn import Corpus

ROOT = Path(__file__).parent.parent
GRID = {
    "encode.pool_tokens.metadata": [0, 8],
    "build_index.nbits": [1, 2, 4],
    "build_index.num_centroids": [1024, 4096],
    "search.probes": [1, 2, 4, 8],
    "search.candidates": [256, 1024],
}
BASE = {"search.rescored": 0}
SETTINGS = [
    "extract.modalities=[metadata]",
    "encode.encoder=lexical",
    "encode.resources.batch_clips=512",
    "encode.pool_tokens.metadata=0",
]


class Bench:
    """A store, queries, and commands on them."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.store, self.out = folder, folder / "store", folder / "sweep"
        self.questions = ["--queries", str(folder / "queries.jsonl"), "--qrels", str(folder / "qrels.txt")]

    def prepare(self, num_clips: int, num_queries: int, rng: random.Random) -> None:
        """Write corpus, queries, judgements and the sweep's file."""
        corpus = Corpus(num_clips)
        corpus.write(self.folder / "manifest.jsonl")
        texts = list(corpus.texts.items())
        with (self.folder / "queries.jsonl").open("w") as queries, (self.folder / "qrels.txt").open("w") as qrels:
            for number, (video_id, text) in enumerate(rng.sample(texts, num_queries)):
                words = [*rng.sample(text.split(), 3), rng.choice(rng.choice(texts)[1].split())]
                queries.write(json.dumps({"id": f"q{number}", "text": " ".join(words)}) + "\n")
                qrels.write(f"q{number} 0 {video_id} 1\n")
        (self.folder / "sweep.yaml").write_text(yaml.safe_dump({"base": BASE, "grid": GRID}, sort_keys=False))

    def start(self, command: str, *arguments: str) -> subprocess.Popen[bytes]:
        """Start a command."""
        settings = [word for setting in SETTINGS for word in ("--set", setting)]
        line = [sys.executable, "-m", "pipelines", command, *arguments, "--store", str(self.store), *settings, "-q"]
        return subprocess.Popen(line, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL)

    def timed(self, command: str, *arguments: str) -> float:
        """Run a command and return how many seconds it took."""
        began = time.perf_counter()
        if code := self.start(command, *arguments).wait():
            sys.exit(f"maxreel {command} {' '.join(arguments)} ended with code {code}")
        return time.perf_counter() - began

    def sweep(self) -> subprocess.Popen[bytes]:
        """Start the sweep, or go on with it."""
        return self.start("sweep", str(self.folder / "sweep.yaml"), *self.questions, "--out", str(self.out))

    def finished(self, *kinds: str) -> dict[Path, int]:
        """Return the files of what is finished, and when each was written."""
        return {path: path.stat().st_mtime_ns for kind in kinds for path in (self.out / kind).glob("*.json")}


def kill_at_random(bench: Bench, rng: random.Random, num_cells: int) -> None:
    """Run the sweep until it is killed, after some more files than there were; a cell makes two, one after the other."""
    began, process = time.perf_counter(), bench.sweep()
    left = 2 * num_cells - len(bench.finished("quality", "cells"))
    wanted = 2 * num_cells - left + rng.randrange(left // 2)
    while process.poll() is None and len(bench.finished("quality", "cells")) < wanted:
        time.sleep(0.05)
    time.sleep(rng.uniform(0, 5))
    process.send_signal(signal.SIGKILL)
    process.wait()
    print(
        f"killed after {time.perf_counter() - began:.0f} s, {len(bench.finished('quality'))} of {num_cells} cells "
        f"searched and {len(bench.finished('cells'))} timed",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--clips", type=int, default=200_000)
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--alone", type=int, default=3, help="settings that are run alone")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng, bench = random.Random(arguments.seed), Bench(arguments.folder)
    num_cells = 1
    for values in GRID.values():
        num_cells *= len(values)
    bench.prepare(arguments.clips, arguments.queries, rng)
    seconds = bench.timed("index", str(arguments.folder / "manifest.jsonl"))
    print(f"indexed {arguments.clips} clips in {seconds:.0f} s", flush=True)

    began = time.perf_counter()
    for _ in range(arguments.kills):
        kill_at_random(bench, rng, num_cells)
    before = bench.finished("cells", "quality", "exact")
    if code := bench.sweep().wait():
        sys.exit(f"the sweep ended with code {code}")
    swept = time.perf_counter() - began
    if not before.items() <= bench.finished("cells", "quality", "exact").items():
        sys.exit("what was finished before a kill was made again")
    result = json.loads((bench.out / "sweep.json").read_text())
    reused = ", ".join(f"{number} {name.replace('_', ' ')}" for name, number in result["reused"].items())
    print(f"swept in {swept:.0f} s with {arguments.kills} kills: {reused}", flush=True)

    alone = []
    drawn = [cell for cell in result["cells"] if not cell["settings"]["encode.pool_tokens.metadata"]]
    for cell in rng.sample(drawn, arguments.alone):
        settings = [word for name, value in (BASE | cell["settings"]).items() for word in ("--set", f"{name}={value}")]
        build = bench.timed("build-index", "--full", *settings)
        whole = bench.timed("evaluate", *bench.questions, *settings)
        short = bench.timed("evaluate", *bench.questions, *settings, "--set", "evaluate.compare_exact=false")
        alone.append((build + whole, build + short))
        print(f"alone {cell['settings']}: build {build:.0f} s, evaluate {whole:.0f} s, or {short:.0f} s", flush=True)
    for kind, times in zip(("with the exact path", "without"), zip(*alone, strict=True), strict=False):
        estimate = sum(times) / len(times) * num_cells
        print(f"all {num_cells} alone, {kind}: {estimate:.0f} s by {len(times)} of them, {estimate / swept:.1f} times")


if __name__ == "__main__":
    main()
