"""Gates: what a release must reach before readers see it.

Each gate compares one figure of the draft with a limit, most of them relative to the release that is live. A figure that
cannot be had (no release before, no audio, no canaries) leaves its gate out; a limit of None does too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.searchers import Filter, Hit
from cluster.shards import Shard, clip_rows, cut, read_tokens
from cluster.store import VIDEOS, Store
from operators import schema
from operators.calibrate import sample_queries
from operators.measures import mean, per_query
from pipelines import leaderboard
from pipelines.config import Config
from pipelines.datasets import JudgedQuery, read_qrels, read_queries
from pipelines.evaluate import open_fleet, search_all, search_fleet
from pipelines.job import Job
from pipelines.queries import encode_queries
from pipelines.release import Release
from pipelines.runs import scores_of

DEPTH = 10
NUM_SHARDS = 16
"""Of the sample that is scored exactly, so that many cores share the work."""

Gate = dict[str, Any]


def judge(job: Job, draft: Release, live: Release | None) -> list[Gate]:
    """Return every gate with its figure, its limit and whether it was passed."""
    job.start_ray()
    return [*_contents(job, draft, live), *_quality(job, draft, live)]


def _gate(name: str, value: float, limit: float, passed: bool, detail: str) -> Gate:
    return {"name": name, "value": value, "limit": limit, "passed": passed, "detail": detail}


def _contents(job: Job, draft: Release, live: Release | None) -> Iterator[Gate]:
    """Yield gates on what was extracted: tokens a video by modality, and videos with sound but without speech."""
    config, now = job.config.gates, _describe(job.store, draft)
    before = _describe(job.store, live) if live else None
    if before and config.max_token_change is not None:
        for modality, was in before["tokens"].items():
            value = now["tokens"].get(modality, 0.0) / was - 1
            detail = f"{now['tokens'].get(modality, 0.0):.1f} tokens a video, live {was:.1f}"
            passed = abs(value) <= config.max_token_change
            yield _gate(f"tokens: {modality}", value, config.max_token_change, passed, detail)
    if config.max_empty_speech_rise is not None and now["silent"] is not None:
        was_silent = before["silent"] if before and before["silent"] is not None else now["silent"]
        limit = min(1.0, was_silent + config.max_empty_speech_rise)
        detail = f"share of videos with sound in which no speech was found, live {was_silent:.2f}"
        yield _gate("empty speech", now["silent"], limit, now["silent"] <= limit, detail)


def _describe(store: Store, release: Release) -> dict[str, Any]:
    """Return tokens a video by modality, and the share of videos with sound in which no speech was found."""
    table, version = release.token_table, release.manifest["version"]
    rows = store.open(table, version).to_table(columns=["video_id", "modality", "num_tokens"])
    totals = rows.group_by("modality").aggregate([("num_tokens", "sum")]).to_pylist()
    num_videos = max(1, pc.count_distinct(rows["video_id"]).as_py())
    sound = store.open(VIDEOS, release.tables[VIDEOS]).to_table(columns=["video_id"], filter="has_audio")["video_id"]
    has_rows = pc.equal(rows["modality"], schema.SPEECH)
    if not len(sound) or not pc.any(has_rows).as_py():
        silent = None
    else:
        spoken = rows.filter(pc.and_(has_rows, pc.greater(rows["num_tokens"], 0)))["video_id"]
        silent = 1 - pc.sum(pc.is_in(sound, value_set=spoken)).as_py() / len(sound)
    tokens = {row["modality"]: row["num_tokens_sum"] / num_videos for row in totals if row["num_tokens_sum"]}
    return {"tokens": tokens, "silent": silent}


def _quality(job: Job, draft: Release, live: Release | None) -> Iterator[Gate]:
    """Yield gates on what is found: recall against the exact path, and quality or overlap with the live release."""
    config, store = job.config.gates, job.store
    rows = clip_rows(store, draft.token_table, draft.manifest["version"])
    judged, own, queries = _queries(job.config, store, draft, rows)
    if not queries:
        return
    # One after the other: actors that hold segments hold cores too, and the next would wait for them for ever.
    exact, before = [], []
    if config.min_recall is not None:
        shards, only = _sample(rows, config.sample_tokens)
        exact = search_all(job.config, store, draft, shards, queries, DEPTH + 1)
    has_judgements = bool(judged) and config.canary_qrels is not None
    is_comparable = live is not None and live.encoder_fingerprint == draft.encoder_fingerprint
    if live is not None and is_comparable and config.min_overlap is not None and not has_judgements:
        before = search_fleet(job.config, open_fleet(job.config, store, live), queries, DEPTH + 1)
    fleet = open_fleet(job.config, store, draft)
    if config.min_recall is not None:
        value = _overlap(search_fleet(job.config, fleet, queries, DEPTH + 1, only), exact, own)
        detail = f"share of the exact first {DEPTH} that the index finds, {len(queries)} queries"
        yield _gate("recall", value, config.min_recall, value >= config.min_recall, detail)
    if has_judgements:
        found = search_fleet(job.config, fleet, queries, job.config.evaluate.depth)
        yield from _judged(job, live, judged, found)
    elif before and config.min_overlap is not None:
        value = _overlap(search_fleet(job.config, fleet, queries, DEPTH + 1), before, own)
        detail = f"share of the live release's first {DEPTH} that are found again, {len(queries)} queries"
        yield _gate("overlap with live", value, config.min_overlap, value >= config.min_overlap, detail)


def _judged(
    job: Job, live: Release | None, judged: Sequence[JudgedQuery], found: Sequence[list[Hit]]
) -> Iterator[Gate]:
    config = job.config.gates
    assert config.canary_qrels is not None
    name, judgements = job.config.evaluate.measures[0], read_qrels(config.canary_qrels)
    leaderboard.check([name], "trec", judged, judgements)
    run = scores_of({query.query_id: hits for query, hits in zip(judged, found, strict=True)})
    values = per_query([name], judgements, run, job.config.evaluate.depth)
    value = mean(name, [of_query[name] for of_query in values.values()])
    if config.min_quality is not None:
        yield _gate(name, value, config.min_quality, value >= config.min_quality, f"{len(judged)} canary queries")
    before = (
        next((gate["value"] for gate in live.gates if gate["name"] == f"{name} against live"), None) if live else None
    )
    if config.max_quality_drop is not None:
        limit = value if before is None else before - config.max_quality_drop
        detail = f"{len(judged)} canary queries, live " + ("not measured" if before is None else f"{before:.3f}")
        yield _gate(f"{name} against live", value, limit, value >= limit, detail)


def _queries(
    config: Config, store: Store, draft: Release, rows: pa.Table
) -> tuple[list[JudgedQuery], list[str | None], list[np.ndarray]]:
    """Return canary queries, or runs of tokens drawn from clips with the video that each came from."""
    gates = config.gates
    if gates.canaries is not None:
        judged = read_queries(gates.canaries)
        encoder = draft.load_encoder(os.cpu_count() or 1, config.search.device)
        return judged, [None] * len(judged), encode_queries(encoder, judged, config.storage.environment())
    few = Shard(_of_clips(rows, 2 * gates.num_queries))
    tokens = read_tokens(store, draft.token_table, draft.manifest["version"], few.rows["_rowid"])
    token_of_clip = np.concatenate([[0], np.cumsum(np.bincount(few.run_clip, few.run_lengths))]).astype(np.int64)
    drawn = sample_queries(tokens, token_of_clip, gates.num_queries, seed=0)
    video_ids = few.clips["video_id"].to_pylist()
    return [], [video_ids[clip] for clip, _ in drawn], [query for _, query in drawn]


def _of_clips(rows: pa.Table, count: int) -> pa.Table:
    """Return the rows of about ``count`` clips, evenly spread."""
    ordinals = rows["clip_ordinal"].to_numpy()
    step = max(1, -(-(int(ordinals.max(initial=0)) + 1) // count))
    return rows.filter(pa.array(ordinals % step == 0))


def _sample(rows: pa.Table, num_tokens: int) -> tuple[list[Shard], Filter]:
    """Return shards of some videos, drawn at random, with about so many tokens, and the filter that leaves only those."""
    total = int(rows["num_tokens"].to_numpy().sum())
    if total <= num_tokens:
        return cut(rows, -(-num_tokens // NUM_SHARDS)), Filter()
    videos = pc.unique(rows["video_id"]).to_numpy(zero_copy_only=False)
    count = max(1, int(len(videos) * num_tokens / total))
    drawn = np.random.default_rng(0).choice(videos, count, replace=False)
    only = rows.filter(pc.is_in(rows["video_id"], value_set=pa.array(drawn, pa.string())))
    return cut(only, -(-num_tokens // NUM_SHARDS)), Filter(frozenset(drawn.tolist()))


def _overlap(found: Sequence[Sequence[Hit]], wanted: Sequence[Sequence[Hit]], own: Sequence[str | None]) -> float:
    """Return the mean share of the first videos wanted that were found, a query's own video left out."""
    shares = []
    for ours, theirs, video_id in zip(found, wanted, own, strict=True):
        first = [hit.video_id for hit in theirs if hit.video_id != video_id][:DEPTH]
        again = {hit.video_id for hit in [hit for hit in ours if hit.video_id != video_id][:DEPTH]}
        if first:
            shares.append(len(again.intersection(first)) / len(first))
    return float(np.mean(shares)) if shares else 1.0


def failed(gates: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the gates that were not passed."""
    return [gate for gate in gates if not gate["passed"]]
