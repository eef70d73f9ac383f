"""Does the cells of a sweep that are missing, with Ray; what is finished is a file by its fingerprint.

``work`` is a store of its own: it holds pooled tokens and indices, and its lease keeps two sweeps apart. Below OUT are
``trained/`` (centroids), ``curves/`` (recall by plan), ``exact/`` (rankings), ``quality/`` (a cell that is yet to be timed)
and ``cells/``. As many indices are in memory at a time as there are cores.
"""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from cluster.exact import search_exactly
from cluster.index_store import find_manifest, num_bytes, write_manifest
from cluster.searchers import Hit, SearchOptions, SegmentHolder, merge, spread
from cluster.session import Pool, check_schedule, cluster_resources
from cluster.shards import clip_rows, cut
from cluster.store import Store
from operators.encoders import Floats
from operators.errors import without_credentials
from operators.maxsim import Scorer
from pipelines import leaderboard
from pipelines.build_index import Trained, build_from_nothing, calibrate_segments, train
from pipelines.config import SearchConfig
from pipelines.encode import ENCODERS
from pipelines.evaluate import RECALL_DEPTH, overlap
from pipelines.pooled_tokens import pool_table
from pipelines.progress import Progress
from pipelines.queries import encode_queries
from pipelines.runs import scores_of
from pipelines.search import scorer_of, search_options
from pipelines.sweep_plan import Asked, Placed

log = logging.getLogger("maxreel")

TIMED_QUERIES = 100
WARM_UP_QUERIES = 10

Json = dict[str, Any]
Made = TypeVar("Made")


def path_of(folder: Path, kind: str, name: str) -> Path:
    """Return where something finished is kept."""
    return folder / kind / f"{name}.json"


def read(path: Path) -> Any:
    """Return what was kept, or None."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def keep(path: Path, content: str) -> None:
    """Write a file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(content, encoding="utf-8")
    part.replace(path)


@dataclass(frozen=True, eq=False)
class _Tokens:
    """Token embeddings that indices are made from, in a store that takes the indices."""

    store: Store
    table: str
    version: int
    rows: pa.Table

    @cached_property
    def num_videos(self) -> int:
        return int(pc.count_distinct(self.rows["video_id"]).as_py())


class _Once:
    """Makes each thing once, whichever thread asks first; the others wait for it."""

    def __init__(self) -> None:
        self._lock, self._made = threading.Lock(), dict[str, Future[Any]]()

    def __call__(self, key: str, make: Callable[[], Made]) -> Made:
        with self._lock:
            is_first = key not in self._made
            future: Future[Made] = self._made.setdefault(key, Future())
        if is_first:
            try:
                future.set_result(make())
            except BaseException as error:  # whoever shares it fails of it, and must not wait for ever
                future.set_exception(error)
        return future.result()


class Work:
    """Finishes cells. Threads of the driver wait for tasks; each works on one index at a time.

    Parameters
    ----------
    store
        Whose token embeddings are swept.
    work
        Where pooled tokens and indices go.
    folder
        Where all else goes.
    shard_tokens
        Scored or pooled by a task.
    """

    def __init__(self, store: Store, work: Store, folder: Path, asked: Asked, shard_tokens: int) -> None:
        self._store, self._work, self._folder, self._asked = store, work, folder, asked
        self._shard_tokens = shard_tokens
        self._once, self._training, self._stopped = _Once(), threading.Lock(), threading.Event()
        self._scorers: dict[str, dict[str, Scorer]] = defaultdict(dict)

    def do(self, missing: Sequence[Placed]) -> None:
        """Finish cells, or write down why not."""
        for p in missing:
            if p.exact:
                self._scorers[p.tokens][p.exact] = scorer_of(p.cell.config.search)
        errors = self._rate_all([p for p in missing if not path_of(self._folder, "quality", p.fingerprint).exists()])
        with Progress("sweep: time", len(missing) - len(errors)) as progress:
            for group in _by_holder(p for p in missing if p.fingerprint not in errors):
                errors |= self._time(group, progress)
        for p in missing:
            if p.fingerprint in errors:
                self._keep_cell(p, {"error": errors[p.fingerprint]})

    def _rate_all(self, missing: Sequence[Placed]) -> dict[str, str]:
        """Measure quality, of several indices at a time, and return what failed."""
        if not missing:
            return {}
        cores, groups, errors = max(1, int(cluster_resources()["CPU"])), _by_holder(missing), dict[str, str]()
        # Where there are fewer indices than cores, several processes search one.
        parts_each = math.ceil(cores / max(1, len(groups)))
        parts = [group[i::parts_each] for group in groups for i in range(parts_each) if group[i::parts_each]]
        threads = ThreadPoolExecutor(cores + 1, "sweep")
        try:
            with Progress("sweep: search", len(missing)) as progress:
                for done in as_completed([threads.submit(self._rate, part, progress) for part in parts]):
                    errors |= done.result()
        except BaseException:
            self._stopped.set()
            raise
        finally:
            # What is being made is finished, for it belongs to whoever holds the lease.
            threads.shutdown(cancel_futures=True)
        return errors

    def _rate(self, cells: Sequence[Placed], progress: Progress) -> dict[str, str]:
        def start() -> Any:
            exact = {p.exact: self._exact(p) for p in cells if p.exact}
            jobs = [(p.fingerprint, self._options(p), p.exact) for p in cells]
            return self._task(_search_cells, cells[0]).remote(
                self._holder(cells[0]), jobs, self._queries(cells[0]), exact, self._asked
            )

        def finish(p: Placed, outcome: Json) -> None:
            self._check()
            keep(path_of(self._folder, "quality", p.fingerprint), json.dumps(outcome))
            progress.advance(1)

        return _receive(cells, start, finish)

    def _time(self, cells: Sequence[Placed], progress: Progress) -> dict[str, str]:
        def start() -> Any:
            jobs = [(p.fingerprint, self._options(p)) for p in cells]
            queries = self._queries(cells[0])
            return self._task(_time_cells, cells[0]).remote(
                self._holder(cells[0]), jobs, queries, self._asked.batch_queries
            )

        def finish(p: Placed, outcome: Json) -> None:
            manifest, num_videos = self._manifest(p), self._tokens(p).num_videos
            outcome["bytes_per_video"] = num_bytes(self._work, manifest) / num_videos
            outcome["tokens_per_video"] = manifest["num_tokens"] / num_videos
            quality = read(path_of(self._folder, "quality", p.fingerprint))
            self._keep_cell(p, quality | outcome | {"error": None})
            progress.advance(1)

        return _receive(cells, start, finish)

    def _keep_cell(self, p: Placed, outcome: Json) -> None:
        cell = {"id": p.fingerprint[:12], "settings": p.cell.settings} | outcome
        keep(path_of(self._folder, "cells", p.fingerprint), json.dumps(cell, indent=1) + "\n")

    def _check(self) -> None:
        """Raise CancelledError once the sweep was interrupted."""
        if self._stopped.is_set():
            raise CancelledError

    def _options(self, p: Placed) -> SearchOptions:
        return search_options(p.cell.config.search, self._asked.depth)

    def _task(self, function: Callable[..., Any], p: Placed) -> Any:
        num_gpus = 0.0 if p.cell.config.search.device == "cpu" else 1.0
        check_schedule([Pool("search", 1, 1, num_gpus)], 0, cluster_resources())
        return ray.remote(function).options(num_cpus=1, num_gpus=num_gpus, num_returns="streaming", max_retries=1)

    def _holder(self, p: Placed) -> tuple[Any, ...]:
        """Return what a `SegmentHolder` of all of the cell's index takes."""
        manifest, search = self._manifest(p), p.cell.config.search
        if _needs_curve(search):
            manifest = manifest | {"curve": self._curve(p)}
        [segments] = spread(manifest["segments"], 1)  # in the order of a fleet: of clips that tie the first is found
        return self._tokens(p).store, manifest, segments, search.codes_on_disk, search.device

    def _tokens(self, p: Placed) -> _Tokens:
        def make() -> _Tokens:
            stored = p.stored
            if not p.budgets:
                store = replace(self._work, tables_of=self._store.uri)
                return _Tokens(store, stored.table, stored.version, stored.rows)
            name, size = f"{stored.table}_{p.tokens}", self._shard_tokens
            if self._work.open_or_none(name) is None:
                pool_table(self._store, stored.table, stored.version, stored.rows, p.budgets, self._work, name, size)
            version = self._work.open(name).version
            return _Tokens(self._work, name, version, clip_rows(self._work, name, version))

        return self._once(f"tokens {p.tokens}", make)

    def _manifest(self, p: Placed) -> Json:
        def make() -> Json:
            if (known := find_manifest(self._work, p.index)) is not None:
                return known
            self._check()
            started, tokens, build = time.perf_counter(), self._tokens(p), p.cell.config.build_index
            table = tokens.rows, tokens.table, tokens.version
            trained = self._trained(p)
            made = build_from_nothing(tokens.store, build, *table, p.index, trained, progress=None, calibrated=False)
            write_manifest(self._work, p.index, made)
            log.info("sweep: made index %s in %.0f s", p.index[:12], time.perf_counter() - started)
            return made

        return self._once(f"index {p.index}", make)

    def _curve(self, p: Placed) -> Json:
        """Return what turns a recall into a plan; it is measured apart from the index, for many cells name their plan."""
        path = path_of(self._folder, "curves", p.index)

        def make() -> None:
            if not path.exists():
                self._check()
                tokens, manifest, build = self._tokens(p), self._manifest(p), p.cell.config.build_index
                shards, segments = cut(tokens.rows, build.segment_tokens), manifest["segments"]
                table = tokens.table, tokens.version, manifest["codec"]
                keep(path, json.dumps(calibrate_segments(tokens.store, build, shards, segments, *table)))

        self._once(f"curve {p.index}", make)
        curve: Json = read(path)
        return curve

    def _trained(self, p: Placed) -> Trained:
        path = self._folder / "trained" / f"{p.trained}.npz"

        def make() -> None:
            if path.exists():
                return
            tokens, build = self._tokens(p), p.cell.config.build_index
            shards = cut(tokens.rows, build.segment_tokens)
            with self._training:
                centroids, heldout = train(tokens.store, build, shards, tokens.table, tokens.version)
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part.npz")
            np.savez(part, centroids=centroids, heldout=heldout)
            part.replace(path)

        self._once(f"trained {p.trained}", make)
        with np.load(path) as arrays:
            return arrays["centroids"], arrays["heldout"]

    def _exact(self, p: Placed) -> list[list[Hit]]:
        """Return the first videos of each query by every token embedding; one pass is for all scorers of the tokens."""

        def make() -> None:
            lacking = {
                n: s for n, s in self._scorers[p.tokens].items() if not path_of(self._folder, "exact", n).exists()
            }
            if not lacking:
                return
            tokens, queries, step = self._tokens(p), ray.get(self._queries(p)), self._asked.batch_queries
            shards, cores = cut(tokens.rows, self._shard_tokens), max(1, int(cluster_resources()["CPU"]))
            table, scorers, pools = (tokens.store, tokens.table, tokens.version), list(lacking.values()), list[Any]()
            for first in range(0, len(queries), step):
                batch = queries[first : first + step]
                pools += search_exactly(*table, shards, batch, RECALL_DEPTH, scorers, num_cpus=cores)[0]
            for number, name in enumerate(lacking):
                found = [pool.best(number, RECALL_DEPTH) for pool in pools]
                keep(path_of(self._folder, "exact", name), json.dumps(found))

        self._once(f"exact {p.tokens}", make)
        found = read(path_of(self._folder, "exact", p.exact))
        return [[Hit(*hit) for hit in of_query] for of_query in found]

    def _queries(self, p: Placed) -> Any:
        """Return a reference to the encoded queries."""

        def make() -> Any:
            encode = p.stored.encode
            encoder = ENCODERS[encode.encoder](**encode.parameters() | {"num_threads": os.cpu_count() or 1})
            return ray.put(encode_queries(encoder, self._asked.queries, p.cell.config.storage.environment()))

        return self._once(f"queries {p.stored.table}", make)


def _by_holder(cells: Iterable[Placed]) -> list[list[Placed]]:
    """Return cells in groups that one holder of an index can search."""
    groups: dict[tuple[Any, ...], list[Placed]] = defaultdict(list)
    for p in cells:
        search = p.cell.config.search
        groups[p.index, search.codes_on_disk, search.device, _needs_curve(search)].append(p)
    return list(groups.values())


def _needs_curve(search: SearchConfig) -> bool:
    return None in (search.probes, search.candidates, search.rescored)


def _receive(
    cells: Sequence[Placed], start: Callable[[], Any], finish: Callable[[Placed, Json], None]
) -> dict[str, str]:
    """Finish each cell with what a task yields for it, and return why others failed, by fingerprint."""
    left, errors = {p.fingerprint: p for p in cells}, dict[str, str]()
    try:
        for reference in start():
            name, outcome = ray.get(reference)
            if "error" in outcome:
                errors[name] = outcome["error"]
            else:
                finish(left[name], outcome)
            del left[name]
    except Exception as error:  # the boundary of cells: what these share failed, or their process died
        log.debug("cells of a sweep failed", exc_info=True)
        errors |= dict.fromkeys(left, _said(error))
    return errors


def _said(error: Exception) -> str:
    cause = getattr(error, "cause", None) or error  # a Ray task's error carries what was raised
    return without_credentials(f"{type(cause).__name__}: {cause}".strip())


def _search_cells(
    holder_of: tuple[Any, ...],
    jobs: Sequence[tuple[str, SearchOptions, str]],
    queries: Sequence[Floats],
    exact: Mapping[str, list[list[Hit]]],
    asked: Asked,
) -> Iterator[tuple[str, Json]]:
    """Yield the quality of cells of one index. A Ray task."""
    holder = SegmentHolder(*holder_of)
    for name, options, oracle in jobs:
        try:
            yield name, _quality(holder, options, queries, exact.get(oracle), asked)
        except Exception as error:  # the boundary of a cell: the others go on
            yield name, {"error": _said(error)}


def _quality(
    holder: SegmentHolder,
    options: SearchOptions,
    queries: Sequence[Floats],
    exact: list[list[Hit]] | None,
    asked: Asked,
) -> Json:
    """Return the measures of one ranking, the interval of the first, and its recall of the exact path."""
    step = asked.batch_queries
    found = [
        of_query for i in range(0, len(queries), step) for of_query in holder.search(queries[i : i + step], options)
    ]
    hits = merge([found], len(found), asked.depth)  # equals by video, as of a fleet
    run = scores_of({query.query_id: of_query for query, of_query in zip(asked.queries, hits, strict=True)})
    values = leaderboard.values_of(asked.measures, "trec", asked.judgements, run, asked.depth)
    summary = leaderboard.summary(asked.measures, values, {"all": list(values)})
    measures = {name: summary["measures"]["all"][name] for name in asked.measures}
    return {
        "measures": measures,
        "intervals": summary["intervals"]["all"],
        "recall_exact": None if exact is None else overlap(hits, exact, min(RECALL_DEPTH, asked.depth)),
    }


def _time_cells(
    holder_of: tuple[Any, ...], jobs: Sequence[tuple[str, SearchOptions]], queries: Sequence[Floats], batch: int
) -> Iterator[tuple[str, Json]]:
    """Yield what searches of one index take, on one core. A Ray task."""
    holder = SegmentHolder(*holder_of)
    for name, options in jobs:
        seconds = []
        for query in [*queries[:WARM_UP_QUERIES], *queries[:TIMED_QUERIES]]:
            started = time.perf_counter()
            holder.search([query], options)
            seconds.append(time.perf_counter() - started)
        p50, p99 = np.quantile(seconds[len(queries[:WARM_UP_QUERIES]) :], [0.5, 0.99])
        started = time.perf_counter()
        holder.search(queries[:batch], options)
        per_second = len(queries[:batch]) / (time.perf_counter() - started)
        yield name, {"p50_seconds": float(p50), "p99_seconds": float(p99), "queries_per_second": per_second}
