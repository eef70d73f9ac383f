"""One engine in a process of its own, for `benchmarks/engines.py`: JSON lines in on stdin, out on stdout.

    python worker.py fast_plaid_engine CORPUS FOLDER THREADS

``{"do": "build", "options": {...}}``, ``{"do": "load", "package": name}``, ``{"do": "search", "settings": {...}, "k": 100,
"queries": [...], "out": file}`` and ``{"do": "machine"}`` are answered with what was measured, or with ``{"error": text}``.
Runs in each engine's own environment, so it needs NumPy and nothing else.

An engine is a module beside this one with two functions: ``build(corpus, folder, threads, **options)``, which writes an
index, and ``load(corpus, folder, threads)``, which returns ``search(query, k, **settings)``: (Tq, dim) float32 to the
numbers of the best documents, best first. What lies in a folder called the module's ``VECTORS_FOLDER``, where it has
one, is counted apart from the index.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Corpus:
    """Token embeddings in a folder, read when they are wanted."""

    folder: Path

    @cached_property
    def tokens(self) -> np.ndarray:
        """(T, dim), float16, mapped."""
        return np.load(self.folder / "tokens.npy", mmap_mode="r")

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, (D,)."""
        return np.load(self.folder / "lengths.npy").astype(np.int64)

    @cached_property
    def starts(self) -> np.ndarray:
        """First token of each document, (D,)."""
        return np.cumsum(self.lengths) - self.lengths

    @cached_property
    def queries(self) -> list[np.ndarray]:
        """(Tq, dim), float32, each."""
        ends = np.cumsum(np.load(self.folder / "query_lengths.npy"))
        return np.split(np.load(self.folder / "query_tokens.npy").astype(np.float32), ends[:-1])

    def documents(self) -> list[np.ndarray]:
        """(Td, dim), float16, each, in memory."""
        return np.split(np.array(self.tokens), self.starts[1:])


class Worker:
    """Answers requests; what it measures is this process and its threads and children."""

    def __init__(self, module: str, corpus: Path, folder: Path, threads: int) -> None:
        self.module, self.corpus, self.folder, self.threads = module, Corpus(corpus), folder, threads
        self.search_one: Callable[..., list[int]] | None = None

    def build(self, options: dict) -> dict:
        """Build an index; importing the engine is not counted, reading the corpus is."""
        engine = self._engine()
        self.folder.mkdir(parents=True, exist_ok=True)
        began, cpu = time.perf_counter(), cpu_seconds()
        engine.build(self.corpus, str(self.folder), self.threads, **options)
        wall, cpu = time.perf_counter() - began, cpu_seconds() - cpu
        files = {f: f.stat().st_size for f in self.folder.rglob("*") if f.is_file()}
        apart = getattr(engine, "VECTORS_FOLDER", None)
        vectors = sum(size for f, size in files.items() if apart in f.relative_to(self.folder).parts)
        return {
            "wall_seconds": wall,
            "cpu_seconds": cpu,
            "peak_bytes": memory("VmHWM"),
            "index_bytes": sum(files.values()) - vectors,
            "vectors_bytes": vectors,
        }

    def load(self, package: str) -> dict:
        """Start-up is everything from importing the engine to its first answer."""
        query = self.corpus.queries[0]
        began = time.perf_counter()
        self.search_one = self._engine().load(self.corpus, str(self.folder), self.threads)
        loaded = time.perf_counter() - began
        rss = memory("VmRSS")
        self.search_one(query, 10)
        seconds = time.perf_counter() - began
        version = importlib.metadata.version(package) if package else ""
        return {"load_seconds": loaded, "start_seconds": seconds, "loaded_bytes": rss, "version": version}

    def search(self, settings: dict, k: int, queries: list[int], out: str) -> dict:
        """One query a call, after one that is not timed."""
        assert self.search_one is not None, "load comes before search"
        chosen = [self.corpus.queries[q] for q in queries]
        settings = {"k": k, **settings}
        self.search_one(chosen[0], **settings)
        found = np.full((len(chosen), k), -1, np.int64)
        walls = np.empty(len(chosen))
        cpu = cpu_seconds()
        for i, query in enumerate(chosen):
            began = time.perf_counter()
            best = self.search_one(query, **settings)
            walls[i] = time.perf_counter() - began
            found[i, : len(best)] = best
        cpu = (cpu_seconds() - cpu) / len(chosen)
        np.savez(out, queries=np.array(queries), found=found)
        return {
            "cpu_seconds": cpu,
            "wall_seconds": float(walls.mean()),
            "p50_seconds": float(np.median(walls)),
            "rss_bytes": memory("VmRSS"),
            "peak_bytes": memory("VmHWM"),
        }

    def machine(self) -> dict:
        """Not an engine's work: what the machine itself can do."""
        return importlib.import_module("machine").measure(self.threads)

    def _engine(self):
        engine = importlib.import_module(self.module)
        if torch := sys.modules.get("torch"):
            torch.set_num_threads(self.threads)
        return engine


def cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def memory(field: str) -> int:
    """Return a size in /proc/self/status in bytes: VmRSS is resident now, VmHWM its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    return 0


def main() -> None:
    module, corpus, folder, threads = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not get between the answers
    worker = Worker(module, Path(corpus), Path(folder), int(threads))
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(worker, request.pop("do"))(**request)
        except Exception as error:  # an engine's failure is a row of the report
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
