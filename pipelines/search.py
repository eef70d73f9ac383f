"""Search: text, an image or both in, videos out, with the reason for each on request."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from cluster.readers import reading
from cluster.searchers import Filter, Hit, SearchOptions, SegmentHolder
from cluster.store import MODALITIES, VIDEOS, Store
from operators import schema
from operators.encoders import Query
from operators.maxsim import Scorer, make_scorer
from operators.segment import explain as explain_clip
from pipelines.config import Config, SearchConfig
from pipelines.job import open_store
from pipelines.release import Release, open_release


@dataclass(frozen=True)
class Winner:
    """What one query token matched best in a clip; a patch is (left, top, right, bottom) as shares of a frame."""

    token: str
    modality: str
    score: float
    start_seconds: float
    text: str
    patch: tuple[float, float, float, float] | None = None


@dataclass(frozen=True)
class Explanation:
    """Why a clip was found, and the rows of `modalities` that it is made of."""

    winners: list[Winner]
    share_by_modality: dict[str, float]
    contents: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Found:
    """A search result, with its explanation where one was asked for."""

    video_id: str
    score: float
    start_seconds: float
    stop_seconds: float
    title: str | None
    uri: str | None
    winners: list[Winner] = field(default_factory=list)
    share_by_modality: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Wanted:
    """Which clips may be found: of these videos, with one of these tags, that overlap a part of their video."""

    videos: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    start_seconds: float = 0.0
    stop_seconds: float = math.inf


def scorer_of(config: SearchConfig) -> Scorer:
    """Return the configured scorer."""
    return make_scorer(config.scorer, schema.MODALITIES, config.weights, config.groups, config.modalities)


def search_options(config: SearchConfig, k: int) -> SearchOptions:
    """Return the configured options of a search for ``k`` videos."""
    return SearchOptions(k, scorer_of(config), config.recall, config.probes, config.candidates, config.rescored)


def search(config: Config, query: Query, k: int, explained: bool = False, wanted: Wanted = Wanted()) -> list[Found]:
    """Return the best ``k`` videos for a query, from the newest release.

    The segments are loaded into this process: for many queries use ``evaluate``, which spreads them over actors.

    Raises
    ------
    StorageError
        If nothing was released yet.
    ConfigError
        If the encoder does not take such a query.
    """
    store = open_store(config)
    release = open_release(store)
    with reading(store, release.release_id):
        return _search(config, store, release, query, k, explained, wanted)


def _search(
    config: Config, store: Store, release: Release, query: Query, k: int, explained: bool, wanted: Wanted
) -> list[Found]:
    encoder = release.load_encoder(os.cpu_count() or 1, config.search.device)
    embedded = encoder.encode_queries([query])
    manifest = release.manifest
    holder = SegmentHolder(store, manifest, manifest["segments"], config.search.codes_on_disk, config.search.device)
    options = replace(search_options(config.search, k), filter=filter_of(store, release, wanted))
    [hits] = holder.search(embedded, options)
    videos = _videos(store, release, [hit.video_id for hit in hits])
    tokens = encoder.query_tokens(query) if explained else []
    return [
        Found(
            video_id=hit.video_id,
            score=hit.score,
            start_seconds=hit.start_seconds,
            stop_seconds=hit.stop_seconds,
            title=videos[hit.video_id]["title"],
            uri=videos[hit.video_id]["uri"],
            **(_explanation(store, release, hit, embedded[0], tokens, options.scorer) if explained else {}),
        )
        for hit in hits
    ]


def filter_of(store: Store, release: Release, wanted: Wanted) -> Filter:
    """Return a filter, tags turned into the videos that carry one."""
    video_ids = frozenset(wanted.videos) if wanted.videos else None
    if wanted.tags:
        table = store.open(VIDEOS, release.tables[VIDEOS]).to_table(columns=["video_id", "tags"])
        tagged = {row["video_id"] for row in table.to_pylist() if set(row["tags"] or ()).intersection(wanted.tags)}
        video_ids = frozenset(tagged if video_ids is None else tagged & video_ids)
    return Filter(video_ids, wanted.start_seconds, wanted.stop_seconds)


def _videos(store: Store, release: Release, video_ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    dataset = store.open(VIDEOS, release.tables[VIDEOS])
    rows = dataset.to_table(columns=["video_id", "title", "uri"], filter=any_of(video_ids)) if video_ids else None
    found = {row["video_id"]: row for row in rows.to_pylist()} if rows else {}
    return defaultdict(lambda: {"title": None, "uri": None}, found)


def any_of(video_ids: Sequence[str]) -> str:
    """Return the condition that a row is of one of these videos."""
    quoted = ", ".join("'" + video_id.replace("'", "''") + "'" for video_id in video_ids)
    return f"video_id IN ({quoted})"


def _explanation(
    store: Store, release: Release, hit: Hit, query: np.ndarray, query_tokens: Sequence[str], scorer: Scorer
) -> dict[str, Any]:
    explained = explain(store, release, hit, query, query_tokens, scorer)
    return {"winners": explained.winners, "share_by_modality": explained.share_by_modality}


def explain(
    store: Store, release: Release, hit: Hit, query: np.ndarray, query_tokens: Sequence[str], scorer: Scorer
) -> Explanation:
    """Return the winners of a hit and each modality's share, from the float16 embeddings behind the index."""
    of_clip = f"{any_of([hit.video_id])} AND clip = {hit.clip}"
    table = store.open(release.token_table, release.tables[release.token_table])
    rows = table.to_table(columns=["modality", "embeddings", "span_index", "grid"], filter=of_clip).to_pylist()
    rows.sort(key=lambda row: schema.MODALITIES.index(row["modality"]))
    dim = release.manifest["dim"]
    tokens = np.concatenate([np.array(row["embeddings"], np.float32).reshape(-1, dim) for row in rows])
    lengths = np.array([len(row["span_index"]) for row in rows])
    modality = np.array([schema.MODALITIES.index(row["modality"]) for row in rows], np.uint8)
    winners, shares = explain_clip(query, tokens, lengths, modality, scorer)
    contents = _contents(store, release, of_clip)
    places = [(row, place) for row in rows for place in range(len(row["span_index"]))]
    return Explanation(
        [
            _winner(token, places[index][0], places[index][1], score, contents)
            for token, index, score in zip(query_tokens, winners.token.tolist(), winners.score.tolist(), strict=True)
        ],
        {schema.MODALITIES[m]: share for m, share in shares.items()},
        contents,
    )


def _contents(store: Store, release: Release, of_clip: str) -> dict[str, dict[str, Any]]:
    table = store.open(MODALITIES, release.tables[MODALITIES])
    rows = table.to_table(columns=["modality", "spans", "frames"], filter=of_clip).to_pylist()
    return {row["modality"]: row for row in rows}


def _winner(token: str, row: dict[str, Any], place: int, score: float, contents: dict[str, dict[str, Any]]) -> Winner:
    """Return what the token at a place of a modality won with."""
    modality, span = row["modality"], row["span_index"][place]
    content = contents[modality]
    if modality == schema.FRAME:
        seconds = content["frames"][span]["pts_seconds"]
        return Winner(token, modality, score, seconds, f"frame {span}", _patch(row["grid"], place))
    of_span = content["spans"][span]
    return Winner(token, modality, score, of_span["start_seconds"], of_span["text"])


def _patch(grid: Sequence[int] | None, place: int) -> tuple[float, float, float, float] | None:
    """Return where in its frame the patch at a place is; None where tokens are no patches."""
    if not grid:
        return None
    _, num_rows, num_columns = grid
    row, column = divmod(place % (num_rows * num_columns), num_columns)
    return column / num_columns, row / num_rows, (column + 1) / num_columns, (row + 1) / num_rows
