"""Sweep: many settings of one store, each thing made once, and which of them are worth having.

Cells share what they have in common: the encoder's token embeddings in the store; tokens pooled to smaller budgets; the
centroids, which do not depend on ``nbits``; an index, which all search settings share; one exact pass over each set of
tokens, for all scorers and modalities; the encoded queries; and one ranking, of which all measures are. The store is only
read, but for token embeddings that are missing or stale, which are encoded first as `maxreel encode` does. Budgets above
what the store's tokens were pooled to cannot be swept. Cells that name probes, candidates and rescored do not wait for the
curve of their index, which takes longer than all else of it.

What is finished lies below OUT by a fingerprint of all that it depends on, and is not made again: a sweep may be killed at
any time. Cells that failed are tried again. On several machines ``work`` must be a place that all of them reach.

One process holds all of an index and searches it, so figures do not depend on how many cores there are (`maxreel evaluate`
finds the same with ``search.actors=1``). Quality comes first, on all cores. Then each cell is timed while nothing else of
the sweep runs: on one core, after a warm-up, `pipelines.sweep_work.TIMED_QUERIES` queries one at a time for the latency,
and one batch for queries a second. Timings of a sweep that went on elsewhere are of both machines.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import ray
import yaml

from cluster.lease import Lease
from cluster.readers import reading
from cluster.session import session
from cluster.store import Store
from operators.errors import ConfigError, TooManyFailuresError
from operators.measures import rises
from operators.pareto import knee, pareto_set
from pipelines.config import Config, EncodeConfig, override
from pipelines.encode import encode
from pipelines.job import new_run_id, open_job, open_store
from pipelines.release import find_live
from pipelines.sweep_config import SWEPT, expand, read_sweep
from pipelines.sweep_plan import Asked, Placed, Stored, count, largest_budgets, look, place_all, read_asked
from pipelines.sweep_work import Work, keep, path_of, read

SCHEMA = "maxreel-sweep/1"

UNKNOWN: dict[str, Any] = {
    "measures": {},
    "intervals": {},
    "recall_exact": None,
    "p50_seconds": None,
    "p99_seconds": None,
    "queries_per_second": None,
    "bytes_per_video": None,
    "tokens_per_video": None,
}
"""Of a cell that failed."""

Json = dict[str, Any]


def sweep(
    config: Config,
    file: Path,
    queries: Path | None = None,
    qrels: Path | None = None,
    out: Path | None = None,
    dry_run: bool = False,
) -> Json:
    """Return what is known of every cell of a sweep, which of them no other beats, and the one to start from.

    Parameters
    ----------
    file
        See `pipelines.sweep_config`.
    queries, qrels, out
        Instead of those that it names.

    Raises
    ------
    ConfigError
        If a setting of any cell, a file or a measure is wrong; nothing was run then.
    TooManyFailuresError
        If cells failed. The others are done, and the result comes with it.
    """
    began = time.perf_counter()
    wanted = read_sweep(file)
    fixed, cells = override(config, wanted.base), expand(wanted, config)
    folder = _given(out or wanted.out, "out")
    asked = read_asked(fixed, _given(queries or wanted.queries, "queries"), _given(qrels or wanted.qrels, "qrels"))
    store = open_store(config)
    bases: dict[str, EncodeConfig] = {cell.config.encode.encoder: cell.config.encode for cell in cells}
    most = largest_budgets(cells)
    pool_tokens = {"pool_tokens": fixed.encode.pool_tokens}
    stored = {name: look(store, base.model_copy(update=pool_tokens), most) for name, base in bases.items()}
    placed = place_all(cells, stored, asked)
    if dry_run:
        return _plan(placed, folder)
    work = Store.at(wanted.work or str(folder / "work"), config.storage.to_options())
    with ExitStack() as stack:
        stack.enter_context(Lease(work, new_run_id(), "sweep", config.storage.lease_seconds))
        if (live := find_live(store)) is not None:
            stack.enter_context(reading(store, live.release_id))  # gc leaves its tokens
        if any(of_encoder.num_stale for of_encoder in stored.values()):
            _start_ray(config, stack)
            stored = {name: _encoded(config, store, of_encoder) for name, of_encoder in stored.items()}
            placed = place_all(cells, stored, asked)
        missing = [p for p in placed if not _is_done(folder, p)]
        if missing:
            _start_ray(config, stack)
            Work(store, work, folder, asked, fixed.evaluate.shard_tokens).do(missing)
    reused = count(placed) | {"from_cache": len(placed) - len(missing)}
    return _finish(placed, folder, asked, wanted.grid, {"reused": reused, "seconds": time.perf_counter() - began})


def _given(path: Path | None, name: str) -> Path:
    if path is None:
        raise ConfigError(f"no {name} given: pass --{name}, or write `{name}:` in the sweep's file")
    return path


def _start_ray(config: Config, stack: ExitStack) -> None:
    of_ray = config.ray
    if not ray.is_initialized():
        stack.enter_context(
            session(of_ray.address, of_ray.num_cpus, of_ray.object_store_bytes, of_ray.no_progress_seconds)
        )


def _encoded(config: Config, store: Store, stored: Stored) -> Stored:
    """Bring the store's tokens up to date, and return what it then holds."""
    if not stored.num_stale:
        return stored
    with open_job(config.model_copy(update={"encode": stored.encode}), "sweep", creates=False) as job:
        encode(job)
        job.limit_failures()
    return look(store, stored.encode, stored.encode.pool_tokens)


def _is_done(folder: Path, placed: Placed) -> bool:
    known = read(path_of(folder, "cells", placed.fingerprint))
    return known is not None and known["error"] is None


def _plan(placed: Sequence[Placed], folder: Path) -> Json:
    stale = {p.stored.encode.encoder: p.stored.num_stale for p in placed}
    return {
        "dry_run": True,
        "to_encode": {name: number for name, number in stale.items() if number},
        "reused": count(placed) | {"from_cache": sum(_is_done(folder, p) for p in placed)},
    }


def _finish(placed: Sequence[Placed], folder: Path, asked: Asked, axes: Json, more: Json) -> Json:
    """Write ``sweep.json`` and ``best.yaml``, and return the former."""
    cells = [UNKNOWN | read(path_of(folder, "cells", p.fingerprint)) for p in placed]
    best = _mark(cells, asked.measures[0])
    result = {
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "primary_measure": asked.measures[0],
        "queries": len(asked.queries),
        "axes": axes,
        "cells": cells,
        "out": str(folder),
    } | more
    keep(folder / "sweep.json", json.dumps(result, indent=1) + "\n")
    if best is not None:
        keep(folder / "best.yaml", _as_config(placed[best], cells[best], asked.measures[0]))
    failed = [cell for cell in cells if cell["error"] is not None]
    if failed:
        error = TooManyFailuresError(
            f"{len(failed)} of {len(cells)} cells failed, the first of {failed[0]['error']}; the others are done. "
            "The same command tries these again."
        )
        error.result = result
        raise error
    return result


def _mark(cells: Sequence[Json], measure: str) -> int | None:
    """Say of each cell whether it is of the Pareto set, and whether it is the knee; return which is."""
    for cell in cells:
        cell |= {"pareto": False, "knee": False}
    whole = [i for i, cell in enumerate(cells) if cell["error"] is None]
    if not whole:
        return None
    sign = 1 if rises(measure) else -1
    goodness = np.array(
        [
            (
                sign * cells[i]["measures"][measure],
                -np.log2(max(cells[i]["p50_seconds"], 1e-9)),
                -np.log2(cells[i]["bytes_per_video"]),
            )
            for i in whole
        ]
    )
    best = np.flatnonzero(pareto_set(goodness))
    for i in best:
        cells[whole[i]]["pareto"] = True
    chosen = whole[best[knee(goodness[best], [json.dumps(cells[whole[i]]["settings"]) for i in best])]]
    cells[chosen]["knee"] = True
    return int(chosen)


def _as_config(placed: Placed, cell: Json, measure: str) -> str:
    """Return the settings of a cell as a config file."""
    budgets = {f"encode.pool_tokens.{modality}": budget for modality, budget in placed.pool_tokens.items()}
    whole = override(placed.cell.config, budgets)
    settings = whole.model_dump(mode="json", exclude_unset=True, include=set(SWEPT))
    return (
        f"# The knee of a sweep, cell {cell['id']}: {measure} {cell['measures'][measure]:.4f}, "
        f"{1000 * cell['p50_seconds']:.2f} ms a query, {cell['bytes_per_video']:.0f} bytes a video.\n"
        + yaml.safe_dump(settings, sort_keys=False)
    )
