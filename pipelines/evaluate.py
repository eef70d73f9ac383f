"""Evaluate: queries and relevance judgements in, runs and their measures out.

The measures are named and computed by ir_measures, so ``ir_measures qrels.txt run.trec nDCG@10`` repeats every figure. A
judged query without results counts as 0. The index is searched on actors that hold its segments. One exact pass over the
token embeddings is the oracle of the index's recall, and gives the other systems of `pipelines.systems` to set beside it:
each with its interval, and with its difference to the primary system tested query by query.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.exact import Pool as VideoPool
from cluster.exact import Wins, search_exactly
from cluster.index_store import num_bytes
from cluster.readers import reading
from cluster.searchers import Filter, Fleet, Hit
from cluster.session import Pool, check_schedule, cluster_resources, session
from cluster.shards import Shard, clip_rows, cut
from cluster.store import Store
from operators import diagonal
from operators.maxsim import Scorer
from operators.measures import answer_depth
from operators.modality_selection import selection
from operators.schema import MODALITIES
from pipelines import leaderboard
from pipelines.answers import answer_ranks
from pipelines.config import Config
from pipelines.datasets import JudgedQuery, read_qrels, read_queries
from pipelines.job import open_store
from pipelines.leaderboard import Values
from pipelines.queries import encode_queries
from pipelines.release import Release, open_release
from pipelines.runs import read_run, scores_of
from pipelines.search import scorer_of, search_options
from pipelines.systems import AGAINST, PRIMARY, SINGLE, System, scorers, systems

SCHEMA = "maxreel-evaluation/1"

Path_ = Literal["index", "exact"]
RECALL_DEPTH = 10

ACTOR_TOKENS = 500_000
"""Of an index: fewer are not worth another process."""

TIMED_QUERIES, WARM_UP = 100, 3
"""Asked one after the other for latency, and before that."""


@dataclass(frozen=True)
class Evaluation:
    """What was measured, and what it was measured on.

    Attributes
    ----------
    document
        As ``metrics.json`` holds it.
    systems, values
        The primary one first, and the measures of each by its name.
    hits
        Of the primary system, by query; empty where a run was measured.
    queries, judgements
        That were asked.
    """

    document: dict[str, Any]
    systems: list[System]
    values: dict[str, Values]
    hits: dict[str, list[Hit]]
    queries: list[JudgedQuery]
    judgements: dict[str, dict[str, int]]


def evaluate(
    config: Config, queries: Path, qrels: Path, path: Path_ = "index", against: str | None = None
) -> Evaluation:
    """Return the measures of the live release over judged queries, beside other systems.

    Parameters
    ----------
    queries, qrels
        As `pipelines.datasets` reads them.
    path
        ``index`` searches the compressed index, ``exact`` scores every token embedding.
    against
        Another system: the number of a release, or a file in TREC form.

    Raises
    ------
    ConfigError
        If a file or a measure's name cannot be read, or no query is judged.
    """
    asked, judgements = read_queries(queries), read_qrels(qrels)
    leaderboard.check(config.evaluate.measures, config.evaluate.protocol, asked, judgements)
    store = open_store(config)
    release = open_release(store)
    rows = clip_rows(store, release.token_table, release.manifest["version"])
    depth, only = _scope(config, judgements)
    ray_config = config.ray
    with (
        reading(store, release.release_id),
        session(ray_config.address, ray_config.num_cpus, ray_config.object_store_bytes, ray_config.no_progress_seconds),
    ):
        found = _search(config, store, release, rows, asked, judgements, path, depth, only)
        others = [_against(config, store, against, asked, depth, only)] if against else []
    by_query = dict(zip((query.query_id for query in asked), found.hits, strict=True))
    label = f"late interaction, {config.search.scorer}, " + ("compressed index" if path == "index" else "exact")
    primary = System(path, PRIMARY, label, scores_of(by_query))
    if found.pools:
        others = [*_systems(config, asked, judgements, found.pools, depth), *others]
    last = answer_depth(config.evaluate.measures)
    answered = {s.name: answer_ranks(store, release, asked, s.run, last) for s in (primary, *others)} if last else {}
    evaluation = measure(config, [primary, *others], asked, judgements, depth, answered)
    evaluation.hits.update(by_query)
    document = evaluation.document
    document |= {"path": path, "release_id": release.release_id, "index_id": release.index_id}
    document["cost"] = _size(store, release, rows) | found.cost
    if path == "index" and found.pools:
        first = min(RECALL_DEPTH, depth)  # beyond its depth a pool holds what other scorers found
        oracle = [pool.best(0, first) for pool in found.pools]
        document[f"overlap@{first} with exact"] = overlap(found.hits, oracle, first)
    meant = [(query.target_modality, won.counts) for query, of in zip(asked, found.wins, strict=False) for won in of]
    if selected := selection(meant, MODALITIES):
        document["modality_selection"] = selected
    return evaluation


class _Searched(NamedTuple):
    hits: list[list[Hit]]
    cost: dict[str, float]
    pools: list[VideoPool]
    wins: list[list[Wins]]


def _search(
    config: Config,
    store: Store,
    release: Release,
    rows: pa.Table,
    asked: Sequence[JudgedQuery],
    judgements: Mapping[str, Mapping[str, int]],
    path: Path_,
    depth: int,
    only: Filter,
) -> _Searched:
    """Return what a path finds and costs, and what the exact pass finds for all systems."""
    embedded = encode_of(config, release, asked)
    pools: list[VideoPool] = []
    wins: list[list[Wins]] = []
    if path == "exact" or config.evaluate.compare_exact:
        relevant = [_relevant(judgements, query) for query in asked]
        chosen = [scorer for _, _, scorer in scorers(config.search).values()]
        shards = cut(_rows_of(rows, only), config.evaluate.shard_tokens)
        pools, wins = search_shards(config, store, release, shards, embedded, depth, chosen, relevant)
    if path == "exact":
        return _Searched([pool.best(0, depth) for pool in pools], {}, pools, wins)
    return _Searched(*_search_index(config, store, release, embedded, depth, only), pools, wins)


def evaluate_run(
    config: Config, run: Path, qrels: Path, queries: Path | None = None, against: Path | None = None
) -> Evaluation:
    """Return the measures of a run in TREC form, and another beside it; no store is needed.

    Raises
    ------
    ConfigError
        As `evaluate`.
    """
    judgements = read_qrels(qrels)
    asked = read_queries(queries) if queries else [JudgedQuery(query_id, "", None) for query_id in judgements]
    leaderboard.check(config.evaluate.measures, config.evaluate.protocol, asked, judgements)
    found = [System("run", PRIMARY, run.name, read_run(run))]
    if against:
        found.append(System("against", AGAINST, against.name, read_run(against)))
    depth = max((len(videos) for system in found for videos in system.run.values()), default=0)
    return measure(config, found, asked, judgements, depth)


def measure(
    config: Config,
    systems: list[System],
    queries: list[JudgedQuery],
    judgements: dict[str, dict[str, int]],
    depth: int,
    answered: Mapping[str, Mapping[str, int | None]] | None = None,
) -> Evaluation:
    """Return the measures of systems, the primary one first, over judged queries.

    Parameters
    ----------
    answered
        By system, as `operators.measures.per_query` takes it.
    """
    names, protocol = config.evaluate.measures, config.evaluate.protocol
    values = {
        system.name: leaderboard.values_of(
            names, protocol, judgements, system.run, depth, (answered or {}).get(system.name)
        )
        for system in systems
    }
    primary = systems[0].name
    groups = leaderboard.groups_of(queries, list(values[primary]))
    apart = leaderboard.differences(names, values)
    rows = {
        system.name: {"kind": system.kind, "label": system.label}
        | leaderboard.summary(names, values[system.name], groups)
        | ({"against": apart[system.name]} if system.name in apart else {})
        for system in systems
    }
    document = {
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "system": primary,
        "path": "run",
        "protocol": protocol,
        "scorer": config.search.scorer,
        "release_id": None,
        "index_id": None,
        "depth": depth,
        "primary_measure": names[0],
        "measures": rows[primary]["measures"],
        "intervals": rows[primary]["intervals"],
        "systems": rows,
    }
    if protocol == "clamr_diagonal":
        document["ceiling"] = diagonal.ceiling(names, judgements)
    return Evaluation(document, systems, values, {}, queries, judgements)


def _relevant(judgements: Mapping[str, Mapping[str, int]], query: JudgedQuery) -> frozenset[str]:
    return frozenset(video_id for video_id, grade in judgements.get(query.query_id, {}).items() if grade > 0)


def _scope(config: Config, judgements: Mapping[str, Mapping[str, int]]) -> tuple[int, Filter]:
    """Return how deep to search, and among which videos: under ``clamr_diagonal`` all that are judged, and no others."""
    if config.evaluate.protocol == "trec":
        return config.evaluate.depth, Filter()
    judged = frozenset(video_id for grades in judgements.values() for video_id in grades)
    return len(judged), Filter(judged)


def _rows_of(rows: pa.Table, only: Filter) -> pa.Table:
    if only.video_ids is None:
        return rows
    return rows.filter(pc.is_in(rows["video_id"], value_set=pa.array(sorted(only.video_ids), pa.string())))


def encode_of(config: Config, release: Release, asked: Sequence[JudgedQuery]) -> list[np.ndarray]:
    """Return the token embeddings of queries, by the encoder that made a release."""
    encoder = release.load_encoder(os.cpu_count() or 1, config.search.device)
    return encode_queries(encoder, asked, config.storage.environment())


def _systems(
    config: Config,
    asked: Sequence[JudgedQuery],
    judgements: dict[str, dict[str, int]],
    pools: Sequence[VideoPool],
    depth: int,
) -> list[System]:
    """Return the systems of an exact pass."""
    by_query = {query.query_id: pool for query, pool in zip(asked, pools, strict=True)}
    quality: dict[str, dict[str, float]] = {}
    for i, (name, (kind, _, _)) in enumerate(scorers(config.search).items()):
        if kind == SINGLE:
            run = scores_of({query_id: pool.best(i, depth) for query_id, pool in by_query.items()})
            values = leaderboard.values_of(["nDCG@10"], "trec", judgements, run, depth)
            quality[name] = {query_id: of_query["nDCG@10"] for query_id, of_query in values.items()}
    return systems(config.search, by_query, quality, {query.query_id: query.target_modality for query in asked}, depth)


def _against(
    config: Config, store: Store, against: str, asked: Sequence[JudgedQuery], depth: int, only: Filter
) -> System:
    """Return what a release, or a run, finds."""
    if not against.isdigit():
        return System("against", AGAINST, Path(against).name, read_run(Path(against)))
    release = open_release(store, int(against))
    embedded = encode_of(config, release, asked)
    hits = search_fleet(config, open_fleet(config, store, release), embedded, depth, only)
    run = scores_of({query.query_id: found for query, found in zip(asked, hits, strict=True)})
    return System(f"release {against}", AGAINST, f"release {against}, compressed index", run)


def _search_index(
    config: Config, store: Store, release: Release, queries: Sequence[np.ndarray], depth: int, only: Filter
) -> tuple[list[list[Hit]], dict[str, float]]:
    """Return what an index finds, and what a query costs: alone, and among all."""
    fleet = open_fleet(config, store, release)
    seconds = []
    for query in [*queries[:WARM_UP], *queries[:TIMED_QUERIES]]:
        started = time.perf_counter()
        search_fleet(config, fleet, [query], depth, only)
        seconds.append(time.perf_counter() - started)
    p50, p99 = np.quantile(seconds[min(WARM_UP, len(queries)) :], [0.5, 0.99])
    started = time.perf_counter()
    hits = search_fleet(config, fleet, queries, depth, only)
    per_second = len(queries) / (time.perf_counter() - started)
    cores = cluster_resources()["CPU"]
    cost = {"p50_seconds": float(p50), "p99_seconds": float(p99), "queries_per_second": per_second, "cores": cores}
    return hits, cost


def _size(store: Store, release: Release, rows: pa.Table) -> dict[str, float]:
    videos = max(1, pc.count_distinct(rows["video_id"]).as_py())
    return {
        "videos": videos,
        "tokens_per_video": release.manifest["num_tokens"] / videos,
        "index_bytes_per_video": num_bytes(store, release.manifest) / videos,
    }


def open_fleet(config: Config, store: Store, release: Release) -> Fleet:
    """Return actors that hold a release's segments."""
    resources, search = cluster_resources(), config.search
    entries = release.manifest["segments"]
    useful = math.ceil(release.manifest["num_tokens"] / ACTOR_TOKENS)
    actors = min(search.actors or min(useful, max(1, int(resources["CPU"]))), len(entries))
    num_gpus = 0.0 if search.device == "cpu" else min(1.0, resources.get("GPU", 0.0) / actors) or 1.0
    pool = Pool("segments", actors, min(1.0, resources["CPU"] / actors), num_gpus)
    check_schedule([pool], 0, resources)
    return Fleet(
        store,
        release.manifest,
        pool.num_actors,
        pool.num_cpus,
        search.codes_on_disk,
        search.device,
        pool.num_gpus,
    )


def search_fleet(
    config: Config, fleet: Fleet, queries: Sequence[np.ndarray], depth: int, only: Filter | None = None
) -> list[list[Hit]]:
    """Return the best ``depth`` videos of each encoded query, in batches."""
    options = replace(search_options(config.search, depth), filter=only or Filter())
    return [hits for batch in _batches(queries, config.evaluate.batch_queries) for hits in fleet.search(batch, options)]


def search_all(
    config: Config, store: Store, release: Release, shards: Sequence[Shard], queries: Sequence[np.ndarray], depth: int
) -> list[list[Hit]]:
    """Return the best ``depth`` videos of each encoded query, by every token embedding of some shards."""
    pools, _ = search_shards(config, store, release, shards, queries, depth, [scorer_of(config.search)])
    return [pool.best(0, depth) for pool in pools]


def search_shards(
    config: Config,
    store: Store,
    release: Release,
    shards: Sequence[Shard],
    queries: Sequence[np.ndarray],
    depth: int,
    scorers: Sequence[Scorer],
    relevant: Sequence[frozenset[str]] | None = None,
) -> tuple[list[VideoPool], list[list[Wins]]]:
    """Return what `cluster.exact.search_exactly` does, for queries in batches."""
    table, version, size = release.token_table, release.manifest["version"], config.evaluate.batch_queries
    cores = max(1, int(cluster_resources()["CPU"]))
    pools: list[VideoPool] = []
    wins: list[list[Wins]] = []
    for first in range(0, len(queries), size):
        batch = slice(first, first + size)
        wanted = None if relevant is None else relevant[batch]
        found, won = search_exactly(store, table, version, shards, queries[batch], depth, scorers, wanted, cores)
        pools, wins = pools + found, wins + won
    return pools, wins


def _batches(queries: Sequence[np.ndarray], size: int) -> Iterator[Sequence[np.ndarray]]:
    for first in range(0, len(queries), size):
        yield queries[first : first + size]


def overlap(found: Sequence[Sequence[Hit]], exact: Sequence[Sequence[Hit]], depth: int) -> float:
    """Return the mean share of the exact path's first ``depth`` videos that the index found there too."""
    shares = []
    for ours, oracle in zip(found, exact, strict=True):
        wanted = {hit.video_id for hit in oracle[:depth]}
        if wanted:
            shares.append(len(wanted & {hit.video_id for hit in ours[:depth]}) / len(wanted))
    return float(np.mean(shares)) if shares else 0.0
