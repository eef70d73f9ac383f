"""Evaluate: queries and relevance judgements in, a run and its measures out.

The measures are named and computed by ir_measures, so ``ir_measures qrels.txt run.trec nDCG@10`` repeats every figure. A
judged query without results counts as 0. The index is searched on actors that hold its segments; the exact path scores
every token embedding and is the oracle of the index's recall.
"""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import ir_measures
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import ray

from cluster.readers import reading
from cluster.searchers import Filter, Fleet, Hit, merge, search_exactly
from cluster.session import Pool, check_schedule, cluster_resources, session
from cluster.shards import Shard, plan_shards
from cluster.store import Store
from operators.encoders import Query
from operators.errors import ConfigError
from pipelines.config import Config
from pipelines.job import open_store
from pipelines.release import Release, open_release
from pipelines.search import scorer_of, search_options

Path_ = Literal["index", "exact"]
RECALL_DEPTH = 10


@dataclass(frozen=True)
class JudgedQuery:
    """A query with the modality it is meant to find, if it says so."""

    query_id: str
    text: str
    target_modality: str | None


def evaluate(config: Config, queries: Path, qrels: Path, out: Path | None, path: Path_) -> dict[str, Any]:
    """Return the measures of a search path over judged queries, overall and by target modality.

    Parameters
    ----------
    queries, qrels
        JSON lines with ``id``, ``text`` and optionally ``target_modality``; judgements in TREC form.
    out
        Where ``run.trec``, ``metrics.json`` and ``per_query.parquet`` go, if anywhere.
    path
        ``index`` searches the compressed index, ``exact`` scores every token embedding.

    Raises
    ------
    ConfigError
        If a file or a measure's name cannot be read, or no query is judged.
    """
    judged, judgements = read_queries(queries), read_qrels(qrels)
    measures = parse_measures(config.evaluate.measures)
    store = open_store(config)
    release = open_release(store)
    encoder = release.load_encoder(num_threads=os.cpu_count() or 1)
    embedded = encoder.encode_queries([Query(text=query.text) for query in judged])
    ray_config, depth = config.ray, config.evaluate.depth
    with (
        reading(store, release.release_id),
        session(ray_config.address, ray_config.num_cpus, ray_config.object_store_bytes, ray_config.no_progress_seconds),
    ):
        exact = None
        if path == "exact" or config.evaluate.compare_exact:
            table, version = release.token_table, release.manifest["version"]
            shards = plan_shards(store, table, version, config.evaluate.shard_tokens)
            exact = search_all(config, store, release, shards, embedded, depth)
        if path == "exact" and exact is not None:
            hits = exact
        else:
            hits = search_fleet(config, open_fleet(config, store, release), embedded, depth)
    run = {query.query_id: of_query for query, of_query in zip(judged, hits, strict=True)}
    result = measure(judged, judgements, run, measures)
    result |= {
        "path": path,
        "scorer": config.search.scorer,
        "release_id": release.release_id,
        "index_id": release.index_id,
    }
    if path == "index" and exact is not None:
        result[f"overlap@{RECALL_DEPTH} with exact"] = overlap(hits, exact, RECALL_DEPTH)
    if out is not None:
        write(out, run, result)
    return result


ACTOR_TOKENS = 500_000
"""Of an index: fewer are not worth another process."""


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
    table, version = release.token_table, release.manifest["version"]
    sent_shards = [ray.put(shard) for shard in shards]
    task = ray.remote(search_exactly).options(num_cpus=1, max_retries=3)
    scorer = scorer_of(config.search)
    found: list[list[Hit]] = []
    for batch in _batches(queries, config.evaluate.batch_queries):
        sent = ray.put(list(batch))
        lists = ray.get([task.remote(shard, sent, store, table, version, depth, scorer) for shard in sent_shards])
        found += merge(lists, len(batch), depth)
    return found


def _batches(queries: Sequence[np.ndarray], size: int) -> Iterator[Sequence[np.ndarray]]:
    for first in range(0, len(queries), size):
        yield queries[first : first + size]


def read_queries(path: Path) -> list[JudgedQuery]:
    """Return the queries of a JSON lines file.

    Raises
    ------
    ConfigError
        Naming the line that cannot be used.
    """
    queries: dict[str, JudgedQuery] = {}
    for number, line in _lines(path):
        try:
            row = json.loads(line)
            query = JudgedQuery(str(row["id"]), str(row["text"]), row.get("target_modality"))
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path}, line {number}: a query is a JSON object with id and text ({type(error).__name__}: {error})"
            ) from error
        if query.query_id in queries:
            raise ConfigError(f"{path}, line {number}: the query id {query.query_id!r} was used before")
        queries[query.query_id] = query
    return list(queries.values())


def read_qrels(path: Path) -> dict[str, dict[str, int]]:
    """Return ``{query_id: {video_id: grade}}`` of a TREC judgement file.

    Raises
    ------
    ConfigError
        Naming the line that cannot be used.
    """
    judgements: dict[str, dict[str, int]] = defaultdict(dict)
    for number, line in _lines(path):
        try:
            query_id, _, video_id, grade = line.split()
            judgements[query_id][video_id] = int(grade)
        except ValueError as error:
            raise ConfigError(
                f"{path}, line {number}: got {line.strip()!r}; a judgement is four columns: query 0 video grade"
            ) from error
    return dict(judgements)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with path.open(encoding="utf-8") as stream:
            yield from ((number, line) for number, line in enumerate(stream, start=1) if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error


def parse_measures(names: Sequence[str]) -> list[Any]:
    """Return ir_measures' measures by name.

    Raises
    ------
    ConfigError
        If a name is not one of theirs.
    """
    try:
        return [ir_measures.parse_measure(name) for name in names]
    except (NameError, ValueError, SyntaxError) as error:
        raise ConfigError(
            f"evaluate.measures: {error}; use names of ir_measures, for example nDCG@10 R@100 RR"
        ) from error


def measure(
    queries: Sequence[JudgedQuery],
    judgements: dict[str, dict[str, int]],
    run: dict[str, list[Hit]],
    measures: Sequence[Any],
) -> dict[str, Any]:
    """Return measures over all judged queries and by target modality, and each query's values.

    A judged query that the run lacks counts as 0, whether or not it is among the queries.

    Raises
    ------
    ConfigError
        If none of the queries is judged.
    """
    if not any(query.query_id in judgements for query in queries):
        raise ConfigError("none of the queries is judged: do the ids of the queries and the qrels belong together?")
    scored = {query_id: {hit.video_id: hit.score for hit in _strictly_ordered(hits)} for query_id, hits in run.items()}
    per_query: dict[str, dict[str, float]] = {query_id: {str(m): 0.0 for m in measures} for query_id in judgements}
    for value in ir_measures.iter_calc(measures, judgements, scored):
        per_query[value.query_id][str(value.measure)] = value.value
    target = {query.query_id: query.target_modality for query in queries}
    groups: dict[str, list[str]] = {"all": list(per_query)}
    for query_id in per_query:
        if target.get(query_id):
            groups.setdefault(str(target[query_id]), []).append(query_id)
    return {
        "measures": {
            group: {"queries": len(ids)}
            | {str(m): float(np.mean([per_query[query_id][str(m)] for query_id in ids])) for m in measures}
            for group, ids in groups.items()
        },
        "per_query": per_query,
    }


def _strictly_ordered(hits: Sequence[Hit]) -> list[Hit]:
    """Return hits whose float32 scores fall strictly, so that every tool ranks them as we did."""
    ordered: list[Hit] = []
    ceiling = np.float32(np.inf)
    for hit in hits:
        score = np.float32(hit.score)
        if score >= ceiling:
            score = np.nextafter(ceiling, np.float32(-np.inf))
        ceiling = score
        ordered.append(hit._replace(score=float(score)))
    return ordered


def overlap(found: Sequence[Sequence[Hit]], exact: Sequence[Sequence[Hit]], depth: int) -> float:
    """Return the mean share of the exact path's first ``depth`` videos that the index found there too."""
    shares = []
    for ours, oracle in zip(found, exact, strict=True):
        wanted = {hit.video_id for hit in oracle[:depth]}
        if wanted:
            shares.append(len(wanted & {hit.video_id for hit in ours[:depth]}) / len(wanted))
    return float(np.mean(shares)) if shares else 0.0


def write(out: Path, run: dict[str, list[Hit]], result: dict[str, Any]) -> None:
    """Write ``run.trec``, ``metrics.json`` and ``per_query.parquet``."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "run.trec").open("w", encoding="utf-8") as stream:
        for query_id, hits in run.items():
            for rank, hit in enumerate(_strictly_ordered(hits), start=1):
                stream.write(f"{query_id} Q0 {hit.video_id} {rank} {hit.score!r} maxreel-{result['path']}\n")
    per_query = result["per_query"]
    rows = [{"query_id": query_id} | values for query_id, values in per_query.items()]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), out / "per_query.parquet")
    metrics = {name: value for name, value in result.items() if name != "per_query"}
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
